"""Whether a cost with forbidden pairs admits an assignment."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["check_feasible"]


def check_feasible(cost: npt.NDArray[Any]) -> None:
    """Raise if the finite entries of a cost admit no assignment of all rows.

    Parameters
    ----------
    cost : (n, m) float array
        ``+inf`` forbids a pair.

    Raises
    ------
    ValueError
        With the number of rows that cannot be matched.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    unmatched = int((maximum_bipartite_matching(csr_array(np.isfinite(cost)), perm_type="column") < 0).sum())
    if unmatched:
        msg = (
            f"{unmatched} of {len(cost)} rows of the cost cannot be matched: the finite entries admit no assignment of "
            "all rows. Make fewer entries infinite."
        )
        raise ValueError(msg)
