"""Stochastic ascent of the dual: potentials under which every data row is picked equally often.

With potentials g, noise z picks the data row j of highest ``g_j + <x_j, z>``. The dual of optimal transport is concave
in g; its gradient is the share each row ought to have, 1/N, less its share of the picks. Each step moves g along the
shares of fresh noise; what is reported is an average of g over the steps, late ones counting more, which has far less
noise than the last (Polyak, Juditsky 1992, doi:10.1137/0330046; weights: Shamir, Zhang, arXiv 1212.1824).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from couplings.noise import STREAMS, normal, row_seeds
from couplings.semidiscrete.rows import Rows
from couplings.semidiscrete.search import GROUP, Search

__all__ = ["State", "ascend", "start"]

logger = logging.getLogger(__name__)

_RATE = 0.3  # of the first step, in units of the typical gap between the two highest scores
_DECAY_AFTER = 20  # steps
_DECAY = 0.5
_AVERAGE = 3.0  # the average counts step t in proportion to t to this power, about
_CHECK_GROWTH = 1.25
_GAP_ROWS = 256
_MOST_AGAIN = 100  # times as much noise, behind which a smaller tolerance is not told apart
_CHECKED = 1024  # noise rows at a time, from which chi^2 is measured


@dataclass
class State:
    """Where an ascent stands.

    Attributes
    ----------
    potentials, average : (N,) Tensor
        Of the last step, and of the average.
    step : int
        Steps taken.
    next_check : int
        The step after which chi^2 is measured next.
    gap : float
        Typical gap between the two highest scores: the unit of a step.
    chi2 : float
        Of the average, when it was last measured.
    rough : bool
        Whether bfloat16 tells the highest scores apart.
    """

    potentials: Tensor
    average: Tensor
    step: int = 0
    next_check: int = 10
    gap: float = 0.0
    chi2: float = math.inf
    rough: bool = False


class Shares:
    """How often each data row is picked, against how often it should be. Equal rows count as one of greater weight.

    Parameters
    ----------
    rows : Rows
    """

    def __init__(self, rows: Rows) -> None:
        self._first = None if rows.copies is None else rows.copies.first
        every = torch.arange(rows.count, device=rows.device) if self._first is None else self._first
        copies = torch.bincount(every, minlength=rows.count)
        self._count = rows.count
        self._weight = torch.where(copies > 0, rows.count / copies.clamp(min=1), 0.0)

    def relative(self, picks: Tensor) -> Tensor:
        """Give each row's share of the picks as a multiple of 1/N."""
        shares = self._counts(picks).mul_(1.0 / picks.numel()).mul_(self._weight)
        return shares if self._first is None else shares[self._first]

    def chi2(self, picks: Tensor) -> float:
        """Estimate ``N sum_j (p_j - 1/N)^2`` without bias, from picks whose rows are independent of each other.

        Parameters
        ----------
        picks : (G, k) int64 Tensor

        Returns
        -------
        float
            Within a row of `picks` coincidences do not count.
        """
        groups, each = picks.shape
        if self._first is not None:
            picks = self._first[picks]
        within_keys = picks + self._count * torch.arange(groups, device=picks.device)[:, None]
        key, within = torch.unique(within_keys, return_counts=True)
        pairs = self._counts(picks).square().mul_(self._weight).sum()
        pairs -= (within.double().square() * self._weight[key % self._count]).sum()
        return float(pairs) / (groups * (groups - 1) * each**2) - 1.0

    def _counts(self, picks: Tensor) -> Tensor:
        picks = picks if self._first is None else self._first[picks]
        # Not `bincount`, for which the host waits. Whole numbers: sums do not depend on their order.
        counts = torch.zeros(self._count, dtype=torch.int64, device=picks.device)
        return counts.scatter_add_(0, picks.flatten(), torch.ones_like(picks.flatten())).double()


def start(rows: Rows, search: Search, seed: int) -> State:
    """Begin an ascent at the best of some closed forms, or at the optimum where there is one: on a line."""
    if rows.dim == 1:
        found = _on_a_line(rows)
        return State(found, found.clone(), chi2=0.0)
    noise = _noise(rows, seed, "start", 0, GROUP * math.ceil(max(256.0, math.sqrt(rows.count)) / GROUP))
    found = min(_guesses(rows), key=lambda guess: Shares(rows).chi2(search.combined(guess, noise)))
    return State(found, found.clone())


