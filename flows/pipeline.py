"""Runs the pipeline, data to device benchmark: ``python -m flows.pipeline --recipe nano`` (``make pipeline``).

The same stages run as plain Python (``--plain``), as a Prefect flow on a temporary server (the default), or as a
deployment on a running server (``prefect deployment run pipeline-nano``; see ``flows/deployments.py``).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from components.artifacts import EXIT_INTERRUPTED, EXIT_USER_ERROR, PROJECT, ArtifactError, StageError
from flows.execution import Request, run_pipeline, say_on_stderr
from flows.overrides import RecipeError, resolve
from flows.recipes import RECIPES
from flows.runner import Runner
from flows.stages import STAGES, upstream


def _raise_interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what to run and how."""
    parser.add_argument("--recipe", default="nano", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--rebuild", action="append", default=[], metavar="STAGE", help="build it again")
    parser.add_argument(
        "--root", type=Path, default=PROJECT / "runs", help="folder of artefacts and downloads"
    )
    parser.add_argument("--plan", action="store_true", help="say what would run and why, and stop")
    parser.add_argument("--verify", action="store_true", help="read every byte of what is finished, and stop")
    parser.add_argument("--plain", action="store_true", help="without Prefect")


def request_of(options: argparse.Namespace, until: str | None) -> Request:
    """What the parsed options ask for, up to the stage ``until``."""
    return Request(options.recipe, tuple(options.overrides), until, tuple(options.rebuild), options.root)


def execute(request: Request, plan: bool = False, plain: bool = False, verify: bool = False) -> int:
    """Run a request, or only plan or verify it; users' errors go to stderr. Returns the exit code."""
    signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        if plan or verify:
            runner = Runner(resolve(request.recipe, request.overrides), request.root, say=say_on_stderr)
            stages = upstream(request.until) if request.until else STAGES
            if verify:
                runner.verify(stages)
            if plan:
                planned = runner.plan(stages)
                runner.describe(planned)
                runner.preflight(planned)
        elif plain:
            run_pipeline(request)
        else:
            # The runner says what happens; Prefect's own lines would say it again.
            os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
            os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")
            from flows.deployments import run_as_flow

            run_as_flow(request)
    except (RecipeError, StageError, ArtifactError) as error:
        say_on_stderr(f"error: {error}")
        return error.exit_code if isinstance(error, StageError) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        say_on_stderr("interrupted; what was finished is kept: the same command goes on from there")
        return EXIT_INTERRUPTED
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=__doc__)
    add_run_options(parser)
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    options = parser.parse_args(arguments)
    return execute(request_of(options, options.until), options.plan, options.plain, options.verify)


if __name__ == "__main__":
    sys.exit(main())
