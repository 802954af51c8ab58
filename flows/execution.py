"""Brings a recipe's artefacts up to date: ``run_pipeline(Request("nano"))``.

Who starts it (the command line, a Prefect flow) says how a stage is run and where sentences go.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from components.artifacts import PROJECT, fingerprint
from components.reporting import write_report
from flows.overrides import RecipeError, resolve
from flows.promotion import promote
from flows.runner import Runner, StageOutcome, finished_manifests
from flows.stages import STAGE_NAMES, STAGES, Stage, upstream

Say = Callable[[str], None]
RunStage = Callable[[Runner, Stage], StageOutcome]


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        recipe: recipe name.
        overrides: ``field.path=value`` changes to it.
        until: last stage wanted, or ``None`` for all.
        rebuild: stages to build again although finished.
        root: folder of artefacts, downloads, the MLflow database and the report.
    """

    recipe: str = "nano"
    overrides: tuple[str, ...] = ()
    until: str | None = None
    rebuild: tuple[str, ...] = ()
    root: Path = PROJECT / "runs"


def say_on_stderr(sentence: str) -> None:
    """A sentence for the user."""
    sys.stderr.write(sentence + "\n")
    sys.stderr.flush()


def _run_stage(runner: Runner, stage: Stage) -> StageOutcome:
    return runner.run_stage(stage)


def tracking_uri(root: Path) -> str:
    """Where MLflow records go: ``MLFLOW_TRACKING_URI``, or a database beside the artefacts."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def run_pipeline(request: Request, say: Say = say_on_stderr, run_stage: RunStage = _run_stage) -> bool:
    """Bring every stage of the request up to date; returns whether anything had to be built.

    Raises:
        RecipeError: the recipe or an override is wrong.
        PreflightError: the machine lacks something; nothing was started.
        StageError, ArtifactError: a stage cannot go on, or a finished artefact is damaged.
    """
    started = time.monotonic()
    for name in (*request.rebuild, *((request.until,) if request.until else ())):
        if name not in STAGE_NAMES:
            raise RecipeError(f"no stage is called {name!r}; the stages are {', '.join(STAGE_NAMES)}")
    recipe = resolve(request.recipe, request.overrides)
    runner = Runner(recipe=recipe, root=request.root, say=say, rebuild=request.rebuild)
    stages = upstream(request.until) if request.until else STAGES
    planned = runner.plan(stages)
    say(
        f"recipe {recipe.name}: {sum(not entry.finished for entry in planned)} of {len(planned)} stages to run"
    )
    runner.describe(planned)
    if all(entry.finished for entry in planned):
        say(f"everything is finished; nothing was run ({time.monotonic() - started:.0f} s)")
        report = write_report(
            recipe.name, finished_manifests(runner), request.root / recipe.name / "report.html"
        )
        _say_where_to_look(runner, report, say)
        return False
    runner.preflight(planned)

    # Takes seconds to import: only when there is something to record.
    from components.tracking import MlflowTracker

    identity = fingerprint(
        "pipeline", 1, {entry.stage.name: entry.identity.fingerprint for entry in planned}, {}
    )
    tracker = MlflowTracker(
        uri=tracking_uri(request.root),
        experiment=f"smallthinker-{recipe.name}",
        artifact_root=request.root.resolve() / "mlflow-artifacts",
        pipeline=recipe.name,
        identity=identity,
        parameters=recipe.model_dump(mode="json"),
    )
    runner.observer = tracker
    report_path = request.root / recipe.name / "report.html"
    failed = True
    try:
        outcomes = {entry.stage.name: run_stage(runner, entry.stage) for entry in planned}
        for line in promote(tracker.registry, tracker.parent_run_id, outcomes):
            say(f"registry: {line}")
        failed = False
    finally:
        try:
            write_report(recipe.name, finished_manifests(runner), report_path)
            tracker.pipeline_finished(report_path, failed)
        except Exception as error:  # a full disk, a server that is gone: no reason to hide how the run ended
            say(f"warning: the report and its tracking failed ({error})")
    say(f"finished in {(time.monotonic() - started) / 60:.1f} minutes")
    _say_where_to_look(runner, report_path, say)
    return True


def _say_where_to_look(runner: Runner, report: Path, say: Say) -> None:
    say("")
    say(f"report   {_display(report)}")
    say(f"MLflow   .venv/bin/mlflow ui --backend-store-uri {tracking_uri(runner.root)}")
    for folder, manifest in finished_manifests(runner):
        if manifest.stage == "export":
            packed = sorted(name for name in manifest.files if name.endswith("q4_0.gguf"))
            if packed:
                model = _display(folder / packed[0])
                say(f"chat     .venv/bin/python -m runtime_cpu.chat {model}")
                say(f"serve    .venv/bin/python -m runtime_cpu.serve {model}")


def _display(path: Path) -> str:
    """``path`` as a user would type it in the present folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path.resolve())
