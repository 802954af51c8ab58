"""The shipped sbatch on a Slurm of three nodes: whatever happens to a job, the finished weights have the same bits.

``pytest -m campaign tests/cluster/test_slurm.py -s`` runs all of it and prints how long each part took; the default run
has one scenario. Without root or without Debian's packages the reason is the skip's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.machines import Cluster, why_not
from tests.cluster.runs import Run
from tests.waiting import state_of, wait_for

STEPS = 60  # of each of three training stages
AT = 25  # where the runs are disturbed: five checkpoints are there
SMALL_DISK_MIB = 96


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "small").mkdir()
    # Before the nodes are up: each has its own mounts from then on.
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MIB}m", "none", str(folder / "small")], check=True
    )
    try:
        with Cluster(folder, silence_s=30) as up:
            yield up
    finally:
        subprocess.run(["umount", "-l", str(folder / "small")], check=True)


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing disturbs."""
    run = Run(tmp_path_factory.mktemp("whole"), tokens, STEPS)
    began = time.monotonic()
    job = run.submit(cluster)
    assert run.end(cluster, job) == "COMPLETED", run.log(job)[-3000:]
    print(f"\nundisturbed: {time.monotonic() - began:.0f} s")
    assert sorted(run.digests()) == ["stage1", "stage2", "stage3"]
    return run


class Clock:
    """Prints how long the parts of a scenario took."""

    def __init__(self, name: str) -> None:
        self._name, self._last = name, time.monotonic()

    def tick(self, what: str) -> None:
        now = time.monotonic()
        print(f"\n{self._name}: {what} {now - self._last:.0f} s", end="")
        self._last = now


def worker(cluster: Cluster, node: str) -> int:
    """The training process on a node."""
    (found,) = cluster.processes(node, "components.pretraining.worker")
    return found


def manifest(run: Run) -> dict[str, object]:
    """What the finished run left."""
    loaded: dict[str, object] = json.loads((run.out / "manifest.json").read_text())
    return loaded


def assert_finished_like(run: Run, whole: Run) -> None:
    """The same bits, and a manifest that names what every rank took."""
    assert run.digests() == whole.digests()
    found = manifest(run)
    peaks = found["process_peaks"]
    assert isinstance(peaks, dict) and peaks["processes"] == 2
    assert found["peak_memory_bytes"] >= peaks["host_bytes_sum"] > 1.5 * peaks["host_bytes_greatest"]
    assert peaks["host_bytes_greatest"] > 100 << 20


def resumed_from(run: Run) -> int:
    """The step of the checkpoint that the finishing job began at."""
    notes = [note for note in manifest(run)["notes"] if note.startswith("Resumed from")]  # type: ignore[attr-defined]
    assert len(notes) == 1
    return int(notes[0].rstrip(".").rsplit(" ", 1)[1])


def test_a_rank_that_is_stopped_ends_the_job_which_is_requeued(
    cluster: Cluster, tokens: Path, tmp_path: Path
) -> None:
    """The default run's scenario: nobody looks at the job, and it says which rank did not arrive and starts again."""
    # time is the subject: a stopped or silent rank exceeds any limit
    run = Run(tmp_path, tokens, STEPS, hang_timeout_s=15)
    job = run.submit(cluster)
    run.await_step(AT, cluster, job)
    os.kill(worker(cluster, "n2"), signal.SIGSTOP)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", "Slurm's requeueing")
    cluster.run("scancel", job)
    cluster.await_idle()
    log = run.log(job)
    assert "rank 1 on n2 did not arrive (stopped" in log and "; rank 0 waited" in log
    assert "---- rank 0 on n1" in log and "in train_here" in log  # the stacks of the one that lives
    assert "no stacks: the process is stopped" in log
    assert max(run.saved()) >= AT - 5
    kept = sorted(path.name for path in (run.out / ".work" / "hang").iterdir())
    assert kept == ["rank-00000.txt", "rank-00001.txt"]


@pytest.mark.campaign
def test_a_hang_costs_no_bit(cluster: Cluster, tokens: Path, tmp_path: Path, whole: Run) -> None:
    # time is the subject: a stopped or silent rank exceeds any limit
    clock, run = Clock("hang"), Run(tmp_path, tokens, STEPS, hang_timeout_s=15)
    job = run.submit(cluster)
    run.await_step(AT, cluster, job)
    os.kill(worker(cluster, "n1"), signal.SIGSTOP)
    clock.tick("to the stopped rank")
    wait_for(lambda: "requeueing job" in run.log(job), "the job's own requeueing")
    clock.tick("to the abort")
    assert "rank 0 on n1 did not arrive (stopped" in run.log(job)
    assert run.end(cluster, job) == "COMPLETED"
    clock.tick("to the end")
    assert cluster.job(job)["Restarts"] == "1" and resumed_from(run) >= AT - 5
    assert run.log(job).count("recipe nano: 1 of 5 stages to run") == 2  # the first try's log is still there
    assert_finished_like(run, whole)


