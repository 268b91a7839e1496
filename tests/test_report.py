"""Reports: marks that the numbers justify, pages that need nothing else, figures that come from records."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from couplings.cli import main
from couplings.report import paper
from couplings.report.couplings_part import table_3
from couplings.report.reading import read
from couplings.report.significance import LEVEL, marks
from couplings.report.training_part import sections

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


def trained(arm, seed, values, method="auction"):
    frechet = [{"step": step, "nfe": nfe, "frechet": value} for (step, nfe), value in values.items()]
    return {
        **{"task": "training", "data": "digits", "objective": "DDIM", "arm": arm, "seed": seed, "steps": 20},
        **{"coupling": {"method": method}, "rows": 8, "samples": 10, "frechet": frechet, "loss": 0.5},
        **{"reduction": 0.1, "coupling_ms": 1.0, "step_ms": 10.0},
    }


@pytest.fixture
def files(tmp_path):
    """Records of couplings and of training."""
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
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    training = [
        trained(arm, seed, {(10, 1): base + seed, (20, 1): base / 2 + seed, (20, 5): base / 4 + seed}, method)
        for arm, base, method in (("independent", 900, "independent"), ("auction", 400, "auction"))
        for seed in (0, 1)
    ]
    common = {"data": "digits", "objective": "DDIM", "arm": "auction", "seed": 0}
    training.append(
        {"task": "equality", **common, "of": ["auction", "emd"], "batches": 3, "largest_difference": 0, "same_pairs": 1}
    )
    training.append({"task": "one step", **common, "spread": 0.5, "images": 1, "png": "iVBORw0KGgo="})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in training))
    return tmp_path


@pytest.fixture
def page(files, capsys):
    argv = ["report", str(files / "a.jsonl"), str(files / "t.jsonl"), "-o", str(files / "r.html")]
    assert main([*argv, "--markdown", str(files / "r.md")]) == 0
    capsys.readouterr()
    return (files / "r.html").read_text()


def rows_of(page, caption):
    """Rows of the HTML table whose caption begins so: lists of (text, mark)."""
    table = page[page.index(f"<p>{caption}") :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    pattern = r"<td(?: class=\"(\w+)\")?>(.*?)</td>"
    rows = re.findall(r"<tr>(.*?)</tr>", body)
    return {row[0][1]: row[1:] for row in (re.findall(pattern, each) for each in rows)}


def test_a_page_needs_no_other_file(page):
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']*""", page)
    assert not re.findall(r"url\((?!#)[^)]*\)|@import|<link|<script|<!DOCTYPE svg", page)
    assert page.count("<svg") >= 5
    assert 'src="data:image/png;base64,iVBORw0KGgo="' in page
    assert "RuntimeError: &lt;out of luck&gt;" in page
    assert "<out of luck>" not in page
    for said in ("abacus", "abc1234", "torch 2.9", "couplings ablate &lt;grid&gt;", "seed: 0, 1, 2, 3", "t-test"):
        assert said in page


def test_the_right_cells_are_marked(page):
    rows = rows_of(page, "Reduction of the mean distance")
    assert [mark for mark, _ in rows["auction"]] == ["best", "best"]
    assert [mark for mark, _ in rows["hungarian"]] == ["best", "best"]  # the same values
    assert [mark for mark, _ in rows["greedy"]] == ["tied", "tied"]  # as often better as worse
    assert [mark for mark, _ in rows["independent"]] == ["", ""]
    assert [mark for mark, _ in rows["nearest k=4 †"]] == ["", ""]  # largest, and out of competition
    times = rows_of(page, "Milliseconds of a call")
    assert [mark for mark, _ in times["independent"]] == ["best", "best"]
    assert [mark for mark, _ in times["auction"]] == ["", ""]
    frechet = rows_of(page, "By sampling steps")
    assert [mark for mark, _ in frechet["auction"]] == ["best", "best"]
    assert frechet["auction"][0][1] == "200 ± 1"


@pytest.mark.parametrize("trial", range(20))
def test_the_marks_are_those_of_the_test_that_is_named(trial):
    rng = np.random.default_rng(trial)
    base = rng.normal(size=6)
    shifts = {"a": 0.0, "b": 0.1, "c": 0.25, "d": 0.5, "e": 3.0}
    samples = {name: dict(enumerate(base - shift + 0.3 * rng.normal(size=6))) for name, shift in shifts.items()}
    found = marks(samples, higher=True)
    best = max(samples, key=lambda name: np.mean(list(samples[name].values())))
    assert found[best] == "best"
    others = [name for name in samples if name != best]
    chances = {
        name: stats.ttest_rel(*(list(samples[each].values()) for each in (best, name)), alternative="greater").pvalue
        for name in others
    }
    rejected, open_ = set(), True
    for rank, name in enumerate(sorted(others, key=chances.get)):
        open_ = open_ and chances[name] <= LEVEL / (len(others) - rank)
        rejected |= {name} if open_ else set()
    assert {name for name in others if found[name] == ""} == rejected
    lower = marks({name: {s: -v for s, v in values.items()} for name, values in samples.items()}, higher=False)
    assert lower == found


def test_one_seed_cannot_tell():
    assert marks({"a": {0: 2.0}, "b": {0: 1.0}}, higher=True) == {"a": "best", "b": ""}


def test_table_3_is_made_of_records(files):
    table = table_3(read([files / "a.jsonl"]).cells)
    by_size = {row[0]: row[1:] for row in table.rows}
    assert by_size["128"] == ["1.93%", "1.55% ± 0.00", "5.4", "0.9 ± 0.0", "2.4 ± 0.0", "3.2 ± 0.0"]
    assert by_size["256"][0] == f"{paper.TABLE_3[256][0]:.2f}%"
    assert "another machine" in table.caption
    assert "other data" in table.caption
    text = (files / "a.jsonl").read_text().replace("0.0155", "0.0177").replace("3.25", "4.75")
    (files / "b.jsonl").write_text(text)
    other = table_3(read([files / "b.jsonl"]).cells)
    assert other.rows[0][2].startswith("1.77%")
    assert other.rows[0][6].startswith("4.8")


def test_markdown_has_the_same_numbers_and_pictures_beside_it(files, page):
    text = (files / "r.md").read_text()
    names = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(names) == page.count("<svg") + page.count("<img")
    assert all((files / name).stat().st_size for name in names)
    assert "| auction | **2.55% ± 0.13** | **2.55% ± 0.13** |" in text
    assert "<u>" in text


def test_what_cannot_be_reported_is_refused(files, capsys):
    (files / "empty.jsonl").write_text("")
    assert main(["report", str(files / "empty.jsonl"), "-o", str(files / "x.html")]) == 2
    assert "no records of couplings ablate" in capsys.readouterr().err
    (files / "r.html").write_text("precious")
    assert main(["report", str(files / "a.jsonl"), "-o", str(files / "r.html")]) == 2
    assert (files / "r.html").read_text() == "precious"


def test_an_arm_that_biases_the_noise_is_not_best():
    values = {(20, 1): 5.0, (20, 5): 5.0}
    records = [trained("nearest", 0, values, "nearest"), trained("auction", 0, dict.fromkeys(values, 9.0))]
    table = next(part for part in sections(records)[0].parts if not isinstance(part, str))
    assert [row[0] for row in table.rows] == ["nearest †", "auction"]
    assert all(entry.mark == "" for row in table.rows for entry in row[1:])
