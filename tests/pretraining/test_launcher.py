"""Starting several processes: the commands, and two ranks that train like one."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from components.artifacts import EXIT_RETRY, StageError
from components.pretraining.config import PretrainConfig
from components.pretraining.launcher import (
    kill_wait_warning,
    launch_command,
    needs_torchrun,
    outcome,
    worker_environment,
)
from components.pretraining.node import REPORTS_NAME, torchrun_command
from components.pretraining.presets import PRESETS
from components.pretraining.processes.reports import RankReports
from tests.pretraining.children import Children
from tests.pretraining.factory import BATCH, CONTEXT, MODEL, run_config, stage_config
from tests.pretraining.test_training import NOISE, lines, logged, saved
from tests.waiting import CEILING_S, wait_for

PROJECT = Path(__file__).resolve().parent.parent.parent
REQUEST = Path("/shared/request.json")
STEPS = 2


def several(processes: int, steps: int = STEPS, **values: Any) -> dict[str, Any]:
    """Stages of a few steps; micro-batches such that every number of processes takes one micro-step."""
    size = steps * BATCH * CONTEXT
    return run_config(
        stages=[
            stage_config(tokens=size),
            stage_config(tokens=size),
            stage_config(tokens=size, context=2 * CONTEXT, sequences_per_step=BATCH // 2, rope_theta=1.5e6),
        ],
        sequences_per_micro_batch=BATCH // processes,
        processes=processes,
        log_every_steps=1,
        load_balance_coef=0.1,
        **values,
    )


NODE = [sys.executable, "-m", "components.pretraining.node", str(REQUEST)]
SRUN = ("--ntasks-per-node=1", "--kill-on-bad-exit=1")


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, NODE),
        ({"PET_NNODES": "1", "PET_NODE_RANK": "0"}, NODE),
        # Slurm's warning reaches steps, and not what the batch script started itself.
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}, ["srun", "--nodes=1", *SRUN, *NODE]),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, NODE),
        (
            {"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_ID": "4711", "SLURMD_NODENAME": "gpu017"},
            ["srun", "--nodes=4", *SRUN, *NODE, "--nodes=4", "--rendezvous=gpu017:29500"],
        ),
        (
            {"PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "p-0", "PET_MASTER_PORT": "29501"},
            [*NODE, "--nodes=4", "--rendezvous=p-0:29501", "--node-number=2"],
        ),
    ],
    ids=["one machine", "one pod", "one Slurm node", "within a step", "four Slurm nodes", "four pods"],
)
def test_who_starts_the_nodes(environment: dict[str, str], command: list[str]) -> None:
    assert launch_command(REQUEST, environment) == command


@pytest.mark.parametrize(
    ("values", "environment", "needed"),
    [
        ({}, {}, False),
        ({"processes": 2}, {}, True),
        ({"hardware": {"gpus": 2}}, {}, True),
        ({}, {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, True),
        ({}, {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}, True),
        ({}, {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, False),
        ({}, {"PET_NNODES": "2"}, True),
    ],
)
def test_one_process_trains_alone_where_it_hears_its_scheduler(
    values: dict[str, Any], environment: dict[str, str], needed: bool
) -> None:
    config = PretrainConfig.model_validate({**several(1), **values})
    assert needs_torchrun(config, environment) == needed


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({}, ["--standalone"]),
        ({"nodes": 4, "rendezvous": "gpu017:29500"}, ["--nnodes=4", "--rdzv_endpoint=gpu017:29500"]),
        (
            {"nodes": 4, "rendezvous": "p-0:29501", "number": 2},
            ["--nnodes=4", "--node_rank=2", "--master_addr=p-0", "--master_port=29501"],
        ),
    ],
)
def test_a_node_starts_torchrun(place: dict[str, Any], words: list[str]) -> None:
    command = torchrun_command(8, REQUEST, **place)
    assert command[:4] == [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=8"]
    assert all(word in command for word in words)
    # A second signal would make torchrun kill workers that save: it hears of none.
    assert "--signals-to-handle=SIGQUIT" in command
    assert command[-3:] == ["-m", "components.pretraining.worker", str(REQUEST)]
    options = get_args_parser().parse_args(command[3:])
    assert options.nproc_per_node == "8" and options.training_script == "components.pretraining.worker"


def test_nccl_keeps_what_it_did_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    config = PretrainConfig.model_validate(several(2, nccl_trace_events=77))
    given = {"HOME": "/h", "OMP_NUM_THREADS": "9", "NCCL_DEBUG": "INFO"}
    environment = worker_environment(config, tmp_path, given)
    assert environment["HOME"] == "/h" and environment["OMP_NUM_THREADS"] == "1"
    assert environment["NCCL_DEBUG"] == "INFO"
    assert environment["TORCH_FR_BUFFER_SIZE"] == "77" and environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(tmp_path))
    without = PretrainConfig.model_validate(several(2, nccl_trace_events=0))
    assert not [name for name in worker_environment(without, tmp_path, {}) if "FR" in name or "DUMP" in name]


SETTINGS = "KeepAliveTime           = SYSTEM_DEFAULT\nKillOnBadExit           = 0\nKillWait                = {} sec\n"


@pytest.mark.parametrize(
    ("kill_wait_s", "grace_s", "warned"),
    [(30, 840, True), (30, 30, False), (900, 840, False), (30, 31, True)],
)
def test_a_scancel_that_is_too_quick_is_said_with_what_to_do(
    kill_wait_s: int, grace_s: int, warned: bool
) -> None:
    config = PretrainConfig.model_validate(several(2, save_grace_s=grace_s))
    warning = kill_wait_warning(config, {"SLURM_JOB_ID": "4711"}, SETTINGS.format(kill_wait_s))
    assert bool(warning) == warned
    if warned:
        for words in (f"after {kill_wait_s} s", f"{grace_s} s (save_grace_s)", "scancel --signal=TERM 4711"):
            assert words in warning
    assert kill_wait_warning(config, {}, SETTINGS.format(kill_wait_s)) == ""
    assert kill_wait_warning(config, {"SLURM_JOB_ID": "4711"}, "") == ""


def test_schedulers_warn_before_the_time_to_save_is_over() -> None:
    grace = PRESETS["21b"]().save_grace_s
    assert grace == PRESETS["4b"]().save_grace_s
    batch = (PROJECT / "infra" / "slurm" / "pretrain.sbatch").read_text()
    warning = re.search(r"^#SBATCH --signal=TERM@(\d+)$", batch, re.MULTILINE)
    assert warning is not None and int(warning[1]) >= grace + 30
    # A requeued job has the log's name of its first try.
    assert "#SBATCH --open-mode=append\n" in batch and "#SBATCH --requeue\n" in batch
    assert f"code == {EXIT_RETRY}" in batch and "scancel --signal=TERM" in batch


# A step of the plan takes 4 to 8 s, a micro-step less; NCCL gives up after its default.
LONGEST_STEP_S, NCCL_S = 60, 600


def test_a_hang_is_noticed_before_nccl_and_after_the_longest_step() -> None:
    for name in ("21b", "4b"):
        config = PRESETS[name]()
        assert LONGEST_STEP_S < config.hang_timeout_s < NCCL_S <= config.pause_timeout_s
        assert {"hang_timeout_s", "pause_timeout_s", "nccl_trace_events"} <= config.PLACEMENT


def assert_same_losses(out: Path, one: Path) -> None:
    """Training and held-out figures of two runs within 1e-5."""
    found, wanted = lines(out), lines(one)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, expected in zip(found, wanted, strict=True):
        for name, value in expected["metrics"].items():
            if not name.startswith(NOISE):
                assert row["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (row["step"], name)


def write_request(out: Path, tokens: Path, config: dict[str, Any]) -> Path:
    request = out / ".work" / "request.json"
    request.parent.mkdir(parents=True)
    values = {
        "stage": "pretrain", "recipe": "tiny", "config": config, "inputs": {"tokenize": str(tokens)},
        "out": str(out), "cache": str(out),
    }  # fmt: skip
    request.write_text(json.dumps(values))
    return request


def run_ranks(children: Children, request: Path, world: int) -> tuple[list[int | None], dict[str, Any]]:
    """Start the workers as torchrun does; exit codes, and what the first rank wrote."""
    ranks = children.start_ranks(world, request)
    for process in ranks:
        process.join(CEILING_S)
    answer: dict[str, Any] = json.loads((request.parent / "result.json").read_text())
    return [process.exitcode for process in ranks], answer


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokens: Path, children: Children) -> Path:
    """The run of :func:`several` by one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    children.run(tokens, out, several(1))
    return out


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_two_ranks_train_like_one_process(
    tmp_path: Path, tokens: Path, children: Children, alone: Path, expert_parallel: int
) -> None:
    """Pooled expert counts make even the load-balance loss of two ranks that of one."""
    out = tmp_path / "two"
    request = write_request(out, tokens, several(2, expert_parallel=expert_parallel))
    codes, answer = run_ranks(children, request, 2)
    assert codes == [0, 0] and "error" not in answer
    assert "Trained in fp32 on 2 x cpu." in answer["notes"]
    assert saved(out) == [5, 6]
    assert_same_losses(out, alone)
    found, wanted = (
        json.loads((folder / ".work" / "evaluations.json").read_text()) for folder in (out, alone)
    )
    assert found.keys() == wanted.keys() and len(found) == 7
    for name in found:
        assert found[name]["tokens"] == wanted[name]["tokens"], name
        for kind in ("expert_frequency", "neuron_sparsity"):
            if name != "bigram":
                figures, expected = (
                    torch.tensor(record[name]["activations"][kind]) for record in (found, wanted)
                )
                assert torch.allclose(figures, expected, rtol=0, atol=1e-3), (name, kind)
    for stage in ("stage1", "stage2", "stage3"):
        weights, expected = (load_file(folder / stage / "model.safetensors") for folder in (out, alone))
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert float((weights[name] - value).norm() / value.norm()) < 1e-3, (stage, name)


