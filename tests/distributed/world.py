"""Ranks that stay alive between tests: starting a process costs seconds, asking it to run a function milliseconds."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 60.0  # seconds after which a rank that has not answered is taken to hang

# Ranks are forked from a process that has imported everything once and started no thread. A test session has one such
# process, so the trainers that tests/trainers runs are imported there too.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.distributed", "scipy.optimize", "numba", "ot", "lapjv", "couplings.distributed", "integrations.loop"]
)


@dataclass
class Last:
    """An answer after which the rank's process ends, as one does that an error ends."""

    answer: object


class World:
    """Processes that form one gloo group over the loopback interface."""

    def __init__(self, size: int, timeout: float = PATIENCE) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self.processes = [], []
        meeting = Path(self._folder.name) / "store"
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, size, str(meeting), timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def run(self, scenario, *args):
        """Call `scenario(*args)` on every rank; what each returned, or None for a rank that died."""
        for pipe in self._pipes:
            pipe.send((scenario, args))
        answers = [self._answer(rank) for rank in range(self.size)]
        failed = [f"rank {rank}:\n{told}" for rank, (good, told) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [told for _, told in answers]

    def _answer(self, rank):
        pipe = self._pipes[rank]
        deadline = time.monotonic() + PATIENCE
        try:
            if not pipe.poll(deadline - time.monotonic()):
                self.kill()
                return False, f"no answer within {PATIENCE:.0f} s: it hangs"
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            return True, None

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join(10)
        self._folder.cleanup()

    def close(self):
        """End the processes; True if all ended by themselves."""
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(20)
        ended = all(process.exitcode == 0 for process in self.processes)
        self.kill()
        return ended


def _serve(rank, size, meeting, timeout, pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while (job := pipe.recv()) is not None:
        scenario, args = job
        try:
            told = scenario(*args)
        except Exception:
            pipe.send((False, traceback.format_exc()))
            continue
        if isinstance(told, Last):
            pipe.send((True, told.answer))
            os._exit(1)
        pipe.send((True, told))
    dist.destroy_process_group()
