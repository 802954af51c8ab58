"""Shows what one step of a run trained on and what it did.

``python -m components.pretraining.studies.replay FOLDER --step N``: FOLDER is the artefact's folder of a run that has
not finished (checkpoints go with the scratch when it has). The newest whole checkpoint at or before step N gives the
weights; forward and backward run over exactly step N's batch, in one process, without touching the run. stdout: one
line of JSON per sequence, then one per group of parameters.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from components.artifacts import EXIT_USER_ERROR, StageError
from components.corpus.categories import CATEGORIES
from components.pretraining.checkpoints.progress import RUN_NAME
from components.pretraining.checkpoints.resharding import convert, parameter_folder, trainer_state
from components.pretraining.config import PretrainConfig
from components.pretraining.data.batches import BatchSource, MicroBatch
from components.pretraining.training.balance_bias import BalanceBias
from components.pretraining.training.head_loss import token_losses
from components.pretraining.training.training_step import training_loss
from components.weights.checkpoint_store import Checkpoint, CheckpointStore

_SHOWN_TOKENS = 32


@dataclass(frozen=True)
class SequenceReport:
    """One sequence of the batch.

    Attributes:
        row: its place in the global batch.
        loss: mean over its tokens, in nats; ``nan`` and ``inf`` are possible.
        largest: the largest loss of a single token.
        category: what kind of text it is.
        first_token: where it begins in its category's tokens.
        text: its decoded beginning.
    """

    row: int
    loss: float
    largest: float
    category: str
    first_token: int
    text: str


class Replay:
    """A run's weights at a checkpoint, and the batch of a step.

    Args:
        folder: the artefact's folder.
        step: the step (0-based, as in the guard's message).

    Raises:
        StageError: there is no such run, step or checkpoint.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from components.corpus.shards import TOKENIZER_FOLDER, TokenShards
        from components.pretraining.architecture import model_config
        from model import SmallThinkerForCausalLM

        scratch = folder / ".work"
        path = scratch / RUN_NAME
        if not path.is_file():
            raise StageError(
                f"{path} is missing: {folder} is no unfinished run (a finished one has no checkpoints)."
            )
        run = json.loads(path.read_text())
        self.config = PretrainConfig.model_validate(run["config"])
        if not 0 <= step < self.config.total_steps:
            raise StageError(f"--step is {step}; the run has steps 0 to {self.config.total_steps - 1}.")
        shards = TokenShards.open(Path(run["tokens"]))
        streams = {name: shards.shard("train", name) for name in shards.categories("train")}
        self._source = BatchSource(self.config, streams, shards.eos_id)
        self._span = self._source.curriculum.at(step)
        self._tokenizer = Tokenizer.from_file(str(Path(run["tokens"]) / TOKENIZER_FOLDER / "tokenizer.json"))
        self.step = step
        self._bias = BalanceBias(
            self.config.load_balance_bias_rate, self.config.load_balance_bias_fade, self.config.total_steps
        )
        self.checkpoint, self.complaints = CheckpointStore(scratch / "checkpoints", 1).newest(at_most=step)
        if self.checkpoint is None:
            raise StageError(
                f"No whole checkpoint at or before step {step} is left in {scratch / 'checkpoints'}; "
                "keep_checkpoints decides how many are kept."
            )
        architecture = model_config(self.config, shards)
        architecture.rope_theta = self._span.stage.rope_theta
        with torch.device("meta"):
            self.model = SmallThinkerForCausalLM(architecture)
        self._load(self.checkpoint)

    def _load(self, checkpoint: Checkpoint) -> None:
        """The fp32 master weights, rounded to the run's precision as the engine does; whatever the processes were."""
        from model import LoadBalance

        dtype = torch.bfloat16 if checkpoint.mesh["precision"] == "bf16" else torch.float32
        weights: dict[str, torch.Tensor] = {}
        with tempfile.TemporaryDirectory() as place:
            universal = Path(place) / "step"
            convert(checkpoint.path, universal)
            self._bias.load_state(trainer_state(universal)["balance_bias"])
            for name, _ in self.model.named_parameters():
                source = parameter_folder(universal, name)
                if source is None:
                    raise StageError(f"The checkpoint {checkpoint.path.name} has no parameter {name}.")
                weights[name] = torch.load(source / "fp32.pt", weights_only=False)["param"].to(dtype)
        self.model.load_state_dict(weights, strict=False, assign=True)
        self.model.tie_weights()
        self.model.balance = LoadBalance(None)
        self.model.set_router_fp32(self.config.router_dtype == "fp32")
        self._bias.apply(self.model, self.step)

    def sequences(self) -> Iterator[SequenceReport]:
        """Forward and backward over the batch; gradients of its mean loss gather in the model."""
        sequences = self._source.sequences(self.step)
        groups = self._source.rank_groups(self.step, 0, 1)  # one process takes the rows in order
        row = 0
        self.model.train()
        self.model.zero_grad()
        for group in groups:
            if self.config.load_balance_counts == "exact":
                with torch.no_grad(), self.model.balance.counting():
                    for batch in group:
                        self._forward(batch)
            for batch in group:
                if not batch.rows:
                    continue
                out = self._forward(batch)
                losses_BT = token_losses(out.logits[: batch.rows], batch.labels_BT[: batch.rows])
                loss = training_loss(losses_BT.mean(), out, self.config)
                (loss * batch.rows / len(sequences.start_B)).backward()
                for losses_T, ids_T in zip(losses_BT.detach(), batch.input_ids_BT[: batch.rows], strict=True):
                    yield SequenceReport(
                        row=row,
                        loss=float(losses_T.mean()),
                        largest=float(losses_T.max()),
                        category=CATEGORIES[sequences.category_B[row]],
                        first_token=int(sequences.start_B[row]),
                        text=self._tokenizer.decode(
                            ids_T[:_SHOWN_TOKENS].tolist(), skip_special_tokens=False
                        ),
                    )
                    row += 1
            self.model.balance.reset()

    def _forward(self, batch: MicroBatch) -> Any:
        return self.model(input_ids=batch.input_ids_BT, document_ids=batch.document_ids_BT, use_cache=False)

    def gradient_norms(self) -> dict[str, float]:
        """After :meth:`sequences`: norm of the gradients by layer, outside the layers, and ``total``."""
        squares: dict[str, float] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                continue
            parts = name.split(".")
            group = f"layer{int(parts[2]):02d}" if parts[1] == "layers" else name.removesuffix(".weight")
            square = float(parameter.grad.double().square().sum())
            squares[group] = squares.get(group, 0.0) + square
        norms = {group: square**0.5 for group, square in squares.items()}
        return {**norms, "total": sum(squares.values()) ** 0.5}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the replay; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the pretrain artefact")
    parser.add_argument("--step", type=int, required=True, help="step, as in the guard's message")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed only converts the checkpoint
    try:
        replay = Replay(arguments.folder, arguments.step)
    except StageError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USER_ERROR
    assert replay.checkpoint is not None
    for sentence in replay.complaints:
        sys.stderr.write(f"{sentence}\n")
    sys.stderr.write(f"weights of step {replay.checkpoint.step}, batch of step {replay.step}\n")
    for report in replay.sequences():
        sys.stdout.write(json.dumps(vars(report), ensure_ascii=False) + "\n")
    for group, norm in replay.gradient_norms().items():
        sys.stdout.write(json.dumps({"parameters": group, "gradient_norm": norm}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
