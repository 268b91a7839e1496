"""What coupling costs on a GPU, in under five minutes: ``python -m benchmarks.device``.

Whole calls and where their time goes, waits of the host, a training step with coupling inline and ahead, a
dataset-level coupling, and why the solver takes what it takes on this host. Every part has a limit of time, and its
records are written as they come: ``results/device-NAME.jsonl``, with a page of tables beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import ahead, fit, host
from .record import PACKAGES, RESULTS, Record, append, environment, markdown, new_page, provenance, read

SIZES = (128, 512, 1024, 2048, 4096, 8192)
PARTS = ("calls", "waits", "steps", "dataset", "host")
COPY = "conversion"  # the stage in which costs are copied to the host


# -- whole calls


def _batch(n: int, device: Any) -> tuple[Any, Any]:
    import torch

    from .instances import photo_crops

    data = torch.from_numpy(photo_crops(n, np.random.default_rng(n))).to(device)
    return data, torch.randn(data.shape, generator=torch.Generator(device).manual_seed(n), device=device)


def _trainer(data: Any, noise: Any) -> Any:
    """Do what trainers do by themselves: distances on the device, scipy on the host."""
    import torch
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(data.flatten(1), noise.flatten(1)).square_().cpu().numpy()
    _, index = linear_sum_assignment(cost)
    return noise[torch.from_numpy(index).to(noise.device)]


def _torchcfm(data: Any, noise: Any) -> Any:
    from torchcfm.optimal_transport import OTPlanSampler

    return OTPlanSampler(method="exact").sample_plan(data, noise)


def _calls(data: Any, noise: Any) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name what is called, and up to which size."""
    import torch

    from couplings import couple

    n = len(data)
    labels = torch.arange(n, device=data.device) % 10
    bound: dict[str, tuple[Callable[[], Any], int]] = {
        "couple": (partial(couple, data, noise), 1 << 20),
        "couple, l2 and fp16": (partial(couple, data, noise, metric="l2", quantize="fp16"), 1 << 20),
        "couple, 10 classes": (partial(couple, data, noise, condition=labels), 1 << 20),
        "couple, sinkhorn": (partial(couple, data, noise, "sinkhorn"), 4096),
        "couple, sliced": (partial(couple, data, noise, "sliced"), 1 << 20),
        "couple, independent": (partial(couple, data, noise, "independent"), 1 << 20),
        "cdist + scipy": (partial(_trainer, data, noise), 1024),
        "TorchCFM": (partial(_torchcfm, data, noise), 1024),
    }
    return bound


def calls(device: Any, sizes: tuple[int, ...], seconds: float, end: float) -> Iterator[Record]:
    """Time calls from tensors on the device to tensors on the device, all of its work included."""
    from torch.utils.benchmark.utils.timer import timer  # waits for the device

    from couplings.stages import recorded

    for n in sizes:
        data, noise = _batch(n, device)
        for name, (call, largest) in _calls(data, noise).items():
            if n > largest or time.perf_counter() > end:
                continue
            record = {"task": "calls", "n": n, "contender": name}
            try:
                call()
            except Exception as error:  # the other calls go on
                status = "absent" if isinstance(error, ImportError) else "failed"
                yield record | {"status": status, "note": f"{type(error).__name__}: {error}"[:300]}
                continue
            taken = []
            stop = timer() + seconds
            while not taken or (timer() < stop and len(taken) < 21):
                start = timer()
                call()
                taken.append(timer() - start)
            if name.startswith("couple"):
                parts = []
                for _ in range(min(3, len(taken))):
                    with recorded(timer) as spent:
                        call()
                    parts.append(spent.seconds)
                record["stages"] = {key: statistics.median(part[key] for part in parts) for key in parts[0]}
            quartiles = np.quantile(taken, (0.25, 0.75)).tolist()
            yield record | {
                "status": "ok",
                "median": statistics.median(taken),
                "quartiles": quartiles,
                "runs": len(taken),
            }


