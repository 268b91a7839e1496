"""The record of the tests with other versions, and the constraints that name these versions."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from benchmarks import compatibility
from benchmarks.record import read

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# They need torchvision or compilers.
OUTSIDE = ("all", "fid", "lpips", "bench")
REQUIREMENTS = {
    canonicalize_name(requirement.name): requirement
    for line in [*PROJECT["dependencies"], *(line for name in set(EXTRAS) - {*OUTSIDE} for line in EXTRAS[name])]
    if (requirement := Requirement(line)).name != "couplings"
}


def pinned(name):
    lines = (ROOT / name).read_text().splitlines()
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if line[0] != "#"}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-newest.txt", "constraints-oldest.txt"])
def test_constraints_pin_what_the_project_asks_for(name):
    pins = pinned(name)
    unmet = {
        package: pins.get(package)
        for package, asked in REQUIREMENTS.items()
        if not asked.specifier.contains(pins.get(package, "0"))
    }
    assert unmet == {}


def test_the_oldest_versions_are_the_lower_bounds():
    pins, raised = pinned("constraints-oldest.txt"), {}
    for package, asked in REQUIREMENTS.items():
        (bound,) = (Version(clause.version) for clause in asked.specifier)
        # The first release of a line need not be there any more: scipy>=1.11 is 1.11.1.
        given = max(2, len(bound.release))
        if (*bound.release, 0)[:given] != (*Version(pins[package]).release, 0)[:given]:
            raised[package] = (str(bound), pins[package])
    assert raised == {}


def test_the_record_counts_what_pytest_counts(tmp_path, monkeypatch):
    (tmp_path / "test_four.py").write_text("""
import pytest

@pytest.fixture
def broken():
    raise OSError

def test_passes(): pass
def test_passes_too(): pass
def test_passes_as_well(): pass
def test_fails(): assert False
def test_fails_too(): assert False
def test_has_no_fixture(broken): pass
@pytest.mark.skip
def test_is_skipped(): pass
""")
    monkeypatch.setattr(compatibility, "SUITES", {"library": [str(tmp_path)]})
    output = tmp_path / "record.jsonl"
    assert compatibility.main(["oldest", "--output", str(output), "-p", "no:cacheprovider"]) == 1
    (record,) = read(output)
    assert [record[count] for count in compatibility.COUNTS] == [3, 2, 1, 1]
    assert record["command"].endswith("-p no:cacheprovider")
    assert {"torch", "numpy", "diffusers"} <= set(record["environment"]["versions"])


@pytest.mark.parametrize(("failed", "errors"), [(0, 0), (1, 0), (0, 1)])
def test_a_failure_of_one_suite_is_told_when_all_have_run(tmp_path, monkeypatch, failed, errors):
    counts = iter([{"failed": failed, "errors": errors}, {"failed": 0, "errors": 0}])
    monkeypatch.setattr(compatibility, "run", lambda _: next(counts))
    assert compatibility.main(["newest", "--output", str(tmp_path / "record.jsonl")]) == failed + errors
    assert [record["suite"] for record in read(tmp_path / "record.jsonl")] == ["library", "trainers"]


def test_a_run_without_a_report_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "SUITES", {"library": ["--version"]})
    with pytest.raises(RuntimeError, match="--version"):
        compatibility.main(["oldest", "--output", str(tmp_path / "record.jsonl")])
    assert not list(tmp_path.iterdir())
