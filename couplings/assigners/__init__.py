"""The methods: one file each, and the registry that names them."""

from couplings.assigners.method import Assignment, MethodInfo
from couplings.assigners.registry import methods, register

__all__ = ["Assignment", "MethodInfo", "methods", "register"]
