"""Artefacts: manifests, fingerprints and the stage contract. See ``docs/contracts.md``."""

from components.artifacts.config import StageConfig, parse_config, wrong_values
from components.artifacts.files import (
    PROJECT,
    canonical_json,
    fsync_path,
    new_file,
    sha256_file,
    write_atomically,
    write_json,
)
from components.artifacts.manifest import (
    ArtifactError,
    FileEntry,
    Manifest,
    ParentEntry,
    ProcessPeaks,
    fingerprint,
    read_manifest,
)
from components.artifacts.once import once
from components.artifacts.processes import die_with_parent
from components.artifacts.space import no_room
from components.artifacts.stage import (
    EXIT_INTERRUPTED,
    EXIT_RETRY,
    EXIT_USER_ERROR,
    METRICS_NAME,
    StageAborted,
    StageContext,
    StageError,
    StageInterrupted,
    stage_error,
)
from components.artifacts.store import ArtifactStore, Identity, flatten

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_RETRY",
    "EXIT_USER_ERROR",
    "METRICS_NAME",
    "PROJECT",
    "ArtifactError",
    "ArtifactStore",
    "FileEntry",
    "Identity",
    "Manifest",
    "ParentEntry",
    "ProcessPeaks",
    "StageAborted",
    "StageConfig",
    "StageContext",
    "StageError",
    "StageInterrupted",
    "canonical_json",
    "die_with_parent",
    "fingerprint",
    "flatten",
    "fsync_path",
    "new_file",
    "no_room",
    "once",
    "parse_config",
    "read_manifest",
    "sha256_file",
    "stage_error",
    "write_atomically",
    "write_json",
    "wrong_values",
]
