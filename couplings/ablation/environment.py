"""What couplings runs on: versions, processor, devices; for reports of bugs and for records."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import couplings
from couplings.assigners.registry import ENTRY_POINT_GROUP, find
from couplings.kernels import l1

__all__ = ["describe", "missing_packages", "plugin", "summary"]

_REQUIRED = ("torch", "numba", "numpy", "scipy")

# Import names of packages that methods need, where they differ from the name to install.
_MODULES = {"pot": "ot"}


def describe() -> dict[str, Any]:
    """Collect what a report of a bug needs.

    Returns
    -------
    dict
        Plain values: ``couplings``, ``commit`` (of the checkout it is run from, or None), ``python``, ``platform``,
        ``packages`` (name to version), ``optional`` (name to ``version``, None if absent, and the ``extras`` that
        bring it), ``cpu``, ``cpus``, ``threads``, ``cuda``, ``devices`` and ``kernel_cache``.
    """
    brought_by: dict[str, list[str]] = {}
    for extra, packages in _extras().items():
        if extra not in ("all", "test"):
            for package in packages:
                brought_by.setdefault(package, []).append(extra)
    kernel: Any = l1.tiles  # any of them: they are kept in the same folder
    return {
        "couplings": couplings.__version__,
        "commit": _commit(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {package: _installed(package) for package in _REQUIRED},
        "optional": {
            package: {"version": _installed(package), "extras": brought_by[package]}
            for package in sorted(brought_by, key=str.lower)
        },
        "cpu": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        # What this process may use, which a container or a scheduler can make less than there is.
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "kernel_cache": str(kernel.stats.cache_path) if kernel.stats.cache_path else None,
    }


def summary(threads: int | None) -> dict[str, Any]:
    """Describe what measurements run on, without folders and other private matters.

    `threads` are those of the processes that are timed; None for PyTorch's own choice.
    """
    described = describe()
    packages = {**described["packages"], **{name: each["version"] for name, each in described["optional"].items()}}
    return {
        **{name: described[name] for name in ("couplings", "commit", "platform", "cpu", "cpus", "devices")},
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "threads": threads or described["threads"],
        "packages": {name: version for name, version in packages.items() if version is not None},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def missing_packages(extra: str) -> list[str]:
    """List the packages of an extra such as ``"pot"`` that cannot be imported here, as they are named for pip."""
    packages = _extras().get(extra, [extra])
    return [package for package in packages if find_spec(_MODULES.get(package.lower(), package)) is None]


@cache
def plugin(method: str) -> dict[str, str | None] | None:
    """Say which package a method comes from, and in which version.

    Parameters
    ----------
    method : str
        Name, or ``package.module:function``.

    Returns
    -------
    dict or None
        ``package``, as it is named for pip, or the module that is on the path; ``version``; and ``source``, a digest of
        the file that holds the function, since a package under development keeps its version. None for built-in
        methods.
    """
    found = find(method)
    if found.builtin:
        return None
    module = inspect.getmodule(found.fn)
    name = module.__name__ if module is not None else type(found.fn).__module__
    top = name.partition(".")[0]
    entries = (each for each in entry_points(group=ENTRY_POINT_GROUP) if each.module.partition(".")[0] == top)
    named = next((each.dist.name for each in entries if each.dist is not None), None)
    package = named or next(iter(packages_distributions().get(top, ())), None)
    version = _installed(package) if package else getattr(sys.modules.get(top), "__version__", None)
    try:
        source = hashlib.sha256(Path(inspect.getfile(found.fn)).read_bytes()).hexdigest()[:12]
    except (TypeError, OSError):  # built into the interpreter, or typed into it
        source = None
    return {"package": package or name, "version": version, "source": source}


def _extras() -> dict[str, list[str]]:
    """Read which packages each extra brings, as the installed metadata says; nothing if there is none."""
    try:
        lines = requires("couplings") or []
    except PackageNotFoundError:  # run from a folder on the path, never installed
        return {}
    extras: dict[str, list[str]] = {}
    for line in lines:
        package = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", line)
        if package and extra and package[0] != "couplings":
            extras.setdefault(extra[1], []).append(package[0])
    return extras


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash of the checkout that the library is imported from, with "+" if its files were changed since."""
    folder = Path(couplings.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # A virtual environment may lie inside some other project's checkout.
        if not git("ls-files", "--", "__init__.py"):
            return None
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):  # installed, or without git
        return None


def _device(i: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(i)
    capability = f"{found.major}.{found.minor}"
    return {"name": found.name, "gigabytes": round(found.total_memory / 1e9, 1), "capability": capability}


def _cpu_name() -> str:
    try:
        # `platform.processor` gives no model on Linux.
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
