"""What is coupled: batches that can be coupled, crops of photographs, latents, rows of files."""

import numpy as np
import pytest
import torch

from couplings.ablation import sources
from couplings.ablation.sources import Batch, open_source, photo_crops


@pytest.mark.parametrize(
    ("data", "noise", "error", "said"),
    [
        (torch.ones(2, 3), torch.tensor([[1.0] * 3, [float("nan")] * 3]), ValueError, "NaN or infinity in 1 of 2"),
        (torch.ones(2, 3), torch.ones(3, 3), ValueError, "got 3"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), TypeError, "must be floating"),
    ],
)
def test_a_batch_refuses_what_no_method_could_couple(data, noise, error, said):
    with pytest.raises(error, match=said):
        Batch(data, noise, "x")


def test_crops_are_photographs_in_range_and_repeat():
    def drawn(seed):
        return photo_crops(64, 32, torch.Generator().manual_seed(seed))[0]

    crops = drawn(0)
    assert (crops.shape, crops.dtype) == ((64, 3, 32, 32), torch.float32)
    assert torch.equal(crops, drawn(0))
    assert not torch.equal(crops, drawn(1))
    assert -1.0 <= crops.min() < crops.max() <= 1.0
    assert crops.max() - crops.min() > 1.5
    # Neighbouring pixels of a photograph are alike; of shuffled bytes they are not.
    assert (crops[..., 1:] - crops[..., :-1]).square().mean() < 0.1 * crops.var()


def test_crops_reach_every_pixel_of_every_photograph():
    photos = sources._photographs()
    assert len(photos) == 4
    wanted = torch.cat([torch.from_numpy(photo.copy()).reshape(-1, 3) for photo in photos])
    pixels, which = photo_crops(2000, 1, torch.Generator().manual_seed(0))
    drawn = (pixels.permute(0, 2, 3, 1).reshape(-1, 3) + 1) * 127.5
    known = {tuple(pixel) for pixel in wanted.tolist()}
    assert {tuple(pixel) for pixel in drawn.round().long().tolist()} <= known
    assert set(which.tolist()) == {0, 1, 2, 3}
    # Their mean colour is that of all pixels together: no photograph is left out.
    assert torch.allclose(drawn.mean(0), wanted.float().mean(0), atol=6 * float(wanted.float().std()) / 2000**0.5)


def test_latents_are_those_of_a_linear_encoder():
    batch = open_source("latents").batch(48, 0)
    assert batch.data.shape == (48, 4, 32, 32)
    assert 0.7 < float(batch.data.std()) < 1.3
    channels = batch.data.square().mean((0, 2, 3))
    assert channels[0] > channels[1] > channels[2:].max()  # principal components, in order


def test_candidates_are_added_below_the_same_noise():
    few, many = (open_source("crops32").batch(48, 0, candidates) for candidates in (1, 4))
    assert torch.equal(many.data, few.data)
    assert torch.equal(many.noise[:48], few.noise)
    assert len(many.noise) == 4 * 48


def test_rows_of_a_file_are_drawn_with_their_classes(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(40, dtype=np.float32)[:, None])
    np.save(tmp_path / "classes.npy", np.arange(40) // 10)
    source = open_source(str(tmp_path / "rows.npy"), str(tmp_path / "classes.npy"))
    batch = source.batch(12, 1, condition="class")
    assert torch.equal(batch.labels, batch.data[:, 0].long() // 10)
    assert torch.equal(batch.condition, batch.labels)
    with pytest.raises(ValueError, match="has 40 rows, fewer than n = 41"):
        source.batch(41, 0)
    with pytest.raises(ValueError, match="without classes"):
        open_source(str(tmp_path / "rows.npy")).batch(8, 0, condition="class")
    with pytest.raises(ValueError, match="Did you mean 'crops32'"):
        open_source("crop32")
