"""Damaged files, mutated recipes and mutated command lines: the right content, or one line that says what is wrong.

Each seed damages a fresh copy of a good file: cut short, bits flipped, emptied, overwritten, parts swapped, or another
file in its place; among these are pickles, bare and inside of `.npy`, `.npz` and `.pt` files, which make a file if they
are ever loaded: that file must never appear.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..record import RESULTS
from .calls import undocumented
from .trial import Outcome, Verdict, judged, sized

FILES, COMMANDS, RECIPES = 10_000, 2_000, 2_000
PATIENCE = 120.0  # seconds for one
EXECUTED = "executed"  # the file that a payload makes


class Payload:
    """What makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def payloads(marker: Path) -> dict[str, bytes]:
    """Pickles with code inside, in the dress of each format."""
    bare = pickle.dumps(Payload(marker))
    boxed = np.empty(1, dtype=object)
    boxed[0] = Payload(marker)
    made = {"pickle": bare, "npy": io.BytesIO(), "npz": io.BytesIO(), "pt": io.BytesIO(), "old pt": io.BytesIO()}
    np.save(made["npy"], boxed, allow_pickle=True)
    np.savez(made["npz"], noise=boxed)
    torch.save({"noise": Payload(marker)}, made["pt"])
    torch.save({"noise": Payload(marker)}, made["old pt"], _use_new_zipfile_serialization=False)
    return {name: value if isinstance(value, bytes) else value.getvalue() for name, value in made.items()}


