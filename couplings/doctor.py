"""What `couplings doctor` finds: what is installed and compiled, how fast this machine couples, and what to write."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import couplings
from couplings._openmp import one_thread
from couplings.ablation import environment
from couplings.stages import recorded

__all__ = ["Speed", "advise", "kernels", "lines", "measure", "report"]

_INLINE = 0.01  # of a step, up to which a coupling is not worth hiding
_FEW_ROWS = 128  # below which a batch alone is a small pool
_LARGE_POOL = 2048  # rows beyond which the pool of a window is not made larger
_ROUNDS = 3
_SECONDS = 1.0  # after which a call is not timed again


@dataclass(frozen=True)
class Speed:
    """Milliseconds on this machine, of batches of one size.

    Attributes
    ----------
    batch : int
        Rows.
    shape : tuple of int
        Of a row.
    device : str
    couple : float
        A call of `couple`.
    product : float
        The cost matrix in it: one matrix product.
    step : float
        The stand-in for a training step: matrix products on the device that take about as long as was asked.
    inline, ahead : float
        What the step takes longer with the coupling inside it, and with the next batch's behind it (`submit`).
    windows : dict of int to float
        A call of `couple` on so many batches at once.
    """

    batch: int
    shape: tuple[int, ...]
    device: str
    couple: float
    product: float
    step: float
    inline: float
    ahead: float
    windows: dict[int, float]


def report(batch: int, shape: tuple[int, ...], device: str, step: float) -> dict[str, Any]:
    """Return all that the command shows, as plain values.

    Parameters
    ----------
    batch : int
        Rows of a batch.
    shape : tuple of int
        Of a row.
    device : str
    step : float
        Milliseconds of the training step that the coupling is to be hidden behind.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    described = environment.describe()
    extras: dict[str, list[str]] = {}
    for package, found in described["optional"].items():
        for extra in found["extras"]:
            missing = extras.setdefault(extra, [])
            if found["version"] is None:
                missing.append(package)
    compiled = kernels()
    speed = measure(batch, shape, device, step)
    write, window, why = advise(speed)
    return {
        "environment": described,
        "load": load,
        "extras": {extra: {"installed": not missing, "missing": missing} for extra, missing in sorted(extras.items())},
        "kernels": compiled,
        "speed": asdict(speed) | {"shape": list(shape)},
        "advice": {"write": write, "window": window, "why": why, "code": code(write, window)},
    }


def kernels() -> dict[str, Any]:
    """Compile every kernel or load it from its cache.

    Returns
    -------
    dict
        ``seconds`` that it took, ``folder`` of the cache (None if machine code is not kept), and of the signatures in
        memory ``loaded`` (from the cache) and ``compiled`` (in this process), by kernel.
    """
    from importlib import import_module
    from pkgutil import walk_packages

    from numba.core.dispatcher import Dispatcher

    import couplings.kernels as package

    seconds = couplings.warmup()
    found: dict[str, Any] = {}
    for info in walk_packages(package.__path__, f"{package.__name__}."):
        for value in vars(import_module(info.name)).values():
            if isinstance(value, Dispatcher):
                found[f"{value.py_func.__module__.removeprefix('couplings.kernels.')}.{value.py_func.__name__}"] = value
    loaded = {name: sum(each.stats.cache_hits.values()) for name, each in found.items()}
    compiled = {name: sum(each.stats.cache_misses.values()) for name, each in found.items()}
    return {
        "seconds": seconds,
        "folder": next((str(each.stats.cache_path) for each in found.values() if each.stats.cache_path), None),
        "loaded": {name: count for name, count in sorted(loaded.items()) if count},
        "compiled": {name: count for name, count in sorted(compiled.items()) if count},
    }


def measure(batch: int, shape: tuple[int, ...], device: str, step: float) -> Speed:
    """Time couplings of synthetic images, alone and in a stand-in for a training step."""
    where = torch.device(device)
    generator = torch.Generator(where).manual_seed(0)
    sizes = [2**k for k in range(1, 12) if 2**k * batch <= _LARGE_POOL]
    data = _images(batch * max([1, *sizes]), shape, generator)
    noise = torch.randn(data.shape, generator=generator, device=where)
    x, z = data[:batch], noise[:batch]
    coupling = couplings.Coupling()
    once = _milliseconds(lambda: coupling(x, z), where)
    product = min(_cost(coupling, x, z) for _ in range(5))
    work = _step(step, where)

    def inline() -> None:
        coupling(x, z)
        work()

    pending = coupling.submit(x, z)

    def ahead() -> None:
        nonlocal pending
        pending.result()
        pending = coupling.submit(x, z)
        work()

    # In turn, so that what else the machine does meets all three alike.
    times: dict[Callable[[], None], list[float]] = {work: [], inline: [], ahead: []}
    for _ in range(_ROUNDS):
        for call, found in times.items():
            found.append(_milliseconds(call, where, rounds=1))
    alone, within, behind = map(min, times.values())
    pending.result()
    windows = {k: _milliseconds(partial(coupling, data[: k * batch], noise[: k * batch]), where) for k in sizes}
    return Speed(
        batch, shape, device, once, product, alone, max(0.0, within - alone), max(0.0, behind - alone), windows
    )


