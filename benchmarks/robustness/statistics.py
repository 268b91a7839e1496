"""The noise that every method returns, a million values of it, tested against N(0, I); given the class too.

Batches are of images of ten classes in a small range of pixels, some of them repeated or constant. The rows that a
method returns are tested by their values, projections, norms, mean, covariance, energy distance, and by a classifier
that is to tell them from fresh noise; where classes were a condition, each class is tested by itself, and a classifier
is to tell classes by their noise. A method that selects must be found to, and so must biases of known size that are
planted.

All p-values are analytic or of a fit to permutations, and corrected for their number (Holm 1979). Planted biases grow
as the square root of the share falls, so that they are as hard to find in a small run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import couplings
from couplings import Coupling
from couplings.testing.statistics import directions_to_test

from .trial import Outcome, sized

LEVEL = 1e-3  # of all tests of a run together
VALUES = 1_000_000
ROWS, SHAPE, CLASSES = 64, (1, 4, 4), 10
DIM = math.prod(SHAPE)
COMPARED = 1000  # rows of the energy distance, whose cost is quadratic
PERMUTATIONS = 99

Array = np.ndarray[Any, Any]
Bias = Callable[[Array, Array], Array]  # rows and their classes to rows


@dataclass(frozen=True)
class Case:
    """A coupling, and how its noise is tested.

    Attributes
    ----------
    title : str
    coupling : Coupling
    classes : bool
        Whether classes are a condition.
    given_class : bool
        Whether the noise of each class is tested by itself.
    bias : callable or None
        What is planted.
    found : bool
        Whether a departure must be found.
    """

    title: str
    coupling: Coupling
    classes: bool = False
    given_class: bool = False
    bias: Bias | None = None
    found: bool = False

    @property
    def candidates(self) -> int:
        """Rows of noise for each row of data."""
        return 3 if self.coupling.method == "nearest" or self.coupling.options.get("select") else 1


def cases() -> Iterator[Case]:
    """List every method with and without classes, and what else a coupling may round or measure."""
    for info in couplings.methods():
        selects = info.marginal == "selected"
        yield Case(info.name, Coupling(info.name), found=selects)
        if not selects:
            yield Case(f"{info.name}, classes", Coupling(info.name), classes=True, given_class=True)
    drawn = Coupling("sinkhorn", draw="rows")
    yield Case("sinkhorn, draw=rows", drawn)
    yield Case("auction, select", Coupling("auction", select=True), found=True)
    for metric in couplings.metrics()[1:]:
        yield Case(f"auction, {metric}, classes", Coupling("auction", metric), classes=True, given_class=True)
    for name in couplings.quantizers():
        yield Case(f"auction, {name}, classes", Coupling("auction", quantize=name), classes=True, given_class=True)


def planted(share: float) -> Iterator[Case]:
    """List biases of known size, each of which must be found."""
    size = 1 / math.sqrt(share)

    def scaled(rows: Array, _: Array) -> Array:
        return rows * (1 + 0.005 * size)

    def shifted(rows: Array, _: Array) -> Array:
        return rows + 0.01 * size

    def one_class_shifted(rows: Array, classes: Array) -> Array:
        return rows + 0.04 * size * (classes == 3)[:, None]

    def one_class_scaled(rows: Array, classes: Array) -> Array:
        return rows * (1 + 0.02 * size * (classes == 3)[:, None])

    def correlated(rows: Array, _: Array) -> Array:
        mixed = rows.copy()
        rho = min(0.9, 0.06 * size)
        mixed[:, 0] = math.sqrt(1 - rho**2) * rows[:, 0] + rho * rows[:, 1]
        return mixed

    def tails_cut(rows: Array, _: Array) -> Array:
        return rows.clip(-2.7 / size**0.2, 2.7 / size**0.2)

    coupling = Coupling("auction")
    for bias in (scaled, shifted, one_class_shifted, one_class_scaled, correlated, tails_cut):
        yield Case(f"planted: {bias.__name__}", coupling, classes=True, given_class=True, bias=bias, found=True)
    yield Case("planted: classes are no condition", coupling, given_class=True, found=True)


def images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make a data set: images in [-0.1, 0.1] about the pattern of their class, an eighth repeated, some constant."""
    labels = torch.randint(CLASSES, (512,), generator=generator)
    patterns = 0.1 * (2 * torch.rand(CLASSES, *SHAPE, generator=generator) - 1)
    data = (patterns[labels] + 0.02 * torch.randn(512, *SHAPE, generator=generator)).clamp(-0.1, 0.1)
    data[:64], labels[:64] = data[64:65], labels[64]
    data[64:80] = 0.05
    return (data * 127.5).round() / 127.5, labels


