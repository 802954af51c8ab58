"""The runner against real stage processes: skipping, staleness, crashes, races and damage."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from components.artifacts import (
    PROJECT,
    ArtifactError,
    StageAborted,
    StageError,
    StageInterrupted,
    read_manifest,
)
from tests.flows.conftest import TOY_STAGES
from tests.waiting import CEILING_S, state_of, wait_for


def build_all(runner):
    return {stage.name: runner.run_stage(stage) for stage in TOY_STAGES}


def test_a_second_run_finds_everything_finished(toy):
    first = build_all(toy())
    assert not any(outcome.cached for outcome in first.values())
    assert (first["third"].folder / "data.txt").read_text() == "first=1;second=1;aside=1;third=1;"
    assert not list(first["third"].folder.glob(".*")), "scratch must not outlive the stage"
    again = build_all(toy())
    assert all(outcome.cached for outcome in again.values())
    manifest = again["first"].manifest
    assert manifest.metrics == {"value": 1.0, "attempts": 1.0}
    assert manifest.notes == ["a note"]
    assert set(manifest.files) == {"data.txt", "metrics.jsonl"}
    assert manifest.peak_memory_bytes > 0


def test_one_changed_field_reruns_exactly_its_dependants_and_names_the_field(toy):
    build_all(toy())
    changed = toy(second={"value": 2})
    plan = {entry.stage.name: entry for entry in changed.plan(TOY_STAGES)}
    assert {name for name, entry in plan.items() if not entry.finished} == {"second", "third"}
    assert plan["second"].reasons == ("second.value: 1 -> 2",)
    assert plan["third"].reasons == ("parent second changed",)
    outcomes = build_all(changed)
    assert {name for name, outcome in outcomes.items() if not outcome.cached} == {"second", "third"}
    back = build_all(toy())
    assert all(outcome.cached for outcome in back.values()), "going back must cost nothing"


def test_a_new_stage_version_makes_its_artefact_stale(toy, monkeypatch):
    build_all(toy())
    monkeypatch.setattr("tests.flows.toy_stages.VERSION", 2)
    reasons = toy().plan(TOY_STAGES)[0].reasons
    assert reasons == ("stage version 1 -> 2",)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("fail", "first: the value 7 is wrong; allowed are 1 to 5"),
        ("full_disk", "no room left while stage first was writing shard.ds"),
        ("torn_checkpoint", "no room left while stage first was writing"),
        ("full_metrics", "no room left while stage first was writing"),
        ("crash", "the stage's process failed"),
        ("die", "killed by signal 9"),
    ],
)
def test_a_failed_stage_gives_one_sentence_and_no_manifest_and_keeps_its_progress(toy, flag, sentence):
    runner = toy(first={flag: True})
    with pytest.raises(StageError, match=sentence):
        runner.run_stage(TOY_STAGES[0])
    folder = runner.store.folder(runner.identity(TOY_STAGES[0]))
    assert read_manifest(folder) is None
    assert (folder / ".work" / "attempts").read_text() == "x"
    with pytest.raises(StageError):
        toy(first={flag: True}).run_stage(TOY_STAGES[0])
    assert (folder / ".work" / "attempts").read_text() == "xx", (
        "the second attempt gets the first one's folder"
    )


@pytest.mark.parametrize(
    ("flag", "kind", "code"),
    [
        ("fail", StageError, 2),
        ("abort", StageAborted, 75),
        ("interrupted", StageInterrupted, 130),
        ("die", StageError, 2),
    ],
)
def test_a_scheduler_can_tell_what_to_try_again(toy, flag, kind, code):
    with pytest.raises(StageError) as caught:
        toy(first={flag: True}).run_stage(TOY_STAGES[0])
    assert type(caught.value) is kind and caught.value.exit_code == code
    assert str(caught.value).startswith("first: ")


def test_the_memory_of_processes_elsewhere_is_in_the_manifest(toy):
    """A scheduler's children, and those of other machines, are none of the runner's: they say it themselves."""
    gib = 1 << 30
    peaks = {
        "processes": 16, "host_bytes_greatest": 5 * gib, "host_bytes_sum": 60 * gib,
        "device_bytes_greatest": 70 * gib, "device_bytes_sum": 900 * gib,
    }  # fmt: skip
    manifest = toy(first={"peaks": peaks}).run_stage(TOY_STAGES[0]).manifest
    assert manifest.process_peaks is not None and manifest.process_peaks.model_dump() == peaks
    assert manifest.peak_memory_bytes == 60 * gib
    small = {**peaks, "host_bytes_sum": 2, "host_bytes_greatest": 1}
    here = toy(first={"peaks": small, "value": 2}).run_stage(TOY_STAGES[0]).manifest
    assert here.peak_memory_bytes > 1 << 20  # what the runner itself saw is more
    assert toy().run_stage(TOY_STAGES[0]).manifest.process_peaks is None


class Interrupting:
    """An observer during whose work the user presses Ctrl-C."""

    def stage_started(self, *arguments):
        pass

    stage_finished = stage_failed = stage_started

    def metrics_written(self, *arguments):
        raise KeyboardInterrupt


class Failing:
    """An observer whose server is gone, or whose disk is full."""

    def __getattr__(self, event):
        def fail(*arguments):
            raise RuntimeError(f"(sqlite3.OperationalError) database or disk is full, at {event}")

        return fail


def test_an_observer_that_fails_stops_nothing(toy):
    runner = toy()
    runner.observer = Failing()
    assert runner.run_stage(TOY_STAGES[0]).manifest.metrics["value"] == 1
    assert (
        sum("tracking failed at stage_started (RuntimeError: (sqlite3" in line for line in runner.said) == 1
    )
    assert sum("tracking failed at stage_finished" in line for line in runner.said) == 1
    failing = toy(first={"fail": True})
    failing.observer = Failing()
    with pytest.raises(StageError, match="the value 7 is wrong"):  # not what the observer met
        failing.run_stage(TOY_STAGES[0])


@pytest.mark.parametrize(("grace_s", "saves"), [(3600, True), (0.25, False)])
def test_an_interrupted_stage_gets_the_time_to_save_that_its_config_says(
    toy, monkeypatch, tmp_path, grace_s, saves
):
    """The save that is done once the runner waits is done, and the one that is never done is given up."""
    monkeypatch.setattr("flows.runner._MARGIN_S", 0.5)
    gate, given, wait = tmp_path / "disk is free", [], subprocess.Popen.wait

    def watched(process, timeout=None):
        given.append(timeout)
        if timeout == grace_s + 0.5 and saves:
            wait_for((folder / ".work" / "saving").exists, "the stage's save")
            gate.touch()
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", watched)
    runner = toy(first={"saves_after": str(gate), "save_grace_s": grace_s})
    runner.observer = Interrupting()
    folder = runner.store.folder(runner.identity(TOY_STAGES[0]))
    with pytest.raises(KeyboardInterrupt):
        runner.run_stage(TOY_STAGES[0])
    assert grace_s + 0.5 in given
    assert (folder / ".work" / "saved").exists() == saves


def test_where_a_stage_runs_is_no_part_of_what_it_makes(toy):
    build_all(toy(first={"where": "here"}))
    elsewhere = toy(first={"where": "there"})
    assert all(outcome.cached for outcome in build_all(elsewhere).values())
    identity = elsewhere.identity(TOY_STAGES[0])
    assert identity.config == {"value": 1, "where": "there"}  # the stage is told all the same
    changed = toy(first={"where": "there", "value": 2})
    assert changed.plan(TOY_STAGES)[0].reasons == ("first.value: 1 -> 2",)


def _run_first(runner, results):
    try:
        results.put(runner.run_stage(TOY_STAGES[0]).cached)
    except BaseException as error:
        results.put(repr(error))


def test_two_runners_do_the_work_once(toy, tmp_path):
    gate = tmp_path / "go"
    parts = {"first": {"wait_for": str(gate)}}
    results: multiprocessing.Queue = multiprocessing.get_context("fork").Queue()
    runners = [toy(**parts) for _ in range(3)]
    threads = [threading.Thread(target=_run_first, args=(runner, results)) for runner in runners]
    for thread in threads:
        thread.start()
    wait_for(
        lambda: sum("waiting for it" in line for runner in runners for line in runner.said) == 2,
        "two runners that wait for the third",
    )
    gate.touch()
    assert sorted(results.get(timeout=CEILING_S) for _ in threads) == [False, True, True]
    for thread in threads:
        thread.join()
    runner = toy(**parts)
    assert runner.run_stage(TOY_STAGES[0]).manifest.metrics["attempts"] == 1


def test_kill_9_of_the_runner_takes_the_stage_along_and_the_same_command_goes_on(toy, tmp_path):
    gate = tmp_path / "go"
    parts = {"first": {"wait_for": str(gate)}}
    runner = toy(**parts)
    folder = runner.store.folder(runner.identity(TOY_STAGES[0]))
    child = os.fork()
    if child == 0:
        runner.run_stage(TOY_STAGES[0])
        os._exit(0)
    started = folder / "started"
    stage_pid = int(wait_for(lambda: started.exists() and started.read_text(), "the stage's start"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for(lambda: not state_of(stage_pid), "the stage's end after its runner's")
    assert read_manifest(folder) is None
    gate.touch()
    outcome = toy(**parts).run_stage(TOY_STAGES[0])
    assert not outcome.cached
    assert outcome.manifest.metrics["attempts"] == 2


def test_a_damaged_parent_stops_the_run_with_one_sentence_and_can_be_set_aside(toy):
    outcomes = build_all(toy())
    shard = outcomes["first"].folder / "data.txt"
    good = shard.read_text()
    shard.write_text(good.replace("first", "worst"))
    runner = toy(second={"value": 2})
    with pytest.raises(
        ArtifactError, match=r"stage first .*data.txt does not match its SHA-256.*--rebuild first"
    ):
        runner.run_stage(TOY_STAGES[1])
    shard.write_text(good[:-3])
    with pytest.raises(ArtifactError, match=r"data.txt has 5 bytes, the manifest says 8"):
        toy().plan(TOY_STAGES)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"data.txt is missing"):
        toy().plan(TOY_STAGES)
    repaired = toy()
    repaired.rebuild = ["first"]
    assert not repaired.run_stage(TOY_STAGES[0]).cached
    assert shard.read_text() == good
    assert len(list(shard.parent.parent.glob("*.aside-1"))) == 1, "nothing may be lost"


def test_a_torn_manifest_is_named(toy):
    outcome = toy().run_stage(TOY_STAGES[0])
    path = outcome.folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ArtifactError, match=r"manifest.json is not a valid manifest"):
        toy().plan(TOY_STAGES)


def test_a_plan_imports_nothing_that_takes_seconds(tmp_path: Path) -> None:
    """Torch, MLflow, the teacher's client and Prefect are for what really runs."""
    script = (
        "import sys\n"
        "from flows.pipeline import main\n"
        f"code = main(['--recipe', 'smoke', '--plan', '--root', {str(tmp_path)!r}])\n"
        "print(code, sorted({'torch', 'mlflow', 'openai', 'prefect', 'pandas'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 []\n"
