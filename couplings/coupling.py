"""`couple`, the one call; `Coupling`, the same call with its choices made; `Coupled`, what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor

from couplings import inputs
from couplings._names import unknown
from couplings._types import Marginal, Scope
from couplings.assigners.randomness import private_generator
from couplings.assigners.registry import find
from couplings.conditions import canonical_condition_metric, check_condition_weight
from couplings.distances import Metric, canonical_metric, full_float32
from couplings.inputs import Array
from couplings.pairing import Batch, Pairing, Plan, pair
from couplings.phases import phase
from couplings.quantization import canonical_quantizer, canonical_wire

if TYPE_CHECKING:
    from couplings.collectives import Trace

MethodLike = str | Callable[..., Any]
T = TypeVar("T", Tensor, "np.ndarray[Any, Any]")

# Options of every method; what is left belongs to the method itself.
_SHARED_OPTIONS = {"condition_weight": 1.0, "condition_metric": "sqeuclidean"}
_GLOBAL_OPTIONS = ("group", "wire")


@dataclass(frozen=True, eq=False)
class Coupled:
    """What a coupling returns.

    Attributes
    ----------
    noise : (n, *shape) Tensor or array
        ``noise_in[index]``, bit for bit: mix it with the data *and* regress on it.
    index : (n,) int64 Tensor or array
        Row ``i`` of the data got row ``index[i]`` of the noise. On the noise's device.
    marginal : {"permutation", "resampled", "selected"}
        What happened to the distribution of the noise. ``"permutation"``: the same multiset of rows, exactly.
        ``"resampled"``: every row has the right law averaged over data, rows may repeat. ``"selected"``: biased by
        choice.
    cost, cost_before : 0-d Tensor or array
        Mean distance of the pairs in the metric, after coupling and before (the identity pairing of the first n rows).
    gap : float or None
        Upper bound on ``(cost - optimum) / |cost|`` for the matrix that was solved, from dual prices; None where the
        method has no certificate.
    trace : Trace or None
        Bytes and seconds of each phase, after a coupling over several ranks.
    """

    noise: Any
    index: Any
    marginal: Marginal
    cost: Any
    cost_before: Any
    gap: float | None
    _rows: int = field(repr=False)
    _apply: Callable[[Any], Any] | None = field(default=None, repr=False)
    trace: Trace | None = field(default=None, repr=False)

    @property
    def reduction(self) -> Any:
        """0-d Tensor or array: ``1 - cost / cost_before``; 0 where both are 0."""
        change = self.cost_before - self.cost
        if isinstance(change, Tensor):
            return torch.where(change == 0, torch.zeros_like(change), change / self.cost_before)
        with np.errstate(divide="ignore"):  # minus infinity, as torch says without a word
            return np.asarray(change / self.cost_before if change else 0.0, dtype=self.cost.dtype)

    def apply(self, t: T) -> T:
        """Permute anything else that is tied to the noise, such as its seeds or its mask.

        Parameters
        ----------
        t : (m, ...) Tensor or array
            A row for every row of the noise that was passed in.

        Returns
        -------
        (n, ...) Tensor or array
            ``t[index]``.

        Raises
        ------
        TypeError
            If it is neither a tensor nor an array.
        ValueError
            If it has another number of rows.

        Notes
        -----
        After a coupling with ``scope="global"`` this is collective: every rank passes its rows and gets its rows.
        Gradients do not follow them to other ranks.
        """
        if self._apply is None:
            return take_tied(t, self.index, self._rows)
        moved: T = self._apply(t)
        return moved


class Coupling:
    """A coupling with its choices made: call it on batches.

    Parameters
    ----------
    method : str or callable
        A name or an alias from `couplings.methods()`, or ``fn(cost, *, generator=None) -> (n,) index``.
    metric : str or callable
        A name from `couplings.metrics()`, or ``fn(data, noise) -> (n, m) cost`` on flattened operands.
    quantize : str or None
        A name from `couplings.quantizers()`: rounds the operands of the cost, never the noise that is returned.
    scope : {"local", "global"}
        Couple within this process, or over all ranks of the process group.
    **options
        The method's own options, and ``condition_weight`` (default 1.0), ``condition_metric`` (``"sqeuclidean"`` or
        ``"cosine"``), and for ``scope="global"`` ``group`` (a process group) and ``wire`` (a
        quantizer's name or its dtype, such as ``torch.float16``: the type in which noise travels to be priced).

    Raises
    ------
    ValueError
        For an unknown name, with the closest known one.
    TypeError
        For a value of the wrong type, or an option that the method does not take.

    Examples
    --------
    >>> import torch
    >>> coupling = Coupling("auction", metric="l2")
    >>> coupled = coupling(torch.rand(8, 3, 4, 4), torch.randn(8, 3, 4, 4))
    >>> coupled.noise.shape
    torch.Size([8, 3, 4, 4])
    """

    def __init__(
        self,
        method: MethodLike = "auction",
        metric: Metric = "sqeuclidean",
        quantize: str | None = None,
        scope: Scope = "local",
        **options: Any,
    ) -> None:
        entry = find(method)
        self.method: MethodLike = entry.info.name if isinstance(method, str) else method
        self.metric: Metric = canonical_metric(metric)
        self.quantize = canonical_quantizer(quantize)
        if not isinstance(scope, str) or scope.lower() not in get_args(Scope):
            raise ValueError(unknown("scope", scope, get_args(Scope)))
        self.scope: Scope = cast(Scope, scope.lower())
        self.options: dict[str, Any] = dict(options)
        if "wire" in options:
            self.options["wire"] = canonical_wire(options["wire"])
        if "condition_metric" in options:
            self.options["condition_metric"] = canonical_condition_metric(options["condition_metric"])
        check_condition_weight(options.get("condition_weight", _SHARED_OPTIONS["condition_weight"]))
        self._check_options(entry.option_names, entry.info.name)

    def _check_options(self, known: frozenset[str] | None, method: str) -> None:
        for name in self.options:
            if name in _SHARED_OPTIONS:
                continue
            if name in _GLOBAL_OPTIONS:
                if self.scope == "local":
                    msg = f"{name}= is an option of scope='global'."
                    raise TypeError(msg)
                continue
            if known is not None and name not in known:
                kind = f"option of the method {method}:"
                raise TypeError(unknown(kind, name, known | set(_SHARED_OPTIONS)))

    def __call__(
        self,
        data: Array,
        noise: Array,
        *,
        condition: Array | None = None,
        generator: torch.Generator | None = None,
    ) -> Coupled:
        """Couple a batch; see `couple`."""
        if self.scope == "global":
            from couplings.distributed import couple_globally, process_group

            group = process_group(self.options.get("group"))
            if group is not None:
                return couple_globally(self, data, noise, condition, generator, group)
        inputs.check_generator(generator)
        generator = generator or private_generator()
        with torch.no_grad():
            with phase("checks"):
                x, y = inputs.check_pair(data, noise)
                plan = self.plan()
                check_rows(plan, len(x), len(y), condition is not None)
            with torch.autocast(x.device.type, enabled=False), full_float32(x.device):
                with phase("checks"):
                    batch = prepare(x, y, condition)
                pairing = pair(batch, plan, generator)
            with phase("gather"):
                return finish(pairing, y, as_numpy=isinstance(data, np.ndarray))

    def plan(self) -> Plan:
        """Resolve the names."""
        options = dict(self.options)
        shared = {name: options.pop(name, default) for name, default in _SHARED_OPTIONS.items()}
        for name in _GLOBAL_OPTIONS:
            options.pop(name, None)
        return Plan(find(self.method), isinstance(self.method, str), self.metric, self.quantize, options, **shared)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary with the keys ``method``, ``metric``, ``quantize``, ``scope`` and ``options``.

        Raises
        ------
        TypeError
            If the method, the metric or an option is no plain value, such as a callable or a process group.
        """
        plain: dict[str, Any] = {
            "method": self.method,
            "metric": self.metric,
            "quantize": self.quantize,
            "scope": self.scope,
            "options": dict(self.options),
        }
        for name, value in {**plain, **self.options}.items():
            if not isinstance(value, str | int | float | bool | None | dict):
                msg = (
                    f"{name} is {type(value).__name__}, which has no plain form. Register callables under a name: "
                    "couplings.register(name, fn, marginal=...)."
                )
                raise TypeError(msg)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Coupling:
        """Rebuild what `to_dict` wrote; keys that are left out take their defaults.

        Raises
        ------
        ValueError
            For an unknown key, or an unknown name in it.
        """
        known = ("method", "metric", "quantize", "scope", "options")
        for key in plain:
            if key not in known:
                raise ValueError(unknown("key of a coupling", key, known))
        chosen = dict(plain)
        options = chosen.pop("options", None) or {}
        return cls(**chosen, **options)

    def _key(self) -> tuple[object, ...]:
        return (self.method, self.metric, self.quantize, self.scope, self.options)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Coupling) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # options may hold values that have no hash

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"Coupling({self.method!r}, metric={self.metric!r}, quantize={self.quantize!r}, "
            f"scope={self.scope!r}{options})"
        )


