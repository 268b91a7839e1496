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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from couplings.ablation.grid import Point

__all__ = ["Settings", "World", "side_by_side"]

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


class World:
    """One process, or as many as a group has ranks; started when the first cell is given.

    Parameters
    ----------
    tasks : sequence of str
        What it measures of a cell: ``"quality"``, ``"time"`` or both.
    settings : Settings
    threads : int or None
        Of each process.
    ranks : int
    """

    def __init__(self, tasks: Sequence[str], settings: Settings, threads: int | None, ranks: int = 1) -> None:
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
            if not pipe.poll(_READY):
                self.end()
                msg = f"a worker was not ready after {_READY:.0f} s"
                raise RuntimeError(msg)
            pipe.recv()

    def end(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self.pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        if self._processes:
            self._folder.cleanup()
        self._processes, self.pipes = [], []

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, point: Point) -> None:
        """Give the processes a cell to measure."""
        if not self._processes:
            self._start()
        for pipe in self.pipes:
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

    def measure(self, point: Point) -> dict[str, Record]:
        """Measure one cell."""
        self.begin(point)
        return self.answer(point)


def side_by_side(
    groups: Sequence[Sequence[Point]], settings: Settings, jobs: int
) -> Iterator[tuple[Point, dict[str, Record]]]:
    """Measure qualities in several processes.

    Parameters
    ----------
    groups : sequence of sequences of Point
        A group couples the same batch, and is measured by one process.
    settings : Settings
    jobs : int
        Processes, of one thread each: several threads would wait for each other on a machine that is busy.

    Yields
    ------
    Point, dict
        As they are finished.
    """
    waiting = [list(group) for group in groups]
    worlds = [World(["quality"], settings, threads=1) for _ in range(min(jobs, len(waiting)))]
    busy: dict[World, list[Point]] = {}
    try:
        for world in worlds:
            busy[world] = waiting.pop(0)
            world.begin(busy[world][0])
        while busy:
            pipes: dict[Any, World] = {world.pipes[0]: world for world in busy}
            ready = wait(list(pipes), min(world.left for world in busy))
            # One that is late is asked too, and says so.
            for world in [pipes[pipe] for pipe in ready] or [world for world in busy if not world.left]:
                point = busy[world].pop(0)
                answer = world.answer(point)
                if not busy[world] and waiting:
                    busy[world] = waiting.pop(0)
                if busy[world]:
                    world.begin(busy[world][0])  # before the answer is dealt with
                else:
                    del busy[world]
                yield point, answer
    finally:
        for world in worlds:
            world.end()


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
