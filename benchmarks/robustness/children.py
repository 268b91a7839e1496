"""Processes that are meant to come to harm: started in a moment, ended at any, and asked how they ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PATIENCE", "Child", "End", "context", "ended", "started"]

PATIENCE = 600.0  # seconds after which a process is taken to hang; the first may compile on a busy machine


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes
    ----------
    code : int or None
        What it exited with, the signal that ended it as a negative number, or None if it hung.
    said : str
        What it wrote to standard error.
    seconds : float
        From its start.
    """

    code: int | None
    said: str
    seconds: float

    @property
    def in_short(self) -> str:
        """The end in a line: how, and the last line that it wrote."""
        last = self.said.strip().splitlines()[-1:] or ["nothing said"]
        return f"{'it hung' if self.code is None else f'exit code {self.code}'}, {last[0]}"

    def clear_error(self, *words: str) -> str | None:
        """Return what is wrong with an end that should be a clear error: exit code 1, and one line with these words."""
        lines = [line for line in self.said.splitlines() if line.strip() and not line.startswith("WARNING")]
        if self.code != 1:
            return f"no error: {self.in_short}"
        # A thread of TensorBoard prints what it met before the error of the run says so.
        if "Traceback" in self.said and "Exception in thread" not in self.said:
            _, _, rest = self.said.partition("Traceback")
            frames = (line for line in rest.splitlines()[1:] if line and not line.startswith(" "))
            return f"a traceback: {next(frames, 'cut short')}; {self.in_short}"
        if not lines or not all(word in lines[-1] for word in words):
            return f"no clear error: {self.in_short}"
        return None


def context() -> Any:
    """Return a way to start processes from one that has imported everything, and run nothing yet."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["couplings.distributed", "couplings.semidiscrete", "integrations.loop"])
    return found


class Child:
    """A process at work; see `started`."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self.pid, self._log, self._began = process, process.pid, log, time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return bool(self.process.is_alive())

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; return False if the process has ended, or patience has, before it held."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not self.alive or time.monotonic() > deadline:
                return condition()
            time.sleep(0.005)
        return True

    def end(self, patience: float | None = None) -> End:
        """Wait for its end, `PATIENCE` seconds by default."""
        self.process.join(PATIENCE if patience is None else patience)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        said = self._log.read_text(errors="replace") if self._log.exists() else ""
        return End(code, said, time.monotonic() - self._began)


@contextmanager
def started(work: Callable[..., object], *arguments: Any) -> Iterator[Child]:
    """Start ``work(*arguments)``, importable by name, in a process that has one thread; it does not outlive the block.

    What it raises is a traceback and the exit code 1, as in a program.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "said"
        process = context().Process(target=_serve, args=(log, work, arguments))
        process.start()
        try:
            yield Child(process, log)
        finally:
            process.kill()
            process.join()


def ended(work: Callable[..., object], *arguments: Any, kill_after: float | None = None) -> End:
    """Start ``work(*arguments)`` and wait for its end, or kill it after some seconds."""
    with started(work, *arguments) as child:
        if kill_after is not None:
            child.process.join(kill_after)
            child.process.kill()
        return child.end()


def _serve(log: Path, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    import torch

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115  # for as long as the process lives
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    work(*arguments)
