"""The registry: every method by its name; a function is imported when first used."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, get_args

from couplings._names import unknown
from couplings._types import Marginal, Needs
from couplings.assigners.method import AssignFn, Method, MethodInfo

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "couplings.methods"


def _builtin(
    name: str,
    summary: str,
    *,
    exact: bool = False,
    marginal: Marginal = "permutation",
    needs: Needs = "cost",
    shift_invariant: bool = False,
    requires: tuple[str, ...] = (),
    draws: bool = False,
    **abilities: bool,
) -> Method:
    def load() -> AssignFn:
        fn: AssignFn = import_module(f"couplings.assigners.{name}").assign
        return fn

    info = MethodInfo(name, summary, exact, marginal, needs, shift_invariant, requires)
    return Method(info, load, builtin=True, draws=draws, **abilities)


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
        forbids=True,
    ),
    _builtin(
        "lapjv",
        "exact assignment by the lapjv package (Jonker-Volgenant)",
        exact=True,
        shift_invariant=True,
        requires=("lapjv",),
        rectangular=True,
        forbids=True,
    ),
    _builtin(
        "auction",
        "exact assignment by a fixed-point auction with a dual certificate (default)",
        exact=True,
        shift_invariant=True,
        rectangular=True,
        forbids=True,
    ),
    _builtin(
        "emd",
        "exact optimal transport by POT's network simplex",
        exact=True,
        shift_invariant=True,
        requires=("pot",),
        forbids=True,
    ),
    _builtin(
        "sinkhorn",
        "entropic optimal transport by stabilised Sinkhorn iterations, then a draw from the plan",
        shift_invariant=True,
        draws=True,
        on_device=True,
    ),
    _builtin("greedy", "globally smallest remaining entry of the cost first", rectangular=True, forbids=True),
    _builtin("stable", "Gale-Shapley stable matching of data and noise", rectangular=True, forbids=True),
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
_broken_entry_points: list[str] = []


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
    return [method.info for name, method in _known().items() if fnmatchcase(name, pattern.lower())]


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
    if not key or set(key) & set(":,="):
        msg = f"a method's name must not be empty, nor hold ':', ',' or '=', which set its options, got {name!r}."
        raise ValueError(msg)
    summary = summary or (inspect.getdoc(fn) or "").partition("\n")[0]
    info = MethodInfo(key, summary, exact, marginal, needs, shift_invariant)
    with _lock:
        if key in _registry or key in ALIASES:
            msg = f"the method name {key!r} is taken. Choose another; registered: {', '.join(_registry)}."
            raise ValueError(msg)
        _registry[key] = Method(info, lambda: fn)


def _known() -> dict[str, Method]:
    """Copy the registry, which other threads may be adding to."""
    with _lock:
        return dict(_registry)


def _read_entry_points() -> None:
    """Let installed packages register their methods, once.

    A package that cannot is logged, and named where an unknown method is asked for; the others' methods stay.
    """
    global _entry_points_read, _reading_entry_points
    if _entry_points_read:
        return
    with _lock:
        # The functions called below may themselves ask for methods(); other threads wait until all are there.
        if _entry_points_read or _reading_entry_points:
            return
        _reading_entry_points = True
        try:
            for entry_point in entry_points(group=ENTRY_POINT_GROUP):
                _register_from(entry_point)
            _entry_points_read = True
        finally:
            _reading_entry_points = False


def _register_from(entry_point: EntryPoint) -> None:
    logger.debug("registering methods of %s", entry_point.value)
    known = dict(_registry)
    try:
        found = entry_point.load()
        if not isinstance(found, ModuleType):  # a module has registered its methods on import
            found()
    except Exception as error:
        _registry.clear()
        _registry.update(known)
        package = entry_point.dist.name if entry_point.dist is not None else "a package"
        msg = (
            f"{package} could not register its methods by its entry point {entry_point.value}: "
            f"{type(error).__name__}: {error}. Mend it, or uninstall it."
        )
        _broken_entry_points.append(msg)
        logger.warning(msg)


def find(method: str | AssignFn) -> Method:
    """Look up a name or an alias, import ``"package.module:function"``, or wrap a bare callable.

    A function that its module registered keeps what was declared there; any other is held to a permutation.

    Raises
    ------
    ValueError
        For an unknown name, with the closest known one, or a function that cannot be imported.
    TypeError
        For anything that is neither a name nor callable.
    """
    if isinstance(method, str):
        _read_entry_points()
        key = method.strip().lower()
        found = _registry.get(ALIASES.get(key, key))
        if found is None and ":" in key:
            return _from_module(method.strip())
        if found is None:
            raise ValueError(" ".join([unknown("method", method, [*_known(), *ALIASES]), *_broken_entry_points]))
        return found
    if callable(method):
        return _bare(method, getattr(method, "__name__", type(method).__name__), "a callable")
    msg = f"method= takes a name or a callable, got {type(method).__name__}."
    raise TypeError(msg)


def _bare(fn: AssignFn, name: str, summary: str) -> Method:
    return Method(MethodInfo(name, summary, False, "permutation", "cost", False), lambda: fn, registered=False)


def _from_module(path: str) -> Method:
    module, _, name = path.partition(":")
    try:
        fn: Any = import_module(module)
        for part in name.split("."):
            fn = getattr(fn, part)
    except (ImportError, AttributeError, ValueError) as error:
        msg = f"no method {path!r}: {error}. Name a function that can be imported, as package.module:function."
        raise ValueError(msg) from error
    if not callable(fn):
        msg = f"the method {path!r} must be a function cost -> index, got {type(fn).__name__}."
        raise TypeError(msg)
    for method in _known().values():
        if not method.builtin and method.fn is fn:
            return replace(method, info=replace(method.info, name=path))
    return _bare(fn, path, (inspect.getdoc(fn) or "").partition("\n")[0])
