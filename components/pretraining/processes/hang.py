"""What a node can see of processes that hang, and the sentence about all of them: ``describe(reports, world)``."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from components.pretraining.processes.heartbeat import Beat

_STATES = {"T": "stopped", "t": "stopped", "D": "waits for a device or a disk", "Z": "ended", "": "gone"}
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')
# Where a process stands that waits for the others.
_WAITING = ("torch/distributed/", "deepspeed/comm/", "torch/autograd/")
# Threads of ours and of torch's that always wait.
_SIDE_THREADS = ("in _seal", "in _bootstrap_inner", "tqdm/_monitor.py")


def state_of(pid: int) -> str:
    """The kernel's letter for a process, empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def examine(beat: Beat, still_s: float, stacks: str) -> dict[str, Any]:
    """A report of a rank that is alive or not, when its node gave the run up."""
    at, waits = _standing(stacks)
    return {
        "hang": True,
        "host": socket.gethostname(),
        "step": beat.step,
        "doing": beat.doing,
        "still_s": round(still_s),
        "state": _STATES.get(state_of(beat.pid), ""),
        "at": at,
        "waits": waits,
    }


def _standing(stacks: str) -> tuple[str, bool]:
    """The innermost frame of the main thread in a dump of ``faulthandler``, and whether it waits for other ranks."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)[1:]
    main = [text for text in threads if not any(words in text for words in _SIDE_THREADS)]
    frames = [_FRAME.match(line) for line in (main or [""])[0].splitlines()]
    found = next((frame for frame in frames if frame), None)
    at = f"{'/'.join(Path(found[1]).parts[-2:])}:{found[2]} ({found[3]})" if found else ""
    tops = [next((line for line in text.splitlines() if _FRAME.match(line)), "") for text in main]
    return at, any(place in top for top in tops for place in _WAITING)


def ranges(ranks: Iterable[int]) -> str:
    """``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def describe(reports: Mapping[int, Mapping[str, Any]], world: int) -> str:
    """What hung: the step, and the ranks that did not arrive where the others wait.

    Args:
        reports: of :func:`examine`, by rank; a rank of a node that is silent has none.
        world: ranks of the run.
    """
    found = {rank: report for rank, report in reports.items() if report.get("hang")}
    step = max(report["step"] for report in found.values())
    silent = [rank for rank in range(world) if rank not in found]
    late = {rank: report for rank, report in found.items() if report["state"] or report["step"] < step}
    if not late and not silent and any(report["waits"] for report in found.values()):
        late = {rank: report for rank, report in found.items() if not report["waits"]}
    moved = max(report["still_s"] for report in found.values())
    parts = [f"Nothing moved for {moved} s in step {step}"]
    if silent:
        parts.append(f"no sign of {_name(silent)}")
    for rank, report in late.items():
        where = ", ".join(
            filter(None, (report["state"], f"{report['doing']} of step {report['step']}", report["at"]))
        )
        parts.append(f"rank {rank} on {report['host']} did not arrive ({where})")
    others = [rank for rank in found if rank not in late]
    if others and (late or silent):
        first = found[others[0]]
        parts.append(f"{_name(others)} waited ({first['doing']}{', ' if first['at'] else ''}{first['at']})")
    elif others:
        parts.append(
            f"all of {_name(others)} stand in {found[others[0]]['doing']}: their stacks tell them apart"
        )
    return "; ".join(parts)


def _name(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}"
