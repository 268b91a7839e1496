"""Small products on one thread, where waiting for a core that another process has would take far longer than they do.

torch runs its operations on OpenMP threads and waits at a barrier for the last of them. On a machine whose cores are
taken (by the workers that load data, say) that is a scheduler's time slice a barrier: tens of milliseconds for a
product that one thread does in two. How many threads OpenMP and MKL use is a setting of the calling thread
(``nthreads-var``, OpenMP 5.2, section 2; ``mkl_set_num_threads_local``): no other thread notices.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the calling thread's torch operations run on this thread alone; where that cannot be set, change nothing."""
    libraries = _libraries()
    if libraries is None or torch.get_num_threads() == 1:
        yield
        return
    set_openmp, set_mkl = libraries
    before = torch.get_num_threads()
    set_openmp(1)
    before_mkl = set_mkl(1)
    try:
        yield
    finally:
        set_openmp(before)
        set_mkl(before_mkl)


@lru_cache(maxsize=1)
def _libraries() -> tuple[Callable[[int], object], Callable[[int], int]] | None:
    """Find the setting of OpenMP, and of MKL where torch has it, in the library that torch has loaded."""
    try:
        loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), mode=os.RTLD_NOLOAD)
        set_openmp = loaded.omp_set_num_threads
    except (AttributeError, OSError):  # another system, or a build without OpenMP
        return None
    return set_openmp, getattr(loaded, "MKL_Set_Num_Threads_Local", lambda count: 0)
