"""Misfortunes from outside: killed processes, full and lost disks, numbers that are not finite, clocks that jump.

Work is struck at a random moment, mended, and begun again. What it leaves must then equal, bit for bit, what the same
work leaves that nothing happened to. A strike that does not kill must end the work with one clear line, or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .children import Child, ended, started
from .trial import Outcome, sized
from .victims import VICTIMS, Victim, as_program, recipe, train

__all__ = ["PARTS", "Strike", "inner_faults", "rank_killed", "strikes", "undisturbed"]

Strike = Callable[[Path, Child, random.Random], Callable[[], object] | None]
"""Does harm to the folder or the process of some work, and returns what undoes it; None if it could do none."""


# Strikes at work in a folder


def strikes(victims: dict[str, Victim], strike: Strike, wanted: int, *, disk_mib: int | None = None) -> Outcome:
    """Strike each of some works at random moments, and compare what it leaves in the end.

    Parameters
    ----------
    victims : dict
        Works by name.
    strike : callable
    wanted : int
        Strikes at each.
    disk_mib : int, optional
        Size of a file system of its own that the work is done on; needs root.
    """
    lost, tried, about = [], 0, {}
    for name, victim in victims.items():
        with tempfile.TemporaryDirectory() as whole:
            first = ended(victim.work, Path(whole))
            if first.seconds > 5.0:  # it may have compiled
                shutil.rmtree(whole)
                Path(whole).mkdir()
                first = ended(victim.work, Path(whole))
            expected, seconds = victim.state(Path(whole)) if first.code == 0 else None, first.seconds
        if first.code != 0:
            tried, lost = tried + 1, [*lost, f"{name}, undisturbed: {first.in_short}"]
            continue
        struck = 0
        for number in range(3 * wanted):
            rng = random.Random(number)
            with own_disk(disk_mib) as folder:
                if folder is None:
                    return Outcome.of(0, [], skipped="mounting a file system needs root")
                said, hit = _once(victim, expected, folder, strike, rng, seconds)
            struck += hit
            if said is not None:
                lost.append(f"{name}, seed {number}: {said}")
            if struck == wanted:
                break
        tried, about[name] = tried + struck, {"struck": struck, "undisturbed_s": round(seconds, 2)}
    return Outcome.of(tried, lost, victims=about)


def _once(
    victim: Victim, expected: Any, folder: Path, strike: Strike, rng: random.Random, seconds: float
) -> tuple[str | None, bool]:
    """Strike once, or several times, and go on to the end; return what was lost, and whether the work was struck."""
    hit = False
    for _ in range(rng.choice([1, 1, 2])):
        with started(victim.work, folder) as child:
            child.process.join(seconds * rng.random())
            undo = strike(folder, child, rng) if child.alive else None
            end = child.end()
        if undo is not None:
            hit = True
            undo()
        wrong = None if end.code in (0, -9) else end.clear_error()
        if end.code is None or wrong:
            return wrong or end.in_short, hit
    end = ended(victim.work, folder)
    if end.code != 0:
        return f"cannot go on: {end.in_short}", hit
    remains = [path.name for path in folder.rglob(".*")]
    if remains:
        return f"left {', '.join(remains)}", hit
    return None if victim.state(folder) == expected else "went on otherwise than undisturbed", hit


@contextmanager
def own_disk(mib: int | None) -> Iterator[Path | None]:
    """Make a folder, on a file system of its own if a size is given; None if there cannot be one."""
    with tempfile.TemporaryDirectory() as name:
        if mib is None:
            (Path(name) / "work").mkdir()
            yield Path(name) / "work"
            return
        if os.getuid() or _run("mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "tmpfs", name):
            yield None
            return
        try:
            (Path(name) / "work").mkdir()
            yield Path(name) / "work"
        finally:
            _run("umount", "-l", name)


def _run(*command: str) -> int:
    return subprocess.run(command, check=False, capture_output=True).returncode


def kill(folder: Path, child: Child, rng: random.Random) -> Callable[[], object]:
    """Kill the process."""
    child.process.kill()
    return lambda: None


def fill(folder: Path, child: Child, rng: random.Random) -> Callable[[], object]:
    """Fill the disk, up to a few pages."""
    filler, left = folder.parent / "filler", rng.choice([0, 0, 1, 2, 4, 8, 16, 32]) * 4096
    with filler.open("wb") as file, contextlib.suppress(OSError):
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        os.posix_fallocate(file.fileno(), 0, max(1, free - left))
    return filler.unlink


def make_read_only(folder: Path, child: Child, rng: random.Random) -> Callable[[], object] | None:
    """Let nothing be written to the disk any more, not even by root; cannot be while a file is open for writing."""
    if _run("mount", "-o", "remount,ro", str(folder.parent)):
        return None
    return functools.partial(_run, "mount", "-o", "remount,rw", str(folder.parent))


def remove(folder: Path, child: Child, rng: random.Random) -> Callable[[], object]:
    """Delete the folder, with all that was written."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # what was written meanwhile
    return functools.partial(folder.mkdir, exist_ok=True)