def waits(device: Any, n: int = 256) -> Iterator[Record]:
    """Count how often the host waits for the device in one call."""
    from .waits import counted

    data, noise = _batch(n, device)
    for name, (call, largest) in _calls(data, noise).items():
        if not name.startswith("couple") or n > largest:
            continue
        call()
        with counted() as found:
            call()
        yield {"task": "waits", "n": n, "contender": name, "status": "ok", "waits": len(found)}


# -- a training step


def steps(
    device: Any, sizes: tuple[int, ...], rounds: int, seconds: float, end: float, **network: Any
) -> Iterator[Record]:
    """Time a training step with coupling inline and ahead; each batch is coupled by itself."""
    for n in sizes:
        if time.perf_counter() > end:
            return
        step = ahead.gpu_step(n, n, device, **network)
        for record in ahead.compare(step, rounds=rounds, seconds=seconds):
            yield {**record, "status": "ok"}


# -- a dataset


def clustered_rows(rows: int, device: Any) -> Any:
    """Make rows in clusters, of 3x32x32 values that vary slowly from pixel to pixel, as images do."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(100, 3, 8, 8, generator=generator, device=device)
    made = torch.empty(rows, 3, 32, 32, device=device)
    for start in range(0, rows, 5000):
        part = made[start : start + 5000]
        near = torch.randn(len(part), 3, 8, 8, generator=generator, device=device)
        which = torch.randint(100, (len(part),), generator=generator, device=device)
        part[:] = interpolate(0.35 * centres[which] + 0.35 * near, size=32, mode="bilinear")
        part += 0.1 * torch.randn(part.shape, generator=generator, device=device)
    return made.clamp_(-1, 1)


# -- tables


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def calls_table(records: list[Record]) -> str:
    """Lay out the milliseconds of calls by size."""
    found = {(r["contender"], r["n"]): r for r in records if r["task"] == "calls"}
    names = list(dict.fromkeys(name for name, _ in found))
    rows = []
    for n in sorted({n for _, n in found}):
        stages = found.get(("couple", n), {}).get("stages", {})
        each = [found.get((name, n), {}) for name in names]
        cells = [_ms(record["median"]) if record.get("status") == "ok" else "" for record in each]
        parts = [_ms(stages[key]) if key in stages else "" for key in ("cost", COPY, "solve")]
        rows.append([str(n), *cells[:1], *parts, *cells[1:]])
    return markdown(["n", *names[:1], "its cost", "its copy to the host", "its solve", *names[1:]], rows)


def waits_table(records: list[Record]) -> str:
    """Lay out the waits of the host in one call."""
    return markdown(["", "waits"], [[r["contender"], str(r["waits"])] for r in records if r["task"] == "waits"])


def host_table(records: list[Record]) -> str:
    """Lay out the times of the solver on this host, and what its processor does."""
    rows = []
    for record in records:
        for way in record.get("ways", ()) if record["task"] == "host-solve" else ():
            what = [record["contender"], way["state"], str(way["threads"])]
            rows.append([f"solve, n = {record['n']}", *what, f"{_ms(way['median'])} ms", str(way.get("faults", ""))])
        for name, value in record.items() if record["task"] == "host-machine" else ():
            if isinstance(value, float):
                rows.append(["processor", name, "", "", f"{value:.3g}", ""])
    return markdown(["", "", "", "threads", "", "page faults"], rows)


def processor_table(records: list[Record]) -> str:
    """Lay out the host's processor and what the kernels were compiled with."""
    (found,) = (r for r in records if r["task"] == "host-processor")
    rows = [line.split(": ", 1) for line in found.get("lscpu", ())]
    rows += [["compiled for", found["llvm"]["name"]], ["huge pages", str(found["huge pages"])]]
    rows += [[name, version] for name, version in found["versions"].items()]
    return markdown(["", ""], rows)


def place_table(records: list[Record]) -> str:
    """Lay out where this was measured."""
    gpu = next(record["gpu"] for record in records)
    return provenance(records) + "\n" + "\n".join(f"| {name} | {value} |" for name, value in gpu.items())


LAYOUTS: dict[str, tuple[str, Callable[[list[Record]], str]]] = {
    "place": ("Where", place_table),
    "calls": ("Calls: milliseconds from tensors on the device to tensors on the device", calls_table),
    "waits": ("Waits of the host in one call, n = 256", waits_table),
    "steps": ("What a training step takes more", ahead.steps_table),
    "dataset": ("A dataset-level coupling", fit.table),
    "host": ("The solver on this host", host_table),
    "processor": ("Its processor", processor_table),
}


