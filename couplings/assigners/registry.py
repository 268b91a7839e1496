"""The registry: a frozen record for every method, and the function behind it, imported when first used."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from couplings._names import unknown
from couplings._types import Marginal, Needs

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "couplings.methods"

AssignFn = Callable[..., Any]


class BrokenPromiseError(ValueError):
    """A method returned an index that breaks the marginal it declared."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """What a method may return instead of a bare index.

    Attributes
    ----------
    index : (n,) Tensor
        Row ``i`` of the data gets row ``index[i]`` of the noise.
    slack : float or None
        Certified upper bound on ``cost[i, index[i]].sum() - optimum``; None without a certificate.
    marginal : str or None
        Overrides the declared marginal, where an option changes it.
    """

    index: Tensor
    slack: float | None = None
    marginal: Marginal | None = None


@dataclass(frozen=True)
class MethodInfo:
    """What a method is and what it promises.

    Attributes
    ----------
    name : str
    summary : str
        One line.
    exact : bool
        Whether it reaches the optimum of the assignment problem.
    marginal : str
        What it does to the distribution of the noise: ``"permutation"`` (the same multiset of rows, exactly),
        ``"resampled"`` (every row has the right law averaged over data, rows may repeat) or ``"selected"`` (biased by
        choice).
    needs : str
        ``"cost"``: it is given the cost matrix. ``"points"``: it is given data and noise.
    shift_invariant : bool
        Whether adding constants to rows and columns of the cost leaves its answer unchanged.
    requires : tuple of str
        Extras of couplings that it needs, such as ``"pot"`` for ``pip install 'couplings[pot]'``.
    """

    name: str
    summary: str
    exact: bool
    marginal: Marginal
    needs: Needs
    shift_invariant: bool
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A registered method: its record, how to get its function, and what only built-in methods can do."""

    info: MethodInfo
    load: Callable[[], AssignFn] = field(repr=False)
    rectangular: bool = False
    ignores_condition: bool = False
    leaves_operands: bool = False

    @cached_property
    def fn(self) -> AssignFn:
        """The function, imported on first use."""
        return self.load()

    @cached_property
    def option_names(self) -> frozenset[str] | None:
        """Options that the function takes; None if it takes any."""
        return _option_names(self.fn)

    @cached_property
    def wants(self) -> frozenset[str]:
        """Which of ``generator``, ``metric`` and ``points`` the function asks for beside its cost or points."""
        parameters = _parameters(self.fn)
        if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
            return frozenset({"generator"})
        return frozenset(p.name for p in parameters) & _RESERVED


_RESERVED = frozenset({"generator", "metric", "points"})


def _parameters(fn: AssignFn) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have no signature
        return None


def _option_names(fn: AssignFn) -> frozenset[str] | None:
    parameters = _parameters(fn)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    keywords = (p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty)
    return frozenset(keywords) - _RESERVED


def _builtin(
    name: str,
    summary: str,
    *,
    exact: bool = False,
    marginal: Marginal = "permutation",
    needs: Needs = "cost",
    shift_invariant: bool = False,
    requires: tuple[str, ...] = (),
    rectangular: bool = False,
    ignores_condition: bool = False,
) -> Method:
    def load() -> AssignFn:
        fn: AssignFn = import_module(f"couplings.assigners.{name}").assign
        return fn

    info = MethodInfo(name, summary, exact, marginal, needs, shift_invariant, requires)
    return Method(info, load, rectangular, ignores_condition, leaves_operands=True)


_BUILTIN = (
    _builtin(
        "independent",
        "identity pairing, the baseline: what trainers do without a coupling",
        needs="points",
        ignores_condition=True,
    ),
    _builtin(
        "hungarian",
        "exact assignment by scipy.optimize.linear_sum_assignment",
        exact=True,
        shift_invariant=True,
        rectangular=True,
    ),
    _builtin(
        "lapjv",
        "exact assignment by the lapjv package (Jonker-Volgenant)",
        exact=True,
        shift_invariant=True,
        requires=("lapjv",),
        rectangular=True,
    ),
    _builtin(
        "auction",
        "exact assignment by a fixed-point auction with a dual certificate (default)",
        exact=True,
        shift_invariant=True,
        rectangular=True,
    ),
    _builtin(
        "emd",
        "exact optimal transport by POT's network simplex",
        exact=True,
        shift_invariant=True,
        requires=("pot",),
    ),
    _builtin(
        "sinkhorn",
        "entropic optimal transport by POT's log-domain Sinkhorn, then a draw from the plan",
        shift_invariant=True,
        requires=("pot",),
    ),
    _builtin("greedy", "globally smallest remaining entry of the cost first", rectangular=True),
    _builtin("stable", "Gale-Shapley stable matching of data and noise", rectangular=True),
    _builtin(
        "sliced",
        "sort along random or principal directions and keep the best; no cost matrix",
        needs="points",
    ),
    _builtin(
        "nearest",
        "best of each row's own k candidates; shifts the distribution of the noise",
        marginal="selected",
        needs="points",
        ignores_condition=True,
    ),
)

