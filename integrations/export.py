"""Pipeline folders that open where this package is not installed.

A network of diffusers needs nothing. One of ours leaves its source beside its weights, and the folder's README.md
says how to open it. Where ``import integrations.models`` works, ``from_pretrained(folder)`` does after it.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

CARD = """---
library_name: diffusers
---
Images from this model, in this folder:

```python
{code}
```
"""


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, arguments: str, code: Path | None = None) -> None:
    """Write a pipeline and a README.md with the lines that open it.

    Parameters
    ----------
    pipeline : DiffusionPipeline
        Its network is its ``unet``.
    folder : Path
        Where to write it.
    arguments : str
        Arguments of a call that draws images.
    code : Path, optional
        Source of a pipeline that is not in diffusers.
    """
    pipeline.save_pretrained(folder)
    network, name = type(pipeline.unet), type(pipeline).__name__
    source = None if network.__module__.startswith("diffusers.") else Path(inspect.getfile(network))
    if source is not None:
        shutil.copyfile(source, folder / "unet" / source.name)
    if code is not None:
        shutil.copyfile(code, folder / "pipeline.py")
        lines = [
            "from diffusers import DiffusionPipeline\n",
            'pipeline = DiffusionPipeline.from_pretrained(".", custom_pipeline=".", trust_remote_code=True)',
        ]
        if source is not None:
            # diffusers then takes the class from that file. In other folders this would make ``from_pretrained``
            # ask for trust in remote code, which a custom pipeline does anyway.
            index = json.loads((folder / "model_index.json").read_text())
            index["unet"] = [source.stem, network.__name__]
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    elif source is not None:
        scheduler = type(pipeline.scheduler).__name__
        lines = [
            f"import sys\n\nfrom diffusers import {name}, {scheduler}\n",
            'sys.path.insert(0, "unet")  # the network brings its source',
            f"from {source.stem} import {network.__name__}\n",
            f'unet = {network.__name__}.from_pretrained("unet")',
            f'pipeline = {name}(unet=unet, scheduler={scheduler}.from_pretrained("scheduler"))',
        ]
    else:
        lines = [f"from diffusers import {name}\n", f'pipeline = {name}.from_pretrained(".")']
    lines.append(f"images = pipeline({arguments}).images")
    (folder / "README.md").write_text(CARD.format(code="\n".join(lines)))
