"""Pipeline folders that open where this package is not installed.

A network of diffusers needs nothing. One of ours leaves its source beside its weights, and the folder's README.md
says how to open it. diffusers imports no module because a folder names it: plain ``from_pretrained(folder)`` works
after ``import integrations.models``.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_import_files

from . import class_conditional
from .objective import Objective
from .own_network import OwnModel

CARD = """---
library_name: diffusers
---
Images from this model, in this folder:

```python
{code}
```
"""

# A class that takes its network from the folder. Were it named so in model_index.json, as diffusers' custom components
# are, ``from_pretrained(folder)`` would ask for trust in remote code where the network has been imported, too.
OPENER = '''"""{pipeline} of diffusers, with what it does not know."""

import diffusers


class {pipeline}(diffusers.{pipeline}):'''
NETWORK = """
    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        return super().extract_init_dict(config_dict | {{"unet": ["{module}", "{network}"]}}, **kwargs)
"""
CLASSES = '''
    def __call__(self, class_labels, guidance_scale=1.0, **options):
        """Draw an image of each of ``class_labels``; ``options`` are those of diffusers' pipeline."""
        from .class_conditional import told

        with told(self.unet, class_labels, guidance_scale, {classes}):
            return super().__call__(batch_size=len(class_labels), **options)
'''


def save_pipeline(
    pipeline: DiffusionPipeline, folder: Path, arguments: str, objective: Objective, code: Path | None = None
) -> None:
    """Write a pipeline and a README.md with the lines that open it.

    Parameters
    ----------
    pipeline : DiffusionPipeline
        Its network is its ``unet``.
    folder : Path
        Where to write it.
    arguments : str
        Arguments of a call that draws images, beside those that say how many and of which classes.
    objective : Objective
        Says which classes the network knows.
    code : Path, optional
        Source of a pipeline that is not in diffusers.
    """
    pipeline.save_pretrained(folder)
    network, name, classes = type(pipeline.unet), type(pipeline).__name__, objective.classes
    source = None if network.__module__.startswith("diffusers.") else Path(inspect.getfile(network))
    if source is not None:
        shutil.copyfile(source, folder / "unet" / source.name)
    if isinstance(pipeline.unet, OwnModel):
        _add_source(pipeline.unet, folder / "unet" / source.name)
    if classes is not None or code is not None:
        shutil.copyfile(class_conditional.__file__, folder / "class_conditional.py")
    if classes is not None:
        labels = list(range(min(classes, 4)))
        arguments = (
            f"class_labels={labels}, guidance_scale={getattr(objective.config, 'guidance_scale', 1.0)}, {arguments}"
        )
    elif name != "StableDiffusionPipeline":
        arguments = f"batch_size=4, {arguments}"
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
    elif source is not None or classes is not None:
        # One file for each kind of pipeline: diffusers mixes up custom pipelines whose files have one name.
        opener, why = OPENER.format(pipeline=name), []
        if source is not None:
            opener += NETWORK.format(module=source.stem, network=network.__name__)
            why.append(f"# The class of the network is not in diffusers: this runs its source, unet/{source.name}.")
        if classes is not None:
            opener += CLASSES.format(classes=classes)
            why.append(f"# This runs {name}.py, which tells the network classes.")
        (folder / f"{name}.py").write_text(opener)
        lines = [
            "from diffusers import DiffusionPipeline\n",
            *why,
            f'pipeline = DiffusionPipeline.from_pretrained(".", custom_pipeline="{name}", trust_remote_code=True)',
        ]
    else:
        lines = [f"from diffusers import {name}\n", f'pipeline = {name}.from_pretrained(".")']
    lines.append(f"images = pipeline({arguments}).images")
    (folder / "README.md").write_text(CARD.format(code="\n".join(lines)))


def _add_source(model: OwnModel, wrapper: Path) -> None:
    """Put the source of a user's network beside the copy of `own_network` that wraps it."""
    kind = type(model.network)
    source = Path(inspect.getfile(kind))
    for path in (source, *map(Path, get_relative_import_files(source))):
        shutil.copyfile(path, wrapper.parent / path.name)
    line = f"from .{source.stem} import {kind.__name__}  # noqa: E402\n\nOwnModel.kind = {kind.__name__}\n"
    wrapper.write_text(f"{wrapper.read_text()}\n\n{line}")


def say_whose(folder: Path, run: str, step: int, decay: float) -> None:
    """Add to a folder's README.md which weights it holds."""
    with (folder / "README.md").open("a") as file:
        file.write(f"\nWeights: the average of decay {decay} after training step {step} of the run `{run}`.\n")
