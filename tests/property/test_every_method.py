"""What holds for every method on every batch: the properties that `couplings.testing.check_method` runs."""

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from couplings.testing import PROPERTIES


@pytest.mark.parametrize("name", PROPERTIES)
@given(draw=st.data())
def test_property(case, name, draw):
    try:
        PROPERTIES[name](case, draw)
    except RuntimeError as error:
        # Sinkhorn refuses to draw rows from a plan that it did not find, rather than to return biased ones.
        if case.options.get("draw") != "rows" or "did not converge" not in str(error):
            raise
        reject()


def test_the_default_device_of_the_process_does_not_matter(case):
    generator = torch.Generator().manual_seed(3)
    data, noise = (torch.randn(rows, 5, generator=generator) for rows in (6, 6 * case.pool))
    expected = case(data, noise)
    with torch.device("meta"):
        assert torch.equal(case(data, noise).index, expected.index)
        assert (case(data.numpy(), noise.numpy()).apply(noise.numpy()) == expected.noise.numpy()).all()
