"""The grid of `couplings compare`: what a cell says is measured, on instances with a known optimum."""

import json
import logging

import pytest
import torch

import couplings
from couplings import comparison
from couplings.assigners import registry
from couplings.comparison import Batch, compare, grid, obstacle
from couplings.coupling import Coupling
from couplings.data import image_crops


@pytest.fixture
def register():
    """Register methods for one test."""
    added = []

    def add(name, fn, **declared):
        couplings.register(name, fn, **{"marginal": "permutation", **declared})
        added.append(name)

    yield add
    for name in added:
        del registry._registry[name]


def crops(n=32, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(image_crops(n, 8, generator), torch.randn((k * n, 3, 8, 8), generator=generator), "crops")


# Two points on a line, paired crosswise as drawn: the optimum costs (1 + 4) / 2 and the identity (81 + 64) / 2.
CROSSED = Batch(torch.tensor([[0.0], [10.0]]), torch.tensor([[9.0], [2.0]]), "two points")


def by_method(cells):
    return {cell.method: cell for cell in cells}


def test_cells_of_two_points_hold_their_closed_forms():
    cells = by_method(compare(CROSSED, grid(["independent", "auction", "hungarian"], ["sqeuclidean"], [None], {})))
    independent = cells["independent"]
    assert (independent.cost_before, independent.cost, independent.reduction) == (72.5, 72.5, 0.0)
    assert independent.gap == pytest.approx((72.5 - 2.5) / 2.5)
    assert independent.agreement == 0.0
    for exact in (cells["auction"], cells["hungarian"]):
        assert (exact.cost, exact.gap, exact.agreement) == (2.5, 0.0, 1.0)
        assert exact.reduction == pytest.approx(1 - 2.5 / 72.5)


def test_gap_is_known_without_an_exact_method_in_the_table():
    (cell,) = compare(CROSSED, grid(["independent"], ["l2"], [None], {}))
    assert cell.gap == pytest.approx(8.5 / 1.5 - 1)


def test_gap_is_unknown_where_the_optimum_is_too_large_to_find_unasked(monkeypatch):
    monkeypatch.setattr(comparison, "_ROWS_TO_SOLVE", 1)
    (cell,) = compare(CROSSED, grid(["independent"], ["l2"], [None], {}))
    assert cell.gap is None
    assert cell.agreement is None


def test_gap_of_a_quantized_cell_is_against_the_optimum_without_quantizer():
    cells = compare(crops(64), grid(["auction"], ["sqeuclidean"], [None, "fp8_e5m2"], {}))
    assert cells[0].gap == 0.0
    assert cells[1].gap > 1e-6
    assert cells[1].certified_gap < 1e-6
    assert 0.0 < cells[1].agreement < 1.0
    (alone,) = compare(crops(64), grid(["auction"], ["sqeuclidean"], ["fp8_e5m2"], {}))
    assert alone.gap == cells[1].gap


def test_an_early_stop_is_no_reference():
    batch = crops(64)
    hasty, exact = (Coupling("auction", max_bids=1), Coupling("hungarian"))
    cells = compare(batch, [hasty, exact])
    assert cells[0].certified_gap > 1e-6
    assert cells[0].gap > 0.0
    assert cells[1].gap == 0.0
    assert compare(batch, [hasty])[0].gap == cells[0].gap


def test_all_registered_methods_agree_with_couple(register):
    register("reversed", lambda cost, *, generator=None: torch.arange(len(cost) - 1, -1, -1))
    batch = crops()
    cells = compare(batch, grid(None, ["l2"], [None], {}), seed=3, repeats=1)
    assert [cell.method for cell in cells] == [info.name for info in couplings.methods()]
    for cell in cells:
        noise = batch.noise if cell.method == "nearest" else batch.noise[:32]
        generator = torch.Generator().manual_seed(3)
        coupled = couplings.couple(batch.data, noise, cell.method, metric="l2", generator=generator)
        assert cell.error is cell.skipped is None
        assert cell.reduction == pytest.approx(float(coupled.reduction), abs=1e-6)
        assert cell.marginal == coupled.marginal
        assert cell.seconds > 0.0
        assert cell.seconds_iqr >= 0.0
    found = by_method(cells)
    assert all(found[info.name].gap == pytest.approx(0.0, abs=1e-7) for info in couplings.methods() if info.exact)
    assert found["greedy"].gap > 0.0
    assert found["reversed"].agreement < 0.2


def test_marginal_is_measured():
    cells = by_method(compare(crops(128), grid(["auction", "nearest", "sinkhorn"], ["l2"], [None], {"draw": "rows"})))
    assert cells["auction"].rows_used == 128
    assert set(cells["auction"].drift.values()) == {0.0}
    assert (cells["nearest"].noise_rows, cells["nearest"].gap, cells["nearest"].agreement) == (512, None, None)
    assert cells["nearest"].drift["norm"] < -0.3
    assert cells["sinkhorn"].marginal == "resampled"
    assert cells["sinkhorn"].rows_used < 128
    assert cells["sinkhorn"].drift["norm"] != 0.0


def test_methods_that_choose_need_more_noise_than_data():
    info = registry.find("nearest").info
    assert "k * 2 rows" in obstacle(info, CROSSED)
    assert obstacle(info, crops()) is None
    (cell,) = compare(CROSSED, [Coupling("nearest")])
    assert "k * 2 rows" in cell.skipped
    assert cell.seconds is None


def test_a_failing_method_keeps_to_its_cell(register):
    def broken(cost, *, generator=None):
        raise ZeroDivisionError("no\nluck")

    register("broken", broken)
    cells = compare(CROSSED, grid(["broken", "auction"], ["l2"], [None], {}))
    assert cells[0].error == "ZeroDivisionError: no\nluck"
    assert cells[1].gap == 0.0


def test_warnings_are_told_once_and_nothing_is_logged_beside(caplog):
    sinkhorn = Coupling("sinkhorn", reg=1e-3, max_iterations=1)
    (cell,) = compare(crops(), [sinkhorn], repeats=3)
    assert len(cell.notes) == 1
    assert "did not converge" in cell.notes[0]
    assert caplog.records == []
    assert logging.getLogger("couplings").propagate
    assert logging.getLogger("couplings").handlers == []


def test_results_repeat_and_times_are_as_many_as_asked(monkeypatch):
    plans = grid(["sinkhorn", "sliced"], ["l2"], [None, "int8"], {})
    first, second = (compare(crops(), plans, seed=7, repeats=3) for _ in range(2))
    assert [cell.cost for cell in first] == [cell.cost for cell in second]
    assert [cell.cost for cell in first] != [cell.cost for cell in compare(crops(), plans, seed=8, repeats=1)]
    assert {cell.repeats for cell in first} == {3}
    monkeypatch.setattr(comparison, "_TIME_PER_CELL", 0.0)
    assert {cell.repeats for cell in compare(crops(), plans, repeats=3)} == {1}


def test_grid_is_every_combination_once():
    plans = grid(["exact", "auction", "GREEDY"], ["l2", "l1"], [None, "int8"], {})
    assert [(plan.method, plan.metric, plan.quantize) for plan in plans] == [
        (method, metric, quantize)
        for metric in ("l2", "l1")
        for quantize in (None, "int8")
        for method in ("auction", "greedy")
    ]
    assert len(grid(["auction"], ["l2", "L2"], [None], {})) == 1


def test_options_go_to_the_methods_that_take_them():
    plans = grid(["auction", "sinkhorn", "sliced"], ["l2"], [None], {"reg": 0.5, "sliced.directions": 3})
    assert [plan.options for plan in plans] == [{}, {"reg": 0.5}, {"directions": 3}]
    with pytest.raises(TypeError, match="Did you mean 'reg'"):
        grid(["auction", "sinkhorn"], ["l2"], [None], {"regg": 0.5})
    with pytest.raises(ValueError, match="sinkhorn, which is not compared"):
        grid(["auction"], ["l2"], [None], {"sinkhorn.reg": 0.5})
    with pytest.raises(TypeError, match="option of the method auction"):
        grid(["auction"], ["l2"], [None], {"auction.reg": 0.5})


def test_batch_refuses_what_no_cell_could_couple():
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2"):
        Batch(torch.ones(2, 3), torch.tensor([[1.0] * 3, [float("nan")] * 3]), "x")
    with pytest.raises(ValueError, match="got 3 for 2"):
        Batch(torch.ones(2, 3), torch.ones(3, 3), "x")
    with pytest.raises(TypeError, match="must be floating"):
        Batch(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), "x")


