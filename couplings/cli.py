"""The `couplings` command: list methods, describe the machine, couple two files, compare, ablate and report."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import couplings
from couplings.assigners.registry import find

# Everything else is imported by the commands that use it: `couplings --help` should cost no more than torch does.
if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from couplings.comparison import Batch, Cell
    from couplings.coupling import Coupling

__all__ = ["main"]

_ROWS = 256  # of built-in image crops
_PIPED_WIDTH = 140
_SECONDS_BETWEEN_LINES = 30.0
_BAD_INPUT = 2
_INTERRUPTED = 130


class _RefusedError(Exception):
    """The command line itself is wrong; the message says how to mend it."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        msg = f"{message} (see {self.prog} --help)"
        raise _RefusedError(msg)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `couplings` command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; by default those of the process.

    Returns
    -------
    int
        Exit code: 0; 1 if a comparison has cells that failed; 2 for bad input, with one line on stderr; 130 if
        interrupted.

    Raises
    ------
    SystemExit
        After ``--help`` and ``--version``.
    """
    arguments = None
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        code = command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`couplings methods | head`). Python would complain again when it closes stdout.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        return 1
    except KeyboardInterrupt:
        print("couplings: interrupted", file=sys.stderr)
        return _INTERRUPTED
    # What the library raises for bad input; anything else is a defect, and shows its traceback.
    except (_RefusedError, ValueError, TypeError, ImportError, RuntimeError, OSError, MemoryError) as error:
        if arguments is not None and arguments.traceback:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"couplings: error: {message}", file=sys.stderr)
        return _BAD_INPUT
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="couplings", description="Pair noise with data by optimal transport.")
    parser.add_argument("--version", action="version", version=f"couplings {couplings.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_methods(commands)
    _add_env(commands)
    _add_couple(commands)
    _add_compare(commands)
    _add_ablate(commands)
    _add_report(commands)
    return parser


def _add_methods(commands: Any) -> None:
    parser = commands.add_parser("methods", help="list the methods and what they promise")
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="such as 's*' (default: all)")
    parser.add_argument("--json", action="store_true", help="a JSON list on stdout")
    parser.set_defaults(command=_methods)


def _add_env(commands: Any) -> None:
    parser = commands.add_parser("env", help="versions and hardware, for reports of bugs")
    parser.add_argument("--json", action="store_true", help="a JSON object on stdout")
    parser.set_defaults(command=_env)


_FILE = "an array: .npy, .npz, .pt or .safetensors; FILE:key where a file holds several"
_OPTION = "an option of the method, such as reg=0.1; may be repeated"


def _add_couple(commands: Any) -> None:
    parser = commands.add_parser(
        "couple",
        help="couple the noise in a file with the data in another",
        description="Write the noise in the order that couples it with the data. No file is ever unpickled.",
    )
    parser.add_argument("data", metavar="DATA", help=_FILE)
    parser.add_argument("noise", metavar="NOISE", help="the same, of the same dtype and shape")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="where to write noise and index (.npy: the noise alone), in any of these formats",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--method", default="auction", metavar="NAME", help="see couplings methods (default: auction)")
    parser.add_argument("--metric", default="sqeuclidean", metavar="NAME", help=f"one of {_known_metrics()}")
    parser.add_argument("--quantize", default=None, metavar="NAME", help=f"one of none, {_known_quantizers()}")
    parser.add_argument(
        "--condition", metavar="FILE", help="(n,) integer classes or (n, c) floating conditions of the data"
    )
    parser.add_argument("--seed", type=_seed, metavar="N", help="of methods that draw (default: a fixed one)")
    parser.add_argument("--option", action="append", default=[], type=_option, metavar="NAME=VALUE", help=_OPTION)
    parser.set_defaults(command=_couple)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="time, distance and marginal of methods, metrics and quantizers",
        description="Couple one batch by every method, metric and quantizer asked for: image crops that come with "
        "the package and Gaussian noise, or your own DATA and NOISE.",
    )
    parser.add_argument("data", nargs="?", metavar="DATA", help=_FILE)
    parser.add_argument("noise", nargs="?", metavar="NOISE", help="its noise, n or k * n rows (default: Gaussian)")
    parser.add_argument("--methods", type=_names, metavar="A,B", help="default: all; see couplings methods")
    parser.add_argument(
        "--metrics",
        type=_names,
        default=["sqeuclidean"],
        metavar="A,B",
        help=f"all, or some of {_known_metrics()} (default: sqeuclidean)",
    )
    parser.add_argument(
        "--quantizers",
        type=_names,
        default=["none"],
        metavar="A,B",
        help=f"all, or some of none, {_known_quantizers()} (default: none)",
    )
    parser.add_argument(
        "-n", type=_positive, metavar="ROWS", help=f"the first n rows of DATA (default: all); crops (default: {_ROWS})"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of crops, noise and methods (default: 0)")
    parser.add_argument(
        "--repeats", type=_positive, default=5, metavar="N", help="timed calls, fewer beyond ten seconds (default: 5)"
    )
    parser.add_argument("--device", default="cpu", help="where the batch lies, such as cuda (default: cpu)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="[METHOD.]NAME=VALUE",
        help="an option, for every method that takes it or for one method; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list on stdout, an object per cell, and no table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw reduction against time, such as out.png")
    parser.set_defaults(command=_compare)


def _add_ablate(commands: Any) -> None:
    parser = commands.add_parser(
        "ablate",
        help="quality and time over a grid of methods, metrics, quantizers, batch sizes and scopes",
        description="Couple many batches by every combination, and keep a record of each. A run that was stopped "
        "continues: finished cells are not measured again. `couplings report` makes tables and plots of the records.",
    )
    parser.add_argument(
        "grid", nargs="?", type=Path, metavar="GRID", help="YAML or JSON file with the axes, in place of their flags"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("ablation.jsonl"), metavar="FILE",
        help="JSONL file that records are added to (default: ablation.jsonl)",
    )  # fmt: skip
    axes = parser.add_argument_group("axes, each with commas between its values")
    for flag, read, text in (
        ("--data", _names, "crops32, crops64, latents, or files of arrays (default: crops32)"),
        ("--labels", str, "file with the classes of a file's rows"),
        ("-n", _sizes, "rows of a batch, on each rank (default: 128,256,512,1024)"),
        (
            "--methods",
            _methods_with_options,
            "with options as in sinkhorn:reg=0.1,nearest:k=4:score=dot (default: all)",
        ),
        ("--metrics", _names, f"all, or some of {_known_metrics()} (default: sqeuclidean)"),
        ("--quantizers", _names, f"all, or some of none, {_known_quantizers()} (default: none)"),
        ("--conditions", _names, "none, class: couple within classes only (default: none)"),
        ("--scopes", _names, "local, global: over the ranks of a gloo group on this machine (default: local)"),
        ("--ranks", _sizes, "processes of the global scope (default: 2)"),
        ("--seeds", _seeds, "how many seeds from 0 on, or several with commas (default: 3)"),
    ):
        axes.add_argument(flag, type=read, metavar="A,B" if flag not in ("--labels",) else "FILE", help=text)
    parser.add_argument("--list", action="store_true", help="only say which cells there are")
    parser.add_argument("--restart", action="store_true", help="drop the records that FILE holds")
    parser.add_argument("--no-times", action="store_true", help="measure no times and no memory")
    parser.add_argument(
        "--jobs", type=_positive, metavar="N", help="processes that measure quality (default: one per processor)"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="of what is timed (default: PyTorch's choice)")
    parser.add_argument(
        "--repeats", type=_positive, default=5, metavar="N", help="timed calls, fewer beyond ten seconds (default: 5)"
    )
    parser.add_argument(
        "--timeout", type=_positive, default=600, metavar="S", help="seconds after which a cell failed (default: 600)"
    )
    parser.add_argument("--device", default="cpu", help="where the batches lie, such as cuda (default: cpu)")
    parser.set_defaults(command=_ablate)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="tables and plots of records, as one HTML page or as Markdown",
        description="Put together what `couplings ablate` recorded.",
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="JSONL", help="files of records")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="HTML page that needs no other file (default: report.html, if no Markdown is asked for)",
    )  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="Markdown; its pictures are put beside it")
    parser.add_argument("--title", default="Couplings: an ablation", metavar="TEXT", help="headline")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.set_defaults(command=_report)


def _sizes(text: str) -> list[int]:
    return [_positive(part.strip()) for part in text.split(",")]


def _seeds(text: str) -> int | list[int]:
    return [_seed(part.strip()) for part in text.split(",")] if "," in text else _positive(text)


def _methods_with_options(text: str) -> list[Any]:
    found: list[Any] = []
    for each in _names(text):
        name, *options = each.split(":")
        found.append({name: dict(_option(option) for option in options)} if options else name)
    return found


def _known_metrics() -> str:
    return ", ".join(couplings.metrics())


def _known_quantizers() -> str:
    return ", ".join(couplings.quantizers())


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        msg = f"expected a whole number of at least 1, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        msg = f"expected a whole number from 0 to 2**64 - 1, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        msg = f"expected names with commas between them, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return names


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.strip() or not equals:
        msg = f"expected name=value, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """Read a number, a truth value or None where it looks like one; a string otherwise."""
    constants = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _options(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    options = dict(pairs)
    if len(options) < len(pairs):
        msg = f"--option {', '.join(sorted(options))}: the same option is given twice"
        raise _RefusedError(msg)
    return options


def _none_or(name: str | None) -> str | None:
    return None if name is None or name.lower() == "none" else name


def _all_quantizers() -> list[str | None]:
    return [None, *couplings.quantizers()]


def _console() -> Console:
    """Make the console for stdout; what is piped into a file is not broken at 80 columns."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPED_WIDTH if piped else None)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _methods(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from couplings.environment import missing_packages

    infos = couplings.methods(arguments.pattern)
    if arguments.json:
        _print_json([asdict(info) | {"installed": not any(map(missing_packages, info.requires))} for info in infos])
        return 0
    if not infos:
        known = ", ".join(info.name for info in couplings.methods())
        msg = f"no method is called {arguments.pattern!r}. Known: {known}."
        raise _RefusedError(msg)
    from couplings.tables import methods_table

    _console().print(methods_table(infos))
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from couplings.environment import describe

    described = describe()
    if arguments.json:
        _print_json(described)
        return 0
    from couplings.tables import environment_lines

    print("\n".join(environment_lines(described)))
    return 0


