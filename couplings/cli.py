"""The `couplings` command: list methods, describe the machine, couple files and datasets, compare, report."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import couplings

# Everything else is imported by the commands that use it: `couplings --help` should cost little more than torch does.
if TYPE_CHECKING:
    from rich.console import Console

    from couplings.ablation.run import Outcome

__all__ = ["app", "main"]

_PIPED_WIDTH = 140
_SECONDS_BETWEEN_LINES = 30.0
_BAD_INPUT = 2
_INTERRUPTED = 130
_EXTRAS = {"safetensors": "cli", "rich": "cli"} | dict.fromkeys(("matplotlib", "pandas", "jinja2", "yaml"), "ablate")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `couplings` command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; by default those of the process.

    Returns
    -------
    int
        Exit code: 0; 1 if cells of a comparison or an ablation failed; 2 for bad input, with one line on stderr; 130
        if interrupted.

    Raises
    ------
    SystemExit
        If the reader of stdout has gone.
    """
    state: dict[str, bool] = {}
    hint = ""
    if str(Path.cwd()) not in sys.path:  # where --methods module:function may be
        sys.path.append(str(Path.cwd()))
    try:
        arguments = None if argv is None else list(argv)
        code = int(app(arguments, prog_name="couplings", standalone_mode=False, obj=state) or 0)
        if code == _INTERRUPTED:
            print("couplings: interrupted", file=sys.stderr)
        return code
    except typer.TyperException as error:
        message, context = error.format_message(), getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        message = f"this needs the package {error.name}, which is not installed. Type: pip install 'couplings[{extra}]'"
    # What the library raises for bad input; anything else is a defect, and shows its traceback.
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, MemoryError) as error:
        message = str(error) or type(error).__name__
        if state.get("traceback"):
            traceback.print_exc()
    print(f"couplings: error: {' '.join(message.split())}{hint}", file=sys.stderr)
    return _BAD_INPUT


def _flush(code: int, **_: object) -> int:
    sys.stdout.flush()  # here Typer minds a reader that has gone (`couplings methods | head`); later nobody does
    return code


def _version(wanted: bool) -> None:
    if wanted:
        print(f"couplings {couplings.__version__}")
        raise typer.Exit


