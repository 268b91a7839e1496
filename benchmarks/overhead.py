"""What the trainers' loop costs beside a bare one: ``python -m benchmarks.overhead [--device cuda]``.

The bare loop below is a script's: the same network, optimizer, clipping, averages and precision, images that are in
memory already, and `couple` where the noise is drawn. Both take turns in one process, some steps each. A ratio below 1
says that the loop is faster: it makes its pairs behind the step, the bare one in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from couplings import couple

from .record import RESULTS, append, environment

VERSIONS = ("couplings", "torch", "numpy", "numba", "accelerate", "diffusers")
UNET = """
objective: {name: flow_matching}
data: {source: photo-crops, resolution: SIDE}
model: {name: unet, channels: CHANNELS, attention: ATTENTION, dropout: 0.0}
train: {global_batch_size: ROWS, batch_size_per_device: ROWS}
"""
SIZES = {  # of the U-Net
    "cpu": {"SIDE": "16", "CHANNELS": "[32, 64]", "ATTENTION": "[false, true]", "ROWS": "64"},
    "cuda": {"SIDE": "32", "CHANNELS": "[128, 256, 256]", "ATTENTION": "[false, true, false]", "ROWS": "256"},
}


def bare(recipe: Any, model: nn.Module, images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Train by flow matching, a step at each `next`."""
    from diffusers.training_utils import EMAModel

    rows, method, bf16 = recipe.train.batch_size_per_device, recipe.coupling.method, torch.bfloat16
    weights = list(model.to(device).train().parameters())
    average = EMAModel(weights, decay=recipe.train.ema_decay, update_after_step=-1, foreach=True)
    adam = torch.optim.Adam(weights, lr=recipe.optimizer.lr, fused=True)
    while True:
        for chosen in torch.randperm(len(images)).split(rows)[:-1]:
            data = images[chosen].to(device).float() / 127.5 - 1
            noise = torch.randn_like(data)
            if method != "independent":
                noise = couple(data, noise, method).noise
            t = torch.rand(len(data), device=device)
            with torch.autocast(device.type, bf16, enabled=recipe.train.mixed_precision == "bf16"):
                velocity = model(torch.lerp(data, noise, t[:, None, None, None]), 1000 * t).sample
            loss = (velocity.float() - (noise - data)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, recipe.optimizer.clip)
            adam.step()
            adam.zero_grad()
            average.step(weights)
            yield loss.detach()


def measure(network: str, method: str, device: torch.device, turns: int, length: int) -> dict[str, Any]:
    """Let both loops train in turns of ``length`` steps; return their milliseconds a step and the ratio.

    Parameters
    ----------
    network : {"mlp", "unet"}
    method : str
        Of the coupling.
    device : torch.device
        On a GPU in bfloat16.
    turns, length : int
        Turns, and steps of each. The first turn is not counted.
    """
    from integrations import config, loop
    from integrations.build import build_objective
    from integrations.models import build_model

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.yaml"
        text = UNET
        for word, value in SIZES[device.type].items():
            text = text.replace(word, value)
        path.write_text(text)
        precision = ("--train.mixed_precision", "bf16") if device.type == "cuda" else ()
        recipe = config.load(
            [
                "flow-matching-digits" if network == "mlp" else str(path),
                *("--coupling.method", method),
                *(
                    "--train.steps",
                    str(turns * length),
                    "--train.tracker",
                    "null",
                    "--train.checkpoint_every",
                    "1000000",
                ),
                *(*precision, "--output", f"{folder}/run"),
            ]
        )
        run = loop.Run(recipe)
        run.start()
        run.save = lambda: None
        other = bare(recipe, build_model(recipe.model, build_objective(recipe, run.source)), run.source.images, device)
        ours, theirs, began = [], [], now()

        def take_turns(step: int, record: object) -> None:
            nonlocal began
            if step % length:
                return
            middle = now()
            for _ in range(length):
                next(other)
            end = now()
            ours.append(1000 * (middle - began) / length)
            theirs.append(1000 * (end - middle) / length)
            began = now()

        run.advance(take_turns, [])
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "task": "overhead",
        "network": network,
        "parameters": sum(weight.numel() for weight in run.weights),
        "method": method,
        "rows": recipe.train.batch_size_per_device,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": recipe.train.mixed_precision,
        "loop_ms": median(ours[1:]),
        "bare_ms": median(theirs[1:]),
        "ratio": median(ratios),
        "ratio_quartiles": [low, high],
        "turns": len(ratios),
        "steps_a_turn": length,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print and put on record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--networks", nargs="+", choices=("mlp", "unet"), default=["mlp", "unet"])
    parser.add_argument("--methods", nargs="+", default=["independent", "auction"])
    parser.add_argument("--turns", type=int, default=30, help="turns of either loop; the first is not counted")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.jsonl", help="file to append to")
    arguments = parser.parse_args(argv)
    if arguments.turns < 3:
        parser.error("--turns: expected at least 3, for a median and its spread")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but there is no CUDA device here")
    if arguments.device == "cpu" and torch.cuda.is_available():
        parser.error("--device: got cpu, but the loop trains on the GPU that is here: hide it by CUDA_VISIBLE_DEVICES=")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    place = environment(
        torch.get_num_threads(), None, VERSIONS, ("couplings", "integrations", "benchmarks/overhead.py")
    )
    for network in arguments.networks:
        for method in arguments.methods:
            device = torch.device(arguments.device)
            found = measure(network, method, device, arguments.turns, arguments.steps)
            low, high = found["ratio_quartiles"]
            print(
                f"{network:5} {method:12} loop {found['loop_ms']:7.2f} ms  bare {found['bare_ms']:7.2f} ms  "
                f"ratio {found['ratio']:.3f} ({low:.3f} to {high:.3f})",
                flush=True,
            )
            append(arguments.output, {**found, "environment": place})


if __name__ == "__main__":
    main()
