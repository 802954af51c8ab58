"""Plans or runs pretraining alone: ``python -m flows.pretrain --recipe 21b --plan``.

Without ``--plan`` it builds what is missing up to the pretrained model, like ``flows.pipeline --until pretrain``. What
cannot fit is refused either way, before anything is spent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from components.artifacts import EXIT_USER_ERROR, ArtifactError, StageError
from components.pretraining.config import PretrainConfig
from flows.execution import say_on_stderr
from flows.overrides import RecipeError, resolve
from flows.pipeline import add_run_options, execute, request_of

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
        return execute(request, plain=options.plain, verify=options.verify)
    try:
        config = resolve(request.recipe, request.overrides).pretrain
        return print_plan(config) if options.plan else print_deepspeed(config)
    except (RecipeError, StageError, ArtifactError) as error:
        say_on_stderr(f"error: {error}")
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
