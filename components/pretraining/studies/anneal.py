"""An anneal from any checkpoint of a run: the settings of a run that begins there and lets the learning rate fall.

``python -m components.pretraining.studies.anneal RUN --step 1200 --tokens 300000 --mixture maths=0.5,code=0.5`` prints
them one a line, for ``xargs -d '\\n' python -m flows.pipeline --recipe nano --until pretrain``. RUN is the folder of a
pretrain artefact whose checkpoints are still there. The new run has weights and moments of that step, the learning rate
of that step, which falls to ``--final-lr-ratio`` of it over ``--tokens``, and the model's shape at that step; its data
are drawn anew with ``--mixture``, so it may see windows again that the first run saw.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.artifacts import EXIT_USER_ERROR, StageError
from components.pretraining.checkpoints.branch import identity
from components.pretraining.checkpoints.progress import RUN_NAME
from components.pretraining.config import PretrainConfig
from components.pretraining.data.curriculum import Curriculum


def anneal_settings(
    run: Path,
    step: int,
    tokens: int,
    mixture: Mapping[str, float],
    final_lr_ratio: float = 0.0,
    shape: str = "linear",
) -> dict[str, Any]:
    """The fields of :class:`PretrainConfig` in which the anneal differs from its recipe.

    Args:
        run: folder of the artefact whose checkpoint it begins at.
        step: of the checkpoint.
        tokens: over which the rate falls; a third of them makes each of the three training stages.
        mixture: share by category.
        final_lr_ratio: last learning rate over that of the checkpoint.
        shape: of the decay.

    Raises:
        StageError: there is no such run or checkpoint.
    """
    path = run / ".work" / RUN_NAME
    if not path.is_file():
        raise StageError(
            f"{path} is missing: {run} is no unfinished run (a finished one has no checkpoints)."
        )
    config = PretrainConfig.model_validate(json.loads(path.read_text())["config"])
    curriculum = Curriculum(config)
    if not 0 < step <= curriculum.total_steps:
        raise StageError(
            f"--step is {step}; the run has checkpoints of steps 1 to {curriculum.total_steps} at most."
        )
    checkpoint = (run / ".work" / "checkpoints" / f"step-{step:08d}").resolve()
    stage = {
        **curriculum.at(step - 1).stage.model_dump(mode="json"),
        "tokens": -(-tokens // 3),
        "mixture": dict(mixture),
    }
    optimizer = {
        **config.optimizer.model_dump(mode="json"),
        "schedule": "wsd",
        "warmup_steps": 0,
        "peak_lr": curriculum.learning_rate(step - 1),
        "decay_share": 1.0,
        "decay_shape": shape,
        "final_lr_ratio": final_lr_ratio,
    }
    return {
        "branch": {"checkpoint": str(checkpoint), "identity": identity(checkpoint)},
        "model": config.model.model_dump(mode="json"),
        "stages": [stage] * 3,
        "optimizer": optimizer,
        "seed": config.seed + 1,
    }


def _mixture(text: str) -> dict[str, float]:
    pairs = (part.partition("=") for part in text.split(","))
    return {name: float(share) for name, _, share in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the settings; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of the pretrain artefact to branch from"
    )
    parser.add_argument("--step", type=int, required=True, help="step of its checkpoint")
    parser.add_argument("--tokens", type=int, required=True, help="tokens over which the rate falls")
    parser.add_argument("--mixture", type=_mixture, required=True, help="CATEGORY=SHARE,… that sum to 1")
    parser.add_argument("--final-lr-ratio", type=float, default=0.0, help="last rate over the checkpoint's")
    parser.add_argument("--shape", choices=("linear", "1-sqrt"), default="linear", help="of the decay")
    given = parser.parse_args(argv)
    try:
        settings = anneal_settings(
            given.run, given.step, given.tokens, given.mixture, given.final_lr_ratio, given.shape
        )
    except StageError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USER_ERROR
    for field, value in settings.items():
        sys.stdout.write(f"--set\npretrain.{field}={json.dumps(value)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
