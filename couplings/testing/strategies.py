"""Hypothesis strategies: batches whose best pairing is known, and arbitrary ones.

Those that give an `Instance` take ``max_rows``, ``max_dim`` (elements in a row) and ``dtype``. Values are multiples of
1/8 up to 8, which are exact in every floating type but the 8-bit ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    msg = "the strategies need Hypothesis, which is not installed. Type: pip install 'couplings[test]'"
    raise ImportError(msg) from error

# Metrics that are convex in the difference, and `dot`, which has the best pairing of the squared distance.
_CONVEX = ("sqeuclidean", "dot", "l2", "l1")
_EIGHTHS = st.integers(-64, 64).map(lambda k: k / 8.0)


@dataclass(frozen=True, eq=False)
class Instance:
    """A batch whose optimal pairing is known.

    Attributes
    ----------
    data, noise : (n, *shape) Tensor
    index : (n,) int64 Tensor
        An optimal pairing: row i of the data with row ``index[i]`` of the noise. Others may cost the same.
    metrics : tuple of str
        The metrics that it is optimal for.
    """

    data: Tensor
    noise: Tensor
    index: Tensor
    metrics: tuple[str, ...]


@st.composite
def translations(
    draw: st.DrawFn, *, max_rows: int = 8, max_dim: int = 4, dtype: torch.dtype = torch.float32
) -> Instance:
    """Noise that is the data moved by one vector, and shuffled.

    Every cost that is convex in the difference is least where all differences are equal (Jensen).
    """
    data = draw(_points(max_rows, max_dim))
    vector = draw(st.lists(_EIGHTHS, min_size=data.shape[1], max_size=data.shape[1]))
    return draw(_shuffled(data, data + torch.tensor(vector), dtype, _CONVEX))


@st.composite
def planted_permutations(
    draw: st.DrawFn, *, max_rows: int = 8, max_dim: int = 4, dtype: torch.dtype = torch.float32
) -> Instance:
    """Noise that is the data, each row moved by less than a quarter of the least distance of two, and shuffled.

    Each row and its partner are nearest to one another: the pairing is the only optimum, and `greedy` and
    `stable` must find it too.
    """
    data = 8.0 * draw(_points(max_rows, max_dim, unique=True))
    n, d = data.shape
    steps = draw(st.lists(st.lists(st.integers(-1, 1), min_size=d, max_size=d), min_size=n, max_size=n))
    # Distinct rows are at least 1 apart in every metric; a row moves by at most 3/16 in l1.
    noise = data + torch.tensor(steps).float() * (3.0 / 16.0 / d)
    return draw(_shuffled(data, noise, dtype, _CONVEX))


@st.composite
def sorted_1d(draw: st.DrawFn, *, max_rows: int = 8, dtype: torch.dtype = torch.float32) -> Instance:
    """Numbers, of shape ``(n,)``: pairing them in order is optimal for every cost convex in the difference."""
    data = draw(_points(max_rows, 1)).flatten()
    noise = torch.tensor(draw(st.lists(_EIGHTHS, min_size=len(data), max_size=len(data))))
    index = torch.empty(len(data), dtype=torch.int64)
    index[data.argsort(stable=True)] = noise.argsort(stable=True)
    return Instance(data.to(dtype), noise.to(dtype), index, _CONVEX)


@st.composite
def convex_gradients(
    draw: st.DrawFn, *, max_rows: int = 8, max_dim: int = 4, dtype: torch.dtype = torch.float32
) -> Instance:
    """Noise that is the gradient of a convex function at the data, shuffled: optimal for squared distances (Brenier).

    The function is ``|B x|^2 / 2 + sum(a x^2 / 2 + 8 b exp(x / 8))`` with a, b >= 0.
    """
    data = draw(_points(max_rows, max_dim))
    d = data.shape[1]
    entries = draw(st.lists(st.integers(-2, 2), min_size=d * d, max_size=d * d))
    matrix = torch.tensor(entries).float().reshape(d, d)
    a, b = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    noise = data @ (matrix.T @ matrix) + a * data + b * (data / 8.0).exp()
    return draw(_shuffled(data, noise, dtype, ("sqeuclidean", "dot")))


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    max_rows: int = 12,
    min_rows: int = 1,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    pool: int = 1,
) -> tuple[Tensor, Tensor]:
    """Arbitrary data and noise, for what must hold on every batch.

    Numbers, vectors and images; Gaussian values, a few integers (ties, duplicated rows) or one constant.

    Returns a strategy of ``(n, *shape)`` data and ``(pool * n, *shape)`` noise.
    """
    n = draw(st.integers(min_rows, max_rows))
    shape = draw(st.sampled_from([(), (1,), (5,), (3, 2, 2), (2, 3)]))
    dtype = draw(st.sampled_from(list(dtypes)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def values(rows: int) -> Tensor:
        kind = draw(st.sampled_from(["gaussian", "integers", "constant"]))
        if kind == "gaussian":
            return torch.randn(rows, *shape, generator=generator).to(dtype)
        if kind == "integers":
            return torch.randint(-1, 2, (rows, *shape), generator=generator).to(dtype)
        return torch.full((rows, *shape), draw(_EIGHTHS), dtype=dtype)

    return values(n), values(pool * n)


@st.composite
def _points(draw: st.DrawFn, max_rows: int, max_dim: int, *, unique: bool = False) -> Tensor:
    """``(n, d)`` multiples of 1/8."""
    row = st.tuples(*[_EIGHTHS] * draw(st.integers(1, max_dim)))
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=max_rows, unique=unique)), dtype=torch.float32)


@st.composite
def _shuffled(draw: st.DrawFn, data: Tensor, noise: Tensor, dtype: torch.dtype, metrics: tuple[str, ...]) -> Instance:
    """Noise in another order, with the pairing that undoes it."""
    order = torch.tensor(draw(st.permutations(range(len(data)))))
    return Instance(data.to(dtype), noise[order].to(dtype), order.argsort(), metrics)


def given_data(check: Callable[[Any], None], examples: int) -> None:
    """Run a check that draws its batches itself, the same ones every time; the smallest that fails is reported."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(draw=st.data())
    def run(draw: Any) -> None:
        check(draw)

    run()
