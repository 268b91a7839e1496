"""Sorting along directions: the right axes, and the same order however the products are computed."""

import pytest
import torch

from couplings import couple
from couplings.ablation.sources import photo_crops
from couplings.assigners import sliced


def batch(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return photo_crops(n, 32, generator)[0].flatten(1), torch.randn(n, 3072, generator=generator)


def test_the_axes_of_some_rows_are_as_good_as_those_of_all(monkeypatch):
    data, noise = batch(1500)
    some = couple(data, noise, "sliced").reduction
    monkeypatch.setattr(sliced, "_ROWS", 1500)
    assert some > 0.9 * couple(data, noise, "sliced").reduction > 0


def test_the_leading_axis_is_found():
    generator = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(torch.randn(40, generator=generator), dim=0)
    data = 5 * torch.randn(2000, 1, generator=generator) * axis + torch.randn(2000, 40, generator=generator)
    noise = torch.randn(2000, 40, generator=generator)
    index = couple(data, noise, "sliced", directions=1).index
    assert torch.corrcoef(torch.stack([data @ axis, noise[index] @ axis]))[0, 1] > 0.9


@pytest.mark.parametrize("axes", ["principal", "random"])
def test_neither_layout_nor_threads_change_the_order(axes):
    data, noise = batch(700)
    expected = couple(data, noise, "sliced", axes=axes).index
    spread = [torch.stack([x, -x], -1)[..., 0] for x in (data, noise)]
    transposed = [x.T.contiguous().T for x in (data, noise)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for x, y in ((data, noise), spread, transposed):
                assert torch.equal(couple(x, y, "sliced", axes=axes).index, expected)
    finally:
        torch.set_num_threads(threads)
