"""Models in MLflow: every kept model folder becomes a LoggedModel, and aliases move through gates that record why."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException

from components.artifacts import Identity, Manifest

_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".onnx")


class ModelRegistry:
    """LoggedModels and the registered model of one pipeline.

    Weights are referenced by path and SHA-256, not copied: they may be large, and the manifest vouches for them.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, name: str) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self.name = name

    def log_models(self, run_id: str, identity: Identity, folder: Path, manifest: Manifest) -> None:
        """Create a LoggedModel for every folder of the artefact that holds weights."""
        by_folder: dict[str, dict[str, str]] = {}
        for name, entry in manifest.files.items():
            if name.endswith(_WEIGHT_SUFFIXES):
                by_folder.setdefault(str(Path(name).parent), {})[name] = entry.sha256
        for subfolder, weights in by_folder.items():
            label = subfolder.replace("/", "-").replace(".", "root")
            model = self._client.create_logged_model(
                experiment_id=self._experiment_id,
                name=f"{identity.recipe}-{identity.stage}-{label}",
                source_run_id=run_id,
                tags={
                    "uri": (folder / subfolder).as_uri(),
                    "fingerprint": identity.fingerprint,
                    "stage": identity.stage,
                    "weights_sha256": json.dumps(weights)[:4900],
                },
                model_type="smallthinker",
            )
            self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            metrics = [
                Metric(name, value, 0, 0, model_id=model.model_id, run_id=run_id)
                for name, value in manifest.metrics.items()
            ]
            if metrics:
                self._client.log_batch(run_id, metrics=metrics)

    def add_version(self, run_id: str, identity: Identity, folder: Path, manifest: Manifest) -> str:
        """Register the artefact as a version of this pipeline's model; the same fingerprint keeps its version."""
        try:
            self._client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self._client.search_model_versions(f"name = '{self.name}'"):
            if version.tags.get("fingerprint") == identity.fingerprint:
                return str(version.version)
        with tempfile.TemporaryDirectory() as temporary:
            reference = Path(temporary) / "model_reference.json"
            weights = {
                name: entry.sha256
                for name, entry in manifest.files.items()
                if name.endswith(_WEIGHT_SUFFIXES)
            }
            reference.write_text(json.dumps({"uri": folder.as_uri(), "weights_sha256": weights}, indent=2))
            self._client.log_artifact(run_id, str(reference), "registered")
        artifact_uri = self._client.get_run(run_id).info.artifact_uri
        version = self._client.create_model_version(
            self.name,
            source=f"{artifact_uri}/registered",
            run_id=run_id,
            tags={"fingerprint": identity.fingerprint, "uri": folder.as_uri()},
        )
        return str(version.version)

    def gate(self, alias: str, version: str, metric: str, value: float, higher_is_better: bool = True) -> str:
        """Move ``alias`` to ``version`` when its metric is at least as good as the present holder's.

        Returns the recorded reason, also kept as a tag of the version.
        """
        tag = f"{alias}.{metric}"
        try:
            holder = self._client.get_model_version_by_alias(self.name, alias)
        except MlflowException:
            holder = None
        previous = float(holder.tags[tag]) if holder is not None and tag in holder.tags else None
        better = previous is None or (value >= previous if higher_is_better else value <= previous)
        self._client.set_model_version_tag(self.name, version, tag, repr(value))
        if holder is not None and str(holder.version) == version:
            reason = f"{alias} stays at version {version}: {metric} {value:.4g}"
        elif better:
            before = (
                "no holder before"
                if previous is None or holder is None
                else (f"version {holder.version} had {previous:.4g}")
            )
            reason = f"{alias} moves to version {version}: {metric} {value:.4g}, {before}"
            self._client.set_registered_model_alias(self.name, alias, version)
        else:
            assert holder is not None and previous is not None
            reason = (
                f"{alias} stays at version {holder.version}: {metric} {previous:.4g}, "
                f"version {version} has {value:.4g}"
            )
        self._client.set_model_version_tag(self.name, version, f"gate.{alias}", reason)
        return reason
