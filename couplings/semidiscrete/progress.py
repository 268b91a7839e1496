"""How far a fit has come: a bar, a log, or a function of the caller's."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from couplings.semidiscrete.ascent import State

__all__ = ["Progress", "reporting"]

logger = logging.getLogger(__name__)

Show = Callable[[float, str], None]


class Progress:
    """Share of the work of a fit that is done, from how chi^2 has fallen so far.

    Parameters
    ----------
    show : callable
        Given an estimate of the share that is done, and a line that says where the fit is.
    level : int
        At which each measurement is logged.
    parts : int
        Classes that are fitted one after another.
    steps : int
        That each may take.
    tolerance : float
        At which it ends before.
    """

    def __init__(self, show: Show, level: int, parts: int, steps: int, tolerance: float) -> None:
        self._show, self._level, self._parts, self._steps, self._tolerance = show, level, parts, steps, tolerance
        self._begun = time.perf_counter()
        self._measured: list[tuple[int, float]] = []
        self._end = float(steps)

    def measured(self, number: int, state: State) -> None:
        """Take note of a new chi^2 of part `number`."""
        if self._measured and self._measured[-1][0] >= state.step:
            self._measured = []  # another part begins
        self._measured.append((state.step, state.chi2))
        # It ends at a measurement.
        self._end = max(
            self._expected_end(), min(state.next_check, self._steps) if state.chi2 >= self._tolerance else 1
        )
        logger.log(self._level, "%s after %.1f s", self._where(number, state), time.perf_counter() - self._begun)
        self.stepped(number, state)

    def stepped(self, number: int, state: State) -> None:
        """Show where part `number` is."""
        done = (number + min(state.step / self._end, 1.0)) / self._parts
        self._show(done, self._where(number, state))

    def _where(self, number: int, state: State) -> str:
        of_class = f"class {number + 1} of {self._parts}, " if self._parts > 1 else ""
        return f"{of_class}step {state.step}: chi^2 {state.chi2:.3g}"

    def _expected_end(self) -> float:
        """Carry on the power of the steps that chi^2 has lately fallen with; at first, as one over the steps."""
        step, chi2 = self._measured[-1]
        if chi2 < self._tolerance:
            return float(step)
        past = [(s, c) for s, c in self._measured if 0 < s <= 0.5 * step and c > chi2]
        power = math.log(past[-1][1] / chi2) / math.log(step / past[-1][0]) if past else 1.0
        times = math.exp(min(math.log(chi2 / self._tolerance) / power, 20.0))
        return min(max(step, 10) * times, float(self._steps))


@contextmanager
def reporting(progress: bool | Show, parts: int, steps: int, tolerance: float) -> Iterator[Progress]:
    """Open what the progress of a fit is reported to: a bar if one is wanted and tqdm is there, else the log."""
    if callable(progress):
        yield Progress(progress, logging.DEBUG, parts, steps, tolerance)
    elif progress and importlib.util.find_spec("tqdm") is not None:
        tqdm = importlib.import_module("tqdm.auto").tqdm
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        with tqdm(desc="fit", total=1.0, bar_format=form, smoothing=0, miniters=0) as bar:

            def show(done: float, where: str) -> None:
                bar.set_postfix_str(where, refresh=False)
                bar.update(done - bar.n)

            yield Progress(show, logging.DEBUG, parts, steps, tolerance)
    else:
        level = logging.INFO if progress else logging.DEBUG
        yield Progress(lambda done, where: None, level, parts, steps, tolerance)
