"""What one GPU settles in at most eight minutes: ``python -m components.pretraining.kernel_proofs.on_gpu``.

Every check runs in a process of its own, so that one that crashes, hangs or runs out of memory leaves the others. The
verdicts are written as they come: a table on stderr, JSON on stdout and, with ``--out``, in a file after every check.
``--rehearse`` runs the same code on the CPU at small sizes, kernels in Triton's interpreter, and proves only that the
checks themselves work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.artifacts import StageError

# In the order of what would be missed most when time runs out, with the most seconds that each may take on a GPU.
LIMITS_S = {
    "environment": 30.0,
    "empty-groups": 60.0,
    "recomputed-routing": 90.0,
    "attention": 120.0,
    "experts-and-loss": 90.0,
    "router-logits": 30.0,
    "copies": 40.0,
    "collectives": 40.0,
    "speed": 240.0,
}
_VERDICTS = ("passed", "failed", "error", "timed out", "not run")


def run_one(name: str, rehearse: bool) -> dict[str, Any]:
    """One check, in this process.

    Raises:
        StageError: no GPU is there.
    """
    if rehearse:
        from components.pretraining.dry_run.fake_cuda import load_fake_cuda

        os.environ["TRITON_INTERPRET"] = "1"
        load_fake_cuda()
    import torch

    if not rehearse and not torch.cuda.is_available():
        raise StageError("These checks need a GPU; --rehearse runs their code on the CPU at small sizes.")
    from components.pretraining.kernel_proofs.gpu_checks import CHECKS, Sizes

    outcome = CHECKS[name](Sizes.rehearsal() if rehearse else Sizes.gpu())
    verdict = "failed" if outcome.problems else "passed"
    return {"verdict": verdict, "problems": outcome.problems, "figures": outcome.figures}


def run_apart(name: str, rehearse: bool, limit_s: float) -> dict[str, Any]:
    """One check in a process of its own, of at most ``limit_s`` seconds, whatever becomes of it."""
    command = [sys.executable, "-m", "components.pretraining.kernel_proofs.on_gpu", "--one", name]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--rehearse"] if rehearse else [])],
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        result: dict[str, Any] = {"verdict": "timed out", "problems": [f"took more than {limit_s:.0f} s"]}
    else:
        try:
            result = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            result = {"verdict": "error", "problems": [f"ended with {done.returncode}: {last[0][:500]}"]}
    return {"check": name, "figures": {}, **result, "seconds": time.monotonic() - began}


def run_all(names: Sequence[str], rehearse: bool, limit_s: float, out: Path | None) -> list[dict[str, Any]]:
    """The checks one after another until the time is over.

    Args:
        names: which.
        rehearse: on the CPU.
        limit_s: of all together.
        out: a file that holds the results so far after every check.
    """
    results: list[dict[str, Any]] = []
    end = time.monotonic() + limit_s
    for name in names:
        left = end - time.monotonic()
        if left < 1.0:
            results.append(
                {"check": name, "verdict": "not run", "problems": ["no time was left"], "figures": {}}
            )
        else:
            results.append(run_apart(name, rehearse, left if rehearse else min(left, LIMITS_S[name])))
        last = results[-1]
        sys.stderr.write(f"{last['verdict']:<10}{name:<20}{last.get('seconds', 0.0):6.0f} s\n")
        sys.stderr.writelines(f"{'':<10}{problem}\n" for problem in last["problems"])
        if out is not None:
            out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m components.pretraining.kernel_proofs.on_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at small sizes")
    parser.add_argument("--limit-s", type=float, default=480.0, help="seconds of all checks together")
    parser.add_argument("--checks", nargs="+", choices=LIMITS_S, default=list(LIMITS_S), help="only these")
    parser.add_argument("--out", type=Path, help="a file for the results, written after every check")
    parser.add_argument("--one", choices=LIMITS_S, help="one check, in this process")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when every check passed."""
    options = parser().parse_args(arguments)
    if options.one:
        sys.stdout.write(json.dumps(run_one(options.one, options.rehearse)) + "\n")
        return 0
    results = run_all(options.checks, options.rehearse, options.limit_s, options.out)
    counts = {verdict: sum(r["verdict"] == verdict for r in results) for verdict in _VERDICTS}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    sys.stderr.write(told + (" (rehearsal: nothing is proved about a GPU)\n" if options.rehearse else "\n"))
    sys.stdout.write(json.dumps({"rehearsal": options.rehearse, "results": results}) + "\n")
    return 0 if counts["passed"] == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
