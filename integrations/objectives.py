"""The objectives by name."""

from __future__ import annotations

from .config import Recipe, RecipeError
from .consistency import ConsistencyObjective
from .data import Source
from .ddim import DdimObjective
from .flow_matching import FlowMatchingObjective
from .objective import Objective


def build_objective(recipe: Recipe, source: Source, *, blank: bool = False) -> Objective:
    """Build the objective that a recipe names, for the images of ``source``.

    ``blank`` gives frozen networks weights of no meaning, where only their sizes matter.

    Raises
    ------
    RecipeError
        If the images do not fit it.
    """
    if recipe.objective.name == "stable_diffusion":
        from .stable_diffusion import StableDiffusionObjective  # transformers takes seconds to import

        return StableDiffusionObjective(recipe.objective, source, blank=blank)
    if recipe.objective.name == "consistency":
        return ConsistencyObjective(recipe.objective, source.shape, _told_classes(recipe, source))
    kinds = {"ddim": DdimObjective, "flow_matching": FlowMatchingObjective}
    return kinds[recipe.objective.name](recipe.objective, source.shape)


def _told_classes(recipe: Recipe, source: Source) -> int | None:
    known = getattr(recipe.model, "classes", None)
    if known is None:
        return None
    found = len(source.classes)
    if not 2 <= found <= known:
        msg = f"model.classes: got {known}, but {recipe.data.source} has {found} classes: expected no fewer, or null"
        raise RecipeError(msg)
    return found
