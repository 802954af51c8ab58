"""Held-out bits per byte, by category: ``HeldOut.open(shards, tokenizer, 10_000).evaluate(model, context, device)``.

Bits per byte = nats / ln 2 / UTF-8 bytes of the scored text: comparable between tokenizers and vocabularies. Every
token counts, the closing ``<|endoftext|>`` too. The bigram baseline is scored on the same tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from components.artifacts import StageError
from components.corpus.categories import CATEGORIES
from components.corpus.shards import HELD_OUT_SPLIT, TRAIN_SPLIT, TokenArray, TokenShards
from components.corpus.text_bytes import count_bytes, token_bytes
from components.measures.bigram import BigramModel
from components.measures.token_nats import next_token_nats
from model.masks import document_ids

Int64s = npt.NDArray[np.int64]


def held_out_windows(
    stream: npt.NDArray[np.integer], context: int, eos_id: int
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Cut a held-out split into windows that score each token once.

    Yields pairs (window of ``context`` + 1 tokens, or fewer where the split is shorter; first scored position). The
    split is opened by ``eos_id``, as training opens documents. Windows advance by half a context, so that after the
    first one every token is scored with at least ``context / 2`` tokens in view.
    """
    opened = np.concatenate([[eos_id], stream])
    scored = 1
    while scored < len(opened):
        ahead = context if scored == 1 else context // 2
        end = min(len(opened), scored + ahead)
        begin = max(0, end - context - 1)
        yield opened[begin:end], scored - begin
        scored = end


@dataclass(frozen=True)
class Scores:
    """One evaluation.

    Attributes:
        bits_per_byte: by category, and ``overall`` (all bits over all bytes).
        nats_per_token: likewise.
        tokens: scored tokens.
        activations: contents of ``activation_stats.json``; empty for the bigram baseline.
    """

    bits_per_byte: dict[str, float]
    nats_per_token: dict[str, float]
    tokens: int
    activations: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "nats_per_token": self.nats_per_token,
            "tokens": self.tokens,
            "activations": self.activations,
        }


