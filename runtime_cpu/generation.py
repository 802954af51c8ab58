"""One request: an iterator of tokens that can be cancelled, with its statistics.

with engine.generate(ids, max_tokens=64) as generation:
    for token in generation:
        ...
generation.stats.decode_tokens_per_s
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime_cpu._core import Sampler
from runtime_cpu.closing import ClosedAtExit
from runtime_cpu.lookup import MOST_DRAFTED, Pace, PromptLookup

if TYPE_CHECKING:
    from runtime_cpu.engine import Engine


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


@dataclass
class Stats:
    """What one request cost. Rates are 0.0 until there is something to divide.

    Attributes:
        prompt_tokens: tokens of the prompt, of which ``reused_tokens`` were still in the KV cache.
        generated_tokens: tokens given out (a stop token is not given out).
        prompt_s, decode_s: time computing the prompt, and computing and choosing the tokens after the first.
        first_token_s: from the start of the request to its first token.
        active_neuron_share: share of the experts' neurons that were above zero, over all tokens computed.
        active_neuron_share_by_layer: the same per layer.
        expert_counts: how often each expert was chosen, [layers][experts].
        cache_hits, cache_misses: experts found in memory (or on their way there) and experts read from the file,
            counted once per layer and batch; both 0 when all experts stay in memory.
        bytes_read: read from the file meanwhile, guesses included; ``prompt_bytes_read`` of them for the prompt.
        head_row_share: share of the output matrix's rows that were computed; below 1 only with a predictor.
        head_fallbacks: tokens for which it named too few rows and the whole matrix was computed.
        io_wait_s: time that computing threads waited for experts, summed over the threads.
        finish_reason: ``"stop"``, ``"length"`` (max_tokens or the context's end), ``"cancelled"``, or ``None``.
        stop_id: the stop token that ended it.
        seed: what reproduces the sampling.
        drafted_tokens, accepted_tokens: guessed by prompt lookup, and guessed right.
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


class Generation(ClosedAtExit, Iterator[Token]):
    """The iterator that :meth:`Engine.generate` returns. ``close()`` cancels; so does leaving the ``with`` block.

    Nothing is computed before the first ``next()``. It may be driven from changing threads, one at a time.
    """

    def __init__(self, engine: Engine, prompt: NDArray[np.int32], options: SamplingOptions) -> None:
        self.stats = Stats(prompt_tokens=len(prompt))
        self._engine = engine
        self._tokens = self._run(prompt, options)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """Stop and free the sequence. Harmless when already finished."""
        self._tokens.close()
        if self.stats.finish_reason is None:
            self.stats.finish_reason = "cancelled"

    def _run(self, prompt: NDArray[np.int32], options: SamplingOptions) -> Generator[Token, None, None]:
        engine, stats = self._engine, self.stats
        stats.seed = secrets.randbits(64) if options.seed is None else options.seed
        sampler = Sampler(
            engine.info.vocab_size,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            seed=stats.seed,
            logit_bias=dict(options.logit_bias),
        )
        sampler.observe_prompt(prompt.tolist())
        started = time.perf_counter()
        room = engine.info.context - len(prompt)
        limit = room if options.max_tokens is None else min(options.max_tokens, room)
        buffer = np.empty(((MOST_DRAFTED if options.lookup else 0) + 1, engine.info.vocab_size), np.float32)
        logits = buffer[:1]
        step_s = 0.0
        with engine._borrow_session(prompt) as session:
            try:
                stats.reused_tokens = session.length
                rest = prompt[session.length :]
                chunk = engine._chunk_tokens
                for start in range(0, len(rest), chunk):
                    part = rest[start : start + chunk]
                    last = start + chunk >= len(rest)
                    engine._compute(session, part, logits if last else None)
                    if not last:
                        stats.prompt_s = time.perf_counter() - started
                stats.prompt_s = time.perf_counter() - started
                stats.prompt_bytes_read = session.bytes_read
                lookup = PromptLookup(prompt.tolist()) if options.lookup else None
                pace = Pace()
                draft: list[int] = []
                rows = logits
                row = 0  # of `rows`: what the next token is chosen from
                while True:
                    if stats.generated_tokens >= limit:
                        stats.finish_reason = "length"
                        return
                    choosing = time.perf_counter()
                    token_id, logprob, top = engine._sample(sampler, rows[row], options.logprobs)
                    if stats.generated_tokens == 0:
                        stats.first_token_s = time.perf_counter() - started
                    else:
                        stats.decode_s += time.perf_counter() - choosing
                    if token_id in options.stop_ids:
                        stats.finish_reason, stats.stop_id = "stop", token_id
                        return
                    stats.generated_tokens += 1
                    if lookup is not None:
                        lookup.extend([token_id])
                    if row < len(draft) and draft[row] == token_id:
                        row += 1  # it was guessed: the next row holds its logits already
                        stats.accepted_tokens += 1
                        yield Token(token_id, logprob, tuple(top))
                        continue
                    yield Token(token_id, logprob, tuple(top))
                    if stats.generated_tokens >= limit:
                        continue
                    if draft:
                        pace.record(len(draft), row + 1, step_s)
                        session.truncate(session.length - (len(draft) - row))
                    step = time.perf_counter()
                    draft = []
                    if lookup is not None and pace.wants_draft():
                        draft = lookup.draft(min(MOST_DRAFTED, limit - stats.generated_tokens - 1))
                    rows, row = buffer[: len(draft) + 1], 0
                    if draft:
                        engine._compute(session, np.array([token_id, *draft], np.int32), rows)
                    else:
                        engine._batcher.step(session, token_id, rows)
                    step_s = time.perf_counter() - step
                    if not draft:
                        pace.record(0, 1, step_s)
                    stats.decode_s += step_s
                    stats.decode_steps += 1
                    stats.drafted_tokens += len(draft)
            except GeneratorExit:
                stats.finish_reason = "cancelled"
                raise
            finally:
                engine._finish(stats, session)


def check_token_ids(token_ids: Sequence[int] | NDArray[np.integer], vocab_size: int) -> NDArray[np.int32]:
    """Token ids as int32 [T].

    Raises:
        ValueError: not a flat, non-empty list of integers inside the vocabulary.
    """
    array = np.asarray(token_ids)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"token_ids has shape {array.shape}; it has to be a flat list of at least one id")
    if array.dtype.kind not in "iu":
        raise ValueError(f"token_ids has type {array.dtype}; it has to hold integers")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        index = int(outside[0])
        raise ValueError(f"token_ids[{index}] is {int(array[index])}; allowed is 0 to {vocab_size - 1}")
    return np.ascontiguousarray(array, dtype=np.int32)
