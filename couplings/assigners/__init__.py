"""The methods: one file each, and the registry that names them."""

from couplings.assigners.registry import Assignment, MethodInfo, methods, register

__all__ = ["Assignment", "MethodInfo", "methods", "register"]
