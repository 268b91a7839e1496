"""A coupling in the place of TorchCFM's ``OTPlanSampler``: the same constructor, methods and shapes.

TorchCFM draws pairs from the plan with replacement and from NumPy's global state: a third of every batch is lost and
another part repeats. Here every row is used once unless `replace` asks otherwise, the data (``x1``) keep their order,
and random numbers come from a generator of the sampler's own.

>>> import torch
>>> noise, images = torch.randn(8, 2), torch.rand(8, 2)
>>> x0, x1 = OTPlanSampler("exact").sample_plan(noise, images)
>>> bool((x1 == images).all())
True

References
----------
Tong et al. (2024), Improving and generalizing flow-based generative models with minibatch optimal transport,
arXiv 2302.00482.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from couplings._names import unknown
from couplings.coupling import Coupled, Coupling
from couplings.inputs import as_tensor

Array = np.ndarray[Any, Any]

_METHODS = ("exact", "sinkhorn", "unbalanced", "partial")
_SEED = 0
_LEAST = 1e-300  # stands in for entries without mass, which are taken only where a row is left with nothing else


class OTPlanSampler:
    """Drop-in for ``torchcfm.optimal_transport.OTPlanSampler``.

    Put it in place with ``flow_matcher.ot_sampler = OTPlanSampler("exact")``.

    Parameters
    ----------
    method : {"exact", "sinkhorn", "unbalanced", "partial"} or Coupling
        As in TorchCFM: plans for squared distances. A `couplings.Coupling` pairs as it says, with any method and
        metric of this library.
    reg : float
        Strength of the entropy, in units of the cost (squared distances).
    reg_m : float
        Weight of the marginals of ``"unbalanced"``.
    normalize_cost : bool
        Divide the cost by its largest entry first; changes what `reg` means.
    num_threads : int or "max"
        For exact plans between unequal numbers of rows, which POT finds.
    warn : bool
        Log a warning if Sinkhorn's iterations do not converge.
    condition : {"y1"}, optional
        Couple within the classes of the data only: `sample_plan_with_labels` then needs ``y1``, integers of shape
        ``(n,)`` or ``(n, 1)``, and the noise given the class stays what it was. With a method on the cost, ``(n, c)``
        floating conditions are weighed as by `couplings.couple`.
    generator : torch.Generator, optional
        Of the draws; by default one of its own with a fixed seed. Global random state is never touched.

    Raises
    ------
    ValueError
        For an unknown method or condition.
    """

    def __init__(
        self,
        method: str | Coupling = "exact",
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
        *,
        condition: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(method, str) and method not in _METHODS:
            raise ValueError(unknown("method of OTPlanSampler", method, _METHODS))
        if condition not in (None, "y1"):
            raise ValueError(unknown("condition", condition, ("y1",)))
        self.coupling = method if isinstance(method, Coupling) else Coupling() if method == "exact" else None
        self.method, self.reg, self.reg_m, self.normalize_cost = method, reg, reg_m, normalize_cost
        self.num_threads, self.warn, self.condition = num_threads, warn, condition
        self.generator = torch.Generator().manual_seed(_SEED) if generator is None else generator

    def get_map(self, x0: Tensor, x1: Tensor) -> Array:
        """Return the plan between a batch of sources and a batch of targets.

        Parameters
        ----------
        x0 : (n, *shape) Tensor
        x1 : (m, *shape) Tensor

        Returns
        -------
        (n, m) float64 array
            Sums to 1; for the exact plan of equal numbers of rows ``1 / n`` for each pair.

        Raises
        ------
        ValueError
            If the plan has no mass.
        ImportError
            If it takes POT, which is not installed.
        """
        return self._plan(x0, x1, None)

    def sample_map(self, pi: Array, batch_size: int, replace: bool = False) -> tuple[Array, Array]:
        """Draw pairs from a plan.

        Parameters
        ----------
        pi : (n, m) array
        batch_size : int
            Pairs to draw.
        replace : bool
            Draw each pair by itself, so that rows repeat. Otherwise no row of either side is used twice: the most
            likely matching under the plan plus Gumbel noise (perturb and MAP).

        Returns
        -------
        (batch_size,) int64 array, (batch_size,) int64 array
            Rows of the sources and of the targets, in the order of the targets if they do not repeat.

        Raises
        ------
        ValueError
            If there are fewer rows than pairs to draw without replacement.
        """
        return self._pairs(np.asarray(pi, dtype=np.float64), batch_size, replace, allowed=None)

    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool = False) -> tuple[Tensor, Tensor]:
        """Pair sources with targets.

        Parameters
        ----------
        x0 : (n, *shape) Tensor
            Noise, or another source.
        x1 : (m, *shape) Tensor
            Data; they keep their order unless `replace`.
        replace : bool
            As in `sample_map`.

        Returns
        -------
        (n, *shape) Tensor, (n, *shape) Tensor
        """
        if self.condition is not None:
            msg = "condition='y1' couples within classes: call sample_plan_with_labels(x0, x1, y1=classes)."
            raise ValueError(msg)
        return self._sample(x0, x1, None, None, None, replace)[:2]

    def sample_plan_with_labels(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        replace: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Pair sources with targets; each keeps its label.

        Parameters
        ----------
        x0 : (n, *shape) Tensor
        x1 : (m, *shape) Tensor
        y0 : (n, ...) Tensor, optional
        y1 : (m, ...) Tensor, optional
        replace : bool
            As in `sample_map`.

        Returns
        -------
        tuple
            Sources, targets, and the labels of both; None where none were given.
        """
        if self.condition is not None and y1 is None:
            msg = "condition='y1' couples within classes: pass them as y1=."
            raise ValueError(msg)
        return self._sample(x0, x1, y0, y1, None if self.condition is None else y1, replace)

    def sample_plan_with_scipy(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Pair sources with targets by the exact assignment, which keeps every row and the order of `x1`.

        Parameters
        ----------
        x0, x1 : (n, *shape) Tensor

        Returns
        -------
        (n, *shape) Tensor, (n, *shape) Tensor

        Notes
        -----
        Solved by ``"auction"``: the optimum that SciPy finds, sooner. Their shapes are kept.
        """
        return Coupling()(x1, x0).noise, x1

    def sample_trajectory(self, X: Tensor) -> Array:
        """Pair populations at successive times into trajectories.

        Parameters
        ----------
        X : (n, times, *shape) Tensor

        Returns
        -------
        (n, times, *shape) array
            Row i starts at ``X[i, 0]``; every row of every time is used once.
        """
        X = as_tensor(X, "X")
        index, steps = torch.arange(len(X), device=X.device), [X[:, 0]]
        for now, then in zip(X.unbind(1), X.unbind(1)[1:], strict=False):
            index = self._successors(now, then)[index]
            steps.append(then[index])
        stacked: Array = torch.stack(steps, 1).numpy(force=True)
        return stacked

    def _successors(self, now: Tensor, then: Tensor) -> Tensor:
        """``(n,)`` rows of the next time."""
        if self.coupling is not None:
            return self.coupling(now, then, generator=self.generator).index
        i, j = self.sample_map(self._plan(now, then, None), len(now))
        return torch.from_numpy(j[np.argsort(i)]).to(now.device)

    def _sample(
        self, x0: Tensor, x1: Tensor, y0: Tensor | None, y1: Tensor | None, condition: Tensor | None, replace: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        classes = _as_condition(condition)
        if self.coupling is not None and not replace and len(x0) == len(x1):
            coupled = self._couple(x0, x1, classes)
            return coupled.noise, x1, None if y0 is None else coupled.apply(y0), y1
        plan = self._plan(x0, x1, classes)
        i, j = self._pairs(plan, len(x0), replace, _same_class(classes))

        def of(t: Tensor | None, rows: Array) -> Any:
            return None if t is None else t[torch.from_numpy(rows).to(t.device)]

        return of(x0, i), of(x1, j), of(y0, i), of(y1, j)

    def _couple(self, x0: Tensor, x1: Tensor, classes: Tensor | None) -> Coupled[Tensor]:
        assert self.coupling is not None
        return self.coupling(x1, x0, condition=classes, generator=self.generator)

    def _plan(self, x0: Tensor, x1: Tensor, classes: Tensor | None) -> Array:
        """Return the plan, within classes of equal rows on both sides if there are any."""
        if self.coupling is not None and len(x0) == len(x1):
            index = self._couple(x0, x1, classes).index.numpy(force=True)
            plan = np.zeros((len(x0), len(x1)))
            plan[index, np.arange(len(x1))] = 1 / len(x0)
            return plan
        if classes is None:
            return self._solved(x0, x1)
        if classes.ndim != 1 or classes.is_floating_point() or len(x0) != len(x1):
            msg = f"condition='y1' with method={self.method!r} takes integer classes and as many sources as targets."
            raise ValueError(msg)
        plan = np.zeros((len(x0), len(x1)))
        for each in torch.unique(classes):
            rows = (classes == each).nonzero().flatten()
            at = rows.numpy(force=True)
            plan[np.ix_(at, at)] = self._solved(x0[rows], x1[rows]) * (len(at) / len(x0))
        return plan

    def _solved(self, x0: Tensor, x1: Tensor) -> Array:
        a, b = (x.detach().reshape(len(x), -1).cpu().double() for x in (x0, x1))
        cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        if self.normalize_cost:
            cost = cost / cost.max()
        if self.method == "sinkhorn" and len(a) == len(b):
            from couplings.assigners.sinkhorn import entropic_plan

            return entropic_plan(cost, self.reg, warn=self.warn).numpy() / len(a)
        plan = self._by_pot(cost.numpy())
        if not np.isfinite(plan).all() or not plan.sum() > 0:
            msg = (
                f"the plan of method={self.method!r} has no mass at reg={self.reg}: costs reach "
                f"{float(cost.max()):.3g}. Raise reg=, or pass normalize_cost=True."
            )
            raise ValueError(msg)
        return plan

    def _by_pot(self, cost: Array) -> Array:
        try:
            import ot
        except ImportError as error:
            msg = f"plans of method={self.method!r} need the package POT. Type: pip install 'couplings[pot]'"
            raise ImportError(msg) from error
        n, m = cost.shape
        a, b = np.full(n, 1 / n), np.full(m, 1 / m)
        if self.method == "sinkhorn":
            plan = ot.sinkhorn(a, b, cost, self.reg, method="sinkhorn_log", warn=self.warn)
        elif self.method == "unbalanced":
            plan = ot.unbalanced.sinkhorn_stabilized_unbalanced(a, b, cost, self.reg, self.reg_m, warn=self.warn)
        elif self.method == "partial":
            plan = ot.partial.entropic_partial_wasserstein(a, b, cost, self.reg)
        else:
            plan = ot.emd(a, b, cost, numThreads=self.num_threads)
        return np.asarray(plan, dtype=np.float64)

    def _pairs(self, plan: Array, count: int, replace: bool, allowed: Array | None) -> tuple[Array, Array]:
        """Draw pairs; `allowed` marks those that may be, whatever their mass."""
        if replace:
            edges = plan.cumsum()
            drawn = torch.rand(count, generator=self.generator, device=self.generator.device, dtype=torch.float64)
            at = np.searchsorted(edges, drawn.numpy(force=True) * edges[-1], side="right")
            i, j = np.divmod(np.minimum(at, plan.size - 1), plan.shape[1])
            return i, j
        if count > min(plan.shape):
            msg = (
                f"{count} pairs without a repeated row need as many rows on both sides, got {plan.shape[0]} and "
                f"{plan.shape[1]}. Pass replace=True."
            )
            raise ValueError(msg)
        from couplings.assigners.randomness import gumbel
        from couplings.kernels import linear_sum_assignment

        score = np.log(np.maximum(plan, _LEAST)) + gumbel(torch.Size(plan.shape), self.generator).numpy(force=True)
        if allowed is not None:
            score = np.where(allowed, score, -np.inf)
        i, j = linear_sum_assignment(score, maximize=True)
        if count < len(i):
            order = torch.randperm(len(i), generator=self.generator, device=self.generator.device)
            chosen = order[:count].numpy(force=True)
            i, j = i[chosen], j[chosen]
        order_of_targets = np.argsort(j)
        return i[order_of_targets], j[order_of_targets]


def _as_condition(labels: Tensor | None) -> Tensor | None:
    """Classes as ``(n,)`` integers, which TorchCFM also takes as ``(n, 1)``."""
    if labels is None or labels.is_floating_point() or labels.ndim == 1:
        return labels
    return labels.reshape(len(labels), -1).squeeze(1)


def _same_class(classes: Tensor | None) -> Array | None:
    if classes is None or classes.ndim != 1:
        return None
    same: Array = (classes[:, None] == classes).numpy(force=True)
    return same
