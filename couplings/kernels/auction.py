"""`couplings.kernels.solve` by its longer name."""

from couplings.kernels.assignment import Solution, solve

__all__ = ["Solution", "solve"]
