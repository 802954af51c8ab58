"""A training of one hundred steps whose losses are kept; ``python -m tests.pretraining.golden_losses`` makes them anew.

Do that only when training is meant to change, and say why in the commit: the file is what tells an unmeant change of
data order, initial weights, losses, schedule or optimizer from rounding.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.pretraining.factory import BATCH, CONTEXT, make_tokens, run_config, stage_config

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "pretraining" / "losses.json"
STAGE_STEPS = (34, 33, 33)
NAMES = ("train/ce", "train/load_balance", "train/load_balance_global", "train/router_z", "train/grad_norm")


def golden_config(**values: Any) -> dict[str, Any]:
    """Three stages, two sequences a micro-step, four load-balance groups dealt by domain with exact counts."""
    contexts = (CONTEXT, CONTEXT, 2 * CONTEXT)
    stages = [
        stage_config(
            tokens=steps * BATCH * CONTEXT,
            context=context,
            sequences_per_step=BATCH * CONTEXT // context,
            rope_theta=1.5e6 if context > CONTEXT else 1e5,
        )
        for steps, context in zip(STAGE_STEPS, contexts, strict=True)
    ]
    return run_config(
        stages=stages,
        optimizer={"peak_lr": 3e-3, "warmup_steps": 10},
        sequences_per_micro_batch=2,
        load_balance_groups=4,
        load_balance_domains="sharded",
        load_balance_counts="exact",
        # Two layers. The losses were recorded when both router losses were means over layers, at twice these weights.
        load_balance_coef=0.025,
        router_z_coef=5e-4,
        log_every_steps=1,
        checkpoint_every_steps=1000,
        **values,
    )


def data_digest(tokens: Path) -> str:
    """SHA-256 of the training tokens, so that other data is not taken for other training."""
    digest = hashlib.sha256()
    for path in sorted((tokens / "shards" / "train").rglob("*.ds")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def logged_losses(out: Path) -> dict[str, list[float]]:
    """The run's losses by name, one per step, as logged (full precision)."""
    lines = [json.loads(line)["metrics"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    training = [metrics for metrics in lines if NAMES[0] in metrics]
    return {name: [metrics[name] for metrics in training] for name in NAMES}


def main() -> None:
    """Train and write the file."""
    from tests.pretraining.children import train

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokens = make_tokens(folder / "tokens")
        train(tokens, folder / "out", golden_config(), folder / "answer.json")
        payload = {"tokens_sha256": data_digest(tokens), "losses": logged_losses(folder / "out")}
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(json.dumps(payload, indent=1) + "\n")


if __name__ == "__main__":
    main()
