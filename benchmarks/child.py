"""A process that works through one task after another, and is ended when it takes too long."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

__all__ = ["Child", "Ended"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Ended(Exception):  # noqa: N818  # not always an error: it was ended
    """The process did not answer in time, or died; the next task starts a new one."""


class Child:
    """A process, started when it is first needed.

    Parameters
    ----------
    serve : callable
        ``serve(connection, *arguments)`` receives and answers until `EOFError`; importable by name.
    *arguments : object
    threads : int
        Of every thread pool in it.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any, threads: int = 1) -> None:
        self._serve, self._arguments, self._threads = serve, arguments, threads
        self._process: Any = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    def start(self) -> None:
        """Start a process."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs, *self._arguments), daemon=True)
        # Pools read these when they are loaded, before anything can be told otherwise.
        saved = {name: os.environ.get(name) for name in THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(self._threads)))
        try:
            self._process.start()
        finally:
            for name, value in saved.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def send(self, task: Any) -> None:
        """Hand over a task."""
        if not self.running:
            self.start()
        self._connection.send(task)

    def receive(self, timeout: float, what: str = "did not finish") -> Any:
        """Return the next answer.

        Raises
        ------
        Ended
            If there is none within ``timeout`` seconds, with ``what`` in the message.
        """
        try:
            if self._connection.poll(timeout):
                return self._connection.recv()
            msg = f"{what} in {timeout:.0f} s"
        except (EOFError, ConnectionError):
            self._process.join()
            msg = f"ended its process (exit code {self._process.exitcode})"
        self.end()
        raise Ended(msg)

    def end(self) -> None:
        """End the process, if there is one."""
        if self.running:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None
