import dataclasses
import itertools

import pytest
import torch
from PIL import Image
from test_loop import assert_same_run
from tiny_recipes import interrupted

from integrations import config, loop, sections
from integrations.data import DataError, Piece, load_source

ROWS = 60


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Parquet files of uneven length; every pixel of a row is its number, its label the number's parity."""
    import datasets

    folder = tmp_path_factory.mktemp("rows")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    numbers = iter(range(ROWS))
    for part, count in enumerate((7, 30, 1, 22)):
        mine = [next(numbers) for _ in range(count)]
        rows = {"image": [Image.new("RGB", (8, 8), (i,) * 3) for i in mine], "label": [i % 2 for i in mine]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"train-{part:05}.parquet")
    return folder


def stream(files, **options):
    return load_source(sections.Data(f"hub:{files}", **{"streaming": True, "mode": "L", "rows": ROWS, **options}))


def numbers(batch):
    assert torch.equal(batch.images[:, 0, 0, 0] % 2, batch.labels)
    return batch.images[:, 0, 0, 0].tolist()


def epoch(source, number, *, seed=0, size=10, first=0, workers=0):
    pieces = [Piece(number, place, place + size) for place in range(first, len(source), size)]
    return [numbers(batch) for batch in source.blocks(pieces, seed, workers)]


def flat(batches):
    return list(itertools.chain(*batches))


def test_a_stream_tells_its_rows_in_order(files):
    source = stream(files)
    assert (len(source), source.shape, source.classes) == (ROWS, (1, 8, 8), ["even", "odd"])
    assert [numbers(batch) for batch in source.scan(50)] == [list(range(50)), list(range(50, ROWS))]


@pytest.mark.parametrize("shuffle_buffer", [1, 7, 1000])
def test_every_epoch_of_a_stream_visits_every_row_once_in_another_order(files, shuffle_buffer):
    source = stream(files, shuffle_buffer=shuffle_buffer)
    orders = [flat(epoch(source, number)) for number in (0, 1)]
    assert all(sorted(order) == list(range(ROWS)) for order in orders)
    assert (orders[0] != orders[1]) == (shuffle_buffer > 1)
    assert orders[0] == flat(epoch(source, 0))
    assert orders[0] != flat(epoch(source, 0, seed=1))


def test_a_stream_goes_on_from_any_place_and_with_any_number_of_workers(files):
    source = stream(files, shuffle_buffer=7)
    whole = epoch(source, 3)
    for i in range(len(whole)):
        assert epoch(source, 3, first=10 * i, workers=i % 3) == whole[i:]


def test_a_process_gets_its_own_blocks_of_a_stream(files):
    source = stream(files, shuffle_buffer=7)
    mine = [Piece(e, place, place + 5) for e in (0, 1) for place in range(5, ROWS, 20)]
    everyone = {e: flat(epoch(source, e)) for e in (0, 1)}
    found = [numbers(batch) for batch in source.blocks(mine, 0)]
    assert found == [everyone[piece.epoch][piece.first : piece.last] for piece in mine]


def overrides(files, *further):
    options = {
        "data.source": f"hub:{files}",
        "data.streaming": "true",
        "data.mode": "L",
        "data.shuffle_buffer": "9",
        "data.rows": str(ROWS),
        "data.flip": "true",
        "train.steps": "9",
    }
    return [argument for name, value in options.items() for argument in (f"--{name}", value)] + list(further)


def test_a_streamed_run_that_was_interrupted_resumes_bit_for_bit_in_a_later_epoch(make, files):
    whole = loop.train(make("flow-matching-digits", *overrides(files), folder="whole"), progress=False)
    with interrupted(7):  # three steps an epoch
        loop.train(make("flow-matching-digits", *overrides(files)), progress=False)
    again = overrides(files, "--resume", "auto", "--data.workers", "2")
    assert_same_run(whole, loop.train(make("flow-matching-digits", *again), progress=False), 9)


def test_damaged_images_of_a_streamed_folder_are_named_and_replaced(tmp_path, make, caplog):
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (8, 8), 100 * label + 2 * i + label).save(tmp_path / "pictures" / name / f"{i}.png")
    (tmp_path / "pictures" / "cat" / "3.png").write_bytes(b"no picture")
    place = f"folder:{tmp_path / 'pictures'}"
    section = sections.Data(place, streaming=True, mode="L", shuffle_buffer=1, rows=20)
    source = load_source(section)
    assert source.classes == ["cat", "dog"]
    (batch,) = source.scan(20)
    assert len(batch.unreadable) == 1
    assert "3.png" in batch.unreadable[0]
    assert torch.equal(batch.images[3], batch.images[4])
    assert len(batch.images[:, 0, 0, 0].unique()) == 19
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^unreadable image: .*3\.png") as error:
            list(load_source(dataclasses.replace(section, on_unreadable="raise")).scan(20, workers))
        assert "Traceback" not in str(error.value)


def test_a_stream_shorter_than_said_or_of_unknown_length_is_refused(files):
    with pytest.raises(DataError, match=r"ended before its row 60"):
        list(stream(files, rows=70).scan(100))
    with pytest.raises(config.RecipeError, match=r"data.rows: got None, expected the number"):
        stream(files, rows=None)


def test_streaming_what_is_held_in_memory_or_a_subset_is_refused(files):
    with pytest.raises(config.RecipeError, match=r"data.streaming: got True, expected false for a subset"):
        stream(files, subset_fraction=0.5)
    with pytest.raises(config.RecipeError, match=r"data.streaming: got True, expected false for data.source = digits"):
        config.load(["ddim-digits", "--data.streaming", "true"])
