"""The documentation site: it builds without a warning, its code runs, and its command lines are understood."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from integrations import config

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"(?P<mark><!-- not run: [^\n]+ -->\n+)?```python\n(?P<code>.*?)```", re.DOTALL)
COMMAND = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def name(page):
    return page.relative_to(ROOT).as_posix()


def program(page):
    """All blocks of a page as one program, with its line numbers."""
    text = page.read_text()
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        if block["mark"] is None:
            first = text.count("\n", 0, block.start("code"))
            code = block["code"].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


def commands(page):
    for block in COMMAND.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


# Each page in a process of its own, since pages register methods; forked, so that torch is imported once.
RUNNER = """
import json, os, sys, traceback, torch, couplings
failed = []
for name, code in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(failed)
sys.exit(bool(failed))
"""


def test_code_of_every_page_runs_from_top_to_bottom(tmp_path):
    programs = [(name(page), program(page)) for page in (*PAGES, ROOT / "README.md")]
    assert sum(bool(code.strip()) for _, code in programs) > 5
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=json.dumps(programs), capture_output=True, text=True, timeout=280, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=name)
def test_commands_of_a_page_are_understood(page, tmp_path, monkeypatch):
    from couplings.cli import app

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_nets.py").touch()  # the reader's

    ours = {command.name or command.callback.__name__ for command in app.registered_commands}
    for words in commands(page):
        if words[0] == "couplings":
            assert words[1] in ours, words
        if "integrations.train" in words:
            config.load(words[words.index("integrations.train") + 1 :])
        for module in (word for word in words if word.startswith(("integrations.", "benchmarks."))):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), words


@pytest.mark.parametrize("page", ["training", "train-conditional"])
def test_recipes_of_a_page_are_recipes(tmp_path, monkeypatch, page):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_nets.py").touch()  # the reader's
    found = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
    assert found
    for text in found:
        path = tmp_path / "own.yaml"
        path.write_text(text)
        config.load([str(path)])


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-c", "docs", "-b", "html", "-W", "--keep-going", "-q", ".", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / page.relative_to(ROOT).with_suffix(".html")).exists()
    for target in ("couplings.Coupling.submit", "couplings.semidiscrete.fit", "couplings.kernels.assignment.solve"):
        anchors = [html.read_text() for html in tmp_path.rglob("docs/api/*.html")]
        assert any(f'id="{target}"' in text for text in anchors), target
