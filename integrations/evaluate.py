"""Measure a trained checkpoint: ``python -m integrations.evaluate CHECKPOINT``, also under a launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .config import RecipeError, expect
from .sample import overrides, parser


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = parser(
        "evaluate",
        "Frechet (fid) and kernel (kid) distance of a checkpoint's samples to its training data, for each number of\n"
        "sampling steps. Distances in different features are not comparable. Under accelerate launch or torchrun,\n"
        "the processes share the samples. Statistics of the data are kept in $XDG_CACHE_HOME/couplings.",
    )
    options.add_argument(
        "--features",
        dest="evaluate.features",
        metavar="NAME",
        help="classifier (trained on the recipe's data and kept in the run's folder), the path of such a "
        "classifier.safetensors, or inception (default: the recipe's evaluate.features)",
    )
    options.add_argument(
        "--output", type=Path, help="JSONL file to append to (default: evaluation.jsonl in the run's folder)"
    )
    arguments, further = options.parse_known_args(argv)

    from rich.console import Console
    from rich.table import Table

    from . import measure
    from .build import TrainingError
    from .checkpoint import CheckpointError
    from .data import DataError

    try:
        processes = measure.join()
        trained = measure.load_trained(arguments.checkpoint, overrides(arguments, further), processes.device)
        section, source = trained.recipe.evaluate, trained.source
        least = max(2, processes.num_processes)
        enough = f"at least {least}: a distribution has a variance"
        expect(section.samples >= least, "evaluate.samples", section.samples, enough)
        with processes.main_process_first():  # the others find what it trains
            network = measure.feature_network(section.features, source, trained.recipe.output)
    except (RecipeError, DataError, CheckpointError, TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    options = {"kid": True, "workers": trained.recipe.data.workers, "cache": measure.cache_folder()}
    scores = measure.Scores(network, source, trained.device, **options)
    first = processes.is_main_process
    output = arguments.output or trained.recipe.output / "evaluation.jsonl"
    table = Table(
        title=f"{trained.recipe.name}, training step {trained.step}: {section.samples} samples against {len(source)} "
        f"images,\nin features of {section.features}"
    )
    for column in ("sampling steps", "fid", "kid"):
        table.add_column(column, justify="right")
    for steps in section.steps:
        found = scores(measure.draw_all(trained, steps), measure.share(section.samples).start)
        if not first:
            continue
        record = {
            "step": trained.step,
            "sampling_steps": steps,
            "samples": section.samples,
            "features": section.features,
            "seed": section.seed,
            "coupling": trained.recipe.coupling.method,
            "ema_decay": trained.decay,
            "mixed_precision": section.mixed_precision or trained.recipe.train.mixed_precision,
            **found,
        }
        with output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        table.add_row(str(steps), f"{found['fid']:.2f}", f"{found['kid']:.4g} ± {found['kid_std']:.2g}")
    if first:
        Console().print(table)


if __name__ == "__main__":
    main()
    from accelerate import PartialState

    PartialState().destroy_process_group()