def advise(speed: Speed) -> tuple[str, int, str]:
    """Choose what to write in the training loop.

    Returns
    -------
    str
        ``"inline"``, ``"submit"`` or ``"lookahead"``.
    int
        Batches of a window of `lookahead`, should the pool be larger than the batch: as many as are coupled in half of
        the time that their steps take, up to 2,048 rows.
    str
        Why.
    """
    hidden = [k for k, ms in speed.windows.items() if ms <= k * speed.step / 2]
    window = max(hidden, default=1)
    if speed.batch < _FEW_ROWS and window > 1:
        return "lookahead", window, f"{speed.batch} rows leave little to choose from; a window is a larger pool"
    if speed.inline <= _INLINE * speed.step:
        return "inline", window, f"the coupling adds {speed.inline / speed.step:.1%} to a step of {speed.step:.0f} ms"
    added = f"it adds {speed.inline / speed.step:.1%} to a step inside it and {speed.ahead / speed.step:.1%} behind it"
    if speed.ahead < speed.inline:
        return "submit", window, added
    return "inline", window, f"{added}: this machine has no time to spare beside the step"


def code(write: str, window: int) -> str:
    """Return the lines to write in a training loop."""
    return {
        "inline": "noise = couple(images, noise).noise",
        "submit": "pending = coupling.submit(next_images, next_noise)  # before this batch's step\n"
        "...\n"
        "noise = pending.result().noise  # after it",
        "lookahead": f"for images, noise in lookahead(loader, Coupling(), window={window}):",
    }[write]


def lines(found: dict[str, Any]) -> list[str]:
    """Lay out what `report` returns as plain lines."""
    machine, compiled, speed, advice = (found[name] for name in ("environment", "kernels", "speed", "advice"))
    rows, shape = speed["batch"], "x".join(map(str, speed["shape"]))
    kept = compiled["folder"] or "nowhere: set NUMBA_CACHE_DIR to a folder"
    count = {name: sum(compiled[name].values()) for name in ("loaded", "compiled")}
    said = [
        "Installed",
        f"  couplings {machine['couplings']}, {', '.join(f'{k} {v}' for k, v in machine['packages'].items())}",
        f"  python {machine['python']}",
        f"  {machine['cpu']}, {machine['cpus']} processors, {machine['threads']} threads of torch",
        *(f"  {device['name']}, {device['gigabytes']} GB" for device in machine["devices"]),
    ]
    for extra, each in found["extras"].items():
        missing = f"without {', '.join(each['missing'])}: pip install 'couplings[{extra}]'"
        said.append(f"  {extra:<9} {'complete' if each['installed'] else missing}")
    busy = found["load"] is not None and found["load"] > machine["cpus"] / 2
    said += [
        "Kernels",
        f"  {count['loaded']} loaded from the cache, {count['compiled']} compiled now, in {compiled['seconds']:.1f} s",
        f"  kept in {kept}",
        f"Speed, {rows} rows of {shape} on {speed['device']}",
        *(
            [f"  other programs run here (load {found['load']:.1f}): times are longer than they could be"]
            if busy
            else []
        ),
        f"  couple()                       {speed['couple']:9.2f} ms, its matrix product {speed['product']:.2f} ms",
        f"  a step of {speed['step']:6.1f} ms, inside it  {speed['inline']:9.2f} ms longer",
        f"  the same, one step ahead       {speed['ahead']:9.2f} ms longer",
        *(f"  {k:>3} batches as one            {ms:9.2f} ms" for k, ms in speed["windows"].items()),
        "In your loop",
        f"  {advice['why']}:",
        "",
        *(f"    {line}" for line in advice["code"].splitlines()),
    ]
    if advice["write"] != "lookahead" and advice["window"] > 1:
        said += [
            "",
            f"  For a pool of {advice['window'] * rows} rows, coupled behind the steps:",
            "",
            f"    {code('lookahead', advice['window'])}",
        ]
    return said


def _images(rows: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw rows whose variance lies in few directions, as that of images does."""
    values = math.prod(shape)
    directions = min(values, 64)
    scale = 1.0 / torch.arange(1, directions + 1, device=generator.device)
    parts = torch.randn(rows, directions, generator=generator, device=generator.device) * scale
    basis = torch.randn(directions, values, generator=generator, device=generator.device)
    return (parts @ basis).reshape(rows, *shape)


def _step(milliseconds: float, device: torch.device) -> Callable[[], None]:
    """Return matrix products that take about so long on a device."""
    side = 1024 if device.type == "cuda" else 512
    factor = torch.full((side, side), 1.0 / side, device=device)

    def products(count: int) -> None:
        value = factor
        for _ in range(count):
            value = value @ factor

    # First on one thread, which does not wait for cores that others have; more where several threads are faster.
    with one_thread():
        one = _milliseconds(lambda: products(1), device, calls=2)
    count = max(1, round(milliseconds / one))
    found = _milliseconds(lambda: products(count), device, calls=1)
    count = max(1, round(count * max(1.0, milliseconds / found)))
    return lambda: products(count)


def _milliseconds(call: Callable[[], object], device: torch.device, calls: int = 5, rounds: int = 3) -> float:
    """Time of a call among several that follow each other, as they do in a loop: the least of a few rounds.

    What other programs take of the machine can only make a round longer.
    """
    call()
    times: list[float] = []
    begun = time.perf_counter()
    while not times or (len(times) < rounds and time.perf_counter() - begun < _SECONDS):
        _wait(device)
        start, done = time.perf_counter(), 0
        while done < calls and time.perf_counter() - start < _SECONDS:
            call()
            done += 1
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start) / done)
    return min(times)


def _cost(coupling: couplings.Coupling, x: Tensor, z: Tensor) -> float:
    from torch.utils.benchmark import timer  # waits for a GPU

    with recorded(timer) as record:
        coupling(x, z)
    return 1e3 * record.seconds["cost"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
