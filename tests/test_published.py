"""Published tables measured again: measures with closed forms, networks side by side, tiny runs of every program."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import published, tables
from benchmarks.published import c2ot_toy, checkerboard, clouds, measures, otcfm
from benchmarks.published.__main__ import main
from benchmarks.published.ensemble import Best, Perceptron, Place, generator, train
from benchmarks.published.measures import Value, verdict
from benchmarks.published.tables import comparison
from benchmarks.record import RESULTS, read

CPU = Place(torch.device("cpu"))


def test_squared_w2_of_a_shifted_cloud_is_the_squared_shift():
    x = torch.randn(200, 2, generator=generator(0))
    shift = torch.tensor([3.0, -4.0])
    assert measures.squared_w2(x, (x + shift)[torch.randperm(200)]) == pytest.approx(25.0, rel=1e-5)


def test_paths_of_a_shift_are_straight_and_have_the_least_energy():
    x = torch.randn(1, 200, 2, generator=generator(1))
    shift = torch.tensor([1.0, 2.0])
    end, energy = measures.euler(lambda _, at: shift.expand_as(at), x, 7)
    torch.testing.assert_close(end, x + shift)
    least = measures.squared_w2(x[0], end[0])
    assert otcfm.normalized_path_energy(float(energy), least) == pytest.approx(0.0, abs=1e-5)


def test_a_detour_has_the_energy_of_its_length():
    """Half a turn around the origin at constant speed: energy (pi r)^2, where straight lines need (2 r)^2."""
    x = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    turn = torch.tensor([[0.0, math.pi], [-math.pi, 0.0]])
    _, energy = measures.euler(lambda _, at: at @ turn, x, 4000)
    assert float(energy) == pytest.approx(4 * math.pi**2, rel=0.01)
    assert otcfm.normalized_path_energy(4 * math.pi**2, 16.0) == pytest.approx(math.pi**2 / 4 - 1)


def test_the_adaptive_solver_grows_a_point_by_e():
    x = torch.tensor([[[1.0, -2.0]]])
    end, evaluations = measures.adaptive(lambda _, at: at, x, 1e-5)
    torch.testing.assert_close(end, math.e * x, rtol=1e-4, atol=0)
    assert evaluations > 6


def test_chi2_of_picks_of_one_row_and_of_fair_picks():
    assert measures.chi2(torch.zeros(50, dtype=torch.int64), 8) == pytest.approx(7.0)
    fair = torch.randint(0, 8, (200_000,), generator=generator(2))
    assert measures.chi2(fair, 8) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("ours", "value", "expected"),
    [
        ((1.0, 1.2), Value(1.3, 0.1), "agrees"),
        ((1.0, 1.002), Value(1.3, 0.1), "better"),
        ((2.0, 2.1), Value(1.3, 0.1), "worse"),
        ((1.0, 1.2), Value(1.4), "agrees"),
        ((1.0, 1.2), Value(1.8), "better"),
        ((1.0,), Value(1.0, 0.1), "one seed"),
    ],
)
def test_two_combined_deviations_decide(ours, value, expected):
    assert verdict(ours, value) == expected


def test_random_pairing_has_the_published_optimum_on_the_board():
    found = checkerboard.independent_optimum(checkerboard.SIDE, 200_000, generator(3))
    assert found == pytest.approx(checkerboard.PUBLISHED["independent"], rel=0.01)


def test_moons_are_torchdyns():
    points, which = clouds.moons(400, generator(4))
    assert which.tolist() == [0] * 200 + [1] * 200
    plain = (points + 1) / 3
    angle = torch.linspace(0, math.pi, 200)
    moved = plain[:200] - torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(moved[:, 0], moved[:, 1], atol=1e-5, rtol=0)
    assert float(moved.min()) + 1e-5 >= 0
    assert float(moved.max()) < 0.2 + 1e-5


@pytest.mark.parametrize("cell", ["ot", "ot-x", "c2ot-class", "c2ot-x"])
def test_a_coupled_block_has_the_sources_and_targets_of_a_random_one(cell):
    coupled, random = (c2ot_toy.Toy.of(name, 64).draw(5, 0) for name in (cell, "fm"))

    def ends(block):
        source = block["x"] - block["t"] * block["target"]
        return (sorted(map(tuple, part.round(decimals=3).tolist())) for part in (source, source + block["target"]))

    for ours, theirs in zip(ends(coupled), ends(random), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=2e-3, rtol=0)
    assert coupled["target"].square().mean() < random["target"].square().mean()


def _trained(seeds, blocks, checkpoint=None, network=None):
    problem = c2ot_toy.Toy.of("ot", 32)
    network = network or Perceptron((3, 16, 2), F.selu, seeds)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, fused=True)
    best = Best(network)
    place = Place(torch.device("cpu"), 0, checkpoint)

    def after(_):
        best.offer(network.layers[0].bias.detach().square().sum((1, 2)))

    train(network, optimizer, problem, seeds, place, blocks=blocks, batch=16, best=best, after=after)
    return network, best


def _weights(network: nn.Module):
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_a_network_trained_beside_others_is_the_one_trained_alone():
    together, _ = _trained((7, 8, 9), 20)
    alone, _ = _trained((8,), 20)
    for name, value in _weights(together.alone(1)).items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_training_goes_on_from_its_checkpoint_as_if_it_had_not_ended(tmp_path):
    whole, best = _trained((1, 2), 6)
    _trained((1, 2), 3, tmp_path / "state.pt")
    resumed, best_resumed = _trained((1, 2), 6, tmp_path / "state.pt")
    for name, value in _weights(whole).items():
        assert torch.equal(value, resumed.state_dict()[name])
    assert torch.equal(best.state["errors"], best_resumed.state["errors"])


def test_the_best_weights_are_each_seeds_own():
    network = Perceptron((1, 1), F.relu, (0, 1))
    best = Best(network)
    bias = network.layers[0].bias
    for value, errors in ((1.0, (5.0, 1.0)), (2.0, (3.0, 4.0))):
        bias.data.fill_(value)
        best.offer(torch.tensor(errors))
    best.restore()
    assert bias.flatten().tolist() == [2.0, 1.0]


@pytest.mark.parametrize("name", published.TABLES)
def test_a_program_records_every_cell_once(name, tmp_path, capsys):
    arguments = [name, "--quick", "--seeds", "0", "1", "--output", str(tmp_path), "--runs", str(tmp_path / "runs")]
    main(arguments)
    records = read(tmp_path / published.FILE)
    table = published.TABLES[name]
    assert [(r["cell"], r["seed"]) for r in records] == [(cell, seed) for cell in table.cells for seed in (0, 1)]
    for record in records:
        assert record["departures"] == list(table.departures)
        assert all(math.isfinite(value) for value in record["measured"].values())
        assert {"commit", "date", "hardware"} <= record["environment"].keys()
    assert not list((tmp_path / "runs").glob("*.pt"))
    assert comparison(name, records).count("\n") >= len(table.cells) + 1
    capsys.readouterr()
    main(arguments)
    assert len(read(tmp_path / published.FILE)) == len(records)
    said = capsys.readouterr().out
    assert all(any(line.startswith(f"{name}, {cell}, ") for line in said.splitlines()) for cell in table.cells)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", published.TABLES)
def test_a_program_runs_on_the_gpu_with_processes_that_couple_ahead(name, tmp_path):
    folders = ["--output", str(tmp_path), "--runs", str(tmp_path / "runs")]
    cells = list(published.TABLES[name].cells)[-2:]
    main([name, "--quick", "--seeds", "0", "1", "--cells", *cells, "--device", "cuda", "--workers", "2", *folders])
    records = read(tmp_path / published.FILE)
    assert len(records) == 2 * len(cells)
    assert {record["device"] for record in records} == {torch.cuda.get_device_name()}


def test_a_seed_that_is_missing_is_added_by_cells_run_together(tmp_path):
    arguments = ["checkerboard", "--quick", "--output", str(tmp_path), "--runs", str(tmp_path)]
    main([*arguments, "--cells", "exact 64", "--seeds", "0"])
    main([*arguments, "--cells", "exact 64", "stable 64", "--seeds", "0", "1", "--together", "2"])
    records = read(tmp_path / published.FILE)
    assert sorted((record["cell"], record["seed"]) for record in records) == [
        *(("exact 64", seed) for seed in (0, 1)),
        *(("stable 64", seed) for seed in (0, 1)),
    ]


def test_the_page_shows_every_table():
    page = (RESULTS / "published.md").read_text()
    assert {name for name, _ in tables.BLOCK.findall(page)} == {
        name for name in tables.TABLES if name.startswith("published-")
    }


def test_records_on_file_are_of_the_published_sizes():
    for record in read(RESULTS / published.FILE):
        table = published.TABLES[record["table"]]
        assert record["settings"] == json.loads(json.dumps(table.settings))
        assert record["cell"] in table.cells
