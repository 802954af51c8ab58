"""Runs one node's part of a run and watches it: ``python -m components.pretraining.node REQUEST``.

It starts torchrun and reads the beats of the workers (:mod:`components.pretraining.processes.heartbeat`). When one has
said nothing for longer than it said it would be silent, the run hangs: the stacks of all living workers are printed and
kept, every rank's place is reported, and the workers are killed, so that the job ends and can be started again. It is a
process of its own because a worker that is stopped, or in a call that holds the interpreter, can do none of that.

It also passes a request to stop on: torchrun would kill workers that save when it hears a second signal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from components.artifacts import EXIT_RETRY, PROJECT, die_with_parent
from components.pretraining.config import PretrainConfig
from components.pretraining.processes.hang import examine, state_of
from components.pretraining.processes.heartbeat import (
    FOLDER_VARIABLE,
    STACKS_SIGNAL,
    Beat,
    read_beats,
    stacks_path,
)
from components.pretraining.processes.reports import RankReports

REPORTS_NAME, STOP_NAME, HANG_NAME = "reports", "stop", "hang"
_POLL_S = 1.0
# How long living workers may take to write their stacks, and other nodes to notice the same hang.
_STACKS_S, _OTHER_NODES_S = 10.0, 30.0
# What torchrun leaves workers when another one has failed: they wait for it in vain.
_TORCHRUN_GRACE_S = 20


def torchrun_command(
    processes: int, request: Path, nodes: int = 1, rendezvous: str = "", number: int | None = None
) -> list[str]:
    """torchrun with this node's workers.

    Args:
        processes: workers on this node.
        request: the request file.
        nodes: nodes of the run.
        rendezvous: ``host:port`` of the first node, for several.
        number: this node's, where the nodes have numbers; else they find an order themselves.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    # Signals are this module's to pass on.
    torchrun += ["--signals-to-handle=SIGQUIT", f"--shutdown-timeout={_TORCHRUN_GRACE_S}"]
    if nodes == 1:
        torchrun += ["--standalone"]
    elif number is None:
        torchrun += [f"--nnodes={nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={rendezvous}"]
        torchrun += [f"--rdzv_id={os.environ.get('SLURM_JOB_ID', 'run')}"]
    else:
        host, _, port = rendezvous.partition(":")
        torchrun += [f"--nnodes={nodes}", f"--node_rank={number}"]
        torchrun += [f"--master_addr={host}", f"--master_port={port}"]
    return [*torchrun, "-m", "components.pretraining.worker", str(request)]


class Watch:
    """When each of a node's workers last gave a sign.

    Args:
        folder: of their beats.
        limit_s: for a worker that has not given any yet.
    """

    def __init__(self, folder: Path, limit_s: float) -> None:
        self._folder, self._limit_s = folder, limit_s
        self.beats: dict[int, Beat] = {}
        self.since: dict[int, float] = {}
        self._started = self._looked = time.monotonic()

    def look(self, workers: int) -> bool:
        """Read the beats; whether a worker is overdue."""
        now = time.monotonic()
        if now - self._looked > 10 * _POLL_S:
            # This process was stopped itself, and most likely with it the workers: Ctrl-Z, a suspended machine.
            lost = now - self._looked
            self._started += lost
            self.since = {rank: moment + lost for rank, moment in self.since.items()}
        self._looked = now
        for rank, beat in read_beats(self._folder).items():
            if rank not in self.beats or self.beats[rank].count != beat.count:
                self.beats[rank], self.since[rank] = beat, now
        overdue = any(now - self.since[rank] > beat.limit_s for rank, beat in self.beats.items())
        return overdue or (len(self.beats) < workers and now - self._started > self._limit_s)

    def still_s(self, rank: int) -> float:
        """Seconds since a worker's last sign."""
        return time.monotonic() - self.since[rank]


