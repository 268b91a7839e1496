"""Reports: marks that the numbers justify, pages that need nothing else, figures that come from records."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from couplings.ablation.records import read_records
from couplings.ablation.report import PAPER_TABLE_3, prepare, sections, table_3, write
from couplings.ablation.significance import LEVEL, marks
from couplings.cli import main

ENVIRONMENT = {
    **{"couplings": "0.1.0", "commit": "abc1234", "python": "3.11", "platform": "Linux", "cpu": "abacus", "cpus": 2},
    **{"load": 0.5, "threads": 1, "devices": [], "packages": {"torch": "2.9"}, "date": "2026-01-01T00:00:00+00:00"},
}


def cell(method, n, seed, reduction, ms, *, metric="sqeuclidean", quantize=None, options=None, marginal="permutation"):
    """The two records of a cell."""
    point = {
        **{"data": "crops32", "labels": None, "n": n, "method": method, "metric": metric, "quantize": quantize},
        **{"condition": None, "scope": "local", "ranks": 1, "seed": seed, "options": options or {}},
    }
    quality = {
        **{"digest": None, "shape": [3, 32, 32], "rows": n, "noise_rows": n, "marginal": marginal, "rows_used": n},
        **{"drift": {"norm": 0.0}, "reduction": reduction, "gap": 0.0, "certified_gap": None, "agreement": 1.0},
        **{"leakage": {"z": 1.0}, "notes": [], "skipped": None, "error": None},
    }
    phases = dict.fromkeys(("checks", "cost", "conversion", "solve", "gather", "report", "other"), ms / 7)
    time = {"ms": ms, "ms_iqr": 0.1, "phases_ms": phases, "repeats": 5, "threads": 1, "peak_bytes": 2**20}
    return [{"task": "quality", "run": 0, **point, **quality}, {"task": "time", "run": 0, **point, **time}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Records of an ablation."""
    records = [{"task": "run", "run": 0, "command": "couplings ablate <grid>", "environment": ENVIRONMENT}]
    for n in (128, 256):
        for seed in range(4):
            wobble = 1e-3 * seed
            records += cell("auction", n, seed, 0.024 + wobble, 2.0 + wobble)
            records += cell("hungarian", n, seed, 0.024 + wobble, 6.0 + wobble)
            records += cell("greedy", n, seed, 0.0239 + wobble + (-1) ** seed * 5e-4, 1.0 + wobble)
            records += cell("independent", n, seed, 0.0, 0.5 + wobble)
            records += cell("nearest", n, seed, 0.9, 0.1, options={"k": 4}, marginal="selected")
            for method, ms in (("auction", 3.25), ("hungarian", 8.5)):
                records += cell(method, n, seed, 0.0155, ms, metric="l2", quantize="fp16")
    failed = cell("emd", 128, 0, 0.0, 1.0)[0]
    records.append({**failed, "error": "RuntimeError: <out of luck>"})
    folder = tmp_path_factory.mktemp("records")
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def made(files):
    return sections([files / "a.jsonl"])


@pytest.fixture(scope="module")
def page(files):
    assert main(["report", str(files / "a.jsonl"), "-o", str(files / "r.html"), "--markdown", str(files / "r.md")]) == 0
    return (files / "r.html").read_text()