def couple(
    data: Array,
    noise: Array,
    method: MethodLike = "auction",
    *,
    metric: Metric = "sqeuclidean",
    quantize: str | None = None,
    condition: Array | None = None,
    scope: Scope = "local",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Coupled:
    """Decide which noise each data sample of a minibatch is trained with.

    The data stays where it is; the noise is permuted, so that pairs are close and labels, masks and prompts stay with
    their data.

    Parameters
    ----------
    data : (n, *shape) Tensor or array
        Floating, any device and dtype, finite.
    noise : (m, *shape) Tensor or array
        Same dtype and device; ``m == n``. ``nearest`` takes ``k * n`` rows, of which ``i * k`` to ``i * k + k - 1``
        are the candidates of row i; ``hungarian``, ``auction``, ``lapjv``, ``greedy`` and ``stable`` also take ``m >
        n`` and select.
    method : str or callable
        See `couplings.methods`, or ``fn(cost, *, generator=None) -> (n,) index``.
    metric : str or callable
        See `couplings.metrics`, or ``fn(data, noise) -> (n, m) cost``.
    quantize : str, optional
        See `couplings.quantizers`: rounds the operands of the cost only.
    condition : (n,) integer or (n, c) floating Tensor, optional
        Integer classes couple within a class, so that the noise given the class stays Gaussian. Continuous conditions
        add ``condition_weight`` times their distance (``condition_metric``) to the cost.
    scope : {"local", "global"}
        Couple within this process, or over all ranks of the process group.
    generator : torch.Generator, optional
        For methods that draw; None is a private generator with a fixed seed. Global random state is never touched.
    **options
        Options of the method and of the condition; see `Coupling`.

    Returns
    -------
    Coupled

    Raises
    ------
    ValueError
        For NaN or infinity, shapes or devices that do not match, empty batches, unknown names or options out of range.
    TypeError
        For integer or mixed dtypes, unknown options, or arguments of the wrong type.
    ImportError
        If the method needs a package that is not installed; the message names the extra.

    Notes
    -----
    Runs without gradients and outside autocast; costs are float32 (float64 for float64 input), without TF32.
    Memory beyond the operands is O(n m), and one float32 copy of half-precision operands. Checking for NaN waits for
    the device once. Inside a function that `torch.compile` compiles, call ``torch.compiler.disable(couple)``, made
    outside of it: a solver cannot be traced.

    References
    ----------
    Immiscible Diffusion, arXiv 2406.12303; minibatch optimal transport for flows, arXiv 2302.00482 and 2304.14772.

    Examples
    --------
    >>> import torch
    >>> images, noise = torch.rand(16, 3, 8, 8), torch.randn(16, 3, 8, 8)
    >>> coupled = couple(images, noise)
    >>> bool(coupled.cost < coupled.cost_before), coupled.marginal
    (True, 'permutation')
    """
    coupling = Coupling(method, metric, quantize, scope, **options)
    return coupling(data, noise, condition=condition, generator=generator)


def check_tied(t: object, rows: int) -> None:
    """Check what `Coupled.apply` is given.

    Raises
    ------
    TypeError
        If it is neither a tensor nor an array.
    ValueError
        If it has another number of rows.
    """
    if not isinstance(t, Tensor | np.ndarray):
        msg = f"apply() takes a tensor or an array, got {type(t).__name__}."
        raise TypeError(msg)
    if t.ndim == 0 or len(t) != rows:
        msg = f"apply() takes a row for each of the {rows} rows of noise, got shape {tuple(t.shape)}."
        raise ValueError(msg)


def take_tied(t: T, index: Array, rows: int) -> T:
    """Check what `Coupled.apply` is given, and take the rows at `index`."""
    check_tied(t, rows)
    if not isinstance(index, Tensor):
        index = torch.from_numpy(index)
    if isinstance(t, Tensor):
        return t[index.to(t.device)]
    taken: T = t[index.cpu().numpy()]
    return taken


def check_rows(plan: Plan, n: int, m: int, conditioned: bool) -> None:
    """Check that the method can take m rows of noise for n rows of data.

    Raises
    ------
    ValueError
        If it cannot.
    """
    info = plan.method.info
    if m == n or (info.needs == "points" and info.marginal == "selected"):
        return
    if not plan.method.rectangular:
        msg = f"the method {info.name} takes as many noise rows as data rows, got {m} and {n}."
        raise ValueError(msg)
    if conditioned:
        msg = f"condition= needs as many noise rows as data rows, each tagged with its condition, got {m} and {n}."
        raise ValueError(msg)


def prepare(x: Tensor, y: Tensor, condition: Array | None) -> Batch:
    """Flatten, convert and check the values."""
    checked = None if condition is None else inputs.check_condition(condition, len(x), x.device)
    (flat_x, peak_x), (flat_y, peak_y) = inputs.working_copy(x, "data"), inputs.working_copy(y, "noise")
    return Batch(flat_x, flat_y, peak_x, peak_y, checked)


def finish(pairing: Pairing, noise: Tensor, *, as_numpy: bool) -> Coupled:
    """Move the noise and give the result the type of the input."""

    def out(value: Tensor) -> Any:
        return value.numpy() if as_numpy else value

    # `index_select` is faster, but returns every memory format as contiguous.
    moved = noise.index_select(0, pairing.index) if noise.is_contiguous() else noise[pairing.index]
    return Coupled(
        noise=out(moved),
        index=out(pairing.index),
        marginal=pairing.marginal,
        cost=out(pairing.cost),
        cost_before=out(pairing.cost_before),
        gap=pairing.gap,
        _rows=len(noise),
    )