def returned(case: Case, batches: int, seed: int) -> tuple[Array, Array]:
    """Couple fresh noise with batch after batch.

    Returns
    -------
    (rows, DIM), (rows,) array
        The noise and the class of the data that it was given to, independent rows under what the method promises: of
        rows that are drawn with repetition, one a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    data, labels = images(generator)
    rows, classes = [], []
    for _ in range(batches):
        picked = torch.randint(len(data), (ROWS,), generator=generator)
        noise = torch.randn(case.candidates * ROWS, *SHAPE, generator=generator)
        condition = labels[picked] if case.classes else None
        coupled = case.coupling(data[picked], noise, condition=condition, generator=generator)
        kept = slice(None) if coupled.marginal != "resampled" else int(torch.randint(ROWS, (), generator=generator))
        rows.append(coupled.noise[kept].reshape(-1, DIM))
        classes.append(labels[picked][kept].reshape(-1))
    noise, of_class = torch.cat(rows).double().numpy(), torch.cat(classes).numpy()
    return (noise if case.bias is None else case.bias(noise, of_class)), of_class


# --- the tests


def p_values(rows: Array, classes: Array, *, given_class: bool, seed: int) -> dict[str, float]:
    """Test rows against N(0, I), alone and given their class: a p-value by the name of each test."""
    rng = np.random.default_rng(seed)
    data, labels = images(torch.Generator().manual_seed(seed))
    flat = data.reshape(len(data), -1).double()
    directions = directions_to_test(flat, labels, torch.Generator().manual_seed(seed)).numpy()
    found = _of_rows(rows, directions) | {"energy distance": _energy(rows, rng), "classifier": _told_apart(rows, rng)}
    if given_class:
        for each in np.unique(classes):
            found |= {f"{n} | class {each}": p for n, p in _of_rows(rows[classes == each], directions).items()}
        found["classes by their noise"] = _classes_told(rows, classes)
    return found


def _of_rows(rows: Array, directions: Array) -> dict[str, float]:
    count, dim = rows.shape
    along = rows @ directions
    squared = (rows**2).sum(1)
    covariance = rows.T @ rows / count - np.eye(dim)
    spread = stats.chi2(count * dim)
    total = float(squared.sum())
    ks = min(float(stats.kstest(column, "norm").pvalue) for column in along.T)
    ad = min(anderson_darling(column) for column in along.T)
    return {
        "values, Kolmogorov-Smirnov": float(stats.kstest(rows.ravel(), "norm").pvalue),
        "values, Anderson-Darling": anderson_darling(rows.ravel()),
        "projections, Kolmogorov-Smirnov": min(1.0, ks * along.shape[1]),
        "projections, Anderson-Darling": min(1.0, ad * along.shape[1]),
        "norms": float(stats.kstest(squared, stats.chi2(dim).cdf).pvalue),
        "mean": float(stats.chi2(dim).sf(count * (rows.mean(0) ** 2).sum())),
        "variance": min(1.0, 2 * float(min(spread.cdf(total), spread.sf(total)))),
        # Nagao (1973): of a covariance that is the identity.
        "covariance": float(stats.chi2(dim * (dim + 1) / 2).sf(count / 2 * (covariance**2).sum())),
        "covariance spectrum": _edges(covariance, count),
    }


def _edges(covariance: Array, count: int) -> float:
    """Test the largest and the smallest eigenvalue by the bound of Davidson and Szarek (2001)."""
    eigenvalues = np.sqrt(np.linalg.eigvalsh(covariance) + 1)
    beyond = max(eigenvalues[-1] - 1, 1 - eigenvalues[0]) * math.sqrt(count) - math.sqrt(len(covariance))
    return min(1.0, 2 * math.exp(-(max(beyond, 0.0) ** 2) / 2))


def anderson_darling(values: Array) -> float:
    """p-value of N(0, 1) with nothing estimated: Marsaglia and Marsaglia (2004), doi:10.18637/jss.v009.i02."""
    x, n = np.sort(values), len(values)
    weights = (2 * np.arange(1, n + 1) - 1) / n
    z = float(-n - (weights * (stats.norm.logcdf(x) + stats.norm.logsf(x[::-1]))).sum())
    if z < 2:
        inner = 2.00012 + (0.247105 - (0.0649821 - (0.0347962 - (0.0116720 - 0.00168691 * z) * z) * z) * z) * z
        return 1 - math.exp(-1.2337141 / z) / math.sqrt(z) * inner
    inner = 1.0776 - (2.30695 - (0.43424 - (0.082433 - (0.008056 - 0.0003146 * z) * z) * z) * z) * z
    return -math.expm1(-math.exp(max(inner, -700.0)))


def _energy(rows: Array, rng: Any) -> float:
    """Test the energy distance to fresh noise: a Pearson III fit to that of permutations."""
    count = min(len(rows), COMPARED)
    x = rows[rng.choice(len(rows), count, replace=False)]
    both = torch.from_numpy(np.concatenate([x, rng.standard_normal(x.shape)]))
    apart = torch.cdist(both, both).numpy()
    signs = np.repeat([1.0, -1.0], count)
    drawn = np.stack([signs, *(rng.permutation(signs) for _ in range(PERMUTATIONS))])
    statistics = -((drawn @ apart) * drawn).sum(1)
    null = statistics[1:]
    return float(stats.pearson3(max(stats.skew(null), 1e-3), null.mean(), null.std(ddof=1)).sf(statistics[0]))


def _told_apart(rows: Array, rng: Any) -> float:
    """Let a classifier learn to tell rows from fresh noise, and test whether it can on others."""
    both = np.concatenate([rows, rng.standard_normal(rows.shape)])
    fresh = np.repeat([0, 1], len(rows))
    order = rng.permutation(len(both))
    return min(1.0, _rank_test(*_scores(both[order], fresh[order])))


def _classes_told(rows: Array, classes: Array) -> float:
    """Let a classifier learn to tell the class from the noise, and test whether it can on others."""
    scores, truth, labels = _scores(rows, classes)
    return min(1.0, len(labels) * _rank_test(scores, truth, labels))


def _scores(rows: Array, truth: Array) -> tuple[Array, Array, Array]:
    """Fit a logistic regression to the first half; scores of the second half, its labels, and all labels."""
    from sklearn.linear_model import LogisticRegression

    half, features = len(rows) // 2, np.concatenate([rows, rows**2], 1)
    model = LogisticRegression(C=0.01, max_iter=500).fit(features[:half], truth[:half])
    return model.predict_log_proba(features[half:]), truth[half:], model.classes_


def _rank_test(scores: Array, truth: Array, labels: Array) -> float:
    """Test whether some label's score ranks its rows above others: area under the curve (Mann and Whitney 1947)."""
    return min(
        float(stats.mannwhitneyu(scores[truth == label, k], scores[truth != label, k], alternative="greater").pvalue)
        for k, label in enumerate(labels)
    )


