"""The benchmark of pools: that each way of pairing trains on what it says, and what is on record afterwards."""

import time
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from benchmarks import pools_tables
from benchmarks.pools import pairs, train
from benchmarks.pools.networks import Stack
from benchmarks.pools.studies import STUDIES, Begun, Consistency, Noisier, Pools, Renoised
from benchmarks.record import read
from couplings import couple
from couplings.semidiscrete import Semidiscrete
from integrations.data import load_source
from integrations.features import Classifier
from integrations.randomness import Draws
from integrations.sections import Data
from integrations.small_networks import ConvNextModel

TINY = {
    "model.width": "8",
    "model.depth": "1",
    "train.steps": "3",
    "train.checkpoint_every": "2",
    "train.global_batch_size": "16",
    "train.batch_size_per_device": "16",
    "evaluate.samples": "70",
}
FURTHER = tuple(text for field, value in TINY.items() for text in (f"--{field}", value))
BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of 64 images."""
    path = tmp_path_factory.mktemp("pools")
    pairs.fit(images(), path)
    return path


def images():
    return torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


def stream(name, folder, steps=8, seed=3):
    """Return all data and noise of some steps."""
    run = pairs.Run(images(), BATCH, steps, seed, folder)
    data, noise = zip(*islice(pairs.PAIRINGS[name](run), steps), strict=True)
    return run, torch.cat(data), torch.cat(noise)


def distance(data, noise):
    return (data - noise).square().flatten(1).sum(1)


@pytest.mark.parametrize("name", [name for name in pairs.PAIRINGS if name != "semidiscrete"])
def test_data_comes_in_the_same_order_whatever_the_pairing(name, folder):
    run, data, noise = stream(name, folder)
    assert torch.equal(data, run.images[run.order().flatten()])
    assert len(data[:64].unique(dim=0)) == 64  # an epoch
    assert noise.shape == data.shape
    assert len(noise.unique(dim=0)) == len(noise)
    assert abs(float(noise.mean())) < 0.15
    assert not torch.equal(noise, stream(name, folder, seed=4)[2])


@pytest.mark.parametrize(("name", "pool"), [("batch", BATCH), ("batch-l2", BATCH), ("window", 16 * BATCH)])
def test_pairs_are_the_nearest_within_their_pool(name, pool, folder):
    _, data, noise = stream(name, folder, steps=16)
    metric = "l2" if name == "batch-l2" else "sqeuclidean"
    for x, z in zip(data.split(pool), noise.split(pool), strict=True):
        assert couple(x, z, metric=metric).reduction == pytest.approx(0, abs=1e-6)
    larger = couple(data, noise, metric=metric).reduction
    assert larger > 0.01 if pool < len(data) else larger < 1e-6


def test_all_couplings_come_nearer_than_chance_and_the_larger_pool_nearest(folder):
    means = {name: distance(*stream(name, folder, 16)[1:]).mean().item() for name in pairs.PAIRINGS}
    assert means["semidiscrete"] < means["batch"] < means["independent"] - 1
    assert means["window"] < means["batch"]
    assert max(means["nearest-l2"], means["nearest-dot"]) < means["independent"] - 1
    # The l2 score takes short noise.
    norms = {name: stream(name, folder, 16)[2].norm().item() for name in ("nearest-l2", "nearest-dot")}
    assert norms["nearest-l2"] < norms["nearest-dot"]


def test_the_data_of_a_dataset_level_coupling_is_what_its_noise_picks(folder):
    run, data, noise = stream("semidiscrete", folder)
    plan = Semidiscrete.load(folder / pairs.PLAN, run.images)
    assert plan.chi2 < pairs.TOLERANCE
    assert torch.equal(data, run.images[plan.assign(noise)])


def test_kept_noise_comes_again_nearer_to_its_data(folder, monkeypatch):
    monkeypatch.setattr(pairs, "SEEDS_KEPT", 1)
    _, data, noise = stream("persistent", folder, steps=32)
    epochs = [noise[k : k + 64] for k in range(0, 256, 64)]
    for epoch in epochs[1:]:
        assert torch.equal(epoch.unique(dim=0), epochs[0].unique(dim=0))
    totals = [distance(data[k : k + 64], noise[k : k + 64]).sum() for k in range(0, 256, 64)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("run", [Stack.__call__, Stack.together])
def test_a_stack_is_its_networks(run):
    networks = [ConvNextModel(8, 2, 2, patch_size=4, width=8, depth=2, kernel_size=3) for _ in range(3)]
    for weight in (weight for network in networks for weight in network.parameters()):
        torch.nn.init.normal_(weight, std=0.2)
    whole = Stack.of(networks)
    whole = whole.holding(whole.values.requires_grad_())
    x, t = torch.randn(3, 5, 2, 8, 8), 1000 * torch.rand(3, 5)
    apart = [network(*inputs).sample for network, *inputs in zip(networks, x, t, strict=True)]
    together = run(whole, x.flatten(0, 1), t.flatten()).sample
    torch.testing.assert_close(together, torch.cat(apart))
    torch.testing.assert_close(run(whole, x.flatten(0, 1), 3.0).sample[:5], networks[0](x[0], 3.0).sample)
    together.square().sum().backward()
    sum(part.square().sum() for part in apart).backward()
    gradients = whole.holding(whole.values.grad).weights()
    for k, network in enumerate(networks):
        for name, weight in network.named_parameters():
            torch.testing.assert_close(gradients[name][k], weight.grad, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def digits():
    return load_source(Data(source="digits"))


def test_the_noise_of_a_pair_is_mixed_and_regressed(digits):
    study = Pools(digits, "batch", FURTHER)
    x, z = torch.rand(32, 1, 8, 8), torch.randn(32, 1, 8, 8)
    mixed = study.mixed(x, z, Draws(0, 0, 0, 1, torch.device("cpu")))
    flow, v, image = mixed.target.split(32)
    assert torch.equal(flow, z - x)
    assert torch.equal(image, x)
    t = mixed.timesteps[:32, None, None, None] / 1000
    torch.testing.assert_close(mixed.inputs[:32], (1 - t) * x + t * z)
    of_data = study.objectives["v"].scheduler.alphas_cumprod[mixed.timesteps[32:64].long(), None, None, None]
    torch.testing.assert_close(mixed.inputs[32:64], of_data.sqrt() * x + (1 - of_data).sqrt() * z)
    torch.testing.assert_close(v, of_data.sqrt() * z - (1 - of_data).sqrt() * x)


def test_factors_of_consistency_training_differ_in_what_they_say(digits):
    study = Consistency(digits, "batch", (*FURTHER, "--train.steps", "600"))
    assert all(recipe.objective.total_steps == 600 for recipe in study.recipes.values())
    x, z = torch.rand(2000, 1, 8, 8), torch.randn(2000, 1, 8, 8)
    mixed = study.mixed(x, z, Draws(0, 500, 0, 1, torch.device("cpu")))
    levels, weights = mixed.sigma_noisier.split(2000), mixed.weight.split(2000)
    parts = {name: (levels[k], weights[k]) for k, name in enumerate(study.variants)}
    assert torch.equal(parts["ict-weights"][0], parts["ict"][0])
    assert parts["ict-weights"][1].unique().tolist() == [1.0]
    assert parts["ict"][1].max() > 100 * parts["ict"][1].min()
    assert parts["ict-levels"][0].median() > 3 * parts["ict"][0].median()

    trainer = train.Trainer(study, (0, 1), torch.device("cpu"))
    for _ in range(2):
        trainer.step(x[:32], z[:32])
    behind = (study.target - trainer.weights).abs().amax(1)
    assert all(behind[:2] > 0)  # published: an average; improved: the weights themselves
    assert all(behind[2:] == 0)


def test_every_network_is_trained_as_it_would_be_alone(digits):
    x, z = torch.rand(2, 32, 1, 8, 8), torch.randn(2, 32, 1, 8, 8)
    started, weights = (*FURTHER, "--optimizer.warmup_steps", "0"), []
    for seeds in ((0, 1), (0,)):
        trainer = train.Trainer(Pools(digits, "batch", started), seeds, torch.device("cpu"))
        for _ in range(2):
            trainer.step(x[: len(seeds)].flatten(0, 1), z[: len(seeds)].flatten(0, 1))
        weights.append(trainer.weights.detach().unflatten(0, (3, -1)))
    # The first seed's times are drawn first, with as many for each objective.
    torch.testing.assert_close(weights[0][0, 0], weights[1][0, 0], rtol=0, atol=1e-5)


def test_a_run_is_on_record_once_and_ends_in_time(tmp_path, digits):
    Classifier(1, 10).save(tmp_path / "classifier.safetensors", 0.1)  # training one takes seconds
    records = tmp_path / "pools.jsonl"
    task = train.Task("pools", "batch", (0, 5), "digits", "cpu", tmp_path, records, None, FURTHER)
    late = train.Task("pools", "batch", (0, 5), "digits", "cpu", tmp_path, records, time.time() - 1, FURTHER)
    assert train.run(late) == "ended after 0 steps: the time is over"
    assert not records.exists()
    clock = SimpleNamespace(time=iter([0, 0, 2]).__next__, perf_counter=time.perf_counter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "time", clock)
        assert train.run(replace(task, deadline=1)) == "ended after 2 steps: the time is over"
        step = train.Trainer.step
        patch.setattr(train.Trainer, "step", lambda self, *pair: (further.append(1), step(self, *pair)))
        further, clock.time = [], time.time
        assert train.run(task) == "3 steps"
    assert len(further) == 1
    found = read(records)
    assert [(r["step"], r["objective"], r["seed"]) for r in found] == [
        (step, name, seed) for step in (2, 3) for name in ("flow", "v", "image") for seed in (0, 5)
    ]
    for record in found:
        ways = [*map(str, Pools.steps), *(["dopri5"] if record["objective"] == "flow" else [])]
        assert list(record["frechet"]) == ways
        assert all(value > 0 for value in record["frechet"].values())
        assert record["distance"] > 0
        assert record["environment"]["device"] == "cpu"
    assert train.run(task) == "on record"
    # What is missing is measured, and agrees with what there was.
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:-1]))
    assert train.run(task) == "3 steps"
    assert read(records)[-1]["frechet"] == pytest.approx(found[-1]["frechet"])
    assert len(read(records)) == len(found)


def test_flow_matching_alone_is_trained_longer(tmp_path, digits):
    Classifier(1, 10).save(tmp_path / "classifier.safetensors", 0.1)
    records = tmp_path / "longer.jsonl"
    assert STUDIES["longer"](digits, "batch").recipes["flow"].train.steps == 6000
    assert (
        train.run(train.Task("longer", "batch", (0,), "digits", "cpu", tmp_path, records, None, FURTHER)) == "3 steps"
    )
    assert [(r["objective"], r["step"], *r["frechet"]) for r in read(records)] == [
        ("flow", step, "1", "5", "50", "dopri5") for step in (2, 3)
    ]


def test_noisier_times_are_trained_three_times_as_often(digits):
    study = Noisier(digits, "batch", FURTHER)
    objective = study.objectives["flow-noisier"]
    x = torch.zeros(20_000, 1, 1, 1)
    times = objective.mix(x, x, Draws(0, 0, 0, 1, torch.device("cpu"))).timesteps / 1000
    assert 0.14 < (times > 0.95).float().mean() < 0.19
    stack, z = train.Trainer(study, (0,), torch.device("cpu")).stack, torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        ways = [way for way, _ in study.samples("flow-noisier", stack, z, z, (z, z))]
    assert ways == ["1", "5", "50", "dopri5"]


def test_noise_between_steps_is_coupled_with_the_samples_of_each_network(digits):
    study = Renoised(digits, "batch", FURTHER)
    stack, shape = train.Trainer(study, (0, 1), torch.device("cpu")).stack, (2 * 40, 1, 8, 8)
    first, noise, fresh = torch.rand(shape), torch.randn(shape), torch.randn(shape)
    added = study.added(stack, first, noise, fresh)
    assert added["fresh"] is fresh
    assert added["repeated"] is noise
    for x, z, coupled in zip(first.split(40), fresh.split(40), added["coupled"].split(40), strict=True):
        assert torch.equal(coupled, couple(x, z).noise)
        assert (x - coupled).square().sum() < (x - z).square().sum()
    with torch.no_grad():
        ways = [way for way, _ in study.samples("ct", stack, noise, fresh, (first, noise))]
    assert ways == ["1", *(f"2, {kind} at {x}" for x in (10, 5, 2.5, 0.8) for kind in ("fresh", "repeated", "coupled"))]


def test_what_begins_later_is_true_until_there(digits):
    study = Begun(digits, "batch", FURTHER)
    stack = train.Trainer(study, (0,), torch.device("cpu")).stack
    x, z = 3 * torch.rand(8, 1, 8, 8), torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        images = dict(study.samples("flow", stack, z, z, (x, z)))
        whole = dict(Pools(digits, "batch", FURTHER).samples("flow", stack, z, z, (x, z)))["dopri5"]
    assert list(images) == ["1", "0.95", "0.9", "0.8", "0.6", "0.4", "0.2", "0"]
    torch.testing.assert_close(images["1"], whole)
    assert torch.equal(images["0"], x.clamp(-1, 1))


@pytest.mark.parametrize(
    ("study", "pairing", "lost"),
    [("pools", "semidiscrete", "step"), ("consistency", "window", "step"), ("consistency", "batch", "frechet")],
)
def test_a_run_that_was_ended_goes_on_and_records_the_same(study, pairing, lost, tmp_path, digits, monkeypatch):
    Classifier(1, 10).save(tmp_path / "classifier.safetensors", 0.1)
    pairs.fit(train.images_of(digits, "cpu"), tmp_path)
    monkeypatch.setattr(pairs, "AHEAD", 1)
    further = (*FURTHER, "--train.steps", "4", "--evaluate.samples", "17")  # the pairs of two steps are measured
    tasks = [
        train.Task(study, pairing, (0,), "digits", "cpu", tmp_path, tmp_path / name, None, further)
        for name in ("whole.jsonl", "ended.jsonl")
    ]
    assert train.run(tasks[0]) == "4 steps"
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    plain, calls = getattr(train.Trainer, lost), []

    def counted(self, *arguments):
        calls.append(self.steps)
        if len(calls) == {"step": 4, "frechet": 2}[lost]:  # in the last step, or when it is measured
            raise KeyboardInterrupt
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, lost, counted)
        with pytest.raises(KeyboardInterrupt):
            train.run(tasks[1])
    before = read(tmp_path / "ended.jsonl")
    assert {record["step"] for record in before} == {2}
    step, stepped = train.Trainer.step, []
    monkeypatch.setattr(train.Trainer, "step", lambda self, *pair: (stepped.append(1), step(self, *pair)))
    assert train.run(tasks[1]) == "4 steps"
    assert len(stepped) == {"step": 1, "frechet": 0}[lost]
    whole, ended = (read(tmp_path / name) for name in ("whole.jsonl", "ended.jsonl"))
    assert [record["frechet"] for record in ended] == [record["frechet"] for record in whole]
    assert [record["distance"] for record in ended] == [record["distance"] for record in whole]
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("study", "pairing"), [(name, pairing) for name, study in STUDIES.items() for pairing in study.pairings]
)
def test_every_task_runs_on_a_gpu(study, pairing, tmp_path):
    Classifier(1, 10).save(tmp_path / "classifier.safetensors", 0.1)
    train.prepare("digits", "cuda", tmp_path)
    task = train.Task(study, pairing, (0, 1), "digits", "cuda", tmp_path, tmp_path / "records.jsonl", None, FURTHER)
    assert train.run(task) == "3 steps"
    assert all(record["environment"]["device"] != "cpu" for record in read(tmp_path / "records.jsonl"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("study", [Pools, Consistency])
def test_steps_by_one_launch_are_the_same(study, digits):
    device, weights = torch.device("cuda"), []
    x, z = torch.rand(3, 2 * 16, 1, 8, 8, device=device), torch.randn(3, 2 * 16, 1, 8, 8, device=device)
    for launches in ("one", "many"):
        trained = study(digits, "batch", FURTHER)
        trained.to(device)
        trainer = train.Trainer(trained, (0, 1), device)
        if launches == "many":
            trainer._gradient = trainer.gradient
        for batch in zip(x, z, strict=True):
            trainer.step(*batch)
        weights.append(trainer.weights.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_consistency_is_sampled_with_fresh_and_with_repeated_noise(tmp_path):
    Classifier(1, 10).save(tmp_path / "classifier.safetensors", 0.1)
    records = tmp_path / "consistency.jsonl"
    few = (*FURTHER, "--train.steps", "1", "--train.checkpoint_every", "1")
    task = train.Task("consistency", "nearest-l2", (0,), "digits", "cpu", tmp_path, records, None, few)
    assert train.run(task) == "1 steps"
    found = read(records)
    assert [r["objective"] for r in found] == ["ct", "ict"]
    two = [f"2, {noise} at {level}" for level in (2.5, 0.8) for noise in ("fresh", "repeated")]
    assert list(found[0]["frechet"]) == ["1", *two, "data at 40", "data at 10", "data at 2.5"]


def _record(objective, pairing, seed, frechet, step=2):
    return {
        **{"study": "pools", "objective": objective, "pairing": pairing, "seed": seed, "step": step},
        **{"settings": {"steps": step}, "distance": 1500.0, "chi2": 0.04, "frechet": frechet},
    }


def test_tables_show_the_best_in_bold_and_losses_as_they_are():
    records = [
        *(_record("flow", "independent", seed, {"1": 100.0, "50": 10.0, "dopri5": 10.0}) for seed in (0, 1)),
        *(_record("flow", "batch", seed, {"1": 60.0, "50": 11.0, "dopri5": 9.0 + 2.5 * seed}) for seed in (0, 1)),
        *(_record("flow", "semidiscrete", seed, {"1": 40.0, "50": 9.0, "dopri5": None}) for seed in (0, 1)),
        _record("v", "independent", 0, {"1": 50.0, "50": 5.0}),
    ]
    results = pools_tables.Results(records)
    table = pools_tables.change_table(results)
    assert "| Flow matching | exact, 128 rows | -40% | +10% | (+2%) |" in table
    assert "|  | semidiscrete | **-60%** | **-10%** |  |" in table
    assert "| DDIM, v prediction | independent | 50.0 | 5.0 |  |" in pools_tables.final_table(results)
    assert "| semidiscrete | 1500.0 | 0.040 |" in pools_tables.pairs_table(results)
    assert "v prediction" not in pools_tables.readme_table(results)
    assert pools_tables.over_steps(results) is not None
    assert pools_tables.along(results) is not None


def test_a_change_is_shown_along_training():
    arms = [("independent", 100.0, 2), ("batch", 60.0, 2), ("independent", 50.0, 4), ("batch", 50.1, 4)]
    records = [_record("flow", name, 0, {"1": value}, step) | {"settings": {}} for name, value, step in arms]
    table = pools_tables.longer_table(pools_tables.Results(records))
    assert table.splitlines()[0] == "| sampling steps | noise | 2 | 4 |"
    assert table.splitlines()[2:] == ["| 1 | independent | 100.0 | 50.0 |", "| 1 | exact, 128 rows | -40% | 0% |"]


def test_runs_with_different_settings_are_not_in_one_table():
    records = [_record("flow", "independent", 0, {"1": 1.0}), _record("flow", "batch", 0, {"1": 1.0}, step=3)]
    with pytest.raises(ValueError, match="flow is on record with different settings"):
        pools_tables.Results(records)


def test_every_arm_has_a_name_in_the_tables():
    assert {*Pools.pairings, *Consistency.pairings} <= set(pairs.PAIRINGS) <= set(pools_tables.PAIRINGS)
    assert {name for study in STUDIES.values() for name in study.variants} == set(pools_tables.OBJECTIVES)
