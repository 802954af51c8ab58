"""One process of a run under torchrun: ``torchrun --nproc_per_node=2 -m components.pretraining.worker REQUEST``.

REQUEST is the JSON file that the launcher wrote. The first rank writes ``result.json`` beside it. Without a launcher
(Kubernetes: every pod runs torchrun) ``--preset 21b --tokens FOLDER --out FOLDER`` says the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.artifacts import (
    EXIT_USER_ERROR,
    ArtifactError,
    StageContext,
    StageError,
    check_artifact,
    die_with_parent,
    parse_config,
    write_json,
)
from components.pretraining.config import PretrainConfig
from components.pretraining.launcher import REQUEST_NAME, RESULT_NAME

_GRACE_S = 10.0


def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.request is not None:
        loaded: dict[str, Any] = json.loads(Path(arguments.request).read_text())
        return loaded
    from components.pretraining.presets import PRESETS

    if not (arguments.preset and arguments.tokens and arguments.out):
        raise SystemExit("give REQUEST, or all of --preset, --tokens and --out")
    return {
        "stage": "pretrain",
        "recipe": arguments.preset,
        "config": PRESETS[arguments.preset]().model_dump(mode="json"),
        "inputs": {"tokenize": arguments.tokens},
        "out": arguments.out,
        "cache": arguments.out,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one rank; returns the process's exit code."""
    from components.pretraining.presets import PRESETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("request", nargs="?", help="JSON file written by the launcher")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="recipe, without a launcher")
    parser.add_argument("--tokens", help="folder of the tokenize stage's artefact")
    parser.add_argument("--out", help="folder of the artefact, seen by all nodes")
    request = _request(parser.parse_args(argv))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    die_with_parent()
    from components.pretraining.stage import train_here, write_results

    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    inputs = {role: Path(path) for role, path in request["inputs"].items()}
    context = StageContext(
        request["stage"], request["recipe"], request["config"], inputs, out, Path(request["cache"])
    )
    is_first = os.environ.get("RANK", "0") == "0"
    answer: dict[str, Any] = {}
    try:
        config = parse_config(PretrainConfig, context)
        # The runner does it where there is one. The other ranks wait for this one when they join the processes.
        if is_first and not request_was_launched(request) and check_artifact(inputs["tokenize"]).unread:
            context.note(
                "The largest token shards were compared with their manifest by samples only; flows.pipeline --verify "
                "reads everything."
            )
        answer["evaluations"] = train_here(context, config)
        if is_first and not request_was_launched(request):
            write_results(context, config, answer["evaluations"])
    except (StageError, ArtifactError) as error:
        answer = {"error": str(error)}
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        context.close()
    if is_first:
        write_json(context.scratch / RESULT_NAME, {**answer, "notes": context.notes})
    if "error" in answer:
        if not is_first:
            # torchrun kills all workers when one exits with an error; the first rank has to write its message.
            time.sleep(_GRACE_S)
        return EXIT_USER_ERROR
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    return 0


def request_was_launched(request: dict[str, Any]) -> bool:
    """Whether a launcher waits for this run and writes its results."""
    return (Path(request["out"]) / ".work" / REQUEST_NAME).exists()


if __name__ == "__main__":
    sys.exit(main())
