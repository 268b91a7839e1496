"""The examples that users copy: README code blocks and docstrings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_has_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block_runs_by_itself_after_those_before_it(number):
    code = "\n".join(BLOCKS[: number + 1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_readme_names_only_files_that_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_sentence_on_choosing_rests_on_a_committed_record():
    from benchmarks import choosing

    page = (ROOT / "docs" / "choosing.md").read_text()
    assert page == choosing.text(), "a record has changed: run python -m benchmarks.choosing"
    sentences = re.findall(r"^- .*$", page, flags=re.MULTILINE)
    assert len(sentences) >= 14
    for sentence in sentences:
        targets = re.findall(r"\]\(([^)#]+)\)", sentence)
        assert targets, sentence
        assert all((ROOT / "docs" / target).exists() for target in targets), sentence


def test_a_record_that_turns_against_its_sentence_is_an_error():
    from benchmarks.choosing import _so

    assert _so(True, "so") == "so"
    with pytest.raises(ValueError, match="the records no longer say so, rewrite it: so"):
        _so(False, "so")


def test_docstring_examples_give_what_they_say():
    # In a process of its own: examples register methods, which last as long as the process.
    code = (
        "import doctest, importlib, pkgutil, couplings, sys\n"
        "bad = tried = 0\n"
        "for info in pkgutil.walk_packages(couplings.__path__, 'couplings.'):\n"
        "    if info.name.endswith('__main__'): continue\n"
        "    result = doctest.testmod(importlib.import_module(info.name), optionflags=doctest.ELLIPSIS)\n"
        "    bad += result.failed; tried += result.attempted\n"
        "print(tried); sys.exit(bool(bad) or tried < 10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
