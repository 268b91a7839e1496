"""The objectives by name."""

from __future__ import annotations

from .config import Recipe
from .consistency import ConsistencyObjective
from .data import Source
from .ddim import DdimObjective
from .flow_matching import FlowMatchingObjective
from .objective import Objective


def build_objective(recipe: Recipe, source: Source) -> Objective:
    """Build the objective that a recipe names, for the images of ``source``.

    Raises
    ------
    RecipeError
        If the images do not fit it.
    """
    if recipe.objective.name == "stable_diffusion":
        from .stable_diffusion import StableDiffusionObjective  # transformers takes seconds to import

        return StableDiffusionObjective(recipe.objective, source)
    kinds = {"ddim": DdimObjective, "consistency": ConsistencyObjective, "flow_matching": FlowMatchingObjective}
    return kinds[recipe.objective.name](recipe.objective, source.shape)
