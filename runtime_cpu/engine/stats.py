"""What one request cost: ``generation.stats``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """What one request cost. Rates are 0.0 until there is something to divide.

    Attributes:
        prompt_tokens: tokens of the prompt, of which ``reused_tokens`` were still in the KV cache.
        generated_tokens: tokens given out (a stop token is not given out).
        prompt_s: time computing the prompt.
        decode_s: time computing and choosing the tokens after the first.
        first_token_s: from the start of the request to its first token.
        active_neuron_share: share of the experts' neurons that were above zero, over all tokens computed.
        active_neuron_share_by_layer: the same per layer.
        expert_counts: how often each expert was chosen, [layers][experts].
        cache_hits: experts found in memory, or on their way there; counted once per layer and batch, and 0 when all
            experts stay in memory.
        cache_misses: experts read from the file; counted likewise.
        bytes_read: read from the file meanwhile, guesses included; ``prompt_bytes_read`` of them for the prompt.
        head_row_share: share of the output matrix's rows that were computed; below 1 only with a predictor.
        head_fallbacks: tokens for which it named too few rows and the whole matrix was computed.
        io_wait_s: time that computing threads waited for experts, summed over the threads.
        finish_reason: ``"stop"``, ``"length"`` (max_tokens or the context's end), ``"cancelled"``, or ``None``.
        stop_id: the stop token that ended it.
        seed: what reproduces the sampling.
        drafted_tokens: guessed by prompt lookup.
        accepted_tokens: guessed right.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    active_neuron_share: float = 0.0
    active_neuron_share_by_layer: list[float] = field(default_factory=list)
    expert_counts: list[list[int]] = field(default_factory=list)
    cache_hits: int = 0
    cache_misses: int = 0
    bytes_read: int = 0
    prompt_bytes_read: int = 0
    io_wait_s: float = 0.0
    head_row_share: float = 1.0
    head_fallbacks: int = 0
    peak_rss_bytes: int = 0
    finish_reason: str | None = None
    stop_id: int | None = None
    seed: int | None = None
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Speed of the part of the prompt that was computed."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_s if self.prompt_s > 0 else 0.0

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what the core counted: neurons seen and active per layer, choices per expert."""
        neurons, active = counters["neurons"], counters["active_neurons"]
        self.expert_counts = counters["expert_counts"]
        self.cache_hits, self.cache_misses = counters["cache_hits"], counters["cache_misses"]
        self.bytes_read, self.io_wait_s = counters["bytes_read"], counters["waited_s"]
        self.head_row_share = (
            counters["head_rows_computed"] / counters["head_rows"] if counters["head_rows"] else 1.0
        )
        self.head_fallbacks = counters["head_fallbacks"]
        self.active_neuron_share = sum(active) / max(sum(neurons), 1)
        self.active_neuron_share_by_layer = [
            on / max(seen, 1) for on, seen in zip(active, neurons, strict=True)
        ]

    @property
    def cache_hit_rate(self) -> float:
        """Share of the experts asked for that needed no read; 1.0 when none was asked for."""
        asked = self.cache_hits + self.cache_misses
        return self.cache_hits / asked if asked else 1.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed of the tokens after the first one."""
        return (self.decode_steps + self.accepted_tokens) / self.decode_s if self.decode_s > 0 else 0.0
