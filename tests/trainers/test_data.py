import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_recipes import first_block
from torch.utils.data._utils.pin_memory import pin_memory

from integrations import loop
from integrations.config import RecipeError, load
from integrations.data import DataError, Piece, load_source, to_signed, to_uint8
from integrations.sections import Data, StableDiffusion
from integrations.stable_diffusion import StableDiffusionObjective


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures in each of two classes; every pixel of a picture is its number."""
    folder = tmp_path / "pictures"
    for label, name in enumerate(["cat", "dog"]):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (12, 10), (100 * label + i,) * 3).save(folder / name / f"{i}.png")
    return folder


def test_digits():
    source = load_source(Data("digits"))
    assert source.shape == (1, 8, 8)
    assert len(source) == 1797
    batch = source[[5, 0]]
    assert batch.images.dtype == torch.uint8
    assert batch.images.max() == 255
    assert batch.labels.tolist() == [5, 0]


def test_photo_crops_are_windows_of_the_photographs():
    from skimage.data import astronaut

    source = load_source(Data("photo-crops"))
    assert source.shape == (3, 32, 32)
    assert len(source.classes) == 6
    photograph = torch.from_numpy(astronaut())
    columns = (photograph.shape[1] - 32) // 8 + 1
    expected = photograph[16 : 16 + 32, 40 : 40 + 32].permute(2, 0, 1)
    assert torch.equal(source[[2 * columns + 5]].images[0], expected)
    assert source[[len(source) - 1]].labels.item() == 5


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path, zipped):
    images = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    labels = np.array([2, 0, 1], np.uint8)
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        content = header + array.tobytes()
        path = tmp_path / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    source = load_source(Data(f"idx:{tmp_path}"))
    assert source.shape == (1, 4, 5)
    np.testing.assert_array_equal(source[[0, 1, 2]].images[:, 0], images)
    assert source[[0, 1, 2]].labels.tolist() == [2, 0, 1]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=path.name.removesuffix(".gz")):
        load_source(Data(f"idx:{tmp_path}"))


def test_a_folder_of_images_with_a_class_per_folder(pictures):
    source = load_source(Data(f"folder:{pictures}", resolution=8))
    assert source.shape == (3, 8, 8)
    assert source.classes == ["cat", "dog"]
    batch = source[list(range(20))]
    assert sorted(batch.images[:, 0, 0, 0].tolist()) == [*range(10), *range(100, 110)]
    assert torch.equal(batch.labels, (batch.images[:, 0, 0, 0] >= 100).long())
    assert load_source(Data(f"folder:{pictures}", resolution=8, mode="L")).shape == (1, 8, 8)


def test_images_are_cut_to_the_centred_square_before_scaling(tmp_path):
    (tmp_path / "p" / "one").mkdir(parents=True)
    wide = np.full((6, 10, 3), 200, np.uint8)
    wide[:, :2] = 0
    Image.fromarray(wide).save(tmp_path / "p" / "one" / "wide.png")
    source = load_source(Data(f"folder:{tmp_path / 'p'}", resolution=3))
    assert (source[[0]].images == 200).all()
    assert load_source(Data(f"folder:{tmp_path / 'p'}", crop=4)).shape == (3, 4, 4)


def test_images_are_resized_by_the_filter_asked_for(tmp_path):
    (tmp_path / "p" / "one").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p" / "one" / "random.png")
    found = {}
    for name, method in (("lanczos", Image.Resampling.LANCZOS), ("bilinear", Image.Resampling.BILINEAR)):
        source = load_source(Data(f"folder:{tmp_path / 'p'}", resolution=5, interpolation=name))
        found[name] = source.fingerprint()
        expected = torch.from_numpy(np.array(Image.fromarray(pixels).resize((5, 5), method))).permute(2, 0, 1)
        assert torch.equal(source[[0]].images[0], expected)
    assert load_source(Data(f"folder:{tmp_path / 'p'}", resolution=5)).fingerprint() == found["lanczos"]
    assert found["lanczos"] != found["bilinear"]
    Image.fromarray(pixels[:, ::-1]).save(tmp_path / "p" / "one" / "random.png")
    assert load_source(Data(f"folder:{tmp_path / 'p'}", resolution=5)).fingerprint() != found["lanczos"]


def test_classes_take_their_names_from_a_file(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"digit {number}\n" for number in range(10)))
    source = load_source(Data("digits", class_names=str(names), subset_fraction=0.1))
    assert source.classes[3] == "digit 3"
    objective = StableDiffusionObjective(StableDiffusion(pretrained="tiny-random", caption="class"), source)
    assert objective.captions == ["", *(f"digit {number}" for number in range(10))]
    names.write_text("one\ntwo\n")
    with pytest.raises(RecipeError, match=r"names.txt', expected a file of 10 lines, one for each class of digits"):
        load_source(Data("digits", class_names=str(names)))
    with pytest.raises(DataError, match=r"data.class_names: cannot read .*none.txt"):
        load_source(Data("digits", class_names=str(tmp_path / "none.txt")))


def test_a_hub_data_set_from_a_local_copy(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"img": [Image.new("RGB", (4, 4), (i, i, i)) for i in range(6)], "label": [0, 1] * 3}
    copy = tmp_path / "copy"
    copy.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(copy / "train.parquet")
    source = load_source(Data(f"hub:{copy}"))
    assert source.classes == ["x", "y"]
    batch = source[[4, 1]]
    assert batch.images[:, 0, 0, 0].tolist() == [4, 1]
    assert batch.labels.tolist() == [0, 1]


def test_a_subset_is_the_asked_share_and_decided_by_its_seed():
    first, again, other = (load_source(Data("digits", subset_fraction=0.1, subset_seed=s)) for s in (0, 0, 1))
    assert len(first) == 180
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)
    assert len(first.rows.unique()) == 180
    assert torch.equal(first[[3]].images, load_source(Data("digits"))[[first.rows[3].item()]].images)


def test_a_damaged_image_is_named_and_replaced_by_the_next(pictures, caplog, make):
    victim = pictures / "cat" / "3.png"
    victim.write_bytes(victim.read_bytes()[:40])
    options = {
        "data.source": f"folder:{pictures}",
        "data.resolution": "8",
        "train.steps": "2",
        "train.global_batch_size": "20",
        "train.batch_size_per_device": "10",
    }
    overrides = [argument for name, value in options.items() for argument in (f"--{name}", value)]
    output = loop.train(make("flow-matching-digits", *overrides), progress=False)
    assert len(json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])) > 4
    assert [record.message for record in caplog.records if "3.png" in record.message]
    assert caplog.text.count("3.png") == 1

    batch = load_source(Data(f"folder:{pictures}", resolution=8))[[2, 3]]
    assert batch.images[:, 0, 0, 0].tolist() == [2, 4]
    strict = load_source(Data(f"folder:{pictures}", resolution=8, on_unreadable="raise"))
    with pytest.raises(DataError, match=r"^unreadable image: .*3\.png") as error:
        list(strict.scan(20, workers=1))
    assert "Traceback" not in str(error.value)


def test_a_batch_is_copied_to_pinned_memory_as_a_whole(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self.clone())
    batch = load_source(Data("digits"))[[0, 1]]
    again = pin_memory(batch)
    assert [tensor.data_ptr() for tensor in pinned] == [batch.images.data_ptr(), batch.labels.data_ptr()]
    assert type(again) is type(batch)
    assert again.images.data_ptr() != batch.images.data_ptr()


def test_images_of_several_sizes_need_a_resolution(pictures):
    Image.new("RGB", (7, 7)).save(pictures / "cat" / "5.png")
    with pytest.raises(DataError, match=r"set data.resolution"):
        load_source(Data(f"folder:{pictures}"))[list(range(20))]


@pytest.mark.parametrize("source", ["folder:/nowhere", "idx:/nowhere"])
def test_a_missing_source_is_named(source):
    with pytest.raises(DataError, match="/nowhere"):
        load_source(Data(source))


@pytest.mark.parametrize("source", ["digit", "idx", "digits:3", "hub"])
def test_an_unknown_source_is_refused_before_anything_loads(source):
    with pytest.raises(RecipeError, match=f"data.source: got '{source}', expected digits"):
        load(["ddim-digits", "--data.source", source])


def test_a_resolution_that_the_images_do_not_have_is_refused():
    with pytest.raises(RecipeError, match="got 16, expected null: the images of digits are 8 x 8"):
        load_source(Data("digits", resolution=16))


def test_flips_mirror_half_of_the_images_the_same_way_every_time(make):
    runs = [loop.Run(make("ddim-digits", "--data.flip", flag)) for flag in ("true", "true", "false")]
    flipped, again, plain = (first_block(run).data for run in runs)
    assert torch.equal(flipped, again)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, plain, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 0 < sum(mirrored) < len(mirrored)


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_signed(pixels)), pixels)
    assert to_signed(pixels).min() == -1
    assert to_signed(pixels).max() == 1


def test_a_hub_data_set_that_was_saved_to_disk(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"img": [Image.new("L", (4, 4), i) for i in range(4)], "label": [0, 1] * 2}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table.select([0]), test=table).save_to_disk(tmp_path / "several")
    for place, split, count in (("one", "train", 4), ("several", "train", 1), ("several", "test", 4)):
        source = load_source(Data(f"hub:{tmp_path / place}", split=split))
        assert len(source) == count
        assert source[[count - 1]].images.unique().tolist() == [count - 1]
    with pytest.raises(DataError, match=r"several.*validation"):
        load_source(Data(f"hub:{tmp_path / 'several'}", split="validation"))


def test_a_loading_process_that_is_killed_is_told_in_one_line(monkeypatch):
    def killed(*_, **__):
        msg = "DataLoader worker (pid 7) is killed by signal: Killed. "
        raise RuntimeError(msg)
        yield

    monkeypatch.setattr("integrations.data.DataLoader", killed)
    said = r"a process that loads data has ended \(DataLoader worker \(pid 7\) is killed.*try fewer data.workers"
    with pytest.raises(DataError, match=said):
        list(load_source(Data()).blocks([Piece(0, 0, 2)], 0, workers=1))


def test_a_hub_data_set_is_asked_for_at_its_revision(monkeypatch):
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        msg = "offline"
        raise OSError(msg)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for revision in (None, "0b2714987fa478483af9968de7c934580d0bb9a2"):
        with pytest.raises(DataError, match="offline"):
            load_source(Data("cifar10", revision=revision))
        name, options = asked.pop()
        assert (name, options["revision"]) == ("uoft-cs/cifar10", revision)