def train_within(limit_bytes: int, request: Path) -> None:
    """One rank on a disk that takes no larger file; writes down its exit code."""
    from components.pretraining.worker import main

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    code = main([str(request)])
    (request.parent / f"code-{os.environ['RANK']}").write_text(str(code))


def test_a_disk_that_takes_no_checkpoint_is_named_by_several_processes_too(
    tmp_path: Path, tokens: Path, children: Children
) -> None:
    request = write_request(tmp_path / "out", tokens, several(2))
    RankReports(request.parent / REPORTS_NAME).create(2)
    children.call_ranks(2, train_within, 32 << 10, request)
    codes = {int((request.parent / f"code-{rank}").read_text()) for rank in range(2)}
    assert 2 in codes and codes <= {1, 2}  # a rank may find the other one gone
    error = outcome(request.parent, 1)
    assert type(error) is StageError and "no room left while stage pretrain was writing" in str(error)


def test_a_mesh_that_cannot_be_is_named(tmp_path: Path, tokens: Path, children: Children) -> None:
    config = run_config(expert_parallel=2)
    answer = children.run(tokens, tmp_path / "out", config)
    assert "expert_parallel is 2; it must divide the number of processes, which is 1" in answer["error"]


GROUPED: dict[str, Any] = {
    "load_balance_groups": 2,
    "load_balance_counts": "exact",
    "load_balance_domains": "sharded",
    # Routers that discriminate from the start.
    "model": {"preset": "nano", "overrides": {**MODEL, "initializer_range": 0.3}},
}


