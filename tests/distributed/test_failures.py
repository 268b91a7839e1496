"""One rank's failure is every rank's error, none hangs, and the process group stays usable."""

import logging
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from cases import Case, couple_share
from world import Last, World

from couplings import couple

CASE = Case((4, 6, 5))


def broken_on(culprit, breakage, options, shared):
    """Couple with one rank's part broken; the error that this rank sees and how long it took."""
    rank = dist.get_rank()
    data, noise, _ = CASE.share(rank)
    call = {"data": data, "noise": noise, "scope": "global", **shared}
    if rank == culprit:
        call = {**call, **options}
        if breakage is not None:
            call = breakage(call)
    start = time.monotonic()
    try:
        couple(**call)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


def nan(call):
    return {**call, "noise": call["noise"].index_fill(0, torch.tensor([2]), float("nan"))}


def transposed(call):
    return {**call, "noise": call["noise"].transpose(1, 2)}


def half(call):
    return {**call, "data": call["data"].half(), "noise": call["noise"].half()}


def flat(call):
    return {**call, "data": call["data"].flatten(1), "noise": call["noise"].flatten(1)}


def integers(call):
    return {**call, "data": call["data"].long()}


def empty(call):
    return {**call, "data": call["data"][:0], "noise": call["noise"][:0]}


def lists(call):
    return {**call, "data": call["data"].tolist()}


def labelled(call):
    return {**call, "condition": torch.zeros(len(call["data"]), dtype=torch.int64)}