def ascend(
    rows: Rows,
    search: Search,
    state: State,
    *,
    batch_size: int,
    steps: int,
    tolerance: float,
    seed: int,
    checked: Callable[[State], None],
    stepped: Callable[[State], None],
) -> None:
    """Take steps until chi^2 of the average is below a tolerance.

    Parameters
    ----------
    rows : Rows
    search : Search
    state : State
        Advanced in place.
    batch_size : int
        Noise rows of a step.
    steps : int
        To end at, whether or not the tolerance is reached.
    tolerance : float
    seed : int
    checked : callable
        Called after each measurement.
    stepped : callable
        Called after each step.

    Notes
    -----
    A step is a function of its number and of `state`, so that an ascent can be resumed bit for bit. On a GPU the host
    waits where chi^2 is measured, after 10 steps, 13, 17, ..., and not between.
    """
    if rows.dim == 1 or state.chi2 < tolerance:  # there is nothing to do, or it was done before
        checked(state)
        return
    shares = Shares(rows)
    batch = -(-batch_size // GROUP) * GROUP
    while True:
        due, last = state.step in (0, state.next_check), state.step >= steps
        if due:
            state.gap, state.rough = _typical_gap(rows, state.average, seed, state.step)
            state.next_check = max(10, math.ceil(state.step * _CHECK_GROWTH))
        if due or last:
            state.chi2 = _measured_chi2(rows, search, state, tolerance, seed)
            if state.chi2 < tolerance:
                # The first value below it is likely too low: what is reported is measured again.
                state.chi2 = _measured_chi2(rows, search, state, tolerance, seed, again=True)
            checked(state)
            if last or state.chi2 < tolerance:
                return
        picks = search.combined(
            state.potentials, _noise(rows, seed, "fit", state.step * batch, batch), rough=state.rough
        )
        rate = _RATE * state.gap * (1.0 + state.step / _DECAY_AFTER) ** -_DECAY
        state.potentials += rate * (1.0 - shares.relative(picks)).float()
        state.potentials -= state.potentials.mean()
        state.step += 1
        state.average += (_AVERAGE + 1.0) / (state.step + _AVERAGE) * (state.potentials - state.average)
        stepped(state)


def _measured_chi2(
    rows: Rows, search: Search, state: State, tolerance: float, seed: int, *, again: bool = False
) -> float:
    """Measure the unbiased chi^2 of the average's picks on fresh noise: roughly where it is far above `tolerance`."""
    # Coincidences of picks grow with their square over N: from so many noise rows chi^2 is known within about 0.01, and
    # what is reported within a third of the tolerance.
    count = GROUP * math.ceil(max(_CHECKED, 10.0 * math.sqrt(rows.count)) / GROUP)
    count *= min(max(4, math.ceil(0.03 / tolerance)), _MOST_AGAIN) if again else 1
    first = (2 * state.step + again) << 24  # no noise serves twice
    picks: list[Tensor] = []
    for at in range(0, count, _CHECKED):
        noise = _noise(rows, seed, "check", first + at, min(_CHECKED, count - at))
        picks.append(search.combined(state.average, noise))
        chi2 = Shares(rows).chi2(torch.cat(picks))
        if chi2 > 2.0 * tolerance + 0.1:
            break
    return chi2


def _noise(rows: Rows, seed: int, stream: str, first: int, count: int) -> Tensor:
    seeds = row_seeds(seed, first, count, stream=STREAMS[stream], device=rows.device)
    return normal(seeds, (rows.dim,))


def _typical_gap(rows: Rows, potentials: Tensor, seed: int, step: int) -> tuple[float, bool]:
    """Find the median gap between the two highest scores, and whether it is far above the rounding of bfloat16.

    The gap is how far a potential moves before picks change.
    """
    if rows.count == 1:
        return 0.0, False
    noise = _noise(rows, seed, "start", step << 20, _GAP_ROWS)
    score, index = Search(rows).highest(potentials, noise, 2)
    product = float((rows.from_mean(rows.take(index[:, 0])) * noise).sum(1).abs().median())
    gaps = score[:, 0] - score[:, 1]
    if rows.copies is not None:
        first = rows.copies.first[index]
        gaps = gaps[first[:, 0] != first[:, 1]]
    gap = float(gaps.median()) if len(gaps) else 0.0
    return gap, gap > 8.0 * product * 2.0**-9


def _guesses(rows: Rows) -> list[Tensor]:
    """Potentials to start from.

    Many rows in few dimensions: those of a normal law with the rows' mean and covariance S, ``-x' S^(-1/2) x / 2``.
    Few rows in many dimensions: scores are nearly independent normals of deviation |x_j|, whose highest of N is at
    ``sqrt(2 log N) |x_j|``.
    """
    guesses = [-math.sqrt(2.0 * math.log(max(rows.count, 2))) * rows.norms, torch.zeros_like(rows.norms)]
    if rows.dim <= 64:
        covariance = torch.zeros(rows.dim, rows.dim, dtype=torch.float64, device=rows.device)
        for _, x in rows.chunks():
            centred = rows.from_mean(x.double())
            covariance += centred.T @ centred / rows.count
        if rows.mirrored:
            flip = rows.flipped(torch.arange(rows.dim, device=rows.device))
            covariance = (covariance + covariance[flip][:, flip]) / 2.0
        variances, axes = torch.linalg.eigh(covariance)
        scale = variances.clamp(min=1e-6 * max(float(variances[-1]), 1e-300)) ** -0.25
        parts = [(rows.from_mean(x.double()) @ axes).mul_(scale).square_().sum(1) for _, x in rows.chunks()]
        guesses.append(-0.5 * torch.cat(parts).float())
    return [guess - guess.mean() for guess in guesses]


def _on_a_line(rows: Rows) -> Tensor:
    """On a line, the plan is the quantile map: neighbours meet where the normal law has put the rows before."""
    x = torch.cat([rows.from_mean(part) for _, part in rows.chunks()]).flatten()
    ordered, order = x.sort()
    meet = torch.special.ndtri(torch.arange(1, rows.count, dtype=torch.float64, device=x.device) / rows.count)
    g = torch.zeros_like(x)
    g[order[1:]] = -(ordered.diff() * meet).cumsum(0)
    return g - g.mean()
