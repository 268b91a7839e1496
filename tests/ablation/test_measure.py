"""What is measured of a coupling, on instances with a known optimum."""

import logging

import pytest
import torch

import couplings
from couplings.ablation import measure
from couplings.ablation.grid import points
from couplings.ablation.measure import Measurer, compare, obstacle
from couplings.ablation.sources import Batch, open_source
from couplings.assigners import registry


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


def crops(n=32, k=4):
    return open_source("crops32").batch(n, 0, k)


# Two points on a line, paired crosswise as drawn: the optimum costs (1 + 4) / 2 and the identity (81 + 64) / 2.
CROSSED = Batch(torch.tensor([[0.0], [10.0]]), torch.tensor([[9.0], [2.0]]), "two points")


def compared(batch, methods, repeats=1, **axes):
    """Records by method, or all of them where a method has several."""
    records = compare(batch, points([{"methods": methods, "n": 2, "seeds": [0], **axes}]), repeats=repeats)
    by_method = {record["method"]: record for record in records}
    return by_method if len(by_method) == len(records) else records


def test_records_of_two_points_hold_their_closed_forms():
    records = compared(CROSSED, ["independent", "auction", "hungarian"])
    independent = records["independent"]
    assert (independent["cost_before"], independent["cost"], independent["reduction"]) == (72.5, 72.5, 0.0)
    assert independent["gap"] == pytest.approx((72.5 - 2.5) / 2.5)
    assert independent["agreement"] == 0.0
    for exact in (records["auction"], records["hungarian"]):
        assert (exact["cost"], exact["gap"], exact["agreement"]) == (2.5, 0.0, 1.0)
        assert exact["reduction"] == pytest.approx(1 - 2.5 / 72.5)


def test_gap_is_unknown_where_the_optimum_is_too_large_to_find_unasked(monkeypatch):
    assert compared(CROSSED, ["independent"], metrics="l2")["independent"]["gap"] == pytest.approx(8.5 / 1.5 - 1)
    monkeypatch.setattr(measure, "_ROWS_TO_SOLVE", 1)
    alone = compared(CROSSED, ["independent"])["independent"]
    assert alone["gap"] is alone["agreement"] is None
    assert compared(CROSSED, ["independent", "hungarian"])["independent"]["gap"] is not None


def test_gap_is_against_the_optimum_without_quantizer_and_without_early_stop():
    exact, rounded = compared(crops(64), ["auction"], quantizers=["none", "fp8_e5m2"])
    assert exact["gap"] == 0.0
    assert rounded["gap"] > 1e-6 > rounded["certified_gap"]
    assert 0.0 < rounded["agreement"] < 1.0
    hasty = compared(crops(300), {"auction": {"max_bids": 1}})["auction"]
    assert hasty["certified_gap"] > 1e-6
    assert hasty["gap"] > 0.0


def test_gap_is_none_where_the_optimum_costs_nothing():
    swapped = Batch(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]]), "swapped")
    records = compared(swapped, ["independent", {"auction": {"tolerance": 0.0}}])
    assert records["independent"]["gap"] is None
    assert records["auction"]["gap"] == 0.0


def test_all_registered_methods_agree_with_couple(register):
    register("reversed", lambda cost, *, generator=None: torch.arange(len(cost) - 1, -1, -1))
    batch = crops()
    records = compared(batch, "all", metrics="l2", seeds=[3])
    assert list(records) == [info.name for info in couplings.methods()]
    for method, record in records.items():
        noise = batch.noise if method == "nearest" else batch.noise[:32]
        generator = torch.Generator().manual_seed(3)
        coupled = couplings.couple(batch.data, noise, method, metric="l2", generator=generator)
        assert record["error"] is record["skipped"] is None
        assert record["reduction"] == pytest.approx(float(coupled.reduction), abs=1e-6)
        assert record["marginal"] == coupled.marginal
        assert record["seconds"] > 0.0
        assert record["seconds_iqr"] >= 0.0
    exact = [info.name for info in couplings.methods() if info.exact]
    assert all(records[name]["gap"] == pytest.approx(0.0, abs=1e-7) for name in exact)
    assert records["greedy"]["gap"] > 0.0
    assert records["reversed"]["agreement"] < 0.2


