"""Held-out loss of dialogues: ``split_dialogues(...)`` and ``dialogue_loss(model, rows, groups)``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from components.artifacts import canonical_json
from components.corpus.dialogues import Dialogue, Encoded
from components.posttraining.packing import IGNORED_LABEL, PackedRows
from components.posttraining.training import assistant_losses
from model import SmallThinkerForCausalLM


def is_held_out(dialogue: Dialogue, percent: int) -> bool:
    """Whether a dialogue is kept from training: by SHA-256 of its messages, so equal dialogues stay together."""
    digest = hashlib.sha256(canonical_json(list(dialogue.messages)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < percent


def split_dialogues(
    dialogues: Sequence[Dialogue], percent: int, limit: int
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Training dialogues, and up to ``limit`` held-out ones in the file's order.

    Held-out dialogues beyond the limit are not trained on either.
    """
    held = [dialogue for dialogue in dialogues if is_held_out(dialogue, percent)]
    kept = [dialogue for dialogue in dialogues if not is_held_out(dialogue, percent)]
    stride = max(1, -(-len(held) // limit))  # spread over the file, which may be sorted by task
    return kept, held[::stride]


@dataclass(frozen=True)
class DialogueLoss:
    """Mean loss of assistant tokens, in nats: over all of them, and per task."""

    nats_per_token: float
    tokens: int
    by_task: dict[str, float]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {"nats_per_token": self.nats_per_token, "tokens": self.tokens, "by_task": self.by_task}


@torch.inference_mode()
def dialogue_loss(
    model: SmallThinkerForCausalLM,
    dialogues: Sequence[tuple[str, Encoded]],
    context: int,
    rows_per_batch: int,
) -> DialogueLoss:
    """Loss of (task, dialogue) pairs, packed as in training.

    Raises:
        StageError: no dialogue has an assistant token within the context.
    """
    fitting = [(task, encoded) for task, encoded in dialogues if any(encoded.trained[1:context])]
    rows = PackedRows([encoded for _, encoded in fitting], context, seed=0)
    tasks = sorted({task for task, _ in fitting})
    task_of = [tasks.index(task) for task, _ in fitting]
    device = next(model.parameters()).device
    nats = torch.zeros(len(tasks), dtype=torch.float64)
    counts = torch.zeros(len(tasks), dtype=torch.int64)
    was_training = model.training
    model.train(False)
    try:
        for start in range(0, len(rows), rows_per_batch):
            numbers = range(start, min(start + rows_per_batch, len(rows)))
            batch = rows.build(numbers).trimmed()
            width = batch.input_ids_BT.shape[1]
            task_BT = torch.tensor([rows.owners(row, task_of)[:width] for row in numbers])
            task_S = task_BT[:, 1:][batch.labels_BT[:, 1:] != IGNORED_LABEL]
            losses = assistant_losses(model, batch.to(device))
            nats.index_add_(0, task_S, losses.nats_N.double().cpu())
            counts.index_add_(0, task_S, torch.ones_like(task_S))
    finally:
        model.train(was_training)
    return DialogueLoss(
        float(nats.sum()) / int(counts.sum()),
        int(counts.sum()),
        {task: float(nats[i]) / int(counts[i]) for i, task in enumerate(tasks) if int(counts[i])},
    )
