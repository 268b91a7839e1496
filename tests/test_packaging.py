"""What is published: the public names, the wheel, what an import costs, and what the extras pull in."""

import json
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import couplings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_public_names_are_exactly_these():
    assert set(couplings.__all__) == {
        "Coupled",
        "Coupling",
        "MethodInfo",
        "__version__",
        "couple",
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


def test_import_leaves_slow_packages_for_their_first_use():
    code = "import sys, json, couplings; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(_run(code)))
    slow = {"numba", "scipy.optimize", "ot", "lapjv", "diffusers", "matplotlib", "rich", "hypothesis"}
    assert not loaded & slow


def test_import_costs_at_most_a_fifth_over_torch():
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import couplings;"
        "c = time.perf_counter(); print((c - a) / (b - a))"
    )
    ratio = min(float(_run(code)) for _ in range(3))
    assert ratio <= 1.2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_wheel_holds_couplings_and_nothing_else(wheel):
    info = f"couplings-{couplings.__version__}.dist-info/"
    assert [name for name in wheel if not name.startswith(("couplings/", info))] == []


def test_wheel_holds_every_file_of_the_package(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", "couplings"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert set(tracked) <= set(wheel)


def _closure(extra: str) -> set[str]:
    """Names of all distributions that installing ``couplings[extra]`` brings, as installed here."""
    seen: set[tuple[str, str]] = set()
    todo = [("couplings", extra)]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for line in lines:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                todo += [(requirement.name.lower(), inner) for inner in (requirement.extras or {""})]
                todo.append((requirement.name.lower(), ""))
    return {name for name, _ in seen}


def test_nothing_in_all_needs_torchvision():
    closure = _closure("all")
    assert {"torch", "diffusers", "torchmetrics", "pot", "lapjv"} <= closure
    assert "torchvision" not in closure
    assert "torchvision" in " ".join(PROJECT["optional-dependencies"]["fid"])


def test_all_is_the_union_of_the_extras_it_names():
    assert PROJECT["optional-dependencies"]["all"] == ["couplings[lapjv,pot,plot,ablate,train,test]"]


def test_constraints_pin_what_the_extras_name():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = PROJECT["optional-dependencies"]
    named = [
        *PROJECT["dependencies"],
        *(r for e in ("lapjv", "pot", "plot", "ablate", "train", "test") for r in extras[e]),
    ]
    assert {Requirement(line).name.lower().replace("_", "-") for line in named} <= pinned
