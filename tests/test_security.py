"""What SECURITY.md promises of the source: nothing is unpickled or given to a shell, and YAML is read safely."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path for folder in ("couplings", "integrations", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
KEYWORDS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
FORBIDDEN = (
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "tempfile.mktemp",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
)
PICKLE = ["calls", "damaged"]  # trials that pickle couplings, and files that the library must refuse
MODULES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def breaches(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"line {node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        name, expected = KEYWORDS.get(called, (None, None))
        safe = name is None or (name in keywords and ast.unparse(keywords[name]) == str(expected))
        shell = "shell" in keywords and ast.unparse(keywords["shell"]) != "False"
        if not safe or shell or called in FORBIDDEN:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_the_source_keeps_its_promises():
    told = {str(path.relative_to(ROOT)): breaches(path.read_text()) for path in FILES}
    told = {path: found for path, found in told.items() if found}
    assert list(told) == [f"benchmarks/robustness/{name}.py" for name in PICKLE], told
    assert all(found == [found[0]] and found[0].endswith("import pickle") for found in told.values()), told
    assert len(FILES) > 100


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "yaml.load(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "eval(text)",
    ],
)
def test_a_broken_promise_is_found(line):
    assert breaches(line)
