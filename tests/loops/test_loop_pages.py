"""Every page of docs/loops changes a loop of its trainer's form by at most ten lines, and the loop then couples."""

import re
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType

import lucidrains
import pytest
import torch

import couplings

ROOT = Path(__file__).parents[2]
PAGES = {page.stem: page.read_text() for page in sorted((ROOT / "docs" / "loops").glob("*.md"))}
FORMS = Path(__file__).parent / "forms"

# The forms of a page, one for each of its diffs; "classes" where the coupling is within them.
CHANGED = {
    "diffusers-unconditional": ["diffusers_unconditional"],
    "diffusers-text-to-image": ["diffusers_text_to_image", "diffusers_text_to_image classes"],
    "denoising-diffusion-pytorch": ["lucidrains_loop", "lucidrains_guided classes", "lucidrains_loop"],
    "torchcfm": ["torchcfm_plan", "torchcfm_labels classes", "torchcfm_trajectories"],
    "edm": ["edm_loss", "k_diffusion_loop", "k_diffusion_loop"],
    "consistency-models": ["consistency_models_loss"],
    "sit": ["sit_transport classes"],
    "lightning": ["lightning_step", "lightning_callback classes"],
    "accumulation": ["accumulation_cut", "accumulation_lookahead"],
    "warmup": ["warmup_first"],
}
CASES = [(page, number, form) for page, forms in CHANGED.items() for number, form in enumerate(forms)]
# What these couple already before the change.
COUPLED_BEFORE = ("torchcfm_plan", "torchcfm_labels", "torchcfm_trajectories", "warmup_first")


def fenced(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def applied(diff, source):
    """Change a source as a diff says; its lines are found whatever their indentation."""
    lines = source.splitlines()
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        changes = [(line[:1], line[1:]) for line in hunk.splitlines()]
        old = [text.strip() for sign, text in changes if sign != "+"]
        at = next((i for i in range(len(lines)) if [line.strip() for line in lines[i : i + len(old)]] == old), None)
        if not old:  # lines for the top of the file
            at = 0
        assert at is not None, f"the loop has no such lines:\n{hunk}"
        first = next((text for sign, text in changes if sign != "+"), "")
        there = lines[at] if old else ""
        shift = len(there) - len(there.lstrip()) - (len(first) - len(first.lstrip()))
        block = textwrap.indent(
            "\n".join(text for sign, text in changes if sign != "-"), " " * max(shift, 0)
        ).splitlines()
        lines[at : at + len(old)] = [line[max(-shift, 0) :] for line in block]
    return "\n".join(lines) + "\n"


def steps(form, source):
    """Run a loop; the data, the mixed noise and the noise of the target of each step."""
    module = ModuleType(f"forms.{form}")
    module.__package__ = "forms"
    sys.path.insert(0, str(FORMS.parent))
    try:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(source, FORMS / f"{form}.py", "exec"), module.__dict__)
            return list(module.run())
    finally:
        sys.path.remove(str(FORMS.parent))


def is_best(data, noise, classes):
    condition = torch.arange(len(data)) % 2 if classes else None
    return torch.equal(couplings.couple(data, noise, condition=condition).index, torch.arange(len(data)))


def needs(form):
    if form.startswith("lucidrains"):
        lucidrains.load()
    for prefix, package in (("torchcfm", "torchcfm"), ("lightning", "pytorch_lightning"), ("diffusers", "diffusers")):
        if form.startswith(prefix):
            pytest.importorskip(package, exc_type=ImportError)


@pytest.mark.parametrize(("page", "number", "form"), CASES, ids=[f"{page}-{number}" for page, number, _ in CASES])
@pytest.mark.filterwarnings("ignore")
def test_the_changed_loop_couples_and_regresses_on_the_noise_that_it_mixed_in(page, number, form, monkeypatch):
    warmed = []
    monkeypatch.setattr(couplings, "warmup", lambda: warmed.append(True))  # it takes a minute on a machine of its own
    form, _, classes = form.partition(" ")
    needs(form)
    source = (FORMS / f"{form}.py").read_text()
    changed = applied(fenced(PAGES[page], "diff")[number], source)
    found = steps(form, changed)
    assert len(found) > 1
    assert bool(warmed) == (page == "warmup")
    for data, mixed, target in found:
        assert torch.allclose(mixed, target, atol=1e-2)
        assert is_best(data, target, classes)
    if form not in COUPLED_BEFORE:
        assert not any(is_best(data, target, classes) for data, _, target in steps(form, source))


def test_offset_noise_is_added_after_the_coupling():
    pytest.importorskip("diffusers")
    changed = applied(
        fenced(PAGES["diffusers-text-to-image"], "diff")[0], (FORMS / "diffusers_text_to_image.py").read_text()
    )
    assert changed.index("couple(latents") < changed.index("args.noise_offset * torch.randn")


@pytest.mark.parametrize("page", PAGES)
def test_diffs_are_short_and_every_one_is_run(page):
    diffs = fenced(PAGES[page], "diff")
    assert len(diffs) == len(CHANGED.get(page, ()))
    for diff in diffs:
        assert len([line for line in diff.splitlines() if line != "@@"]) <= 10
        assert all(line[:1] in "+-@ " for line in diff.splitlines())


def test_the_index_names_every_page_and_links_lead_somewhere():
    linked = {page: re.findall(r"\]\(([^)#]+)\)", text) for page, text in PAGES.items()}
    assert {Path(target).stem for target in linked["index"]} == set(PAGES) - {"index"}
    for targets in linked.values():
        assert all(target.startswith("http") or (ROOT / "docs" / "loops" / target).exists() for target in targets)


def test_a_diff_that_does_not_fit_is_found():
    with pytest.raises(AssertionError, match="no such lines"):
        applied("-x = 1\n+x = 2\n", "y = 1\n")
    assert applied(" if a:\n-    b\n+    c\n+    d\n", "def f():\n    if a:\n        b\n") == (
        "def f():\n    if a:\n        c\n        d\n"
    )
