"""Write docs/choosing.md: ``python -m benchmarks.choosing``; ``--check`` only says if it is current.

Every sentence is made of the records that it links to, and says what it says only while they do: a record that turns
against its sentence is an error here, not a sentence that has gone stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from couplings.report.reading import Read, read

from . import training, training_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "choosing.md"
ABLATION, TRAINING = RESULTS / "ablation.jsonl", RESULTS / "ablation-training.jsonl"

_REPORT = "[ablation](../benchmarks/results/report.md)"
_SOLVERS = "[solvers](../benchmarks/results/solvers.md)"
_RANKS = "[ranks](../benchmarks/results/distributed.md)"
_FASHION = "[training](../benchmarks/results/training.md)"

V, FLOW, EPSILON = "DDIM, v prediction", "Flow matching", "DDIM, epsilon prediction"


class Facts:
    """Means of the records."""

    def __init__(self, found: Read) -> None:
        self.found = found
        trained = [record for record in found.training if record["task"] == "training"]
        self.trained = {(r["objective"], r["arm"], r["seed"]): r for r in trained}
        solvers = (RESULTS / "solvers.jsonl").read_text().splitlines()
        self.solvers = [json.loads(line) for line in solvers]

    def of(self, field: str, method: str, n: int, **fixed: Any) -> float:
        """Return the mean of a field over the seeds of a cell; options in ``options``."""
        usual: dict[str, Any] = {
            **{"data": "crops32", "metric": "sqeuclidean", "quantize": None, "condition": None, "scope": "local"},
            **{"ranks": 1, "options": {}},
        }
        (series,) = self.found.cells.of(method=method, n=n, **{**usual, **fixed}).series
        if field == "leakage":
            values = series.values(lambda record: record["leakage"]["z"])
            return sum(values.values()) / len(values) ** 0.5
        if field == "norm":
            return fmean(series.values(lambda record: record["drift"]["norm"]).values())
        return fmean(series.get(field).values())

    def seeds(self, objective: str, arm: str) -> list[int]:
        """Seeds of an arm that was trained."""
        return [seed for task, name, seed in self.trained if (task, name) == (objective, arm)]

    def compares(self, objective: str) -> bool:
        """Whether the exact coupling and independent noise were both trained."""
        return bool(self.seeds(objective, "auction") and self.seeds(objective, "independent"))

    def frechet(self, objective: str, arm: str, nfe: int, seeds: Sequence[int]) -> float:
        """Return the mean distance at the end of training."""
        values = []
        for seed in seeds:
            every = self.trained[objective, arm, seed]["frechet"]
            last = max(each["step"] for each in every)
            values += [each["frechet"] for each in every if (each["step"], each["nfe"]) == (last, nfe)]
        return fmean(values)

    def change(self, objective: str, arm: str, nfe: int) -> float:
        """Return the change against independent noise, in percent, over the seeds that both have."""
        seeds = [seed for seed in self.seeds(objective, arm) if seed in self.seeds(objective, "independent")]
        ours, theirs = (self.frechet(objective, name, nfe, seeds) for name in (arm, "independent"))
        return 100 * (ours / theirs - 1)

    def solve(self, contender: str, n: int) -> float:
        """Milliseconds of an exact solve on crops."""
        (record,) = (
            r
            for r in self.solvers
            if (r["task"], r["family"], r["contender"], r["n"]) == ("solve", "crops", contender, n)
        )
        return 1e3 * record["median"]


def _so(holds: bool, sentence: str) -> str:
    """Return a sentence that the records bear out.

    Raises
    ------
    ValueError
        If they do not.
    """
    if not holds:
        msg = f"the records no longer say so, rewrite it: {sentence}"
        raise ValueError(msg)
    return sentence


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def chapters(facts: Facts) -> list[tuple[str, list[str]]]:
    """Say how to choose.

    Parameters
    ----------
    facts : Facts

    Returns
    -------
    list of (str, list of str)
        Headlines and sentences.

    Raises
    ------
    ValueError
        If a record contradicts its sentence, or is missing.
    """
    of = facts.of
    gains = {n: of("reduction", "auction", n) for n in (64, 128, 512, 2048)}
    greedy, sliced = (of("reduction", name, 512) for name in ("greedy", "sliced"))
    batch = [
        _so(
            sorted(gains.values()) == list(gains.values()),
            "**Couple as many rows together as one device holds.** On 32x32x3 crops the exact coupling brings the "
            f"noise nearer by {', '.join(f'{_percent(gain)} at n = {n}' for n, gain in gains.items())} ({_REPORT}): "
            "more rows, more gain.",
        ),
        _so(
            all(of("gap", name, 512) < 1e-6 for name in ("auction", "hungarian", "lapjv", "emd")),
            "**Among exact methods, choose by time alone**: `auction`, `hungarian`, `lapjv` and `emd` reach the same "
            f"cost at n = 512, to the seventh digit ({_REPORT}).",
        ),
        _so(
            all(facts.solve("couplings", n) < facts.solve("scipy", n) for n in (256, 1024, 4096)),
            "**`auction` is the fast one from a few hundred rows on**: "
            + ", ".join(
                f"{facts.solve('couplings', n):,.1f} ms against scipy's {facts.solve('scipy', n):,.1f} ms at n = {n}"
                for n in (128, 1024, 4096)
            )
            + f" ({_SOLVERS}).",
        ),
        _so(
            gains[512] > greedy > sliced,
            f"**Do not save on the method where n is small.** At n = 512, `auction` gains {_percent(gains[512])}, "
            f"`greedy` {_percent(greedy)} and `sliced` {_percent(sliced)} ({_REPORT}).",
        ),
    ]
    peak = {name: of("peak_bytes", name, 2048) / 2**20 for name in ("auction", "sliced")}
    memory = _so(
        peak["sliced"] > peak["auction"] and of("ms", "sliced", 2048) > of("ms", "auction", 2048),
        "**`sliced` is for more rows than dimensions, not for few.** It needs no n x n matrix, but copies of the "
        f"operands: at n = 2048 and 3072 dimensions a call takes {peak['sliced']:.0f} MiB beyond them, where "
        f"`auction` takes {peak['auction']:.0f} MiB and less time ({_REPORT}).",
    )
    big, small, latent = (of("reduction", "auction", 128, data=data) for data in ("crops64", "crops32", "latents"))
    digits = fmean(facts.trained[V, "auction", seed]["reduction"] for seed in facts.seeds(V, "auction"))
    data = [
        _so(
            digits > small > big,
            f"**Expect less of more pixels.** At n = 128 the exact coupling gains {_percent(digits)} on 8x8 digits, "
            f"{_percent(small)} on 32x32x3 crops and {_percent(big)} on 64x64x3 crops; {_percent(latent)} on 4x32x32 "
            f"latents of a linear encoder ({_REPORT}).",
        ),
        memory,
    ]
    changed, lost = (
        {name: of(field, "auction", 1024, quantize=name) for name in ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8")}
        for field in ("rows_changed", "reduction_lost")
    )
    formats = [
        _so(
            lost["fp16"] < 1e-5,
            f"**`fp16` costs nothing**: at n = 1024 it pairs {100 * changed['fp16']:.1f}% of the rows otherwise and "
            f"loses {100 * lost['fp16']:.4f} percentage points of the reduction ({_REPORT}).",
        ),
        _so(
            max(lost, key=lambda name: lost[name]) == "fp8_e5m2" and gains[512] > 10 * lost["fp8_e5m2"],
            f"**The coarsest formats cost little**: `fp8_e5m2` pairs {100 * changed['fp8_e5m2']:.0f}% of the rows "
            f"otherwise and loses {100 * lost['fp8_e5m2']:.3f} points, `int8` {100 * changed['int8']:.0f}% and "
            f"{100 * lost['int8']:.4f} ({_REPORT}). They pay on hardware that multiplies them faster, which was not "
            "measured here.",
        ),
    ]
    across, within, random = (
        of("leakage", method, 1024, condition=condition)
        for method, condition in (("auction", None), ("auction", "class"), ("independent", None))
    )
    loss = [of("reduction", "auction", 1024, condition=condition) for condition in (None, "class")]
    condition = [
        _so(
            across > 10 > 2 > abs(within - random) and loss[0] > loss[1],
            "**Labels: pass them as `condition=`.** Coupled across the classes, the noise tells the class "
            f"{across:.0f} standard deviations above chance; within them {within:.1f}, as random pairs of the same "
            f"rows do ({random:.1f}). It takes the reduction from {_percent(loss[0])} to {_percent(loss[1])} at n = "
            f"1024 with four classes ({_REPORT}).",
        )
    ]
    alone = of("reduction", "auction", 64)
    ranks = {k: of("reduction", "auction", 64, scope="global", ranks=k) for k in (2, 4)}
    share = fmean(
        facts.trained[V, "auction", seed]["coupling_ms"] / facts.trained[V, "auction", seed]["step_ms"]
        for seed in facts.seeds(V, "auction")
    )
    hardware = [
        _so(
            alone < ranks[2] < ranks[4],
            '**Few rows on a device, and a fast link: `scope="global"`.** 64 rows by themselves gain '
            f"{_percent(alone)}, 2 x 64 together {_percent(ranks[2])}, 4 x 64 {_percent(ranks[4])} ({_REPORT}); what "
            f"it costs on ranks of one machine, and what a model predicts of clusters, stands in {_RANKS}.",
        ),
        _so(
            share < 0.5,
            f"**Where the network is tiny the coupling shows**: {100 * share:.0f}% of a step of the digit models "
            f"({_REPORT}); look at `coupling_ms` in your own `metrics.jsonl`.",
        ),
    ]
    return [
        ("By batch size", batch),
        ("By dimension", data),
        ("By number format", formats),
        ("By condition", condition),
        ("By sampling steps", _steps(facts)),
        ("By hardware", hardware),
        ("By what you may do to the noise", _noise(facts)),
        ("When not to use it", _not(facts)),
    ]


def _steps(facts: Facts) -> list[str]:
    found = []
    for objective in filter(facts.compares, (V, FLOW)):
        changes = {nfe: facts.change(objective, "auction", nfe) for nfe in (1, 2, 5, 20)}
        found.append(
            _so(
                max(changes[1], changes[2]) < changes[5] < changes[20],
                f"**{objective}: it gains most at few sampling steps.** On digits the Frechet distance changes by "
                f"{', '.join(f'{change:+.0f}% at {nfe}' for nfe, change in changes.items())} sampling steps "
                f"({_REPORT}); on Fashion-MNIST see {_FASHION}.",
            )
        )
    seeds = facts.seeds(V, "auction")
    l2, l1, squared = (
        facts.frechet(V, name, 5, seeds) for name in ("auction, l2", "auction, l1", "auction")
    )  # fmt: skip
    found.append(
        _so(
            max(l2, l1, squared) < facts.frechet(V, "independent", 5, seeds),
            f"**The metric matters less than coupling at all**: {squared:.0f} with `sqeuclidean`, {l2:.0f} with `l2`, "
            f"{l1:.0f} with `l1`, {facts.frechet(V, 'independent', 5, seeds):.0f} without coupling, at 5 steps "
            f"({_REPORT}).",
        )
    )
    return found


def _noise(facts: Facts) -> list[str]:
    seeds = facts.seeds(V, "auction")
    exact = facts.frechet(V, "auction", 5, seeds)
    regs = {reg: facts.frechet(V, f"sinkhorn, reg {reg}", 5, seeds) for reg in ("0.2", "0.5", "1")}
    values = ", ".join(f"{value:.0f} at reg {reg}" for reg, value in regs.items())
    drift = facts.of("norm", "nearest", 128, options={"k": 4, "score": "l2"})
    return [
        _so(
            regs["0.2"] < regs["1"],
            f"**Want randomness in the pairs: `sinkhorn`**, at a price that grows with `reg`: distance {values}, "
            f"{exact:.0f} for the exact coupling, at 5 steps ({_REPORT}).",
        ),
        _so(
            drift < -0.5,
            "**Keep away from `nearest` with the `l2` score where the noise has to stay Gaussian**: it prefers short "
            f"noise, and the squared norm drifts by {drift:.1f} standard deviations at k = 4 ({_REPORT}).",
        ),
    ]


def _not(facts: Facts) -> list[str]:
    within, whole = (facts.of("reduction", "auction", 128, condition=c) for c in ("class", None))
    found = [
        _so(
            within < whole,
            "**A handful of rows in a class**: there is little to choose from. 128 rows in four classes gain "
            f"{_percent(within)} within the classes and {_percent(whole)} together ({_REPORT}).",
        ),
    ]
    if facts.compares(EPSILON):
        few, many = (facts.change(EPSILON, "auction", nfe) for nfe in (1, 20))
        steps = facts.change(V, "auction", 20)
        found.append(
            _so(
                many > steps,
                f"**Epsilon prediction**: on digits the Frechet distance changes by {few:+.0f}% at 1 and {many:+.0f}% "
                f"at 20 sampling steps, where v prediction changes by {steps:+.0f}% at 20 ({_REPORT}).",
            )
        )
    return [*found, _weights()]


def _weights() -> str:
    """Say which losses coupling helps, from the training on Fashion-MNIST."""
    results = training.committed()
    kinds = [kind for kind in ("image", "v", "flow", "weighted", "epsilon") if kind in results.kinds]
    changes = {kind: change[0] for kind in kinds if (change := results.change(kind, 10, results.last[kind]))}
    listed = [f"{100 * value:+.0f}% for {training_report.KINDS[kind]}" for kind, value in changes.items()]
    return _so(
        max(changes["v"], changes["image"]) < 0 < min(changes["weighted"], changes["epsilon"]),
        "**A loss that gives the noisiest levels no weight**: there the pairing is all that a network has to go by. On "
        f"Fashion-MNIST the Frechet distance changes at 10 sampling steps by {', '.join(listed)} ({_FASHION}). Predict "
        "the image or the velocity.",
    )


def text() -> str:
    """Write the page.

    Raises
    ------
    ValueError
        If a record contradicts its sentence, or is missing.
    """
    facts = Facts(read([ABLATION, TRAINING]))
    parts = [
        "# How to choose a coupling",
        "<!-- Written by `python -m benchmarks.choosing` from the records that it links to: change it there. -->",
        "Every sentence rests on a record, of one machine and of small models: what holds for yours, `couplings "
        "ablate` and `python -m benchmarks.ablation` tell.",
    ]
    for title, sentences in chapters(facts):
        parts += [f"## {title}", "\n".join(f"- {sentence}" for sentence in sentences)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Bring the page up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosing", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    arguments = parser.parse_args(argv)
    new = text()
    if arguments.check:
        return int(not PAGE.exists() or PAGE.read_text() != new)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
