"""Plans or runs pretraining alone: ``python -m flows.pretrain --recipe 21b --plan``.

Without ``--plan`` it builds what is missing up to the pretrained model, like ``flows.pipeline --until pretrain``. What
cannot fit is refused either way, before anything is spent.

A cluster that starts the same command on every node (Kubernetes) gives each torchrun's variables ``PET_NNODES``,
``PET_NODE_RANK``, ``PET_MASTER_ADDR`` and ``PET_MASTER_PORT``: node 0 then runs the stages, the others take part in its
training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from components.artifacts import EXIT_USER_ERROR, ArtifactError, StageContext, StageError
from components.pretraining.config import PretrainConfig
from flows.execution import Request, say_on_stderr
from flows.overrides import RecipeError, resolve
from flows.pipeline import add_run_options, execute, request_of
from flows.runner import Runner
from flows.stages import stage_named

LAST_STAGE = "pretrain"


def print_plan(config: PretrainConfig) -> int:
    """Write the plan to stdout and what this machine lacks to stderr; returns the exit code.

    A plan that cannot work (memory, a batch that cannot be cut) is refused with its problems. That the machine at hand
    lacks the GPUs is only said: plans are made before machines are rented.
    """
    from components.pretraining.architecture import model_config
    from components.pretraining.estimate import estimate_run, preflight

    estimate = estimate_run(model_config(config), config)
    sys.stdout.write(estimate.render() + "\n")
    if estimate.problems:
        say_on_stderr("error: refused, because\n  " + "\n  ".join(estimate.problems))
        return EXIT_USER_ERROR
    for line in preflight(config):
        say_on_stderr(f"this machine: {line}")
    return 0


def print_deepspeed(config: PretrainConfig) -> int:
    """Write the config that DeepSpeed is given to stdout."""
    from components.pretraining.deepspeed.engine import deepspeed_config

    precision = "bf16" if config.precision == "bf16" else "fp32"
    values = deepspeed_config(config, config.hardware.gpus or config.processes, precision)
    sys.stdout.write(json.dumps(values, indent=2) + "\n")
    return 0


def take_part(request: Request) -> int:
    """Train as another node than the first, which runs the stage; returns the exit code, the same as there."""
    from components.pretraining.launcher import join_run

    try:
        recipe = resolve(request.recipe, request.overrides)
        runner = Runner(recipe, request.root, say=say_on_stderr)
        stage = stage_named(LAST_STAGE)
        identity = runner.identity(stage)
        if runner.store.finished(identity) is not None:
            say_on_stderr("training is finished; there is nothing to take part in")
            return 0
        inputs = {
            role: runner.store.folder(runner.identity(stage_named(name)))
            for role, name in stage.parents.items()
        }
        out = runner.store.folder(identity)
        context = StageContext(stage.name, recipe.name, identity.config, inputs, out, runner.root / "cache")
        join_run(context, recipe.pretrain)
    except (RecipeError, StageError, ArtifactError) as error:
        say_on_stderr(f"error: {error}")
        return error.exit_code if isinstance(error, StageError) else EXIT_USER_ERROR
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.pretrain", description=__doc__)
    add_run_options(parser)
    parser.add_argument("--deepspeed", action="store_true", help="print DeepSpeed's config, and stop")
    parser.add_argument("--gpus", type=int, metavar="N", help="short for --set pretrain.hardware.gpus=N")
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="short for --set pretrain.hardware.assumed_mfu=SHARE"
    )
    options = parser.parse_args(arguments)
    for field, value in (("gpus", options.gpus), ("assumed_mfu", options.mfu)):
        if value is not None:
            options.overrides.append(f"pretrain.hardware.{field}={value}")
    request = request_of(options, until=LAST_STAGE)
    if not (options.plan or options.deepspeed):
        if int(os.environ.get("PET_NODE_RANK") or 0):
            return take_part(request)
        return execute(request, plain=options.plain, verify=options.verify)
    try:
        config = resolve(request.recipe, request.overrides).pretrain
        return print_plan(config) if options.plan else print_deepspeed(config)
    except (RecipeError, StageError, ArtifactError) as error:
        say_on_stderr(f"error: {error}")
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
