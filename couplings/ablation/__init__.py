"""Coupling quality over a grid of methods, metrics, quantizers, batch sizes and scopes; no training.

`grid` says which cells there are, `sources` what they couple, `measuring` what is measured of one, `workers` in which
process, `records` what is kept, and `running` brings them together: the `couplings ablate` command.
"""
