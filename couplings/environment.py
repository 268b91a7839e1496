"""What couplings runs on: versions, processor, devices; what people paste into a report of a bug."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import couplings

__all__ = ["describe", "missing_packages"]

_REQUIRED = ("torch", "numba", "numpy", "scipy", "rich", "safetensors")

# Import names of packages that methods need, where they differ from the name to install.
_MODULES = {"pot": "ot"}


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


def missing_packages(extra: str) -> list[str]:
    """List the packages of a method's extra that cannot be imported here.

    Parameters
    ----------
    extra : str
        One of `MethodInfo.requires`, such as ``"pot"``.

    Returns
    -------
    list of str
        Their names as they are installed by.
    """
    return [
        package
        for package in _extras().get(extra, [extra])
        if find_spec(_MODULES.get(package.lower(), package)) is None
    ]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Collect what a report of a bug needs.

    Returns
    -------
    dict
        Plain values: ``couplings``, ``commit`` (of the checkout it is run from, or None), ``python``, ``platform``,
        ``packages`` (name to version), ``optional`` (name to ``version``, None if absent, and the ``extras`` that
        bring it), ``cpu``, ``cpus``, ``threads``, ``cuda``, ``devices`` and ``kernel_cache``.

    Notes
    -----
    Imports Numba, and starts CUDA where there is a device.
    """
    brings: dict[str, list[str]] = {}
    for extra, packages in _extras().items():
        if extra not in ("all", "test"):
            for package in packages:
                brings.setdefault(package, []).append(extra)
    return {
        "couplings": couplings.__version__,
        "commit": commit(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {package: _installed(package) for package in _REQUIRED},
        "optional": {
            package: {"version": _installed(package), "extras": extras}
            for package, extras in sorted(brings.items(), key=lambda item: item[0].lower())
        },
        "cpu": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cpus": _cpus(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "kernel_cache": _kernel_cache(),
    }


def commit() -> str | None:
    """Short hash of the checkout that the library is imported from, with "+" if its files were changed since.

    Returns
    -------
    str or None
        None if it is installed, or git is not.
    """
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
    except (OSError, subprocess.SubprocessError):
        return None


def _cpus() -> int:
    """Processors that this process may use, which a container or a scheduler can make fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        # `platform.processor` gives no model on Linux.
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _device(i: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(i)
    return {
        "name": properties.name,
        "gigabytes": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def _kernel_cache() -> str | None:
    """Folder where Numba keeps the compiled kernels; None if it can write to none."""
    from couplings.kernels.assignment import costs

    kernel: Any = costs.minimum
    folder = kernel.stats.cache_path
    return str(folder) if folder else None
