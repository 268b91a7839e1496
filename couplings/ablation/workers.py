"""The processes in which an ablation measures: alone, side by side, or as the ranks of a group.

A worker is a child with a pipe. One that hangs or crashes is ended and becomes the result of its cell; when the
parent ends, however it ends, the pipe closes and the child with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from couplings.ablation.grid import Point

__all__ = ["Settings", "Worker", "measure"]

Record = dict[str, Any]

_READY = 1800.0  # seconds for imports and for compiling kernels, on a machine that is busy


@dataclass(frozen=True)
class Settings:
    """How cells are measured.

    Attributes
    ----------
    device : str
        Where the batches of the local scope lie; ranks couple on the CPU.
    threads : int or None
        Of a worker that measures times; None for PyTorch's own choice.
    repeats : int
        Timed calls of a cell.
    timeout : float
        Seconds after which a cell has failed.
    """

    device: str = "cpu"
    threads: int | None = None
    repeats: int = 5
    timeout: float = 600.0


class Worker:
    """One process, or as many as a group has ranks; started when the first cell is given."""

    def __init__(self, tasks: Sequence[str], settings: Settings, threads: int | None, ranks: int) -> None:
        self.tasks, self.settings, self.threads, self.ranks = tasks, settings, threads, ranks
        self._processes: list[Any] = []
        self.pipes: list[Connection] = []
        self._deadline = 0.0

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child inherits the locks of PyTorch's threads
        self._folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "store")
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, self.tasks, self.settings, self.threads, rank, self.ranks, meeting),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self.pipes.append(ours)
        for pipe in self.pipes:
            try:
                ready = pipe.poll(_READY) and pipe.recv()
            except EOFError:
                ready = False
            if not ready:
                self.end()
                msg = f"a worker ended while it was starting, or was not ready after {_READY:.0f} s"
                raise RuntimeError(msg)

    def end(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self.pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        if self._processes:
            self._folder.cleanup()
        self._processes, self.pipes = [], []

    def begin(self, point: Point) -> None:
        """Give the processes a cell to measure."""
        if not self._processes:
            self._start()
        for pipe in self.pipes:
            with suppress(ConnectionError):  # a process that has ended is noticed by who waits for its answer
                pipe.send(point)
        self._deadline = time.monotonic() + self.settings.timeout

    @property
    def left(self) -> float:
        """Seconds that the cell may still take."""
        return max(0.0, self._deadline - time.monotonic())

    def answer(self, point: Point) -> dict[str, Record]:
        """Wait for the records of the cell, by task; what failed has an ``error``."""
        answers: list[dict[str, Record]] = []
        for process, pipe in zip(self._processes, self.pipes, strict=True):
            try:
                if pipe.poll(self.left):
                    answers.append(pipe.recv())
                    continue
                error = f"did not finish in {self.settings.timeout:.0f} s"
            except (EOFError, ConnectionError):
                process.join(10)
                error = f"its process ended (exit code {process.exitcode})"
            self.end()
            return {self.tasks[0]: point.to_dict() | {"error": error}}
        return answers[0]


def measure(
    groups: Iterable[Sequence[Point]],
    tasks: Sequence[str],
    settings: Settings,
    *,
    threads: int | None = 1,
    jobs: int = 1,
    ranks: int = 1,
) -> Iterator[tuple[Point, dict[str, Record]]]:
    """Measure cells in other processes, and hand out their records as they are finished.

    Parameters
    ----------
    groups : iterable of sequences of Point
        A group couples the same batch, and is measured by one worker.
    tasks : sequence of str
        What is measured of a cell: ``"quality"``, ``"time"`` or both.
    settings : Settings
    threads : int or None
        Of each process: with one, those side by side do not wait for each other.
    jobs : int
        Workers side by side.
    ranks : int
        Processes of each worker.
    """
    waiting = [list(group) for group in groups]
    workers = [Worker(tasks, settings, threads, ranks) for _ in range(min(jobs, len(waiting)))]
    busy: dict[Worker, list[Point]] = {}
    try:
        for worker in workers:
            busy[worker] = waiting.pop(0)
            worker.begin(busy[worker][0])
        while busy:
            pipes: dict[Any, Worker] = {worker.pipes[0]: worker for worker in busy}
            ready = wait(list(pipes), min(worker.left for worker in busy))
            # One that is late is asked too, and says so.
            for worker in [pipes[pipe] for pipe in ready] or [worker for worker in busy if not worker.left]:
                point = busy[worker].pop(0)
                answer = worker.answer(point)
                if not busy[worker] and waiting:
                    busy[worker] = waiting.pop(0)
                if busy[worker]:
                    worker.begin(busy[worker][0])  # before the answer is dealt with
                else:
                    del busy[worker]
                yield point, answer
    finally:
        for worker in workers:
            worker.end()


def _serve(
    pipe: Connection, tasks: Sequence[str], settings: Settings, threads: int | None, rank: int, size: int, meeting: str
) -> None:
    """Measure what comes through the pipe, until it closes."""
    import torch

    import couplings
    from couplings.ablation.measure import Measurer, Ranks

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    if threads is not None:
        torch.set_num_threads(threads)
    couplings.warmup()
    if size > 1:
        # The ranks are all here: what the host's name resolves to does not matter.
        if "lo" in {name for _, name in socket.if_nameindex()}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=settings.timeout),
        )
    measurer = Measurer("cpu" if size > 1 else settings.device, settings.repeats, Ranks(rank, size))
    pipe.send("ready")
    try:
        while True:
            pipe.send(measurer.measure(pipe.recv(), tasks))
    except (EOFError, ConnectionError):  # the parent is gone
        return
