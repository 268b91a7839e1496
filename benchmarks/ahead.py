"""What coupling adds to a training step, inline and behind it: ``python -m benchmarks.ahead``.

A pool of ``window`` batches is coupled as one, and trained on batch by batch: inline at the first of them
(``inline``), in a thread while the pool before is trained on (``submit``), or by `couplings.lookahead`, which also
reads the batches (``lookahead``); against the same steps with noise as it was drawn (``independent``). The arms take
turns in blocks of some steps, and what is reported is the median of the ratios of blocks of one round.

Steps: one that waits for an accelerator (it sleeps; the cost is given, as if it had been made on the device), a real
one on the CPU that leaves a core free, and a real one on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .record import RESULTS, Record, append, environment, markdown, new_page, provenance, read

ARMS = ("independent", "inline", "submit", "lookahead")
WAITS = (0.02, 0.05, 0.2)
SIZES = (256, 1024, 4096, 8192)
BATCH = 256
WIDTH = 3072

# A step is given a batch of data and its noise.
StepFn = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Step:
    """A training step, and what it trains on.

    Attributes
    ----------
    name : str
    run : callable
        ``run(data, noise)``.
    batches : list of Tensor
        The data, over and over again.
    metric : str or callable
        Of the coupling.
    wait : callable
        Waits until all steps are done.
    """

    name: str
    run: StepFn
    batches: list[Any]
    metric: Any = "sqeuclidean"
    wait: Callable[[], None] = field(default=lambda: None)

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return len(self.batches[0])


def waiting_step(seconds: float, n: int, batch: int, width: int) -> Step:
    """Make a step that waits for an accelerator, where the costs of n rows come from.

    The costs were made before, of ``width`` values a row; what the coupling is given in their place are rows of one
    value, so that nothing is left to do for it but what the host does on a machine with an accelerator.
    """
    import torch

    generator = torch.Generator().manual_seed(n)
    # A part of the data lies close together, as images do; two matrices, neither of them in the caches the next time.
    centre = torch.randn(width, generator=generator)
    ready = []
    for _ in range(2):
        x = (torch.rand(n, width, generator=generator) - 0.5) + 0.3 * centre * torch.rand(n, 1, generator=generator)
        ready.append((x @ torch.randn(width, n, generator=generator)).mul_(-2.0))
    turns = cycle(ready)
    rows = [torch.rand(batch, 1, generator=generator) for _ in range(max(1, n // batch))]
    return Step(
        f"waits {1e3 * seconds:.0f} ms", lambda data, noise: time.sleep(seconds), rows, lambda x, noise: next(turns)
    )


def cpu_step(n: int, batch: int, threads: int) -> Step:
    """Make a step of a small convolutional network on so many threads."""
    import torch
    from torch import nn

    from .instances import photo_crops

    torch.set_num_threads(threads)
    data = torch.from_numpy(photo_crops(max(n, batch), np.random.default_rng(n)))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU())
    network.append(nn.Conv2d(32, 3, 3, padding=1))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def run(data: Any, noise: Any) -> None:
        t = torch.rand(len(data), 1, 1, 1)
        loss = (network((1 - t) * noise + t * data) - (data - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Step(f"CPU, {threads} of {_cores()} cores", run, list(data.split(batch)))


def gpu_step(n: int, batch: int, device: Any = "cuda", channels: tuple[int, ...] = (128, 256, 256, 256)) -> Step:
    """Make a step of the network that DDPM has for CIFAR-10, in bfloat16."""
    import torch
    from diffusers import UNet2DModel

    plain = ["DownBlock2D"] * (len(channels) - 2)
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", *plain),
        up_block_types=tuple(["UpBlock2D"] * (len(channels) - 2) + ["AttnUpBlock2D", "UpBlock2D"]),
    ).to(device)
    device = torch.device(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")
    batches = list((torch.rand(n, 3, 32, 32, device=device) * 2 - 1).split(batch))

    def run(data: Any, noise: Any) -> None:
        t = torch.randint(0, 1000, (len(data),), device=device)
        signal = (torch.cos(t * (np.pi / 2000)) ** 2)[:, None, None, None]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = network(signal.sqrt() * data + (1 - signal).sqrt() * noise, t).sample
        loss = (found.float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return Step(f"DDPM U-Net, bf16, {name}", run, batches, wait=wait)


# -- the arms: endless, a batch with its noise at a time


def arm(name: str, step: Step) -> Iterator[tuple[Any, Any]]:
    """Yield the batches of a step, with the noise that an arm gives them."""
    import torch

    from couplings import Coupling, lookahead

    coupling, window = Coupling(metric=step.metric), len(step.batches)
    pool = torch.cat(step.batches)
    if name == "lookahead":
        yield from lookahead(cycle(step.batches), coupling, window=window, device=pool.device)

    def couple() -> Any:
        noise = torch.randn_like(pool)
        if name == "independent":
            return noise
        return coupling(pool, noise).noise if name == "inline" else coupling.submit(pool, noise)

    following = couple() if name == "submit" else None
    while True:
        if name == "submit":
            noise, following = following.result().noise, couple()
        else:
            noise = couple()
        yield from zip(step.batches, noise.split(step.batch), strict=True)


def _settle(step: Step) -> None:
    """Wait until nothing runs in the background."""
    step.wait()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name.startswith("couplings"):
            thread.join(60.0)


def compare(step: Step, arms: tuple[str, ...] = ARMS, *, rounds: int = 5, seconds: float = 1.0) -> list[Record]:
    """Time the arms in turn.

    Parameters
    ----------
    step : Step
    arms : tuple of str
        The first is what the others are compared with.
    rounds : int
        Each has a block of every arm, in an order that changes.
    seconds : float
        About how long a block lasts; at least one window.

    Returns
    -------
    list of dict
        ``step_ms``: median of a step; ``share``: median of what a step takes more than one of the first arm in the same
        round, and its ``quartiles``.
    """
    running = {name: arm(name, step) for name in arms}
    window = len(step.batches)

    def block(name: str, steps: int) -> float:
        _settle(step)
        start = time.perf_counter()
        for _ in range(steps):
            step.run(*next(running[name]))
        step.wait()
        return (time.perf_counter() - start) / steps

    try:
        for name in arms:
            block(name, window)
        once = block(arms[0], min(window, 3))
        steps = window * max(1, round(seconds / (window * once)))
        taken: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(rounds):
            for k in range(len(arms)):
                name = arms[(k + turn) % len(arms)]
                taken[name].append(block(name, steps))
    finally:
        for each in running.values():
            each.close()  # type: ignore[attr-defined]
    records = []
    for name in arms:
        ratios = np.array(taken[name]) / np.array(taken[arms[0]]) - 1.0
        low, share, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        records.append(
            {
                "task": "ahead",
                "step": step.name,
                "n": window * step.batch,
                "batch": step.batch,
                "contender": name,
                "step_ms": 1e3 * float(np.median(taken[name])),
                "share": share,
                "quartiles": [low, high],
                "rounds": rounds,
                "steps": steps,
            }
        )
    return records


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- tables


@cache
def committed() -> list[Record]:
    """Return the records that are part of the repository."""
    return read(RESULTS / "ahead.jsonl")


def percent(record: Record) -> str:
    """Return the share of a step that an arm adds, with half the distance of its quartiles."""
    low, high = record["quartiles"]
    return f"{100 * record['share']:+.1f}% ± {50 * (high - low):.1f}"


def steps_table(records: list[Record], arms: tuple[str, ...] = ARMS[1:]) -> str:
    """Lay out what each arm adds to each step."""
    cells: dict[tuple[str, int, int], dict[str, Record]] = {}
    for record in records:
        if record["task"] == "ahead":
            cells.setdefault((record["step"], record["batch"], record["n"]), {})[record["contender"]] = record
    rows = [
        [
            *(step, str(batch), str(n), f"{found['independent']['step_ms']:.1f}"),
            *(percent(found[name]) if name in found else "" for name in arms),
        ]
        for (step, batch, n), found in cells.items()
    ]
    return markdown(["step", "batch", "coupled together", "ms a step", *arms], rows)


def costs_table(records: list[Record]) -> str:
    """Lay out, for readers in a hurry, the steps of 50 ms and the real ones: what coupling inline and ahead adds."""
    chosen = [r for r in records if not str(r.get("step")).startswith("waits") or r["step"] == "waits 50 ms"]
    return steps_table(chosen)


ABOUT = """
Records: [ahead.jsonl](ahead.jsonl), by `python -m benchmarks.ahead`; the tables are written from them by
`python -m benchmarks.tables`. What a training step takes more than the same step with noise as it was drawn, median of
rounds in which all arms take turns. Several batches are coupled together: *inline* at the first of them, by *submit* or
*lookahead* behind the steps before. A step that waits sleeps, as if an accelerator worked on it, and the costs are$
given as if they had been made there.
"""

TABLES: dict[str, Callable[[], str]] = {
    "ahead-place": lambda: provenance(committed()),
    "ahead-steps": lambda: steps_table(committed()),
}


def steps(arguments: argparse.Namespace) -> Iterator[Step]:
    """Yield the steps asked for, one after the other."""
    import torch

    if "waits" in arguments.only:
        for seconds in arguments.waits:
            for n in arguments.sizes:
                yield waiting_step(seconds, n, min(arguments.batch, n), arguments.width)
    if "cpu" in arguments.only:
        for n in arguments.sizes:
            if n <= 1024:  # beyond, the product alone takes longer than the steps that hide it
                yield cpu_step(n, min(arguments.batch, n), max(1, _cores() - 1))
    if "gpu" in arguments.only and torch.cuda.is_available():
        for n in arguments.sizes:
            if n <= 1024:
                yield gpu_step(n, n)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.ahead", description=__doc__)
    made.add_argument("--only", nargs="*", default=["waits", "cpu", "gpu"], choices=["waits", "cpu", "gpu"])
    made.add_argument("--waits", nargs="*", type=float, default=list(WAITS), metavar="SECONDS")
    made.add_argument("--sizes", nargs="*", type=int, default=list(SIZES), metavar="N", help="rows coupled together")
    made.add_argument("--batch", type=int, default=BATCH, help="rows of a step")
    made.add_argument("--width", type=int, default=WIDTH, help="values of a row that the given costs are made of")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--seconds", type=float, default=1.0, help="of a block")
    made.add_argument("--quick", action="store_true", help="small, to see that it runs")
    made.add_argument("--output", type=Path, default=RESULTS / "ahead.jsonl", metavar="FILE")
    return made


def main(argv: list[str] | None = None) -> None:
    """Measure."""
    arguments = parser().parse_args(argv)
    if arguments.quick:
        quick = {"waits": [0.005], "sizes": [32], "batch": 8, "width": 8, "rounds": 2, "seconds": 0.02}
        vars(arguments).update(quick)
    import couplings

    couplings.warmup()
    place, records = environment(_cores(), None), []
    for step in steps(arguments):
        print(
            f"{time.strftime('%H:%M:%S')} {step.name}, n = {len(step.batches) * step.batch}",
            file=sys.stderr,
            flush=True,
        )
        for record in compare(step, rounds=arguments.rounds, seconds=arguments.seconds):
            records.append({**record, "environment": place})
            print(
                f"  {record['contender']:12} {record['step_ms']:9.2f} ms {percent(record)}", file=sys.stderr, flush=True
            )
    arguments.output.unlink(missing_ok=True)
    for record in records:
        append(arguments.output, record)
    page = arguments.output.with_suffix(".md")
    if not page.exists():
        tables = (("Where", "ahead-place", provenance(records)), ("Steps", "ahead-steps", steps_table(records)))
        page.write_text(new_page("Coupling ahead of the training step", ABOUT, tables))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