def _couple(arguments: argparse.Namespace) -> int:
    import torch

    from couplings.coupling import Coupling
    from couplings.files import check_output, read_array, split_key, write_arrays

    # What can be refused before anything large is read, is.
    options = _options(arguments.option)
    reserved = sorted(options.keys() & {"method", "metric", "quantize", "scope"})
    if reserved:
        msg = f"--option {reserved[0]}: has a flag of its own, or no meaning here"
        raise _RefusedError(msg)
    coupling = Coupling(arguments.method, arguments.metric, _none_or(arguments.quantize), **options)
    output: Path = arguments.output
    check_output(output, force=arguments.force)
    inputs = [spec for spec in (arguments.data, arguments.noise, arguments.condition) if spec is not None]
    if any(split_key(spec)[0].resolve() == output.resolve() for spec in inputs):
        msg = f"{output} is also an input: it would be lost. Choose another name."
        raise _RefusedError(msg)
    data, noise = read_array(arguments.data), read_array(arguments.noise)
    condition = None if arguments.condition is None else read_array(arguments.condition)
    generator = None if arguments.seed is None else torch.Generator().manual_seed(arguments.seed)
    coupled = coupling(data, noise, condition=condition, generator=generator)
    arrays = {"noise": coupled.noise, "index": coupled.index}
    write_arrays(output, arrays, force=arguments.force)
    written = "noise" if output.suffix.lower() == ".npy" else ", ".join(arrays)
    print(f"reduction  {float(coupled.reduction):.6g}")
    print(f"gap        {'no certificate' if coupled.gap is None else f'{coupled.gap:.3g}'}")
    print(f"marginal   {coupled.marginal}")
    print(f"written    {output} ({written})")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from couplings.ablation.plots import check_plot, plot_comparison
    from couplings.comparison import grid
    from couplings.files import check_target

    everything = arguments.methods is None or arguments.methods == ["all"]
    plans = grid(
        None if everything else arguments.methods,
        couplings.metrics() if arguments.metrics == ["all"] else arguments.metrics,
        [None, *couplings.quantizers()]
        if arguments.quantizers == ["all"]
        else list(map(_none_or, arguments.quantizers)),
        _options(arguments.option),
    )
    if arguments.plot is not None:
        check_target(arguments.plot, force=True)
        check_plot(arguments.plot)
    batch = _batch(arguments)
    if not everything:
        _refuse_obstacles(plans, batch)
    errors = Console(stderr=True)
    with redirect_stdout(sys.stderr):  # a method that prints must not spoil the JSON
        cells = _run(plans, batch, arguments, errors)
    if arguments.plot is not None:  # before the table: whoever reads that may stop early
        plot_comparison(cells, batch, arguments.plot)
        errors.print(f"wrote {arguments.plot}", markup=False, highlight=False)
    if arguments.json:
        _print_json([{"data": batch.name, "seed": arguments.seed, **cell.to_dict()} for cell in cells])
    else:
        from couplings.tables import comparison_footnotes, comparison_tables

        console = _console()
        for table in comparison_tables(cells, batch):
            console.print(table)
        for line in comparison_footnotes(cells, batch, torch.get_num_threads()):
            console.print(line, markup=False, highlight=False, style="dim")
    failed = [cell for cell in cells if cell.error is not None]
    for cell in failed:
        message = " ".join(str(cell.error).split())
        print(f"couplings: {cell.method}, {cell.metric}, {cell.quantize or 'none'} failed: {message}", file=sys.stderr)
    return 1 if failed else 0


