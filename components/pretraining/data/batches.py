"""Training batches from token shards: ``BatchSource(...).rank_groups(step, rank, world)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from components.corpus.categories import CATEGORIES
from components.pretraining.config import PretrainConfig
from components.pretraining.data.accumulation import BatchCut
from components.pretraining.data.curriculum import Curriculum
from components.pretraining.data.ordering import SequenceOrder, Sequences, effective_mixture
from model.masks import document_ids


class TokenStream(Protocol):
    """The tokens of one category, however they are stored; ``components.corpus.shards.Shard`` is one."""

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
        """Tokens ``[start, start + count)``."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass's input.

    Attributes:
        input_ids_BT: int64.
        document_ids_BT: int64; number of the packed document that each position belongs to, counted per row.
            ``<|endoftext|>`` opens a document here: as a *target* it closes the previous document, as an *input* it
            is the first position of the next, so that first words are learned and nothing is left out of the loss.
        labels_BT: ``input_ids`` again (the model shifts).
        category_B: index into ``CATEGORIES`` of every row.
        padding: how many of the last rows are padding, of documents -1. They are there so that all passes have the
            same shape, and count for nothing.
    """

    input_ids_BT: torch.Tensor
    document_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    category_B: torch.Tensor
    padding: int = 0

    @property
    def rows(self) -> int:
        """Rows that are no padding; they come first."""
        return len(self.category_B) - self.padding

    def pinned(self) -> MicroBatch:
        """The same in pinned memory, from where copies to a GPU run beside its work."""
        input_ids_BT = self.input_ids_BT.pin_memory()
        return MicroBatch(
            input_ids_BT,
            self.document_ids_BT.pin_memory(),
            input_ids_BT,
            self.category_B.pin_memory(),
            self.padding,
        )


class BatchSource:
    """Batches as a pure function of (config, shards, step).

    Args:
        config: the recipe's part.
        streams: the training split's tokens by category.
        eos_id: id of ``<|endoftext|>``.

    Raises:
        StageError: a mixture wants what the shards do not hold.
    """

    def __init__(self, config: PretrainConfig, streams: Mapping[str, TokenStream], eos_id: int) -> None:
        self._config = config
        self._streams = dict(streams)
        self._eos_id = eos_id
        self.curriculum = Curriculum(config)
        available = {name: len(stream) for name, stream in streams.items()}
        self.absent: dict[str, list[str]] = {}
        mixtures = []
        for span in self.curriculum.spans:
            mixture, absent = effective_mixture(span, available, config.absent_category)
            mixtures.append(mixture)
            if absent:
                self.absent[span.name] = absent
        self.mixtures = tuple(mixtures)
        self.order = SequenceOrder(config.seed, self.curriculum, self.mixtures, available)

    def sequences(self, step: int) -> Sequences:
        """What step ``step`` trains on, in the order in which rows are assigned to groups and ranks."""
        sequences = self.order.step(step)
        if self._config.load_balance_domains == "mixed":
            return sequences
        by_category = np.argsort(sequences.category_B, kind="stable")
        return Sequences(sequences.category_B[by_category], sequences.start_B[by_category])

    def read(self, sequences: Sequences, context: int) -> torch.Tensor:
        """The tokens of ``sequences``: int64 ``[B, context]``."""
        return self._begin(sequences, context, None)()

    def _begin(
        self, sequences: Sequences, context: int, readers: Executor | None
    ) -> Callable[[], torch.Tensor]:
        """Begin to :meth:`read` with ``readers``, if there are any; the call of what this returns ends it."""
        rows = np.empty((len(sequences.start_B), context), dtype=np.int64)

        def fill(row: int) -> None:
            category, start = CATEGORIES[sequences.category_B[row]], int(sequences.start_B[row])
            rows[row] = self._streams[category].read(start, context)

        filled = map(fill, range(len(rows))) if readers is None else readers.map(fill, range(len(rows)))

        def end() -> torch.Tensor:
            for _ in filled:
                pass
            return torch.from_numpy(rows)

        return end

    def rank_groups(
        self, step: int, rank: int, world: int, readers: Executor | None = None
    ) -> list[list[MicroBatch]]:
        """Rank ``rank``'s micro-batches of a step, in order, by load-balance group; see :class:`BatchCut`.

        ``readers`` read rows side by side.
        """
        span = self.curriculum.at(step)
        sequences = self.sequences(step)
        cut = BatchCut.of(self._config, span.index, world)
        result = [
            [
                self._micro_batch(
                    sequences, cut.rows(rank, turn, number), cut.micro_batch, span.stage.context, readers
                )
                for number in range(cut.micro_steps_per_group)
            ]
            for turn in range(cut.turns)
        ]
        # All reads have begun before the first one is waited for.
        return [[end() for end in group] for group in result]

    def _micro_batch(
        self, sequences: Sequences, rows: slice, size: int, context: int, readers: Executor | None
    ) -> Callable[[], MicroBatch]:
        """``rows`` of the batch, with padding to ``size`` rows; the call of what this returns ends their reads."""
        part = Sequences(sequences.category_B[rows], sequences.start_B[rows])
        read = self._begin(part, context, readers)

        def end() -> MicroBatch:
            input_ids_BT = read()
            padding = size - len(input_ids_BT)
            documents_BT = document_ids(input_ids_BT, self._eos_id)
            if padding:
                input_ids_BT = F.pad(input_ids_BT, (0, 0, 0, padding))
                documents_BT = F.pad(documents_BT, (0, 0, 0, padding), value=-1)
            return MicroBatch(
                input_ids_BT=input_ids_BT,
                document_ids_BT=documents_BT,
                labels_BT=input_ids_BT,
                category_B=F.pad(torch.from_numpy(part.category_B), (0, padding)),
                padding=padding,
            )

        return end
