"""What coupling adds to a step, and a device's record: that they are measured, and what is made of the records."""

import json

import pytest
import torch

from benchmarks import ahead, device, fit, host, tables
from benchmarks.record import read


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_arm_hands_out_the_batches_in_order_with_noise_of_their_shape():
    step = ahead.waiting_step(0.0, 32, 8, 4)
    for name in ahead.ARMS:
        running = ahead.arm(name, step)
        for _ in range(2):
            for batch in step.batches:
                given, noise = next(running)
                assert given is batch
                assert noise.shape == batch.shape
        running.close()


def test_arms_are_compared_with_the_first(tmp_path):
    ahead.main(["--quick", "--only", "waits", "cpu", "--output", str(tmp_path / "ahead.jsonl")])
    records = read(tmp_path / "ahead.jsonl")
    assert [record["contender"] for record in records] == 2 * list(ahead.ARMS)
    for record in records:
        low, high = record["quartiles"]
        assert low <= record["share"] <= high
        assert record["n"] == 32
        assert record["steps"] % (record["n"] // record["batch"]) == 0
        assert record["environment"]["date"]
    waits = [record["step_ms"] for record in records if record["step"] == "waits 5 ms"]
    assert min(waits) >= 5
    assert records[0]["share"] == 0
    table = ahead.steps_table(records)
    assert table.count("\n") == 3
    assert "| waits 5 ms | 8 | 32 |" in table
    assert table in (tmp_path / "ahead.md").read_text()


def test_the_short_table_has_the_real_steps_and_one_that_waits():
    record = {"task": "ahead", "n": 8, "batch": 4, "step_ms": 1.0, "share": 0.0, "quartiles": [0.0, 0.0]}
    names = ["waits 20 ms", "waits 50 ms", "CPU, 1 of 2 cores", "DDPM U-Net, bf16, H100"]
    found = ahead.costs_table([{**record, "step": step, "contender": arm} for step in names for arm in ahead.ARMS])
    assert [line.split(" | ")[0] for line in found.splitlines()[2:]] == [f"| {name}" for name in names[1:]]


def test_a_device_is_measured_into_a_record_and_a_page(tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--only", "calls", "waits", "--output", str(tmp_path), "--name", "here"]
    assert device.main([*arguments, "--commit", "abc"]) == 0
    path = tmp_path / "device-here.jsonl"
    records = read(path)
    calls = {record["contender"]: record for record in records}
    assert {"couple", "couple, l2 and fp16", "couple, 10 classes", "couple, sinkhorn", "cdist + scipy"} <= calls.keys()
    assert calls["couple"]["stages"]["solve"] > 0
    assert calls["couple"]["median"] > 0
    assert calls["couple"]["environment"]["kernels"] == "abc"
    page = (tmp_path / "device-here.md").read_text()
    assert "device-here-calls:begin" in page
    assert "device-here-dataset:begin" in page
    assert "device-here-processor:begin" not in page  # that part did not run
    assert page in capsys.readouterr().out


def test_a_page_of_a_device_is_written_from_its_record(tmp_path, monkeypatch):
    device.main(["--quick", "--device", "cpu", "--only", "calls", "--output", str(tmp_path), "--name", "here"])
    path = tmp_path / "device-here.jsonl"
    monkeypatch.setitem(tables.TABLES, "device-here-calls", lambda: device.LAYOUTS["calls"][1](read(path)))
    for key in device.LAYOUTS:
        if key != "calls":
            monkeypatch.setitem(tables.TABLES, f"device-here-{key}", lambda key=key: device._layout(path, key))
    page = (tmp_path / "device-here.md").read_text()
    assert tables.filled(page) == page


def test_a_fit_is_cut_when_its_time_is_up():
    cut, *products = fit.measure(device.clustered_rows(64, torch.device("cpu")), 0.0, 64)
    assert cut["status"] == "cut"
    assert cut["curve"]
    assert {record["contender"] for record in products} == {"assign", "product, float32", "product, bfloat16"}
    assert "chi^2" in fit.table([cut, *products])


def test_a_fit_is_on_record_with_its_pairs(tmp_path, capsys):
    torch.save(torch.rand(64, 1, 4, 4), tmp_path / "rows.pt")
    for _ in range(2):
        fit.main([str(tmp_path / "rows.pt"), "--drawn", "32", "--output", str(tmp_path)])
    record, *products = read(tmp_path / "fit.jsonl")
    assert record["status"] == "ok"
    assert record["curve"][-1]["chi2"] < fit.TOLERANCE
    assert record["distance"] < record["independent"]
    assert len(products) == 3
    assert "| minibatches of 2048 rows, exact |" in capsys.readouterr().out


def test_the_host_is_probed_in_every_state(tmp_path):
    import numpy as np

    np.save(tmp_path / "300.npy", np.random.default_rng(0).random((300, 300), np.float32))
    found = host._child(tmp_path, 300, (1, 2), 0.0, torch_too=True)
    states = {(way["state"], way["threads"]) for way in found["ways"]}
    assert states >= {("hot", 1), ("hot", 2), ("caches empty", 1), ("after a product of torch", 1)}
    assert found["phases"]["normalise"] > 0
    assert json.dumps(found)
    record = {"task": "host-solve", "n": 300, "contender": "as installed", "status": "ok", **found}
    assert len(list(host.lines([record]))) == len(found["ways"]) + 1
    assert device.host_table([record]).count("\n") == len(found["ways"]) + 1


def test_what_every_variant_changes_is_named():
    for name in host.NEEDS:
        assert "NUMBA_CPU_NAME" in host.VARIANTS[name]