def _ablate(arguments: argparse.Namespace) -> int:
    import shlex

    from rich.console import Console

    from couplings.ablation.grid import AXES, points, read_grid
    from couplings.ablation.running import run
    from couplings.ablation.workers import Settings

    given = {axis: getattr(arguments, axis) for axis in AXES if getattr(arguments, axis) is not None}
    if arguments.grid is not None and given:
        msg = f"{arguments.grid} holds the axes: leave --{next(iter(given))} away, or the file"
        raise _RefusedError(msg)
    cells = points([_plain(given)] if arguments.grid is None else read_grid(arguments.grid))
    if arguments.list:
        for cell in cells:
            print(f"{cell.title}, seed {cell.seed}")
        return 0
    errors = Console(stderr=True)
    settings = Settings(arguments.device, arguments.threads, arguments.repeats, float(arguments.timeout))
    command = shlex.join(["couplings", *sys.argv[1:]])
    with _progress(errors) as on_progress:
        outcome = run(
            cells,
            arguments.output,
            settings,
            jobs=arguments.jobs or os.cpu_count() or 1,
            times=not arguments.no_times,
            restart=arguments.restart,
            command=command,
            on_progress=on_progress,
        )
    for note in outcome.notes:
        print(f"couplings: {note}", file=sys.stderr)
    for kind, reasons in (("skipped", outcome.skipped), ("failed", outcome.failed)):
        for reason in dict.fromkeys(reasons.values()):
            titles = [title for title, each in reasons.items() if each == reason]
            others = f" and {len(titles) - 1} other kinds of cells" if len(titles) > 1 else ""
            print(f"couplings: {titles[0]}{others} {kind}: {' '.join(reason.split())}", file=sys.stderr)
    print(f"{len(cells)} cells, {outcome.measured} measurements made, {outcome.kept} kept: {arguments.output}")
    return 1 if outcome.failed else 0


