"""Compiled code on disk: a help where it can be used, never an error."""

import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
    import logging
    import sys

    import kernel

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    print("sums", kernel.outer(3), kernel.outer(2.5))
    hits = [sum(f.stats.cache_hits.values()) for f in (kernel.inner, kernel.outer)]
    print("from disk", *hits)
"""
KERNEL = """
    from couplings.kernels._jit import jit

    @jit
    def inner(x):
        return x + 1

    @jit(fastmath=True)
    def outer(x):
        return 2 * inner(x)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Write a program of two small kernels, and run it once: its file, and the cache that it left."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "kernel.py").write_text(textwrap.dedent(KERNEL))
    (folder / "main.py").write_text(textwrap.dedent(PROGRAM))
    (folder / "cache").mkdir()
    assert run(folder / "main.py", folder / "cache") == ["sums 8 7.0", "from disk 0 0"]
    return folder / "main.py", folder / "cache"


@pytest.fixture
def cached(program, tmp_path):
    """Give the program, and a copy of its cache."""
    return program[0], Path(shutil.copytree(program[1], tmp_path / "cache"))


def run(main, cache, before=None):
    done = subprocess.run(
        [sys.executable, main],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=before,
    )
    assert done.returncode == 0, done.stderr
    assert "sums 8 7.0" in done.stdout
    return done.stdout.splitlines()


def test_machine_code_is_found_on_disk(cached):
    assert run(*cached) == ["sums 8 7.0", "from disk 0 2"]


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_files_cut_short_are_compiled_anew_and_replaced(cached, ending, size):
    main, cache = cached
    whole = {file: file.stat().st_size for file in cache.rglob(f"*.{ending}")}
    for file in whole:
        os.truncate(file, size)
    lines = run(main, cache)
    assert [line.split(" (")[0] for line in lines] == [
        "machine code is not kept on disk",
        "sums 8 7.0",
        "from disk 0 0",
    ]
    assert "NUMBA_CACHE_DIR" in lines[0]
    assert len(whole) >= 2
    for file, before in whole.items():
        assert file.stat().st_size == pytest.approx(before, rel=0.1) or "inner" in file.name


def test_machine_code_for_other_types_is_not_run(cached):
    main, cache = cached
    first, second = (file for file in cache.rglob("*.nbc") if "outer" in file.name)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    lines = run(main, cache)
    assert "other types" in lines[0]
    assert lines[1] == "sums 8 7.0"


def test_a_full_disk_costs_the_cache_only(program, tmp_path):
    import resource

    lines = run(program[0], tmp_path, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)))
    assert sum("machine code is not kept on disk" in line for line in lines) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder_costs_the_cache_only(program, tmp_path):
    tmp_path.chmod(0o500)
    run(program[0], tmp_path)


def test_no_folder_to_write_to_costs_the_cache_only(monkeypatch, caplog):
    from couplings.kernels import _jit

    def refuse(_):
        msg = "cannot cache function: no locator available"
        raise RuntimeError(msg)

    monkeypatch.setattr(_jit, "_ForgivingCache", refuse)
    monkeypatch.setattr(_jit, "_logged", [])

    def double(x):
        return 2 * x

    for _ in range(2):
        assert _jit.jit(double)(4) == 8
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no locator available" in caplog.text


def test_processes_may_compile_into_one_folder_at_once(program, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        started = [pool.submit(run, program[0], tmp_path) for _ in range(2)]
        assert all("sums 8 7.0" in future.result() for future in started)
    run(program[0], tmp_path)