def in_micro_steps(**values: Any) -> dict[str, Any]:
    """One process that takes both groups in two micro-steps each."""
    return {**several(1, **{**GROUPED, **values}), "sequences_per_micro_batch": 2}


def test_exact_counts_of_a_group_do_not_depend_on_ranks_and_micro_batches(
    tmp_path: Path, tokens: Path, children: Children
) -> None:
    """Two groups of four sequences: one rank each, or both on one rank in two micro-steps each."""
    request = write_request(tmp_path / "two", tokens, several(2, **GROUPED))
    codes, answer = run_ranks(children, request, 2)
    assert codes == [0, 0] and "error" not in answer
    children.run(tokens, tmp_path / "one", in_micro_steps())
    assert_same_losses(tmp_path / "two", tmp_path / "one")


@pytest.mark.campaign
@pytest.mark.parametrize(("key", "value"), [("load_balance_groups", 1), ("load_balance_counts", "running")])
def test_groups_and_counts_change_the_loss(
    tmp_path: Path, tokens: Path, children: Children, key: str, value: Any
) -> None:
    children.run(tokens, tmp_path / "one", in_micro_steps())
    children.run(tokens, tmp_path / "other", in_micro_steps(**{key: value}))
    one, other = (lines(tmp_path / name)[1]["metrics"] for name in ("one", "other"))
    assert one["train/ce"] == pytest.approx(other["train/ce"], rel=1e-6)  # the same rows and weights
    assert abs(one["train/load_balance"] - other["train/load_balance"]) > 1e-3
    assert one["train/load_balance_global"] == pytest.approx(other["train/load_balance_global"], rel=1e-6)


