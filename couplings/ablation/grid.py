"""The grid of an ablation: products of axes, from plain values as YAML, JSON and flags hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import couplings
from couplings._names import unknown
from couplings.assigners.registry import find
from couplings.coupling import Coupling

__all__ = ["AXES", "CANDIDATES", "Point", "chooses", "points", "read_grid", "read_method"]

AXES: dict[str, Any] = {
    "data": ["crops32"],
    "labels": None,
    "n": [128, 256, 512, 1024],
    "methods": "all",
    "metrics": ["sqeuclidean"],
    "quantizers": [None],
    "conditions": [None],
    "scopes": ["local"],
    "ranks": [2],
    "seeds": 3,
}
"""Axes of a grid and what they are where a grid does not name them."""

CANDIDATES = 4
"""Rows of noise for each row of data that a method chooses from, unless its option ``k`` says otherwise."""

_CONDITIONS = ("none", "class")


def chooses(method: str) -> bool:
    """Whether a method chooses among candidates of its own for each row, as `nearest` does."""
    info = find(method).info
    return info.needs == "points" and info.marginal == "selected"


@dataclass(frozen=True)
class Point:
    """One cell of an ablation.

    Attributes
    ----------
    data : str
        Name of a source of data, or a file.
    labels : str or None
        File with the classes of a file of data.
    n : int
        Rows on each rank.
    method, metric : str
    quantize, condition : str or None
        ``condition="class"``: coupled within classes.
    scope : str
    ranks : int
        Processes that hold n rows each; 1 for the local scope.
    seed : int
        Of the data, the noise and the method.
    options : dict
        Of the method.
    """

    data: str
    labels: str | None
    n: int
    method: str
    metric: str
    quantize: str | None
    condition: str | None
    scope: str
    ranks: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def coupling(self) -> Coupling:
        """Build the coupling; unknown names and options raise a ValueError or TypeError."""
        return Coupling(self.method, self.metric, self.quantize, self.scope, **self.options)  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """Rows that are coupled together, on all ranks."""
        return self.n * self.ranks

    @property
    def candidates(self) -> int:
        """Rows of noise for each row of data."""
        return int(self.options.get("k") or CANDIDATES) if chooses(self.method) else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Point:
        """Rebuild what `to_dict` wrote, out of a record that holds more; a ValueError if it holds less."""
        missing = [name for name in cls.__dataclass_fields__ if name not in plain]
        if missing:
            msg = f"a record has no {', '.join(missing)}. Is it one of couplings ablate?"
            raise ValueError(msg)
        return cls(**{name: plain[name] for name in cls.__dataclass_fields__})

    @property
    def key(self) -> str:
        """The same for the same cell, in any process."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @property
    def label(self) -> str:
        """The method with its options, as rows of tables are named."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def title(self) -> str:
        """Name for a progress bar."""
        parts = (self.label, self.metric, self.quantize, self.condition)
        where = f"{self.ranks} x {self.n}" if self.scope == "global" else f"n = {self.n}"
        return f"{self.data} {where}: {' '.join(part for part in parts if part)}"


def read_grid(path: Path) -> list[dict[str, Any]]:
    """Read a grid from YAML or JSON: a mapping of axes, or a list of such mappings.

    Raises
    ------
    ImportError
        For YAML without PyYAML.
    ValueError
        If the file is not a grid.
    OSError
        If it cannot be read.
    """
    text, kind = path.read_text(), "JSON" if path.suffix.lower() == ".json" else "YAML"
    if kind == "YAML":
        import yaml
    try:
        value = yaml.safe_load(text) if kind == "YAML" else json.loads(text)
    except Exception as error:  # each library has its own
        msg = f"{path}: not valid {kind}: {error}"
        raise ValueError(msg) from error
    grids = value if isinstance(value, list) else [value]
    if not grids or not all(isinstance(grid, dict) for grid in grids):
        msg = f"{path}: expected a mapping of axes ({', '.join(AXES)}), or a list of such mappings."
        raise ValueError(msg)
    return grids


def points(grids: Sequence[Mapping[str, Any]]) -> list[Point]:
    """List the cells of grids, each once.

    Parameters
    ----------
    grids : sequence of mapping
        Axes to their values; a single value stands for a list of one. ``seeds`` is a list, or how many from 0 on.
        A method with options is a mapping, ``{"sinkhorn": {"reg": 0.1}}``, or ``"sinkhorn:reg=0.1"``.

    Returns
    -------
    list of Point
        Grid by grid; in each, the cells that couple the same batch follow each other.

    Raises
    ------
    ValueError
        For unknown axes, names and options, or values out of range.
    TypeError
        For values of another type, or an option that the method does not take.
    """
    found: dict[str, Point] = {}
    for grid in grids:
        for point in _product(grid):
            found.setdefault(point.key, point)
    return list(found.values())


def _product(grid: Mapping[str, Any]) -> list[Point]:
    for axis in grid:
        if axis not in AXES:
            raise ValueError(unknown("axis of a grid", axis, AXES))
    axes = {**AXES, **grid}
    ranks = [_whole("ranks", each, least=2) for each in _listed(axes["ranks"])]
    scopes: list[tuple[str, int]] = []
    for scope in (_one_of("scope", each, ("local", "global")) for each in _listed(axes["scopes"])):
        scopes += [("local", 1)] if scope == "local" else [("global", each) for each in ranks]
    conditions = [_none(_one_of("condition", each, _CONDITIONS)) for each in _listed(axes["conditions"])]
    seeds = axes["seeds"]
    if not isinstance(seeds, list | tuple):
        seeds = range(_whole("seeds", seeds, least=1))
    cells = []
    for data, n, (scope, count), condition, seed, metric, quantizer, (method, options) in product(
        [str(each) for each in _listed(axes["data"])],
        [_whole("n", each, least=1) for each in _listed(axes["n"])],
        scopes,
        conditions,
        [_whole("seeds", each, least=0) for each in seeds],
        couplings.metrics() if _all(axes["metrics"]) else _listed(axes["metrics"]),
        [None, *couplings.quantizers()] if _all(axes["quantizers"]) else _listed(axes["quantizers"]),
        _methods(axes["methods"]),
    ):
        cell = Point(data, axes["labels"], n, method, metric, _none(quantizer), condition, scope, count, seed, options)
        named = cell.coupling()  # names in their canonical form, and mistakes before anything runs
        cells.append(replace(cell, method=str(named.method), metric=str(named.metric), quantize=named.quantize))
    return cells


def _all(value: Any) -> bool:
    return value in ("all", ["all"])


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _one_of(kind: str, value: Any, known: Sequence[str]) -> str:
    name = str(value).lower()
    if name not in known:
        raise ValueError(unknown(kind, value, known))
    return name


def _whole(axis: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        msg = f"{axis}: expected whole numbers of at least {least}, got {value!r}."
        raise ValueError(msg)
    return value


def _methods(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names and options; ``all`` is every method that is registered."""
    if _all(value):
        return [(info.name, {}) for info in couplings.methods()]
    found = []
    for each in [value] if isinstance(value, dict) else _listed(value):
        entries = each.items() if isinstance(each, dict) else [read_method(str(each))]
        for name, options in entries:
            if not isinstance(options, dict | None):
                msg = f"methods: expected the options of {name} as a mapping, such as {{reg: 0.1}}, got {options!r}."
                raise TypeError(msg)
            found.append((find(name).info.name, dict(options or {})))
    return found


