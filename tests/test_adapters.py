"""Shims for other libraries."""

import pytest
import torch

from couplings import couple
from couplings.adapters.torchcfm import CouplingSampler


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 3, generator=generator), torch.rand(16, 3, generator=generator)


def test_sampler_moves_the_noise_and_leaves_the_data(batch):
    noise, data = batch
    x0, x1 = CouplingSampler().sample_plan(noise, data, replace=True)
    assert torch.equal(x1, data)
    assert torch.equal(x0, couple(data, noise).noise)
    assert not torch.equal(x0, noise)


def test_labels_follow_their_rows(batch):
    noise, data = batch
    y0, y1 = torch.arange(16), torch.arange(16) + 100
    x0, x1, l0, l1 = CouplingSampler().sample_plan_with_labels(noise, data, y0, y1)
    assert torch.equal(noise[l0], x0)
    assert torch.equal(data[l1 - 100], x1)
    assert CouplingSampler().sample_plan_with_labels(noise, data)[2:] == (None, None)


def test_torchcfm_takes_the_sampler(batch):
    flow = pytest.importorskip("torchcfm.conditional_flow_matching", exc_type=ImportError)
    noise, data = batch
    matcher = flow.ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    matcher.ot_sampler = CouplingSampler()
    t = torch.full((16,), 0.25)
    _, mixed, target = matcher.sample_location_and_conditional_flow(noise, data, t=t)
    paired = couple(data, noise).noise
    assert torch.allclose(mixed, 0.75 * paired + 0.25 * data)
    assert torch.allclose(target, data - paired)
