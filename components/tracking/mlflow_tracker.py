"""Sends artefacts' manifests and metric series to MLflow.

``MlflowTracker`` is the runner's observer: it reads manifests and ``metrics.jsonl`` only, so no stage has to remember
to report. A stage that is resumed continues its run, found again by the artefact's fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from components.artifacts import METRICS_NAME, Identity, Manifest, flatten, write_json
from components.tracking.registry import ModelRegistry

_BATCH = 900
_MAX_LOGGED_BYTES = 8 << 20
_STATE_NAME = ".tracking.json"
_LOGGED_SUFFIXES = {".json", ".png", ".html", ".md", ".jsonl"}


class MlflowTracker:
    """One MLflow experiment; one parent run per pipeline identity, one child run per stage.

    Args:
        uri: MLflow tracking URI, e.g. ``sqlite:///runs/mlflow.db`` or a server's address.
        experiment: the experiment's name, one per purpose.
        artifact_root: folder for logged files when the experiment is created on a local database.
        pipeline: the pipeline's name and identity: the same identity continues the same parent run.
        parameters: the resolved recipe, logged on the parent run.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_root: Path,
        pipeline: str,
        identity: str,
        parameters: dict[str, Any],
    ) -> None:
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            artifact_root.mkdir(parents=True, exist_ok=True)
            self._experiment_id = self._client.create_experiment(
                experiment, artifact_location=artifact_root.as_uri()
            )
        else:
            self._experiment_id = found.experiment_id
        self.registry = ModelRegistry(self._client, self._experiment_id, name=f"smallthinker-{pipeline}")
        self._parent = self._find({"pipeline_identity": identity, "role": "pipeline"})
        if self._parent is None:
            self._parent = self._client.create_run(
                self._experiment_id,
                run_name=f"{pipeline}-{identity[:8]}",
                tags={"role": "pipeline", "pipeline_identity": identity, "recipe": pipeline},
            )
            self._log_params(self._parent.info.run_id, parameters)
        else:
            self._client.update_run(self._parent.info.run_id, status="RUNNING")
        self._runs: dict[str, str] = {}
        # Of each stage's metrics.jsonl: which file it was (a resumed stage writes a new one), and how far it was read.
        self._read: dict[str, tuple[int, int]] = {}
        # The last step sent, by metric: an evaluation is logged at the same step as the training before it, and later.
        self._sent: dict[str, dict[str, int]] = {}

    @property
    def parent_run_id(self) -> str:
        """MLflow id of the pipeline's run."""
        assert self._parent is not None
        run_id: str = self._parent.info.run_id
        return run_id

    def _find(self, tags: dict[str, str]) -> Run | None:
        clause = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
        runs = self._client.search_runs([self._experiment_id], clause, max_results=1)
        return runs[0] if runs else None

    def _log_params(self, run_id: str, values: dict[str, Any]) -> None:
        params = [Param(name[:250], str(value)[:6000]) for name, value in flatten(values).items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])

    def stage_started(self, identity: Identity, folder: Path) -> None:
        """Open the stage's child run, or continue the one that a killed attempt left."""
        run_id = self._earlier_run(folder)
        sent: dict[str, int] = {}
        if run_id is None:
            run_id = self._create_child(identity, f"{identity.stage}", {"cached": "false"})
            self._log_params(run_id, dict(identity.config))
            write_json(folder / _STATE_NAME, {"run_id": run_id})
        else:
            self._client.update_run(run_id, status="RUNNING")
            # Asked of MLflow: a kill may have come between sending and any note of ours about it.
            for name in self._client.get_run(run_id).data.metrics:
                sent[name] = max(point.step for point in self._client.get_metric_history(run_id, name))
        self._runs[identity.fingerprint] = run_id
        self._sent[identity.fingerprint] = sent
        self._read.pop(identity.fingerprint, None)

    def _create_child(self, identity: Identity, name: str, tags: dict[str, str]) -> str:
        run = self._client.create_run(
            self._experiment_id,
            tags={
                MLFLOW_PARENT_RUN_ID: self.parent_run_id,
                MLFLOW_RUN_NAME: name,
                "role": "stage",
                "stage": identity.stage,
                "recipe": identity.recipe,
                "fingerprint": identity.fingerprint,
                **tags,
            },
        )
        run_id: str = run.info.run_id
        return run_id

    def _earlier_run(self, folder: Path) -> str | None:
        try:
            run_id: str = json.loads((folder / _STATE_NAME).read_text())["run_id"]
            self._client.get_run(run_id)
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            return None
        return run_id

    def metrics_written(self, identity: Identity, folder: Path) -> None:
        """Send the complete new lines of ``metrics.jsonl``, in batches; steps already sent are not sent again."""
        run_id = self._runs.get(identity.fingerprint)
        if run_id is None:
            return
        with (folder / METRICS_NAME).open("rb") as handle:
            status = os.fstat(handle.fileno())
            file, offset = self._read.get(identity.fingerprint, (status.st_ino, 0))
            if file != status.st_ino or status.st_size < offset:  # cut back to a checkpoint
                offset = 0
            handle.seek(offset)
            data = handle.read()
        complete = data[: data.rfind(b"\n") + 1]
        metrics = list(_parse_metrics(complete.splitlines(), self._sent[identity.fingerprint]))
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
        self._read[identity.fingerprint] = (status.st_ino, offset + len(complete))

    def stage_finished(self, identity: Identity, folder: Path, manifest: Manifest, cached: bool) -> None:
        """Log headline metrics, small files and models; a cached stage links to the run that built it."""
        if cached:
            self._link_cached(identity, folder, manifest)
            return
        run_id = self._runs[identity.fingerprint]
        if (folder / METRICS_NAME).is_file():
            self.metrics_written(identity, folder)
        self._log_manifest(run_id, manifest)
        for path in [folder / "manifest.json", *sorted(folder.iterdir())]:
            wanted = path.is_file() and path.suffix in _LOGGED_SUFFIXES and path.name != METRICS_NAME
            if wanted and path.stat().st_size <= _MAX_LOGGED_BYTES and not path.name.startswith("."):
                self._client.log_artifact(run_id, str(path))
        self.registry.log_models(run_id, identity, folder, manifest)
        self._client.set_terminated(run_id)

    def _log_manifest(self, run_id: str, manifest: Manifest) -> None:
        values = {
            **manifest.metrics,
            "stage/duration_s": manifest.duration_s,
            "stage/peak_memory_bytes": float(manifest.peak_memory_bytes),
        }
        now_ms = _milliseconds(manifest.created_at)
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, now_ms, 0) for name, value in values.items()],
            tags=[
                RunTag("code_revision", manifest.code_revision),
                RunTag("stage_version", str(manifest.stage_version)),
                *[RunTag(f"parent.{role}", entry.fingerprint) for role, entry in manifest.parents.items()],
                *([RunTag("notes", "\n".join(manifest.notes)[:4900])] if manifest.notes else []),
            ],
        )
        if self._parent is not None:
            pipeline = [
                Metric(f"{manifest.stage}.{name}", value, now_ms, 0) for name, value in values.items()
            ]
            self._client.log_batch(self.parent_run_id, metrics=pipeline)

    def _link_cached(self, identity: Identity, folder: Path, manifest: Manifest) -> None:
        already = self._find(
            {"fingerprint": identity.fingerprint, f"`{MLFLOW_PARENT_RUN_ID}`": self.parent_run_id}
        )
        if already is not None:
            return
        origin = self._find({"fingerprint": identity.fingerprint, "cached": "false"})
        run_id = self._create_child(
            identity,
            f"{identity.stage} (cached)",
            {"cached": "true", "built_by_run": origin.info.run_id if origin else "unknown"},
        )
        self._log_manifest(run_id, manifest)
        self._client.log_artifact(run_id, str(folder / "manifest.json"))
        self._client.set_terminated(run_id)

    def stage_failed(self, identity: Identity, folder: Path, message: str) -> None:
        """Mark the stage's run failed and keep its sentence; the next attempt continues the run."""
        run_id = self._runs[identity.fingerprint]
        self._client.set_tag(run_id, "error", message[:4900])
        self._client.set_terminated(run_id, status="FAILED")

    def pipeline_finished(self, report: Path | None, failed: bool) -> None:
        """Close the parent run, with the report beside it."""
        if report is not None and report.is_file():
            self._client.log_artifact(self.parent_run_id, str(report))
        self._client.set_terminated(self.parent_run_id, status="FAILED" if failed else "FINISHED")


def _milliseconds(iso: str) -> int:
    from datetime import datetime

    return int(datetime.fromisoformat(iso).timestamp() * 1000)


def _parse_metrics(lines: Iterable[bytes], sent: dict[str, int]) -> Iterable[Metric]:
    """What ``sent`` (last step by metric, brought up to date here) does not cover."""
    for line in lines:
        record = json.loads(line)
        step = int(record["step"])
        timestamp_ms = int(record["time_s"] * 1000)
        for name, value in record["metrics"].items():
            if step > sent.get(name, -1):
                sent[name] = step
                yield Metric(name, float(value), timestamp_ms, step)
