"""Classes of the user's own, which a recipe names by ``class_path`` and ``init_args``; jsonargparse checks them."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from .config import Data, Own, OwnNetwork, RecipeError, closest
from .data import Batch, DataError, Images, square
from .objective import Objective
from .own_network import OwnModel, built


def construct(section: str, named: Any, base: type, /, **given: Any) -> Any:
    """Build the class that a section names.

    Parameters
    ----------
    section : str
        Its name, for messages.
    named : dataclass
        Has ``class_path`` and ``init_args``.
    base : type
        What the class must be a subclass of.
    **given
        Arguments that are not the recipe's to choose; a constructor gets those that it takes.

    Raises
    ------
    RecipeError
        In one line, for a class that cannot be imported or built, or arguments that it does not take.
    """
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_subclass_arguments(base, section, skip=set(given), fail_untyped=False)
        parsed = parser.parse_object({section: {"class_path": named.class_path, "init_args": named.init_args}})
        # Its arguments, with the objects among them; the class itself is built below, where its errors are its own.
        arguments = [(lambda kind, /, **options: options, _kind(named), False)]
        options = parser.instantiate(parsed, instantiators=arguments)[section]
    except (ArgumentError, ValueError) as error:
        raise RecipeError(_said(section, named, str(error), given)) from error
    with _told(f"{section}.class_path: {named.class_path} cannot be built"):
        return built(_kind(named), given, options)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say in one line what failed in code that is not ours, and where."""
    try:
        yield
    except Exception as error:
        *_, frame = traceback.extract_tb(error.__traceback__)
        msg = f"{what}: {type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"
        raise RecipeError(" ".join(msg.split())) from error


def _kind(config: Any) -> type:
    module, _, name = config.class_path.rpartition(".")
    return getattr(import_module(module), name)


def _said(section: str, config: Any, text: str, given: dict[str, Any]) -> str:
    """Turn what jsonargparse says of a class into one line that names the field."""
    # Between these stands what is wrong: no class at all was the other choice.
    found = re.search(r"- (?:Problem with given class_path '[^']*':)?(.*?)\n *- Expected a <class 'None", text, re.S)
    text = " ".join((found[1] if found else text).split())
    option = re.fullmatch(r"Option '([\w.]+)' is not accepted", text)
    if option is not None:
        takes = [name for name in inspect.signature(_kind(config)).parameters if name not in given]
        known = f"expected one of {', '.join(takes)}{closest(option[1], takes)}"
        return f"{section}.init_args.{option[1]}: {config.class_path} takes no such argument; {known}"
    value = re.fullmatch(r'Parser key "([\w.]+)": (.*)', text)
    if value is not None:
        return f"{section}.init_args.{value[1]}: {value[2]}"
    return f"{section}.class_path: got {config.class_path!r}: {text}"


def network(config: OwnNetwork, objective: Objective) -> ModelMixin:
    """Build a network for the data of an objective: one of diffusers as it is, any other as an `OwnModel`.

    Raises
    ------
    RecipeError
        If it cannot be built, or does not answer a batch of data with a batch of that shape.
    """
    channels, side, _ = objective.shape
    sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels}
    classes = None if config.classes is None else config.classes + (objective.dropout > 0)
    told = {"num_class_embeds": classes, "cross_attention_dim": getattr(objective, "caption_width", None)}
    given = sizes | {name: value for name, value in told.items() if value is not None}
    model = construct("model", config, nn.Module, **given)
    if not type(model).__module__.startswith("diffusers."):
        model = OwnModel(config.class_path, config.init_args, **given, network=model)
    rows = torch.zeros(2, *objective.shape)
    told = {} if config.classes is None else {"class_labels": torch.zeros(2, dtype=torch.int64)}
    if "cross_attention_dim" in given:
        told["encoder_hidden_states"] = torch.zeros(2, 77, given["cross_attention_dim"])
    called = f"{config.class_path} called as network(x, timesteps{''.join(f', {name}=' for name in told)})"
    if rows.device.type != "meta":  # where only its sizes matter
        with torch.no_grad(), _told(f"model.class_path: {called}"):
            found = model.eval()(rows, torch.full((2,), 500.0), **told).sample.shape
        if found != rows.shape:
            msg = f"model.class_path: {called} gives {tuple(found)} for x of {tuple(rows.shape)}, expected that shape"
            raise RecipeError(msg)
    return model.train()


def objective(config: Own, shape: tuple[int, ...], classes: int | None) -> Objective:
    """Build an objective for data of a shape.

    Raises
    ------
    RecipeError
        If it cannot be built.
    """
    return construct("objective", config, Objective, config=config, shape=shape, classes=classes)


class ItemImages(Images):
    """A map-style data set of images, or of pairs of an image and a label.

    Parameters
    ----------
    config : Data
        Names the class of the data set, and how to cut and scale its images.

    Raises
    ------
    RecipeError
        If it cannot be built, or its labels have no names.
    DataError
        If an item is no image.
    """

    def __init__(self, config: Data) -> None:
        self.config, self.items = config, construct("data", config, Dataset)
        image, label = self._item(0)
        self.shape = tuple(image.shape)
        self.classes = [str(name) for name in getattr(self.items, "classes", [])] or [""]
        if label is not None and self.classes == [""]:
            msg = f"data.class_path: {config.class_path} has labels, expected an attribute classes with their names too"
            raise RecipeError(msg)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: list[int]) -> Batch:
        images, labels = zip(*map(self._item, rows), strict=True)
        for row, image in zip(rows, images, strict=True):
            if image.shape != self.shape:
                found = f"item {row} is {tuple(image.shape)}, the first is {self.shape}"
                msg = f"{self.config.class_path}: {found}: set data.resolution"
                raise DataError(msg)
        return Batch(torch.stack(images), torch.tensor([int(label or 0) for label in labels]), [], {})

    def _item(self, row: int) -> tuple[Tensor, int | None]:
        item = self.items[row]
        image, label = (item[0], item[1]) if isinstance(item, tuple | list) else (item, None)
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            image = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            found = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}".strip()
            expected = "an image of PIL, a uint8 array (h, w) or (h, w, c), or a uint8 tensor (c, h, w)"
            msg = f"data.class_path: {self.config.class_path}: item {row} is {found}, expected {expected}"
            raise DataError(msg)
        return square(image if image.mode in ("L", "RGB") else image.convert("RGB"), self.config), label
