"""Packs dialogues into rows and orders them: ``PackedRows(encoded, context, seed).batch(step, rows)``.

Rows and their order are pure functions of (dialogues, context, seed, step), so that a resumed run sees exactly what an
undisturbed one would have seen.

Legend: B rows of a batch, T tokens of a row (the context).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from components.artifacts import StageError
from components.corpus.dialogues import Encoded

IGNORED_LABEL = -100
PADDING_DOCUMENT = -1
_BUCKET_DIALOGUES = 1024


@dataclass(frozen=True)
class PackedBatch:
    """Rows ready for the model.

    Attributes:
        input_ids_BT: int64; padding holds token 0.
        document_ids_BT: int64; number of the dialogue within the row, -1 for padding. No token sees another dialogue.
        position_ids_BT: int64; restarts at 0 with every dialogue.
        labels_BT: int64, unshifted; -100 wherever no loss is wanted.
        weights_BT: float32; what a label counts in the mean over the batch, 0 where there is none.
    """

    input_ids_BT: Tensor
    document_ids_BT: Tensor
    position_ids_BT: Tensor
    labels_BT: Tensor
    weights_BT: Tensor

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        return PackedBatch(
            change(self.input_ids_BT),
            change(self.document_ids_BT),
            change(self.position_ids_BT),
            change(self.labels_BT),
            change(self.weights_BT),
        )

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry loss. A dialogue's first token never does: nothing precedes it."""
        return int((self.labels_BT != IGNORED_LABEL).sum())

    def rows(self, part: slice) -> PackedBatch:
        """Some of the rows."""
        return self._map(lambda tensor: tensor[part])

    def trimmed(self) -> PackedBatch:
        """Without the columns that are padding in every row."""
        used = int((self.document_ids_BT >= 0).any(dim=0).sum())
        return self._map(lambda tensor: tensor[:, :used])

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device))


def pack(lengths: Sequence[int], context: int, seed: int) -> list[tuple[int, ...]]:
    """Assign dialogues to rows of at most ``context`` tokens; returns dialogue numbers per row.

    Dialogues are shuffled by ``seed`` and cut into buckets of 1,024; within a bucket the longest goes first, into the
    fullest row that still has room (best-fit decreasing). Buckets keep rows mixed and the work linear.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(lengths))
    rows: list[tuple[int, ...]] = []
    for start in range(0, len(order), _BUCKET_DIALOGUES):
        bucket = sorted(order[start : start + _BUCKET_DIALOGUES].tolist(), key=lambda i: (-lengths[i], i))
        open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
        first = len(rows)
        contents: list[list[int]] = []
        for index in bucket:
            place = bisect_left(open_rows, (lengths[index], -1))
            if place == len(open_rows):
                room, row = context, first + len(contents)
                contents.append([])
            else:
                room, row = open_rows.pop(place)
            contents[row - first].append(index)
            insort(open_rows, (room - lengths[index], row))
        rows.extend(tuple(content) for content in contents)
    return rows


class PackedRows:
    """Training rows, packed once; every epoch visits all of them in a new order.

    Args:
        dialogues: encoded dialogues; longer ones than ``context`` are cut, and those left without loss are dropped.
        context: tokens of a row.
        seed: seeds packing and order.
        weighting: ``token``: every trained token counts the same; ``dialogue``: every dialogue does, so that long
            answers do not drown short ones.

    Raises:
        StageError: no dialogue is left.
    """

    def __init__(
        self,
        dialogues: Sequence[Encoded],
        context: int,
        seed: int,
        weighting: Literal["token", "dialogue"] = "token",
    ) -> None:
        self.context = context
        self._weighting = weighting
        self._seed = seed
        self.cut = sum(len(dialogue.ids) > context for dialogue in dialogues)
        cut = [dialogue.cut(context) for dialogue in dialogues]
        self.dialogues = [dialogue for dialogue in cut if any(dialogue.trained[1:])]
        self.dropped = len(cut) - len(self.dialogues)
        if not self.dialogues:
            raise StageError(
                f"no dialogue has an assistant token within the context of {context} tokens; raise posttrain.context."
            )
        self._rows = pack([len(dialogue.ids) for dialogue in self.dialogues], context, seed)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding left out."""
        return sum(len(dialogue.ids) for dialogue in self.dialogues)

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold tokens."""
        return self.tokens / (len(self) * self.context)

    def order(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The order of the rows in an epoch: int64 [rows]."""
        return np.random.default_rng([self._seed, 2, epoch]).permutation(len(self))

    def batch(self, step: int, rows_per_step: int) -> PackedBatch:
        """The rows of optimizer step ``step`` (0-based); epochs follow each other without a gap."""
        serials = range(step * rows_per_step, (step + 1) * rows_per_step)
        orders = {epoch: self.order(epoch) for epoch in {serial // len(self) for serial in serials}}
        return self.build([int(orders[serial // len(self)][serial % len(self)]) for serial in serials])

    def build(self, rows: Sequence[int]) -> PackedBatch:
        """The given rows as tensors ``[len(rows), context]``."""
        shape = (len(rows), self.context)
        ids = np.zeros(shape, dtype=np.int64)
        documents = np.full(shape, PADDING_DOCUMENT, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        for line, row in enumerate(rows):
            start = 0
            for number, index in enumerate(self._rows[row]):
                dialogue = self.dialogues[index]
                end = start + len(dialogue.ids)
                tokens = np.asarray(dialogue.ids, dtype=np.int64)
                ids[line, start:end] = tokens
                documents[line, start:end] = number
                positions[line, start:end] = np.arange(end - start)
                labels[line, start:end] = np.where(dialogue.trained, tokens, IGNORED_LABEL)
                labels[line, start] = IGNORED_LABEL
                trained = labels[line, start:end] != IGNORED_LABEL
                weights[line, start:end] = trained / (trained.sum() if self._weighting == "dialogue" else 1)
                start = end
        return PackedBatch(
            *(torch.from_numpy(array) for array in (ids, documents, positions, labels, weights))
        )

    def owners(self, row: int, value_of: Sequence[int]) -> list[int]:
        """``value_of`` of the dialogue behind each place of a row; 0 where padding is. Length: the context."""
        found = [value_of[index] for index in self._rows[row] for _ in self.dialogues[index].ids]
        return found + [0] * (self.context - len(found))
