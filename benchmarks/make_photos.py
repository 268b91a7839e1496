"""Make the photographs of `couplings.ablation` from those of scikit-image: ``python -m benchmarks.make_photos``.

Needs scikit-image, which `couplings` itself does not: the file is committed. Running it again gives the same bytes
with the same versions of NumPy and scikit-image.
"""

from pathlib import Path

import numpy as np
from skimage import data, transform, util

TARGET = Path(__file__).parents[1] / "couplings" / "ablation" / "data" / "photos.npz"
HEIGHT = 160
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # public domain or CC0, see the README beside them


def main() -> None:
    """Downsample each photograph to `HEIGHT` rows and write them all."""
    photos = {}
    for name in PHOTOGRAPHS:
        photo = getattr(data, name)()
        width = round(photo.shape[1] * HEIGHT / photo.shape[0])
        photos[name] = util.img_as_ubyte(transform.resize(photo, (HEIGHT, width), order=1, anti_aliasing=True))
    np.savez_compressed(TARGET, **photos)
    sizes = ", ".join(f"{name} {'x'.join(map(str, photo.shape))}" for name, photo in photos.items())
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1000:.0f} kB, {sizes}")


if __name__ == "__main__":
    main()