class HeldOut:
    """The held-out text of every category, cut to the configured length."""

    def __init__(
        self,
        streams: Mapping[str, TokenArray],
        text_bytes: Mapping[str, float],
        eos_id: int,
        batch: int,
        batch_tokens: int | None = None,
    ) -> None:
        self.streams = dict(streams)
        self.text_bytes = dict(text_bytes)
        self._eos_id = eos_id
        self._batch, self._batch_tokens = batch, batch_tokens

    @classmethod
    def open(
        cls,
        shards: TokenShards,
        tokenizer_file: Path,
        tokens_per_category: int,
        sequences_per_batch: int = 16,
        tokens_per_batch: int | None = None,
    ) -> HeldOut:
        """Take up to ``tokens_per_category`` held-out tokens of each category; score so many windows at once.

        With ``tokens_per_batch`` fewer windows, at least one, where that many would be more tokens.

        Raises:
            StageError: the shards hold no held-out text at all.
        """
        lengths = token_bytes(Tokenizer.from_file(str(tokenizer_file)), shards.vocab_size)
        streams: dict[str, TokenArray] = {}
        text_bytes: dict[str, float] = {}
        for name in CATEGORIES:
            if HELD_OUT_SPLIT not in shards.splits or name not in shards.categories(HELD_OUT_SPLIT):
                continue
            shard = shards.shard(HELD_OUT_SPLIT, name)
            count = min(len(shard), tokens_per_category)
            counted = float(shard.bytes)
            if count < len(shard):
                # Where the tokenizer's normaliser changed the text's length, the index knows the true one.
                whole = float(count_bytes(shard, lengths))
                counted = float(count_bytes(shard, lengths, count)) * (shard.bytes / max(whole, 1.0))
            if counted > 0:
                streams[name], text_bytes[name] = shard.read(0, count), counted
        if not streams:
            raise StageError(
                f"The token shards hold no text in split {HELD_OUT_SPLIT}; pretraining measures bits per byte on it."
            )
        return cls(streams, text_bytes, shards.eos_id, sequences_per_batch, tokens_per_batch)

    def _scores(self, nats: Mapping[str, float], activations: dict[str, Any]) -> Scores:
        tokens = {name: len(stream) for name, stream in self.streams.items()}
        total_nats, total_tokens = math.fsum(nats.values()), sum(tokens.values())
        bits = {name: nats[name] / math.log(2) / self.text_bytes[name] for name in self.streams}
        bits["overall"] = total_nats / math.log(2) / math.fsum(self.text_bytes.values())
        per_token = {name: nats[name] / tokens[name] for name in self.streams}
        per_token["overall"] = total_nats / total_tokens
        return Scores(bits, per_token, total_tokens, activations)

    def bigram(self, model: BigramModel) -> Scores:
        """Score the bigram baseline on the same tokens."""
        nats = {
            name: float(model.nats(np.concatenate([[self._eos_id], stream])).sum())
            for name, stream in self.streams.items()
        }
        return self._scores(nats, {})

    def _batches(self, name: str, context: int) -> list[tuple[Int64s, Int64s, Int64s]]:
        """One category in batches of one shape, so that nothing is compiled anew for the last one.

        Returns:
            Windows ``[B, context + 1]``, filled up with ``eos_id``; their lengths ``[B]``, 0 for rows that only fill
            up; their first scored positions ``[B]``.
        """
        size = self._batch
        if self._batch_tokens is not None:
            size = max(1, min(size, self._batch_tokens // context))
        batches = []
        windows = held_out_windows(self.streams[name], context, self._eos_id)
        while part := list(itertools.islice(windows, size)):
            window_BT = np.full((size, context + 1), self._eos_id, dtype=np.int64)
            length_B, first_B = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
            for row, (window, first) in enumerate(part):
                window_BT[row, : len(window)] = window
                length_B[row], first_B[row] = len(window), first
            batches.append((window_BT, length_B, first_B))
        return batches

    def _score(
        self, model: Any, batch: tuple[Int64s, Int64s, Int64s], device: torch.device
    ) -> tuple[Any, float]:
        """One forward pass: the model's output, and the nats of the scored tokens."""
        ids_BT, length_B, first_B = (torch.from_numpy(values).to(device) for values in batch)
        inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
        position_1T = torch.arange(1, ids_BT.shape[1], device=device)[None]  # of the targets
        real_BT = position_1T < length_B[:, None]
        documents_BT = document_ids(inputs_BT, self._eos_id).masked_fill(~real_BT, -1)
        out, losses_BT = next_token_nats(model, inputs_BT, targets_BT, documents_BT)
        counted_BT = real_BT & (position_1T >= first_B[:, None])
        return out, float(losses_BT.double()[counted_BT].sum())

    @torch.no_grad()
    def evaluate(
        self,
        model: Any,
        context: int,
        device: torch.device,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        rank: int = 0,
        world: int = 1,
    ) -> Scores | None:
        """Score the model with windows of ``context`` tokens; ``None`` when ``should_stop`` said so.

        With ``world`` above 1 the batches are split over the ranks of torch's process group, every rank runs the same
        number of forward passes, and the sums are all-reduced, so every rank returns the same scores.
        """
        config = model.config
        layers, experts = config.num_hidden_layers, config.moe_num_primary_experts
        was_training = model.training
        model.eval()
        try:
            nats_C = torch.zeros(len(CATEGORIES), dtype=torch.float64)
            chosen_CLE = torch.zeros(len(CATEGORIES), layers, experts, dtype=torch.float64)
            seen_C = torch.zeros(len(CATEGORIES), dtype=torch.float64)
            active_LE = torch.zeros(layers, experts, dtype=torch.float64)
            for category, name in enumerate(CATEGORIES):
                if name not in self.streams:
                    continue
                batches = self._batches(name, context)
                for first in range(0, len(batches), world):
                    if should_stop():
                        return None
                    number = first + rank
                    # Expert parallelism runs an all-to-all in every layer, in which a rank that has no batch left must
                    # take part: its batch is one of rows that only fill up.
                    batch = batches[min(number, len(batches) - 1)]
                    if number >= len(batches):
                        batch = (batch[0], np.zeros_like(batch[1]), batch[2])
                    out, nats = self._score(model, batch, device)
                    nats_C[category] += nats
                    chosen_CLE[category] += out.router_stats.expert_counts.double().cpu()
                    active_LE += out.router_stats.active_neurons_by_expert.double().cpu()
                    seen_C[category] += out.router_stats.tokens
            if world > 1:
                for tensor in (nats_C, chosen_CLE, seen_C, active_LE):
                    _all_reduce(tensor, device)
        finally:
            model.train(was_training)
        chosen_LE = chosen_CLE.sum(0)
        possible_LE = (chosen_LE * config.moe_ffn_hidden_size).clamp(min=1)
        activations = {
            "tokens": int(seen_C.sum()),
            "expert_frequency": (chosen_LE / seen_C.sum()).tolist(),
            "neuron_sparsity": (1.0 - active_LE / possible_LE).tolist(),
            "by_category": {
                name: (chosen_CLE[c] / seen_C[c]).tolist()
                for c, name in enumerate(CATEGORIES)
                if seen_C[c] > 0
            },
        }
        return self._scores({n: float(nats_C[CATEGORIES.index(n)]) for n in self.streams}, activations)


def _all_reduce(tensor: torch.Tensor, device: torch.device) -> None:
    pooled = tensor.to(device)
    dist.all_reduce(pooled)
    tensor.copy_(pooled)


def fit_bigram(shards: TokenShards, limit_tokens: int) -> BigramModel:
    """Fit the baseline on the training tokens of all categories, up to ``limit_tokens`` each."""
    held = [shards.shard(TRAIN_SPLIT, name) for name in CATEGORIES if name in shards.categories(TRAIN_SPLIT)]
    streams = (shard.read(0, min(len(shard), limit_tokens)) for shard in held)  # one at a time
    return BigramModel.fit(streams, shards.vocab_size)
