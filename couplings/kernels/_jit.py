"""How the kernels are compiled: no GIL, cached on disk, never `parallel=True`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

__all__ = ["jit"]

log = logging.getLogger(__name__)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Compile `function` on first use, without the GIL, and keep the machine code on disk.

    Numba caches beside the source, or in the user's cache folder when that is read-only. Where it can write to
    neither it refuses to decorate; the kernel is then compiled once per process instead, and the log says so.
    Set ``NUMBA_CACHE_DIR`` to name a folder. `options` go to `numba.njit`.
    """
    if function is None:
        return lambda f: jit(f, **options)
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError as error:
        log.info("no disk cache for %s (%s): compiled anew in every process", function.__name__, error)
        compiled = numba.njit(cache=False, **options)(function)
    return compiled
