"""How a token is chosen from a row of logits: the options of one request, and the token that comes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime_cpu._core import Sampler


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: index in the vocabulary.
        logprob: natural logarithm of the model's own probability (before temperature, bias and penalties).
        top: the most probable ``(id, logprob)``, best first; as many as ``logprobs`` asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SamplingOptions:
    """Checked arguments of :meth:`Engine.generate`; see there for their meaning."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop_ids: frozenset[int]
    logit_bias: Mapping[int, float]
    logprobs: int
    lookup: bool = True

    def __post_init__(self) -> None:
        def check(name: str, low: float, high: float, *, open_low: bool = False) -> None:
            value = getattr(self, name)
            inside = (low < value if open_low else low <= value) and value <= high
            if not inside:  # also true for NaN
                bracket = "(" if open_low else "["
                raise ValueError(f"{name} is {value}; allowed is {bracket}{low}, {high}]")

        if self.max_tokens is not None:
            check("max_tokens", 0, 2**31 - 1)
        check("temperature", 0.0, 100.0)
        check("top_k", 0, 2**31 - 1)
        check("top_p", 0.0, 1.0, open_low=True)
        check("min_p", 0.0, 1.0)
        check("repetition_penalty", 0.0, 100.0, open_low=True)
        check("presence_penalty", -100.0, 100.0)
        check("frequency_penalty", -100.0, 100.0)
        check("logprobs", 0, 1000)
        if self.seed is not None:
            check("seed", 0, 2**64 - 1)
        for token_id, bias in self.logit_bias.items():
            if not -1e9 <= bias <= 1e9 and bias not in (float("-inf"),):
                raise ValueError(f"logit_bias[{token_id}] is {bias}; allowed is [-1e9, 1e9] or -inf")

    def sampler(self, vocab_size: int, seed: int) -> Sampler:
        """What turns rows of ``vocab_size`` logits into ids; its random numbers follow from ``seed`` alone."""
        return Sampler(
            vocab_size,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            logit_bias=dict(self.logit_bias),
        )
