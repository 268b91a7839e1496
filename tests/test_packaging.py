"""What is published: the public names, the wheel, what an import costs, and what the extras pull in."""

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import couplings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# They need torchvision, compilers or other trainers, and are asked for by name.
OUTSIDE_ALL = ("fid", "lpips", "bench", "adapters")


def test_public_names_are_exactly_these():
    assert set(couplings.__all__) == {
        "Coupled",
        "Coupling",
        "MethodInfo",
        "__version__",
        "couple",
        "lookahead",
        "methods",
        "metrics",
        "quantizers",
        "register",
        "warmup",
    }
    assert all(hasattr(couplings, name) for name in couplings.__all__)


def test_testing_and_diagnostics_are_there_when_first_named():
    code = """
import sys, couplings
assert not {"couplings.testing", "couplings.diagnostics"} & set(sys.modules)
print(couplings.testing.check_marginal("independent").permutation, callable(couplings.diagnostics.marginal_drift))
"""
    assert _run(code).split() == ["True", "True"]
    with pytest.raises(AttributeError, match="nothing"):
        couplings.nothing  # noqa: B018


def test_version_is_stated_once():
    assert couplings.__version__ == PROJECT["version"]
    assert f"version: {couplings.__version__}" in (ROOT / "CITATION.cff").read_text()


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout


def test_import_is_cheap_and_leaves_what_is_slow_for_its_first_use():
    code = """
import json, sys, time
start = time.perf_counter()
import torch
torch_done = time.perf_counter()
import couplings
print(json.dumps([(time.perf_counter() - start) / (torch_done - start), sorted(sys.modules)]))
"""
    slow = {
        "numba",
        "scipy.optimize",
        "ot",
        "lapjv",
        "diffusers",
        "pandas",
        "matplotlib",
        "typer",
        "rich",
        "hypothesis",
    }
    ratios = []
    for _ in range(3):
        ratio, loaded = json.loads(_run(code))
        assert not slow & set(loaded)
        ratios.append(ratio)
    assert min(ratios) <= 1.2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_couplings_and_nothing_else(wheel):
    info = f"couplings-{couplings.__version__}.dist-info/"
    assert [name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(("couplings/", info))] == []


def test_wheel_holds_every_file_of_the_package(wheel):
    tracked = subprocess.run(["git", "ls-files", "couplings"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert set(tracked) <= set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """Python of a virtual environment that holds the wheel and what it depends on: what `pip install` gives."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*install, "--disable-pip-version-check"], check=True, capture_output=True, timeout=120)
    (site,) = home.glob("lib/python*/site-packages")
    for name in _closure(PROJECT["dependencies"]):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution(name).locate_file(top))
    return python


def _run_bare(python, *arguments, cwd):
    # Kernels run as plain Python: what is imported is tested here, and compiling takes a while.
    env = {"PATH": os.environ["PATH"], "NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_the_wheel_alone_couples_and_says_what_else_to_install(bare, tmp_path):
    program = """
import sys, torch, couplings
assert "site-packages" in couplings.__file__, couplings.__file__
data, noise = torch.rand(6, 4), torch.randn(6, 4)
for info in couplings.methods():
    try:
        coupled = couplings.couple(data, noise, info.name)
        print(info.name, "couples" if info.requires == () else "should not")
    except ImportError as error:
        print(info.name, "needs", *info.requires, f"pip install 'couplings[{info.requires[0]}]'" in str(error))
"""
    done = _run_bare(bare, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {
        info.name: f"needs {info.requires[0]} True" if info.requires else "couples" for info in couplings.methods()
    }
    assert dict(line.split(" ", 1) for line in done.stdout.splitlines()) == expected


def test_the_command_line_of_the_wheel_alone_works_or_says_what_to_install(bare, tmp_path):
    done = _run_bare(bare, "-m", "couplings", "methods", cwd=tmp_path)
    if done.returncode == 0:
        assert "auction" in done.stdout
    else:
        assert "pip install 'couplings[cli]'" in done.stderr, done.stderr


def _closure(requirements: list[str]) -> set[str]:
    """Names of all distributions that these requirements bring, as installed here."""
    seen: set[tuple[str, str]] = set()
    todo = [(requirement, "") for requirement in map(Requirement, requirements)]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in requirement.extras or {""}:
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                lines = EXTRAS[wanted] if name == "couplings" else requires(name) or []
            except PackageNotFoundError:
                continue
            todo += [(Requirement(line), wanted) for line in lines]
    return {name for name, _ in seen}


def test_nothing_in_all_needs_torchvision():
    closure = _closure(EXTRAS["all"])
    assert {"torch", "diffusers", "torchmetrics", "pot", "lapjv"} <= closure
    assert "torchvision" not in closure
    assert "torchvision" in " ".join(EXTRAS["fid"])


def test_all_is_the_union_of_the_other_extras():
    (line,) = EXTRAS["all"]
    assert Requirement(line).extras == set(EXTRAS) - {"all", *OUTSIDE_ALL}


def test_the_core_depends_on_four_packages_alone():
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {"torch", "numpy", "scipy", "numba"}
