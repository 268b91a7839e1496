"""How much of the clean image is known at a noise level: to a trained network, and from the coupling alone."""

from __future__ import annotations

import base64
import dataclasses
import io
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from couplings import Coupling
from integrations.data import Images, to_signed
from integrations.ddim import DdimObjective
from integrations.loop import build_coupling
from integrations.measure import Trained
from integrations.objective import rows
from integrations.pictures import grid

from .whitening import flat

if TYPE_CHECKING:
    from .training import Session

PICTURED = 24
BATCHES = (8, 32, 128, 512, 2048)
REAL = 1000
LEVELS = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2)  # of the noisiest


def split(trained: Trained, mixed: Tensor, level: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the clean image and the noise that a network's answer implies.

    Parameters
    ----------
    trained : Trained
    mixed : (n, *shape) Tensor
        What the network sees.
    level : float or 0-d Tensor
        Timestep of a diffusion model, time in [0, 1] of a flow.
    """
    if not isinstance(trained.objective, DdimObjective):
        velocity = trained.model(mixed, 1000.0 * level).sample
        return mixed - level * velocity, mixed + (1 - level) * velocity
    share = trained.objective.scheduler.alphas_cumprod[int(level)]
    a, s = share.sqrt(), (1 - share).sqrt()
    answer = trained.model(mixed, level).sample
    if trained.recipe.objective.prediction == "epsilon":
        return (mixed - s * answer) / a, answer
    if trained.recipe.objective.prediction == "v_prediction":
        return a * mixed - s * answer, a * answer + s * mixed
    return answer, (mixed - a * answer) / s


def by_level(trained: Trained, count: int = 1024) -> dict[str, float]:
    """Return the share of the images' variance that the network's implied clean image explains, for each level.

    One minus its mean squared error over the variance of the data, with noise paired as in training. The implied image
    is clipped to the range of pixels, as sampling does. Below 0 the mean image would be the better answer.
    """
    train, shape = trained.recipe.train, trained.objective.shape
    size = train.global_batch_size if trained.recipe.coupling.scope == "global" else train.batch_size_per_device
    data = flat(trained.source, count).unflatten(1, shape)
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    coupling = build_coupling(trained.recipe)
    pairs = zip(data.split(size), noise.split(size), strict=True)
    noise = torch.cat([coupling(x, n).noise for x, n in pairs])
    variance = (data - data.mean(0)).square().mean()
    found = {}
    for level in LEVELS:
        if isinstance(trained.objective, DdimObjective):
            scheduler = trained.objective.scheduler
            at = round(level * scheduler.config.num_train_timesteps) - 1
            mixed = scheduler.add_noise(data, noise, torch.full((len(data),), at))
        else:
            at = level
            mixed = torch.lerp(data, noise, rows(torch.full((len(data),), level), data))
        with torch.no_grad():
            clean = torch.cat([split(trained, part, at)[0] for part in mixed.split(256)]).clamp(-1, 1)
        found[str(level)] = 1 - ((clean - data).square().mean() / variance).item()
    return found


def by_coupling(source: Images, method: str, batch: int, count: int = 16_384) -> dict[str, float]:
    """Return what the paired noise alone tells about the image, linearly, and where.

    Along each principal direction of the data, image and noise have a correlation; its square is the share of the
    variance that the noise explains.

    Returns
    -------
    dict
        ``explained``: share of the images' variance explained, over all directions. ``top_1``, ``top_10``,
        ``top_100``: how much of that lies along as many leading directions. ``reduction``: of the squared distance.
    """
    data = flat(source, count)
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    data = data[: len(data) // batch * batch]
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    coupling = Coupling(method)
    coupled = [coupling(x, n) for x, n in zip(data.split(batch), noise.split(batch), strict=True)]
    noise = torch.cat([part.noise for part in coupled])
    centred = data - data.mean(0)
    variances, directions = torch.linalg.eigh(centred.T.cov())
    variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
    x, n = centred @ directions, (noise - noise.mean(0)) @ directions
    squared = (x * n).mean(0).square() / (x.square().mean(0) * n.square().mean(0)).clamp_min(1e-12)
    # A correlation of nothing with nothing has a square of 1 / rows.
    explained = variances / variances.sum() * (squared - 1 / len(data))
    total = explained.sum()
    tops = {f"top_{k}": (explained[:k].sum() / total).item() for k in (1, 10, 100)}
    reduction = torch.stack([part.reduction for part in coupled]).mean().item()
    return {"explained": total.item(), **tops, "reduction": reduction}


class Switched(nn.Module):
    """Predicts noise with one network above a noise level and with another below it."""

    def __init__(self, high: Trained, low: Trained, cut: int) -> None:
        super().__init__()
        self.high, self.low, self.cut = high, low, cut

    def forward(self, mixed: Tensor, timestep: Tensor) -> UNet2DOutput:
        """Return the noise, as a network that was trained to predict it would."""
        return UNet2DOutput(sample=split(self.high if timestep >= self.cut else self.low, mixed, timestep)[1])


def switched(high: Trained, low: Trained, cut: int) -> Trained:
    """Return a model that samples with ``high`` from the timestep ``cut`` upwards and with ``low`` below."""
    config = dataclasses.replace(low.recipe.objective, prediction="epsilon")
    objective = DdimObjective(config, low.objective.shape)
    return dataclasses.replace(low, objective=objective, model=Switched(high, low, cut))


def couplings_alone(session: Session) -> None:
    """Put on record what couplings do to the images, and the Frechet distance of real images to all of them."""
    source = session.source
    cells = [("auction", batch) for batch in BATCHES] + [("auction-whitened", 128), ("auction-standardised", 128)]
    for method, batch in cells:
        if batch <= len(source):
            key = {"kind": "coupling", "images": len(source), "method": method, "batch": batch}
            session.once(key, lambda method=method, batch=batch: by_coupling(source, method, batch))

    def real() -> dict[str, Any]:
        chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:REAL]
        return {"frechet": session.scores([to_signed(source[chosen.tolist()].images)])["fid"]}

    session.once({"kind": "real", "images": len(source), "samples": min(REAL, len(source))}, real)


def one_step(trained: Trained) -> dict[str, Any]:
    """Return what a network makes of pure noise in one evaluation, as a picture and as a number.

    Returns
    -------
    dict
        ``spread``: standard deviation of a pixel over the predictions, that over the data being 1: 0 for a network that
        answers all noise with one image. ``png``: some predictions, in base64.
    """
    noise = torch.randn(512, *trained.objective.shape, generator=torch.Generator().manual_seed(0))
    diffusion = isinstance(trained.objective, DdimObjective)
    level = trained.objective.scheduler.config.num_train_timesteps - 1 if diffusion else 1.0
    with torch.no_grad():
        predicted = split(trained, noise, level)[0]
    deviation = flat(trained.source, len(trained.source)).std(0).square().mean().sqrt()
    file = io.BytesIO()
    grid(predicted[:PICTURED], columns=8).save(file, "png", optimize=True)
    spread = predicted.flatten(1).std(0).square().mean().sqrt() / deviation
    return {"spread": spread.item(), "png": base64.b64encode(file.getvalue()).decode()}


def networks(session: Session, seed: int, arms: list[str]) -> None:
    """Put on record what the finished networks of a seed explain, and what exchanging their noisy halves does."""
    from .record import read
    from .training import settings

    recipes = {name: session.recipe(name, seed) for name in arms}
    ended = {(r["arm"], r["step"]) for r in read(session.records) if r["kind"] == "point" and r["seed"] == seed}
    recipes = {name: recipe for name, recipe in recipes.items() if (name, recipe.train.steps) in ended}
    for name, recipe in recipes.items():
        key = {"arm": name, "seed": seed, "step": recipe.train.steps, "settings": settings(recipe)}
        finders = {"levels": lambda trained: {"explained": by_level(trained)}, "one step": one_step}
        for kind, find in finders.items():
            session.once({"kind": kind, **key}, lambda find=find, name=name: find(session.trained(name, seed)))
    for pairing in dict.fromkeys(name.partition("-")[2] for name in arms):
        pair = [f"{kind}-{pairing}" for kind in ("v", "epsilon")]
        if not recipes.keys() >= set(pair):
            continue
        recipe = recipes[pair[1]]
        steps = [n for n in recipe.evaluate.steps if n <= 20]
        cut = recipe.objective.diffusion_steps // 2
        for high, low in (pair, pair[::-1]):
            key = {"kind": "switched", "high": high, "low": low, "cut": cut, "seed": seed}
            key |= {"step": recipe.train.steps, "settings": settings(recipe)}

            def both(high: str = high, low: str = low, cut: int = cut, steps: list[int] = steps) -> dict[str, Any]:
                model = switched(session.trained(high, seed), session.trained(low, seed), cut)
                return {"frechet": session.frechet(model, steps)}

            session.once(key, both)
