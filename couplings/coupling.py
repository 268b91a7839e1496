"""`couple`, the one call; `Coupling`, the same call with its choices made; `Coupled`, what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from couplings import inputs
from couplings._graphs import outside_graphs
from couplings._names import unknown
from couplings._openmp import one_thread
from couplings._types import Marginal, Scope
from couplings.assigners.method import Assignment, Method
from couplings.assigners.registry import find
from couplings.conditions import canonical_condition_metric, check_condition_weight
from couplings.distances import Metric, canonical_metric
from couplings.inputs import Array
from couplings.kernels._interrupts import interruptible
from couplings.problem import Certificate, Distances, Pricing, Problem, certificate, take, take_tied
from couplings.quantization import canonical_quantizer
from couplings.stages import stage

if TYPE_CHECKING:
    from couplings.ahead import Pending

NDArray = np.ndarray[Any, Any]
MethodLike = str | Callable[..., Any]
A = TypeVar("A", Tensor, NDArray)
T = TypeVar("T", Tensor, NDArray)

Condition = Array | tuple[Array, Array]

# Options of every method, beside those of `Pricing`; what is left belongs to the method itself.
_PRICING_OPTIONS = ("condition_weight", "condition_ratio", "condition_metric", "check_finite")
_SHARED_OPTIONS = (*_PRICING_OPTIONS, "select", "group")


@dataclass(frozen=True, eq=False, repr=False)
class Coupled(Generic[A]):
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
    """

    noise: A
    index: A
    marginal: Marginal
    cost: A
    cost_before: A
    _certificate: Certificate | None = None
    _apply: Callable[[Any], Any] = field(default=lambda t: t)

    @property
    def reduction(self) -> A:
        """0-d Tensor or array: ``1 - cost / cost_before``; 0 where both are 0."""
        if isinstance(self.cost, Tensor):
            return torch.where(self.cost == self.cost_before, 0.0, 1.0 - self.cost / self.cost_before)
        with np.errstate(divide="ignore"):  # minus infinity, as torch says without a word
            reduction = 0.0 if self.cost == self.cost_before else 1.0 - self.cost / self.cost_before
        return np.asarray(reduction, dtype=self.cost.dtype)

    @cached_property
    def gap(self) -> float | None:
        """Upper bound on ``(cost - optimum) / |cost|`` for the matrix that was solved, from dual prices.

        None where the method has no certificate. Waits for the device when first read.
        """
        return None if self._certificate is None else self._certificate.gap

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
        moved: T = self._apply(t)
        return moved

    def __repr__(self) -> str:
        return f"Coupled(noise={tuple(self.noise.shape)} {self.noise.dtype}, marginal={self.marginal!r})"


