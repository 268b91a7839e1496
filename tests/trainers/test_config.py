import dataclasses
import inspect
import re
import subprocess
import sys

import pytest

from integrations import config, demo


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
        (["consistency-digits", "--objective.s0", "90"], "objective.s1: got 80, expected at least objective.s0 = 90"),
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
        ("objective: {name: ddim}\nmodel: {name: mlp, widht: 3}", "did you mean 'model.width'"),
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
    [(["--overlay"], "expected one argument"), (["--train", "*a"], "found undefined alias")],
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


def test_a_bad_recipe_is_refused_before_torch_loads():
    code = (
        "import sys; from integrations.train import main\n"
        "try: main(['ddim-digits', '--train.stepz', '3'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
    path.write_text("train: {stepz: 9}")
    with pytest.raises(config.RecipeError, match=r"stepz.*did you mean 'train.steps'"):
        config.load(["ddim-digits", "--overlay", str(path)])


def test_every_field_has_a_meaning():
    for kind in (*config.OBJECTIVES.values(), *config.MODELS.values(), config.Data, config.Optimizer, config.Train):
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
    assert config.Evaluate().steps == steps
    assert {tuple(arm.recipe().evaluate.steps) for arm in demo.arms(tmp_path, "v_prediction", [])} == {tuple(steps)}


@pytest.mark.parametrize("source", ["digits", "folder:pictures", "idx:mnist"])
def test_a_revision_is_of_the_hub(source):
    with pytest.raises(config.RecipeError, match=rf"data.revision: got 'v1', expected null for {source}"):
        config.Data(source, revision="v1")
    assert config.Data("cifar10", revision="v1").revision == "v1"
