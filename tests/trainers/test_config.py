import dataclasses
import inspect
import re
import subprocess
import sys

import pytest

import couplings
from couplings.ablation.grid import read_method
from couplings.assigners import registry
from integrations import config, coupling_section, demo, sections


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ddim-digit"], "did you mean 'ddim-digits'"),
        (["ddim-digits", "--train.stepz", "3"], "train.stepz.*did you mean 'train.steps'"),
        (["ddim-digits", "--train.step", "3"], "train.step.*did you mean 'train.steps'"),
        (["ddim-digits", "--train.steps", "ten"], "(?s)train.steps.*int.*ten"),
        (["ddim-digits", "--objective.prediction", "x0"], "(?s)objective.prediction.*epsilon.*x0"),
        (["ddim-digits", "--train.batch_size_per_device", "100"], "got 128, expected a multiple of .* = 100"),
        (["ddim-digits", "--optimizer.lr", "-1"], "optimizer.lr: got -1.0, expected a positive number"),
        (
            ["stable-diffusion-digits", "--objective.sampler", "pndm", "--objective.prediction", "sample"],
            "objective.sampler: got 'pndm', expected ddim for objective.prediction = sample",
        ),
        (["ddim-digits", "--evaluate.steps", "[0]"], r"evaluate.steps: got \[0\]"),
        (["ddim-digits", "--evaluate.steps", "[5000]"], r"evaluate.steps: got \[5000\].*diffusion_steps = 1000"),
        (["ddim-digits", "--evaluate.samples", "0"], "evaluate.samples: got 0, expected at least 1"),
        (["ddim-cifar10", "--model.channels", "[9, 9, 9, 9]"], "model.norm_groups: got 32, expected a divisor"),
        (["ddim-cifar10", "--model.attention", "[true]"], "model.attention: got .True., expected 4 values"),
        (["ddim-digits", "--data.subset_fraction", "0"], "data.subset_fraction: got 0.0"),
        (["consistency-digits", "--objective.s0", "90"], "objective.s1: got 20, expected at least objective.s0 = 90"),
    ],
)
def test_a_bad_recipe_is_refused_by_name_value_and_expectation(arguments, message):
    with pytest.raises(config.RecipeError, match=message):
        config.load(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective: {name: dim}", "objective.name: got 'dim'.*did you mean 'ddim'"),
        ("objective: {name: ddim}\nmodel: {name: mlp}\ntrian: {steps: 3}", "did you mean 'train"),
        ("objective: {name: ddim}\nmodel: {name: mlp, widht: 3}", "model.widht.*did you mean 'model.width'"),
        ("objective: {name: ddim}\nmodel: {name: mlp}\noutptu: x", "outptu: no such option .did you mean 'output'"),
        (
            "objective: {name: ddim}\nmodel: {name: convnext, classes: 1}",
            "model.classes: got 1, expected at least 2, or",
        ),
        ("objective: {name: ddim}\nmodel: {name: mlp}\ndata: 3", "data: got 3, expected fields"),
        (
            "objective: {name: ddim, class_dropout: null}\nmodel: {name: mlp}",
            "class_dropout: got None, expected a share",
        ),
        (
            "objective: {name: ddim}\nmodel: {name: unet, attention: null}",
            "model.attention: got None, expected a value",
        ),
        ("objective: {name: ddim}\nmodel: {name: mlp}\nevaluate: {steps: }", "evaluate.steps: got None, expected pos"),
        ("[1, 2]", "expected sections"),
        ("a: [", "not valid YAML"),
        ("objective: {name: [ddim]}", r"objective.name: got \['ddim'\], expected one of"),
        ("a: 2020-99-99", "not valid YAML: month must be in"),
        ("\udcff", "not valid YAML: 'utf-8' codec"),
        ("a: !!python/object/apply:os.mkdir [executed]", "could not determine a constructor"),
    ],
)
def test_a_bad_recipe_file_is_refused(tmp_path, text, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(config.RecipeError, match=message) as error:
        config.load([str(path)])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overlay"], "no such overlay file"),
        (["--train", "*a"], "found undefined alias"),
        (["--model.name"], "argument --model.name: expected one argument"),
        (["--model.name", "unet", "--model.channels", "[]", "--model.attention", "[]"], "model.norm_groups: got 32"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, message):
    with pytest.raises(config.RecipeError, match=message) as error:
        config.load(["ddim-digits", *arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in config.bundled() if name.endswith("-digits")])
def test_a_recipe_survives_being_written_and_read(tmp_path, name):
    recipe = config.load([name, "--train.steps", "7", "--optimizer.clip", "null"])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.text())
    assert config.load([str(path)]).sections() == recipe.sections()


