"""Exact linear assignment: `solver` explains how, and reads top to bottom."""

from .blocks import solve_blocks
from .scipy_signature import linear_sum_assignment
from .solver import Solution, solve

__all__ = ["Solution", "linear_sum_assignment", "solve", "solve_blocks"]
