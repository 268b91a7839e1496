"""The most memory that a call takes beyond what was there before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["peak_bytes"]

_STATUS = Path("/proc/self/status")
_FORGET = Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Run a call and measure the memory of the device, or of the process, at its highest point.

    Parameters
    ----------
    call : callable
        Its result is dropped.
    device : str

    Returns
    -------
    int or None
        Bytes; None where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with suppress(AttributeError, OSError):  # where malloc is not glibc's
        ctypes.CDLL(None).malloc_trim(0)  # or the call would be given, unseen, what others left behind
    try:
        _FORGET.write_text("5")  # the highest point so far
        before = _kilobytes("VmRSS")
    except OSError:
        return None
    call()
    return 1024 * max(0, _kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))
