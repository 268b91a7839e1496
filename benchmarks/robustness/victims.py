"""Work that can be killed at any moment and begun again: training, a fit, pairs in a file, `lookahead`, records."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TINY", "VICTIMS", "Victim", "as_program", "recipe", "training_state"]

TINY = {
    "train.steps": "16",
    "train.global_batch_size": "16",
    "train.batch_size_per_device": "8",
    "train.log_every": "1",
    "train.checkpoint_every": "2",
    "train.sample_every": "5",
    "model.width": "16",
    "model.depth": "1",
    "evaluate.steps": "[2]",
    "evaluate.samples": "16",
}


@dataclass(frozen=True)
class Victim:
    """Some work, and what it leaves.

    Attributes
    ----------
    work : callable
        ``work(folder)`` begins, or goes on from what is in the folder.
    state : callable
        ``state(folder)`` returns all that finished work leaves, for comparison.
    """

    work: Callable[[Path], object]
    state: Callable[[Path], Any]


def recipe(folder: Path, *further: str) -> list[str]:
    """Return the arguments of a training run of a second or two."""
    options = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    return ["flow-matching-digits", *options, "--output", str(folder), "--resume", "auto", *further]


def as_program(work: Callable[..., object]) -> Callable[..., object]:
    """Let some work say in one line what went wrong, and exit with 1, as a command does."""

    @functools.wraps(work)
    def guarded(*arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None

    return guarded


def train(folder: Path) -> None:
    """Train, or go on training."""
    from integrations.train import main

    main(recipe(folder / "run"))


def training_state(folder: Path) -> Any:
    """Return the metrics of a run but for times, and a digest of every tensor of its last checkpoint."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if not name.endswith("_ms")} for line in lines]
    newest = max((folder / "run" / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    return newest.name, metrics, {path.name: _digest(path) for path in sorted(newest.glob("*.safetensors"))}


@as_program
def fit(folder: Path) -> None:
    """Fit a plan, or go on with it."""
    import torch

    from couplings import semidiscrete

    data = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    options = {"batch_size": 128, "steps": 80, "tolerance": 1e-9}
    semidiscrete.fit(data, checkpoint=folder / "fit.safetensors", **options).save(folder / "plan.safetensors")


@as_program
def store(folder: Path) -> None:
    """Couple batches with the noise of a file of pairs until it was written to 300 times."""
    import torch

    from couplings.persistent import Pairs

    data = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    with Pairs.open(folder / "pairs.bin", rows=400, seeds=3) as pairs:
        while (number := pairs.state_dict()["number"]) < 300:
            rows = torch.randperm(400, generator=torch.Generator().manual_seed(number))[:64]
            pairs.couple(data[rows], rows)


@as_program
def look_ahead(folder: Path) -> None:
    """Go through a loader in windows, keeping what was handed out and where the loop is after every batch."""
    import torch

    from couplings import Coupling, lookahead
    from couplings._files import written_atomically

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 4, generator=generator) for _ in range(60)]
    loop = lookahead(batches, Coupling(), window=4)
    kept: dict[str, Any] = {"handed": [], "loop": None}
    if (folder / "loop.json").exists():
        kept = json.loads((folder / "loop.json").read_text())
        loop.load_state_dict(kept["loop"])
    if len(kept["handed"]) == len(batches):
        return
    for batch, noise in loop:
        pair = hashlib.sha256(batch.numpy().tobytes() + noise.numpy().tobytes()).hexdigest()
        kept = {"handed": [*kept["handed"], pair], "loop": loop.state_dict()}
        with written_atomically(folder / "loop.json", force=True) as file:
            file.write(json.dumps(kept).encode())


@as_program
def records(folder: Path) -> None:
    """Append records of an ablation until there are 300."""
    from couplings.ablation.records import Log

    with Log(folder / "records.jsonl") as log:
        while (number := len(log.records)) < 300:
            log.add({"number": number, "text": "a record of some length " * 10})
            time.sleep(0.002)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [_digest(folder / name) for name in names]


VICTIMS = {
    "training": Victim(train, training_state),
    "fit": Victim(fit, _files("plan.safetensors", "fit.safetensors")),
    "pairs": Victim(store, _files("pairs.bin")),
    "lookahead": Victim(look_ahead, lambda folder: json.loads((folder / "loop.json").read_text())["handed"]),
    "records": Victim(records, _files("records.jsonl")),
}
