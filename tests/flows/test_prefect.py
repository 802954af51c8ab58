"""The flows as Prefect deployments: the short name, a worker, and a machine without the GPUs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from components.artifacts import EXIT_USER_ERROR, PROJECT
from flows import deployments
from tests.waiting import CEILING_S, wait_for

PREFECT = PROJECT / ".venv/bin/prefect"


def test_every_deployment_names_a_flow_that_exists() -> None:
    declared = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    names = {getattr(deployments, entry["entrypoint"].split(":")[1]).name for entry in declared}
    sizes = {"nano", "4b", "21b"}
    assert names == {f"{flow}-{size}" for flow in ("pipeline", "pretrain") for size in sizes} | {
        "pipeline-smoke"
    }


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[dict[str, str]]:
    """``make orchestrator`` on a free port; gives the environment that reaches it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "DO_NOT_TRACK": "1",
        "no_proxy": "127.0.0.1,localhost",
    }
    log = tmp_path / "log"
    with log.open("w") as handle:
        process = subprocess.Popen(
            [PROJECT / "infra/prefect/orchestrator.sh"],
            env=environment,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:

            def started() -> bool:
                assert process.poll() is None, log.read_text()
                return "started" in log.read_text()

            wait_for(started, "the orchestrator")
            yield environment
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(CEILING_S)
            finally:
                os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


@pytest.mark.pipeline
@pytest.mark.skipif(not PREFECT.exists(), reason="the orchestrator's script uses .venv")
def test_the_short_name_runs_and_says_what_a_small_machine_lacks(orchestrator: dict[str, str]) -> None:
    run = subprocess.run(
        [PREFECT, "deployment", "run", "pretrain-21b", "--watch", "--watch-timeout", str(int(CEILING_S))],
        cwd=PROJECT,
        env=orchestrator,
        capture_output=True,
        text=True,
        timeout=2 * CEILING_S,
        check=False,
    )
    said = run.stdout + run.stderr
    assert run.returncode != 0 and "finished in state 'Failed'" in said, said
    (identifier,) = re.findall(r"UUID: ([0-9a-f-]{36})", said)
    logs = subprocess.run(
        [PREFECT, "flow-run", "logs", identifier],
        cwd=PROJECT,
        env={**orchestrator, "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    flat = " ".join(logs.split())
    assert "needs 256 GPUs" in flat
    assert "21,506,562,560 parameters" in flat


def test_a_temporary_server_that_does_not_start_is_said_in_a_sentence(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        # It can never start, so that any limit is over at some time.
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path}/no/such/folder/prefect.db",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "flows.pipeline", "--recipe", "smoke", "--root", str(tmp_path / "runs")],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=CEILING_S,
        check=False,
    )
    assert run.returncode == EXIT_USER_ERROR and "Traceback" not in run.stderr
    assert "Prefect server did not start" in run.stderr and "--plain" in run.stderr
    assert not (tmp_path / "runs/smoke").exists()