ALIASES: Mapping[str, str] = {"exact": "auction", "jv": "lapjv", "none": "independent", "knn": "nearest"}

_registry: dict[str, Method] = {method.info.name: method for method in _BUILTIN}
_lock = threading.RLock()
_entry_points_read = False
_reading_entry_points = False


def methods(pattern: str = "*") -> list[MethodInfo]:
    """List the records of the registered methods.

    Parameters
    ----------
    pattern : str
        Shell-style pattern on names, such as ``"s*"``; case does not matter.

    Returns
    -------
    list of MethodInfo
        Built-in methods first, then others in the order of registration.

    Examples
    --------
    >>> import couplings
    >>> [info.name for info in couplings.methods("*n") if info.exact]
    ['hungarian', 'auction']
    """
    _read_entry_points()
    return [method.info for name, method in _registry.items() if fnmatchcase(name, pattern.lower())]


def register(
    name: str,
    fn: AssignFn,
    *,
    marginal: Marginal,
    exact: bool = False,
    summary: str = "",
    needs: Needs = "cost",
    shift_invariant: bool = False,
) -> None:
    """Give a method a name, so that it works everywhere a built-in one does.

    Parameters
    ----------
    name : str
        Its name; case does not matter.
    fn : callable
        ``fn(cost, *, generator=None, **options) -> (n,) index`` for a float ``(n, m)`` cost or, with
        ``needs="points"``, ``fn(data, noise, *, generator=None, **options)`` for ``(n, d)`` and ``(m, d)`` tensors. Its
        keyword-only parameters are its options.
    marginal : {"permutation", "resampled", "selected"}
        What it does to the distribution of the noise; hold it to that with `couplings.testing.check_marginal`.
    exact : bool
        Whether it reaches the optimum.
    summary : str
        One line for `methods()`; by default the first line of the function's docstring.
    needs : {"cost", "points"}
        What it is given.
    shift_invariant : bool
        Whether adding constants to rows and columns of the cost leaves its answer unchanged: it then gets a cheaper
        matrix.

    Raises
    ------
    ValueError
        If the name is taken, or a value is none of those listed.
    TypeError
        If `fn` is not callable or `name` not a string.

    Notes
    -----
    A package registers its methods on import of couplings through the entry-point group ``couplings.methods``:
    each entry point names a function without arguments that calls `register`, or a module that does on import.

    Examples
    --------
    >>> import torch, couplings
    >>> def reverse(cost, *, generator=None):
    ...     return torch.arange(len(cost) - 1, -1, -1)
    >>> couplings.register("reverse", reverse, marginal="permutation")
    >>> couplings.couple(torch.eye(3), torch.eye(3), method="reverse").index
    tensor([2, 1, 0])
    """
    _read_entry_points()
    _add(
        name,
        fn,
        marginal=marginal,
        exact=exact,
        summary=summary,
        needs=needs,
        shift_invariant=shift_invariant,
    )


def _add(
    name: str,
    fn: AssignFn,
    *,
    marginal: Marginal,
    exact: bool,
    summary: str,
    needs: Needs,
    shift_invariant: bool,
) -> None:
    if not isinstance(name, str):
        msg = f"a method's name is a string, got {type(name).__name__}."
        raise TypeError(msg)
    if not callable(fn):
        msg = f"the method {name!r} must be a function cost -> index, got {type(fn).__name__}."
        raise TypeError(msg)
    if marginal not in get_args(Marginal):
        raise ValueError(unknown("marginal", marginal, get_args(Marginal)))
    if needs not in get_args(Needs):
        raise ValueError(unknown("needs", needs, get_args(Needs)))
    key = name.strip().lower()
    if not key:
        msg = "a method's name must not be empty."
        raise ValueError(msg)
    summary = summary or (inspect.getdoc(fn) or "").partition("\n")[0]
    info = MethodInfo(key, summary, exact, marginal, needs, shift_invariant)
    with _lock:
        if key in _registry or key in ALIASES:
            msg = f"the method name {key!r} is taken. Choose another; registered: {', '.join(_registry)}."
            raise ValueError(msg)
        _registry[key] = Method(info, lambda: fn)