SLOW_DISK = """
import os, time
flush = os.fsync
def slow(descriptor):
    if "/.step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(float(os.environ["SLOW_FSYNC_S"]))  # time is the subject: the shortest that a flush may take
        with open(os.environ["SLOW_FSYNC_LOG"], "a") as log:
            log.write("x")
    flush(descriptor)
os.fsync = slow
"""


@pytest.mark.campaign
@pytest.mark.parametrize(("grace_s", "fsync_s", "saves"), [(1200, 12, True), (5, 3600, False)])
def test_a_slow_save_gets_the_time_that_the_config_says(
    tmp_path: Path, tokens: Path, grace_s: int, fsync_s: int, saves: bool
) -> None:
    """A disk that takes 12 s for each of a process's two files and its folder: longer than torchrun's own 30 s.

    One that takes an hour is never done within the five seconds of the other config, on whatever machine.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW_DISK)
    out = tmp_path / "out"
    config = several(2, steps=300, save_grace_s=grace_s, checkpoint_every_steps=10_000)
    request = {"config": config, "tokens": str(tokens), "out": str(out)}
    program = (
        "import json, sys; from pathlib import Path; from tests.pretraining.children import train\n"
        "r = json.loads(sys.argv[1]); train(Path(r['tokens']), Path(r['out']), r['config'], Path(sys.argv[2]))"
    )
    answer = tmp_path / "answer.json"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path / 'site'}:{PROJECT}",
        "SLOW_FSYNC_S": str(fsync_s),
        "SLOW_FSYNC_LOG": str(tmp_path / "flushed"),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(request), str(answer)], cwd=PROJECT, env=environment
    )
    try:
        wait_for(lambda: logged(out) >= 3 or process.poll() is not None, "the third step")
        process.send_signal(signal.SIGTERM)
        process.wait(CEILING_S)
    finally:
        if process.poll() is None:
            process.kill()
    flushed = (tmp_path / "flushed").stat().st_size if saves else 0
    said = json.loads(answer.read_text())["error"]
    if saves:
        # Three flushes of 12 s in a row, by each of two processes.
        assert flushed == 2 * 3 and "Stopped by SIGTERM at step" in said, (flushed, said)
        assert len(saved(out)) == 1
    else:
        assert "A training process died" in said, said
        assert saved(out) == []


@pytest.mark.campaign
@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_torchrun_passes_signals_on_and_two_processes_train_like_one(
    tmp_path: Path, tokens: Path, children: Children, expert_parallel: int
) -> None:
    """Half a minute: two starts of torchrun."""
    out, config = tmp_path / "two", several(2, steps=40, expert_parallel=expert_parallel)
    child = children.start(tokens, out, config)
    wait_for(lambda: logged(out) >= 3 or not child.alive, "the third step")
    child.signal(signal.SIGTERM)
    answer = child.end()
    assert "Stopped by SIGTERM at step" in answer["error"], answer
    stopped = max(saved(out))
    assert 3 <= stopped < 120
    answer = children.run(tokens, out, config)
    assert f"Resumed from the checkpoint of step {stopped}." in answer["notes"]
    children.run(tokens, tmp_path / "one", several(1, steps=40))
    found, wanted = (lines(folder)[-1]["metrics"] for folder in (out, tmp_path / "one"))
    # Rounding differs from the first step on and grows with the steps.
    assert found["heldout/bits_per_byte/overall"] == pytest.approx(
        wanted["heldout/bits_per_byte/overall"], rel=1e-2
    )
    early = [row for row in lines(out) if row["step"] <= 3]
    one = [row for row in lines(tmp_path / "one") if row["step"] <= 3]
    for row, expected in zip(early, one, strict=True):
        for name in expected["metrics"]:
            if name.startswith(("train/", "heldout")):
                assert row["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-5, abs=1e-5)
