"""Imports run one way: no cycles, kernels at the bottom, and nothing of the core reaches for what is built on it."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What is built on the core, and imported on request only.
WINGS = (
    "couplings.ablation",
    "couplings.adapters",
    "couplings.cli",
    "couplings.doctor",
    "couplings.testing",
    "couplings.__main__",
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for package in ("couplings", "integrations") for path in (ROOT / package).rglob("*.py")
}


def is_for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(node):
    """All import statements, those inside functions included, those for type checkers left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif is_for_types_only(child):
            yield from (found for other in child.orelse for found in statements(ast.Module([other], [])))
        else:
            yield from statements(child)


def imported(name):
    """Names that a module imports, absolute: modules of any package, and what is taken from them."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for statement in statements(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        above = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
        source = ".".join([*above, *filter(None, [statement.module])])
        for alias in statement.names:
            yield f"{source}.{alias.name}"


def module_of(name):
    """The module of ours that an imported name is, or comes from; None for other packages."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


GRAPH = {name: {module_of(found) for found in imported(name)} - {None, name} for name in MODULES}


def within(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_graph_sees_imports_of_every_form():
    assert "couplings.assigners.registry" in GRAPH["couplings.assigners"]
    assert "couplings.coupling" in GRAPH["couplings"]
    assert any(
        module_of(name) is None and name.startswith("scipy.") for name in imported("couplings.assigners.hungarian")
    )


def test_no_module_is_imported_by_what_it_imports():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_kernels_import_nothing_of_the_library():
    upward = {
        (name, found)
        for name in MODULES
        if within(name, "couplings.kernels")
        for found in GRAPH[name]
        if not within(found, "couplings.kernels")
    }
    assert not upward


def test_the_core_imports_nothing_that_is_built_on_it():
    core = [name for name in MODULES if within(name, "couplings") and not within(name, *WINGS)]
    upward = {(name, found) for name in core for found in GRAPH[name] if within(found, *WINGS)}
    assert not upward


def test_the_library_imports_neither_trainers_nor_benchmarks():
    upward = {
        (name, found)
        for name in MODULES
        if within(name, "couplings")
        for found in imported(name)
        if within(found, "integrations", "benchmarks", "tests")
    }
    assert not upward


def test_every_file_of_tests_has_a_name_of_its_own():
    """So that all of them can be collected at once: `pytest -m gpu` runs those of library and trainers."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")]
    assert sorted(names) == sorted(set(names))
