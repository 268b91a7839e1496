"""Random numbers that never touch the process's global state."""

import torch
from torch import Tensor

_PRIVATE_SEED = 0x5EED


def private_generator() -> torch.Generator:
    """Make the generator used where the caller gives none: always the same seed, so that results repeat."""
    return torch.Generator().manual_seed(_PRIVATE_SEED)


def gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel variates of this shape, float64, on the generator's device."""
    # An exponential draw may be 0 in principle; its logarithm would be -inf and the variate +inf.
    draws = torch.empty(shape, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
    return draws.clamp_min_(torch.finfo(torch.float64).tiny).log_().neg_()
