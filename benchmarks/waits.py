"""How often the host waits for a CUDA device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["counted"]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Count the waits inside; yields a list with an entry for each, complete when the block ends.

    `torch.cuda.set_sync_debug_mode` warns at every copy or look that waits, but not at every explicit wait for an
    event, a stream or the whole device: those are counted where they are called.
    """
    waits: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def counting(name: str, wait: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                waits.append(name)
                before = len(caught)
                try:
                    return wait(*args, **kwargs)
                finally:
                    del caught[before:]  # the same wait, if it was reported too

            return call

        explicit: list[tuple[Any, str]] = [
            (torch.cuda, "synchronize"),
            (torch.cuda.Event, "synchronize"),
            (torch.cuda.Stream, "synchronize"),
        ]
        kept = [(owner, name, getattr(owner, name)) for owner, name in explicit]
        for owner, name, wait in kept:
            setattr(owner, name, counting(f"{getattr(owner, '__name__', owner)}.{name}", wait))
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            for owner, name, wait in kept:
                setattr(owner, name, wait)
            waits += [str(each.message) for each in caught if "called a synchronizing" in str(each.message)]
