"""Shims that put a coupling where another library expects its own; none is imported unless asked for."""