def replace_by_a_file(folder: Path, child: Child, rng: random.Random) -> Callable[[], object]:
    """Put a file where the folder was."""
    away = folder.with_name("away")
    folder.rename(away)
    with contextlib.suppress(FileExistsError):
        folder.touch(exist_ok=False)

    def undo() -> None:
        folder.unlink() if folder.is_file() else shutil.rmtree(folder)
        away.rename(folder)

    return undo


# Work that meets something in itself


def poisoned(folder: Path, where: str, step: int) -> None:
    """Train with a number that is not finite in a step: in the data, in the network or in a gradient."""
    import dataclasses

    import torch

    from integrations import loop, pairs

    load, train_step = pairs.Pairs.load, loop.Run.train_step

    def loaded(self: Any, batch: Any, at: int, number: int) -> Any:
        block = load(self, batch, at, number)
        return dataclasses.replace(block, data=block.data * (torch.nan if at == step else 1.0))

    def stepped(self: Any, blocks: Any) -> Any:
        if self.step == step:
            weight = self.weights[0]
            if where == "network":
                weight.data[0] = torch.nan
            else:
                weight.register_hook(lambda gradient: gradient * torch.nan)
        return train_step(self, blocks)

    if where == "data":
        pairs.Pairs.load = loaded
    else:
        loop.Run.train_step = stepped
    train(folder)


def worker_killed(folder: Path, where: str, step: int) -> None:
    """Train with data that two processes load, one of which is killed in a step."""
    import psutil

    from integrations import loop
    from integrations.train import main

    train_step = loop.Run.train_step

    def stepped(self: Any, blocks: Any) -> Any:
        if self.step == step:
            psutil.Process().children()[0].kill()
        return train_step(self, blocks)

    loop.Run.train_step = stepped
    main(recipe(folder / "run", "--data.workers", "2"))


def inner_faults(cases: list[tuple[Callable[[Path, str, int], object], str, str]], each: int) -> Outcome:
    """Train with a fault in a random step: a clear error, and without the fault the run goes on as if there were none.

    Parameters
    ----------
    cases : list of (work, where, word)
        ``work(folder, where, step)`` has the fault, and its error has the word.
    each : int
        Steps that are tried.
    """
    victim, lost = VICTIMS["training"], []
    with own_disk(None) as whole:
        assert whole is not None
        ended(victim.work, whole)
        expected = victim.state(whole)
    for work, where, word in cases:
        for seed in range(each):
            step = random.Random(seed).randrange(1, 12)
            with own_disk(None) as folder:
                assert folder is not None
                what = ended(work, folder, where, step).clear_error(word)
                if what is None:
                    again = ended(victim.work, folder)
                    if again.code != 0 or victim.state(folder) != expected:
                        what = f"went on otherwise than undisturbed: {again.in_short}"
            if what is not None:
                lost.append(f"{work.__name__} {where}, step {step}: {what}")
    return Outcome.of(len(cases) * each, lost)


# Clocks and cores


def in_jumping_time(work: Callable[[Path], object], folder: Path) -> None:
    """Do some work while the clock of the wall jumps by up to a month whenever it is looked at."""
    now, rng = time.time, random.Random(0)
    time.time = lambda: now() + rng.uniform(-3e6, 3e6)
    work(folder)


def budgets(folder: Path) -> None:
    """Solve under a budget of time: a long one is not cut short, and a short one ends a solve."""
    import torch

    from couplings import couple
    from couplings.kernels import solve

    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(200, 4, generator=generator) for _ in range(2))
    index = couple(data, noise, max_seconds=3600.0).index
    cost = torch.rand(3000, 3000, generator=generator).numpy()
    began = time.perf_counter()
    with contextlib.suppress(RuntimeError):
        solve(cost, max_seconds=0.05)
    in_time = time.perf_counter() - began < 5.0
    (folder / "budgets.json").write_text(json.dumps([index.tolist(), in_time]))


def undisturbed(victims: dict[str, Victim], disturb: Callable[..., object], each: int) -> Outcome:
    """Do each of some works as ``disturb(work, folder)`` does it, and compare what it leaves with the work alone."""
    lost, times = [], {}
    for name, victim in victims.items():
        found, seconds = [], []
        for number in range(2 + each):  # the first may have to compile
            with own_disk(None) as folder:
                assert folder is not None
                end = ended(disturb, victim.work, folder) if number > 1 else ended(victim.work, folder)
                found.append(victim.state(folder) if end.code == 0 else end.in_short)
                seconds.append(end.seconds)
        lost += [
            f"{name}: undisturbed {found[1]!s:.200}, disturbed {end!s:.200}" for end in found[2:] if end != found[1]
        ]
        times[name] = {"alone_s": round(seconds[1], 2), "disturbed_s": round(max(seconds[2:]), 2)}
    return Outcome.of(len(victims) * each, lost, victims=times)


