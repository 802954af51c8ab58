"""The tracker against a real MLflow database: lineage, resumed runs, cached stages and gates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.artifacts import Identity, Manifest, ParentEntry
from components.artifacts.manifest import collect_files
from components.tracking import MlflowTracker


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'm.db'}"


def make_tracker(uri: str, tmp_path: Path, identity: str) -> MlflowTracker:
    return MlflowTracker(
        uri, f"toy-{tmp_path.name}", tmp_path / "art", "toy", identity, {"pretrain": {"seed": 1}}
    )


def make_identity(stage: str, fingerprint: str, **config) -> Identity:
    parents = {"tokenize": ParentEntry(stage="tokenize", fingerprint="0" * 64)}
    return Identity("toy", stage, 1, {"seed": 3, **config}, parents, fingerprint)


def finish(identity: Identity, folder: Path, metrics: dict[str, float]) -> Manifest:
    return Manifest(
        stage=identity.stage,
        stage_version=1,
        recipe="toy",
        fingerprint=identity.fingerprint,
        config=dict(identity.config),
        parents=dict(identity.parents),
        files=collect_files(folder),
        metrics=metrics,
        notes=["a note"],
        code_revision="abc",
        created_at="2026-01-01T00:00:00.000+00:00",
        duration_s=2.5,
        peak_memory_bytes=1 << 20,
    )


def write_steps(folder: Path, steps: range) -> None:
    with (folder / "metrics.jsonl").open("a") as handle:
        for step in steps:
            handle.write(
                json.dumps({"step": step, "time_s": 1.0 * step, "metrics": {"loss": 1 / (step + 1)}}) + "\n"
            )


def children(tracker: MlflowTracker, **tags: str):
    clause = " and ".join(f"tags.{name} = '{value}'" for name, value in {"role": "stage", **tags}.items())
    return tracker._client.search_runs([tracker._experiment_id], clause)


def test_a_killed_stage_continues_its_run_with_every_step_once(uri, tmp_path):
    folder = tmp_path / "pretrain"
    (folder / "model").mkdir(parents=True)
    identity = make_identity("pretrain", "a" * 64)
    tracker = make_tracker(uri, tmp_path, "1" * 64)
    tracker.stage_started(identity, folder)
    write_steps(folder, range(5))
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 5, "time_s": 5.0, "met')  # torn by the kill
    tracker.metrics_written(identity, folder)

    (folder / "metrics.jsonl").unlink()  # the stage resumes from step 3 and cuts its series back
    write_steps(folder, range(3))
    resumed = make_tracker(uri, tmp_path, "1" * 64)
    assert resumed.parent_run_id == tracker.parent_run_id
    resumed.stage_started(identity, folder)
    write_steps(folder, range(3, 8))
    (folder / "loss.png").write_bytes(b"png")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    resumed.metrics_written(identity, folder)
    write_steps(folder, range(8, 10))
    manifest = finish(identity, folder, {"bits_per_byte": 2.0})
    resumed.stage_finished(identity, folder, manifest, cached=False)

    runs = children(resumed, stage="pretrain")
    assert len(runs) == 1
    run = runs[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "3"
    assert run.data.metrics["bits_per_byte"] == 2.0
    assert run.data.tags["parent.tokenize"] == "0" * 64
    history = resumed._client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == list(range(10))
    parent = resumed._client.get_run(resumed.parent_run_id)
    assert parent.data.metrics["pretrain.bits_per_byte"] == 2.0
    assert parent.data.params["pretrain.seed"] == "1"
    artifacts = {item.path for item in resumed._client.list_artifacts(run.info.run_id)}
    assert {"loss.png"} <= artifacts and not any("safetensors" in path for path in artifacts)
    models = resumed._client.search_logged_models([resumed._experiment_id])
    assert [json.loads(model.tags["weights_sha256"]).keys() for model in models] == [
        {"model/model.safetensors"}
    ]


def write_line(folder: Path, step: int, **metrics: float) -> None:
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write(json.dumps({"step": step, "time_s": 1.0 + step, "metrics": metrics}) + "\n")


def histories(tracker: MlflowTracker, stage: str) -> dict[str, list[int]]:
    """Steps by metric, as MLflow has them, of the only run of a stage."""
    (run,) = children(tracker, stage=stage)
    return {
        name: [point.step for point in tracker._client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def test_lines_of_one_step_that_are_written_one_after_the_other_all_arrive_once(uri, tmp_path):
    """A stage's last training line is logged, and read, minutes before the evaluation at the same step."""
    folder = tmp_path / "pretrain"
    folder.mkdir()
    identity = make_identity("pretrain", "9" * 64)
    tracker = make_tracker(uri, tmp_path, "9" * 64)
    tracker.stage_started(identity, folder)
    for step, name in ((10, "loss"), (10, "heldout"), (10, "heldout_start"), (20, "loss")):
        write_line(folder, step, **{name: 1.0})
        tracker.metrics_written(identity, folder)
    wanted = {"loss": [10, 20], "heldout": [10], "heldout_start": [10]}
    assert histories(tracker, "pretrain") == wanted

    # Killed; the stage goes back to step 10 with a new file that has outgrown the old one when it is read first.
    (folder / "metrics.jsonl").rename(folder / "old")
    for step, name in ((10, "loss"), (10, "heldout"), (10, "heldout_start"), (20, "loss"), (20, "heldout")):
        write_line(folder, step, **{name: 1.0})
    tracker.metrics_written(identity, folder)
    assert histories(tracker, "pretrain") == {**wanted, "heldout": [10, 20]}

    # Another process, whose predecessor died between sending and any note about it.
    (folder / ".tracking.json").write_text(json.dumps({"run_id": tracker._runs[identity.fingerprint]}))
    resumed = make_tracker(uri, tmp_path, "9" * 64)
    resumed.stage_started(identity, folder)
    write_line(folder, 30, loss=1.0)
    resumed.metrics_written(identity, folder)
    assert histories(resumed, "pretrain") == {**wanted, "heldout": [10, 20], "loss": [10, 20, 30]}


