"""Random numbers that never touch the process's global state."""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

_SEEDING_VALUES = 64


def seeded_by(values: Tensor) -> torch.Generator:
    """Make the generator used where the caller gives none: seeded by the values, so that new noise brings new draws.

    Parameters
    ----------
    values : Tensor
        Of which some decide, up to a power of two. Copied to the host.
    """
    few = values[:1].reshape(-1)[:_SEEDING_VALUES].detach().cpu().numpy()
    digest = blake2b(np.frexp(few)[0].tobytes(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel variates of this shape, float64, on the generator's device."""
    # An exponential draw may be 0 in principle; its logarithm would be -inf and the variate +inf.
    draws = torch.empty(shape, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
    return draws.clamp_min_(torch.finfo(torch.float64).tiny).log_().neg_()
