"""What a coupling did: how much nearer the pairs are, whether the noise is still what was drawn, what a model learned.

Three questions about the noise, a function and a frozen answer each. They measure tensors and know nothing of methods,
so that any trainer's noise can be held against them; `couplings.testing` turns them into pass or fail. A fourth,
`one_step_prediction`, asks a trained model what it makes of pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from couplings._names import unknown
from couplings.distances import canonical_metric, pair_costs

__all__ = [
    "ClassLeakage",
    "DistanceReduction",
    "MarginalDrift",
    "class_leakage",
    "distance_reduction",
    "marginal_drift",
    "one_step_prediction",
]

# What a network can be trained to answer: the names of diffusers, and "flow" for the velocity of rectified flow.
_PREDICTIONS = ("epsilon", "flow", "sample", "v_prediction")


@dataclass(frozen=True)
class DistanceReduction:
    """How much nearer to its data a coupling brought the noise.

    Attributes
    ----------
    before, after : float
        Mean distance of the pairs, in the metric's own unit (squared for ``sqeuclidean`` and ``dot``).
    reduction : float
        ``1 - after / before``; 0 where both are 0.
    metric : str
        The metric that was measured.
    """

    before: float
    after: float
    reduction: float
    metric: str


@dataclass(frozen=True)
class MarginalDrift:
    """How far the law of the noise is from N(0, I), or from a reference sample: 0 everywhere without drift.

    Attributes
    ----------
    mean : float
        Mean of all elements minus the reference's, in the reference's standard deviations.
    variance : float
        Variance of all elements over the reference's, minus 1.
    kurtosis : float
        Fourth standardised moment of all elements minus the reference's (3 for a Gaussian).
    norm : float
        Mean squared norm of a row minus the reference's, in standard deviations of one row's squared norm
        (``sqrt(2 d)`` for a Gaussian).
    ks : float
        Kolmogorov-Smirnov distance between the elements' law and the reference's, in [0, 1].
    rows, dim : int
        Rows measured, and elements in each.

    Notes
    -----
    Sampling alone moves ``mean`` by about ``1 / sqrt(rows * dim)``, ``variance`` by ``sqrt(2 / (rows *
    dim))``, ``kurtosis`` by ``sqrt(24 / (rows * dim))``, ``norm`` by ``1 / sqrt(rows)`` and ``ks`` by ``0.9 /
    sqrt(rows * dim)`` (against a reference of the same size each is ``sqrt(2)`` times larger).
    """

    mean: float
    variance: float
    kurtosis: float
    norm: float
    ks: float
    rows: int
    dim: int


@dataclass(frozen=True)
class ClassLeakage:
    """Whether a classifier can tell the class from the noise.

    Attributes
    ----------
    accuracy : float
        Cross-validated accuracy, in [0, 1].
    chance : float
        Mean accuracy of the same classifier on shuffled labels.
    z : float
        ``accuracy - chance`` in standard deviations over those shuffles.
    p_value : float
        Share of shuffles that do at least as well, the observed labels counted among them: valid at any
        sample size, never below ``1 / (shuffles + 1)``.
    classes, rows : int
    """

    accuracy: float
    chance: float
    z: float
    p_value: float
    classes: int
    rows: int


def distance_reduction(data: Any, before: Any, after: Any, *, metric: str = "sqeuclidean") -> DistanceReduction:
    """Mean distance of data and noise before and after a coupling, from the tensors themselves.

    Parameters
    ----------
    data : (n, *shape) Tensor or array
    before, after : (n, *shape) Tensor or array
        Noise paired with `data` row by row, as drawn and as coupled.
    metric : str
        One of `couplings.metrics()`.

    Returns
    -------
    DistanceReduction

    Raises
    ------
    ValueError
        If the shapes differ, a tensor is empty or holds NaN or inf, or the metric is unknown.
    TypeError
        If a tensor is not floating, or the metric not a string.

    Examples
    --------
    >>> import torch
    >>> from couplings.diagnostics import distance_reduction
    >>> data, noise = torch.tensor([[0.0], [4.0]]), torch.tensor([[3.0], [1.0]])
    >>> distance_reduction(data, noise, noise.flip(0)).reduction
    0.888...
    """
    name = canonical_metric(metric)
    if not isinstance(name, str):
        msg = f"metric= takes the name of a metric here, got the callable {metric!r}."
        raise TypeError(msg)
    x, y, z = (_rows(value, what) for value, what in ((data, "data"), (before, "before"), (after, "after")))
    if not x.shape == y.shape == z.shape:
        msg = (
            "data, before and after must have the same rows and elements, "
            f"got {tuple(x.shape)}, {tuple(y.shape)} and {tuple(z.shape)} when flattened."
        )
        raise ValueError(msg)
    was, now = (float(pair_costs(x, noise, name).mean()) for noise in (y, z))
    return DistanceReduction(was, now, 1.0 - now / was if was else 0.0, name)


def marginal_drift(noise: Any, reference: Any = None) -> MarginalDrift:
    """Compare the law of the noise with N(0, I), or with a reference sample.

    Parameters
    ----------
    noise : (n, *shape) Tensor or array
    reference : (m, *shape) Tensor or array, optional
        Noise known to be right, such as what was drawn before the coupling; by default the standard Gaussian
        itself.

    Returns
    -------
    MarginalDrift

    Raises
    ------
    ValueError
        If a tensor is empty, holds NaN or inf, the rows differ in size, or the reference is constant.
    TypeError
        If a tensor is not floating.

    Notes
    -----
    O(n d log(n d)), in float64. Elements are pooled: what differs between positions only, such as a
    correlation, is not seen here but by `couplings.testing.check_coupler`.

    Examples
    --------
    >>> import torch
    >>> from couplings.diagnostics import marginal_drift
    >>> noise = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    >>> round(marginal_drift(1.1 * noise, noise).variance, 3)
    0.21
    """
    x = _rows(noise, "noise")
    rows, dim = x.shape
    mean, variance, kurtosis = _moments(x)
    if reference is None:
        low, spread, tail = 0.0, 1.0, 3.0
        norm, norm_deviation = float(dim), math.sqrt(2.0 * dim)
        ks = _ks_to_normal(x.flatten())
    else:
        y = _rows(reference, "reference")
        if y.shape[1] != dim:
            msg = f"rows of noise have {dim} elements, rows of reference {y.shape[1]}: give both the same shape."
            raise ValueError(msg)
        low, spread, tail = _moments(y)
        if spread == 0.0:
            msg = "the reference is constant: its standard deviation, the unit of the drift, is 0."
            raise ValueError(msg)
        squared = y.square().sum(1)
        norm = float(squared.mean())
        # A single row has no deviation of its own; the Gaussian value stands in for it.
        norm_deviation = float(squared.std(correction=0)) or spread * math.sqrt(2.0 * dim)
        ks = _ks_between(x.flatten(), y.flatten())
    return MarginalDrift(
        mean=(mean - low) / math.sqrt(spread),
        variance=variance / spread - 1.0,
        kurtosis=kurtosis - tail,
        norm=(float(x.square().sum(1).mean()) - norm) / norm_deviation,
        ks=ks,
        rows=rows,
        dim=dim,
    )


def class_leakage(
    noise: Any,
    labels: Any,
    *,
    data: Any = None,
    folds: int = 5,
    shuffles: int = 200,
    generator: torch.Generator | None = None,
) -> ClassLeakage:
    """Tell the class from the noise by its nearest class mean, cross-validated, and compare with chance.

    A model that samples for a class starts from N(0, I). If coupling has given each class its own part of the
    noise, it was never trained there (C2OT, arXiv 2503.10636): accuracy above chance shows it.

    Parameters
    ----------
    noise : (n, *shape) Tensor or array
        Noise as paired with the data, row by row.
    labels : (n,) integer Tensor or array
        The data's classes.
    data : (n, *shape) Tensor or array, optional
        The data itself: the noise is then looked at only along the directions in which the classes of the data
        differ in their means, where a coupling leaks. In high dimension this takes far fewer rows.
    folds : int
        Parts of the cross-validation; each class is spread evenly over them.
    shuffles : int
        Shuffled labellings that make up the null distribution.
    generator : torch.Generator, optional
        Draws the folds and the shuffles; by default a private one with a fixed seed.

    Returns
    -------
    ClassLeakage

    Raises
    ------
    ValueError
        If a tensor is empty or not finite, the shapes do not match, there is one class only, or a class has
        fewer rows than two.
    TypeError
        If the noise is not floating or the labels are not integers.

    Notes
    -----
    The folds of a cross-validation depend on one another: its standard deviation is not the binomial one. The
    same procedure on shuffled labels has the right one. O(shuffles n min(n, d) classes).

    Examples
    --------
    >>> import torch
    >>> from couplings.diagnostics import class_leakage
    >>> noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    >>> class_leakage(noise, (noise[:, 0] > 0).long()).accuracy > 0.9
    True
    """
    x = _rows(noise, "noise")
    y = torch.as_tensor(labels)
    if y.is_floating_point() or y.is_complex() or y.dtype is torch.bool:
        msg = f"labels must be integers, got {y.dtype}."
        raise TypeError(msg)
    if tuple(y.shape) != (len(x),):
        msg = f"labels must have shape ({len(x)},), one per row of noise, got {tuple(y.shape)}."
        raise ValueError(msg)
    if folds < 2 or shuffles < 2:
        msg = f"folds= and shuffles= must be at least 2, got {folds} and {shuffles}."
        raise ValueError(msg)
    known, classes, sizes = torch.unique(y.cpu(), return_inverse=True, return_counts=True)
    if len(known) < 2 or int(sizes.min()) < 2:
        rows_of = dict(zip(known.tolist(), sizes.tolist(), strict=True))
        msg = f"labels must hold at least two classes of two rows each, got rows per class {rows_of}."
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(0) if generator is None else generator

    def shuffle(n: int) -> Tensor:
        return torch.randperm(n, generator=generator, device=generator.device).cpu()

    if data is not None:
        # One direction per class is enough, and known without looking at the noise.
        points = _rows(data, "data")
        if points.shape != x.shape:
            msg = (
                f"data and noise must have the same rows and elements, got {tuple(points.shape)} and {tuple(x.shape)}."
            )
            raise ValueError(msg)
        means = torch.stack([points[classes == k].mean(0) for k in range(len(known))])
        _, sizes_of, axes = torch.linalg.svd(means - means.mean(0), full_matrices=False)
        x = x @ axes[sizes_of > 1e-9 * sizes_of.max().clamp_min(1e-300)].T
    if x.shape[1] > len(x):
        # A rotation into the rows' own span keeps every distance and leaves n coordinates instead of d.
        x = torch.linalg.qr(x.T, mode="r").R.T
    # Rank within the class, modulo the folds, after a shuffle: every class is spread evenly.
    mixed = shuffle(len(x))
    by_class = mixed[torch.argsort(classes[mixed], stable=True)]
    fold = torch.empty(len(x), dtype=torch.int64)
    fold[by_class] = torch.arange(len(x)) % folds
    parts = [torch.nonzero(fold == k).flatten() for k in range(min(folds, len(x)))]

    observed = _nearest_mean_accuracy(x, classes, parts)
    null = torch.stack(
        [
            torch.as_tensor(_nearest_mean_accuracy(x, _shuffled_within(classes, parts, shuffle), parts))
            for _ in range(shuffles)
        ]
    ).double()
    chance, deviation = float(null.mean()), float(null.std())
    excess = observed - chance
    return ClassLeakage(
        accuracy=observed,
        chance=chance,
        z=excess / deviation if deviation else math.copysign(math.inf, excess) if excess else 0.0,
        p_value=(1 + int((null >= observed - 1e-12).sum())) / (shuffles + 1),
        classes=len(known),
        rows=len(x),
    )


def one_step_prediction(
    predict: Callable[[Tensor], Tensor],
    noise: Tensor,
    *,
    prediction: str = "epsilon",
    alpha: float = 0.0,
    sigma: float = 1.0,
) -> Tensor:
    """Ask a model for the data in pure noise: the x0 that it predicts in its very first sampling step.

    Where noise and data were paired at random, nothing in the noise tells of the data, and the best answer is the mean
    of all data, whatever the noise. Coupled training leaves something to be told, and the answers differ and have
    edges (figure 3 of Immiscible Diffusion).

    Parameters
    ----------
    predict : callable
        ``predict(noise) -> (n, *shape) Tensor``: the network at its highest noise level, such as
        ``lambda x: unet(x, scheduler.timesteps[0]).sample``.
    noise : (n, *shape) Tensor
        What sampling starts from.
    prediction : {"epsilon", "v_prediction", "sample", "flow"}
        What the network answers for ``x = alpha * x0 + sigma * eps``: eps, ``alpha * eps - sigma * x0``, x0 or
        ``eps - x0``.
    alpha, sigma : float
        Scales of data and noise at that level; in diffusers ``alphas_cumprod[t] ** 0.5`` and
        ``(1 - alphas_cumprod[t]) ** 0.5``. Of a flow from data at 0 to noise at t: ``1 - t`` and t.

    Returns
    -------
    (n, *shape) Tensor

    Raises
    ------
    ValueError
        For an unknown prediction, an answer of another shape, scales that are not finite or negative, or scales
        at which the answer does not tell of x0: epsilon at ``alpha=0``.

    Notes
    -----
    Runs without gradients. The model is taken as it is: set it to evaluation mode, and give it averaged weights if
    those are sampled from.

    References
    ----------
    Immiscible Diffusion, arXiv 2406.12303, figure 3.

    Examples
    --------
    >>> import torch
    >>> from couplings.diagnostics import one_step_prediction
    >>> noise = torch.tensor([[1.0, 2.0]])
    >>> one_step_prediction(lambda x: x - 0.5, noise, prediction="flow")  # a velocity noise - x0, for x0 = 0.5
    tensor([[0.5000, 0.5000]])
    """
    if prediction not in _PREDICTIONS:
        raise ValueError(unknown("prediction", prediction, _PREDICTIONS))
    if not (0.0 <= alpha < math.inf and 0.0 <= sigma < math.inf and alpha + sigma > 0.0):
        msg = f"alpha= and sigma= must be finite, not negative, and not both 0, got {alpha} and {sigma}."
        raise ValueError(msg)
    if prediction == "epsilon" and alpha == 0.0:
        msg = (
            "prediction='epsilon' at alpha=0: pure noise is its own epsilon, and no x0 follows from it. "
            "Give alpha= of the scheduler's last training step, which is small but not 0."
        )
        raise ValueError(msg)
    with torch.no_grad():
        answer = predict(noise)
        if not isinstance(answer, Tensor) or answer.shape != noise.shape:
            got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            msg = f"predict() must give a tensor of the noise's shape {tuple(noise.shape)}, got {got}."
            raise ValueError(msg)
        if prediction == "epsilon":
            return (noise - sigma * answer) / alpha
        if prediction == "v_prediction":
            return (alpha * noise - sigma * answer) / (alpha**2 + sigma**2)
        if prediction == "flow":
            return (noise - sigma * answer) / (alpha + sigma)
        return answer


def _rows(value: Any, what: str) -> Tensor:
    """Rows in float64 on their own device, checked."""
    tensor = torch.as_tensor(value).detach()
    if not tensor.is_floating_point():
        msg = f"{what} must be a floating tensor, got {tensor.dtype}."
        raise TypeError(msg)
    if tensor.ndim == 0 or tensor.numel() == 0:
        msg = f"{what} must have at least one row and one element, got shape {tuple(tensor.shape)}."
        raise ValueError(msg)
    if not bool(tensor.isfinite().all()):
        msg = f"{what} holds NaN or inf."
        raise ValueError(msg)
    return tensor.reshape(len(tensor), -1).double().contiguous()


def _moments(x: Tensor) -> tuple[float, float, float]:
    """Mean, variance and fourth standardised moment (3 for a constant, which has none)."""
    mean = x.mean()
    centred = x - mean
    variance = centred.square().mean()
    kurtosis = centred.pow(4).mean() / variance.square() if float(variance) > 0 else 3.0
    return float(mean), float(variance), float(kurtosis)


def _ks_to_normal(values: Tensor) -> float:
    law = torch.special.ndtr(values.sort().values)
    steps = torch.arange(len(values) + 1, dtype=law.dtype, device=law.device) / len(values)
    return float(torch.maximum((steps[1:] - law).max(), (law - steps[:-1]).max()))


def _ks_between(x: Tensor, y: Tensor) -> float:
    x, y = x.sort().values, y.sort().values
    support = torch.cat([x, y])
    below = torch.searchsorted(x, support, right=True).double() / len(x)
    return float((below - torch.searchsorted(y, support, right=True).double() / len(y)).abs().max())


def _shuffled_within(classes: Tensor, parts: list[Tensor], shuffle: Any) -> Tensor:
    """Shuffle labels inside each fold, so that every fold keeps its share of every class."""
    out = classes.clone()
    for part in parts:
        out[part] = classes[part][shuffle(len(part))]
    return out


def _nearest_mean_accuracy(x: Tensor, classes: Tensor, parts: list[Tensor]) -> float:
    one_hot = torch.nn.functional.one_hot(classes).to(device=x.device, dtype=x.dtype)
    total, counts = one_hot.T @ x, one_hot.sum(0)
    hits = 0
    for part in parts:
        mine = part.to(x.device)
        held_out, their_classes = x[mine], one_hot[mine]
        seen = (counts - their_classes.sum(0)).clamp_min(1.0)
        means = (total - their_classes.T @ held_out) / seen[:, None]
        # Squared distance without the row's own norm, which is the same for every class.
        score = means.square().sum(1) - 2.0 * held_out @ means.T
        hits += int((score.argmin(1) == their_classes.argmax(1)).sum())
    return hits / len(x)