EARLY = {
    "--train.stepz 3": "--train.stepz: no such option (did you mean 'train.steps'?)",
    "--coupling.method aucton": "coupling.method: got 'aucton', expected .*did you mean 'auction'",
    "--coupling.method my_methods:pair": "coupling.method: got 'my_methods:pair', expected .*no module 'my_methods'",
    "--coupling.metric l3": "coupling.metric: got 'l3', expected one of sqeuclidean",
    "--coupling.quantize fp4": "coupling.quantize: got 'fp4'.*fp16",
    "--data.source folder:nowhere": "data.source: got 'folder:nowhere', expected a folder that exists",
    "--data.source idx:nowhere": "data.source: got 'idx:nowhere', expected a folder that exists",
    "--data.source hub:./nowhere": "data.source: got 'hub:./nowhere', expected a folder that exists",
    "--data.class_path nowhere.Images": "data.class_path: got .*no module 'nowhere'",
    "--model.class_path nowhere.Net": "model.class_path: got .*no module 'nowhere'",
    "--model.name convnext --model.patch_size 3": "model.patch_size: got 3, expected a divisor of the images' 8 pixels",
    "--model.name unet --model.channels [32,32,32,32,32] --model.attention [false,false,false,false,false]": (
        "data.resolution: got 8, expected a multiple of 16: the network halves the images 4 times"
    ),
    "--train.init_from nowhere": "train.init_from: got 'nowhere', expected a file or a folder that exists",
    "--coupling.method semidiscrete --coupling.options.potentials no.safetensors": "coupling.options.potentials: got",
    "--evaluate.features no.safetensors": "evaluate.features: got 'no.safetensors', expected classifier, inception or",
    "--launch.config 3-a5000": "launch.config: got '3-a5000', expected an accelerate configuration file or one of",
    "--output pyproject.toml": "output: got 'pyproject.toml', expected a folder, or a new one's name",
    "--output pyproject.toml/run": "output: got 'pyproject.toml/run', expected .*: pyproject.toml is a file",
    "--output {taken}": "already holds checkpoints: continue with --resume auto, or choose another --output",
    "--objective.name stable_diffusion --objective.pretrained ./nowhere --model.name condition_unet": (
        "objective.pretrained: got './nowhere', expected a pipeline's folder, with vae/config.json"
    ),
}
ONE_BY_ONE = """
import sys
from integrations.train import main
for line in sys.stdin.read().splitlines():
    try: main(["ddim-digits", "--train.tracker", "null", *line.split(" ")])
    except SystemExit as end: assert end.code == 2
assert not {"torch", "numpy", "accelerate"} & set(sys.modules)
"""


def test_what_can_be_known_to_be_wrong_is_refused_before_torch_loads(tmp_path):
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    lines = "\n".join(EARLY).replace("{taken}", str(tmp_path))
    command = [sys.executable, "-c", ONE_BY_ONE]
    found = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    said = found.stderr.splitlines()
    assert len(said) == len(EARLY)
    for line, expected in zip(said, EARLY.values(), strict=True):
        assert line.startswith("error: ")
        assert expected in line or re.search(expected, line), line


def test_the_names_that_are_known_before_couplings_loads_are_its_names():
    assert sorted(coupling_section.METHODS) == sorted([*(info.name for info in couplings.methods()), *registry.ALIASES])
    assert list(coupling_section.METRICS) == couplings.metrics()
    assert list(coupling_section.QUANTIZERS) == couplings.quantizers()


@pytest.mark.parametrize(
    "text",
    ["auction", "nearest:k=4", "sinkhorn:reg=1e-1:draw=rows", "my.methods:pair:on=true:of=None", "a:b: c = 0.5 "],
)
def test_a_method_with_its_options_is_written_as_couplings_reads_it(text):
    assert coupling_section.split_method(text) == read_method(text)


