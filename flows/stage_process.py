"""Runs one stage in a process of its own: ``python -m flows.stage_process REQUEST RESULT_FD`` (by the runner).

REQUEST is JSON; the result goes to the inherited pipe RESULT_FD, which works on a full disk too. Exit codes: 0 done,
2 an error that the user can act on (its sentence is in the result), 1 a defect (traceback on stderr).
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

from components.artifacts import EXIT_USER_ERROR, ArtifactError, StageContext, StageError, die_with_parent


def _describe_os_error(error: OSError, context: StageContext) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free_bytes = shutil.disk_usage(context.out).free
        return (
            f"no room left while stage {context.stage} was writing"
            f"{f' {error.filename}' if error.filename else ''} ({free_bytes / 2**20:.0f} MiB free under "
            f"{context.out}). What was finished is kept: make room and run the same command again"
        )
    return None


def _caused_by_os_error(error: BaseException) -> OSError | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


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
    try:
        metrics = importlib.import_module(request["module"]).run(context)
        result = {"metrics": {k: float(v) for k, v in metrics.items()}}
    except (StageError, ArtifactError) as error:
        result = {"error": str(error)}
    except Exception as error:
        os_error = _caused_by_os_error(error)
        described = _describe_os_error(os_error, context) if os_error else None
        if described is None:
            traceback.print_exc()
            return 1
        result = {"error": described}
    finally:
        context.close()
    with os.fdopen(result_descriptor, "w") as pipe:
        json.dump({**result, "notes": context.notes}, pipe)
    return EXIT_USER_ERROR if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
