"""Where the time of a coupling goes: marks in the code, read by a clock only while somebody is recording."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = ["STAGES", "Record", "recorded", "stage"]

STAGES = ("checks", "cost", "conversion", "solve", "gather", "report")
"""Checks and flattening of the operands; the cost matrix; its copy to the host; the solver; moving the noise; the
distances that are reported. A coupling over ranks adds one stage for each exchange. What lies between is ``other``."""


@dataclass
class Record:
    """What the couplings inside a `recorded` block took.

    Attributes
    ----------
    seconds : dict of str to float
        By stage; a stage inside another is not counted in the outer one, so that they add up to the whole block.
    received : dict of str to int
        Bytes that came from other ranks, by stage.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*STAGES, "other"), 0.0))
    received: dict[str, int] = field(default_factory=dict)


class _Recorder:
    """The clock behind a `Record`, and the stages that are open."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.record = Record()
        self.clock = clock
        self.open = ["other"]
        self.since = clock()

    def mark(self) -> None:
        now, seconds = self.clock(), self.record.seconds
        seconds[self.open[-1]] = seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now


# A context variable, so that a recording sees the thread that started it and no other.
_recorder: ContextVar[_Recorder | None] = ContextVar("couplings stages", default=None)


class stage:  # noqa: N801  # read as a keyword: ``with stage("solve"):``
    """Mark a block of code as a stage; costs a look-up where nobody records.

    Parameters
    ----------
    name : str
        One of `STAGES`, or the name of an exchange between ranks.
    received : int
        Bytes that other ranks send in it.
    """

    __slots__ = ("name", "received", "recorder")

    def __init__(self, name: str, received: int = 0) -> None:
        self.name, self.received = name, received

    def __enter__(self) -> None:
        self.recorder = _recorder.get()
        if self.recorder is not None:
            self.recorder.mark()
            self.recorder.open.append(self.name)

    def __exit__(self, *_: object) -> None:
        if self.recorder is not None:
            self.recorder.mark()
            self.recorder.open.pop()
            if self.received:
                received = self.recorder.record.received
                received[self.name] = received.get(self.name, 0) + self.received


@contextmanager
def recorded(clock: Callable[[], float] = time.perf_counter) -> Iterator[Record]:
    """Record the stages of the couplings inside.

    Parameters
    ----------
    clock : callable
        Seconds; `torch.utils.benchmark.timer` also waits for a GPU.

    Yields
    ------
    Record
        Complete when the block ends.

    Examples
    --------
    >>> import torch
    >>> from couplings import couple
    >>> with recorded() as record:
    ...     _ = couple(torch.rand(8, 4), torch.randn(8, 4))
    >>> record.seconds["cost"] > 0 and record.seconds["solve"] > 0
    True
    """
    recorder = _Recorder(clock)
    token = _recorder.set(recorder)
    try:
        yield recorder.record
    finally:
        recorder.mark()
        _recorder.reset(token)