def test_cells_are_strict_json():
    batch = Batch(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]]), "swapped")
    cells = by_method(compare(batch, grid(["independent", "auction"], ["l2"], [None], {"tolerance": 0.0})))
    assert cells["independent"].gap == float("inf")  # the optimum costs nothing
    plain = cells["independent"].to_dict()
    assert plain["gap"] is None
    assert json.loads(json.dumps(plain, allow_nan=False))["reduction"] == 0.0


def test_image_crops_are_photographs_in_range_and_repeat():
    crops = image_crops(64)
    assert (crops.shape, crops.dtype) == ((64, 3, 32, 32), torch.float32)
    assert torch.equal(crops, image_crops(64))
    assert not torch.equal(crops, image_crops(64, generator=torch.Generator().manual_seed(1)))
    assert crops.min() >= -1.0
    assert crops.max() <= 1.0
    assert crops.max() - crops.min() > 1.5
    # Neighbouring pixels of a photograph are alike; of shuffled bytes they are not.
    assert (crops[..., 1:] - crops[..., :-1]).square().mean() < 0.1 * crops.var()
    assert image_crops(2, 160).shape == (2, 3, 160, 160)


def test_image_crops_reach_every_pixel_of_every_photograph():
    from couplings.data import _photographs

    photos = _photographs()
    assert len(photos) == 4
    wanted = torch.cat([torch.from_numpy(photo.copy()).reshape(-1, 3) for photo in photos])
    drawn = (image_crops(2000, 1).permute(0, 2, 3, 1).reshape(-1, 3) + 1) * 127.5
    known = {tuple(pixel) for pixel in wanted.tolist()}
    assert {tuple(pixel) for pixel in drawn.round().long().tolist()} <= known
    # Their mean colour is that of all pixels together: no photograph is left out.
    assert torch.allclose(drawn.mean(0), wanted.float().mean(0), atol=6 * float(wanted.float().std()) / 2000**0.5)


@pytest.mark.parametrize(("n", "size"), [(0, 32), (4, 0), (4, 161)])
def test_image_crops_refuse_sizes_out_of_range(n, size):
    with pytest.raises(ValueError, match="got"):
        image_crops(n, size)