def test_marginal_is_measured():
    records = compared(crops(128), ["auction", "nearest", {"sinkhorn": {"draw": "rows"}}], metrics="l2")
    permuted, selected, resampled = records.values()
    assert permuted["rows_used"] == 128
    assert set(permuted["drift"].values()) == {0.0}
    assert (selected["noise_rows"], selected["gap"], selected["agreement"]) == (512, None, None)
    assert selected["drift"]["norm"] < -0.3
    assert resampled["marginal"] == "resampled"
    assert resampled["rows_used"] < 128
    assert resampled["drift"]["norm"] != 0.0


def test_a_method_that_chooses_is_skipped_without_candidates():
    record = compared(CROSSED, ["nearest"])["nearest"]
    assert "k * 2 rows" in record["skipped"]
    assert record["seconds"] is None
    assert obstacle(couplings.Coupling("nearest"), crops()) is None


def test_a_failing_method_keeps_to_its_record(register):
    def broken(cost, *, generator=None):
        raise ZeroDivisionError("no\nluck")

    register("broken", broken)
    records = compared(CROSSED, ["broken", "auction"])
    assert records["broken"]["error"] == "ZeroDivisionError: no\nluck"
    assert records["auction"]["gap"] == 0.0


def test_warnings_are_told_once_and_nothing_is_logged_beside(register, caplog):
    def warns(cost, *, generator=None):
        logging.getLogger("couplings.warns").warning("did not converge")
        return torch.arange(len(cost))

    register("warns", warns)
    assert compared(crops(), ["warns"], repeats=3)["warns"]["notes"] == ["did not converge"]
    assert caplog.records == []
    assert logging.getLogger("couplings").propagate
    assert logging.getLogger("couplings").handlers == []


def test_results_repeat_and_times_are_as_many_as_asked(monkeypatch):
    first, second, other = (compared(crops(), ["sinkhorn"], repeats=3, seeds=[s])["sinkhorn"] for s in (7, 7, 8))
    assert first["cost"] == second["cost"] != other["cost"]
    assert first["repeats"] == 3
    monkeypatch.setattr(measure, "_TIME_PER_CELL", 0.0)
    assert compared(crops(), ["sliced"], repeats=3)["sliced"]["repeats"] == 1


def test_a_cell_of_an_ablation_tells_what_a_comparison_tells_and_what_quantizer_and_classes_change():
    measurer = Measurer("cpu", 1)
    exact, rounded = points([{"n": 24, "methods": "auction", "quantizers": ["none", "fp8_e5m2"], "seeds": [3]}])
    batch = open_source("crops32").batch(24, 3)
    known, changed = compare(batch, [exact, rounded])
    found, lossy = measurer.quality(exact), measurer.quality(rounded)
    for name in ("reduction", "gap", "agreement", "rows_used", "marginal"):
        assert (found[name], lossy[name]) == (known[name], changed[name]), name
    best, coarse = (couplings.couple(batch.data, batch.noise, quantize=each) for each in (None, "fp8_e5m2"))
    assert lossy["rows_changed"] == float((coarse.index != best.index).double().mean()) > 0
    assert lossy["reduction_lost"] == pytest.approx(found["reduction"] - lossy["reduction"], abs=1e-12)
    assert lossy["reduction_lost"] > 0
    assert 0 <= found["leakage"]["p_value"] <= 1
    timed = measurer.time(exact)
    assert sum(timed["phases_ms"].values()) == pytest.approx(timed["ms"], rel=1.0)
    assert all(timed["phases_ms"][name] > 0 for name in ("cost", "solve"))
