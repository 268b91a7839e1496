"""The constants that were chosen by measuring, in one place."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["TUNING", "Tuning"]


class Tuning(NamedTuple):
    """What the solver's speed depends on; no answer does."""

    first_epsilon: float = 0.1
    final_epsilon: float = 1e-4
    epsilon_factor: float = 7.0
    bids_per_row: int = 30
    reads_per_row: int = 2
    greedy_bids_per_row: int = 4
    reduction_bids_per_row: int = 20
    offset_spread: float = 0.6
    sketch_range: float = 8.0
    sketch_epsilon: float = 3.0
    list_size: int = 48
    sketch_candidates: int = 20
    full_candidates: int = 36
    groups: int = 256
    sketch_failures: int = 64
    search_failures: int = 16
    search_fills: int = 64
    dense_entries: int = 65536
    dense_bids_per_row: int = 4
    few_rows: int = 16
    forest_share: float = 0.2
    forest_crowding: int = 4
    serial_entries: int = 2_000_000


TUNING = Tuning()
