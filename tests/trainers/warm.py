"""What a process loads before its first step: loaded once, in the process that those of the tests are forked from."""

import sklearn.datasets  # noqa: F401 - of the digits
import torch

import couplings
import integrations.loop  # noqa: F401

torch.set_num_threads(1)
couplings.warmup()