def read_method(text: str) -> tuple[str, dict[str, Any]]:
    """Read a method with its options, ``name:option=value:option=value``.

    Parameters
    ----------
    text : str
        The name may be ``package.module:function``. A value is a number, a truth value or None where it looks like
        one, and a string otherwise.

    Returns
    -------
    str, dict
        The name as it stands, and the options.

    Raises
    ------
    ValueError
        If something is no ``option=value``, or an option is given twice.

    Examples
    --------
    >>> read_method("sinkhorn:reg=0.1:draw=rows")
    ('sinkhorn', {'reg': 0.1, 'draw': 'rows'})
    """
    parts = [part.strip() for part in text.split(":")]
    # A name may hold a colon itself.
    first = next((i for i, part in enumerate(parts) if "=" in part), len(parts))
    options: dict[str, Any] = {}
    for part in parts[first:]:
        name, equals, value = (each.strip() for each in part.partition("="))
        if not name or not equals:
            msg = f"expected an option as name=value, got {part!r} in {text!r}. Type: sinkhorn:reg=0.1"
            raise ValueError(msg)
        if name in options:
            msg = f"the option {name} is given twice in {text!r}."
            raise ValueError(msg)
        options[name] = _value(value)
    return ":".join(parts[:first]), options


def _value(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None, "null": None}
    for read in (int, float, constants.__getitem__):
        with suppress(ValueError, KeyError):
            return read(text.lower())
    return text