def one_label_short(call):
    return {**call, "condition": torch.zeros(len(call["data"]) - 1, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("breakage", "options", "shared", "kind", "said"),
    [
        (nan, {}, {}, "ValueError", "noise contains NaN or infinity in 1 of"),
        (nan, {}, {"method": "nearest"}, "ValueError", "noise contains NaN or infinity in 1 of"),
        (transposed, {}, {}, "ValueError", "must agree in all axes"),
        (integers, {}, {}, "TypeError", "must be floating"),
        (empty, {}, {}, "ValueError", "the batch is empty"),
        (lists, {}, {}, "TypeError", "NumPy"),
        (one_label_short, {}, {}, "ValueError", "a row per data row"),
        (None, {"generator": 3}, {}, "TypeError", "generator="),
        (half, {}, {}, "TypeError", "dtype is"),
        (flat, {}, {}, "ValueError", "shape of a row is"),
        (labelled, {}, {}, "ValueError", "condition is"),
        (None, {"method": "greedy"}, {}, "ValueError", "method is"),
        (None, {"metric": "l1"}, {}, "ValueError", "metric is"),
        (None, {"quantize": "int8"}, {}, "ValueError", "quantize is"),
        (None, {"reg": 3.0}, {"method": "sinkhorn"}, "ValueError", "reg is"),
    ],
)
def test_every_rank_raises_the_same_error_naming_the_rank(three_ranks, breakage, options, shared, kind, said):
    for culprit in (0, 2):
        told = three_ranks.run(broken_on, culprit, breakage, options, shared)
        kinds, messages, seconds = zip(*told, strict=True)
        assert set(kinds) == {kind}
        assert len(set(messages)) == 1
        assert said in messages[0]
        assert f"rank {culprit}" in messages[0]
        assert max(seconds) < 10
    usable(three_ranks)


def usable(world):
    shares = world.run(couple_share, CASE)
    assert len({share["cost"] for share in shares}) == 1


def test_all_culprits_are_named(three_ranks):
    told = three_ranks.run(all_broken)
    assert len(set(told)) == 1
    assert all(f"rank {rank}: noise contains NaN or infinity" in told[0] for rank in range(3))
    usable(three_ranks)


def all_broken():
    data, noise, _ = CASE.share(dist.get_rank())
    noise = noise.index_fill(0, torch.tensor([dist.get_rank()]), float("inf"))
    with pytest.raises(ValueError, match="rank") as caught:
        couple(data, noise, scope="global")
    return str(caught.value)


def metric_failing_on_rank_1(data, noise):
    if dist.get_rank() == 1:
        msg = "no such metric today"
        raise KeyError(msg)
    return torch.cdist(data, noise)


def metric_with_nan_on_rank_1(data, noise):
    cost = torch.cdist(data, noise)
    return cost * float("nan") if dist.get_rank() == 1 else cost


def solver_without_its_package(cost, *, generator=None):
    msg = "needs the package lapjv: pip install 'couplings[lapjv]'"
    raise ModuleNotFoundError(msg)


def solver_that_gives_up(cost, *, generator=None):
    msg = "did not converge"
    raise RuntimeError(msg)


def solver_that_repeats(cost, *, generator=None):
    return torch.zeros(len(cost), dtype=torch.int64)


@pytest.mark.parametrize("condition", [None, "classes"])
@pytest.mark.parametrize(
    ("options", "kind", "rank", "said"),
    [
        ({"metric": metric_failing_on_rank_1}, "RuntimeError", 1, "KeyError: 'no such metric today'"),
        ({"metric": metric_with_nan_on_rank_1}, "ValueError", 1, "not finite everywhere"),
        ({"method": solver_without_its_package}, "ImportError", 0, "pip install"),
        ({"method": solver_that_gives_up}, "RuntimeError", 0, "did not converge"),
        ({"method": solver_that_repeats}, "ValueError", 0, "no permutation"),
    ],
)
def test_errors_while_pricing_and_solving_reach_every_rank(three_ranks, condition, options, kind, rank, said):
    told = three_ranks.run(failing, Case(CASE.rows, options, condition=condition))
    assert {name for name, _ in told} == {kind}
    assert len({message for _, message in told}) == 1
    assert told[0][1].startswith(f"rank {rank}: ")
    assert said in told[0][1]
    usable(three_ranks)


def failing(case):
    try:
        couple_share(case)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def continuous_for_points():
    return failing(Case(CASE.rows, {"method": "sliced"}, condition="continuous"))


def test_an_unfit_method_is_every_ranks_error(three_ranks):
    told = three_ranks.run(continuous_for_points)
    assert {name for name, _ in told} == {"ValueError"}
    assert "builds no cost matrix" in told[2][1]
    usable(three_ranks)


def apply_broken(culprit, breakage):
    data, noise, _ = CASE.share(dist.get_rank())
    coupled = couple(data, noise, scope="global")
    t = torch.arange(len(noise))
    if dist.get_rank() == culprit:
        t = {"rows": t[1:], "type": t.tolist(), "dtype": t.float(), "shape": t[:, None]}[breakage]
    try:
        coupled.apply(t)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(
    ("breakage", "kind"),
    [("rows", "ValueError"), ("type", "TypeError"), ("dtype", "TypeError"), ("shape", "ValueError")],
)
def test_apply_fails_on_every_rank_together(three_ranks, breakage, kind):
    told = three_ranks.run(apply_broken, 1, breakage)
    assert len(set(told)) == 1
    assert told[0][0] == kind
    assert "rank 1" in told[0][1]
    usable(three_ranks)


def unequal_candidates():
    rank = dist.get_rank()
    data, noise, _ = Case((4, 4, 4), candidates=3).share(rank)
    return failing_call(data, noise if rank else noise[:8])


def failing_call(data, noise):
    try:
        couple(data, noise, "nearest", scope="global")
    except ValueError as error:
        return str(error)
    return None


def test_nearest_has_as_many_candidates_on_every_rank(three_ranks):
    told = three_ranks.run(unequal_candidates)
    assert len(set(told)) == 1
    assert "noise rows per data row is 2 on rank 0, 3 on rank 1, 3 on rank 2" in told[0]


class _Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def draw_and_couple(seeds):
    generator = torch.Generator().manual_seed(seeds[dist.get_rank()])
    heard = _Heard()
    log = logging.getLogger("couplings.distributed")
    log.addHandler(heard)
    for _ in range(2):
        noise = torch.randn(4, 3, 8, 8, generator=generator)
        couple(torch.rand(4, 3, 8, 8), noise, scope="global")
    log.removeHandler(heard)
    return heard.messages


def test_ranks_that_drew_the_same_noise_are_named_once(three_ranks):
    first, *others = three_ranks.run(draw_and_couple, [5, 6, 5])
    assert len(first) == 1
    assert "rank 0, rank 2 hold the same noise" in first[0]
    assert others == [[], []]
    assert three_ranks.run(draw_and_couple, [1, 2, 3]) == [[], [], []]


def dying_metric(data, noise):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.cdist(data, noise)


def dying_method(cost, *, generator=None):
    os.kill(os.getpid(), signal.SIGKILL)


def failing_for_good(case):
    return Last(failing(case))


@pytest.mark.parametrize(("options", "victim"), [({"metric": dying_metric}, 1), ({"method": dying_method}, 0)])
def test_a_killed_rank_makes_the_others_fail_with_a_message_long_before_the_timeout(options, victim):
    world = World(3, timeout=50)
    try:
        world.run(couple_share, CASE)
        start = time.monotonic()
        told = world.run(failing_for_good, Case(CASE.rows, options))
        assert time.monotonic() - start < 20
        assert told[victim] is None
        for rank, answer in enumerate(told):
            if rank != victim:
                assert answer[0] == "RuntimeError"
                assert "another rank has died" in answer[1]
    finally:
        world.kill()
    assert not any(process.is_alive() for process in world.processes)


def late(case):
    if dist.get_rank() == 2:
        time.sleep(4)
        return None
    start = time.monotonic()
    return (*failing(case), time.monotonic() - start)


def test_a_rank_that_does_not_come_is_waited_for_until_the_groups_timeout():
    world = World(3, timeout=1.5)
    try:
        told = world.run(late, CASE)
        assert told[2] is None
        for kind, message, seconds in told[:2]:
            assert kind == "RuntimeError"
            assert "within the timeout" in message
            assert seconds < 4
    finally:
        world.kill()
