import json

import pytest
import torch

from benchmarks import overhead


@pytest.mark.skipif(torch.cuda.is_available(), reason="the loop would train on the GPU")
def test_the_loop_and_the_bare_one_take_turns_and_go_on_record(tmp_path, capsys):
    path = tmp_path / "overhead.jsonl"
    arguments = ["--networks", "mlp", "--methods", "auction", "--turns", "3", "--steps", "2", "--output", str(path)]
    overhead.main(arguments)
    [record] = map(json.loads, path.read_text().splitlines())
    assert record["turns"] == 2
    assert record["ratio"] == pytest.approx(record["loop_ms"] / record["bare_ms"], rel=0.5)
    assert record["ratio_quartiles"][0] <= record["ratio"] <= record["ratio_quartiles"][1]
    assert {"network", "method", "rows", "device", "precision", "environment"} <= record.keys()
    assert "mlp   auction" in capsys.readouterr().out


def test_a_device_that_is_not_here_is_refused(capsys):
    other = "cpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(SystemExit):
        overhead.main(["--device", other])
    assert "--device: got" in capsys.readouterr().err
