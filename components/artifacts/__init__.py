"""Artefacts: manifests, fingerprints and the stage contract. See ``docs/contracts.md``."""

from components.artifacts.manifest import (
    ArtifactError,
    FileEntry,
    Manifest,
    ParentEntry,
    StageConfig,
    canonical_json,
    fingerprint,
    read_manifest,
    sha256_file,
    verify_files,
    write_atomically,
    write_json,
)
from components.artifacts.processes import die_with_parent
from components.artifacts.stage import METRICS_NAME, StageContext, StageError
from components.artifacts.store import ArtifactStore, Identity, flatten

__all__ = [
    "METRICS_NAME",
    "ArtifactError",
    "ArtifactStore",
    "FileEntry",
    "Identity",
    "Manifest",
    "ParentEntry",
    "StageConfig",
    "StageContext",
    "StageError",
    "canonical_json",
    "die_with_parent",
    "fingerprint",
    "flatten",
    "read_manifest",
    "sha256_file",
    "verify_files",
    "write_atomically",
    "write_json",
]
