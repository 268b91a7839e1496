"""What a method is: its record, what it returns, and a call that holds it to its promise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from couplings._names import unknown
from couplings._types import Marginal, Needs

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
    """A method ready to be called.

    Attributes
    ----------
    info : MethodInfo
    load : callable
        Returns the function, imported when first asked for.
    builtin : bool
        One of ours: it modifies no operand, and reads costs on the host unless `on_device`.
    registered : bool
        Whether its marginal was declared; a bare callable is held to a permutation.
    draws : bool
        It may ask the generator that it is given for random numbers.
    on_device : bool
        It takes the cost where it was computed.
    rectangular : bool
        With ``select=True`` it chooses n of m > n noise rows.
    forbids : bool
        It never chooses a pair that costs ``+inf``.
    ignores_condition : bool
        It looks at no other row's noise, so that no condition can be violated.
    """

    info: MethodInfo
    load: Callable[[], AssignFn] = field(repr=False)
    builtin: bool = False
    registered: bool = True
    draws: bool = True
    on_device: bool = False
    rectangular: bool = False
    forbids: bool = False
    ignores_condition: bool = False

    @cached_property
    def fn(self) -> AssignFn:
        """The function, imported on first use."""
        return self.load()

    @cached_property
    def blocks_fn(self) -> AssignFn | None:
        """``fn(costs, sizes, **options)`` for many square problems at once, beside the function in its module."""
        return getattr(inspect.getmodule(self.fn), "assign_blocks", None) if self.builtin else None

    @cached_property
    def option_names(self) -> frozenset[str] | None:
        """Options that the function takes; None if it takes any."""
        parameters = _parameters(self.fn)
        if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        keywords = (p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty)
        return frozenset(keywords) - _RESERVED

    @cached_property
    def wants(self) -> frozenset[str]:
        """Which of ``generator``, ``metric`` and ``points`` the function asks for beside its cost or points."""
        parameters = _parameters(self.fn)
        if parameters is None:
            return frozenset({"generator"})
        asked = frozenset(p.name for p in parameters) & _RESERVED
        return asked | {"generator"} if any(p.kind is p.VAR_KEYWORD for p in parameters) else asked

    def __call__(
        self, *operands: Tensor, shape: tuple[int, int], given: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Assignment:
        """Assign n rows of data to m rows of noise, and check the answer.

        Parameters
        ----------
        *operands : Tensor
            The cost, or data and noise.
        shape : (n, m)
        given : mapping
            What it may ask for: ``generator``, ``metric``, ``points``.
        options : mapping
            Its own options.

        Returns
        -------
        Assignment
            Its index int64.

        Raises
        ------
        TypeError, BrokenPromiseError
            If the answer is not what the method promised.
        """
        answer = self.fn(*operands, **{name: given[name] for name in self.wants}, **options)
        assignment = answer if isinstance(answer, Assignment) else Assignment(answer)
        if assignment.marginal is not None and assignment.marginal not in get_args(Marginal):
            raise ValueError(unknown("marginal", assignment.marginal, get_args(Marginal)))
        if self.builtin and self.info.needs == "points":
            return assignment  # checking an index on a device would wait for it
        return replace(assignment, index=self.checked_index(assignment.index, *shape, assignment.marginal))

    def checked_index(self, index: object, n: int, m: int, marginal: Marginal | None = None) -> Tensor:
        """Hold an index to the marginal that was promised.

        Parameters
        ----------
        index : Tensor or array
            What the method returned.
        n, m : int
            Rows of data and of noise.
        marginal : str, optional
            What it says this answer is, where that is not what it declared. A permutation of the rows (a choice of
            distinct rows if ``m > n``) is checked.

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
        name, marginal = self.info.name, marginal or self.info.marginal
        try:
            # A tensor stays where it is: `as_tensor` would move it to the process's default device.
            index = index if isinstance(index, Tensor) else torch.as_tensor(index)
        except (TypeError, ValueError, RuntimeError) as error:
            msg = f"the method {name} must return an (n,) integer index, got {type(index).__name__}."
            raise TypeError(msg) from error
        if index.is_floating_point() or index.is_complex() or index.dtype is torch.bool:
            msg = f"the method {name} must return an integer index, got {index.dtype}."
            raise TypeError(msg)
        mend = (
            f"It was registered with marginal={marginal!r}."
            if self.registered
            else "A function is held to a permutation; declare anything else: "
            "couplings.register(name, fn, marginal=...)."
        )
        if tuple(index.shape) != (n,):
            msg = (
                f"the method {name} must return an index of shape ({n},), a row of noise each, "
                f"got {tuple(index.shape)}. {mend}"
            )
            raise BrokenPromiseError(msg)
        index = index.to(torch.int64)
        used = np.sort(index.cpu().numpy())
        low, high = int(used[0]), int(used[-1])
        if low < 0 or high >= m:
            msg = f"the method {name} returned rows {low} to {high}; the noise has rows 0 to {m - 1}. {mend}"
            raise BrokenPromiseError(msg)
        if marginal == "permutation" and bool((used[1:] == used[:-1]).any()):
            distinct = len(np.unique(used))
            msg = f"the method {name} used {distinct} different noise rows for {n} data rows: no permutation. {mend}"
            raise BrokenPromiseError(msg)
        return index


_RESERVED = frozenset({"generator", "metric", "points"})


def _parameters(fn: AssignFn) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have no signature
        return None
