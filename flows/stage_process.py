"""Runs one stage in a process of its own: ``python -m flows.stage_process REQUEST RESULT_FD`` (by the runner).

REQUEST is JSON; the result goes to the inherited pipe RESULT_FD, which works on a full disk too. Exit codes: 0 done,
1 a defect (traceback on stderr), else that of a ``StageError``, whose sentence is in the result: 2 the user can act on
it, 75 the same command may simply be started again, 130 interrupted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from contextlib import closing
from pathlib import Path

from components.artifacts import (
    EXIT_USER_ERROR,
    ArtifactError,
    StageContext,
    StageError,
    die_with_parent,
    no_room,
)


def main(request_text: str, result_descriptor: int) -> int:
    """Run the stage described in the request and write its result to the pipe."""
    die_with_parent()
    # Read when OpenMP is loaded. Its busy waiting costs five times the work when other processes want the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    request = json.loads(request_text)
    context = StageContext(
        stage=request["stage"],
        recipe=request["recipe"],
        config=request["config"],
        inputs={role: Path(path) for role, path in request["inputs"].items()},
        out=Path(request["out"]),
        cache=Path(request["cache"]),
    )
    result: dict[str, object]
    code = EXIT_USER_ERROR
    try:
        with closing(context):  # on a full disk this fails too
            metrics = importlib.import_module(request["module"]).run(context)
        result = {"metrics": {k: float(v) for k, v in metrics.items()}}
    except StageError as error:
        result, code = {"error": str(error)}, error.exit_code
    except ArtifactError as error:
        result = {"error": str(error)}
    except Exception as error:
        described = no_room(error, context)
        if described is None:
            traceback.print_exc()
            return 1
        result = {"error": described}
    with os.fdopen(result_descriptor, "w") as pipe:
        json.dump({**result, "notes": context.notes, "peaks": context.peaks}, pipe)
    return code if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
