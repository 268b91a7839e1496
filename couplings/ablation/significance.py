"""Which rows of a table are not significantly worse than the best one."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

__all__ = ["LEVEL", "TEST", "marks"]

LEVEL = 0.05

TEST = (
    "Bold: the best of its column. Underlined: not significantly worse than the best (one-sided paired t-test over the "
    f"seeds, which share data and noise, at {LEVEL:g} with Holm's correction for the rows of the column; of times, on "
    "their logarithms). With few seeds the test finds only large differences. Rows marked † bias the noise and take no "
    "part; nor do rows marked ‡, which declare that they do not bias it and were measured to do so."
)


def marks(samples: pd.DataFrame, *, higher: bool) -> pd.Series:
    """Find the best row of a table, and those that are not significantly worse.

    Parameters
    ----------
    samples : (seeds, rows) DataFrame
        A column for each row of the table; NaN where it was not measured with a seed.
    higher : bool
        Whether larger values are better.

    Returns
    -------
    (rows,) Series
        ``"best"``, ``"tied"`` or ``""``. A row with fewer than two seeds in common with the best cannot be tested and
        is ``""``, unless it is equal to it.

    Notes
    -----
    The best row is chosen by the data that it is then tested on, which makes it look a little better than it is; that
    errs on the side of fewer ties.
    """
    samples = samples if higher else -samples
    best = samples.mean().idxmax()
    lead = samples.rsub(samples[best], axis="index")
    equal = lead.fillna(0.0).eq(0.0).all() & lead.notna().any()
    # pandas gives no warning where all differences are alike: the statistic is infinite then, and the test certain.
    statistic = lead.mean() / lead.sem()
    chance = pd.Series(stats.t.sf(statistic, lead.count() - 1), index=samples.columns)[~equal].dropna().sort_values()
    holm = (chance * np.arange(len(chance), 0, -1)).cummax()
    found = pd.Series("", index=samples.columns)
    found[equal] = "best"
    found[holm.index[holm > LEVEL]] = "tied"
    return found
