"""Classes of the user's own, which a recipe names by ``class_path`` and ``init_args``; jsonargparse checks them."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from .config import RecipeError, closest
from .own_network import built


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
        arguments = [(lambda kind, /, **options: options, locate(named.class_path), False)]
        options = parser.instantiate(parsed, instantiators=arguments)[section]
    except (ArgumentError, ValueError) as error:
        raise RecipeError(_said(section, named, str(error), given)) from error
    with told(f"{section}.class_path: {named.class_path} cannot be built"):
        return built(locate(named.class_path), given, options)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say in one line what failed in code that is not ours, and where."""
    try:
        yield
    except Exception as error:
        *_, frame = traceback.extract_tb(error.__traceback__)
        msg = f"{what}: {type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"
        raise RecipeError(" ".join(msg.split())) from error


def _said(section: str, config: Any, text: str, given: dict[str, Any]) -> str:
    """Turn what jsonargparse says of a class into one line that names the field."""
    # Between these stands what is wrong: no class at all was the other choice.
    found = re.search(r"- (?:Problem with given class_path '[^']*':)?(.*?)\n *- Expected a <class 'None", text, re.S)
    text = " ".join((found[1] if found else text).split())
    option = re.fullmatch(r"Option '([\w.]+)' is not accepted", text)
    if option is not None:
        takes = [name for name in inspect.signature(locate(config.class_path)).parameters if name not in given]
        known = f"expected one of {', '.join(takes)}{closest(option[1], takes)}"
        return f"{section}.init_args.{option[1]}: {config.class_path} takes no such argument; {known}"
    value = re.fullmatch(r'Parser key "([\w.]+)": (.*)', text)
    if value is not None:
        return f"{section}.init_args.{value[1]}: {value[2]}"
    return f"{section}.class_path: got {config.class_path!r}: {text}"
