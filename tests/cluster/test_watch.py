"""The watch of a node: what counts as hung, who is named, and that the job ends by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import EXIT_RETRY, PROJECT, StageAborted, StageInterrupted
from components.pretraining import node as node_module
from components.pretraining.launcher import outcome
from components.pretraining.node import REPORTS_NAME, Watch
from components.pretraining.processes.hang import describe, examine, ranges
from components.pretraining.processes.heartbeat import Beat, beat_path, read_beats
from components.pretraining.processes.reports import RankReports
from tests.waiting import CEILING_S


def say(folder: Path, rank: int, count: int, limit_s: float = 300.0, **values: Any) -> None:
    """A beat as a worker writes it."""
    told = {"pid": os.getpid(), "step": 7, "doing": "the step", **values}
    beat_path(folder, rank).write_text(json.dumps({"count": count, "limit_s": limit_s, **told}).ljust(256))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the watch's clock forward, in polls of one second or in one leap."""
    now = [1000.0]
    monkeypatch.setattr(node_module.time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def looks(watch: Watch, clock: Callable[[float], None], seconds: int, workers: int = 2) -> list[bool]:
    """What the watch finds, second by second."""
    found = []
    for _ in range(seconds):
        clock(1.0)
        found.append(watch.look(workers))
    return found


def test_silence_beyond_the_limit_is_a_hang_and_progress_is_not(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    watch = Watch(tmp_path, 7200)
    say(tmp_path, 0, 1)
    say(tmp_path, 1, 1)
    assert not any(looks(watch, clock, 299))
    say(tmp_path, 0, 2)
    say(tmp_path, 1, 2)
    assert not any(looks(watch, clock, 299))
    say(tmp_path, 0, 3)  # rank 1 says nothing more
    assert looks(watch, clock, 4) == [False, False, True, True]


def test_each_beat_has_its_own_limit(tmp_path: Path, clock: Callable[[float], None]) -> None:
    watch = Watch(tmp_path, 7200)
    say(tmp_path, 0, 1, limit_s=7200, doing="the evaluation stage1:end")
    say(tmp_path, 1, 1, limit_s=840, doing="the save")
    assert not any(looks(watch, clock, 840))
    assert looks(watch, clock, 2)[-1]


def test_a_worker_that_never_comes_to_life_is_missed(tmp_path: Path, clock: Callable[[float], None]) -> None:
    watch = Watch(tmp_path, 60)
    say(tmp_path, 0, 1, limit_s=7200)
    assert looks(watch, clock, 62)[-1]
    say(tmp_path, 1, 1, limit_s=7200)
    assert not watch.look(2)


def test_a_watch_that_was_stopped_itself_does_not_blame_the_workers(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    """Ctrl-Z and fg, or a laptop's sleep: everything stood still."""
    watch = Watch(tmp_path, 300)
    say(tmp_path, 0, 1)
    say(tmp_path, 1, 1)
    looks(watch, clock, 2)
    clock(50_000)
    assert not any(looks(watch, clock, 290))
    assert looks(watch, clock, 20)[-1]


def test_a_beat_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    beat_path(tmp_path, 0).write_text('{"count": 3, "pid"')
    say(tmp_path, 11, 4)
    assert read_beats(tmp_path) == {11: Beat(4, os.getpid(), 7, "the step", 300.0)}


WAITS = """\
Thread 0x00007f (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 4287 in all_gather
  File "/p/components/pretraining/checkpoints/saving.py", line 100 in _seal

Current thread 0x00007f01 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/p/components/pretraining/training/telemetry.py", line 137 in pooled
"""
READS = """\
Current thread 0x00007f01 (most recent call first):
  File "/p/components/corpus/shards.py", line 88 in window
  File "/p/components/pretraining/data/batches.py", line 60 in rank_groups
"""


def told(stacks: str, step: int = 12, doing: str = "the step", **values: Any) -> dict[str, Any]:
    report = examine(Beat(5, os.getpid(), step, doing, 300), 301.0, stacks)
    return {**report, "host": "n1", **values}


@pytest.mark.parametrize(
    ("reports", "world", "words"),
    [
        (
            {0: told(WAITS), 1: told("", host="n2", state="stopped"), 2: told(WAITS)},
            3,
            ["for 301 s in step 12; rank 1 on n2 did not arrive (stopped", "ranks 0, 2 waited"],
        ),
        (
            {0: told(WAITS), 1: told(READS, doing="data"), 2: told(WAITS), 3: told(WAITS)},
            4,
            ["rank 1 on n1 did not arrive (data of step 12, corpus/shards.py:88 (window))", "ranks 0, 2-3 waited"],
        ),
        ({0: told(WAITS), 1: told(WAITS, step=11)}, 2, ["rank 1 on n1 did not arrive (the step of step 11"]),
        ({0: told(WAITS), 1: told(WAITS)}, 16, ["no sign of ranks 2-15", "ranks 0-1 waited"]),
        ({0: told(WAITS), 1: told(WAITS)}, 2, ["all of ranks 0-1 stand in the step: their stacks tell them apart"]),
        ({0: told(READS), 1: told(READS)}, 2, ["all of ranks 0-1"]),
    ],
    ids=["stopped", "reads", "behind", "silent", "all wait", "none waits"],
)  # fmt: skip
def test_who_did_not_arrive_is_named(reports: dict[int, Any], world: int, words: list[str]) -> None:
    sentence = describe(reports, world)
    assert all(word in sentence for word in words), sentence


def test_ranges() -> None:
    assert ranges([7, 0, 1, 2, 5, 4]) == "0-2, 4-5, 7"


RUN = """
import json, sys
from pathlib import Path
from components.pretraining.config import PretrainConfig
from components.pretraining.node import Node
# time is the subject: its ranks exceed any limit
config = PretrainConfig(processes=3, hang_timeout_s=3, save_grace_s=1)
import os
sys.exit(Node(config, Path(sys.argv[1]), 1).run(json.loads(sys.argv[2]), os.environ))
"""


def test_a_hang_ends_the_job_with_stacks_and_names(tmp_path: Path) -> None:
    """Under the real torchrun: one rank waits in a collective, one for data, one in C code holding the interpreter."""
    os.mkfifo(tmp_path / "pipe")
    reports = RankReports(tmp_path / REPORTS_NAME)
    reports.create(3)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone"]
    torchrun += ["--signals-to-handle=SIGQUIT", "-m", "tests.cluster.stuck", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), json.dumps(torchrun)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=CEILING_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == EXIT_RETRY, done.stderr[-2000:]
    error = outcome(tmp_path, done.returncode)
    assert isinstance(error, StageAborted)
    assert (
        "in step 12; rank 1 on" in str(error)
        and "rank 2 on" in str(error)
        and "; rank 0 waited" in str(error)
    )
    kept = [(tmp_path / "hang" / f"rank-{rank:05}.txt").read_text() for rank in range(3)]
    assert "in all_reduce" in kept[0] and "in read_window" in kept[1] and "in main" in kept[2]
    assert all(text in done.stderr for text in kept)


def test_reports_of_ranks_lead_to_the_stage_s_error(tmp_path: Path) -> None:
    reports = RankReports(tmp_path / REPORTS_NAME)
    reports.create(4)
    assert str(outcome(tmp_path, 1)).startswith("A training process died (exit code 1; its output is above).")
    reports.write(3, {"defect": "RuntimeError('Connection closed')", "host": "n2"})
    assert isinstance(outcome(tmp_path, 1), StageAborted)
    assert "rank 3 on n2: RuntimeError('Connection closed')" in str(outcome(tmp_path, 1))
    reports.write(1, {"error": "Stopped by SIGTERM", "exit_code": 130, "host": "n1"})
    assert isinstance(
        outcome(tmp_path, 1), StageInterrupted
    )  # what a rank says goes before what followed from it
    reports.create(4)
    assert reports.read() == {} and reports.world == 4


def test_a_report_is_as_long_as_its_slot(tmp_path: Path) -> None:
    reports = RankReports(tmp_path / "reports")
    reports.create(2)
    for text in ("x" * 10_000, "\0" * 10_000, "中" * 3000):
        reports.write(0, {"error": text, "exit_code": 2})
        reports.write(1, {"error": "short", "exit_code": 2})
        found = reports.read()
        assert found[0]["error"][0] == text[0] and found[1]["error"] == "short"
        assert int(found[0]["exit_code"]) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
def test_a_rank_can_report_on_a_full_disk(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], check=True)
    try:
        reports = RankReports(tmp_path / "reports")
        reports.create(8)
        with pytest.raises(OSError), (tmp_path / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        reports.write(5, {"error": "no room left", "exit_code": 2})
        assert reports.read() == {5: {"error": "no room left", "exit_code": 2}}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
