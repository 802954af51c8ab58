"""The flows as Prefect sees them, one per deployment of ``prefect.yaml``.

In the project folder, with ``make orchestrator`` running: ``prefect deployment run pipeline-nano``.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import Flow, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import deployment
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed

from components.artifacts import PROJECT, ArtifactError, StageError
from flows.execution import Request, Say, run_pipeline, say_on_stderr
from flows.overrides import RecipeError
from flows.runner import Runner, StageOutcome
from flows.stages import Stage

_USER_ERRORS = (RecipeError, StageError, ArtifactError)


def _run_stage_as_task(runner: Runner, stage: Stage) -> StageOutcome:
    """Run a stage as a Prefect task; a finished artefact ends it as ``Cached``, a user's error without a traceback."""
    outcomes: list[StageOutcome] = []
    errors: list[Exception] = []

    @task(name=stage.name, persist_result=False, cache_policy=NO_CACHE)
    def stage_task() -> State[Any]:
        try:
            outcomes.append(runner.run_stage(stage))
        except _USER_ERRORS as error:
            errors.append(error)
            return Failed(message=str(error))
        manifest = outcomes[0].manifest
        message = f"artefact {manifest.fingerprint[:12]} in {outcomes[0].folder}"
        return Completed(message=message, name="Cached" if outcomes[0].cached else None)

    stage_task(return_state=True)
    if errors:
        raise errors[0]
    return outcomes[0]


def _make_flow(
    name: str, recipe: str, until: str | None, description: str, errors: list[Exception] | None = None
) -> Flow[..., Any]:
    """A flow that runs a recipe's stages; the user's error that ended it is added to ``errors``."""

    @flow(name=name, description=description, persist_result=False, validate_parameters=True)
    def pipeline_flow(
        overrides: list[str] = [],  # noqa: B006  Prefect shows and serialises the default; it is never changed
        rebuild: list[str] = [],  # noqa: B006
        root: str = str(PROJECT / "runs"),
    ) -> State[Any]:
        say: Say = get_run_logger().info if deployment.id else say_on_stderr
        request = Request(recipe, tuple(overrides), until, tuple(rebuild), Path(root))
        try:
            ran = run_pipeline(request, say=say, run_stage=_run_stage_as_task)
        except _USER_ERRORS as error:
            if errors is not None:
                errors.append(error)
            if deployment.id:
                get_run_logger().error(str(error))
            return Failed(message=f"{type(error).__name__}: {error}")
        return Completed(message="built" if ran else "everything was finished; nothing was run")

    return pipeline_flow


@contextmanager
def _prefect_server() -> Iterator[None]:
    """The running server that ``prefect.toml`` names, else a temporary one with the same database.

    Raises:
        StageError: neither can be had.
    """
    url = PREFECT_API_URL.value()
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1):
            pass
    except (OSError, ValueError):
        server = SubprocessASGIServer()
        try:
            try:
                server.start()
            except RuntimeError as error:
                raise StageError(
                    f"the temporary Prefect server did not start ({error}); --plain runs without Prefect, and "
                    "`make orchestrator` starts a server that stays"
                ) from error
            with temporary_settings({PREFECT_API_URL: server.api_url}):
                yield
        finally:
            server.stop()
    else:
        yield


def run_as_flow(request: Request) -> None:
    """Run a request as a flow in this process, on the running Prefect server or a temporary one.

    Raises:
        RecipeError, StageError, ArtifactError: why the flow failed.
    """
    name = f"pipeline-{request.recipe}" if request.until is None else f"{request.until}-{request.recipe}"
    errors: list[Exception] = []
    pipeline_flow = _make_flow(name, request.recipe, request.until, __doc__ or "", errors)
    with _prefect_server():
        state: Any = pipeline_flow(
            overrides=list(request.overrides),
            rebuild=list(request.rebuild),
            root=str(request.root),
            return_state=True,
        )
    if errors:
        raise errors[0]
    if not state.is_completed():
        raise StageError(state.message or "the flow did not complete")


pipeline_smoke = _make_flow("pipeline-smoke", "smoke", None, "The whole pipeline at its smallest setting.")
pipeline_nano = _make_flow("pipeline-nano", "nano", None, "The whole pipeline at nano size on real data.")
pretrain_nano = _make_flow("pretrain-nano", "nano", "pretrain", "Data and pretraining at nano size.")
pipeline_4b = _make_flow("pipeline-4b", "4b", None, "The whole pipeline for SmallThinker-4B-A0.6B.")
pretrain_4b = _make_flow("pretrain-4b", "4b", "pretrain", "Data and pretraining of SmallThinker-4B-A0.6B.")
pipeline_21b = _make_flow("pipeline-21b", "21b", None, "The whole pipeline for SmallThinker-21B-A3B.")
pretrain_21b = _make_flow("pretrain-21b", "21b", "pretrain", "Data and pretraining of SmallThinker-21B-A3B.")
