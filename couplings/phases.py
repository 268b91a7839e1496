"""Where the time of a coupling goes: marks in the code, read by a clock only while somebody is recording."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["PHASES", "phase", "recorded"]

PHASES = ("checks", "cost", "conversion", "solve", "gather", "report")
"""Checks and flattening of the operands; the cost matrix; what a solver needs done to it first; the solver itself;
moving the noise; the distances that are reported. What lies between them is ``other``."""


class _Recorder:
    """Seconds by phase. A phase inside another is not counted in the outer one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = dict.fromkeys((*PHASES, "other"), 0.0)
        self.clock = clock
        self.open = ["other"]
        self.since = clock()

    def mark(self) -> None:
        now = self.clock()
        self.seconds[self.open[-1]] += now - self.since
        self.since = now


# A context variable, so that a recording sees the thread that started it and no other.
_recorder: ContextVar[_Recorder | None] = ContextVar("couplings phases", default=None)


class phase:  # noqa: N801  # read as a keyword: ``with phase("solve"):``
    """Mark a block of code as a phase; costs a look-up where nobody records.

    Parameters
    ----------
    name : str
        One of `PHASES`.
    """

    __slots__ = ("name", "recorder")

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.recorder = _recorder.get()
        if self.recorder is not None:
            self.recorder.mark()
            self.recorder.open.append(self.name)

    def __exit__(self, *_: object) -> None:
        if self.recorder is not None:
            self.recorder.mark()
            self.recorder.open.pop()


@contextmanager
def recorded(clock: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, float]]:
    """Record the phases of the couplings inside.

    Parameters
    ----------
    clock : callable
        Seconds; `torch.utils.benchmark.timer` also waits for a GPU.

    Yields
    ------
    dict
        Seconds by phase, complete when the block ends; they add up to the time of the block.

    Examples
    --------
    >>> import torch
    >>> from couplings import couple
    >>> with recorded() as seconds:
    ...     _ = couple(torch.rand(8, 4), torch.randn(8, 4))
    >>> seconds["cost"] > 0 and seconds["solve"] > 0
    True
    """
    recorder = _Recorder(clock)
    token = _recorder.set(recorder)
    try:
        yield recorder.seconds
    finally:
        recorder.mark()
        _recorder.reset(token)