def test_options_of_a_coupling_are_given_in_its_name_or_beside_it():
    both = [
        config.load(["flow-matching-digits", *options]).coupling
        for options in (
            ["--coupling.method", "nearest:k=8:score=dot"],
            ["--coupling.method", "nearest:k=8", "--coupling.options.score", "dot"],
            ["--coupling.method", "nearest", "--coupling.options", "{k: 8, score: dot}"],
        )
    ]
    assert both[0] == both[1] == both[2]
    assert (both[0].method, both[0].options) == ("nearest", {"k": 8, "score": "dot"})
    twice = ["--coupling.method", "nearest:k=8", "--coupling.options.k", "4"]
    with pytest.raises(config.RecipeError, match=r"coupling.method: got 'nearest:k=8', expected k here or in .*, once"):
        config.load(["flow-matching-digits", *twice])
    # What the recipe says of another method does not stay.
    assert config.load(["nearest-digits", "--coupling.method", "independent"]).coupling.options == {}
    assert config.load(["nearest-digits", "--coupling.method", "nearest:k=2"]).coupling.options == {"k": 2}


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--train.step", "train.steps"),
        ("--optimizer.l", "optimizer.lr"),
        ("--output.x", "output"),
        ("--plan.x", "plan"),
        ("--resum", "resume"),
        ("--train.steps.x", "train.steps"),
        ("--data.source.x", "data.source"),
        ("--coupling.option.k", "coupling.options"),
        ("--model.init_args.width", "model.width"),
    ],
)
def test_a_flag_that_is_no_field_is_refused_with_the_one_that_is_meant(flag, meant):
    words = [f"{flag}=3"] if "." in flag else [flag, "3"]
    with pytest.raises(config.RecipeError, match=rf"{flag}: no such option \(did you mean '{meant}'\?\)"):
        config.load(["ddim-digits", *words])


def test_help_shows_every_field_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        config.load(["ddim-digits", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    recipe = config.load(["ddim-digits"])
    for section, values in recipe.sections().items():
        if isinstance(values, dict):
            for field in values:
                assert f"--{section}.{field}" in text
    assert "Optimizer steps of linear warm-up from 0. (type: int, default: 0)" in text


def test_help_of_every_program_comes_before_torch_loads():
    code = (
        "import sys; from integrations import evaluate, sample, train\n"
        "for program in (train, sample, evaluate):\n"
        "    try: program.main(['--help'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "    print('===')\n"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    training, sampling, evaluating, _ = found.split("===")
    assert "RECIPE.yaml --help" in training
    assert "--images" in sampling
    assert "--features" in evaluating


def test_an_overlay_is_read_after_the_recipe_and_before_all_other_options(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("model: {width: 8, unet: {layers_per_block: 1}, mlp: {depth: 2}}\ntrain: {steps: 9, seed: 4}\n")
    recipe = config.load(["ddim-digits", "--train.steps", "7", "--overlay", str(path)])
    assert (recipe.model.width, recipe.model.depth) == (8, 2)
    assert (recipe.train.steps, recipe.train.seed, recipe.optimizer.warmup_steps) == (7, 4, 50)
    path.write_text("coupling: {ddim: {method: stable}, consistency: {method: sliced}}")
    both = config.load(["ddim-digits", "--overlay", "smoke", "--overlay", str(path)])
    assert (both.coupling.method, both.train.steps) == ("stable", 3)
    path.write_text("train: {stepz: 9}")
    with pytest.raises(config.RecipeError, match=r"stepz.*did you mean 'train.steps'"):
        config.load(["ddim-digits", "--overlay", str(path)])


def test_every_field_has_a_meaning():
    named = [kind for known in config.KINDS.values() for kind in known.values()]
    for kind in (*named, *config.SECTIONS.values()):
        inherited = [each for each in kind.__mro__ if dataclasses.is_dataclass(each)]
        source = "".join(inspect.getsource(each) for each in inherited)
        for entry in dataclasses.fields(kind):
            assert entry.name == "name" or re.search(rf'\n    {entry.name}: .*\n    """', source), entry.name


@pytest.mark.parametrize("name", [name for name in config.bundled() if name.endswith("-digits")])
def test_every_embedded_recipe_evaluates_several_numbers_of_steps_from_few_to_more(name):
    # Gains are largest at few steps and can invert at many: one number shows neither.
    steps = config.load([name]).evaluate.steps
    assert len(set(steps)) >= 2
    assert max(steps) >= 2 * min(steps)


def test_the_demo_and_the_default_show_where_coupling_gains_and_where_it_may_lose(tmp_path):
    steps = [1, 2, 5, 10, 20, 50]
    assert sections.Evaluate().steps == steps
    assert {tuple(arm.recipe.evaluate.steps) for arm in demo.arms(tmp_path, "v_prediction", [])} == {tuple(steps)}


@pytest.mark.parametrize("source", ["digits", "folder:pictures", "idx:mnist"])
def test_a_revision_is_of_the_hub(source):
    with pytest.raises(config.RecipeError, match=rf"data.revision: got 'v1', expected null for {source}"):
        sections.Data(source, revision="v1")
    assert sections.Data("cifar10", revision="v1").revision == "v1"
