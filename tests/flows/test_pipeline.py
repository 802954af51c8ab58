"""The whole pipeline at its smallest setting, as a user runs it: killed, offline, repeated, changed, damaged.

The tests share one run folder and go in order (``pytest -m pipeline tests/flows``).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.artifacts import PROJECT, Manifest, read_manifest
from flows.stages import STAGE_NAMES
from runtime_cpu import Engine
from tests.waiting import CEILING_S, wait_for

pytestmark = pytest.mark.pipeline
RECIPE = "smoke"
WHOLE_S = 10 * CEILING_S  # for many stages in a row
# Nothing can be reached through these: what is not in the cache cannot be had.
NOWHERE = "http://127.0.0.1:9"
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_RETRIES": "0", "npm_config_registry": NOWHERE} | dict.fromkeys(
    ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), NOWHERE
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new run folder with the downloads of the project's own."""
    folder = tmp_path_factory.mktemp("runs")
    cache = PROJECT / "runs/cache"
    cache.mkdir(parents=True, exist_ok=True)
    (folder / "cache").symlink_to(cache)
    return folder


def start(root: Path, *arguments: str, offline: bool = True) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    environment |= {"TQDM_DISABLE": "1", "no_proxy": "127.0.0.1,localhost", **(OFFLINE if offline else {})}
    command = [sys.executable, "-m", "flows.pipeline", "--recipe", RECIPE, "--root", str(root), *arguments]
    return subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True)


def run(root: Path, *arguments: str, offline: bool = True) -> tuple[int, str]:
    process = start(root, *arguments, offline=offline)
    _, said = process.communicate(timeout=WHOLE_S)
    return process.returncode, said


def manifests(root: Path) -> dict[str, tuple[Path, Manifest]]:
    """The first finished artefact of every stage: what the unchanged recipe built."""
    found: dict[str, tuple[Path, Manifest]] = {}
    for stage in STAGE_NAMES:
        for folder in (root / RECIPE / stage).glob("*/"):
            manifest = None if ".aside" in folder.name else read_manifest(folder)
            if manifest and (stage not in found or manifest.created_at < found[stage][1].created_at):
                found[stage] = (folder, manifest)
    return found


def lines_until(process: subprocess.Popen[str], *wanted: str) -> Iterator[str]:
    assert process.stderr is not None
    for line in process.stderr:
        yield line
        if any(word in line for word in wanted):
            return


def moves_seen(root: Path, stage: str) -> Iterator[int]:
    """How often something has changed so far in the folders of a stage: its files and their sizes."""
    before, moves = None, 0
    while True:
        now = {}
        for path in (root / RECIPE / stage).rglob("*"):
            with contextlib.suppress(OSError):  # gone in between
                now[path] = path.stat().st_size
        moves += before is not None and now != before
        before = now
        yield moves


def test_a_first_run_downloads_and_stops_where_it_is_told(root: Path) -> None:
    code, said = run(root, "--plain", "--until", "curate", offline=False)
    assert code == 0, said
    assert set(manifests(root)) == {"evalsets", "curate"}


def test_killed_in_every_stage_and_offline_the_same_command_finishes(root: Path) -> None:
    """Each remaining stage is killed once (SIGKILL to the runner) after its first few changes to its folder."""
    generator = random.Random(20261121)
    killed: list[str] = []
    for _ in range(3 * len(STAGE_NAMES)):
        process = start(root, "--plain")
        said, stage = "", None
        while stage is None:
            for line in lines_until(process, ": running"):
                said += line
            if process.poll() is not None or ": running" not in said.splitlines()[-1]:
                break
            name = said.splitlines()[-1].partition(":")[0]
            stage = None if name in killed else name
        if stage is None:
            assert process.wait(timeout=WHOLE_S) == 0, said
            break
        enough, moves = generator.randrange(5), moves_seen(root, stage)
        wait_for(
            lambda: next(moves) >= enough or stage in manifests(root) or process.poll() is not None,  # noqa: B023
            f"{enough} changes by {stage}",
        )
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.append(stage)
        # The last stage may be done before; then all of the run is.
        assert process.returncode in (-signal.SIGKILL, 0)
    assert set(killed) >= {"synthesize", "pretrain", "posttrain", "evaluate"}
    assert set(manifests(root)) == set(STAGE_NAMES)
    for folder, _ in manifests(root).values():
        assert not list(folder.glob(".work*")), "scratch must not outlive a stage"


