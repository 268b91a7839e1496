"""Ending a run in order when a cluster takes the machine back: SIGTERM, and what the processes agree on about it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def collected() -> Iterator[list[int]]:
    """Collect SIGTERM: the list is not empty once the process is asked to end."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def end(number: int, frame: object) -> None:
        received.append(number)
        # The same signal may end loading processes, whose loader finds out when it waits for one of them. The handler
        # that torch sets for a loader of the main thread would raise wherever that is, also between halves of a step.
        signal.signal(signal.SIGCHLD, lambda *_: None)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


class Agreement:
    """Whether any process was asked to end, found out behind the steps: none of them waits for it.

    About once a second the processes exchange it on the host, and each looks at the answer when the next exchange is
    due. All end after the same step: two seconds after the first was asked, or two steps where these are longer.

    Parameters
    ----------
    processes : int
        That train together.
    """

    def __init__(self, processes: int) -> None:
        # A group of its own: exchanges of other threads must not come between.
        self._group = dist.new_group(backend="gloo") if processes > 1 else None
        self._answer: tuple[dist.Work, torch.Tensor] | None = None
        self._last, self._due, self._when = 0, 0, time.perf_counter()

    def __call__(self, step: int, asked: bool) -> bool:
        """Return whether to end after ``step``; every process calls it after every step."""
        if self._group is None:
            return asked
        if step < self._due:
            return False
        any_asked, steps = False, 1
        if self._answer is not None:
            work, answer = self._answer
            work.wait()
            any_asked, steps = bool(answer[0]), max(1, int(answer[1]))
        now = time.perf_counter()
        a_second = (step - self._last) / (now - self._when) if self._answer else 1.0
        answer = torch.tensor([float(asked), a_second], dtype=torch.float64)
        self._answer = dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._group, async_op=True), answer
        self._last, self._due, self._when = step, step + steps, now
        return any_asked

    def settle(self) -> None:
        """Wait for the last exchange: a process that ends in the middle of one aborts."""
        if self._answer is not None:
            self._answer[0].wait()
            self._answer = None
