"""How the kernels are compiled: no GIL, cached on disk, never `parallel=True`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.sigutils import normalize_signature

__all__ = ["jit"]

logger = logging.getLogger(__name__)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Compile `function` on first use, without the GIL, and keep the machine code on disk.

    Numba caches beside the source, or in the user's cache folder when that is read-only; set ``NUMBA_CACHE_DIR`` to
    name a folder. A cache that cannot be read or written costs time, never an exception: the kernel is compiled anew,
    and the log says so once. `options` go to `numba.njit`.
    """
    if function is None:
        return lambda f: jit(f, **options)
    compiled: Any = numba.njit(**{"nogil": True, "error_model": "numpy", **options})(function)
    try:
        compiled._cache = _ForgivingCache(function)  # what `cache=True` does
    except RuntimeError as error:  # no folder can be written to
        _log_once(str(error))
    kernel: Callable[..., Any] = compiled
    return kernel


class _ForgivingCache(FunctionCache):  # type: ignore[misc]
    """A cache of which a damaged file is compiled anew and replaced, and a full disk is left alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        # Numba looks at a kernel's own file alone, but what it calls in other files is compiled into it.
        self._cache_file._source_stamp = (self._cache_file._source_stamp, _sources())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
            # Processes that compile different types at once may write over each other's files.
            if found is not None and tuple(found.signature.args) != tuple(normalize_signature(sig)[0]):
                msg = "machine code for other types"
                raise ValueError(msg)
        except Exception as error:  # unpickling what is left of a file may raise anything
            _log_once(f"{type(error).__name__}: {error} in {self.cache_path}")
            with contextlib.suppress(OSError):
                self.flush()
            return None
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _log_once(f"{type(error).__name__}: {error} in {self.cache_path}")


@cache
def _sources() -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of every file of kernels."""
    folder = Path(__file__).parent
    found = ((path, path.stat()) for path in sorted(folder.rglob("*.py")))
    return tuple((str(path.relative_to(folder)), status.st_mtime_ns, status.st_size) for path, status in found)


_logged: list[str] = []


def _log_once(reason: str) -> None:
    if not _logged:
        _logged.append(reason)
        logger.warning(
            "machine code is not kept on disk (%s): what is missing is compiled anew. Set NUMBA_CACHE_DIR to a folder.",
            reason,
        )