def test_every_stage_did_its_work(root: Path) -> None:
    found = manifests(root)
    metrics = {stage: manifest.metrics for stage, (_, manifest) in found.items()}
    assert metrics["curate"]["documents_kept"] > 300
    assert metrics["synthesize"]["sft_rows"] > 200
    held_out = [
        metrics["pretrain"][f"heldout_bits_per_byte_{name}"] for name in ("start", "stage1", "stage3")
    ]
    assert held_out[0] > held_out[1] > held_out[2]
    assert metrics["posttrain"]["sft_loss"] < metrics["posttrain"]["base_sft_loss"]
    assert metrics["export"]["onnx_logit_max_error"] < 1e-3
    assert metrics["benchmark"]["logits_error_against_torch"] < 1e-4
    assert metrics["benchmark"]["q4_0_decode_tokens_per_s"] > 0
    config = json.loads((found["pretrain"][0] / "stage3/config.json").read_text())
    assert config["rope_theta"] == 1.5e6


def test_the_model_answers_on_the_engine(root: Path) -> None:
    folder, manifest = manifests(root)["export"]
    model = next(folder / name for name in manifest.files if name.endswith("q4_0.gguf"))
    chat = subprocess.run(
        [sys.executable, "-m", "runtime_cpu.chat", str(model), "--max-tokens", "8"],
        input="What is 2 plus 2?\n",
        capture_output=True,
        text=True,
        cwd=PROJECT,
        timeout=CEILING_S,
        check=False,
    )
    assert chat.returncode == 0, chat.stderr
    with contextlib.closing(Engine.open(model)) as engine:
        assert engine.logits([1, 2, 3]).shape[0] == 3


def test_mlflow_holds_one_run_with_a_child_per_stage(root: Path) -> None:
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(f"smallthinker-{RECIPE}")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children: dict[str, Any] = {}
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parents and parents[0].info.status == "FINISHED"
    for child in runs:
        if child.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id:
            children.setdefault(child.info.run_name, []).append(child)
    for stage, (_, manifest) in manifests(root).items():
        finished = [
            child
            for name, named in children.items()
            if stage in name
            for child in named
            if child.info.status == "FINISHED"
        ]
        assert finished, f"{stage} has no finished child run; there are {sorted(children)}"
        for name, value in manifest.metrics.items():
            assert any(child.data.metrics.get(name) == pytest.approx(value) for child in finished), (
                stage,
                name,
            )
    names = {artefact.path for artefact in client.list_artifacts(parents[0].info.run_id)}
    assert "report.html" in names
    versions = client.search_model_versions(f"name='smallthinker-{RECIPE}'")
    aliases = client.get_registered_model(versions[0].name).aliases
    assert {"candidate", "edge-stable"} <= set(aliases)


def test_the_report_shows_every_stage_with_its_pictures(root: Path) -> None:
    page = (root / RECIPE / "report.html").read_text()
    for stage in STAGE_NAMES:
        assert stage in page
    assert page.count("data:image/png;base64,") >= 5
    assert "<script src" not in page and "https://" not in page.replace("https://arxiv.org", "")


def test_a_second_run_does_nothing(root: Path) -> None:
    before = {stage: manifest.created_at for stage, (_, manifest) in manifests(root).items()}
    code, said = run(root)  # under Prefect, as `make pipeline` runs it
    assert code == 0, said
    assert "nothing was run" in said and "runtime_cpu.chat" in said and ": running" not in said
    assert {stage: manifest.created_at for stage, (_, manifest) in manifests(root).items()} == before


def test_one_changed_field_reruns_exactly_its_dependants(root: Path) -> None:
    code, said = run(root, "--plan", "--set", "merge.task_items=11")
    assert code == 0, said
    to_run = {line.split()[0] for line in said.splitlines() if " to run: " in line}
    assert to_run == {"merge", "evaluate", "export", "benchmark"}
    assert "merge.task_items: 10 -> 11" in said
    code, said = run(root, "--set", "benchmark.runs=1")
    assert code == 0, said
    assert [line for line in said.splitlines() if ": running" in line] == [
        "benchmark: running (benchmark.runs: 2 -> 1)"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "pretrain.seed=many"], "pretrain.seed = 'many'"),
        (["--until", "bake"], "no stage is called 'bake'"),
        (
            [
                *("--set", "synthesize.teacher.kind=endpoint", "--set", "synthesize.teacher.model=x"),
                *("--set", f"synthesize.teacher.base_url={NOWHERE}/v1"),
            ],
            "cannot be reached",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(root: Path, arguments: list[str], said: str) -> None:
    code, output = run(root, "--plain", *arguments)
    assert code == 2
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in output and "Traceback" not in output


def test_a_damaged_shard_stops_the_run_and_can_be_built_again(root: Path) -> None:
    folder, manifest = manifests(root)["tokenize"]
    shard = next(folder / name for name in sorted(manifest.files) if name.endswith(".ds"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, said = run(root, "--plain", "--set", "pretrain.seed=7", "--until", "pretrain")
    assert code == 2 and "Traceback" not in said
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert shard.name in error and "SHA-256" in error and "--rebuild tokenize" in error
    code, said = run(root, "--plain", "--rebuild", "tokenize", "--until", "tokenize")
    assert code == 0, said
    assert shard.read_bytes() != bytes(data)
