"""Dataset-level couplings: closed forms, the promise to noise and data, files, resuming, and wrong input."""

import logging
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from couplings import semidiscrete
from couplings.noise import normal, row_seeds
from couplings.semidiscrete import Semidiscrete, fit
from couplings.semidiscrete.ascent import Shares
from couplings.semidiscrete.rows import Rows
from couplings.semidiscrete.search import Search, _lines, _read_off, _read_off_cpu


def drawn(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def shares(plan, n=20000, classes=None):
    """How often each row is picked, as a multiple of 1/N."""
    noise = drawn(n, *plan.shape, seed=99)
    return torch.bincount(plan.assign(noise, classes), minlength=len(plan)) * len(plan) / n


@pytest.fixture(scope="module")
def images():
    """A mixture, so that some rows are much nearer to the noise than others."""
    scale = torch.rand(300, 1, 1, generator=torch.Generator().manual_seed(5)) + 0.2
    return drawn(300, 4, 6) * scale + 3.0


@pytest.fixture(scope="module")
def plan(images):
    return fit(images)


# --- closed forms


@pytest.mark.parametrize("count", [1, 2, 7, 100, 20000])
def test_on_a_line_the_plan_is_the_quantile_map(count):
    data = drawn(count, 1, seed=1).mul(3.0).add(5.0)
    plan = fit(data)
    noise = drawn(4000, 1)
    place = (torch.special.ndtr(noise[:, 0].double()) * count).long()
    expected = data[:, 0].argsort()[place]
    apart = (data[plan.assign(noise), 0].sort().values - data[expected, 0].sort().values).abs()
    assert (plan.assign(noise) == expected).double().mean() > 0.99
    assert apart.max() < 0.5
    assert plan.chi2 < 0.05


def test_symmetric_atoms_get_equal_shares():
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
    plan = fit(corners)
    assert plan.potentials.abs().max() < 0.05
    noise = drawn(1000, 3)
    assert (corners[plan.assign(noise)] == noise.sign()).all(1).double().mean() > 0.95
    assert (shares(plan) - 1).abs().max() < 0.1


def test_two_atoms_give_a_half_space():
    data = torch.tensor([[4.0, 1.0], [7.0, 5.0]])
    noise = drawn(2000, 2)
    beyond = (noise @ (data[1] - data[0]) > 0).long()
    assert (fit(data, tolerance=1e-4).assign(noise) == beyond).double().mean() > 0.99


def test_every_row_is_picked_equally_often(plan, images):
    assert plan.chi2 < 0.05
    assert shares(plan).sub(1).square().mean() < 0.05 + len(images) / 20000 * 1.2
    untrained = Semidiscrete(torch.zeros(300), 0.0, None, plan.shape, plan.fingerprint, False, plan.parts)
    assert shares(untrained).sub(1).square().mean() > 0.5


def test_pairs_are_nearer_than_those_of_minibatches(plan):
    quality = plan.quality()
    assert quality.distance < quality.minibatch_1024 < quality.minibatch_128 < quality.independent
    assert quality.used > 0.98
    assert quality.gap < 0.01


def test_chi2_agrees_with_plain_picks(plan):
    """The estimate from combinations of noise rows is that from rows drawn one by one."""
    rows = plan.parts[0].rows
    search, measured = Search(rows), Shares(rows)
    potentials = torch.zeros(300)
    combined = measured.chi2(search.combined(potentials, drawn(4096, 24)))
    single = measured.chi2(search.highest(potentials, drawn(30000, 24, seed=1))[1])
    assert combined == pytest.approx(single, rel=0.1)


def test_combinations_are_unit_and_sixty_degrees_apart():
    lines = _lines(torch.device("cpu"))
    both = torch.cat([lines, -lines])
    products = both @ both.T
    assert lines.shape == (120, 8)
    torch.testing.assert_close(products.diagonal(), torch.ones(240))
    assert products.fill_diagonal_(-1.0).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("level", [-1000.0, 0.0])
def test_the_kernel_reads_off_what_plain_torch_does(level):
    scores, potentials, lines = drawn(3, 8, 700), drawn(700, seed=1) + level, _lines(torch.device("cpu"))
    answers = []
    for read_off in (_read_off, _read_off_cpu):
        best, pick = torch.full((3, 240), -math.inf), torch.zeros((3, 240), dtype=torch.int64)
        read_off(scores, potentials, lines, 10, best, pick)
        read_off(scores.flip(2), potentials, lines, 710, best, pick)
        answers.append((best, pick))
    torch.testing.assert_close(answers[0][0], answers[1][0])
    assert (answers[0][1] == answers[1][1]).double().mean() > 0.999


def test_rough_products_make_nearly_the_same_picks():
    """Where the processor has bfloat16; elsewhere the picks are the same."""
    data, noise = drawn(500, 200), drawn(64, 200, seed=1)
    search = Search(Rows(data))
    potentials = -math.sqrt(2 * math.log(500)) * data.norm(dim=1)
    exact, rough = (search.combined(potentials, noise, rough=rough) for rough in (False, True))
    assert (exact == rough).double().mean() > 0.9


# --- invariances


def test_classes_are_fitted_apart(images):
    classes = torch.arange(300) % 3 * 5 - 4
    plan = fit(images, classes=classes, steps=30)
    noise = drawn(200, 4, 6)
    for label in (-4, 1, 6):
        members = (classes == label).nonzero().flatten()
        alone = fit(images[members], steps=30)
        torch.testing.assert_close(plan.potentials[members], alone.potentials, rtol=0, atol=1e-5)
        assert torch.equal(plan.assign(noise, torch.full((200,), label)), members[alone.assign(noise)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offsets_change_nothing(images, plan, dtype):
    moved = images.to(dtype) + 1000.0
    same = fit(moved - 1000.0)
    offset = fit(moved)
    noise = drawn(500, 4, 6)
    torch.testing.assert_close(offset.potentials, same.potentials, rtol=0, atol=0.02)
    assert (offset.assign(noise) == same.assign(noise)).double().mean() > 0.97


@pytest.mark.parametrize("kind", ["tensor", "array", "float16", "memmap"])
def test_data_comes_in_any_container(images, kind, tmp_path):
    half = images.half()
    data = {"tensor": half.float(), "array": half.float().numpy(), "float16": half.numpy()}.get(kind)
    if kind == "memmap":
        np.save(tmp_path / "data.npy", half.numpy())
        data = np.load(tmp_path / "data.npy", mmap_mode="r")
    plan, expected = fit(data, steps=12), fit(half.float(), steps=12)
    assert torch.equal(plan.potentials, expected.potentials)
    assert plan.fingerprint == expected.fingerprint
    noise = drawn(50, 4, 6)
    index = plan.assign(noise.numpy())
    assert isinstance(index, np.ndarray)
    assert np.array_equal(index, expected.assign(noise).numpy())


def test_chunks_change_nothing(images, monkeypatch):
    expected = fit(images, steps=12)
    monkeypatch.setattr("couplings.semidiscrete.rows._CHUNK_VALUES", 1)
    many = torch.cat([images, drawn(300, 4, 6, seed=3)])
    assert Rows(many).chunk == 256
    torch.testing.assert_close(fit(images, steps=12).potentials, expected.potentials)
    whole = (many.flatten(1) - many.flatten(1).mean(0)) @ drawn(1, 24)[0]
    assert fit(many, steps=1).assign(drawn(1, 4, 6)).shape == (1,)
    assert int(Search(Rows(many)).highest(torch.zeros(600), drawn(1, 24))[1]) == int(whole.argmax())


def test_the_same_seed_gives_the_same_plan_and_leaves_the_global_state(images):
    before = torch.get_rng_state()
    first, second = fit(images, steps=12, seed=4), fit(images, steps=12, seed=4)
    assert torch.equal(first.potentials, second.potentials)
    assert not torch.equal(first.potentials, fit(images, steps=12, seed=5).potentials)
    list(first.loader(images, 100))
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_rows_share_evenly():
    data = torch.cat([drawn(30, 6), drawn(30, 6)[:10], drawn(30, 6)[:10]])  # rows 0 to 9 come three times
    plan = fit(data, tolerance=0.02)
    assert plan.chi2 < 0.02
    assert torch.equal(plan.potentials[:10], plan.potentials[40:])
    assert (shares(plan)[:10] - shares(plan)[40:]).abs().max() < 0.35
    constant = fit(torch.ones(8, 3))
    assert abs(constant.chi2) < 0.05
    assert (shares(constant) - 1).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3)])
