"""Several nodes without Slurm: processes that stand for pods run the command of the shipped Kubernetes file.

``pytest -m campaign tests/cluster/test_nodes.py -s``; each part is two nodes' start of torch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from components.artifacts import PROJECT
from tests.cluster.runs import RECIPE, Run
from tests.waiting import CEILING_S, wait_for

pytestmark = pytest.mark.campaign
FILE = PROJECT / "infra" / "kubernetes" / "pretrain.yaml"


def start_pods(run: Run, port: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """The shipped command on two nodes, with small sizes; their output is in ``pod-N.log``."""
    job_set = yaml.safe_load(FILE.read_text())
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert pod["command"] == ["python", "-m", "flows.pretrain"] and "--plain" in pod["args"]
    pods = []
    for number in range(2):
        place = {"PET_NNODES": "2", "PET_NODE_RANK": str(number)}
        place |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        command = [
            str(PROJECT / ".venv" / "bin" / "python"),
            *pod["command"][1:],
            "--recipe",
            RECIPE,
            "--plain",
        ]
        with (folder / f"pod-{number}.log").open("ab") as log:
            pods.append(
                subprocess.Popen(
                    [*command, *run.arguments()],
                    cwd=PROJECT,
                    env={**os.environ, **place, "GLOO_SOCKET_IFNAME": "lo"},
                    stdout=log,
                    stderr=log,
                )
            )
    return pods


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


def test_pods_write_the_manifest_that_the_runner_writes(tokens: Path, tmp_path: Path) -> None:
    """One pod is evicted: all save and end, none with the code of a user's error; the set goes on, and is finished."""
    run = Run(tmp_path, tokens, 60, processes=1)
    pods = start_pods(run, free_port(), tmp_path)
    wait_for(lambda: run.logged() >= 25 or any(pod.poll() is not None for pod in pods), "step 25")
    pods[1].send_signal(signal.SIGTERM)
    codes = [pod.wait(CEILING_S) for pod in pods]
    said = (tmp_path / "pod-0.log").read_text()
    assert codes == [130, 130] and "everything up to there is saved" in said, (codes, said[-3000:])
    assert not (run.out / "manifest.json").exists() and max(run.saved()) >= 25
    pods = start_pods(run, free_port(), tmp_path)
    assert [pod.wait(CEILING_S) for pod in pods] == [0, 0], (tmp_path / "pod-1.log").read_text()[-3000:]
    manifest = json.loads((run.out / "manifest.json").read_text())
    assert {"stage1/model.safetensors", "stage3/config.json", "heldout.json", "loss.png"} <= manifest[
        "files"
    ].keys()
    assert manifest["process_peaks"]["processes"] == 2
    assert any(note.startswith("Resumed from the checkpoint") for note in manifest["notes"])
    assert not (run.out / ".work").exists()
    # The artefact is finished, for the runner and for a pod that is started again.
    again = start_pods(run, free_port(), tmp_path)
    assert [pod.wait(CEILING_S) for pod in again] == [0, 0]


def test_a_user_s_error_ends_all_pods_with_its_code(tokens: Path, tmp_path: Path) -> None:
    """So that the set is not started again: a mesh that cannot be."""
    run = Run(tmp_path, tokens, 12, processes=1, expert_parallel=3)
    pods = start_pods(run, free_port(), tmp_path)
    assert [pod.wait(CEILING_S) for pod in pods] == [2, 2]
    assert "expert_parallel is 3; it must divide" in (tmp_path / "pod-1.log").read_text()


def test_a_stopped_rank_on_one_machine(tokens: Path, tmp_path: Path) -> None:
    """Two processes under ``torchrun --standalone``: the run ends by itself, and the same command goes on."""
    # time is the subject: a stopped or silent rank exceeds any limit
    run = Run(tmp_path, tokens, 60, processes=2, hang_timeout_s=15)
    command = [str(PROJECT / ".venv" / "bin" / "python"), "-m", "flows.pipeline", "--recipe", RECIPE]
    command += ["--plain", "--until", "pretrain", *run.arguments()]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log)
    wait_for(lambda: run.logged() >= 25 or process.poll() is not None, "step 25")
    workers = subprocess.run(
        ["pgrep", "-f", f"^{PROJECT}/.venv/bin/python -u -m components.pretraining.worker {run.out}"],
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert len(workers) == 2
    for pid in workers:  # both: nobody within the run could notice
        os.kill(int(pid), signal.SIGSTOP)
    assert process.wait(CEILING_S) == 75
    assert "Nothing moved for" in (tmp_path / "log").read_text()
    again = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=CEILING_S)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Resumed from" in (run.out / "manifest.json").read_text()
