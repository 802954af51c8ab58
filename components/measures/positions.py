"""What extending the context did to the loss by position: ``measure(tokens, before, after, (4096, 16384))``.

Both models read the same beginnings of held-out documents that are at least as long as the new context, each with the
RoPE base that it was trained with. Beyond the old context the extended model should lose less, before it not more.
Uncertainty: bootstrap over documents, since tokens of one document are not independent.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.artifacts import StageError
from components.corpus.shards import HELD_OUT_SPLIT, Shard, TokenShards
from components.measures.token_nats import next_token_nats
from model import SmallThinkerForCausalLM

_RESAMPLES = 2000
Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PositionBand:
    """Loss over a band of positions within documents, before and after the extension.

    Attributes:
        start, end: positions ``[start, end)``; position 0 predicts a document's first token.
        before, after: mean nats per token of either model.
        change: ``after - before``.
        change_low, change_high: 95 % interval of the change, over documents.
    """

    start: int
    end: int
    before: float
    after: float
    change: float
    change_low: float
    change_high: float


def document_beginnings(shard: Shard, eos_id: int, length: int, limit: int) -> Int64s:
    """The first ``length`` tokens of the first ``limit`` documents that have as many, each opened by ``eos_id``.

    Returns:
        ``[documents, length + 1]``.
    """
    rows_NT = np.empty((0, length + 1), dtype=np.int64)
    previous = 0
    for ends in shard.document_ends():
        starts = np.concatenate([[previous], ends[:-1]])
        previous = int(ends[-1])
        long = starts[ends - 1 - starts >= length][: limit - len(rows_NT)]  # the closing token does not count
        rows = [np.concatenate([[eos_id], shard.read(start, length)]) for start in long.tolist()]
        rows_NT = np.concatenate([rows_NT, *(row[None] for row in rows)])
        if len(rows_NT) == limit:
            break
    return rows_NT


@torch.no_grad()
def nats_by_position(model: Any, windows: Int64s, batch: int = 4) -> Floats:
    """Cross-entropy of every token of ``windows`` ``[N, length + 1]`` but the first: ``[N, length]``."""
    was_training = model.training
    model.eval()
    rows = []
    for ids in torch.split(torch.from_numpy(windows).to(model.device), batch):
        _, nats_BT = next_token_nats(model, ids[:, :-1], ids[:, 1:])
        rows.append(nats_BT.double().cpu().numpy())
    model.train(was_training)
    return np.concatenate(rows)


def compare(before_NT: Floats, after_NT: Floats, old_context: int, bands: int = 4) -> list[PositionBand]:
    """Losses by band of positions: ``bands`` equal ones before the old context's end, as many beyond it."""
    length = before_NT.shape[1]
    edges = [
        *np.linspace(0, old_context, bands + 1).astype(int).tolist(),
        *np.linspace(old_context, length, bands + 1).astype(int).tolist()[1:],
    ]
    spans = [*itertools.pairwise(edges), (0, old_context), (old_context, length)]
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(before_NT), (_RESAMPLES, len(before_NT)))
    result = []
    for start, end in spans:
        one_N, other_N = before_NT[:, start:end].mean(axis=1), after_NT[:, start:end].mean(axis=1)
        low, high = np.quantile((other_N - one_N)[picks].mean(axis=1), [0.025, 0.975])
        result.append(
            PositionBand(
                start, end, one_N.mean(), other_N.mean(), (other_N - one_N).mean(), float(low), float(high)
            )
        )
    return result


def measure(
    tokens: Path, before: Path, after: Path, contexts: tuple[int, int], limit: int = 48
) -> dict[str, Any]:
    """Compare two exported models by position.

    Args:
        tokens: artefact of stage ``tokenize``.
        before, after: Hugging Face folders.
        contexts: the old and the new context in tokens.
        limit: documents per category.

    Returns:
        ``documents``, ``old_context``, ``new_context`` and ``bands`` (the last two are everything before the old
        context's end and everything beyond); no bands when no held-out document is long enough.
    """
    old, new = contexts
    if new <= old:
        raise StageError(
            f"The new context is {new} tokens and the old {old}; only a longer one can be compared."
        )
    shards = TokenShards.open(tokens)
    parts = [
        document_beginnings(shards.shard(HELD_OUT_SPLIT, name), shards.eos_id, new, limit)
        for name in shards.categories(HELD_OUT_SPLIT)
    ]
    windows = np.concatenate(parts) if parts else np.zeros((0, new + 1), dtype=np.int64)
    answer: dict[str, Any] = {"documents": len(windows), "old_context": old, "new_context": new, "bands": []}
    if len(windows):
        before_NT, after_NT = (
            nats_by_position(SmallThinkerForCausalLM.from_pretrained(folder), windows)
            for folder in (before, after)
        )
        answer["bands"] = [asdict(band) for band in compare(before_NT, after_NT, old)]
    return answer