def holm(found: dict[Any, float], level: float) -> set[Any]:
    """Return the tests that are rejected at a level for all of them together."""
    rejected = set()
    for rank, name in enumerate(sorted(found, key=found.__getitem__)):
        if found[name] > level / (len(found) - rank):
            break
        rejected.add(name)
    return rejected


def measure(share: float, chosen: Iterable[Case] | None = None) -> Outcome:
    """Test a million values of each method, and find what is planted; or of some cases."""
    batches = sized(VALUES // (ROWS * DIM), share, least=12)
    every = list(chosen or (*cases(), *planted(share)))
    found: dict[tuple[str, str], float] = {}
    for number, case in enumerate(every):
        rows, classes = returned(case, batches, seed=number)
        tests = p_values(rows, classes, given_class=case.given_class, seed=number)
        found |= {(case.title, name): p for name, p in tests.items()}
    rejected = holm(found, LEVEL)
    lost, least, by_test = [], {}, {}
    for number, case in enumerate(every):
        mine = {name: p for (title, name), p in found.items() if title == case.title}
        departures = [name for name in mine if (case.title, name) in rejected]
        worst = min(mine, key=mine.__getitem__)
        least[case.title] = float(f"{mine[worst]:.2g}")
        if case.found:
            by_test[case.title] = departures
            if not departures:
                lost.append(f"seed {number}, {case.title}: not found; {worst}: p = {mine[worst]:.2g}")
        lost += (
            [] if case.found else [f"seed {number}, {case.title}, {name}: p = {mine[name]:.2g}" for name in departures]
        )
    about = {"values": batches * ROWS * DIM, "cases": len(every), "level": LEVEL, "least p": least, "found by": by_test}
    return Outcome.of(len(found), lost, **about)


PARTS = {"statistics": measure}