def test_rows_of_float64_may_differ_by_less_than_float32_holds(shape):
    near = drawn(100, *shape).double()
    plan = fit(near + 2.0**30, mirrored=len(shape) > 1)
    assert all(part.rows.copies is None for part in plan.parts)
    noise = drawn(500, *shape)
    same = Semidiscrete(
        plan.potentials, 0.0, None, plan.shape, "", plan.mirrored, fit(near, mirrored=plan.mirrored).parts
    )
    assert (plan.assign(noise) == same.assign(noise)).double().mean() > 0.98


def test_equal_rows_are_found_across_chunks(monkeypatch):
    short = drawn(300, 4).double()  # as float32 holds it
    data = torch.cat([short, drawn(300, 4).double() / 3.0, short[:1]])
    monkeypatch.setattr("couplings.semidiscrete.rows._CHUNK_VALUES", 256 * 4)
    chunked = Rows(data)
    monkeypatch.undo()
    assert chunked.copies.first[-1] == 0
    assert chunked.fingerprint == Rows(data).fingerprint
    assert Rows(short).fingerprint == Rows(short.float()).fingerprint


def test_one_row_gets_all_noise():
    plan = fit(drawn(1, 5))
    assert plan.chi2 == 0.0
    assert plan.assign(drawn(7, 5)).tolist() == [0] * 7
    assert [len(noise) for _, noise in plan.loader(drawn(1, 5), 1)] == [1]


