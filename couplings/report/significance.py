"""Which rows of a table are not worse than the best one, as far as the seeds can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Literal

__all__ = ["TEST", "marks"]

Mark = Literal["best", "tied", ""]

LEVEL = 0.05

TEST = (
    f"**Bold**: the best of its column, and underlined: not significantly worse than the best (one-sided paired t-test "
    f"over the seeds, which share data and noise, at {LEVEL:g} with Holm's correction for the rows of the column; of "
    "times, on their logarithms). "
    "With few seeds the test finds only large differences. Rows marked † bias the noise and take no part."
)


def marks(samples: Mapping[str, Mapping[int, float]], *, higher: bool) -> dict[str, Mark]:
    """Find the best row, and those that are not significantly worse.

    Parameters
    ----------
    samples : mapping
        Name of a row to its values by seed.
    higher : bool
        Whether larger values are better.

    Returns
    -------
    dict
        ``"best"``, ``"tied"`` or ``""`` by name. A row with fewer than two seeds in common with the best cannot be
        tested and is ``""``, unless it is equal to it.

    Notes
    -----
    The best row is chosen by the data that it is then tested on, which makes it look a little better than it is; that
    errs on the side of fewer ties.
    """
    known = {name: dict(values) for name, values in samples.items() if values}
    if not known:
        return {}
    sign = 1.0 if higher else -1.0
    best = max(known, key=lambda name: sign * fmean(known[name].values()))
    chances: dict[str, float] = {}
    found: dict[str, Mark] = {best: "best"}
    for name, values in known.items():
        if name == best:
            continue
        common = sorted(values.keys() & known[best].keys())
        lead = [sign * (known[best][seed] - values[seed]) for seed in common]
        if lead and not any(lead):
            found[name] = "best"  # the same values: neither is better
        else:
            found[name] = ""
            if len(lead) > 1:
                chances[name] = _chance(lead)
    # Holm: from the least chance on, each at its own level, until one is not rejected.
    for rank, name in enumerate(sorted(chances, key=lambda name: chances[name])):
        if chances[name] > LEVEL / (len(chances) - rank):
            rest = sorted(chances, key=lambda name: chances[name])[rank:]
            found.update(dict.fromkeys(rest, "tied"))
            break
    return found


def _chance(lead: list[float]) -> float:
    """Chance of a mean lead this large if there were none in truth."""
    mean = fmean(lead)
    spread = math.sqrt(sum((each - mean) ** 2 for each in lead) / (len(lead) - 1))
    if spread <= 1e-12 * abs(mean):
        return 0.0 if mean > 0 else 1.0
    from scipy.stats import t

    return float(t.sf(mean / (spread / math.sqrt(len(lead))), len(lead) - 1))
