"""Published tables, measured again with this library: ``python -m benchmarks.published NAME``."""
