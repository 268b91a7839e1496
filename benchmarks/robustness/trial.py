"""What a part of `benchmarks.robustness` tried, and what it lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Outcome", "sized"]

_DESCRIBED = 20


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