def _layout(path: Path, key: str) -> str:
    return LAYOUTS[key][1](read(path))


COMMITTED = sorted(RESULTS.glob("device-*.jsonl"))
TABLES = {f"{path.stem}-{key}": partial(_layout, path, key) for path in COMMITTED for key in LAYOUTS}


def committed() -> list[Record]:
    """Return the records of all devices that are part of the repository."""
    return [record for path in COMMITTED for record in read(path)]


def page_of(path: Path) -> str:
    """Return a page for a record, with a table of every part that ran."""
    about = (
        f"Records: [{path.name}]({path.name}), by `python -m benchmarks.device`; the tables are written from them by\n"
        "`python -m benchmarks.tables`. Crops of photographs 3x32x32 against Gaussian noise, float32, on the device."
    )
    tables = []
    for key, (heading, _) in LAYOUTS.items():
        with contextlib.suppress(KeyError, StopIteration, ValueError):  # where that part did not run
            tables.append((heading, f"{path.stem}-{key}", _layout(path, key)))
    return new_page(f"Coupling on a GPU: {read(path)[0]['gpu']['device']}", about, tables)


# -- the whole


def _gpu(device: Any) -> dict[str, str]:
    import torch

    if device.type != "cuda":
        return {"device": device.type}
    about = torch.cuda.get_device_properties(device)
    memory = f"{about.total_memory / 2**30:.0f} GiB"
    return {"device": about.name, "device memory": memory, "cuda": str(torch.version.cuda)}


def main(argv: list[str] | None = None) -> int:
    """Measure, part by part."""
    import torch

    import couplings

    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", help="of the record; by default that of the device")
    parser.add_argument("--commit", help="of the library, where git cannot tell")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs; on a CPU too")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    device, quick = torch.device(arguments.device), arguments.quick
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick shows that the program runs")
    gpu = _gpu(device)
    name = arguments.name or re.sub(r"\W+", "-", gpu["device"].lower().removeprefix("nvidia ")).strip("-")
    path = arguments.output / f"device-{name}.jsonl"
    path.unlink(missing_ok=True)
    torch.backends.cudnn.benchmark = True
    place = environment(torch.get_num_threads(), None, (*PACKAGES, "diffusers"))
    if arguments.commit:
        place |= {"commit": arguments.commit, "kernels": arguments.commit}
    begun = time.perf_counter()
    couplings.warmup()

    def until(seconds: float) -> float:
        return time.perf_counter() + seconds

    def part(which: str) -> Iterator[Record]:
        if which == "host":
            sizes = (64,) if quick else (1024,)
            variants = ("as installed",) if quick else tuple(host.VARIANTS)
            return iter(host.measure(sizes, 0.01 if quick else 0.15, 45.0, variants))
        if which == "calls":
            return calls(device, (32,) if quick else SIZES, 0.01 if quick else 0.5, until(60.0))
        if which == "waits":
            return waits(device, 32 if quick else 256) if device.type == "cuda" else iter(())
        if which == "steps" and quick:
            return steps(device, (4,), 2, 0.01, until(60.0), channels=(32, 32))
        if which == "steps":
            return steps(device, (256, 512, 1024), 7, 0.5, until(60.0))
        return fit.measure(clustered_rows(64 if quick else 50_000, device), 40.0, 64 if quick else 4096)

    failed = False
    for which in arguments.only:
        start = time.perf_counter()
        try:
            for record in part(which):
                append(path, {**record, "gpu": gpu, "environment": place})
        except Exception:
            failed = True
            traceback.print_exc()
        taken, total = time.perf_counter() - start, time.perf_counter() - begun
        print(f"{which}: {taken:.1f} s ({total:.1f} s in all)", file=sys.stderr, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    records = read(path)
    for line in host.lines([record for record in records if record["task"].startswith("host")]):
        print(line)
    page = path.with_suffix(".md")
    page.write_text(page_of(path))
    print(page.read_text())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
