"""Starts the processes of a run and waits: ``train_under_torchrun(context, config)``.

Every node runs :mod:`components.pretraining.node`, and that torchrun: on one machine directly; in a Slurm allocation
``srun`` starts it on every node; where a cluster starts the same command on every node itself (Kubernetes) and gives
each torchrun's variables ``PET_NNODES``, ``PET_NODE_RANK``, ``PET_MASTER_ADDR`` and ``PET_MASTER_PORT``, the first node
runs the stage and the others call :func:`join_run`. Request, reports and result are files in the stage's scratch, which
all nodes must see.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from components.artifacts import (
    PROJECT,
    StageAborted,
    StageContext,
    StageError,
    die_with_parent,
    stage_error,
    write_json,
)
from components.pretraining.config import PretrainConfig
from components.pretraining.node import HANG_NAME, REPORTS_NAME, STOP_NAME
from components.pretraining.processes.hang import describe
from components.pretraining.processes.reports import RankReports

REQUEST_NAME, RESULT_NAME = "request.json", "result.json"
_POLL_S = 1.0
# From the first report of a hang on: the nodes wait half of it for each other.
_SILENT_NODE_S = 60.0
_GOES_ON = "What was saved is kept: the same command goes on from it."


def node_count(environment: Mapping[str, str]) -> int:
    """Nodes of the run: those of Slurm's allocation, or what torchrun's variable says, or 1."""
    return int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("PET_NNODES") or 1)


def _in_batch_script(environment: Mapping[str, str]) -> bool:
    """Whether Slurm runs this process, but not as a step: its warnings go to steps."""
    return "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment


def needs_torchrun(config: PretrainConfig, environment: Mapping[str, str]) -> bool:
    """Whether the run is more than this process, or would not hear of its scheduler's warning."""
    several = config.processes > 1 or config.hardware.gpus > 1 or node_count(environment) > 1
    return several or _in_batch_script(environment)


def launch_command(request: Path, environment: Mapping[str, str]) -> list[str]:
    """The command that starts all workers that are this process's to start.

    Args:
        request: the request file, visible on all nodes.
        environment: looked up for Slurm's allocation, and for torchrun's variables.
    """
    node = [sys.executable, "-m", "components.pretraining.node", str(request)]
    nodes = node_count(environment)
    if _in_batch_script(environment) or ("SLURM_JOB_ID" in environment and nodes > 1):
        spread = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *node]
        first = f"{environment.get('SLURMD_NODENAME', '')}:29500"
        return spread if nodes == 1 else [*spread, f"--nodes={nodes}", f"--rendezvous={first}"]
    if nodes == 1:
        return node
    first = f"{environment['PET_MASTER_ADDR']}:{environment['PET_MASTER_PORT']}"
    number = environment["PET_NODE_RANK"]
    return [*node, f"--nodes={nodes}", f"--rendezvous={first}", f"--node-number={number}"]


