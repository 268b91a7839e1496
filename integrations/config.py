"""Recipes: YAML read into `sections` by jsonargparse, every field overridable on the command line.

Nothing heavier than PyYAML and jsonargparse is imported here, so a mistake in a recipe is reported before PyTorch
loads. Every section refuses values that cannot run; `Recipe` refuses sections that do not fit together, and `places`
what is not on this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from . import sections
from .coupling_section import DATASET_METHODS, CouplingSection
from .network_sections import MODELS, Adm, ConditionUnet, Network, OwnNetwork, Unet
from .sections import Own, OwnObjective, RecipeError, closest, expect

RECIPES = Path(__file__).parent / "recipes"
LAUNCH = Path(__file__).parent / "launch"

# A section may have fields named class_path and init_args.
set_parsing_settings(subclasses_enabled=["is_pure_dataclass"])

CLASSES = (
    *(OwnObjective, sections.Data, OwnNetwork, sections.OwnOptimizer),
    *(CouplingSection, sections.Train, sections.Evaluate, sections.Launch),
)
SECTIONS: dict[str, type] = {kind.section: kind for kind in CLASSES}
KINDS = {"objective": sections.OBJECTIVES, "model": MODELS, "optimizer": sections.OPTIMIZERS}
"""Sections whose fields depend on what they name, by short names; `SECTIONS` has those for a class of the user's."""