def test_a_cached_stage_appears_in_a_new_pipeline_with_a_link_and_only_once(uri, tmp_path):
    folder = tmp_path / "curate"
    folder.mkdir()
    identity = make_identity("curate", "b" * 64)
    first = make_tracker(uri, tmp_path, "2" * 64)
    first.stage_started(identity, folder)
    manifest = finish(identity, folder, {"documents": 7})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    first.stage_finished(identity, folder, manifest, cached=False)
    for _ in range(2):
        second = make_tracker(uri, tmp_path, "3" * 64)
        second.stage_finished(identity, folder, manifest, cached=True)
    cached = children(second, stage="curate", cached="true")
    assert len(cached) == 1
    built = children(second, stage="curate", cached="false")
    assert cached[0].data.tags["built_by_run"] == built[0].info.run_id
    assert cached[0].data.metrics["documents"] == 7


def test_a_failed_stage_says_why(uri, tmp_path):
    identity = make_identity("synthesize", "c" * 64)
    tracker = make_tracker(uri, tmp_path, "4" * 64)
    folder = tmp_path / "synthesize"
    folder.mkdir()
    tracker.stage_started(identity, folder)
    tracker.stage_failed(identity, folder, "the teacher does not answer")
    tracker.pipeline_finished(None, failed=True)
    run = children(tracker, stage="synthesize")[0]
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "the teacher does not answer")


def test_gates_move_aliases_only_for_the_better_and_record_why(uri, tmp_path):
    folder = tmp_path / "merge"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w")
    tracker = make_tracker(uri, tmp_path, "5" * 64)
    versions = []
    for digit, value in (("d", 0.5), ("e", 0.4), ("f", 0.6)):
        identity = make_identity("merge", digit * 64)
        tracker.stage_started(identity, folder)
        (folder / ".tracking.json").unlink()
        manifest = finish(identity, folder, {"dev_score": value})
        versions.append(tracker.registry.add_version(tracker.parent_run_id, identity, folder, manifest))
        assert tracker.registry.add_version(tracker.parent_run_id, identity, folder, manifest) == versions[-1]
        reason = tracker.registry.gate("champion", versions[-1], "dev_score", value)
        holder = tracker._client.get_model_version_by_alias(tracker.registry.name, "champion")
        expected = {"d": versions[0], "e": versions[0], "f": versions[-1]}[digit]
        assert str(holder.version) == expected
        kept = tracker._client.get_model_version(tracker.registry.name, versions[-1]).tags["gate.champion"]
        assert kept == reason
    assert (
        "stays at version"
        in tracker._client.get_model_version(tracker.registry.name, versions[1]).tags["gate.champion"]
    )
