"""Forbidden pairs: entries of +inf, which no matching may choose."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Infeasible", "check_feasible"]


class Infeasible(ValueError):  # noqa: N818  # reads as what it is
    """Every assignment has a forbidden pair."""


def check_feasible(cost: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """Refuse a cost matrix that has no numbers, or no assignment.

    Parameters
    ----------
    cost : (n, m) float array, m >= n

    Returns
    -------
    (n,) int64 array or None
        An assignment without forbidden pairs; None where no pair is forbidden.

    Raises
    ------
    ValueError
        If there is a NaN or -inf.
    Infeasible
        If every assignment has an entry of +inf: says how many rows are left out by a matching that is as large as can
        be (Hopcroft and Karp 1973, SciPy's ``maximum_bipartite_matching``). A ValueError too.
    """
    finite = np.isfinite(cost)
    if finite.all():
        return None
    if np.isnan(cost).any() or (cost == -np.inf).any():
        msg = f"cost must hold numbers or +inf, got {np.isnan(cost).sum()} NaN and {(cost == -np.inf).sum()} -inf"
        raise ValueError(msg)
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    found = maximum_bipartite_matching(csr_array(finite), perm_type="column")
    index: npt.NDArray[np.int64] = found.astype(np.int64)
    unmatched = int((index < 0).sum())
    if unmatched:
        msg = (
            f"{unmatched} of {len(cost)} rows cannot be matched: all their columns that are not forbidden (+inf) are "
            "needed by other rows; allow more pairs"
        )
        raise Infeasible(msg)
    return index