def test_a_few_atoms_in_the_plane_come_to_rest():
    """96 atoms and a plane, as in a tutorial: chi^2 1.18 after 5,000 batches of 128, .04 after 30,000 (OTT-JAX)."""
    angle = torch.arange(96) * (2 * math.pi / 96)
    data = torch.stack([angle.cos(), angle.sin()], 1) * (1 + drawn(96, 1).abs())
    seen = []
    plan = fit(data, batch_size=128, steps=100, tolerance=0.03, progress=lambda done, where: seen.append((done, where)))
    assert plan.chi2 < 0.03
    chi2 = [float(where.rpartition(" ")[2]) for _, where in seen]
    assert chi2[0] > 0.3
    assert sorted(chi2, reverse=True)[-1] == chi2[-1]
    assert seen[-1][0] == 1.0
    assert all(0.0 <= done <= 1.0 for done, _ in seen)


# --- the loader


class Numbered(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return {"image": self.data[i], "number": i}


@pytest.mark.parametrize("workers", [0, 2])
def test_balanced_epochs_use_every_row_once(plan, images, workers):
    loader = plan.loader(Numbered(images), 64, seed=3, num_workers=workers)
    for epoch in range(2 if workers == 0 else 1):
        seeds, index = loader.pairs(epoch)
        numbers, noise = [], []
        for batch, z in loader:
            assert torch.equal(batch["image"], images[batch["number"]])
            numbers.append(batch["number"])
            noise.append(z)
        assert torch.equal(torch.cat(numbers).sort().values, torch.arange(300))
        assert torch.equal(torch.cat(numbers), index)
        assert torch.equal(torch.cat(noise), normal(seeds, (4, 6)))  # bit for bit what was drawn
        assert 0 < loader.moved < 150
        assert loader.epoch == epoch + 1


def test_without_balance_each_noise_keeps_its_pick(plan, images):
    loader = plan.loader(Numbered(images), 50, balanced=False)
    for batch, noise in loader:
        assert torch.equal(batch["number"], plan.assign(noise))
    assert loader.moved == 0


def test_moving_costs_little(plan, images):
    """Balanced pairs are nearer than those of an exact coupling of minibatches of 64."""
    from couplings import couple

    loader = plan.loader(Numbered(images), 300)
    [(batch, noise)] = list(loader)
    balanced = (batch["image"] - noise).square().sum((1, 2)).mean()
    blocks = zip(images.split(64), normal(row_seeds(1, 0, 300), (4, 6)).split(64), strict=True)
    minibatch = sum(float(couple(x, z).cost) * len(x) for x, z in blocks) / 300
    assert balanced < minibatch


def test_classes_are_kept_by_the_loader(images):
    classes = torch.arange(300) % 3
    plan = fit(images, classes=classes, steps=20)
    for balanced in (True, False):
        loader = plan.loader(Numbered(images), 100, balanced=balanced)
        numbers = torch.cat([batch["number"] for batch, _ in loader])
        assert torch.equal(torch.bincount(classes[numbers]), torch.tensor([100, 100, 100]))
    assert loader.pairs(0)[1].shape == (300,)


@pytest.mark.parametrize(("size", "ranks"), [(64, 2), (7, 3), (149, 2), (1, 4)])
def test_ranks_share_an_epoch(plan, images, size, ranks):
    every = []
    loaders = [plan.loader(Numbered(images), size, rank=r, world_size=ranks) for r in range(ranks)]
    for loader in loaders:
        numbers = [batch["number"] for batch, _ in loader]
        assert len(numbers) == len(loader) == len(loaders[0])
        every += numbers
    assert torch.equal(torch.cat(every).sort().values, torch.arange(300))


def test_a_loader_goes_on_where_it_stood(plan, images):
    loader = plan.loader(Numbered(images), 64)
    whole = [*loader, *loader]
    again = plan.loader(Numbered(images), 64)
    for _ in zip(range(3), again, strict=False):
        state = again.state_dict()
    resumed = plan.loader(Numbered(images), 64)
    resumed.load_state_dict(state)
    rest = [*resumed, *resumed]
    assert len(rest) == len(whole) - 3
    for (batch, noise), (expected, drawn_before) in zip(rest, whole[3:], strict=True):
        assert torch.equal(batch["number"], expected["number"])
        assert torch.equal(noise, drawn_before)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_anew_in_every_epoch_and_on_every_rank(plan, images, workers):
    loaders = [
        plan.loader(Augmented(), 100, rank=r, world_size=2, num_workers=workers, multiprocessing_context="fork")
        for r in range(2)
    ]
    numbers = torch.cat([batch for loader in loaders for _ in range(2) for batch, _ in loader])
    assert len(numbers.unique()) == len(numbers)


class Augmented:
    def __len__(self):
        return 300

    def __getitem__(self, row):
        return torch.rand((), dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32}, "batch_size=32, not 64"),
        ({"world_size": 2}, "world_size=2, not 1"),
        ({"seed": 1}, "seed=1, not 0"),
        ({"handed": -1}, "handed=-1"),
        ({"epoch": None}, "epoch=-1"),
    ],
)
def test_the_state_of_another_loader_is_refused(plan, images, changes, message):
    loader = plan.loader(Numbered(images), 64)
    state = {name: value for name, value in {**loader.state_dict(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(state)


def test_labels_may_be_large(images):
    labels = torch.arange(300) % 2
    small, large = (fit(images, classes=labels + offset, tolerance=0.2) for offset in (0, 2**40))
    assert large.quality(rows=2048) == small.quality(rows=2048)


# --- mirrored data


@pytest.fixture(scope="module")
def mirrored(images):
    return fit(images, mirrored=True)


def both_ways(data):
    return torch.cat([data, data.flip(-1)])


def test_mirrored_data_need_not_be_stored_twice(images, mirrored):
    """It is the plan of the rows and the flipped rows, in which a row and its mirror image have one potential."""
    noise = drawn(400, 4, 6, seed=8)
    stored = both_ways(images).flatten(1)
    scores = mirrored.potentials.repeat(2) + noise.flatten(1) @ (stored - stored.mean(0)).T
    assert torch.equal(mirrored.assign(noise), scores.argmax(1))
    assert mirrored.chi2 < 0.05
    assert torch.bincount(mirrored.assign(drawn(20000, 4, 6, seed=9)) % 300, minlength=300).double().var() < 25 * 66
    twice = fit(both_ways(images))
    apart = (twice.potentials[:300] - twice.potentials[300:]).abs().mean()
    assert (mirrored.potentials - twice.potentials.view(2, 300).mean(0)).abs().mean() < apart + 0.1


@pytest.mark.parametrize("data", [drawn(7, 1), drawn(1, 5), drawn(20, 3, 1)], ids=["line", "one row", "no width"])
def test_rows_without_a_mirror_image_of_their_own(data):
    noise = drawn(50, *data.shape[1:], seed=9)
    plan, plain = fit(data, mirrored=True, steps=20), fit(data, steps=20)
    torch.testing.assert_close(plan.potentials, plain.potentials, rtol=0, atol=1e-4)
    assert torch.equal(plan.assign(noise) % len(data), plain.assign(noise))


def test_flipped_noise_picks_the_mirror_image(mirrored):
    noise = drawn(200, 4, 6, seed=9)
    index = mirrored.assign(noise)
    assert torch.equal(mirrored.assign(noise.flip(-1)), (index + 300) % 600)
    assert 0.3 < (index >= 300).double().mean() < 0.7


def test_rows_that_mirror_each_other_share_evenly(images):
    data = torch.cat([images[:40], images[:10].flip(-1)])
    plan = fit(data, mirrored=True, tolerance=0.02)
    assert torch.equal(plan.potentials[:10], plan.potentials[40:])
    noise = drawn(20000, 4, 6, seed=9)
    index = plan.assign(noise)
    share = torch.bincount(index % 50, minlength=50) * 50 / 20000
    assert (share[:10] - share[40:]).abs().max() < 0.35
    found = both_ways(data)[index].flatten(1)
    other = both_ways(data)[(index + 50) % 100].flatten(1)
    assert ((found * noise.flatten(1)).sum(1) >= (other * noise.flatten(1)).sum(1) - 1e-4).all()


@pytest.mark.parametrize("classes", [None, torch.arange(300) % 2])
def test_a_mirrored_loader_hands_out_flipped_rows(images, mirrored, classes):
    plan = mirrored if classes is None else fit(images, classes=classes, mirrored=True, steps=12)
    numbered = torch.utils.data.TensorDataset(images, torch.arange(300))
    loader = plan.loader(numbered, 64, num_workers=1)
    index = loader.pairs(0)[1]
    rows, numbers, noise = [], [], []
    for (batch, number), z in loader:
        rows.append(batch)
        numbers.append(number)
        noise.append(z)
    assert torch.equal(torch.cat(numbers), index % 300)
    assert torch.equal(torch.cat(numbers).sort().values, torch.arange(300))
    assert torch.equal(torch.cat(rows), both_ways(images)[index])
    here, there = (both_ways(images)[i].flatten(1) for i in (index, (index + 300) % 600))
    assert ((here - there) * torch.cat(noise).flatten(1)).sum(1).min() > -1e-3  # the nearer one


def test_items_of_ones_own_are_flipped_by_ones_own_function(images, mirrored):
    with pytest.raises(TypeError, match="pass mirror="):
        list(mirrored.loader(Numbered(images), 300))
    loader = mirrored.loader(
        Numbered(images), 300, mirror=lambda item: {"image": item["image"].flip(-1), "number": -item["number"]}
    )
    [(batch, _)] = loader
    assert torch.equal(batch["image"], both_ways(images)[loader.pairs(0)[1]])
    assert (batch["number"] < 0).any()


def test_a_mirrored_plan_is_saved_and_measured(images, mirrored, tmp_path):
    mirrored.save(tmp_path / "plan.safetensors")
    loaded = Semidiscrete.load(tmp_path / "plan.safetensors", images)
    noise = drawn(40, 4, 6)
    assert torch.equal(loaded.assign(noise), mirrored.assign(noise))
    quality = loaded.quality()
    assert quality.distance < quality.minibatch_2048 < quality.minibatch_128 < quality.independent
    fit(images, steps=1, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="fit with mirrored=False, not True"):
        fit(images, steps=1, checkpoint=tmp_path / "c", mirrored=True)


# --- files and resuming


def test_a_plan_is_saved_and_loaded(plan, images, tmp_path):
    plan.save(tmp_path / "plan.safetensors")
    noise = drawn(40, 4, 6)
    loaded = Semidiscrete.load(tmp_path / "plan.safetensors", images)
    assert torch.equal(loaded.potentials, plan.potentials)
    assert loaded.chi2 == plan.chi2
    assert torch.equal(loaded.assign(noise), plan.assign(noise))
    bare = Semidiscrete.load(tmp_path / "plan.safetensors")
    assert bare.shape == (4, 6)
    with pytest.raises(ValueError, match="loaded without its data"):
        bare.assign(noise)
    with pytest.raises(ValueError, match="loaded without its data"):
        bare.loader(images, 10)


def test_a_plan_with_classes_is_saved_and_loaded(images, tmp_path):
    classes = torch.arange(300) % 2
    plan = fit(images, classes=classes, steps=12)
    plan.save(tmp_path / "plan.safetensors")
    loaded = Semidiscrete.load(tmp_path / "plan.safetensors", images)
    noise = drawn(300, 4, 6)
    assert torch.equal(loaded.assign(noise, classes), plan.assign(noise, classes))


def test_other_data_and_damaged_files_are_refused(plan, images, tmp_path):
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    other = images.clone()
    other[17, 0, 0] += 1e-3
    with pytest.raises(ValueError, match="fitted to other data"):
        Semidiscrete.load(path, other)
    with pytest.raises(ValueError, match="fitted to other data"):
        Semidiscrete.load(path, images.flip(0))
    with pytest.raises(ValueError, match="fitted to data of shape"):
        Semidiscrete.load(path, images[:10])
    whole = path.read_bytes()
    number = whole.index(b"chi2") + 8  # a digit of what is told, and a bit of a potential
    changed = [bytearray(whole), bytearray(whole)]
    changed[0][number] ^= 1
    changed[1][-9] ^= 4
    for damaged in (whole[:100], whole[:-5], b"", b"\0" * 200, *changed):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            Semidiscrete.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Semidiscrete.load(tmp_path / "missing.safetensors")


def test_a_checkpoint_is_no_plan(images, tmp_path):
    fit(images, steps=1, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="is no plan"):
        Semidiscrete.load(tmp_path / "c")


def test_places_where_nothing_can_be_written_are_named_as_given(images, tmp_path, monkeypatch):
    missing = tmp_path / "missing" / "file"
    plan = fit(images, steps=1)
    with pytest.raises(FileNotFoundError, match=r"missing/file: the folder .*missing does not exist"):
        plan.save(missing)
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        Semidiscrete.load(tmp_path)
    monkeypatch.setattr(semidiscrete.plan, "ascend", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(FileNotFoundError, match=r"missing/file: the folder .*missing does not exist"):
        fit(images, steps=1, checkpoint=missing)
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        fit(images, steps=1, checkpoint=tmp_path)


def test_seeds_of_numpy_go_into_checkpoints(images, tmp_path):
    fit(images, steps=1, seed=np.int64(3), checkpoint=tmp_path / "c")
    fit(images, steps=1, seed=3, checkpoint=tmp_path / "c")
    with pytest.raises(TypeError, match="seed= must be an integer"):
        fit(images, steps=1, seed=1.5)


@pytest.mark.parametrize("classes", [None, torch.arange(300) % 2])
def test_resuming_equals_never_stopping(images, tmp_path, classes, monkeypatch):
    options = {"classes": classes, "tolerance": 1e-6, "batch_size": 64}
    whole = fit(images, steps=40, **options)
    path = tmp_path / "checkpoint"
    fit(images, steps=17, checkpoint=path, **options)

    class KilledError(Exception):
        pass

    written = semidiscrete.plan._write_checkpoint
    calls = []

    def kill_later(*args):
        written(*args)
        calls.append(1)
        if len(calls) == 3:
            raise KilledError

    monkeypatch.setattr(semidiscrete.plan, "_write_checkpoint", kill_later)
    with pytest.raises(KilledError):
        fit(images, steps=40, checkpoint=path, **options)
    monkeypatch.undo()
    resumed = fit(images, steps=40, checkpoint=path, **options)
    assert torch.equal(resumed.potentials, whole.potentials)
    assert resumed.chi2 == whole.chi2
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("classes", [None, torch.arange(300) % 2])
def test_what_is_fitted_is_not_fitted_on(images, tmp_path, classes):
    whole = fit(images, classes=classes)
    for _ in range(2):
        again = fit(images, classes=classes, checkpoint=tmp_path / "checkpoint")
        assert torch.equal(again.potentials, whole.potentials)
        assert again.chi2 == whole.chi2


def test_a_small_tolerance_is_not_reached_by_chance():
    data = drawn(40, 2)
    plan = fit(data, tolerance=1e-3)
    picked = shares(plan, n=1_000_000) - 1.0
    assert picked.square().mean() < 1.5e-3


def test_a_checkpoint_of_another_fit_is_refused(images, tmp_path):
    path = tmp_path / "checkpoint"
    fit(images, steps=1, checkpoint=path)
    for data, options in ((images, {"seed": 1}), (images + 1, {}), (images, {"batch_size": 64})):
        with pytest.raises(ValueError, match="is the checkpoint of a fit with"):
            fit(data, steps=1, checkpoint=path, **options)


def test_a_tolerance_that_is_not_reached_is_said(images, caplog):
    with caplog.at_level(logging.WARNING):
        fit(images, steps=1, tolerance=1e-9)
    assert "tolerance=1e-09 was not reached" in caplog.text


def test_progress_is_shown_on_request_only(images, capfd):
    fit(images, steps=1)
    assert capfd.readouterr() == ("", "")
    pytest.importorskip("tqdm")
    fit(images, steps=1, progress=True)
    assert "chi^2" in capfd.readouterr().err


def test_progress_without_tqdm_is_logged(images, caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        fit(images, steps=1, progress=True)
    assert "step 1: chi^2" in caplog.text


def test_missing_safetensors_names_the_extra(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'couplings\[cli\]'"):
        plan.save(tmp_path / "plan")


# --- wrong input


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "got list"),
        (torch.ones(3, 2, dtype=torch.uint8), {}, TypeError, "must be floating"),
        (torch.ones(3), {}, ValueError, r"shape \(N, \*shape\)"),
        (torch.ones(0, 2), {}, ValueError, "at least one row"),
        (torch.tensor([[1.0], [math.nan]]), {}, ValueError, "NaN or infinity .first: row 1"),
        (torch.tensor([[math.inf], [1.0]]), {}, ValueError, "NaN or infinity .first: row 0"),
        (torch.ones(3, 2), {"classes": torch.ones(3)}, TypeError, "classes= must be integers"),
        (torch.ones(3, 2), {"classes": torch.arange(4)}, ValueError, r"shape \(3,\)"),
        (torch.ones(3, 2), {"batch_size": 0}, ValueError, "batch_size="),
        (torch.ones(3, 2), {"steps": 0}, ValueError, "steps="),
        (torch.ones(3, 2), {"tolerance": 0.0}, ValueError, "tolerance="),
        (torch.ones(3, 2), {"group": object()}, ValueError, "init_process_group"),
    ],
)
def test_wrong_data_and_options_are_refused(data, options, error, message):
    with pytest.raises(error, match=message):
        fit(data, **options)


def test_wrong_noise_is_refused(plan, images):
    with pytest.raises(ValueError, match=r"shape \(n, 4, 6\)"):
        plan.assign(drawn(3, 24))
    with pytest.raises(TypeError, match="floating"):
        plan.assign(torch.ones(3, 4, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN"):
        plan.assign(torch.full((3, 4, 6), math.nan))
    with pytest.raises(ValueError, match="the plan has none"):
        plan.assign(drawn(3, 4, 6), torch.arange(3))
    assert plan.assign(drawn(0, 4, 6)).shape == (0,)
    by_class = fit(images, classes=torch.arange(300) % 2, steps=1)
    with pytest.raises(ValueError, match="pass classes="):
        by_class.assign(drawn(3, 4, 6))
    with pytest.raises(ValueError, match="class 2 has no data"):
        by_class.assign(drawn(3, 4, 6), torch.arange(3))


@pytest.mark.parametrize(
    ("size", "options", "error", "message"),
    [
        (0, {}, ValueError, "batch_size= must be from 1 to 300"),
        (301, {}, ValueError, "batch_size= must be from 1 to 300"),
        (10, {"shuffle": True}, TypeError, "shuffle= cannot be set"),
        (10, {"rank": 0}, ValueError, "given together"),
        (10, {"rank": 2, "world_size": 2}, ValueError, "rank= must be from 0 to 1"),
    ],
)
def test_wrong_loader_options_are_refused(plan, images, size, options, error, message):
    with pytest.raises(error, match=message):
        plan.loader(images, size, **options)


def test_a_dataset_of_another_length_is_refused(plan, images):
    with pytest.raises(ValueError, match="the dataset has 10"):
        plan.loader(images[:10], 5)


# --- ranks


def _fit_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = drawn(301, 24)
    plan = fit(data, steps=12, batch_size=64, tolerance=1e-6, group=dist.group.WORLD, checkpoint=f"{folder}/checkpoint")
    errors = []
    for own, options in ((data, {"seed": rank}), (data * math.nan if rank else data, {}), (data + rank, {})):
        try:
            fit(own, group=dist.group.WORLD, **options)
        except ValueError as error:
            errors.append(str(error))
    torch.save((plan.potentials, plan.chi2, errors), f"{folder}/{rank}.pt")
    dist.barrier()  # neither leaves while the other still exchanges
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_fit_on_a_rank, (str(tmp_path),), nprocs=2)
    alone = fit(drawn(301, 24), steps=12, batch_size=64, tolerance=1e-6)
    for rank in range(2):
        potentials, chi2, errors = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(potentials, alone.potentials, rtol=0, atol=1e-4)
        assert chi2 == pytest.approx(alone.chi2, abs=1e-3)
        assert "every rank must pass the same seed" in errors[0]
        assert "rank 1: data contains NaN" in errors[1]
        assert "every rank must pass the same data" in errors[2]
