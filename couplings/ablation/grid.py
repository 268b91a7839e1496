"""The grid of an ablation: products of axes, from plain values as YAML and JSON hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import couplings
from couplings._names import unknown
from couplings.assigners.registry import find
from couplings.comparison import CANDIDATES
from couplings.coupling import Coupling

__all__ = ["AXES", "Point", "points", "read_grid"]

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

_CONDITIONS = ("none", "class")


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
        """Build the coupling.

        Raises
        ------
        ValueError, TypeError
            For unknown names and options.
        """
        return Coupling(self.method, self.metric, self.quantize, self.scope, **self.options)  # type: ignore[arg-type]

    @property
    def candidates(self) -> int:
        """Rows of noise for each row of data."""
        info = find(self.method).info
        chooses = info.needs == "points" and info.marginal == "selected"
        return int(self.options.get("k") or CANDIDATES) if chooses else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Point:
        """Rebuild what `to_dict` wrote, out of a record that holds more."""
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

    Parameters
    ----------
    path : Path

    Returns
    -------
    list of dict

    Raises
    ------
    ImportError
        For YAML without PyYAML.
    ValueError
        If the file is not a grid.
    OSError
        If it cannot be read.
    """
    text = path.read_text()
    if path.suffix.lower() == ".json":
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            msg = f"{path}: not valid JSON: {error}"
            raise ValueError(msg) from error
    else:
        try:
            import yaml
        except ImportError as error:
            msg = (
                f"{path}: a grid in YAML needs the package PyYAML, which is not installed. Type: "
                "pip install 'couplings[ablate]', or write the grid as JSON into a file that ends in .json."
            )
            raise ImportError(msg) from error
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            msg = f"{path}: not valid YAML: {error}"
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
        A method with options is a mapping, ``{"sinkhorn": {"reg": 0.1}}``.

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
    data = [str(each) for each in _listed(axes["data"])]
    sizes = [_whole("n", each, least=2) for each in _listed(axes["n"])]
    seeds = _seeds(axes["seeds"])
    scopes: list[tuple[str, int]] = []
    for scope in _listed(axes["scopes"]):
        known = str(scope).lower()
        if known not in ("local", "global"):
            raise ValueError(unknown("scope", scope, ("local", "global")))
        ranks = [_whole("ranks", each, least=2) for each in _listed(axes["ranks"])]
        scopes += [("local", 1)] if known == "local" else [("global", each) for each in ranks]
    metrics = couplings.metrics() if axes["metrics"] == "all" else _listed(axes["metrics"])
    quantizers = [None, *couplings.quantizers()] if axes["quantizers"] == "all" else _listed(axes["quantizers"])
    conditions = [_condition(each) for each in _listed(axes["conditions"])]
    methods = _methods(axes["methods"])
    cells = []
    for source, n, (scope, count), condition, seed, metric, quantizer, (method, options) in product(
        data, sizes, scopes, conditions, seeds, metrics, quantizers, methods
    ):
        labels = axes["labels"]
        point = Point(
            source, labels, n, method, metric, _none(quantizer), condition, scope, count, seed, options
        )  # fmt: skip
        coupling = point.coupling()  # names in their canonical form, and mistakes before anything runs
        cells.append(
            replace(point, method=str(coupling.method), metric=str(coupling.metric), quantize=coupling.quantize)
        )
    return cells


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _whole(axis: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        msg = f"{axis}: expected whole numbers of at least {least}, got {value!r}."
        raise ValueError(msg)
    return value


def _seeds(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [_whole("seeds", each, least=0) for each in value]
    return list(range(_whole("seeds", value, least=1)))


def _condition(value: Any) -> str | None:
    name = _none(value)
    if name is not None and name not in _CONDITIONS:
        raise ValueError(unknown("condition", name, _CONDITIONS))
    return None if name is None else str(name)


def _methods(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names and options; ``all`` is every method that is registered."""
    if value == "all" or value == ["all"]:
        return [(info.name, {}) for info in couplings.methods()]
    found = []
    for each in [value] if isinstance(value, dict) else _listed(value):
        entries = each.items() if isinstance(each, dict) else [(each, None)]
        for name, options in entries:
            if not isinstance(options, dict | None):
                msg = f"methods: expected the options of {name} as a mapping, such as {{reg: 0.1}}, got {options!r}."
                raise TypeError(msg)
            found.append((find(name).info.name, dict(options or {})))
    return found
