"""Products of rows, by either library."""

import pytest
import torch

from couplings import _products, couple
from couplings._products import row_products

has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not has_onednn, reason="needs oneDNN"))])
def onednn(request, monkeypatch):
    monkeypatch.setattr(_products, "_onednn_is_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 70), (1, 5000, 900), (2048, 2048, 1), (2, 3, 4), (0, 9, 5)])
@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_rows_are_multiplied_with_rows(onednn, n, m, d, factor):
    x, y, bias = torch.randn(n, d), torch.randn(m, d), torch.randn(m)
    product = factor * x.double() @ y.double().T
    torch.testing.assert_close(row_products(x, y, factor=factor), product.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(row_products(x, y, bias, factor=factor), (product + bias).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [3, 300])
def test_batches_are_multiplied_one_by_one(onednn, n):
    x, y = torch.randn(4, n, 70), torch.randn(4, 250, 70)
    torch.testing.assert_close(row_products(x, y, factor=-2.0), -2.0 * x @ y.mT, rtol=1e-5, atol=1e-4)


def test_rows_need_not_lie_together(onednn):
    x, y = torch.randn(70, 600).T[::2], torch.randn(900, 140)[::3, ::2]
    torch.testing.assert_close(row_products(x, y), x @ y.T, rtol=1e-5, atol=1e-4)


def test_what_is_not_finite_stays_so(onednn):
    x, y = torch.randn(300, 70), torch.randn(300, 70)
    x[5, 3], y[7, 2] = float("nan"), float("inf")
    finite = torch.isfinite(row_products(x, y))
    assert not finite[5].any()
    assert not finite[:, 7].any()
    assert int(finite.sum()) == 299 * 299


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_as_they_are(onednn, dtype):
    x, y = torch.randn(300, 70, dtype=dtype), torch.randn(300, 70, dtype=dtype)
    assert torch.equal(row_products(x, y), x @ y.T)


def test_a_coupling_is_the_same(onednn):
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(512, 1, 8, 8, generator=generator, requires_grad=True)
    noise = torch.randn(512, 1, 8, 8, generator=generator)
    for metric in ("sqeuclidean", "l2", "cosine", "dot"):
        coupled = couple(data, noise, metric=metric)
        assert torch.equal(coupled.index, couple(data.double(), noise.double(), metric=metric).index)


def test_integers_are_multiplied_exactly(onednn):
    data, noise = torch.randn(512, 3000), torch.randn(512, 3000)
    coupled = couple(data, noise, quantize="int8")
    assert torch.equal(coupled.index, couple(data.double(), noise.double(), quantize="int8").index)
