"""What the size of the pool does that noise is coupled in: ``python -m benchmarks.pools``."""
