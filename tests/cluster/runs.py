"""Small pretraining runs through the shipped sbatch: ``run = Run(folder, tokens)``, ``run.submit(cluster)``.

The earlier stages' artefacts are made by hand, so that a run is training alone: a two-layer model on two nodes of one
process each, in three training stages.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from components.artifacts import PROJECT, Manifest
from components.artifacts.manifest import collect_files
from flows.overrides import resolve
from flows.runner import Runner
from flows.stages import stage_named, upstream
from tests.cluster.machines import Cluster
from tests.pretraining.factory import BATCH, CONTEXT, VOCABULARY, run_config, stage_config
from tests.waiting import wait_for

RECIPE = "nano"
SCRIPT = "infra/slurm/pretrain.sbatch"
_SETTLED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Run:
    """One run's folder of artefacts, and its jobs.

    Args:
        folder: for artefacts and logs.
        tokens: the artefact of stage ``tokenize``, without manifest.
        steps: of each training stage.
        values: further fields of the recipe's part.
    """

    def __init__(self, folder: Path, tokens: Path, steps: int = 12, **values: Any) -> None:
        self.folder, self.root = folder, folder / "runs"
        self.root.mkdir(parents=True, exist_ok=True)
        size = steps * BATCH * CONTEXT
        stages = [
            stage_config(tokens=size),
            stage_config(tokens=size),
            stage_config(tokens=size, context=2 * CONTEXT, sequences_per_step=BATCH // 2, rope_theta=1.5e6),
        ]
        config = run_config(stages=stages, zero_stage=2, log_every_steps=1, **values)
        config["evaluation"]["position_documents"] = 0
        self.overrides = [f"pretrain.{name}={json.dumps(value)}" for name, value in config.items()]
        self.overrides.append(f"tokenize.vocab_size={VOCABULARY}")
        self.steps = 3 * steps
        self._make_parents(tokens)

    @cached_property
    def runner(self) -> Runner:
        return Runner(resolve(RECIPE, self.overrides), self.root)

    @property
    def out(self) -> Path:
        """The artefact's folder."""
        return self.runner.store.folder(self.runner.identity(stage_named("pretrain")))

    def _make_parents(self, tokens: Path) -> None:
        """The stages before pretraining, finished."""
        runner = self.runner
        for stage in upstream("pretrain")[:-1]:
            identity = runner.identity(stage)
            folder = runner.store.folder(identity)
            if stage.name == "tokenize":
                shutil.copytree(tokens, folder, dirs_exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            runner.store.write_manifest(
                folder,
                Manifest(
                    stage=stage.name,
                    stage_version=identity.stage_version,
                    recipe=RECIPE,
                    fingerprint=identity.fingerprint,
                    config=dict(identity.config),
                    parents=dict(identity.parents),
                    files=collect_files(folder),
                    metrics={},
                    code_revision="made by a test",
                    created_at=datetime.now(UTC).isoformat(),
                    duration_s=0.0,
                    peak_memory_bytes=0,
                ),
            )

    # ---------------------------------------------------------------- jobs

    def arguments(self, **values: Any) -> list[str]:
        """What follows the script's name."""
        changed = [f"pretrain.{name}={json.dumps(value)}" for name, value in values.items()]
        sets = [word for override in [*self.overrides, *changed] for word in ("--set", override)]
        return ["--root", str(self.root), *sets]

    def submit(self, cluster: Cluster, *options: str, **values: Any) -> str:
        """``sbatch`` the shipped script; the job's number."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        environment = {**kept, "PATH": path, "RECIPE": RECIPE, "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={self.folder}/pretrain-%j.log", *options]
        said = cluster.run(*command, SCRIPT, *self.arguments(**values), cwd=PROJECT, environment=environment)
        return said.strip()

    def log(self, job: str) -> str:
        """What a job has said so far."""
        path = self.folder / f"pretrain-{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def end(self, cluster: Cluster, job: str) -> str:
        """Wait for a job's end, whatever it is; its state."""

        def settled() -> str:
            state = cluster.job(job)["JobState"]
            return state if state in _SETTLED else ""

        return wait_for(settled, f"the end of job {job}")

    def logged(self) -> int:
        """The last training step in ``metrics.jsonl``."""
        path = self.out / "metrics.jsonl"
        steps = [0]
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            steps += [row["step"]] if "train/lr" in row["metrics"] else []
        return steps[-1]

    def await_step(self, step: int, cluster: Cluster, job: str) -> None:
        """Return when the run has logged a step.

        Raises:
            AssertionError: the job ended before.
        """

        def reached() -> bool:
            if self.logged() >= step:
                return True
            assert cluster.job(job)["JobState"] not in _SETTLED, self.log(job)[-3000:]
            return False

        wait_for(reached, f"step {step}")

    def saved(self) -> list[int]:
        """Steps of the checkpoints that are whole."""
        folders = (self.out / ".work" / "checkpoints").glob("step-*")
        return sorted(int(path.name[5:]) for path in folders if path.name[5:].isdigit())

    def digests(self) -> dict[str, str]:
        """SHA-256 of the finished weights, by training stage."""
        return {
            path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.out.glob("stage?/model.safetensors"))
        }