def worker_environment(
    config: PretrainConfig, scratch: Path, environment: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the nodes and their workers; what is set for NCCL already stays.

    With ``nccl_trace_events`` NCCL's flight recorder keeps the last collectives of every rank, and writes them into the
    scratch folder when one times out (torch's "ProcessGroupNCCL Environment Variables").
    """
    wanted = {"NCCL_DEBUG": "WARN", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}
    if config.nccl_trace_events:
        traces = str(scratch / "nccl" / "rank-")
        wanted |= {
            "TORCH_FR_BUFFER_SIZE": str(config.nccl_trace_events),
            "TORCH_FR_DUMP_TEMP_FILE": traces,
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        }
    return {**wanted, **environment, "OMP_NUM_THREADS": str(config.threads)}


def kill_wait_warning(config: PretrainConfig, environment: Mapping[str, str], settings: str) -> str:
    """What to say when ``scancel`` leaves less time than a save may take; empty when there is nothing to say.

    Args:
        config: the recipe's part.
        environment: of the job.
        settings: what ``scontrol show config`` printed.
    """
    found = re.search(r"^KillWait\s*=\s*(\d+)", settings, re.MULTILINE)
    if "SLURM_JOB_ID" not in environment or found is None or int(found[1]) >= config.save_grace_s:
        return ""
    job = environment["SLURM_JOB_ID"]
    return (
        f"scancel {job} would kill this job after {found[1]} s (Slurm's KillWait), and a save may take "
        f"{config.save_grace_s} s (save_grace_s). To stop it saved: scancel --signal=TERM {job}"
    )


def _slurm_settings(environment: Mapping[str, str]) -> str:
    if "SLURM_JOB_ID" not in environment:
        return ""
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _write_request(context: StageContext, name: str) -> Path:
    request = context.scratch / name
    write_json(
        request,
        {
            "stage": context.stage,
            "recipe": context.recipe,
            "config": dict(context.config),
            "inputs": {role: str(path.resolve()) for role, path in context.inputs.items()},
            "out": str(context.out.resolve()),
            "cache": str(context.cache.resolve()),
        },
    )
    return request


def train_under_torchrun(context: StageContext, config: PretrainConfig) -> dict[str, Any]:
    """Train with several processes; returns the finished evaluations.

    Raises:
        StageError: as the ranks say.
        StageInterrupted: a signal came, and the run is saved.
        StageAborted: a worker died or hung.
    """
    scratch = context.scratch
    result = scratch / RESULT_NAME
    for name in (RESULT_NAME, STOP_NAME):
        (scratch / name).unlink(missing_ok=True)
    shutil.rmtree(scratch / HANG_NAME, ignore_errors=True)
    (scratch / "nccl").mkdir(exist_ok=True)
    RankReports(scratch / REPORTS_NAME).create(node_count(os.environ) * config.processes)
    if warning := kill_wait_warning(config, os.environ, _slurm_settings(os.environ)):
        sys.stderr.write(f"warning: {warning}\n")
    code = _run(_write_request(context, REQUEST_NAME), config)
    answer: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    context.notes.extend(answer.get("notes", []))
    if "evaluations" not in answer:
        raise outcome(scratch, code)
    context.peaks = answer["peaks"]
    evaluations: dict[str, Any] = answer["evaluations"]
    return evaluations


def join_run(context: StageContext, config: PretrainConfig) -> None:
    """Take part, as another node than the first, in the run that the first node's stage starts.

    Raises:
        StageError, StageInterrupted, StageAborted: as :func:`train_under_torchrun`.
    """
    request = _write_request(context, f"request-{os.environ['PET_NODE_RANK']}.json")
    code = _run(request, config)
    if code:
        raise outcome(context.scratch, code)


def _run(request: Path, config: PretrainConfig) -> int:
    environment = worker_environment(config, request.parent, os.environ)
    process = subprocess.Popen(
        launch_command(request, environment),
        cwd=PROJECT,
        env=environment,
        stdout=sys.stderr,
        preexec_fn=die_with_parent,
        start_new_session=True,  # Ctrl-C reaches it through this process, once
    )
    return _wait_passing_signals_on(process, request.parent)


def outcome(scratch: Path, code: int) -> StageError:
    """Why the run ended without a result, from what its ranks reported."""
    reports = RankReports(scratch / REPORTS_NAME)
    found = reports.read()
    for report in found.values():
        if "error" in report:
            return stage_error(report["exit_code"], report["error"])
    if any(report.get("hang") for report in found.values()):
        return StageAborted(f"The run hung. {describe(found, reports.world)}. {_GOES_ON}")
    died = "; ".join(
        f"rank {rank} on {report['host']}: {report['defect']}" for rank, report in list(found.items())[:3]
    )
    return StageAborted(
        f"A training process died (exit code {code}; its output is above{f'; {died}' if died else ''}). {_GOES_ON}"
    )


def _wait(process: subprocess.Popen[bytes], scratch: Path) -> int:
    end = float("inf")
    while True:
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            if end == float("inf") and (scratch / HANG_NAME).exists():
                end = time.monotonic() + _SILENT_NODE_S
            if time.monotonic() > end:
                process.kill()


def _wait_passing_signals_on(process: subprocess.Popen[bytes], scratch: Path) -> int:
    """Wait for the nodes; SIGTERM and SIGINT are passed to them, and by them to the workers, which save and stop.

    After a hang srun is not waited for without end: it waits itself for a node that is silent.
    """
    if threading.current_thread() is not threading.main_thread():
        return _wait(process, scratch)

    def forward(number: int, frame: FrameType | None) -> None:
        if Path(str(process.args[0])).name == "srun":  # type: ignore[index]
            (scratch / STOP_NAME).touch()  # srun itself would kill the workers
        else:
            process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _wait(process, scratch)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
            process.wait()