@pytest.mark.campaign
def test_the_warning_before_the_time_limit_saves(
    cluster: Cluster, tokens: Path, tmp_path: Path, whole: Run
) -> None:
    """Slurm's own warning, within two minutes; a stopped rank keeps the run from being done before."""
    clock, run = Clock("time limit"), Run(tmp_path, tokens, STEPS)
    first = run.submit(cluster)
    second = run.submit(cluster)
    run.await_step(AT, cluster, first)
    assert cluster.job(second)["JobState"] == "PENDING"
    pid = worker(cluster, "n2")
    os.kill(pid, signal.SIGSTOP)
    hours, minutes, _ = (int(part) for part in cluster.job(first)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"JobId={first}", f"TimeLimit={60 * hours + minutes + 17}")
    # Some versions of Slurm let a stopped process go on before they warn it.
    wait_for(lambda: state_of(pid) != "T" or _is_pending(pid, signal.SIGTERM), "Slurm's warning")
    clock.tick("to the warning")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert run.end(cluster, first) == "FAILED" and cluster.job(first)["ExitCode"] == "130:0"
    assert "Stopped by SIGTERM at step" in run.log(first) or "Stopped by a signal" in run.log(first)
    stopped = max(run.saved())
    clock.tick("to the save")
    assert run.end(cluster, second) == "COMPLETED"
    clock.tick("to the successor's end")
    assert resumed_from(run) == stopped
    assert_finished_like(run, whole)


def _is_pending(pid: int, number: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    masks = [
        int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))
    ]
    return any(mask >> (number - 1) & 1 for mask in masks)


@pytest.mark.campaign
def test_a_lost_node_is_replaced(cluster: Cluster, tokens: Path, tmp_path: Path, whole: Run) -> None:
    clock, run = Clock("lost node"), Run(tmp_path, tokens, STEPS)
    job = run.submit(cluster)
    run.await_step(AT, cluster, job)
    cluster.lose("n2")
    clock.tick("to the loss")
    try:
        wait_for(lambda: cluster.job(job)["Restarts"] == "1", "Slurm's requeueing")
        clock.tick("to Slurm's requeueing")
        assert run.end(cluster, job) == "COMPLETED"
        clock.tick("to the end")
        assert cluster.job(job)["NodeList"] == "n[1,3]" and resumed_from(run) >= AT - 5
        assert_finished_like(run, whole)
    finally:
        cluster.start("n2")
        cluster.await_idle()


@pytest.mark.campaign
def test_a_silent_node_is_noticed_by_the_job_itself(
    cluster: Cluster, tokens: Path, tmp_path: Path, whole: Run
) -> None:
    """A cut cable: the other end of every connection is simply silent, and Slurm waits longer than the job."""
    # time is the subject: a stopped or silent rank exceeds any limit
    clock, run = Clock("silent node"), Run(tmp_path, tokens, STEPS, hang_timeout_s=15)
    job = run.submit(cluster)
    run.await_step(AT, cluster, job)
    cluster.cut("n2")
    clock.tick("to the cut")
    try:
        wait_for(lambda: (run.out / ".work" / "hang" / "rank-00000.txt").exists(), "the watch of n1")
        clock.tick("to the watch's notice")
        wait_for(lambda: cluster.job(job)["Restarts"] == "1", "requeueing")
        clock.tick("to the requeueing")
        assert run.end(cluster, job) == "COMPLETED"
        clock.tick("to the end")
        assert_finished_like(run, whole)
    finally:
        cluster.cut("n2", "up")
        cluster.await_idle()


@pytest.mark.campaign
def test_a_full_disk_is_named_and_costs_no_checkpoint(cluster: Cluster, tokens: Path, whole: Run) -> None:
    clock, run = Clock("full disk"), Run(cluster.folder / "small", tokens, STEPS)
    job = run.submit(cluster, f"--output={cluster.folder}/full-%j.log")
    run.await_step(AT, cluster, job)
    filler = cluster.folder / "small" / "filler"
    _fill(filler)
    before = run.saved()
    assert run.end(cluster, job) == "FAILED"
    clock.tick("to the end on the full disk")
    log = (cluster.folder / f"full-{job}.log").read_text()
    assert "error: pretrain: no room left while stage pretrain was writing" in log, log[-3000:]
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert run.saved() and max(run.saved()) >= before[0]
    filler.unlink()
    job = run.submit(cluster, f"--output={cluster.folder}/full-%j.log")
    assert run.end(cluster, job) == "COMPLETED"
    clock.tick("to the next job's end")
    assert resumed_from(run) >= before[0]
    assert_finished_like(run, whole)


def _fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as handle:
        for size in (1 << 20, 4096):
            try:
                while True:
                    handle.write(bytes(size))
            except OSError:
                continue


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["TERM", "KILL"])
def test_scancel_and_a_damaged_checkpoint(
    cluster: Cluster, tokens: Path, tmp_path: Path, whole: Run, how: str
) -> None:
    """``scancel --signal=TERM`` as documented, and plain ``scancel`` where KillWait suffices: both save.

    After the first the newest checkpoint is damaged: the one before it is taken.
    """
    clock, run = Clock(f"scancel {how}"), Run(tmp_path, tokens, STEPS)
    job = run.submit(cluster)
    run.await_step(AT, cluster, job)
    cluster.run("scancel", *(["--signal=TERM"] if how == "TERM" else []), job)
    assert run.end(cluster, job) == ("FAILED" if how == "TERM" else "CANCELLED")
    cluster.await_idle()
    clock.tick("to the save")
    saved = run.saved()
    assert len(saved) == 2 and saved[-1] >= AT
    if how == "TERM":
        assert "at step" in run.log(job) and "everything up to there is saved" in run.log(job)
        newest = run.out / ".work" / "checkpoints" / f"step-{saved[-1]:08}"
        largest = max((path for path in newest.rglob("*.pt")), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    job = run.submit(cluster)
    assert run.end(cluster, job) == "COMPLETED"
    clock.tick("to the end")
    assert resumed_from(run) == saved[0 if how == "TERM" else 1]
    assert_finished_like(run, whole)
