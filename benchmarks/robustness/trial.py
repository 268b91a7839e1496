"""What a part of `benchmarks.robustness` tried, and what it lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..child import Child, Ended

__all__ = ["Outcome", "judged", "sized"]

_DESCRIBED = 20
_START = 300.0  # seconds for imports and compilation

Verdict = tuple[str, str]  # "right", "refused" or "lost"; and what, or why


@dataclass(frozen=True)
class Outcome:
    """Result of a part.

    Attributes
    ----------
    tried : int
        Things that could have gone wrong, each one of them once.
    lost : int
        Those that did: a wrong answer, an undocumented exception, a crash, a hang, a leak.
    about : dict
        What was measured, JSON; ``about["lost"]`` describes up to 20 of the lost, each with the seed that repeats it.
    """

    tried: int
    lost: int
    about: dict[str, Any]

    @classmethod
    def of(cls, tried: int, lost: Sequence[str], **about: Any) -> Outcome:
        """Count the lost, and keep the first of their descriptions."""
        return cls(tried, len(lost), {**about, "lost": list(lost[:_DESCRIBED])})


def sized(full: int, share: float, least: int = 1) -> int:
    """Return a share of the full size."""
    return max(least, round(full * share))


def judged(judge: Callable[[int], Verdict], seeds: Iterable[int], patience: float) -> Outcome:
    """Judge one seed after another in a process of its own.

    Parameters
    ----------
    judge : callable
        ``judge(seed) -> ("right" or "refused" or "lost", what)``; importable by name.
    seeds : iterable of int
    patience : float
        Seconds for each; a process that takes longer, or dies, has lost.
    """
    tried, counts, refused, lost = 0, Counter[str](), Counter[str](), []
    with Child(_serve, judge) as child:
        for tried, seed in enumerate(seeds, 1):  # noqa: B007  # counts them
            try:
                if not child.running:
                    child.start()
                    child.receive(_START)
                child.send(seed)
                kind, what = child.receive(patience)
            except Ended as error:
                kind, what = "lost", str(error)
            counts[kind] += 1
            if kind == "refused":
                refused[what] += 1
            if kind == "lost":
                lost.append(f"seed {seed}: {what}")
    return Outcome.of(tried, lost, right=counts["right"], refused=dict(refused.most_common()))


def _serve(connection: Any, judge: Callable[[int], Verdict]) -> None:
    import torch

    torch.set_num_threads(1)
    connection.send(None)
    with suppress(EOFError):  # the one who asked has ended
        while True:
            connection.send(judge(connection.recv()))
