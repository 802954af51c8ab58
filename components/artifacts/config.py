"""A stage's part of a recipe: ``config = parse_config(CurateConfig, context)``, with one wording of errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from components.artifacts.stage import StageContext, StageError

_LONGEST_VALUE = 60  # characters; a longer value is left out of its sentence


class StageConfig(BaseModel):
    """Base of every stage's part of a recipe: frozen, and unknown fields are errors.

    Fields in ``OPT_IN`` are left out of what is declared while they are null, so that adding such a field leaves the
    fingerprints of artefacts without it as they were. Fields in ``PLACEMENT`` say where and how a stage runs, not what
    it makes: they are declared and do not enter the fingerprint, so that a run begun on one machine can be resumed on
    another.
    """

    OPT_IN: ClassVar[frozenset[str]] = frozenset()
    PLACEMENT: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def declared(self) -> dict[str, Any]:
        """The config as plain JSON values, as it enters manifests and, but for ``PLACEMENT``, fingerprints."""
        left_out = {name for name in self.OPT_IN if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=left_out)


_Config = TypeVar("_Config", bound=StageConfig)


def parse_config(kind: type[_Config], context: StageContext) -> _Config:
    """The stage's config, checked.

    Raises:
        StageError: names every wrong field as the recipe calls it, its value and what is allowed.
    """
    try:
        return kind.model_validate(dict(context.config))
    except ValidationError as error:
        raise StageError(
            f"the config of stage {context.stage} has a wrong value: {wrong_values(error, context.stage)}"
        ) from error


def wrong_values(error: ValidationError, prefix: str = "") -> str:
    """Every wrong field with its value, where that is short, and what is allowed, separated by semicolons.

    A complaint that only follows from another is left out: a list is too short because its items are wrong.
    """
    problems = error.errors(include_url=False)
    places = [problem["loc"] for problem in problems]
    lines = []
    for problem, place in zip(problems, places, strict=True):
        if any(other != place and other[: len(place)] == place for other in places):
            continue
        lines.append(_sentence(problem, ".".join(filter(None, (prefix, *map(str, place))))))
    return "; ".join(lines)


def _sentence(problem: Mapping[str, Any], field: str) -> str:
    value = repr(problem.get("input"))
    said = f" = {value}" if len(value) <= _LONGEST_VALUE else ""
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{field}{said}: {message}" if field else message