@app.callback(result_callback=_flush)
def _couplings(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Pair noise with data by optimal transport."""
    context.obj["traceback"] = show_traceback


# --- how arguments are read


class List(list[Any]):
    """What stands between commas; a class of its own, since Typer would let a plain list be given in several flags."""


def _names(text: str) -> List:
    names = List(name.strip() for name in text.split(","))
    if not all(names):
        msg = f"expected names with commas between them, got {text!r}"
        raise typer.BadParameter(msg)
    return names


def _numbers(text: str) -> List:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        msg = f"expected whole numbers with commas between them, got {text!r}"
        raise typer.BadParameter(msg)
    return List(map(int, parts))


def _sizes(text: str) -> List:
    parts = text.split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        msg = f"expected sizes such as 3x32x32, got {text!r}"
        raise typer.BadParameter(msg)
    return List(map(int, parts))


def _seeds(text: str) -> List:
    seeds = _numbers(text)
    if seeds == [0]:
        msg = "expected how many seeds, at least 1, or the seeds with commas between them, got 0"
        raise typer.BadParameter(msg)
    return List(range(seeds[0])) if len(seeds) == 1 and "," not in text else seeds


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text)


def _option(metavar: str, text: str, *flags: str, **settings: Any) -> Any:
    return typer.Option(*flags, metavar=metavar, help=text, **settings)


_AXES = "Axes, with commas between their values"


def _axis(text: str, *flags: str, parser: Callable[[str], List] = _names) -> Any:
    return _option("A,B", text, *flags, parser=parser, rich_help_panel=_AXES)


_ARRAY = "An array: .npy, .npz, .pt or .safetensors; FILE:key where a file holds several."
_METRICS = ", ".join(couplings.metrics())
_QUANTIZERS = ", ".join(["none", *couplings.quantizers()])

_DATASET = "A .npy file (it stays on disk), .npz, .pt, .safetensors, or a folder of idx files; bytes are images."

Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and no table.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Repeats = Annotated[int, _option("N", "Timed calls, fewer beyond ten seconds.", min=1)]
Device = Annotated[str, _option("NAME", "Where the batches lie, such as cuda.")]
Metrics = Annotated[List | None, _axis(f"all, or some of {_METRICS}; by default sqeuclidean.")]
Quantizers = Annotated[List | None, _axis(f"all, or some of {_QUANTIZERS}; by default none.")]


# --- the commands


@app.command()
def methods(pattern: Annotated[str, _argument("PATTERN", "Such as 's*'.")] = "*", as_json: Json = False) -> int:
    """List the methods and what they promise."""
    from couplings.ablation.environment import missing_packages

    infos = couplings.methods(pattern)
    if as_json:
        installed = [{"installed": not any(map(missing_packages, info.requires))} for info in infos]
        return _print_json([asdict(info) | each for info, each in zip(infos, installed, strict=True)])
    if not infos:
        known = ", ".join(info.name for info in couplings.methods())
        msg = f"no method is called {pattern!r}. Known: {known}."
        raise ValueError(msg)
    from couplings.ablation.tables import methods_table

    _console().print(methods_table(infos))
    return 0


@app.command()
def env(as_json: Json = False) -> int:
    """Show versions and hardware, for reports of bugs."""
    from couplings.ablation import environment

    described = environment.describe()
    if as_json:
        return _print_json(described)
    from couplings.ablation.tables import environment_lines

    print("\n".join(environment_lines(described)))
    return 0


@app.command()
def doctor(
    batch: Annotated[int, _option("ROWS", "Rows of a batch on one device.", min=1)] = 256,
    shape: Annotated[List, _option("SIZES", "Of a row.", parser=_sizes)] = "3x32x32",  # type: ignore[assignment]
    device: Device = "cpu",
    step: Annotated[float, _option("MS", "Milliseconds of your training step.", min=1.0)] = 100.0,
    as_json: Json = False,
) -> int:
    """Show what is installed and compiled, how fast this machine couples, and what to write in a training loop."""
    from rich.console import Console

    from couplings.doctor import lines, report

    _check_device(device)
    with Console(stderr=True).status("compiling what is not in the cache, and measuring"):
        found = report(batch, tuple(shape), device, step)
    if as_json:
        return _print_json(found)
    print("\n".join(lines(found)))
    return 0


@app.command()
def couple(
    data: Annotated[str, _argument("DATA", _ARRAY)],
    noise: Annotated[str, _argument("NOISE", "The same, of the same dtype and shape.")],
    output: Annotated[Path, _option("OUT", "File for noise and index (.npy: the noise alone).", "-o", "--output")],
    force: Force = False,
    method: Annotated[str, _option("NAME", "See couplings methods; options as sinkhorn:reg=0.1.")] = "auction",
    metric: Annotated[str, _option("NAME", f"One of {_METRICS}.")] = "sqeuclidean",
    quantize: Annotated[str, _option("NAME", f"One of {_QUANTIZERS}.")] = "none",
    condition: Annotated[str | None, _option("FILE", "(n,) integer classes or (n, c) floating conditions.")] = None,
    seed: Annotated[int | None, _option("N", "Of methods that draw.", min=0)] = None,
) -> int:
    """Write the noise of a file in the order that couples it with the data of another. No file is ever unpickled."""
    import torch

    from couplings.ablation.files import check_output, read_array, split_key, write_arrays
    from couplings.ablation.grid import read_method

    # What can be refused before anything large is read, is.
    name, options = read_method(method)
    reserved = sorted(options.keys() & {"method", "metric", "quantize", "scope"})
    if reserved:
        msg = f"--method {method}: {reserved[0]} has a flag of its own, or no meaning here"
        raise ValueError(msg)
    coupling = couplings.Coupling(name, metric, None if quantize.lower() == "none" else quantize, **options)
    check_output(output, force=force)
    inputs = [spec for spec in (data, noise, condition) if spec is not None]
    if any(split_key(spec)[0].resolve() == output.resolve() for spec in inputs):
        msg = f"{output} is also an input: it would be lost. Choose another name."
        raise ValueError(msg)
    coupled = coupling(
        read_array(data),
        read_array(noise),
        condition=None if condition is None else read_array(condition),
        generator=None if seed is None else torch.Generator().manual_seed(seed),
    )
    arrays = {"noise": coupled.noise, "index": coupled.index}
    write_arrays(output, arrays, force=force)
    print(f"reduction  {float(coupled.reduction):.6g}")
    print(f"gap        {'no certificate' if coupled.gap is None else f'{coupled.gap:.3g}'}")
    print(f"marginal   {coupled.marginal}")
    print(f"written    {output} ({'noise' if output.suffix.lower() == '.npy' else ', '.join(arrays)})")
    return 0


@app.command()
def fit(
    data: Annotated[str, _argument("DATA", _DATASET)],
    output: Annotated[Path, _option("PLAN", "File for the plan, such as plan.safetensors.", "-o", "--output")],
    force: Force = False,
    classes: Annotated[str | None, _option("FILE", "(N,) integers, or the folder: noise picks in its class.")] = None,
    mirrored: Annotated[bool, typer.Option("--mirrored", help="Each row counts flipped as well.")] = False,
    batch_size: Annotated[int, _option("ROWS", "Noise rows of a step.", min=1)] = 1024,
    steps: Annotated[int | None, _option("N", "To end at, for each class; by default 3000.", min=1)] = None,
    tolerance: Annotated[float, _option("X", "Of chi^2, below which it ends.")] = 0.05,
    seed: Annotated[int, _option("N", "Of the noise.", min=0)] = 0,
    device: Annotated[str | None, _option("NAME", "Where to compute, such as cuda.")] = None,
    checkpoint: Annotated[Path | None, _option("FILE", "Keep the state there; go on from it if it exists.")] = None,
    as_json: Json = False,
) -> int:
    """Couple noise with a whole dataset: find which row each noise should train with, and write that as a plan."""
    from rich.console import Console

    from couplings import semidiscrete
    from couplings._files import check_target
    from couplings.ablation.files import read_classes, read_dataset, split_key

    for path, forced in ((output, force), (checkpoint, True)):
        if path is not None:
            check_target(path, force=forced)
    used = [Path(spec) if Path(spec).is_dir() else split_key(spec)[0] for spec in (data, classes) if spec is not None]
    for path in [output] if checkpoint is None else [checkpoint, output]:
        if path.resolve() in [each.resolve() for each in used]:
            msg = f"{path} is also an input: it would be lost. Choose another name."
            raise ValueError(msg)
        used.append(path)
    _check_device(device)
    rows = read_dataset(data)
    begun = time.perf_counter()
    with _progress(Console(stderr=True), unit="so far") as show:
        plan = semidiscrete.fit(
            rows,
            classes=None if classes is None else read_classes(classes),
            mirrored=mirrored,
            batch_size=batch_size,
            steps=steps,
            tolerance=tolerance,
            seed=seed,
            device=device,
            progress=lambda done, where: show(done, where, ""),
            checkpoint=checkpoint,
        )
    plan.save(output)
    found: dict[str, Any] = {
        "chi2": plan.chi2,
        "rows": len(plan),
        "shape": list(plan.shape),
        "classes": None if plan.classes is None else len(plan.parts),
        "mirrored": plan.mirrored,
        "seconds": time.perf_counter() - begun,
        "output": str(output),
    }
    return _print_json(found) if as_json else _print_lines(found)


@app.command()
def quality(
    plan: Annotated[Path, _argument("PLAN", "What couplings fit wrote.")],
    data: Annotated[str, _argument("DATA", "What it was fitted to.")],
    rows: Annotated[int, _option("N", "Noise rows to measure on.", min=2048)] = 4096,
    seed: Annotated[int, _option("N", "Of the noise.", min=0)] = 0,
    device: Annotated[str | None, _option("NAME", "Where to compute, such as cuda.")] = None,
    as_json: Json = False,
) -> int:
    """Compare the pairs of a plan with independent ones and with exact couplings of minibatches."""
    from couplings.ablation.files import read_dataset
    from couplings.semidiscrete import Semidiscrete

    _check_device(device)
    loaded = Semidiscrete.load(plan, read_dataset(data), device=device)
    found = {"chi2": loaded.chi2} | asdict(loaded.quality(rows=rows, seed=seed))
    return _print_json(found) if as_json else _print_lines(found)


@app.command()
def compare(
    data: Annotated[str | None, _argument("DATA", _ARRAY)] = None,
    noise: Annotated[str | None, _argument("NOISE", "Its noise, n or k * n rows; without it, Gaussian.")] = None,
    methods: Annotated[List | None, _axis("As sinkhorn:reg=0.1,auction; by default all that can run.")] = None,
    metrics: Metrics = None,
    quantizers: Quantizers = None,
    n: Annotated[int | None, _option("ROWS", "First rows of DATA, by default all; or crops, 256.", "-n", min=1)] = None,
    seed: Annotated[int, _option("N", "Of crops, noise and methods.", min=0)] = 0,
    repeats: Repeats = 5,
    device: Device = "cpu",
    as_json: Json = False,
    plot: Annotated[Path | None, _option("FILE", "Also draw reduction against time, such as out.png.")] = None,
) -> int:
    """Time, distance and marginal of methods, metrics and quantizers on one batch.

    It holds image crops that come with the package and Gaussian noise, or your own DATA and NOISE.
    """
    import torch
    from rich.console import Console

    from couplings._files import check_target
    from couplings.ablation import measure
    from couplings.ablation.grid import points
    from couplings.ablation.plots import check_plot, plot_comparison
    from couplings.ablation.sources import first_batch

    everything = methods in (None, ["all"])
    axes = {"methods": methods, "metrics": metrics, "quantizers": quantizers}
    given = {axis: values for axis, values in axes.items() if values is not None}
    points([given])  # refuses unknown names before anything is read
    if plot is not None:
        check_target(plot, force=True)
        check_plot(plot)
    batch = first_batch(data, noise, n, seed).to(device)
    cells = points([{"data": batch.name, "n": len(batch.data), "seeds": [seed], **given}])
    for cell in [] if everything else cells:  # only defaults are skipped
        reason = measure.obstacle(cell.coupling(), batch)
        if reason is not None:
            msg = f"{cell.method}: {reason}"
            raise ValueError(msg)
    errors = Console(stderr=True)
    # A method that prints must not spoil the JSON.
    with redirect_stdout(sys.stderr), _progress(errors) as show:
        couplings.warmup()

        def on_start(i: int) -> None:
            show(i / len(cells), f"{i} of {len(cells)}", cells[i].title)

        records = measure.compare(batch, cells, repeats=repeats, on_start=on_start)
    if plot is not None:  # before the table: whoever reads that may stop early
        plot_comparison(records, batch, plot)
        errors.print(f"wrote {plot}", markup=False, highlight=False)
    if as_json:
        _print_json(records)
    else:
        from couplings.ablation.tables import comparison_footnotes, comparison_tables

        console = _console()
        for table in comparison_tables(records, batch):
            console.print(table)
        for line in comparison_footnotes(records, batch, torch.get_num_threads()):
            console.print(line, markup=False, highlight=False, style="dim")
    failed = [record for record in records if record["error"] is not None]
    for record in failed:
        title = f"{record['label']}, {record['metric']}, {record['quantize'] or 'none'}"
        print(f"couplings: {title} failed: {' '.join(record['error'].split())}", file=sys.stderr)
    return 1 if failed else 0


@app.command()
def ablate(
    grid: Annotated[Path | None, _argument("GRID", "YAML or JSON file with the axes, in place of their flags.")] = None,
    output: Annotated[Path, _option("FILE", "JSONL file that records are added to.", "-o", "--output")] = Path(
        "ablation.jsonl"
    ),
    data: Annotated[List | None, _axis("crops32, crops64, latents, or files of arrays; by default crops32.")] = None,
    labels: Annotated[str | None, _option("FILE", "Classes of the rows of a file.", rich_help_panel=_AXES)] = None,
    n: Annotated[List | None, _axis("Rows on each rank; by default 128,256,512,1024.", "-n", parser=_numbers)] = None,
    methods: Annotated[List | None, _axis("As sinkhorn:reg=0.1,package.module:function; by default all.")] = None,
    metrics: Metrics = None,
    quantizers: Quantizers = None,
    conditions: Annotated[List | None, _axis("none, class: couple within classes only; by default none.")] = None,
    scopes: Annotated[List | None, _axis("local, global: over the ranks of a group; by default local.")] = None,
    ranks: Annotated[List | None, _axis("Processes of the global scope; by default 2.", parser=_numbers)] = None,
    seeds: Annotated[List | None, _axis("How many from 0 on, or several; by default 3.", parser=_seeds)] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Only say which cells there are.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Drop the records that FILE holds.")] = False,
    no_times: Annotated[bool, typer.Option("--no-times", help="Measure no times and no memory.")] = False,
    jobs: Annotated[int | None, _option("N", "Processes for quality; by default one per processor.", min=1)] = None,
    threads: Annotated[int | None, _option("N", "Of what is timed; by default PyTorch's choice.", min=1)] = None,
    repeats: Repeats = 5,
    timeout: Annotated[int, _option("S", "Seconds after which a cell failed.", min=1)] = 600,
    device: Device = "cpu",
) -> int:
    """Quality and time over a grid of methods, metrics, quantizers, batch sizes and scopes.

    A run that was stopped continues: what is finished is kept. `couplings report` makes pages of the records.
    """
    import torch
    from rich.console import Console

    from couplings.ablation.grid import points, read_grid
    from couplings.ablation.run import run
    from couplings.ablation.workers import Settings

    axes = {"data": data, "labels": labels, "n": n, "methods": methods, "metrics": metrics, "quantizers": quantizers}
    axes |= {"conditions": conditions, "scopes": scopes, "ranks": ranks, "seeds": seeds}
    given = {axis: values for axis, values in axes.items() if values is not None}
    if grid is not None and given:
        msg = f"{grid} holds the axes: leave --{next(iter(given))} away, or the file"
        raise ValueError(msg)
    cells = points([given] if grid is None else read_grid(grid))
    if only_list:
        for cell in cells:
            print(f"{cell.title}, seed {cell.seed}")
        return 0

    def on_progress(outcome: Outcome) -> None:
        done = outcome.work / outcome.total if outcome.total else 1.0
        show(done, f"{outcome.measured} of {outcome.missing}", outcome.title)

    with _progress(Console(stderr=True), unit="measurements") as show:
        outcome = run(
            cells,
            output,
            Settings(str(torch.device(device)), threads, repeats, float(timeout)),
            jobs=jobs or os.cpu_count() or 1,
            times=not no_times,
            restart=restart,
            command=shlex.join(["couplings", *sys.argv[1:]]),
            on_progress=on_progress,
        )
    for note in outcome.notes:
        print(f"couplings: {note}", file=sys.stderr)
    for kind, reasons in (("skipped", outcome.skipped), ("failed", outcome.failed)):
        for reason in dict.fromkeys(reasons.values()):
            titles = [title for title, each in reasons.items() if each == reason]
            others = f" and {len(titles) - 1} other kinds of cells" if len(titles) > 1 else ""
            print(f"couplings: {titles[0]}{others} {kind}: {' '.join(reason.split())}", file=sys.stderr)
    print(f"{len(cells)} cells, {outcome.measured} measurements made, {outcome.kept} kept: {output}")
    return 1 if outcome.failed else 0


@app.command()
def report(
    records: Annotated[list[Path], _argument("JSONL", "Files of records.")],
    output: Annotated[Path | None, _option("FILE", "HTML page, by default report.html.", "-o", "--output")] = None,
    markdown: Annotated[Path | None, _option("FILE", "Markdown; its pictures are put beside it.")] = None,
    title: Annotated[str, _option("TEXT", "Headline.")] = "Couplings: an ablation",
    force: Force = False,
) -> int:
    """Tables and plots of what `couplings ablate` recorded, as one HTML page or as Markdown."""
    from couplings._files import check_target
    from couplings.ablation.report import write

    page = Path("report.html") if output is None and markdown is None else output
    for path in (page, markdown):
        if path is not None:
            check_target(path, force=force)
    for path in write(records, page, markdown, title=title, force=force):
        print(path)
    return 0


# --- what they print


def _print_json(value: object) -> int:
    print(json.dumps(value, indent=2, allow_nan=False))
    return 0


def _print_lines(found: dict[str, Any]) -> int:
    for name, value in found.items():
        print(f"{name:<15} {f'{value:.6g}' if isinstance(value, float) else 'none' if value is None else value}")
    return 0


def _check_device(name: str | None) -> None:
    import torch

    try:
        device = None if name is None else torch.device(name)
    except RuntimeError as error:  # which lists all that torch was ever built for
        msg = f"--device {name}: no device is called that. Try cpu, cuda or cuda:1."
        raise ValueError(msg) from error
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch was built without it, or the machine has none
        reason = str(error).partition("\n")[0].partition(". ")[0]
        msg = f"--device {name} cannot be used here: {reason}."
        raise RuntimeError(msg) from error


def _console() -> Console:
    """Make the console for stdout; what is piped into a file is not broken at 80 columns."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPED_WIDTH if piped else None)


@contextmanager
def _progress(console: Console, unit: str = "") -> Iterator[Callable[[float, str, str], None]]:
    """Show a bar and the time left; where nobody watches, a line now and then if there is a unit to count.

    Yields
    ------
    callable
        Takes the share of the work that is done, the count of what is done, and the title of what is being done.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    count, title = TextColumn("{task.description}"), TextColumn("{task.fields[title]}", style="dim")
    columns = (BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn(), title)
    hidden, ever = not console.is_terminal, 1e9
    bar = Progress(*columns, console=console, transient=True, speed_estimate_period=ever)
    with nullcontext() if hidden else bar:
        task = bar.add_task("", total=1.0, title="starting")
        said = time.monotonic()

        def show(done: float, count: str, title: str) -> None:
            nonlocal said
            bar.update(task, completed=done, description=count, title=title)
            if unit and hidden and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                seconds = bar.tasks[0].time_remaining
                left = "" if seconds is None else f", {timedelta(seconds=round(seconds))} left"
                console.print(f"{count} {unit}{left}", highlight=False)

        yield show
