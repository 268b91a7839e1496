"""The constants that were chosen by measuring, in one place.

Figures are processor time against that of the value chosen, on one busy core of an AMD EPYC: photo crops, l2 and the
hard families of the benchmark at n = 512 and 1024 (`dense_*`: 32 to 256; list constants: 128 and 512), medians of five,
in turn in one process; those marked * in processes of their own, which agree within 10% only. "Mean" is over all
instances, else the worst one is named.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["TUNING", "Tuning"]


class Tuning(NamedTuple):
    """What the solver's speed depends on; no optimum does."""

    # Auction. Epsilons are in deviations of the cost.
    # Too large repeats work that is undone, too small starts price wars. 0.05: 4.1 on 2-d points; 0.2: mean 0.98,
    # 1.1 on rank one; 1: 9.2 on rank one.
    first_epsilon: float = 0.1
    # What is left for shortest paths, against bids. 1e-5: 9.4 on rank one; 1e-3: 2.0 on rank one.
    final_epsilon: float = 1e-4
    # Phases, against bids in each. 4: mean 0.97, 1.15 on repeated rows; 14: mean 1.00, 1.1 on repeated rows.
    epsilon_factor: float = 7.0
    # Bids in one phase, from which on prices run away and columns are reduced. 10: 9.4 on rank one; 100: mean 1.01.
    bids_per_row: int = 30
    # Whole rows read in one phase, from which on lists are of no use. 1: mean 0.99; 8: 1.2 on 1-d points.
    reads_per_row: int = 2
    # Bids without epsilon where few rows compete. 1: 12.9 on blocks; 16: 1.2 on blocks.
    greedy_bids_per_row: int = 4
    # Bids without epsilon before the shortest paths. 2: 1.4 on Pareto costs; 100: 1.1 on 1-d points.
    reduction_bids_per_row: int = 20

    # Sketch.
    # Deviation of columns, in those of the cost without them, from which on offsets are taken off: a dearer first pass,
    # against bids. l2, l1 and sqeuclidean stand at 1.3 to 2.5, crops at 0.4 to 0.8. Never: 6 on l2 at n = 1024. At 0.3:
    # 4.8 on integers, whose ties it breaks; at 0.6: 0.7 on 2-d points, 1.2 on crops at n = 4096.
    offset_spread: float = 1.0
    # Deviations that an int16 resolves: resolution, against range. 4: 2.2 on crops; 16: 1.7 on rank one.
    sketch_range: float = 8.0
    # Least epsilon, in steps, that is settled on the sketch. 1: 1.1 on rank one; 10: mean 0.98, 1.04 on l2.
    sketch_epsilon: float = 3.0

    # Candidate lists.
    # Entries a row: refills, against memory and longer scans. 24*: 1.4 on 1-d points; 96*: 1.2 on l2.
    list_size: int = 48
    # Groups of columns below the threshold that a list is cut at, on the sketch. 10*: 1.5 on rank one; 40*: 1.4 on l2.
    sketch_candidates: int = 20
    # The same on the floats, where a list is dear. 18*: 1.3 on 1-d points.
    full_candidates: int = 36
    # Minima that a threshold is chosen among: a finer choice, against longer loops. 64*: no difference that shows.
    groups: int = 256
    # Score of failures of the sketch from which on floats are read at once. 16*: no difference that shows.
    sketch_failures: int = 64

    # Shortest paths.
    # Score of failed searches over lists from which on whole rows are read. 64*: 1.3 on blocks.
    search_failures: int = 16
    # Lists filled anew by one search before it counts as failed. 16*: 1.25 on l2.
    search_fills: int = 64
    # Rows matched one at a time even where lists are of no use. 4: mean 1.00; 64: mean 1.01.
    few_rows: int = 16
    # Share of the free rows to be matched by one forest. 0.05: mean 1.01; 0.5: mean 0.99.
    forest_share: float = 0.2
    # Free columns met per row matched, from which on tight pairs are matched. 2: 1.1 on 1-d points; 16: the same.
    forest_crowding: int = 4

    # Small problems.
    # Entries up to which a matrix is solved densely. At n = 256, against the auction: crops 1.3, rank one 2.5, integers
    # 0.4, 1-d points 0.15.
    dense_entries: int = 65536
    # Entries up to which that is so even where reductions leave more than half of the rows free (crops 64%, rank one
    # 98%, 1-d points 28%, integers 3%).
    dense_always: int = 16384
    # Bids without epsilon before the shortest paths. 0: 13 on integers; 4: mean 1.05; 8: 1.6 on 2-d points.
    dense_bids_per_row: int = 1


TUNING = Tuning()