def _report(arguments: argparse.Namespace) -> int:
    from couplings.ablation.report import write
    from couplings.files import check_target

    page: Path | None = arguments.output
    if page is None and arguments.markdown is None:
        page = Path("report.html")
    for path in (page, arguments.markdown):
        if path is not None:
            check_target(path, force=arguments.force)
    for path in write(arguments.records, page, arguments.markdown, title=arguments.title, force=arguments.force):
        print(path)
    return 0


def _plain(axes: dict[str, Any]) -> dict[str, Any]:
    """Axes as a file would hold them: the word ``all`` by itself, not in a list."""
    return {axis: "all" if value == ["all"] else value for axis, value in axes.items()}


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Any], None]]:
    """Show how far an ablation is and how long it will take: a bar, or a line now and then where nobody watches."""
    import time

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        TextColumn("{task.fields[cells]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[title]}", style="dim"),
    )
    said = time.monotonic()
    first: tuple[float, float] | None = None
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("", total=None, cells="", left="", title="starting")

        def show(progress: Any) -> None:
            nonlocal said, first
            now, left = time.monotonic(), ""
            if first is None and progress.cells:
                first = now, progress.work  # until here, workers were starting
            elif first is not None and progress.work > first[1]:
                pace = (now - first[0]) / (progress.work - first[1])
                left = f"{_duration(pace * (progress.total - progress.work))} left"
            cells = f"{progress.cells} of {progress.of}"
            bar.update(
                line, total=progress.total, completed=progress.work, cells=cells, left=left, title=progress.title
            )  # fmt: skip
            if not console.is_terminal and now - said > _SECONDS_BETWEEN_LINES:
                said = now
                console.print(f"{cells} measurements{', ' if left else ''}{left}", highlight=False)

        yield show


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _batch(arguments: argparse.Namespace) -> Batch:
    """Read or draw what is to be coupled."""
    import torch

    from couplings.comparison import CANDIDATES, Batch
    from couplings.files import read_array

    generator = torch.Generator().manual_seed(arguments.seed)
    n: int | None = arguments.n
    if arguments.data is None:
        from couplings.data import image_crops

        data, name = image_crops(n or _ROWS, generator=generator), "built-in image crops"
    else:
        data, name = read_array(arguments.data), arguments.data
        data = _first_rows(data, n, name)
    n = len(data) if data.dim() else 0
    if arguments.noise is None:
        if not data.is_floating_point():
            msg = f"{name} must be floating, got {data.dtype}. Scale images first, for example to [-1, 1]."
            raise _RefusedError(msg)
        noise = torch.randn((CANDIDATES * n, *data.shape[1:]), generator=generator).to(data.dtype)
    else:
        noise = read_array(arguments.noise)
        if arguments.n is not None:
            # All candidates of these rows: a whole multiple of n.
            available = noise.shape[0] if noise.dim() else 0
            noise = _first_rows(noise, n, arguments.noise)[:n] if available < 2 * n else noise[: available // n * n]
    try:
        device = torch.device(arguments.device)
        return Batch(data.to(device), noise.to(device), name)
    except AssertionError as error:  # torch was built without that device
        raise _RefusedError(str(error)) from error


def _first_rows(value: torch.Tensor, n: int | None, name: str) -> torch.Tensor:
    if n is None:
        return value
    rows = value.shape[0] if value.dim() else 0
    if rows < n:
        msg = f"{name} has {rows} rows, fewer than -n {n}."
        raise _RefusedError(msg)
    return value[:n]


def _refuse_obstacles(plans: Sequence[Coupling], batch: Batch) -> None:
    """Refuse what cannot run and was asked for by name; only defaults are skipped."""
    from couplings.comparison import obstacle

    for name in dict.fromkeys(str(plan.method) for plan in plans):
        reason = obstacle(find(name).info, batch)
        if reason is not None:
            msg = f"{name}: {reason}"
            raise _RefusedError(msg)


def _run(plans: Sequence[Coupling], batch: Batch, arguments: argparse.Namespace, console: Any) -> list[Cell]:
    """Compare behind a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from couplings.comparison import compare

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compiling kernels", total=len(plans), start=True)
        couplings.warmup()
        started = 0

        def on_start(plan: Coupling) -> None:
            nonlocal started
            kind = " ".join(str(part) for part in (plan.method, plan.metric, plan.quantize) if part)
            progress.update(bar, description=kind, completed=started)
            started += 1

        cells = compare(batch, plans, seed=arguments.seed, repeats=arguments.repeats, on_start=on_start)
        progress.update(bar, completed=len(plans))
    return cells
