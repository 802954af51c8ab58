"""torch compiles for each training stage once, and never falls back to uncompiled code without a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.pretraining.factory import STAGE_STEPS

PROJECT = Path(__file__).parents[2]


def job(tokens: Path, out: Path, limit: int = 0) -> dict[str, Any]:
    """Three training stages with compiled layers; ``limit``: kinds of input, 0 for the product's."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.pretraining.compile_job",
        str(tokens),
        str(out),
        str(limit),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_nothing_is_compiled_after_a_training_stages_first_step_and_evaluation(
    tokens: Path, tmp_path: Path
) -> None:
    result = job(tokens, tmp_path / "out")
    assert result["error"] is None
    moments = set(result["graphs"])
    # Both contexts need graphs of their own, of training and of evaluation; the second stage is shaped as the first.
    assert moments == {"stage1:start", "step 0", "stage3:start", f"step {2 * STAGE_STEPS}"}
    assert not any("compiled" in note for note in result["notes"])
    # More than torch's own limit of 8: the norms and the attention of two kinds of layers, twice over.
    assert len(result["graphs"]) > 8


def test_too_many_kinds_of_input_end_the_run_with_a_sentence(tokens: Path, tmp_path: Path) -> None:
    result = job(tokens, tmp_path / "out", limit=4)
    assert result["error"].startswith("Attention.forward was to be compiled for more than 4 kinds of input")
    assert "TORCH_LOGS=recompiles" in result["error"] and "pretrain.compile_layers=false" in result["error"]
    assert result["graphs"][-1] == "stage3:start"  # the shapes of two training stages fit
    assert (tmp_path / "out" / ".work").is_dir()
