"""The cost model of the benchmark counts the bytes that a coupling over ranks really receives."""

import math
from dataclasses import replace

import pytest
from cases import Case, couple_share

from benchmarks import distributed

LINK_ONLY = distributed.Cluster(
    name="only bytes count",
    flops=math.inf,
    link=1.0,
    network=math.inf,
    adapter=math.inf,
    host=math.inf,
    per_node=8,
    latency=0.0,
    source="",
)


def test_seconds_over_a_link_of_one_byte_a_second_are_the_bytes_received(world, monkeypatch):
    if world.size == 1:
        pytest.skip("nothing is received")
    monkeypatch.setattr(distributed, "WIDTH", 3 * 4 * 4)
    rows = 6
    told = distributed.predict(LINK_ONLY, world.size, rows, lambda n: 0.0)
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
    phases = {"noise": {"seconds": 0.001, "received": 100}}
    shared = {"ranks": 2, "rows": max(distributed.ROWS), "seconds": 0.01, "fastest": 0.01, "quartiles": [0.01, 0.02]}
    told.append(
        {"task": "couple", "contender": "global", **shared, "reduction": 0.02, "received": [1, 2], "phases": phases}
    )
    told += [
        {"task": "noise", "contender": name, **shared, "fastest": s}
        for name, s in {"all-gather": 2e-3, "all-gather of 64 bytes": 1e-4, "draw anew": 1e-3}.items()
    ]
    return [{**record, "environment": place} for record in told]


@pytest.mark.parametrize(
    ("milliseconds", "advice"),
    [
        (2, ["global", "global", "per node", "per node"]),
        (20, ["global", "per node", "per node", "per node"]),
        (100, ["local"] * 4),
        (2500, ["global, `sliced`"] * 4),
    ],
)
def test_page_advises_what_gains_most_in_the_time_there_is(milliseconds, advice):
    page = distributed.report(records(milliseconds))
    lines = [line for line in page.splitlines() if line.startswith("| H100")]
    assert [line.split("|")[-2].partition(":")[0].strip() for line in lines] == advice
