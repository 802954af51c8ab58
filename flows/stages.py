"""The pipeline's stages: which component does each, and whose artefacts it reads."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: the stage's name, and the recipe field that holds its config.
        module: the component offering ``VERSION`` and ``run(context)``.
        parents: parents' stage names by role.
        preflight: ``module:function`` that lists what is missing before anything starts, or empty.
        cost: ``module:function`` that says what the stage will cost, in lines of text, or empty.
    """

    name: str
    module: str
    parents: Mapping[str, str] = field(default_factory=dict)
    preflight: str = ""
    cost: str = ""

    @property
    def version(self) -> int:
        """The component's ``VERSION``; raising it makes earlier artefacts stale."""
        version: int = importlib.import_module(self.module).VERSION
        return version


def _same_names(*stages: str) -> dict[str, str]:
    return {stage: stage for stage in stages}


STAGES: tuple[Stage, ...] = (
    Stage("evalsets", "components.evaluation.sets"),
    Stage("curate", "components.curation", _same_names("evalsets")),
    Stage(
        "synthesize",
        "components.synthesis",
        _same_names("curate", "evalsets"),
        preflight="components.synthesis.teacher.preflight:preflight",
    ),
    Stage("tokenize", "components.tokenization", _same_names("curate", "synthesize")),
    Stage(
        "pretrain",
        "components.pretraining",
        _same_names("tokenize"),
        preflight="components.pretraining.estimate:preflight",
        cost="components.pretraining.estimate:describe_on_gpus",
    ),
    Stage(
        "posttrain", "components.posttraining", _same_names("pretrain", "tokenize", "synthesize", "evalsets")
    ),
    Stage("merge", "components.merging", _same_names("pretrain", "posttrain", "tokenize", "evalsets")),
    Stage(
        "evaluate",
        "components.evaluation",
        _same_names("pretrain", "posttrain", "merge", "tokenize", "evalsets"),
    ),
    Stage("export", "components.export", _same_names("merge", "evaluate", "tokenize")),
    Stage("benchmark", "components.devices", _same_names("export", "merge", "tokenize")),
)

STAGE_NAMES: tuple[str, ...] = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    """The stage called ``name``.

    Raises:
        KeyError: no stage has that name; the message lists the names.
    """
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise KeyError(f"no stage is called {name!r}; the stages are {', '.join(STAGE_NAMES)}")


def upstream(name: str) -> tuple[Stage, ...]:
    """The stage called ``name`` and everything it depends on, in running order."""
    wanted = {name}
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update(stage.parents.values())
    stage_named(name)
    return tuple(stage for stage in STAGES if stage.name in wanted)
