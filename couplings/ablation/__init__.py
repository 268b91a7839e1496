"""Couplings measured: on one batch (`couplings compare`), or over a grid of batches (`couplings ablate`); no training.

`sources` says what is coupled, `grid` how, `measure` what is measured of it. An ablation measures in processes of its
own (`workers`) and keeps `records` of what it finished (`run`). A `report` of them is tables (the best rows are marked
by `significance`) and figures (`plots`), laid out as `pages`.
"""
