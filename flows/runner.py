"""Runs stages in order, skipping what is finished and saying why anything is not.

``Runner(recipe, root).run_stage(stage)`` builds one artefact; ``flows.pipeline`` runs them in order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
from tqdm import tqdm

from components.artifacts import (
    METRICS_NAME,
    PROJECT,
    ArtifactError,
    ArtifactStore,
    Identity,
    Manifest,
    ParentEntry,
    ProcessPeaks,
    StageError,
    fingerprint,
    read_manifest,
    stage_error,
)
from components.artifacts.manifest import code_revision, collect_files
from components.artifacts.verification import file_system_time_ns, remember
from flows.stages import STAGES, Stage, stage_named

if TYPE_CHECKING:
    from flows.recipes import Recipe

_POLL_S = 0.5
# Grace period after SIGTERM; a stage whose config has save_grace_s sets its own.
_GRACE_S = 30.0
# On top of the stage's own grace period, since the stage itself waits for its worker processes.
_MARGIN_S = 5.0


class PreflightError(StageError):
    """The machine lacks something that the plan needs; nothing was started."""


class Observer(Protocol):
    """Receives the events of a run, for tracking. Stages never call it; the runner does."""

    def stage_started(self, identity: Identity, folder: Path) -> None: ...
    def metrics_written(self, identity: Identity, folder: Path) -> None: ...
    def stage_finished(self, identity: Identity, folder: Path, manifest: Manifest, cached: bool) -> None: ...
    def stage_failed(self, identity: Identity, folder: Path, message: str) -> None: ...


def _function(name: str) -> Any:
    module, function = name.split(":")
    return getattr(import_module(module), function)


@dataclass(frozen=True)
class PlannedStage:
    """One line of the plan: what will happen to a stage, and why."""

    stage: Stage
    identity: Identity
    finished: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class StageOutcome:
    """A finished artefact: freshly built, or found (``cached``)."""

    stage: Stage
    identity: Identity
    folder: Path
    manifest: Manifest
    cached: bool


@dataclass
class Runner:
    """Builds artefacts of one recipe below ``root``.

    Attributes:
        recipe: what to build.
        root: folder of all artefacts (``runs``); downloads are cached in ``root/cache``.
        observer: receives the events of every stage, or ``None``.
        say: where sentences for the user go.
        rebuild: stages whose finished artefacts are set aside first.
    """

    recipe: Recipe
    root: Path
    observer: Observer | None = None
    say: Callable[[str], None] = lambda sentence: print(sentence, file=sys.stderr)  # noqa: T201
    rebuild: Sequence[str] = ()
    store: ArtifactStore = field(init=False)
    _untold: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self.store = ArtifactStore(self.root)

    def identity(self, stage: Stage) -> Identity:
        """The identity of a stage's artefact, from its config and its parents' identities."""
        parents = {
            role: ParentEntry(stage=name, fingerprint=self.identity(stage_named(name)).fingerprint)
            for role, name in stage.parents.items()
        }
        config = self.recipe.part(stage.name)
        placement = self.recipe.placement(stage.name)
        deciding = {name: value for name, value in config.items() if name not in placement}
        return Identity(
            recipe=self.recipe.name,
            stage=stage.name,
            stage_version=stage.version,
            config=config,
            parents=parents,
            fingerprint=fingerprint(stage.name, stage.version, deciding, parents),
            placement=placement,
        )

    def plan(self, stages: Sequence[Stage] = STAGES) -> list[PlannedStage]:
        """What would happen, without doing it."""
        planned = []
        for stage in stages:
            identity = self.identity(stage)
            finished = self.store.finished(identity) is not None and stage.name not in self.rebuild
            reasons = () if finished else tuple(self.store.why_stale(identity))
            planned.append(PlannedStage(stage, identity, finished, reasons))
        return planned

    def preflight(self, planned: Sequence[PlannedStage]) -> None:
        """Ask every stage that will run what it lacks, before anything starts.

        Raises:
            PreflightError: something is missing; all of it is named.
        """
        problems = []
        for entry in planned:
            if entry.finished or not entry.stage.preflight:
                continue
            check: Callable[[Any], list[str]] = _function(entry.stage.preflight)
            problems += [
                f"{entry.stage.name}: {line}" for line in check(getattr(self.recipe, entry.stage.name))
            ]
        if problems:
            raise PreflightError("nothing was started, because\n  " + "\n  ".join(problems))

    def describe(self, planned: Sequence[PlannedStage]) -> None:
        """Say the plan: one line per stage, and what a stage that will run on GPUs will cost."""
        for entry in planned:
            state = "finished" if entry.finished else "to run: " + "; ".join(entry.reasons[:4])
            self.say(f"  {entry.stage.name:<11} {state}")
            if entry.stage.cost and not entry.finished:
                describe_cost: Callable[[Any], str] = _function(entry.stage.cost)
                for line in describe_cost(getattr(self.recipe, entry.stage.name)).splitlines():
                    self.say(f"{'':<14}{line}")

    def run_stage(self, stage: Stage) -> StageOutcome:
        """Build one stage unless it is finished; its parents must be.

        Raises:
            StageError: the stage cannot go on.
            ArtifactError: a finished artefact is damaged.
        """
        identity = self.identity(stage)
        folder = self.store.folder(identity)
        waiting = f"{stage.name}: another run is building the same artefact; waiting for it"
        with self.store.lock(identity, on_wait=lambda: self.say(waiting)) as lock_descriptor:
            if stage.name in self.rebuild:
                aside = self.store.set_aside(identity)
                self.rebuild = [name for name in self.rebuild if name != stage.name]
                if aside is not None:
                    self.say(f"{stage.name}: set aside {aside}")
            manifest = self.store.finished(identity)
            cached = manifest is not None
            if manifest is None:
                manifest = self._build(stage, identity, folder, lock_descriptor)
            self._tell("stage_finished", identity, folder, manifest, cached)
        return StageOutcome(stage, identity, folder, manifest, cached)

    def _tell(self, event: str, *arguments: Any) -> None:
        """Tell the observer; what fails there (a full disk, a server that is gone) is said once and stops nothing."""
        if self.observer is None:
            return
        try:
            getattr(self.observer, event)(*arguments)
        except Exception as error:
            if event not in self._untold:
                self._untold.add(event)
                self.say(f"warning: tracking failed at {event} ({_first_line(error)}); the run goes on")

    def _build(self, stage: Stage, identity: Identity, folder: Path, lock_descriptor: int) -> Manifest:
        inputs = {}
        for role, name in stage.parents.items():
            parent = self.identity(stage_named(name))
            self._check(parent)
            inputs[role] = self.store.folder(parent)
        self.say(f"{stage.name}: running ({'; '.join(self.store.why_stale(identity)[:4])})")
        folder.mkdir(parents=True, exist_ok=True)
        self._tell("stage_started", identity, folder)
        started = time.monotonic()
        try:
            result, peak_bytes = self._run_process(stage, identity, folder, inputs, lock_descriptor)
        except StageError as error:
            self._tell("stage_failed", identity, folder, str(error))
            raise
        peaks = ProcessPeaks(**result["peaks"]) if result["peaks"] else None
        if peaks is not None:
            # What runs on other machines, or as a scheduler's child, is not among this process's descendants.
            peak_bytes = max(peak_bytes, peaks.host_bytes_sum)
        began_ns = file_system_time_ns(folder)
        manifest = Manifest(
            stage=stage.name,
            stage_version=identity.stage_version,
            recipe=self.recipe.name,
            fingerprint=identity.fingerprint,
            config=dict(identity.config),
            parents=dict(identity.parents),
            files=collect_files(folder),
            metrics=result["metrics"],
            notes=result["notes"],
            code_revision=code_revision(PROJECT),
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            duration_s=round(time.monotonic() - started, 3),
            peak_memory_bytes=peak_bytes,
            process_peaks=peaks,
        )
        self.store.write_manifest(folder, manifest)
        remember(folder, manifest.files, began_ns)
        headline = ", ".join(f"{name} {value:.4g}" for name, value in list(manifest.metrics.items())[:5])
        self.say(
            f"{stage.name}: finished in {manifest.duration_s:.0f} s, "
            f"peak {peak_bytes / 2**30:.2f} GiB{f' ({headline})' if headline else ''}"
        )
        return manifest

    def _check(self, parent: Identity) -> None:
        """Check an artefact that a stage is about to read, and say what was not read of it."""
        check = self.store.verify(parent)
        if check is not None and check.unread:
            self.say(
                f"{parent.stage}: {len(check.unread)} of {len(check.whole) + len(check.sampled)} files are too large "
                "to read whole at a start, and nobody has here: only samples of them were compared. --verify reads "
                "everything"
            )

    def verify(self, stages: Sequence[Stage] = STAGES) -> None:
        """Read every byte of the finished artefacts of ``stages`` and compare it with their manifests.

        Raises:
            ArtifactError: something is damaged; every artefact was read before this is said.
        """
        damaged = []
        for stage in stages:
            identity = self.identity(stage)
            manifest = read_manifest(self.store.folder(identity))
            if manifest is None:
                self.say(f"  {stage.name:<11} not finished")
                continue
            size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
            with tqdm(
                total=size_bytes, desc=stage.name, unit="B", unit_scale=True, file=sys.stderr, disable=None
            ) as bar:
                try:
                    self.store.verify_whole(identity, bar.update)
                except ArtifactError as error:
                    damaged.append(str(error))
                    continue
            self.say(
                f"  {stage.name:<11} {len(manifest.files)} files, {size_bytes / 1e9:,.1f} GB: as its manifest says"
            )
        if damaged:
            raise ArtifactError("\n  ".join(damaged))

    def _run_process(
        self, stage: Stage, identity: Identity, folder: Path, inputs: dict[str, Path], lock_descriptor: int
    ) -> tuple[dict[str, Any], int]:
        request = {
            "module": stage.module,
            "stage": stage.name,
            "recipe": self.recipe.name,
            "config": identity.config,
            "inputs": {role: str(path) for role, path in inputs.items()},
            "out": str(folder),
            "cache": str(self.root / "cache"),
        }
        reader, writer = os.pipe()
        with os.fdopen(reader) as result_pipe:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "flows.stage_process", json.dumps(request), str(writer)],
                    cwd=PROJECT,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # data would go to stdout; stages only report, on stderr
                    pass_fds=(writer, lock_descriptor),
                )
            finally:
                os.close(writer)
            peak_bytes = self._watch(process, identity, folder)
            text = result_pipe.read()
        result: dict[str, Any] = json.loads(text) if text else {}
        if process.returncode == 0 and "metrics" in result:
            return result, peak_bytes
        if process.returncode > 0 and "error" in result:
            raise stage_error(process.returncode, f"{stage.name}: {result['error']}")
        how = f"was killed by signal {-process.returncode}" if process.returncode < 0 else "failed"
        raise StageError(
            f"{stage.name}: the stage's process {how} (exit code {process.returncode}; its output is above). "
            "What it had finished is kept: run the same command again to go on"
        )

    def _watch(self, process: subprocess.Popen[bytes], identity: Identity, folder: Path) -> int:
        """Wait for the stage, passing its metrics on; returns the peak memory of its process tree in bytes."""
        peak_bytes = 0
        try:
            root = psutil.Process(process.pid)
            while process.poll() is None:
                peak_bytes = max(peak_bytes, _tree_memory_bytes(root))
                if (folder / METRICS_NAME).is_file():
                    self._tell("metrics_written", identity, folder)
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        except psutil.NoSuchProcess:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(float(identity.config.get("save_grace_s", _GRACE_S)) + _MARGIN_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        return peak_bytes


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _tree_memory_bytes(root: psutil.Process) -> int:
    """Proportional memory (PSS) of a process and its descendants, in bytes: shared pages count once."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            info = process.memory_full_info()
            total += int(getattr(info, "pss", info.rss))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return total


def finished_manifests(runner: Runner) -> list[tuple[Path, Manifest]]:
    """The finished artefacts of the runner's recipe, in pipeline order; for the report."""
    found = []
    for stage in STAGES:
        folder = runner.store.folder(runner.identity(stage))
        manifest = read_manifest(folder)
        if manifest is not None:
            found.append((folder, manifest))
    return found
