"""The cost model of the benchmark counts the bytes that a coupling over ranks really receives."""

import math
from dataclasses import replace

import pytest
from cases import Case, couple_share

from benchmarks import distributed

LINK_ONLY = distributed.Cluster(
    name="only bytes count",
    flops=math.inf,
    memory=math.inf,
    link=1.0,
    network=math.inf,
    adapter=math.inf,
    host=math.inf,
    per_node=8,
    exchange=0.0,
    hop=0.0,
    far_hop=0.0,
    idle={},
    source="",
)


def test_seconds_over_a_link_of_one_byte_a_second_are_the_bytes_received(world):
    if world.size == 1:
        pytest.skip("nothing is received")
    rows = 6
    told = distributed.predict(LINK_ONLY, world.size, rows, lambda n: 0.0, width=3 * 4 * 4)
    received = world.run(couple_share, Case((rows,) * world.size))
    for share in received:
        assert told["noise"] == share["received"]["noise"]
    assert told["costs"] == received[0]["received"]["costs"]


def test_more_ranks_than_a_node_has_use_the_network():
    slow = replace(LINK_ONLY, link=math.inf, network=1.0, adapter=0.5)
    alone, two_nodes = (distributed.predict(slow, ranks, 10, lambda n: 0.0) for ranks in (8, 16))
    assert alone["noise"] == alone["costs"] == 0
    assert two_nodes["noise"] == 80 * 4 * distributed.WIDTH
    assert two_nodes["costs"] == 80 * 4 * 160 * 2


def test_exchanges_pass_every_rank_and_a_call_on_nothing_is_the_least_there_is():
    free = replace(LINK_ONLY, link=math.inf, exchange=1.0, hop=10.0, far_hop=100.0, idle={"solve": 0.5, "python": 7.0})
    told = distributed.predict(free, 24, 10, lambda n: n)
    assert {told[name] for name in distributed.EXCHANGES} == {1 + 21 * 10 + 2 * 100}
    assert (told["solve"], told["python"]) == (240.5, 7)


def test_model_of_this_machine_gives_back_what_its_constants_were_measured_on():
    """The rates of a run predict the run's own phases, the seconds of a call on nothing added once."""
    found = records(2)
    machine = distributed.this_machine(found, 2)
    rows, width = max(distributed.ROWS), distributed.WIDTH
    told = distributed.predict(machine, 2, rows, lambda n: 0.0)
    of_rate = 0.01 / 1e8  # seconds of a byte, and of an operation
    assert told["cost"] == pytest.approx(1e-4 + 2 * rows * 2 * rows * width * of_rate)
    assert told["check"] == pytest.approx(1e-4 + 2 * 4 * rows * width * of_rate)
    assert told["noise"] == pytest.approx(1e-4 + 4 * rows * width * (0.01 - 1e-4) / 1e8)
    assert told["header"] == told["report"] == pytest.approx(1e-4)


def records(milliseconds_of_1024):
    """What a measurement leaves, with solves that take a time of our choosing, as n squared."""
    place = {
        "date": "2026-01-01T00:00",
        "hardware": {"cpu": "a processor", "cores": 2, "load": 0.0},
        "versions": {"torch": "2"},
        "kernels": "abc",
    }
    told = []
    for n in distributed.POOLS:
        times = {"cost (GEMM)": 1e-3, "solve": milliseconds_of_1024 * 1e-3 * (n / 1024) ** 2}
        told += [
            {"task": "pool", "contender": name, "rows": n, "seconds": s, "fastest": s} for name, s in times.items()
        ]
        gains = {"auction": 0.01 + n * 1e-6, "sliced": 0.001}
        told += [{"task": "reduction", "contender": name, "rows": n, "reduction": r} for name, r in gains.items()]
    names = ("check", "header", "noise", "cost", "costs", "solve", "index", "measure", "report", "beside")
    phases = {name: {"seconds": 1e-4, "received": 100} for name in names}
    shared = {"ranks": 2, "rows": max(distributed.ROWS), "seconds": 0.01, "fastest": 0.01, "quartiles": [0.01, 0.02]}
    coupled = {**shared, "width": distributed.WIDTH, "reduction": 0.02, "received": [1, 2], "phases": phases}
    told += [{**coupled, "task": task, "contender": "global"} for task in ("couple", "empty")]
    told += [
        {"task": "noise", "contender": name, **shared, "fastest": s}
        for name, s in {"all-gather": 2e-3, "draw anew": 1e-3}.items()
    ]
    told += [{"task": "rate", "contender": name, **shared, "work": 1e8} for name in ("received", "product", "read")]
    return [{**record, "environment": place} for record in told]


@pytest.mark.parametrize(
    ("milliseconds", "advice"),
    [
        (2, ["global", "global", "per node", "per node"]),
        (20, ["global", "per node", "per node", "per node"]),
        (100, ["local"] * 4),
        (2500, ["global, `sliced`"] * 3 + ["`independent`"]),
    ],
)
def test_page_advises_what_gains_most_in_the_time_there_is(milliseconds, advice):
    page = distributed.report(records(milliseconds))
    lines = [line for line in page.splitlines() if line.startswith("| H100")]
    assert [line.split("|")[-2].partition(":")[0].strip() for line in lines] == advice
