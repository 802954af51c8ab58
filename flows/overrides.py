"""A recipe with single values changed: ``resolve("nano", ["pretrain.seed=7"])``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from components.artifacts import wrong_values
from flows.recipes import RECIPES, Recipe

_FREE_FIELDS = ("overrides", "documents", "generated_rows")  # mappings whose keys are the user's


class RecipeError(ValueError):
    """A recipe's name, field or value is wrong; the message names it and what is allowed."""


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
        raise RecipeError(f"recipe {name} has a wrong value: {wrong_values(error)}") from error


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
    elif isinstance(place, dict) and (leaf in place or (folders and folders[-1] in _FREE_FIELDS)):
        place[leaf] = value
    else:
        raise _no_field(place, path)


def _enter(place: Any, key: str, path: str) -> Any:
    if isinstance(place, list) and key.isdigit() and int(key) < len(place):
        return place[int(key)]
    if isinstance(place, dict) and key in place:
        return place[key]
    if isinstance(place, list):
        raise RecipeError(f"the recipe has no field {path!r}; its list has the indices 0 to {len(place) - 1}")
    raise _no_field(place, path)


def _no_field(place: Any, path: str) -> RecipeError:
    allowed = ", ".join(sorted(place)) if isinstance(place, dict) else "none: it is a plain value"
    return RecipeError(f"the recipe has no field {path!r}; fields there: {allowed}")
