"""Calls and windows by the thousand, in a process of its own: memory stays flat, and nothing is left behind.

Resident memory is read after a collection, and after what the allocator keeps was given back; it is compared from the
second quarter of the work on, once caches and lists of free blocks are full. Threads, file descriptors and Python
objects are counted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch

import couplings
from couplings import Coupling, lookahead

from ..child import Child
from .trial import Outcome, sized

CALLS, WINDOWS = 10_000, 1_000
PARTS_OF_A_RUN = 12
MOST = {"bytes": 8 << 20, "objects": 500, "threads": 0, "descriptors": 0}  # more than these at the end is a leak
PATIENCE = 7200.0

Step = Callable[[int], None]


def calls() -> Iterator[tuple[str, Step]]:
    """List what is called over and over: methods, sizes, conditions, ways."""
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 96, 3, 8, 8, generator=generator)
    labels = torch.randint(5, (96,), generator=generator)
    chosen = {info.name: Coupling(info.name) for info in couplings.methods()}
    chosen |= {
        "int8": Coupling(quantize="int8"),
        "l1": Coupling(metric="l1"),
        "by function": Coupling(metric=torch.cdist),
    }

    def sizes(number: int) -> int:
        return (96, 32, 7, 64)[number % 4]

    def called(coupling: Coupling) -> Step:
        return lambda k: float(coupling(data[: sizes(k)].flatten(1), noise[: sizes(k)].flatten(1)).reduction)

    def within_classes(k: int) -> None:
        n = sizes(k)
        chosen["auction"](data[:n], noise[:n], condition=labels[:n])

    def submitted(k: int) -> None:
        chosen["auction"].submit(data[: sizes(k)], noise[: sizes(k)]).result()

    def dropped(k: int) -> None:
        chosen["auction"].submit(data[: sizes(k)], noise[: sizes(k)]).wait()

    def refused(k: int) -> None:
        with suppress(ValueError):
            chosen["auction"](data[: sizes(k)], noise[: sizes(k)] * float("nan"))

    yield from ((name, called(coupling)) for name, coupling in chosen.items())
    yield from ((step.__name__, step) for step in (within_classes, submitted, dropped, refused))


def windows() -> Iterator[tuple[str, Step]]:
    """List what is done with a window: read to its end, left in the middle, or ended by an error of the loader."""
    coupling = Coupling()

    def batches(count: int, fails: bool = False) -> Iterator[torch.Tensor]:
        for k in range(count):
            if fails and k == count - 1:
                msg = "the loader failed"
                raise OSError(msg)
            yield torch.ones(16, 3, 8, 8) * k

    def read(k: int) -> None:
        for _ in lookahead(list(batches(4)), coupling, window=4, seed=k):
            pass

    def left(k: int) -> None:
        for _ in lookahead(list(batches(8)), coupling, window=4, seed=k):
            break

    def failed(k: int) -> None:
        with suppress(OSError):
            for _ in lookahead(batches(6, fails=True), coupling, window=4, seed=k):
                pass

    yield from ((step.__name__, step) for step in (read, left, failed))


def held() -> dict[str, int]:
    """Count what this process holds."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    import psutil

    process = psutil.Process()
    return {
        "bytes": process.memory_info().rss,
        "objects": len(gc.get_objects()),
        "threads": max(threading.active_count(), process.num_threads()),
        "descriptors": process.num_fds() if os.name == "posix" else process.num_handles(),
    }


def measure(name: str, step: Step, times: int) -> dict[str, Any]:
    """Do a step over and over, and compare what is held from the second quarter on: medians of quarters."""
    every = max(1, times // PARTS_OF_A_RUN)
    found = []
    for number in range(times):
        step(number)
        if (number + 1) % every == 0:
            found.append(held())
    quarter = max(1, len(found) // 4)
    second, last = found[quarter : 2 * quarter] or found, found[-quarter:]
    growth = {key: _median(last, key) - _median(second, key) for key in MOST}
    return {"name": name, "times": times, "growth": growth, "bytes": _median(last, "bytes")}


def _median(found: list[dict[str, int]], key: str) -> int:
    return sorted(each[key] for each in found)[len(found) // 2]


def leaks(measured: dict[str, Any]) -> list[str]:
    """Say what grew beyond what is allowed."""
    grown = {key: amount for key, amount in measured["growth"].items() if amount > MOST[key]}
    return [f"{measured['name']}: {amount} more {key} after {measured['times']} times" for key, amount in grown.items()]


def _serve(connection: Any) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # modules need not be gone through at every collection
    with suppress(EOFError):  # the one who asked has ended
        while True:
            what, share = connection.recv()
            connection.send(run(what, share))


def run(what: str, share: float) -> list[dict[str, Any]]:
    """Measure everything that is done over and over, in this process."""
    steps, full = {"calls": (calls, CALLS), "windows": (windows, WINDOWS)}[what]
    return [measure(name, step, sized(full, share, least=8)) for name, step in steps()]


def stay_flat(share: float) -> Outcome:
    """Do 10,000 calls of each kind, and 1,000 windows of each."""
    measured = []
    for what in ("calls", "windows"):
        with Child(_serve) as child:
            child.send((what, share))
            measured += child.receive(PATIENCE)
    lost = [leak for each in measured for leak in leaks(each)]
    growth = {each["name"]: each["growth"] for each in measured}
    return Outcome.of(sum(each["times"] for each in measured), lost, growth=growth, most=MOST)


PARTS = {"memory": stay_flat}
