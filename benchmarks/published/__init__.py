"""Published tables, measured again with this library: ``python -m benchmarks.published NAME``."""

from . import c2ot_toy, checkerboard, class_from_noise, otcfm, ott_semidiscrete

__all__ = ["FILE", "TABLES"]

MODULES = (c2ot_toy, otcfm, checkerboard, ott_semidiscrete, class_from_noise)
TABLES = {module.TABLE.name: module.TABLE for module in MODULES}
FILE = "published.jsonl"
