"""The processes in which an ablation measures: alone, side by side, or as the ranks of a group.

A worker is a child with a pipe. One that hangs or crashes is ended and becomes the result of its cell; when the
parent ends, however it ends, the pipe closes and the child with it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from couplings.ablation.grid import Point

__all__ = ["Settings", "World", "side_by_side"]

Record = dict[str, Any]

_READY = 1800.0  # seconds for imports and for compiling kernels, on a machine that is busy


class Settings:
    """How cells are measured.

    Parameters
    ----------
    device : str
    threads : int or None
        Of a worker that measures alone; None for PyTorch's own choice.
    repeats : int
    timeout : float
        Seconds after which a cell has failed.
    """

    def __init__(self, device: str, threads: int | None, repeats: int, timeout: float) -> None:
        self.device, self.threads, self.repeats, self.timeout = device, threads, repeats, timeout


class World:
    """One process, or as many as a group has ranks.

    Parameters
    ----------
    task : str
        ``"quality"``, ``"time"`` or ``"global"``.
    settings : Settings
    threads : int or None
    ranks : int
        1, or the ranks of ``"global"``.
    """

    def __init__(self, task: str, settings: Settings, threads: int | None, ranks: int = 1) -> None:
        self.task, self.settings, self.threads, self.ranks = task, settings, threads, ranks
        self._processes: list[Any] = []
        self.pipes: list[Connection] = []
        self._deadline = 0.0

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child inherits the locks of PyTorch's threads
        self._folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "store")
        settings = vars(self.settings)
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, self.task, settings, self.threads, rank, self.ranks, meeting), daemon=True
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
            pipe.send(point.to_dict())
        self._deadline = time.monotonic() + self.settings.timeout

    @property
    def left(self) -> float:
        """Seconds that the cell may still take."""
        return max(0.0, self._deadline - time.monotonic())

    def answer(self) -> dict[str, Record]:
        """Return the records of the cell, by task; what failed has an ``error``. Waits for them."""
        told: list[Any] = []
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(self.left):
                    self.end()
                    return {"error": {"error": f"did not finish in {self.settings.timeout:.0f} s"}}
                told.append(pipe.recv())
            except (EOFError, ConnectionError):
                self._processes[rank].join(10)
                code = self._processes[rank].exitcode
                self.end()
                return {"error": {"error": f"its process ended (exit code {code})"}}
        failed = [each for each in told if each is not None and "error" in each]
        answer: dict[str, Record] = failed[0] if failed else told[0]
        return answer

    def measure(self, point: Point) -> dict[str, Record]:
        """Measure one cell."""
        self.begin(point)
        return self.answer()


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
    worlds = [World("quality", settings, 1) for _ in range(min(jobs, len(waiting)))]
    busy: dict[World, list[Point]] = {}
    try:
        for world in worlds:
            busy[world] = waiting.pop(0)
            world.begin(busy[world][0])
        while busy:
            pipes = {world.pipes[0]: world for world in busy}
            ready = wait(list(pipes), min(world.left for world in busy))
            # One that is late is asked too, and says so.
            for world in [pipes[pipe] for pipe in ready] or [world for world in busy if not world.left]:  # type: ignore[index]
                group = busy[world]
                point, answer = group.pop(0), world.answer()
                if not group and waiting:
                    group = busy[world] = waiting.pop(0)
                if group:
                    world.begin(group[0])  # before the answer is dealt with
                else:
                    del busy[world]
                yield point, answer
    finally:
        for world in worlds:
            world.end()


def _serve(
    pipe: Connection, task: str, settings: Record, threads: int | None, rank: int, ranks: int, meeting: str
) -> None:
    import signal

    import torch

    import couplings
    from couplings.ablation.measuring import Measurer, RankMeasurer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    if threads is not None:
        torch.set_num_threads(threads)
    couplings.warmup()
    measurer = Measurer(settings["device"], settings["repeats"])
    of_ranks = RankMeasurer(rank, ranks, settings["repeats"])
    if task == "global":
        import torch.distributed as dist

        # The ranks are all here: what the host's name resolves to does not matter.
        if "lo" in {name for _, name in socket.if_nameindex()}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=settings["timeout"]),
        )
    pipe.send(None)
    while True:
        try:
            point = Point.from_dict(pipe.recv())
        except EOFError:
            return
        answer: Any
        try:
            if task == "global":
                answer = of_ranks.measure(point)
            else:
                answer = {task: measurer.quality(point) if task == "quality" else measurer.time(point)}
        except Exception as error:  # whatever is raised belongs in the cell: the others' results stand
            answer = {"error": {"error": f"{type(error).__name__}: {error}"}}
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionError):
            return
