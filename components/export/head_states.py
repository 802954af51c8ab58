"""What an output matrix reads: ``collect_states(model, windows)``, the states behind the last norm.

``text_windows(folder, files, ...)`` cuts text into windows of token ids for any Hugging Face model; the stage's own
windows come from token shards (``shard_windows``).
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from components.artifacts import StageError
from components.corpus.shards import HELD_OUT_SPLIT, TokenShards

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
TILE_ROWS = 16
"""Rows of the output matrix that are read together."""


def split_windows(
    streams: Sequence[Int64s], positions: int, window: int, parts: Sequence[float]
) -> list[Int64s]:
    """Windows ``[n, window]`` of each part, the same number from every stream that is long enough.

    A part is a contiguous stretch of each stream, so that no text is in two parts.

    Args:
        streams: token ids of the kinds of text.
        positions: tokens wanted over all parts and streams.
        window: tokens that are read together.
        parts: shares of the parts; they sum to 1.
    """
    each = max(len(parts), positions // max(1, len(streams)) // window)
    rows: list[list[Int64s]] = [[] for _ in parts]
    for ids in streams:
        whole = min(each, len(ids) // window)
        cut = ids[: whole * window].reshape(whole, window)
        edges = np.round(np.cumsum([0.0, *parts]) * whole).astype(int)
        for part, (begin, end) in enumerate(itertools.pairwise(edges.tolist())):
            rows[part].append(cut[begin:end])
    result = [np.concatenate([*part, np.empty((0, window), np.int64)]) for part in rows]
    if not all(len(part) for part in result):
        raise StageError(
            f"{[len(ids) for ids in streams]} tokens of text leave a part of {list(parts)} without a window of "
            f"{window}; give more text or shorter windows."
        )
    return result


def text_streams(folder: Path, files: Sequence[Path]) -> list[Int64s]:
    """Token ids of UTF-8 text, or of the ``text`` of JSON lines, by the tokenizer of a Hugging Face folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    streams = []
    for path in files:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            content = "\n\n".join(json.loads(line)["text"] for line in content.splitlines())
        streams.append(np.array(tokenizer.encode(content, add_special_tokens=False).ids, np.int64))
    return streams


def shard_streams(folder: Path, limit: int) -> list[Int64s]:
    """The first ``limit`` token ids of each category of a ``tokenize`` artefact's held-out split."""
    shards = TokenShards.open(folder)
    held = [shards.shard(HELD_OUT_SPLIT, name) for name in shards.categories(HELD_OUT_SPLIT)]
    return [shard.read(0, min(len(shard), limit)).astype(np.int64) for shard in held]


@torch.no_grad()
def collect_states(model: Any, windows: Int64s) -> Floats:
    """States ``[positions, hidden]`` that the output matrix of a causal model reads, window by window."""
    states = [
        model.base_model(input_ids=torch.from_numpy(row[None]), use_cache=False).last_hidden_state[0].float()
        for row in windows
    ]
    return torch.cat(states).numpy()


def head_weight(model: Any) -> Floats:
    """The output matrix ``[vocabulary, hidden]`` in float32."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight.detach().float().numpy()
