"""The page on methods of one's own: its package is installed, its tests, its grid and its report are run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own-method.md").read_text()
FILES = dict(re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^    (couplings .*)$", PAGE, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page, and the package installed beside them."""
    folder = tmp_path_factory.mktemp("own")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    install(folder)
    return folder


def install(folder):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--upgrade", "--target", str(folder / "installed"), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "installed"), str(ROOT)])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def couplings(folder, command):
    return run(folder, sys.executable, "-m", *command.split())


def records(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_python_that_belongs_to_no_file_runs_by_itself():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    alone = [block for block in blocks if block not in FILES.values()]
    assert len(alone) == 2
    code = "\n".join(alone)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "declares the marginal 'resampled' and breaks it" in done.stdout


def test_its_tests_pass_where_it_is_installed(folder):
    said = run(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_row_by_row.py")
    assert "2 passed" in said


def test_it_is_ablated_and_reported(folder):
    ablate, report = COMMANDS[-2:]
    couplings(folder, f"{ablate} --jobs 1 --no-times")
    couplings(folder, report)

    qualities = [record for record in records(folder) if record["task"] == "quality"]
    assert len(qualities) == 2 * 5 * 2
    own = [record for record in records(folder) if record.get("method") in ("row-by-row", "closest")]
    assert {(record["plugin"]["package"], record["plugin"]["version"]) for record in own} == {
        ("couplings-row-by-row", "1.0")
    }
    assert all(record["plugin"] is None for record in qualities if record["method"] == "auction")
    broken = {record["method"]: record["broken"] for record in qualities}
    assert "declares 'resampled', but moved the" in broken["closest"]
    assert broken["row-by-row"] is broken["auction"] is None

    page = (folder / "report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| closest")]
    assert rows
    assert all(line.startswith("| closest ‡") and "**" not in line for line in rows)
    assert "| couplings-row-by-row | 1.0 |" in page
    assert any("**" in line for line in page.splitlines() if line.startswith("| auction"))

    # Another version: what it measures is measured again, and nothing else.
    before = len(records(folder))
    project = (folder / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(project.replace('version = "1.0"', 'version = "1.1"'))
    install(folder)
    said = couplings(folder, f"{ablate} --jobs 1 --no-times")
    again = [record for record in records(folder)[before:] if record["task"] == "quality"]
    assert {record["method"] for record in again} == {"row-by-row", "closest"}
    assert {record["plugin"]["version"] for record in again} == {"1.1"}
    assert "row-by-row is measured again: couplings-row-by-row 1.0" in said
    assert "8 kept" in said