@dataclass(frozen=True, init=False)
class Coupling:
    """A coupling with its choices made: call it on batches.

    Parameters
    ----------
    method : str or callable
        A name or an alias from `couplings.methods()`, ``"package.module:function"``, or
        ``fn(cost, *, generator=None) -> (n,) index``.
    metric : str or callable
        A name from `couplings.metrics()`, or ``fn(data, noise) -> (n, m) cost`` on flattened operands; ``+inf`` in it
        forbids a pair.
    quantize : str or None
        A name from `couplings.quantizers()`: rounds the operands of the cost, never the noise that is returned.
    scope : {"local", "global"}
        Couple within this process, or over all ranks of the process group.
    **options
        The method's own options, and those of every method: ``condition_weight`` (default 1.0, or ``"auto"`` with
        ``condition_ratio``), ``condition_metric`` (``"sqeuclidean"`` or ``"cosine"``), ``check_finite`` (default True:
        look for NaN and infinity), ``select`` (default False: take more noise rows than data rows, and choose), and
        for ``scope="global"`` ``group`` (a process group).

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

    __hash__ = None  # type: ignore[assignment]  # options may hold values that have none

    method: MethodLike
    metric: Metric
    quantize: str | None
    scope: Scope
    options: Mapping[str, Any]

    def __init__(
        self,
        method: MethodLike = "auction",
        metric: Metric = "sqeuclidean",
        quantize: str | None = None,
        scope: Scope = "local",
        **options: Any,
    ) -> None:
        found = find(method)
        if not isinstance(scope, str) or scope.lower() not in get_args(Scope):
            raise ValueError(unknown("scope", scope, get_args(Scope)))
        if "condition_metric" in options:
            options["condition_metric"] = canonical_condition_metric(options["condition_metric"])
        check_condition_weight(options.get("condition_weight", 1.0), options.get("condition_ratio"))
        fields = {
            "method": found.info.name if isinstance(method, str) else method,
            "metric": canonical_metric(metric),
            "quantize": canonical_quantizer(quantize),
            "scope": scope.lower(),
            "options": MappingProxyType(options),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        _check_options(found, options, scope.lower())

    @cached_property
    def _method(self) -> Method:
        return find(self.method)

    @cached_property
    def _method_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name not in _SHARED_OPTIONS}

    @cached_property
    def _pricing(self) -> Pricing:
        chosen = {name: self.options[name] for name in _PRICING_OPTIONS if name in self.options}
        return Pricing(self.metric, self.quantize, **chosen)

    @outside_graphs
    @interruptible
    def __call__(
        self,
        data: A,
        noise: A,
        *,
        condition: Condition | None = None,
        noise_condition: Condition | None = None,
        generator: torch.Generator | None = None,
    ) -> Coupled[A]:
        """Couple a batch; see `couple`."""
        method, options = self._method, self._method_options

        def check() -> Problem:
            inputs.check_generator(generator)
            x, y = inputs.check_pair(data, noise)
            _check_rows(method, len(x), len(y), select=bool(self.options.get("select")))
            conditions = inputs.check_conditions(condition, noise_condition, x, y, rows_apart=method.ignores_condition)
            return Problem.of(x, y, self._pricing, conditions)

        group = None
        if self.scope == "global":
            from couplings.distributed import couple_over_ranks, process_group

            group = process_group(self.options.get("group"))
        if group is not None:
            settings = {"method": self.method, "metric": self.metric, "quantize": self.quantize}
            settings |= {name: value for name, value in sorted(self.options.items()) if name != "group"}
            return self._result(data, *couple_over_ranks(group, check, noise, method, options, settings, generator))
        with torch.no_grad():
            with stage("checks"):
                problem = check()
            with _without_autocast(problem.data.device), one_thread() if problem.small else nullcontext():
                cost = None
                if method.info.needs == "cost":
                    cost = problem.cost(method)
                elif self._pricing.check_finite:
                    problem.check_finite()
                answer = problem.solve(method, cost, options, generator)
                with stage("report"):
                    distances = problem.distances(answer.index)
        with stage("gather"), one_thread() if problem.small else nullcontext():
            moved = take(inputs.as_tensor(noise, "noise"), answer.index)
        return self._result(data, moved, answer, distances, problem, lambda t: take_tied(t, answer.index, len(noise)))

    @outside_graphs
    def submit(
        self,
        data: A,
        noise: A,
        *,
        condition: Condition | None = None,
        noise_condition: Condition | None = None,
        generator: torch.Generator | None = None,
    ) -> Pending[Coupled[A]]:
        """Couple a batch in the background: the same answer as calling, later.

        Neither the calling thread nor its CUDA stream waits. The inputs must not change until the result is there.

        Returns
        -------
        Pending
            ``pending.result()`` is the `Coupled`, or raises; ``pending.done()`` says whether it is there.

        Notes
        -----
        With ``scope="global"`` the exchanges use a gloo process group of their own, made by the first submission, which
        is collective; every rank submits in the same order.

        Examples
        --------
        >>> import torch
        >>> pending = Coupling().submit(torch.rand(8, 3), torch.randn(8, 3))
        >>> pending.result().noise.shape
        torch.Size([8, 3])
        """
        from couplings.ahead import submit

        return submit(self, data, noise, condition=condition, noise_condition=noise_condition, generator=generator)

    def _result(
        self,
        data: A,
        noise: Tensor,
        answer: Assignment,
        distances: Distances,
        problem: Problem,
        apply: Callable[[Any], Any],
    ) -> Coupled[A]:
        """Report sums as means, in the types of the input."""
        dtype, rows = problem.data.dtype, problem.rows
        cost, cost_before = (distances.after / rows).to(dtype), (distances.before / rows).to(dtype)
        if self._pricing.check_finite and cost.device.type == "cpu":
            # Distances of points overflow where no cost was made; a forbidden identity pair may be infinite.
            told = (cost,) if callable(self.metric) else (cost, cost_before)
            if not all(map(math.isfinite, told)):
                inputs.report_not_finite(problem.data, problem.noise, self.metric)

        def out(value: Tensor) -> A:
            return value.numpy() if isinstance(data, np.ndarray) else value

        return Coupled(
            noise=out(noise),
            index=out(answer.index),
            marginal=answer.marginal or self._method.info.marginal,
            cost=out(cost),
            cost_before=out(cost_before),
            _certificate=certificate(self._pricing, rows, answer.slack, distances.after, distances.conditions),
            _apply=apply,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary with the keys ``method``, ``metric``, ``quantize``, ``scope`` and ``options``.

        Raises
        ------
        TypeError
            If the method, the metric or an option is no plain value, such as a callable or a process group.
        """
        plain = {name: getattr(self, name) for name in _KEYS} | {"options": dict(self.options)}
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
        for key in plain:
            if key not in _KEYS:
                raise ValueError(unknown("key of a coupling", key, _KEYS))
        chosen = dict(plain)
        return _rebuilt(chosen.pop("options", None) or {}, chosen)

    def __reduce__(self) -> tuple[Any, ...]:
        chosen = {name: getattr(self, name) for name in _KEYS if name != "options"}
        return _rebuilt, (dict(self.options), chosen)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"Coupling({self.method!r}, metric={self.metric!r}, quantize={self.quantize!r}, "
            f"scope={self.scope!r}{options})"
        )


