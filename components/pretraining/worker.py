"""One process of a run under torchrun: ``torchrun --nproc_per_node=2 -m components.pretraining.worker REQUEST``.

REQUEST is the JSON file that the launcher wrote. The first rank writes ``result.json`` beside it, and every rank that
cannot go on its report.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from components.artifacts import (
    EXIT_USER_ERROR,
    StageContext,
    StageError,
    die_with_parent,
    no_room,
    parse_config,
    write_json,
)
from components.pretraining.config import PretrainConfig
from components.pretraining.launcher import RESULT_NAME
from components.pretraining.node import REPORTS_NAME
from components.pretraining.processes.reports import RankReports

_GRACE_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one rank; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("request", help="JSON file written by the launcher")
    request_path = Path(parser.parse_args(argv).request)
    request: dict[str, Any] = json.loads(request_path.read_text())
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    die_with_parent()
    from components.pretraining.processes.peaks import gather_peaks
    from components.pretraining.stage import train_here

    out = Path(request["out"])
    inputs = {role: Path(path) for role, path in request["inputs"].items()}
    context = StageContext(
        request["stage"], request["recipe"], request["config"], inputs, out, Path(request["cache"])
    )
    rank = int(os.environ.get("RANK", "0"))
    answer: dict[str, Any] = {}
    report: dict[str, Any] = {}
    try:
        with closing(context):  # on a full disk this fails too
            config = parse_config(PretrainConfig, context)
            answer["evaluations"] = train_here(context, config)
            answer["peaks"] = gather_peaks()
    except StageError as error:
        report = {"error": str(error), "exit_code": error.exit_code}
    except Exception as error:
        traceback.print_exc()
        described = no_room(error, context)
        report = {"error": described, "exit_code": EXIT_USER_ERROR} if described else {"defect": repr(error)}
    if report:
        sys.stderr.write(f"rank {rank}: {report.get('error') or report['defect']}\n")
        RankReports(request_path.parent / REPORTS_NAME).write(rank, {**report, "host": socket.gethostname()})
    if rank == 0 and "defect" not in report:
        _answer(request_path.parent / RESULT_NAME, {**answer, "notes": context.notes}, needed=not report)
    if report:
        # torchrun kills all workers when one exits with an error; the others have to write theirs.
        time.sleep(_GRACE_S if "error" in report and rank else 0)
        return int(report.get("exit_code", 1))
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    return 0


def _answer(path: Path, answer: dict[str, Any], needed: bool) -> None:
    try:
        write_json(path, answer)
    except OSError:
        if needed:  # else the report has said it, on a disk that may be full
            raise


if __name__ == "__main__":
    sys.exit(main())