def test_what_breaks_its_promise_is_marked_in_all_its_cells_and_takes_no_part(tmp_path):
    records = [record for seed in range(3) for n in (64, 128) for record in cell("greedy", n, seed, 0.02, 1.0)]
    for seed in range(3):
        for n in (64, 128):
            quality, time = cell("closest", n, seed, 0.5, 0.1, marginal="resampled")
            plugin = {"package": "own", "version": "1.0", "source": "abc"}
            broken = "declares 'resampled', but moved the norm" if (n, seed) == (128, 1) else None
            records += [quality | {"broken": broken, "plugin": plugin}, time | {"plugin": plugin}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cells = prepare(read_records([tmp_path / "a.jsonl"]))
    assert set(cells.loc[cells["method"] == "closest", "label"]) == {"closest ‡"}
    assert set(cells.loc[cells["biased"], "method"]) == {"closest"}
    (path,) = write([tmp_path / "a.jsonl"], markdown=tmp_path / "a.md")[:1]
    page = path.read_text()
    assert "declares 'resampled', but moved the norm" in page
    assert "| closest ‡ | own | 1.0 | abc |" in page
    assert not any("**" in line for line in page.splitlines() if line.startswith("| closest"))


def table(made, caption):
    """The table whose caption begins so."""
    return next(table for section in made for table in section.tables if table.caption.startswith(caption))


def test_a_page_needs_no_other_file(page):
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']*""", page)
    assert not re.findall(r"url\((?!#)[^)]*\)|@import|<link|<script", page)
    assert page.count('src="data:image/svg+xml;base64,') == 3
    assert "RuntimeError: &lt;out of luck&gt;" in page
    assert "<out of luck>" not in page
    for said in ("abacus", "abc1234", "torch 2.9", "couplings ablate &lt;grid&gt;", "0, 1, 2, 3", "t-test"):
        assert said in page


def test_the_same_records_give_the_same_bytes(files, page):
    write([files / "a.jsonl"], files / "again.html")
    assert (files / "again.html").read_text() == page


def test_the_right_fields_are_marked(made, page):
    reduction = table(made, "Reduction of the mean distance").marks
    assert list(reduction.loc["auction"]) == ["best", "best"]
    assert list(reduction.loc["hungarian"]) == ["best", "best"]  # the same values
    assert list(reduction.loc["greedy"]) == ["tied", "tied"]  # as often better as worse
    assert list(reduction.loc["independent"]) == ["", ""]
    assert list(reduction.loc["nearest k=4 †"]) == ["", ""]  # largest, and out of competition
    times = table(made, "Milliseconds of a call").marks
    assert list(times.loc["independent"]) == ["best", "best"]
    assert list(times.loc["auction"]) == ["", ""]
    assert '<td class="best">2.55% ± 0.13</td>' in page


def test_the_marks_are_those_of_the_test_that_is_named():
    rng = np.random.default_rng(0)
    shifts = np.array([0.0, 0.1, 0.25, 0.5, 3.0])
    for _ in range(20):
        values = rng.normal(size=(6, 1)) - shifts + 0.3 * rng.normal(size=(6, 5))
        samples = pd.DataFrame(values, columns=list("abcde"))
        found = marks(samples, higher=True)
        best = samples.mean().idxmax()
        assert found[best] == "best"
        others = [name for name in samples if name != best]
        chances = {n: stats.ttest_rel(samples[best], samples[n], alternative="greater").pvalue for n in others}
        rejected, open_ = set(), True
        for rank, name in enumerate(sorted(others, key=chances.get)):
            open_ = open_ and chances[name] <= LEVEL / (len(others) - rank)
            rejected |= {name} if open_ else set()
        assert {name for name in others if found[name] == ""} == rejected
        assert marks(-samples, higher=False).equals(found)


def test_a_row_that_shares_no_two_seeds_with_the_best_is_not_tied():
    samples = pd.DataFrame({"a": [3.0, 2.0, np.nan], "b": [1.0, np.nan, np.nan], "c": [np.nan, np.nan, 0.0]})
    assert marks(samples, higher=True).to_dict() == {"a": "best", "b": "", "c": ""}


def test_table_3_is_made_of_records(files):
    (made,) = table_3(prepare(read_records([files / "a.jsonl"])))
    assert list(made.frame.loc[128]) == ["1.93%", "1.55% ± 0.00", "5.4", "0.9 ± 0.0", "2.4 ± 0.0", "3.2 ± 0.0"]
    assert made.frame.loc[256, "paper: reduction"] == f"{PAPER_TABLE_3[256][0]:.2%}"
    assert "another machine" in made.caption
    assert "other data" in made.caption
    text = (files / "a.jsonl").read_text().replace("0.0155", "0.0177").replace("3.25", "4.75")
    (files / "b.jsonl").write_text(text)
    (other,) = table_3(prepare(read_records([files / "b.jsonl"])))
    assert other.frame.loc[128, "ours: reduction"].startswith("1.77%")
    assert other.frame.loc[128, "whole call: ms"].startswith("4.8")


def test_markdown_has_the_same_numbers_and_pictures_beside_it(files, page):
    text = (files / "r.md").read_text()
    names = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(names) == page.count("<img")
    assert all(ElementTree.parse(files / name).getroot().tag.endswith("svg") for name in names)
    assert "| auction | **2.55% ± 0.13** | **2.55% ± 0.13** |" in text
    assert "<u>" in text
    assert "| crops32 n = 128: emd sqeuclidean | failed: RuntimeError: <out of luck> |" in text


def test_methods_with_the_same_values_share_a_line(made):
    (figure, *_) = next(section for section in made if section.figures).figures
    assert b">auction = hungarian<" in figure.content


@pytest.mark.parametrize("kept", [{"quality"}, {"run", "quality"}, {"run", "quality", "time"}])
def test_few_records_make_a_smaller_report(files, kept):
    records = [json.loads(line) for line in (files / "a.jsonl").read_text().splitlines()]
    few = [record for record in records if record["task"] in kept and record.get("seed", 0) == 0]
    few = [record for record in few if record.get("method") in (None, "auction", "greedy") and record.get("n") != 128]
    for record in few:
        for field in ("leakage", "gap", "certified_gap", "agreement", "phases_ms", "peak_bytes"):
            record[field] = None
    (files / "few.jsonl").write_text("".join(json.dumps(record) + "\n" for record in few))
    written = write([files / "few.jsonl"], files / "few.html", files / "few.md", force=True)
    assert len(written) == 2 + ("time" in kept)
    text = (files / "few.md").read_text()
    assert "| auction | 2.40% |" in text
    assert "| greedy | **2.44%** |" in text
    assert ("Machine" in text) == ("run" in kept)
    assert "nan" not in text.lower()


def test_what_cannot_be_reported_is_refused(files, capsys):
    (files / "empty.jsonl").write_text("")
    assert main(["report", str(files / "empty.jsonl"), "-o", str(files / "x.html")]) == 2
    assert "no records" in capsys.readouterr().err
    (files / "other.jsonl").write_text((files / "a.jsonl").read_text() + '{"task": "training"}\n')
    assert main(["report", str(files / "other.jsonl"), "-o", str(files / "x.html")]) == 2
    assert "records of training" in capsys.readouterr().err
    (files / "p.html").write_text("precious")
    assert main(["report", str(files / "a.jsonl"), "-o", str(files / "p.html")]) == 2
    assert (files / "p.html").read_text() == "precious"


def test_a_report_of_failures_shows_them(files):
    lines = (files / "a.jsonl").read_text().splitlines()
    (files / "failed.jsonl").write_text("".join(line + "\n" for line in lines if "out of luck" in line))
    made = {section.title: section for section in sections([files / "failed.jsonl"])}
    assert list(made) == ["How to read the tables", "Grid", "Skipped, failed or warned"]
    assert made["Skipped, failed or warned"].tables[0].frame["reason"].tolist() == [
        "failed: RuntimeError: <out of luck>"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ...}, "a record has no labels. Is it one of couplings ablate"),
        ({"options": 3}, "a field holds what couplings ablate does not write"),
        ({"drift": 3}, "a field holds what couplings ablate does not write"),
    ],
)
def test_records_that_are_not_those_of_an_ablation_are_refused(tmp_path, change, message):
    record = {"task": "quality", "data": "crops32", "labels": None, "n": 8, "method": "auction", "metric": "l2"}
    record |= {"quantize": None, "condition": None, "scope": "local", "ranks": 1, "seed": 0, "options": {}} | change
    kept = {name: value for name, value in record.items() if value is not ...}
    (tmp_path / "records.jsonl").write_text(json.dumps({**kept, "reduction": 0.1, "marginal": "permutation"}) + "\n")
    with pytest.raises(ValueError, match=message):
        write([tmp_path / "records.jsonl"], tmp_path / "page.html")