_KEYS = ("method", "metric", "quantize", "scope", "options")


def _rebuilt(options: Mapping[str, Any], chosen: Mapping[str, Any]) -> Coupling:
    return Coupling(**chosen, **options)


@outside_graphs
def couple(
    data: A,
    noise: A,
    method: MethodLike = "auction",
    *,
    metric: Metric = "sqeuclidean",
    quantize: str | None = None,
    condition: Condition | None = None,
    noise_condition: Condition | None = None,
    scope: Scope = "local",
    generator: torch.Generator | None = None,
    check_finite: bool = True,
    **options: Any,
) -> Coupled[A]:
    """Decide which noise each data sample of a minibatch is trained with.

    The data stays where it is; the noise is permuted, so that pairs are close and labels, masks and prompts stay with
    their data.

    Parameters
    ----------
    data : (n, *shape) Tensor or array
        Floating, any device and dtype, finite.
    noise : (m, *shape) Tensor or array
        Same dtype and device; ``m == n``. ``nearest`` takes ``k * n`` rows, of which ``i * k`` to ``i * k + k - 1``
        are the candidates of row i; with ``select=True`` ``hungarian``, ``auction``, ``lapjv``, ``greedy`` and
        ``stable`` also take ``m > n`` and choose.
    method : str or callable
        See `couplings.methods`, or ``fn(cost, *, generator=None) -> (n,) index``.
    metric : str or callable
        See `couplings.metrics`, or ``fn(data, noise) -> (n, m) cost``; ``+inf`` in it forbids a pair.
    quantize : str, optional
        See `couplings.quantizers`: rounds the operands of the cost only.
    condition : (n,) integer or (n, c) floating Tensor or array, or a tuple of both, optional
        Integer classes couple within a class, so that the noise given the class stays Gaussian. Continuous conditions
        add ``condition_weight`` times their distance (``condition_metric``) to the cost.
    noise_condition : like `condition`, optional
        What noise rows are tagged with, where the source has conditions of its own; by default, noise row j is tagged
        with the condition of data row j. Classes must occur equally often on both sides.
    scope : {"local", "global"}
        Couple within this process, or over all ranks of the process group.
    generator : torch.Generator, optional
        For methods that draw; without one they draw anew for new noise. Global random state is never touched.
    check_finite : bool
        Whether to look for NaN and infinity, which would otherwise be paired somehow.
    **options
        Options of the method and of the condition; see `Coupling`.

    Returns
    -------
    Coupled

    Raises
    ------
    ValueError
        For NaN or infinity, shapes or devices that do not match, empty batches, unknown names or options out of range,
        or forbidden pairs that leave a row without noise.
    TypeError
        For integer or mixed dtypes, unknown options, or arguments of the wrong type.
    ImportError
        If the method needs a package that is not installed; the message names the extra.

    Notes
    -----
    The decision is made without gradients and outside autocast; a gradient that the noise carries is kept (not from one
    rank to another). Costs are
    float32 (float64 for float64 input), by the process's own setting of float32 products. Memory beyond the operands is
    O(n m), and one float32 copy of operands in half precision, on another device than the CPU, or far from the origin.
    `torch.compile` breaks its graph here by itself.

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
    if not check_finite:
        options["check_finite"] = False
    coupling = Coupling(method, metric, quantize, scope, **options)
    return coupling(data, noise, condition=condition, noise_condition=noise_condition, generator=generator)


def _check_options(method: Method, options: Mapping[str, Any], scope: str) -> None:
    """Refuse options that neither the method nor every coupling takes."""
    known = method.option_names
    for name in options:
        if name == "group" and scope == "local":
            msg = "group= is an option of scope='global'."
            raise TypeError(msg)
        if name not in _SHARED_OPTIONS and known is not None and name not in known:
            kind = f"option of the method {method.info.name}:"
            raise TypeError(unknown(kind, name, known | set(_SHARED_OPTIONS)))
    if options.get("select") and not method.rectangular:
        msg = f"the method {method.info.name} cannot select among more noise rows than data rows."
        raise TypeError(msg)


def _check_rows(method: Method, n: int, m: int, *, select: bool) -> None:
    """Check that the method can take m rows of noise for n rows of data."""
    if m == n or select or (method.info.needs == "points" and method.info.marginal == "selected"):
        return
    msg = f"the method {method.info.name} takes as many noise rows as data rows, got {m} and {n}."
    if method.rectangular:
        msg += f" To choose {n} of the {m}, and give up the noise's distribution for it, pass select=True."
    raise ValueError(msg)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
