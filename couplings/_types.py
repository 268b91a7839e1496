"""Names of the closed sets that several modules share."""

from typing import Literal

Marginal = Literal["permutation", "resampled", "selected"]
Needs = Literal["cost", "points"]
Scope = Literal["local", "global"]