def on_busy_cores(work: Callable[[Path], object], folder: Path) -> None:
    """Do some work while two other processes spin on every core."""
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        work(folder)
    finally:
        for other in others:
            other.kill()
            other.wait()


# A process of several


@as_program
def couple_over_ranks(folder: Path, rank: int, how: str) -> None:
    """Couple over two ranks until one of them dies."""
    import torch
    import torch.distributed as dist

    from couplings import Coupling, lookahead

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    coupling = Coupling(scope="global")

    def batches() -> Iterator[Any]:
        while True:
            (folder / f"alive-{rank}").touch()
            yield torch.randn(24, 8, generator=generator)

    if how == "lookahead":
        for _ in lookahead(batches(), coupling, window=2):
            pass
    for batch in batches():
        noise = torch.randn(24, 8, generator=generator)
        coupling.submit(batch, noise).result() if how == "submit" else coupling(batch, noise)


def train_over_ranks(folder: Path, rank: int, how: str) -> None:
    """Train over two ranks until one of them dies."""
    from integrations.train import main

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": how}
    os.environ |= {name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    main(recipe(folder / "run", "--train.steps", "100000", "--coupling.scope", "global"))


def rank_killed(work: Callable[[Path, int, str], object], how: str, rng: random.Random, patience: float) -> str | None:
    """Kill one of two ranks at a random moment; the other must end with a clear error, long before any timeout."""
    with tempfile.TemporaryDirectory() as name:
        folder, victim = Path(name), rng.randrange(2)
        with ExitStack() as stack:
            ranks = [stack.enter_context(started(work, folder, rank, how)) for rank in range(2)]
            begun = all(child.until(lambda rank=rank: _begun(folder, rank)) for rank, child in enumerate(ranks))
            if not begun:
                return f"did not begin: {ranks[0].end(1).in_short}; {ranks[1].end(1).in_short}"
            time.sleep(0.5 * rng.random())
            ranks[victim].process.kill()
            return ranks[1 - victim].end(patience).clear_error("has died")


def _begun(folder: Path, rank: int) -> bool:
    return (folder / f"alive-{rank}").exists() or (folder / "run" / "checkpoints").exists()


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lose_ranks(share: float) -> Outcome:
    """Kill one of two ranks that couple, in three ways, or train."""
    lost, each, seconds = [], sized(20, share), []
    for how in ("couple", "submit", "lookahead", "train"):
        for seed in range(each):
            work, option = (train_over_ranks, str(free_port())) if how == "train" else (couple_over_ranks, how)
            began = time.monotonic()
            what = rank_killed(work, option, random.Random(seed), 30.0)
            seconds.append(time.monotonic() - began)
            if what is not None:
                lost.append(f"{how}, seed {seed}: {what}")
    return Outcome.of(4 * each, lost, longest_s=round(max(seconds), 1))


def killed(share: float) -> Outcome:
    """Kill each work at random moments."""
    return strikes(VICTIMS, kill, sized(20, share))


def disk_full(share: float) -> Outcome:
    """Fill the disk."""
    return strikes(VICTIMS, fill, sized(20, share), disk_mib=8)


def folder_lost(share: float) -> Outcome:
    """Make the disk read-only, delete the folder, or put a file in its place."""
    each = sized(7, share)
    parts = {
        "read-only": strikes(VICTIMS, make_read_only, each, disk_mib=8),
        "removed": strikes(VICTIMS, remove, each),
        "replaced": strikes(VICTIMS, replace_by_a_file, each),
    }
    lost = [f"{name}: {what}" for name, part in parts.items() for what in part.about["lost"]]
    return Outcome.of(sum(part.tried for part in parts.values()), lost, **{k: v.about for k, v in parts.items()})


def not_finite(share: float) -> Outcome:
    """Put a number that is not finite into the data, the network or a gradient."""
    words = {"data": "cannot be coupled", "network": "not finite", "gradient": "not finite"}
    return inner_faults([(poisoned, *item) for item in words.items()], sized(7, share))


def loader_killed(share: float) -> Outcome:
    """Kill a process that loads data."""
    return inner_faults([(worker_killed, "loader", "loads data has ended")], sized(20, share))


def clock_jumps(share: float) -> Outcome:
    """Let the clock of the wall jump."""
    return undisturbed(TIMED, in_jumping_time, sized(4, share))


def cores_taken(share: float) -> Outcome:
    """Let other processes take the cores."""
    return undisturbed(TIMED, on_busy_cores, sized(4, share))


TIMED = {**VICTIMS, "budgets": Victim(budgets, lambda folder: json.loads((folder / "budgets.json").read_text()))}

PARTS: dict[str, Callable[[float], Outcome]] = {
    "killed": killed,
    "disk-full": disk_full,
    "folder-lost": folder_lost,
    "rank-killed": lose_ranks,
    "loader-killed": loader_killed,
    "not-finite": not_finite,
    "clock-jumps": clock_jumps,
    "cores-taken": cores_taken,
}
