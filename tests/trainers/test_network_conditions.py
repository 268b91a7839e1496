"""What networks are told of their images: classes and captions, in training and when sampling."""

import dataclasses
import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from test_loop import assert_same_run
from test_models import SMALL
from tiny_recipes import interrupted, tiny

from integrations import config, loop, measure, sample, sections
from integrations.build import build_objective
from integrations.consistency import ConsistencyObjective
from integrations.data import load_source
from integrations.ddim import DdimObjective
from integrations.flow_matching import FlowMatchingObjective
from integrations.models import build_model
from integrations.plan import plan
from integrations.randomness import Draws

OBJECTIVES = {
    "ddim": (DdimObjective, sections.Ddim),
    "flow_matching": (FlowMatchingObjective, sections.FlowMatching),
    "consistency": (ConsistencyObjective, sections.Consistency),
}
SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = tiny("class-conditional-digits", tmp_path_factory.mktemp("run"), "--train.ema_decay", "0.5")
    return loop.train(recipe, progress=False)


@pytest.fixture(scope="module")
def digits():
    return load_source(sections.Data("digits"))


@pytest.fixture
def captioned(tmp_path):
    """A folder of pictures with captions: of the first two, the third and none; every pixel is a row's number."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for i in range(16):
        Image.new("L", (8, 8), i).save(folder / f"{i:02}.png")
        texts = [[f"a {i}", f"the {i}"], [f"one {i}"], []][min(i % 8, 2)]
        lines.append(json.dumps({"file_name": f"{i:02}.png", "texts": texts, "text": f"a {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return f"folder:{folder}"


def draws(step=0):
    return Draws(0, step, 0, 1, torch.device("cpu"))


def conditional(name, section=SMALL[0], classes=4, **options):
    """An objective with a network of ``classes``, whose every weight matters."""
    kind, of = OBJECTIVES[name]
    objective = kind(of(**options), SHAPE, classes)
    model = build_model(dataclasses.replace(section, classes=classes), objective).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    objective.attach(model)
    return objective, model


def noise(n=4):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1))


# --- classes


@pytest.mark.parametrize("section", SMALL, ids=lambda section: section.name)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_network_learns_the_classes_that_it_is_told_and_none(name, section):
    objective, model = conditional(name, section, class_dropout=0.5)
    labels = torch.tensor([0, 2] * 6)
    told = objective.told(labels, {}, draws())
    assert set(told.tolist()) == {-1, 0, 2}
    assert torch.equal(told[told >= 0], labels[told >= 0])
    objective.loss(model, noise(12), noise(12).flip(0), draws(), **objective.tell(told)).mean().backward()
    embedding = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    assert (embedding.weight.grad.abs().sum(1) > 0).tolist() == [True, False, True, False, True]


def test_classes_are_dropped_at_the_asked_rate_anew_in_every_step():
    objective, _ = conditional("ddim", class_dropout=0.3)
    labels = torch.full((400,), 3)
    first, again, later = (objective.told(labels, {}, draws(step)) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert 74 <= (first == -1).sum() <= 166  # binomial(400, 0.3): five standard deviations are 46
    assert torch.equal(objective.told(labels, {}), labels)  # of samples, none is


@pytest.mark.parametrize("name", OBJECTIVES)
def test_guidance_extrapolates_from_no_class(name):
    guided, model = conditional(name, class_dropout=0.1, guidance_scale=3.0)
    plain, _ = conditional(name, class_dropout=0.1)
    told, t = torch.tensor([0, 1, 2, 3]), torch.tensor(500.0)
    with torch.no_grad():
        with_class, without = (model(noise(), t, class_labels=c).sample for c in (told, torch.full((4,), 4)))
        assert not torch.allclose(with_class, without, atol=1e-3)
        expected = without + 3 * (with_class - without)
        torch.testing.assert_close(guided.guided(model, noise(), told)(noise(), t), expected)
        torch.testing.assert_close(plain.guided(model, noise(), told)(noise(), t), with_class)
        torch.testing.assert_close(guided.guided(model, noise(), None)(noise(), t), without)
        # A sampler asks so.
        far, near = (objective.sample(model, noise(), 2, None, told) for objective in (guided, plain))
        assert not torch.equal(far, near)
    bare, _ = conditional(name)
    with pytest.raises(ValueError, match="told: got None, expected classes"):
        bare.sample(model, noise(), 1)


def test_samples_are_of_the_classes_in_the_proportions_of_the_data_in_any_batch(digits):
    objective, _ = conditional("ddim", classes=10)
    told = objective.choose(digits, 2 * len(digits), 0)
    for epoch in told.split(len(digits)):
        assert torch.equal(epoch.bincount(), digits.labels.bincount())
    assert torch.equal(objective.choose(digits, 40, 0), told[:40])
    assert not torch.equal(objective.choose(digits, 40, 1), told[:40])
    assert objective.choose(digits, 5, 0, [7, 2]).tolist() == [7, 2, 7, 2, 7]
    assert FlowMatchingObjective(sections.FlowMatching(), SHAPE).choose(digits, 5, 0) is None


@pytest.mark.parametrize("section", [SMALL[0], SMALL[2]], ids=["own network", "network of diffusers"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_exported_pipeline_draws_classes_as_the_trainer_does(tmp_path, name, section):
    objective, model = conditional(name, section, class_dropout=0.1, guidance_scale=2.0)
    objective.export(model, tmp_path)
    custom = str(tmp_path) if name == "flow_matching" else objective.pipeline_name
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=custom, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    told = torch.tensor([3, 0, 1])
    for scale in (1.0, 2.0):
        objective.config.guidance_scale = scale
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            expected = objective.sample(model, torch.randn(3, *SHAPE, generator=generator), 3, generator, told)
        options = {"class_labels": told, "guidance_scale": scale, "num_inference_steps": 3, "output_type": "np"}
        found = pipeline(generator=torch.Generator().manual_seed(5), **options).images
        signed = torch.from_numpy(found).permute(0, 3, 1, 2) * 2 - 1
        torch.testing.assert_close(signed, expected.clamp(-1, 1), rtol=0, atol=2e-4)
    with pytest.raises(ValueError, match=r"class_labels: got \[4\], expected .* below 4"):
        pipeline(class_labels=[4])
    assert f"guidance_scale={2.0}" in (tmp_path / "README.md").read_text()


def test_an_exported_pipeline_refuses_guidance_and_classes_that_were_not_learned(tmp_path):
    for place, classes, message in (("told", 4, "got 2.0, expected 1"), ("bare", None, "unconditional")):
        objective, model = conditional("flow_matching", classes=classes)
        objective.export(model, tmp_path / place)
        pipeline = DiffusionPipeline.from_pretrained(
            tmp_path / place, custom_pipeline=str(tmp_path / place), trust_remote_code=True
        )
        with pytest.raises(ValueError, match=message):
            pipeline(class_labels=[1], guidance_scale=2.0)


@pytest.mark.parametrize("method", ["semidiscrete", "persistent"])
def test_pairs_of_the_whole_dataset_stay_within_classes_and_resume_bit_for_bit(make, monkeypatch, method):
    name, options = "class-conditional-digits", ["--coupling.method", method, "--data.subset_fraction", "0.03"]
    options += ["--coupling.options.tolerance", "5.0"] if method == "semidiscrete" else []
    whole = loop.train(make(name, *options, folder="whole"), progress=False)
    inner = loop.Run.train_step

    def interrupted(self, blocks):
        if self.step == 5:
            raise KeyboardInterrupt
        assert all(torch.equal(b.context["class_labels"] % 10, b.labels % 10) for b in blocks if not dropped(b))
        return inner(self, blocks)

    def dropped(block):
        return (block.context["class_labels"] == 10).any()

    monkeypatch.setattr(loop.Run, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.train(make(name, *options), progress=False)
    monkeypatch.setattr(loop.Run, "train_step", inner)
    assert_same_run(whole, loop.train(make(name, *options, "--resume", "auto"), progress=False), 6)


def test_a_network_that_is_told_classes_warns_of_a_coupling_across_them(make, caplog):
    loop.Run(make("class-conditional-digits"))
    assert not caplog.text
    loop.Run(make("class-conditional-digits", "--coupling.condition", "null"))
    assert "class couples within classes" in caplog.text


def test_grids_have_a_column_for_each_class(run, monkeypatch):
    with Image.open(run / "samples" / "step-6.png") as grid:
        assert grid.size == (10 * 9 - 1, 7 * 9 - 1)  # 64 images of 8 x 8


@pytest.mark.parametrize("chosen", [["7", "2"], ["7"]])
def test_sample_draws_the_classes_that_are_asked_for(run, tmp_path, monkeypatch, chosen):
    asked, inner = [], FlowMatchingObjective.sample

    def recorded(self, model, noise, steps, generator, told):
        asked.append((told.tolist(), self.config.guidance_scale))
        return inner(self, model, noise, steps, generator, told)

    monkeypatch.setattr(FlowMatchingObjective, "sample", recorded)
    argv = [str(run), "--samples", "6", "--steps", "1", "--output", str(tmp_path)]
    sample.main([*argv, "--class", *chosen, "--guidance", "4"])
    assert asked == [([7, 2] * 3 if len(chosen) == 2 else [7] * 6, 4.0)]
    assert (tmp_path / "steps-1.png").is_file()


@pytest.mark.parametrize(
    ("tells", "words", "message"),
    [
        ("class", {"classes": ["dgo"]}, r"got 'dgo', expected a number below 2 or one of cat, dog \(did you mean"),
        ("class", {"classes": ["2"]}, "got '2', expected a number below 2 or one of cat, dog"),
        ("class", {"prompt": ["a cat"]}, r"--prompt: got \['a cat'\], expected none: .* is told classes"),
        (None, {"classes": ["cat"]}, "told nothing: it is unconditional"),
        (None, {"prompt": ["a cat"]}, "told nothing: it is unconditional"),
        ("column:text", {"classes": ["cat"]}, "told captions"),
    ],
)
def test_sample_refuses_what_the_network_is_not_told(tells, words, message):
    objective = SimpleNamespace(tells=tells, classes=2 if tells == "class" else None)
    arguments = Namespace(**{"classes": [], "prompt": [], **words})
    with pytest.raises(config.RecipeError, match=message):
        sample.choose(arguments, objective, SimpleNamespace(classes=["cat", "dog"]))


def test_classes_are_chosen_by_name_or_number_and_their_names_are_captions():
    source = SimpleNamespace(classes=["cat", "dog", "0"])
    arguments = Namespace(classes=["dog", "0", "1"], prompt=[])
    assert sample.choose(arguments, SimpleNamespace(tells="class", classes=3), source) == [1, 2, 1]
    arguments = Namespace(classes=[], prompt=["a cat"])
    assert sample.choose(arguments, SimpleNamespace(tells="class", classes=None), source) == ["a cat"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flow-matching-digits", ["--objective.class_dropout", "0.1"], "got 0.1, expected 0 for model.classes = null"),
        ("ddim-digits", ["--objective.guidance_scale", "3"], "got 3.0, expected 1 with objective.class_dropout = 0"),
        ("class-conditional-digits", ["--objective.class_dropout", "1"], "class_dropout: got 1.0, expected a share"),
        ("class-conditional-digits", ["--model.classes", "1"], "model.classes: got 1, expected at least 2, or null"),
        ("class-conditional-digits", ["--data.latents", "cache"], "got 'cache', expected null: only stable_diffusion"),
        (
            "class-conditional-digits",
            ["--evaluate.prompts", "[a]"],
            r"prompts: got \['a'\], expected none: the network",
        ),
        (
            "stable-diffusion-digits",
            ["--model.classes", "10"],
            "got 10, expected null: objective.caption tells classes",
        ),
        (
            "stable-diffusion-digits",
            ["--objective.caption", "column:"],
            "got 'column:', expected empty, class or column",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(name, options, message):
    with pytest.raises(config.RecipeError, match=message):
        config.load([name, *options])


def test_more_classes_than_the_network_knows_are_refused(make):
    with pytest.raises(config.RecipeError, match=r"model.classes: got 9, but digits has 10 classes: expected no fewer"):
        loop.Run(make("class-conditional-digits", "--model.classes", "9"))


# --- captions


def test_columns_of_text_are_read_beside_the_images(captioned):
    source = load_source(sections.Data(captioned, mode="L"))
    assert list(source.texts) == ["texts", "text"]
    batch = source[[8, 1, 2]]
    assert batch.images[:, 0, 0, 0].tolist() == [8, 1, 2]
    assert batch.texts == {"texts": [["a 8", "the 8"], ["one 1"], []], "text": ["a 8", "a 1", "a 2"]}
    stream = load_source(sections.Data(captioned, mode="L", streaming=True, rows=16))
    assert next(stream.scan(16)).texts["texts"][8] == ["a 8", "the 8"]


def told_captions(source, **options):
    section = sections.StableDiffusion(pretrained="tiny-random", caption="column:texts", **options)
    return build_objective(SimpleNamespace(objective=section), source)


def test_one_of_several_captions_is_drawn_in_every_step_and_the_first_is_sampled_from(captioned):
    source = load_source(sections.Data(captioned, mode="L"))
    objective = told_captions(source, caption_dropout=0.5)
    labels, texts = torch.zeros(300, dtype=torch.int64), {"texts": [["a 8", "the 8"]] * 200 + [[]] * 50 + [None] * 50}
    first, again, later = (objective.told(labels, texts, draws(step)) for step in (0, 0, 1))
    assert first == again != later
    assert set(first[200:]) == {""}
    for text, share in (("a 8", 0.25), ("the 8", 0.25), ("", 0.5)):
        assert abs(first[:200].count(text) - 200 * share) <= 5 * (200 * share * (1 - share)) ** 0.5
    assert objective.told(labels, texts) == ["a 8"] * 200 + [""] * 100
    chosen = objective.choose(source, 32, 0)
    assert sorted(chosen[:16]) == sorted(["a 0", "a 8", "one 1", "one 9", *[""] * 12])
    assert objective.choose(source, 3, 0, ["x", "y"]) == ["x", "y", "x"]


def test_captions_are_encoded_as_the_pipeline_does(captioned):
    objective = told_captions(load_source(sections.Data(captioned, mode="L")))
    told = objective.tell(["a 8", "", "the 8"])["encoder_hidden_states"]
    for row, caption in zip(told, ["a 8", "", "the 8"], strict=True):
        tokens = objective.tokenizer([caption], padding="max_length", max_length=77, return_tensors="pt")
        torch.testing.assert_close(row, objective.text_encoder(tokens.input_ids)[0][0])
    torch.testing.assert_close(told[1:2], objective.describe(torch.tensor([-1])))


def overrides(source, **options):
    fields = {"data.source": source, "data.mode": "L", "coupling.condition": "null", "train.steps": "4", **options}
    return [word for name, value in fields.items() for word in (f"--{name}", value)]


def test_a_run_that_is_told_captions_resumes_bit_for_bit_and_draws_prompts(make, captioned, tmp_path):
    options = overrides(captioned, **{"objective.caption": "column:texts", "evaluate.prompts": "[a 3, the 4, a 5]"})
    output = loop.train(make("stable-diffusion-digits", *options, folder="whole"), progress=False)
    with Image.open(output / "samples" / "step-4.png") as grid:
        assert grid.size[0] == 3 * 9 - 1
    with interrupted(3):
        loop.train(make("stable-diffusion-digits", *options), progress=False)
    again = loop.train(make("stable-diffusion-digits", *options, "--resume", "auto"), progress=False)
    assert_same_run(output, again, 4)
    trained = measure.load_trained(output)
    one, other = (torch.cat(list(measure.draw(trained, 4, 2, choices))) for choices in (["a 3"], ["the 4"]))
    assert not torch.equal(one, other)
    sample.main([str(output), "--prompt", "a 3", "--samples", "2", "--steps", "1", "--output", str(tmp_path / "drawn")])


MEND = {
    "column:txt": r"column:texts or column:text \(did you mean 'column:text'",
    "class": "empty: the data has no names",
}


@pytest.mark.parametrize(("column", "mend"), MEND.items())
def test_captions_that_the_data_does_not_have_are_refused(make, captioned, column, mend):
    with pytest.raises(config.RecipeError, match=f"objective.caption: got '{column}', expected {mend}"):
        loop.Run(make("stable-diffusion-digits", *overrides(captioned, **{"objective.caption": column})))


def test_a_plan_does_not_open_the_data_to_count_its_captions():
    argv = ["sd-fine-tune-imagenet", "--objective.caption", "column:text", "--overlay", "smoke", "--plan"]
    assert "stable_diffusion with condition_unet" in plan(config.load(argv), argv)
