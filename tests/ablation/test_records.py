"""The file of records: what a killed writer leaves, and the tables that are read from it."""

from pathlib import Path

import pytest

from couplings.ablation.records import Log, cells, read_lines, read_records

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "ablation.jsonl"


def test_a_line_that_was_cut_off_is_written_anew_and_two_writers_are_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    with Log(path) as log:
        assert log.records == [{"a": 1}]
        log.add({"a": 3})
        with pytest.raises(RuntimeError, match="another process is writing"):
            Log(path)
    assert read_lines(path)[0] == [{"a": 1}, {"a": 3}]
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        read_records([path])


def test_quality_and_time_of_a_cell_are_one_row():
    records = read_records([COMMITTED])
    assert len(records) == len(read_lines(COMMITTED)[0])
    rows = cells(records)
    assert len(rows) == (records.task == "quality").sum()
    auction = rows[(rows.label == "auction") & (rows.n == 256) & (rows.seed == 0) & (rows.metric == "sqeuclidean")]
    assert (auction.reduction > 0).all()
    assert (auction.ms > 0).all()
    assert rows.n.dtype == int
