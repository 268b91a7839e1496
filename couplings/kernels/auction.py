"""Where `solve` used to be; it is in `couplings.kernels`."""

from couplings.kernels.assignment import Solution, solve

__all__ = ["Solution", "solve"]
