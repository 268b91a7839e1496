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
