"""The progress bar of a run, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .config import Recipe

Report = Callable[[int, dict[str, float] | None], None]
"""Takes a step that is done and, where one is due, its line of metrics.jsonl."""


@contextmanager
def bar(recipe: Recipe, step: int, visible: bool) -> Iterator[Report]:
    """Show how far a run is, from ``step`` on; where no terminal is, print a line for each line of metrics.jsonl."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not visible) as progress:
        task = progress.add_task(recipe.name, total=recipe.train.steps, completed=step, status="")

        def report(step: int, record: dict[str, float] | None) -> None:
            progress.update(task, completed=step)
            if record is None:
                return
            status = (
                f"loss {record['loss']:.4f}  distance {-100 * record['reduction']:+.1f}%  coupling "
                f"{record['coupling_ms']:.1f} ms, {100 * record['coupling_ms'] / record['step_ms']:.0f}% of the step"
            )
            progress.update(task, status=status)
            if visible and not console.is_terminal:  # the log of a batch job
                console.print(f"step {step} of {recipe.train.steps}  {status}", soft_wrap=True, highlight=False)

        yield report
