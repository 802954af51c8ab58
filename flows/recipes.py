"""Recipes: a size of the system as one typed, frozen, validated object; every stage gets its own part.

``resolve("nano", ["pretrain.seed=7"])`` builds one and applies overrides; the resolved recipe goes into every manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from components.curation.config import CurateConfig
from components.devices.config import BenchmarkConfig
from components.evaluation.config import EvalSetsConfig, EvaluateConfig
from components.export.config import ExportConfig
from components.merging.config import MergeConfig
from components.posttraining.config import PosttrainConfig
from components.synthesis.config import SynthesizeConfig
from components.tokenization.config import TokenizeConfig
from pydantic import ValidationError

from components.artifacts import StageConfig
from components.pretraining.config import PretrainConfig


class RecipeError(ValueError):
    """A recipe's name, field or value is wrong; the message names it and what is allowed."""


class Recipe(StageConfig):
    """One size of the system: a part per stage."""

    name: str
    evalsets: EvalSetsConfig
    curate: CurateConfig
    synthesize: SynthesizeConfig
    tokenize: TokenizeConfig
    pretrain: PretrainConfig
    posttrain: PosttrainConfig
    merge: MergeConfig
    evaluate: EvaluateConfig
    export: ExportConfig
    benchmark: BenchmarkConfig

    def part(self, stage: str) -> dict[str, Any]:
        """A stage's config as plain JSON values."""
        config: StageConfig = getattr(self, stage)
        return config.model_dump(mode="json")


def nano() -> Recipe:
    """The whole system on two laptop cores in minutes: every stage real, only small."""
    raise NotImplementedError


RECIPES: dict[str, Callable[[], Recipe]] = {"nano": nano}


def resolve(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Build the recipe ``name`` and apply ``field.path=value`` overrides (values as JSON, else as text).

    Raises:
        RecipeError: unknown recipe or field, or a value out of range.
    """
    if name not in RECIPES:
        raise RecipeError(f"no recipe is called {name!r}; the recipes are {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    if not overrides:
        return recipe
    values = recipe.model_dump(mode="json")
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"{override!r} is not an override; write field.path=value")
        _set_field(values, path.strip(), text.strip())
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(describe_validation_error(name, error)) from error


def _set_field(values: dict[str, Any], path: str, text: str) -> None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *folders, leaf = path.split(".")
    place: Any = values
    for depth, key in enumerate(folders):
        place = _enter(place, key, ".".join(folders[: depth + 1]))
    if isinstance(place, list):
        _enter(place, leaf, path)
        place[int(leaf)] = value
    elif isinstance(place, dict) and leaf in place:
        place[leaf] = value
    else:
        allowed = ", ".join(sorted(place)) if isinstance(place, dict) else "none: it is a plain value"
        raise RecipeError(f"the recipe has no field {path!r}; fields there: {allowed}")


def _enter(place: Any, key: str, path: str) -> Any:
    if isinstance(place, list) and key.isdigit() and int(key) < len(place):
        return place[int(key)]
    if isinstance(place, dict) and key in place:
        return place[key]
    if isinstance(place, list):
        raise RecipeError(f"the recipe has no field {path!r}; its list has the indices 0 to {len(place) - 1}")
    allowed = ", ".join(sorted(place)) if isinstance(place, dict) else "none: it is a plain value"
    raise RecipeError(f"the recipe has no field {path!r}; fields there: {allowed}")


def describe_validation_error(name: str, error: ValidationError) -> str:
    """One line per wrong value: field, value, and what is allowed."""
    lines = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"]) or "recipe"
        lines.append(f"{field} = {problem.get('input')!r}: {problem['msg']}")
    return f"recipe {name} has a wrong value: " + "; ".join(lines)