def _read_entry_points() -> None:
    """Let installed packages register their methods, once.

    Raises
    ------
    ImportError
        If one of them cannot be loaded, naming it: again at every call, since its methods stay unknown.
    """
    global _entry_points_read, _reading_entry_points
    if _entry_points_read:
        return
    with _lock:
        # The functions called below may themselves ask for methods(); other threads wait until all are there.
        if _entry_points_read or _reading_entry_points:
            return
        _reading_entry_points = True
        known = dict(_registry)
        try:
            for entry_point in entry_points(group=ENTRY_POINT_GROUP):
                logger.debug("registering methods of %s", entry_point.value)
                _register_from(entry_point)
            _entry_points_read = True
        except BaseException:
            _registry.clear()
            _registry.update(known)
            raise
        finally:
            _reading_entry_points = False


def _register_from(entry_point: EntryPoint) -> None:
    try:
        found = entry_point.load()
        if isinstance(found, ModuleType):  # it has registered its methods on import
            return
        found()
    except Exception as error:
        package = entry_point.dist.name if entry_point.dist is not None else "a package"
        msg = (
            f"{package} could not register its methods by its entry point {entry_point.value}: "
            f"{type(error).__name__}: {error}. Mend it, or uninstall it."
        )
        raise ImportError(msg) from error


def find(method: str | AssignFn) -> Method:
    """Look up a name or an alias, or wrap a bare callable.

    Raises
    ------
    ValueError
        For an unknown name, with the closest known one.
    TypeError
        For anything that is neither a name nor callable.
    """
    if isinstance(method, str):
        _read_entry_points()
        key = method.strip().lower()
        found = _registry.get(ALIASES.get(key, key))
        if found is None:
            raise ValueError(unknown("method", method, [*_registry, *ALIASES]))
        return found
    if callable(method):
        name = getattr(method, "__name__", type(method).__name__)
        info = MethodInfo(name, "a callable", False, "permutation", "cost", False)
        return Method(info, lambda: method)
    msg = f"method= takes a name or a callable, got {type(method).__name__}."
    raise TypeError(msg)


def check_index(index: object, n: int, m: int, marginal: Marginal, method: str, *, named: bool) -> Tensor:
    """Hold an answer to its method's promise.

    Parameters
    ----------
    index : Tensor or array
        What the method returned.
    n, m : int
        Rows of data and of noise.
    marginal : str
        The declared marginal; a permutation of the rows (a choice of distinct rows if ``m > n``) is checked.
    method : str
        Its name, for the message.
    named : bool
        Whether it was registered (and so declared its marginal) or is a bare callable.

    Returns
    -------
    (n,) int64 Tensor

    Raises
    ------
    TypeError
        If it is no integer tensor.
    BrokenPromiseError
        A `ValueError`: if its shape or range is wrong, or it repeats rows that it promised not to.
    """
    try:
        # A tensor stays where it is: `as_tensor` would move it to the process's default device.
        index = index if isinstance(index, Tensor) else torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"the method {method} must return an (n,) integer index, got {type(index).__name__}."
        raise TypeError(msg) from error
    if index.is_floating_point() or index.is_complex() or index.dtype is torch.bool:
        msg = f"the method {method} must return an integer index, got {index.dtype}."
        raise TypeError(msg)
    mend = (
        f"It was registered with marginal={marginal!r}."
        if named
        else "A function is held to a permutation; declare anything else: couplings.register(name, fn, marginal=...)."
    )
    if tuple(index.shape) != (n,):
        msg = (
            f"the method {method} must return an index of shape ({n},), a row of noise each, "
            f"got {tuple(index.shape)}. {mend}"
        )
        raise BrokenPromiseError(msg)
    index = index.to(torch.int64)
    low, high = torch.aminmax(index)
    if int(low) < 0 or int(high) >= m:
        msg = f"the method {method} returned rows {int(low)} to {int(high)}; the noise has rows 0 to {m - 1}. {mend}"
        raise BrokenPromiseError(msg)
    if marginal == "permutation" and len(torch.unique(index)) != n:
        used = len(torch.unique(index))
        msg = f"the method {method} used {used} different noise rows for {n} data rows: no permutation. {mend}"
        raise BrokenPromiseError(msg)
    return index