@dataclass
class Recipe:
    """A complete experiment: ``name`` is the recipe file's stem, ``output`` the run's folder."""

    name: str
    objective: Any
    data: sections.Data
    model: Any
    optimizer: sections.Optimizer | sections.OwnOptimizer
    coupling: CouplingSection
    train: sections.Train
    evaluate: sections.Evaluate
    launch: sections.Launch
    output: Path
    resume: bool = False
    plan: bool = False

    def __post_init__(self) -> None:
        objective, model, data, train = self.objective, self.model, self.data, self.train
        captioned = isinstance(objective, sections.StableDiffusion)
        own = isinstance(objective, Own) or isinstance(model, Own)
        fitting = [name for name, kind in MODELS.items() if (kind is ConditionUnet) == captioned]
        self._expect(own or model.name in fitting, "model.name", f"{' or '.join(fitting)} for {objective.name}")
        if isinstance(model, Network) and data.side is not None and not captioned:
            model.check_side(data.side)
        most = max(self.evaluate.steps)
        if isinstance(objective, sections.Consistency):
            levels = objective.s1 + 1
            self._expect(most <= levels, "evaluate.steps", f"at most objective.s1 + 1 = {levels}")
        elif isinstance(objective, sections.Ddim):
            levels = objective.diffusion_steps
            self._expect(most <= levels, "evaluate.steps", f"at most objective.diffusion_steps = {levels}")
        told, dropped = model.classes is not None, getattr(objective, "class_dropout", 0) > 0
        self._expect(not (told and captioned), "model.classes", "null: objective.caption tells classes")
        self._expect(told or not dropped, "objective.class_dropout", "0 for model.classes = null")
        prompted = not self.evaluate.prompts or (captioned and objective.caption != "empty")
        self._expect(prompted, "evaluate.prompts", "none: the network is told no captions")
        self._expect(captioned or data.latents is None, "data.latents", "null: only stable_diffusion has latents")
        saves = not train.gradient_checkpointing or isinstance(model, Unet | Adm | ConditionUnet | Own)
        self._expect(saves, "train.gradient_checkpointing", f"false for model.name = {model.name}")
        method = self.coupling.method
        numbered = f"false for coupling.method = {method}, which needs rows by number"
        self._expect(method not in DATASET_METHODS or not data.streaming, "data.streaming", numbered)
        kept = [None, train.ema_decay, *train.further_ema_decays]
        self._expect(self.evaluate.ema_decay in kept, "evaluate.ema_decay", f"one of {kept}")
        begun = train.init_from is None or getattr(model, "pretrained", None) is None
        self._expect(begun, "train.init_from", "null with model.pretrained, which says the same")

    def _expect(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            expect(False, name, attrgetter(name)(self), expected)

    def sections(self) -> dict[str, Any]:
        """Return the recipe as plain nested values."""
        return yaml.safe_load(self.text())

    def text(self) -> str:
        """Return the resolved recipe as YAML, as ``recipe.yaml`` holds it."""
        values = {section: dataclasses.asdict(getattr(self, section)) for section in SECTIONS}
        return yaml.safe_dump(values | {"output": str(self.output)}, sort_keys=False)


# Reading


def bundled() -> list[str]:
    """Return the names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(argv: list[str], *, prog: str = "python -m integrations.train") -> Recipe:
    """Read the recipe named by ``argv[0]`` with the overrides in ``argv[1:]``.

    Raises
    ------
    RecipeError
        For an unknown field, a value of the wrong type or an impossible combination.
    """
    path = _find(argv[0], RECIPES, "recipe")
    try:
        overlays, asked, flags = _split(argv[1:])
        recipe = _read(path)
        kinds = _choose(recipe, asked)
        files = [recipe, *(_overlay(overlay, recipe) for overlay in overlays)]
        for file in files:
            _give_way(file, asked)
        # Only --help shows the text below each field: reading it takes longer than all else.
        set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(flags))
        parser = _parser(kinds, f"{prog} {path}")
        _check_names(files, flags, parser)
        read = [word for file in files for word in ("--recipe", yaml.safe_dump(file))]
        values = parser.instantiate(parser.parse_args([*read, *flags]))
        chosen = {section: values[section] for section in SECTIONS}
        output = Path(values.output or f"runs/{path.stem}")
        return Recipe(path.stem, **chosen, output=output, resume=values.resume == "auto", plan=values.plan)
    except (ArgumentError, RecipeError) as error:
        msg = f"{path}: {' '.join(str(error).split())}"
        raise RecipeError(msg) from None


def _find(name: str, folder: Path, what: str) -> Path:
    """Find a file by its path, or by the bare name of a bundled one."""
    for path in (Path(name), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    msg = f"{name}: no such {what} file, and none of the bundled ones: {', '.join(known)}{closest(name, known)}"
    raise RecipeError(msg)


def _read(path: Path) -> dict[str, Any]:
    """Read a file of fields; of a section that it does not have, there are none."""
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, or no such date
        msg = f"not valid YAML: {error}"
        raise RecipeError(msg) from None
    if not isinstance(raw, dict):
        msg = f"expected sections ({', '.join(SECTIONS)}), got {type(raw).__name__}"
        raise RecipeError(msg)
    for section in SECTIONS:
        fields = raw.setdefault(section, {})
        expect(isinstance(fields, dict), section, fields, "fields, as name: value")
    return raw


GIVE_WAY = {
    "data.source": ("class_path", "init_args"),
    "data.class_path": ("source", "init_args"),
    "coupling.method": ("method", "options"),
}
"""Fields of a file that what is asked for on the command line takes the place of."""


def _split(argv: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the overlays, what is asked for in the place of something else, and all words but the overlays'."""
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    words.add_argument("--overlay", nargs="?", const="", action="append", default=[])
    choices = [f"{section}.{name}" for section in KINDS for name in ("name", "class_path")]
    for name in (*choices, *GIVE_WAY):
        words.add_argument(f"--{name}")
    named, rest = words.parse_known_args(argv)
    asked = {name: value for name, value in vars(named).items() if name != "overlay" and value is not None}
    return named.overlay, asked, [*rest, *(f"--{name}={value}" for name, value in asked.items())]


def _choose(recipe: dict[str, Any], asked: dict[str, str]) -> dict[str, type]:
    """Return the classes of the sections in `KINDS`, and let the recipe name what is asked for.

    What is asked for otherwise than the recipe says takes the place of the recipe's, fields and all.
    """
    kinds = {}
    for section, known in KINDS.items():
        said = recipe[section]
        if section == "optimizer" and "class_path" not in said:
            said.setdefault("name", sections.Optimizer.name)
        said_path, said_name = said.get("class_path"), said.get("name")
        both = said_path is not None and "name" in said
        expect(not both, f"{section}.name", said_name, f"null with {section}.class_path, one of the two")
        path, name = asked.get(f"{section}.class_path"), asked.get(f"{section}.name")
        path, name = (said_path, said_name) if path is None and name is None else (path, name)
        expected = f"one of {', '.join(known)}{closest(str(name), known)}, or {section}.class_path"
        expect(path is not None or name in [*known], f"{section}.name", name, expected)
        kinds[section] = known[name] if path is None else SECTIONS[section]
        if path != said_path or (path is None and kinds[section] is not known.get(str(said_name))):
            kept = {entry.name for entry in dataclasses.fields(sections.Schedule)} if section == "optimizer" else ()
            said = {field: value for field, value in said.items() if field in kept}
        recipe[section] = said | ({"name": name} if path is None else {"class_path": path})
    return kinds


def _overlay(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Read a file of fields for a recipe.

    Those of the sections in `KINDS` may also stand under the short name that they are for, and those of ``coupling``
    under that of an objective, so that one file fits every recipe.
    """
    overlay = _read(_find(name, RECIPES / "overlays", "overlay"))
    for section, by in {**{section: section for section in KINDS}, "coupling": "objective"}.items():
        known, fields = KINDS[by], overlay[section]
        common = {field: value for field, value in fields.items() if field not in known}
        overlay[section] = common | fields.get(recipe[by].get("name"), {})
    return overlay


def _give_way(file: dict[str, Any], asked: dict[str, str]) -> None:
    for name in GIVE_WAY.keys() & asked.keys():
        for dropped in GIVE_WAY[name]:
            file[name.partition(".")[0]].pop(dropped, None)


def _parser(kinds: dict[str, type], prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description="Every field of a recipe.")
    parser.add_argument("--recipe", action="config", help="a further file of fields, read after the recipe")
    for section, kind in (SECTIONS | kinds).items():
        parser.add_class_arguments(kind, section)
    parser.add_argument("--output", type=str | None, default=None, help="the run's folder; null is runs/<recipe name>")
    resume = "auto: continue from the newest intact checkpoint in the output folder, or start if there is none"
    parser.add_argument("--resume", choices=["auto"], default=None, help=resume)
    overlay = "a file of fields, or the name of a bundled one: read after the recipe, before all other options"
    parser.add_argument("--overlay", type=str | None, default=None, help=overlay)
    parser.add_argument("--plan", action="store_true", help="say what a run would be and need, and do not train")
    return parser


def _check_names(files: list[dict[str, Any]], flags: list[str], parser: ArgumentParser) -> None:
    """Refuse fields and flags that there are not: jsonargparse takes any flag that continues one, as ``--plan.x``."""
    known = {action.dest for action in parser._actions}
    free = tuple(f"{name}." for name in known if name.endswith((".init_args", ".options", ".ddp")))
    words = [word.partition("=")[0] for word in flags if word.startswith("--")]
    for file in files:
        for section, said in file.items():
            words += [f"{section}.{field}" for field in said] if isinstance(said, dict) else [str(section)]
    for word in words:
        name = word.removeprefix("--")
        if name not in known and not name.startswith(free):
            longer = sorted(each for each in known if each.startswith(name))
            msg = f"{word}: no such option{closest(name, longer) or closest(name, known)}"
            raise RecipeError(msg)