def damage(content: bytes, rng: Any, others: dict[str, bytes]) -> tuple[str, bytes]:
    """Damage a file: how, and what is left of it."""
    size = len(content)
    at, end = sorted(int(k) for k in rng.integers(0, size + 1, 2))
    end = min(end, at + 64)
    ways: dict[str, Callable[[], bytes]] = {
        "cut short": lambda: content[:at],
        "end cut off": lambda: content[:-1],
        "a bit flipped": lambda: _flipped(content, rng, 1),
        "bits flipped": lambda: _flipped(content, rng, 8),
        "a bit of the head flipped": lambda: _flipped(content[:200], rng, 1) + content[200:],
        "emptied": lambda: b"",
        "zeros": lambda: content[:at] + bytes(end - at) + content[end:],
        "all zeros": lambda: bytes(size),
        "noise": lambda: content[:at] + rng.bytes(end - at) + content[end:],
        "only noise": lambda: rng.bytes(size),
        "halves swapped": lambda: content[size // 2 :] + content[: size // 2],
        "a part missing": lambda: content[:at] + content[end:],
        "a part twice": lambda: content[:end] + content[at:],
        "more at the end": lambda: content + rng.bytes(8),
        "line ends changed": lambda: content.replace(b"\n", b"\r\n"),
    }
    ways |= {f"a {name} in its place": lambda name=name: others[name] for name in others}
    how = list(ways)[rng.integers(len(ways))]
    return how, ways[how]()


def _flipped(content: bytes, rng: Any, bits: int) -> bytes:
    changed = bytearray(content)
    for _ in range(bits if content else 0):
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


# --- files


@dataclass(frozen=True)
class Subject:
    """A kind of file.

    Attributes
    ----------
    name : str
    make : callable
        ``make(folder) -> path`` of a good file, or of a folder of files.
    load : callable
        ``load(path)``: what a reader makes of it.
    exact : bool
        Whether damage must be noticed: what is loaded is what was saved, or it is refused.
    """

    name: str
    make: Callable[[Path], Path]
    load: Callable[[Path], Any]
    exact: bool = True


def _points() -> Tensor:
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


def _make_plan(folder: Path) -> Path:
    from couplings import semidiscrete

    semidiscrete.fit(_points(), steps=4, batch_size=8, tolerance=1e9).save(folder / "plan.safetensors")
    return folder / "plan.safetensors"


def _load_plan(path: Path) -> Any:
    from couplings.semidiscrete import Semidiscrete

    plan = Semidiscrete.load(path, _points())
    return plan.potentials.tolist(), plan.chi2, plan.mirrored, plan.assign(_points()).tolist()


def _make_fit(folder: Path) -> Path:
    from couplings import semidiscrete

    semidiscrete.fit(_points(), steps=4, batch_size=8, tolerance=1e9, checkpoint=folder / "fit.safetensors")
    return folder / "fit.safetensors"


def _load_fit(path: Path) -> Any:
    from couplings import semidiscrete

    plan = semidiscrete.fit(_points(), steps=4, batch_size=8, tolerance=1e9, checkpoint=path)
    return plan.potentials.tolist(), plan.chi2


def _make_pairs(folder: Path) -> Path:
    from couplings.persistent import Pairs

    with Pairs.open(folder / "pairs", rows=8, seeds=2) as pairs:
        drawn = pairs.draw(torch.arange(4))
        pairs.keep(drawn, drawn.seeds.flip(0))
    return folder / "pairs"


def _load_pairs(path: Path) -> Any:
    from couplings.persistent import Pairs

    with Pairs.open(path, rows=8, seeds=2) as pairs:
        pairs.draw(torch.arange(8))
        return sorted(pairs.state_dict()["seeds"].flatten().tolist())  # each once, wherever they are


def _make_checkpoint(folder: Path) -> Path:
    from integrations import checkpoint

    tensors = {"model": {"weight": _points()}, "optimizer": {"0.exp_avg": _points()}}
    state = {"optimizer": {"scalars": {"0.step": 3.0}, "param_groups": [{"lr": 1e-3}]}, "coupling": {"number": 4}}
    return checkpoint.save(folder, 7, tensors, state, {"recipe.yaml": "objective: ddim\n"})


def _load_checkpoint(path: Path) -> Any:
    from integrations import checkpoint

    found = checkpoint.read(path)
    tensors = {name: found.tensors(name) for name in ("model", "optimizer")}
    content = {name: {key: value.tolist() for key, value in group.items()} for name, group in tensors.items()}
    return found.step, {key: found.state[key] for key in ("optimizer", "coupling")}, content


def _make_records(folder: Path) -> Path:
    with (RESULTS / "ablation.jsonl").open() as file:
        lines = list(file)
    (folder / "records.jsonl").write_text("".join([lines[0], *lines[5:13]]))
    return folder / "records.jsonl"


def _load_records(path: Path) -> Any:
    from couplings.ablation.records import Log
    from couplings.ablation.report import write

    write([path], path.with_name("page.html"), force=True)
    with Log(path) as log:
        log.add({"task": "quality"})


def _make_array(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from couplings.ablation.files import write_arrays

        write_arrays(folder / f"arrays{suffix}", {"noise": _points()})
        return folder / f"arrays{suffix}"

    return make


def _load_array(path: Path) -> Any:
    from couplings.ablation.files import read_array, read_classes, read_dataset

    read_classes(str(path))
    data = read_dataset(str(path))
    return data.shape, data.tobytes() if isinstance(data, np.ndarray) else data.dtype, read_array(str(path)).shape


SUBJECTS = (
    Subject("plan", _make_plan, _load_plan),
    Subject("checkpoint of a fit", _make_fit, _load_fit),
    Subject("pairs", _make_pairs, _load_pairs),
    Subject("checkpoint of a trainer", _make_checkpoint, _load_checkpoint),
    # Lines of text, and arrays, have no checksums: a changed digit is another digit.
    Subject("records", _make_records, _load_records, exact=False),
    *(Subject(f"array{suffix}", _make_array(suffix), _load_array, exact=False) for suffix in (".npy", ".npz", ".pt")),
    Subject("array.safetensors", _make_array(".safetensors"), _load_array, exact=False),
)


def judge_file(seed: int, subjects: tuple[Subject, ...] = SUBJECTS) -> Verdict:
    """Damage file number `seed`, and load it."""
    rng = np.random.default_rng(seed)
    subject = subjects[rng.integers(len(subjects))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = subject.make(folder)
        files = sorted(path for path in (made.rglob("*") if made.is_dir() else [made]) if path.is_file())
        expected = subject.load(made)
        if not made.is_dir():  # loading may have written to it
            made.unlink()
            made = subject.make(folder)
        damaged = files[rng.integers(len(files))]
        others = payloads(folder / EXECUTED) | {"folder": b"", "file of another kind": b"{}\n"}
        how, content = damage(damaged.read_bytes(), rng, others)
        if how == "a folder in its place":
            damaged.unlink()
            damaged.mkdir()
        else:
            damaged.write_bytes(content)
        told = f"{subject.name} ({damaged.name}), {how}"
        kind, what = _attempt(lambda: subject.load(made), folder)
        if kind == "lost":
            return kind, f"{told}: {what}"
        if kind == "right" and subject.exact and what != repr(expected):
            return "lost", f"{told}: loaded, and it is not what was saved"
        return (kind, subject.name) if kind == "refused" else (kind, "")


def _attempt(act: Callable[[], Any], folder: Path) -> Verdict:
    """Do something with what may be damaged, and say what came of it."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            verdict = "right", repr(act())
    except Exception as error:
        wrong = undocumented(error, (OSError,))
        verdict = ("lost", wrong) if wrong else ("refused", str(error))
    except SystemExit as stop:
        verdict = "lost", f"it left by SystemExit {stop.code}: {errors.getvalue()[-200:]}"
    if (folder / EXECUTED).exists():
        return "lost", "code in it was executed"
    if "Traceback" in errors.getvalue():
        return "lost", f"a traceback: {errors.getvalue()[-200:]}"
    return verdict


def damaged_files(share: float) -> Outcome:
    """Damage the first of 10,000 files."""
    return judged(judge_file, range(sized(FILES, share)), PATIENCE)


# --- recipes

JUNK = (
    "",
    "null",
    "-1",
    "0",
    ".nan",
    ".inf",
    "1e400",
    "yes",
    "[1, 2]",
    "{a: 1}",
    "'",
    "\t",
    "é",
    "!!binary x",
    "&a",
    "*a",
)
FIELDS = (
    *("--train.steps", "--coupling.method", "--coupling.options.reg", "--model.width", "--model", "--data.source"),
    *("--train", "--steps", "--overlay", "--resume", "--output", "--evaluate.steps", "--recipe"),
)
PYTHON = (
    "!!python/object/apply:os.mkdir [{marker}]",
    "!!python/object/new:os.mkdir [{marker}]",
    "{{class_path: os.mkdir, init_args: {{path: {marker}}}}}",
    "{{class_path: pathlib.Path.mkdir, init_args: {{self: {marker}}}}}",
)


def _value(rng: Any, marker: Path) -> str:
    """Draw what may stand in the place of a value: half of it makes a file if it is executed."""
    if rng.random() < 0.5:
        return PYTHON[rng.integers(len(PYTHON))].format(marker=marker)
    return JUNK[rng.integers(len(JUNK))]


def mutated(text: str, rng: Any, marker: Path) -> str:
    """Mutate a recipe in one to three places."""
    lines = text.splitlines()
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(lines))) if lines else 0
        line = lines[at] if lines else ""
        key = line.partition(":")[0]
        value = _value(rng, marker)
        ways: tuple[Callable[[], list[str]], ...] = (
            list,
            lambda line=line: [line, line],
            lambda line=line: [f"  {line}"],
            lambda line=line: [line.lstrip()],
            lambda line=line: [line.replace(":", "", 1)],
            lambda line=line: [_flipped(line.encode(), rng, 1).decode(errors="replace")],
            lambda key=key, value=value: [f"{key}: {value}"],
            lambda key=key, value=value: [f"{key}: {value}"],
            lambda key=key, value=value: [f"{key}: {value}"],
            lambda line=line, key=key: [line, f"{key}x: 3"],
            lambda value=value: [value],
            lambda line=line: [line.upper()],
            lambda line=line: [line[: len(line) // 2]],
        )
        lines[at : at + 1] = ways[rng.integers(len(ways))]()
    return "\n".join(lines) + "\n"


def judge_recipe(seed: int) -> Verdict:
    """Mutate recipe number `seed`, or what overrides it, and read it."""
    from integrations import config

    rng = np.random.default_rng(seed)
    recipes = sorted(config.RECIPES.glob("*.yaml"))
    source = recipes[rng.integers(len(recipes))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        marker, path = folder / EXECUTED, folder / "recipe.yaml"
        path.write_text(source.read_text())
        command: list[str] = []
        if rng.random() < 0.7:
            path.write_text(mutated(source.read_text(), rng, marker))
        elif rng.random() < 0.3:
            path.write_bytes(damage(source.read_bytes(), rng, payloads(marker))[1])
        else:
            fields = (
                "--train.steps",
                "--coupling.method",
                "--model.width",
                "--data.source",
                "--train",
                "--steps",
                "--overlay",
            )
            for _ in range(rng.integers(1, 3)):
                values = [*JUNK, *(each.format(marker=marker) for each in PYTHON)]
                command += [fields[rng.integers(len(fields))], values[rng.integers(len(values))]][: rng.integers(1, 3)]

        kind, what = _attempt(lambda: config.load([str(path), *command]), folder)
        told = f"{source.name} {' '.join(command) if command else path.read_bytes()[:2000]!r}"
        return (kind, f"{what}; {told}") if kind == "lost" else (kind, "")


def mutated_recipes(share: float) -> Outcome:
    """Read the first of 2,000 mutated recipes."""
    return judged(judge_recipe, range(sized(RECIPES, share)), PATIENCE)


# --- command lines

# Small enough for a second each. What starts processes for minutes is listed only.
LINES = (
    "methods",
    "methods s* --json",
    "env --json",
    "couple data.npy noise.npy -o out.npz",
    "couple data.npy noise.npy -o out.npy --method sinkhorn:reg=0.5 --seed 3",
    "couple data.npy noise.npy -o out.safetensors --metric l1 --quantize int8 --force",
    "couple data.npz:data noise.npy -o out.pt --condition classes.npy",
    "couple data.npy noise.npy -o out.npz --method nearest:score=dot",
    "compare data.npy noise.npy --methods independent,greedy --metrics l2 --quantizers none,fp16 --repeats 1",
    "compare data.npy --methods auction --repeats 1 --json -n 8",
    "ablate --list --n 8,16 --methods auction,sinkhorn:reg=0.1 --seeds 2",
    "ablate grid.yaml --list",
    "report records.jsonl --markdown page.md",
    "fit data.npy -o plan.safetensors --steps 2 --batch-size 8 --tolerance 1000",
    "fit data.npy -o plan.safetensors --classes classes.npy --steps 2 --batch-size 8 --mirrored --json",
    "--version",
    "--help",
    "couple --help",
)
WORDS = (
    *(
        "",
        "-",
        "--",
        "-1",
        "0",
        "nan",
        "1e9",
        "99999999999999999999",
        "a:b:c",
        ":",
        ",",
        "=",
        "é",
        "\ud800",
        "x" * 5000,
    ),
    *(".", "/", "missing.npy", "data.npy", "noise.npy", "bad.npy", "bad.pt", "bad.npz", "records.jsonl", "--force"),
    *(
        "--json",
        "--help",
        "--traceback",
        "auction",
        "l2",
        "sinkhorn:reg=nan",
        "sinkhorn:reg=",
        "nearest:k=0",
        "cuda",
        "meta",
    ),
)


def command_line(rng: Any) -> list[str]:
    """Draw a command line, and mutate it."""
    words = LINES[rng.integers(len(LINES))].split()
    for _ in range(rng.integers(0, 4)):
        at, word = int(rng.integers(len(words) + 1)), WORDS[rng.integers(len(WORDS))]
        before, here, after = words[:at], words[at : at + 1], words[at + 1 :]
        near = _flipped("".join(here).encode(errors="replace"), rng, 1).decode(errors="replace")
        ways = ([], [word], [word, *here], here * 2, [near])
        words = [*before, *ways[rng.integers(len(ways))], *after]
    # A run that takes as long as was asked for is no loss.
    words += ["--steps", "2"] if "fit" in words and "--steps" not in words else []
    return [*words, "--list"] if "ablate" in words and "--list" not in words else words


def _make_inputs(folder: Path) -> None:
    rows = _points().numpy()
    np.save(folder / "data.npy", rows)
    np.save(folder / "noise.npy", rows[::-1])
    np.save(folder / "classes.npy", np.arange(16) % 2)
    np.savez(folder / "data.npz", data=rows, other=rows)
    for suffix, kind in ((".npy", "npy"), (".npz", "npz"), (".pt", "pt")):
        (folder / f"bad{suffix}").write_bytes(payloads(folder / EXECUTED)[kind])
    _make_records(folder)
    (folder / "grid.yaml").write_text(json.dumps({"methods": ["auction"], "n": [8]}))


def judge_command(seed: int) -> Verdict:
    """Run command line number `seed`."""
    from couplings import cli

    rng = np.random.default_rng(seed)
    words = command_line(rng)
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        _make_inputs(folder)
        kept = {path.name: path.read_bytes() for path in folder.iterdir()}
        output, errors = io.StringIO(), io.StringIO()
        told = f"couplings {' '.join(words)!r:.300}"
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                code = cli.main(words)
        except SystemExit as stop:
            return "lost", f"{told}: SystemExit {stop.code}"
        except Exception as error:
            return "lost", f"{told}: {type(error).__name__}: {str(error)[:200]}"
        said = errors.getvalue()
        if (folder / EXECUTED).exists():
            return "lost", f"{told}: code in a file was executed"
        if code == 2 and "--traceback" not in words and (said.count("\n") != 1 or "couplings: error: " not in said):
            return "lost", f"{told}: exit code 2 with {said[:300]!r}"
        if code not in (0, 1, 2) or (code == 0 and "Traceback" in said):
            return "lost", f"{told}: exit code {code} with {said[:300]!r}"
        changed = [
            n for n, content in kept.items() if not (folder / n).is_file() or (folder / n).read_bytes() != content
        ]
        if changed and "--force" not in words and "page.md" not in words:
            return "lost", f"{told}: it changed {changed}"
        return ("refused", "") if code else ("right", "")


def mutated_commands(share: float) -> Outcome:
    """Run the first of 2,000 mutated command lines."""
    return judged(judge_command, range(sized(COMMANDS, share)), PATIENCE)


PARTS = {"damaged": damaged_files, "recipes": mutated_recipes, "commands": mutated_commands}
