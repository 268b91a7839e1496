"""Dataset-level coupling: the noise decides which data row of the whole dataset it trains with.

>>> import torch
>>> from couplings import semidiscrete
>>> images = torch.rand(60, 3, 4, 4)
>>> plan = semidiscrete.fit(images)
>>> for batch, noise in plan.loader(images, batch_size=20):
...     pass  # train on batch and noise
"""

from couplings.semidiscrete.plan import Semidiscrete, fit

__all__ = ["Semidiscrete", "fit"]
