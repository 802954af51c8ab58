"""Held-out bits per byte, and what the routers and experts do on that text: ``HeldOutText.open(folder, config)``.

Windows and byte counts are those of pretraining's ``heldout.json``, so the figures can be set side by side.
Routing is counted once per scored token.

Legend: L layers, E experts, B windows, T tokens, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from components.artifacts import StageError
from components.corpus.categories import CATEGORIES
from components.corpus.shards import TOKENIZER_FOLDER, TokenShards
from components.corpus.text_bytes import count_bytes, token_bytes
from components.evaluation.config import EvaluateConfig
from components.measures.heldout import held_out_windows
from components.measures.intervals import bootstrap_ratio
from components.measures.token_nats import next_token_nats
from model import SmallThinkerForCausalLM
from model.masks import document_ids

SPLIT: Final = "heldout"
COLD_FREQUENCY: Final = 0.14  # the paper's mark for a rarely used expert
_FEWEST_TOKENS = 64  # a share over fewer tokens is noise and gives no point of the box plot

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HeldOutText:
    """The held-out tokens of every category that has some.

    Attributes:
        streams: token ids by category.
        bytes_per_token: UTF-8 bytes that each token id stands for, by category (the tokenizer's normaliser can
            change a text's length; the correction differs by category). ``[V]``
        eos_id: opens every document.
    """

    streams: dict[str, Int64s]
    bytes_per_token: dict[str, Floats]
    eos_id: int

    @classmethod
    def open(cls, tokenized: Path, config: EvaluateConfig) -> HeldOutText:
        """Read up to ``heldout_tokens_per_category`` tokens of each category.

        Raises:
            StageError: there is no held-out text, or a shard is missing or torn.
        """
        shards = TokenShards.open(tokenized)
        tokenizer_file = tokenized / TOKENIZER_FOLDER / "tokenizer.json"
        if not tokenizer_file.is_file():
            raise StageError(f"{tokenizer_file} is missing; run the stage tokenize")
        lengths = token_bytes(Tokenizer.from_file(str(tokenizer_file)), shards.vocab_size)
        streams: dict[str, Int64s] = {}
        scaled: dict[str, Floats] = {}
        for name in CATEGORIES:
            if SPLIT not in shards.splits or name not in shards.categories(SPLIT):
                continue
            shard = shards.shard(SPLIT, name)
            whole = float(count_bytes(shard, lengths))
            if whole <= 0:
                continue
            count = min(len(shard), config.heldout_tokens_per_category)
            streams[name] = np.asarray(shard.read(0, count), dtype=np.int64)
            scaled[name] = lengths.astype(np.float64) * (shard.bytes / whole)
        if not streams:
            raise StageError(f"{tokenized} holds no text in the split {SPLIT}; evaluation needs some")
        return cls(streams, scaled, shards.eos_id)


@dataclass
class RoutingStatistics:
    """Counts over held-out text; see :meth:`to_json` for what is made of them."""

    layers: int
    experts: int
    top_k: int
    expert_width: int
    chosen: dict[str, Floats] = field(default_factory=dict)  # [L, E] by category
    tokens: dict[str, int] = field(default_factory=dict)
    active_LE: Floats = field(default_factory=lambda: np.zeros(0))
    rows_LE: Floats = field(default_factory=lambda: np.zeros(0))
    kept_L: Floats = field(default_factory=lambda: np.zeros(0))
    pairs: int = 0
    sparsity_samples: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (self.layers, self.experts)
        self.active_LE, self.rows_LE, self.kept_L = np.zeros(shape), np.zeros(shape), np.zeros(self.layers)
        self.sparsity_samples = [[] for _ in range(self.layers)]

    def add(self, category: str, stats: Any, scored_BT: torch.Tensor, opens_BT: torch.Tensor) -> None:
        """Count one forward.

        Args:
            category: whose text it was.
            stats: the forward's ``RouterStats`` with ``experts`` ``[L, B, T, K]`` recorded.
            scored_BT: which positions count.
            opens_BT: which positions open a document, so that the token before them is of another text.
        """
        experts_LBTK = stats.experts.cpu()
        scored_BT, opens_BT = scored_BT.cpu(), opens_BT.cpu()
        chosen_LE = np.stack(
            [
                np.bincount(layer[scored_BT].flatten().numpy(), minlength=self.experts)
                for layer in experts_LBTK
            ]
        )
        self.chosen[category] = self.chosen.get(category, np.zeros_like(self.active_LE)) + chosen_LE
        self.tokens[category] = self.tokens.get(category, 0) + int(scored_BT.sum())
        neighbours_BT = scored_BT[:, 1:] & ~opens_BT[:, 1:]
        now, before = experts_LBTK[:, :, 1:, :, None], experts_LBTK[:, :, :-1, None, :]
        kept_LBT = (now == before).any(dim=-1).sum(dim=-1)
        self.kept_L += (kept_LBT * neighbours_BT).sum(dim=(1, 2)).double().numpy()
        self.pairs += int(neighbours_BT.sum())
        active_LE = stats.active_neurons_by_expert.double().cpu().numpy()
        rows_LE = stats.expert_counts.double().cpu().numpy()
        self.active_LE += active_LE
        self.rows_LE += rows_LE
        for layer in range(self.layers):
            for active, rows in zip(active_LE[layer], rows_LE[layer], strict=True):
                if rows >= _FEWEST_TOKENS:
                    self.sparsity_samples[layer].append(1.0 - active / (rows * self.expert_width))

    def frequency(self, category: str | None = None) -> Floats:
        """Share of tokens that choose each expert ``[L, E]``, of one category or of all; sums to K per layer."""
        if category is not None:
            return self.chosen[category] / max(1, self.tokens[category])
        total: Floats = np.sum(list(self.chosen.values()), axis=0) / max(1, sum(self.tokens.values()))
        return total

    def to_json(self) -> dict[str, Any]:
        """Contents of ``activation_stats.json``.

        Beyond the contract: ``cold_expert_share`` (share of experts below 0.14 frequency, per layer),
        ``temporal_locality`` (share of a token's experts that the token before it used too, per layer) with
        ``temporal_locality_chance`` (K / E), and ``normalised_entropy`` of the frequencies (1: all alike).
        """
        frequency_LE = self.frequency()
        share_LE = np.clip(frequency_LE / self.top_k, 1e-12, None)
        entropy_L = -(share_LE * np.log(share_LE)).sum(axis=1) / math.log(self.experts)
        sparsity_LE = 1.0 - self.active_LE / np.maximum(self.rows_LE * self.expert_width, 1.0)
        return {
            "tokens": sum(self.tokens.values()),
            "expert_frequency": frequency_LE.tolist(),
            "neuron_sparsity": sparsity_LE.tolist(),
            "by_category": {name: self.frequency(name).tolist() for name in self.chosen},
            "cold_expert_share": (frequency_LE < COLD_FREQUENCY).mean(axis=1).tolist(),
            "temporal_locality": (self.kept_L / max(1, self.pairs * self.top_k)).tolist(),
            "temporal_locality_chance": self.top_k / self.experts,
            "normalised_entropy": entropy_L.tolist(),
        }

    @property
    def mean_sparsity(self) -> float:
        """Share of a chosen expert's neurons that are inactive, over all (token, expert) pairs."""
        return float(1.0 - self.active_LE.sum() / max(1.0, self.rows_LE.sum() * self.expert_width))


@torch.inference_mode()
def measure(
    model: SmallThinkerForCausalLM,
    text: HeldOutText,
    config: EvaluateConfig,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, dict[str, Any]], RoutingStatistics]:
    """Score held-out text.

    Returns:
        Cells of ``results.json`` by category and for ``overall``, and the routing.
    """
    shape = model.config
    context = min(config.heldout_context_tokens, shape.max_position_embeddings)
    routing = RoutingStatistics(
        shape.num_hidden_layers,
        shape.moe_num_primary_experts,
        shape.moe_num_active_primary_experts,
        shape.moe_ffn_hidden_size,
    )
    cells: dict[str, dict[str, Any]] = {}
    bits_of_all: list[float] = []
    bytes_of_all: list[float] = []
    for name, stream in text.streams.items():
        bits: list[float] = []
        counts: list[float] = []
        for windows, first in _batches(stream, context, text.eos_id, config.heldout_batch_windows):
            ids_BT = torch.from_numpy(windows).to(model.device)
            inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
            with model.record_experts():
                output, nats_BT = next_token_nats(
                    model, inputs_BT, targets_BT, document_ids(inputs_BT, text.eos_id)
                )
            scored_BT = torch.arange(1, ids_BT.shape[1])[None] >= torch.from_numpy(first)[:, None]
            bits += ((nats_BT.cpu().double() * scored_BT).sum(dim=1) / math.log(2)).tolist()
            counts += (text.bytes_per_token[name][windows[:, 1:]] * scored_BT.numpy()).sum(axis=1).tolist()
            routing.add(name, output.router_stats, scored_BT, inputs_BT == text.eos_id)
            if progress is not None:
                progress(int(scored_BT.sum()))
        cells[name] = _cell(bits, counts, len(stream))
        bits_of_all += bits
        bytes_of_all += counts
    cells["overall"] = _cell(bits_of_all, bytes_of_all, sum(map(len, text.streams.values())))
    return cells, routing


def _batches(stream: Int64s, context: int, eos_id: int, size: int) -> list[tuple[Int64s, Int64s]]:
    """Windows of equal length ``[B, <= context + 1]`` and each one's first scored position ``[B]``."""
    by_length: dict[int, list[tuple[Int64s, int]]] = {}
    for window, first in held_out_windows(stream, context, eos_id):
        by_length.setdefault(len(window), []).append((window, first))
    return [
        (
            np.stack([window for window, _ in members[begin : begin + size]]),
            np.array([first for _, first in members[begin : begin + size]], dtype=np.int64),
        )
        for members in by_length.values()
        for begin in range(0, len(members), size)
    ]


def _cell(bits: list[float], text_bytes: list[float], tokens: int) -> dict[str, Any]:
    low, high = bootstrap_ratio(np.array(bits), np.array(text_bytes))
    return {
        "metric": "bits_per_byte",
        "value": math.fsum(bits) / math.fsum(text_bytes),
        "ci_low": low,
        "ci_high": high,
        "n": tokens,
        "chance": None,
    }
