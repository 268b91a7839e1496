"""The section ``coupling`` of a recipe, whose names are known before couplings and PyTorch load."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal

from .sections import Count, Section, check_importable, closest, expect

METHODS = (
    *("independent", "hungarian", "lapjv", "auction", "emd", "sinkhorn", "greedy", "stable", "sliced", "nearest"),
    *("exact", "jv", "none", "knn"),
)
"""Names of pairing methods that couplings knows: written out, because to ask it loads PyTorch."""
METRICS = ("sqeuclidean", "l2", "l1", "cosine", "dot")
QUANTIZERS = ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


DATASET_METHODS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "semidiscrete": {
        "potentials": ("the path of a plan, or null", lambda value: value is None or isinstance(value, str)),
        "tolerance": ("a number above 0", lambda value: _number(value) and value > 0),
    },
    "persistent": {
        "seeds": ("a whole number of at least 1", lambda value: _number(value) and value >= 1 and value == int(value)),
    },
}
"""Methods that look beyond the batch, what their options should be, and whether a value is."""


@dataclass
class CouplingSection(Section):
    """Which noise each data row gets (see ``couplings methods``)."""

    section: ClassVar[str] = "coupling"
    method: str = "auction"
    """Name of the pairing method; ``independent`` is the baseline. ``semidiscrete``: noise picks its row in the whole
    dataset, by the plan of ``coupling.options.potentials`` (what ``couplings fit`` writes) or one that is fitted when
    the run begins, to ``coupling.options.tolerance``. ``persistent``: noise of ``coupling.options.seeds`` seeds stays
    with each row, and is coupled again in every batch. ``nearest:k=4`` has its options with it."""
    metric: str = "sqeuclidean"
    """Distance that the pairing minimises."""
    quantize: str | None = None
    """Number format the operands of the cost are rounded to; null does not round."""
    scope: Literal["local", "global"] = "local"
    """``local`` couples each device's batch; ``global`` couples the whole global batch over all processes and
    accumulated batches."""
    condition: Literal["class"] | None = None
    """``class`` couples within each class only, so that the noise given the class stays Gaussian."""
    window: Count = 1
    """Optimizer steps whose blocks are coupled together, ahead of training: the optimal transport batch is that many
    times as large."""
    options: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    """Options of the method, as ``--coupling.options.reg 0.2``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        told, (self.method, options) = self.method, split_method(self.method)
        for name in options:
            expect(name not in self.options, "coupling.method", told, f"{name} here or in coupling.options, once")
        self.options = {**self.options, **options}
        if self.method in DATASET_METHODS:
            self._check_dataset_method(DATASET_METHODS[self.method])
        else:
            self._check_names()

    def _check_dataset_method(self, known: dict[str, tuple[str, Callable[[Any], bool]]]) -> None:
        """Refuse what a method that looks beyond the batch cannot do."""
        for name, value in self.options.items():
            only = f"only {' and '.join(known)} for {self.method}"
            expected, fits = known.get(name, (only, lambda _: False))
            expect(fits(value), f"coupling.options.{name}", value, expected)
        self.expect(self.scope == "local", "scope", f"local for coupling.method = {self.method}")
        self.expect(self.window == 1, "window", f"1 for coupling.method = {self.method}")
        if self.method == "semidiscrete":  # its plans are for this distance
            self.expect(self.metric == "sqeuclidean", "metric", "sqeuclidean for semidiscrete")
            self.expect(self.quantize is None, "quantize", "null for semidiscrete")

    def _check_names(self) -> None:
        """Refuse names that couplings would; it may know those of other packages."""
        for name, names in (("metric", METRICS), ("quantize", QUANTIZERS)):
            value = getattr(self, name)
            fits = value is None or value.strip().lower() in names
            self.expect(fits, name, f"one of {', '.join(names)}{closest(str(value), names)}")
        if ":" in self.method:
            check_importable("coupling.method", self.method, "package.module:function")
        elif "couplings" not in sys.modules and not entry_points(group="couplings.methods"):
            known = (*METHODS[:10], *DATASET_METHODS)
            expected = f"one of {', '.join(known)}{closest(self.method, known)}"
            self.expect(self.method.strip().lower() in METHODS, "method", expected)


def split_method(text: str) -> tuple[str, dict[str, bool | int | float | str | None]]:
    """Read ``name:option=value:option=value`` as couplings does, without PyTorch."""
    name, *words = re.split(r":(?=[^:]*=)", text)  # a name may hold a colon itself
    options: dict[str, Any] = {}
    for word in words:
        option, _, value = map(str.strip, word.partition("="))
        expect(bool(option) and option not in options, "coupling.method", text, "every option once, as name=value")
        options[option] = value
        constants = {"true": True, "false": False, "none": None, "null": None}
        for read in (int, float, constants.__getitem__):
            with suppress(ValueError, KeyError):
                options[option] = read(value.lower())
                break
    return name.strip(), options