class Node:
    """One node's torchrun and its watch.

    Args:
        config: the recipe's part.
        scratch: the stage's scratch folder, which all nodes see.
        nodes: nodes of the run.
    """

    def __init__(self, config: PretrainConfig, scratch: Path, nodes: int) -> None:
        self._config, self._scratch, self._nodes = config, scratch, nodes
        self._stop: int | None = None
        self._told: set[int] = set()
        self._reports = RankReports(scratch / REPORTS_NAME)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start ``command`` and wait for its end; its exit code, or ``EXIT_RETRY`` when the run hung."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)
        with tempfile.TemporaryDirectory(prefix="beats-") as name:
            folder = Path(name)
            process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env={
                    **environment,
                    FOLDER_VARIABLE: name,
                    "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{name}/nccl-",
                },
                preexec_fn=_shielded,
                start_new_session=True,
            )
            watch, deadline = Watch(folder, self._config.pause_timeout_s), float("inf")
            while True:
                try:
                    return process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    pass
                overdue = bool(self._config.hang_timeout_s) and watch.look(self._config.processes)
                # Another node's limit may be over sooner than that of what its own workers were at.
                overdue = overdue or (self._nodes > 1 and (self._scratch / HANG_NAME).exists())
                if self._stop is None and (self._scratch / STOP_NAME).exists():
                    self._stop = signal.SIGTERM
                if self._stop is not None:
                    deadline = min(deadline, time.monotonic() + self._config.save_grace_s)
                    self._pass_on(watch.beats)
                if overdue:
                    self._give_up(folder, watch)
                if overdue or time.monotonic() > deadline:
                    _kill_children(process.pid)
                    process.wait()
                    return EXIT_RETRY

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._stop = number

    def _pass_on(self, beats: Mapping[int, Beat]) -> None:
        """Tell each worker once, when it has begun to listen: it beats from then on."""
        for rank, beat in beats.items():
            if rank not in self._told and self._stop is not None and state_of(beat.pid) not in ("", "Z"):
                self._told.add(rank)
                os.kill(beat.pid, self._stop)

    def _give_up(self, folder: Path, watch: Watch) -> None:
        """Report where every worker stands, and wait for the other nodes to do so too."""
        _ask_nccl_for_traces(folder)
        stacks = _collect_stacks(folder, watch.beats)
        for rank, beat in watch.beats.items():
            text = stacks.get(rank, "")
            report = examine(beat, watch.still_s(rank), text)
            title = f"---- rank {rank} on {report['host']}, {report['doing']} of step {report['step']}"
            said = text or f"no stacks: the process is {report['state'] or 'silent'}\n"
            sys.stderr.write(f"{title} {report['state']}\n{said}")
            sys.stderr.flush()
            kept = self._scratch / HANG_NAME / f"rank-{rank:05}.txt"
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(said)
            self._reports.write(rank, report)
        end = time.monotonic() + _OTHER_NODES_S
        while self._nodes > 1 and time.monotonic() < end:
            if len(self._reports.read()) == self._nodes * self._config.processes:
                break
            time.sleep(_POLL_S)


def _ask_nccl_for_traces(folder: Path) -> None:
    """Have NCCL's flight recorder written: this watch gives up before NCCL itself does.

    Every rank's ``ProcessGroupNCCL`` reads a pipe of its own (torch's ``TORCH_NCCL_DEBUG_INFO_PIPE_FILE``).
    """
    for pipe in folder.glob("nccl-*.pipe"):
        try:
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it any more
            continue
        os.write(descriptor, b"1")
        os.close(descriptor)


def _collect_stacks(folder: Path, beats: Mapping[int, Beat]) -> dict[int, str]:
    """Ask every living worker for its stacks; those that answer in time."""
    living = {rank: beat for rank, beat in beats.items() if state_of(beat.pid) not in ("", "T", "t", "Z")}
    for beat in living.values():
        os.kill(beat.pid, STACKS_SIGNAL)
    found: dict[int, str] = {}
    end = time.monotonic() + _STACKS_S
    while time.monotonic() < end:
        time.sleep(_POLL_S / 2)
        before, found = (
            found,
            {rank: stacks_path(folder, rank).read_text(errors="replace") for rank in living},
        )
        if all(found.values()) and found == before:
            break
    return {rank: text for rank, text in found.items() if text}


def _shielded() -> None:
    """torchrun ignores requests to stop; workers handle them from their first beat on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


def _kill_children(parent: int) -> None:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    for child in children.read_text().split() if children.exists() else []:
        os.kill(int(child), signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and watch; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("request", type=Path, help="JSON file written by the launcher, seen by all nodes")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the run")
    parser.add_argument("--node-number", type=int, metavar="N", help="this node's, from 0")
    parser.add_argument("--rendezvous", default="", metavar="HOST:PORT", help="of the first node")
    options = parser.parse_args(argv)
    die_with_parent()
    request: dict[str, Any] = json.loads(options.request.read_text())
    config = PretrainConfig.model_validate(request["config"])
    command = torchrun_command(
        config.processes, options.request, options.nodes, options.rendezvous, options.node_number
    )
    return Node(config, options.request.parent, options.nodes).run(command, os.environ)


if __name__ == "__main__":
    sys.exit(main())
