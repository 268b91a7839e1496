"""Trainers with a coupling plugged in; run from a checkout: ``python -m integrations.train RECIPE.yaml``."""
