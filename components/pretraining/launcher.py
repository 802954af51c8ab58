"""Starts the worker processes of a run with torchrun and waits: ``train_under_torchrun(context, config)``.

On one machine that is ``torchrun --standalone``; in a Slurm allocation of several nodes, ``srun`` starts one torchrun
per node. Workers are ``python -m components.pretraining.worker REQUEST``; request and result are files
in the stage's scratch folder, which all nodes must see.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from components.artifacts import PROJECT, StageContext, StageError, die_with_parent, write_json
from components.pretraining.config import PretrainConfig

REQUEST_NAME, RESULT_NAME = "request.json", "result.json"


def launch_command(config: PretrainConfig, request: Path, environment: Mapping[str, str]) -> list[str]:
    """The command that starts all workers from this process.

    Args:
        config: the recipe's part; ``processes`` per machine.
        request: the request file, visible on all nodes.
        environment: looked up for Slurm's allocation.
    """
    worker = ["-m", "components.pretraining.worker", str(request)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={config.processes}"]
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes == 1:
        return [*torchrun, "--standalone", *worker]
    rendezvous = [
        f"--nnodes={nodes}",
        "--rdzv_backend=c10d",
        f"--rdzv_id={environment['SLURM_JOB_ID']}",
        f"--rdzv_endpoint={environment['SLURMD_NODENAME']}:29500",
    ]
    spread = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    return [*spread, *torchrun, *rendezvous, *worker]


def worker_environment(config: PretrainConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of torchrun and its workers.

    By default torchrun kills its workers 30 s after it forwarded a signal, even in the middle of a save.
    """
    own = {
        "OMP_NUM_THREADS": str(config.threads),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(config.save_grace_s),
    }
    return {**environment, **own}


def train_under_torchrun(context: StageContext, config: PretrainConfig) -> dict[str, Any]:
    """Train with several processes; returns the finished evaluations.

    Raises:
        StageError: as the first rank says, or that a worker died.
    """
    request, result = context.scratch / REQUEST_NAME, context.scratch / RESULT_NAME
    result.unlink(missing_ok=True)
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
    environment = worker_environment(config, os.environ)
    command = launch_command(config, request, environment)
    process = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=sys.stderr, preexec_fn=die_with_parent
    )
    code = _wait_forwarding_signals(process)
    if not result.exists():
        raise StageError(
            f"A training process died (torchrun's exit code is {code}; its output is above). What was saved is kept: "
            "the same command goes on from it."
        )
    answer: dict[str, Any] = json.loads(result.read_text())
    context.notes.extend(answer["notes"])
    if "error" in answer:
        raise StageError(answer["error"])
    evaluations: dict[str, Any] = answer["evaluations"]
    return evaluations


def _wait_forwarding_signals(process: subprocess.Popen[bytes]) -> int:
    """Wait for torchrun; SIGTERM and SIGINT are forwarded to it, and by it to the workers, which save and stop."""
    if threading.current_thread() is not threading.main_thread():
        return process.wait()

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
            process.wait()
