"""From a prompt to tokens: prefill, one decoding step, speculation, and the loop that is made of them.

    for token in decode(scheduler, sequence, prompt, limit): ...

Speculation guesses the next tokens (``lookup.py``) and computes all guesses in one pass: the rows of logits that
follow them come at little more than the price of one. A guess counts only if it is what the sampler chooses anyway.
That is the rule of speculative sampling (Leviathan et al. 2023), which accepts a guess x of a drafting distribution q
with probability min(1, p(x) / q(x)) and otherwise draws from max(0, p - q), normalised: prompt lookup is sure of its
guess, q(x) = 1, so x is accepted with probability p(x), and otherwise the token is drawn from p without x. Drawing once
from p and comparing does just that. Since every token takes the same one random number as without guesses, not only
its distribution stays, but its bits.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import _core
from runtime_cpu.engine.lookup import MOST_DRAFTED, Pace, PromptLookup
from runtime_cpu.engine.sampling import SamplingOptions, Token
from runtime_cpu.engine.scheduling import Scheduler
from runtime_cpu.engine.stats import Stats


@dataclass(frozen=True)
class Sequence:
    """One request while it runs.

    Attributes:
        session: its tokens so far with their keys and values.
        sampler: its random numbers and the counts of its penalties.
        started: when it was asked for, by ``time.perf_counter``.
        logits: float32 [1, V], or [1 + MOST_DRAFTED, V] with guesses: room for the rows of one pass.
    """

    session: _core.Session
    sampler: _core.Sampler
    options: SamplingOptions
    stats: Stats
    started: float
    logits: NDArray[np.float32]


def decode(
    scheduler: Scheduler, sequence: Sequence, prompt: NDArray[np.int32], limit: int
) -> Generator[Token, None, None]:
    """At most ``limit`` tokens after ``prompt`` [T]. Nothing is computed ahead of the token that is asked for.

    Raises:
        EngineError: the engine is closed, or weights cannot be read.
    """
    session, stats = sequence.session, sequence.stats
    lookup = PromptLookup(prompt.tolist()) if sequence.options.lookup else None
    pace = Pace()
    draft: list[int] = []
    step_s = 0.0
    # Row i follows the i-th guess: a token may be chosen from it if all guesses up to there have come true.
    rows = prefill(scheduler, sequence, prompt)
    while stats.generated_tokens < limit:
        right = 0  # guesses that have come true
        for guess in (*draft, None):  # after the last one there is a row still
            token = choose(scheduler, sequence, rows[right])
            if token.id in sequence.options.stop_ids:
                stats.finish_reason, stats.stop_id = "stop", token.id
                return
            stats.generated_tokens += 1
            if lookup is not None:
                lookup.extend([token.id])
            came_true = token.id == guess
            stats.accepted_tokens += came_true
            yield token
            if not came_true:
                break
            right += 1
        if stats.generated_tokens == limit:
            break
        if stats.decode_steps:
            pace.record(len(draft), right + 1, step_s)
        if draft:
            session.truncate(session.length - (len(draft) - right))  # forgets the wrong guesses
        started = time.perf_counter()
        draft = []
        if lookup is not None and pace.wants_draft():
            draft = lookup.draft(min(MOST_DRAFTED, limit - stats.generated_tokens - 1))
        if draft:
            rows = speculate(scheduler, sequence, token.id, draft)
            stats.drafted_tokens += len(draft)
        else:
            rows = decode_one(scheduler, sequence, token.id)
        step_s = time.perf_counter() - started
        stats.decode_s += step_s
        stats.decode_steps += 1
    stats.finish_reason = "length"


def prefill(scheduler: Scheduler, sequence: Sequence, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
    """Compute what the session lacks of ``prompt`` [T], in chunks; the logits [1, V] after its last token."""
    session, stats, logits = sequence.session, sequence.stats, sequence.logits[:1]
    stats.reused_tokens = session.length
    rest = prompt[session.length :]
    for start in range(0, len(rest), scheduler.chunk_tokens):
        stop = start + scheduler.chunk_tokens
        scheduler.forward(session, rest[start:stop], logits if stop >= len(rest) else None)
        stats.prompt_s = time.perf_counter() - sequence.started
    stats.prompt_bytes_read = session.bytes_read
    return logits


def choose(scheduler: Scheduler, sequence: Sequence, row: NDArray[np.float32]) -> Token:
    """Draw the next token from the logits ``row`` [V]."""
    stats, started = sequence.stats, time.perf_counter()
    token_id, logprob, top = scheduler.sample(sequence.sampler, row, sequence.options.logprobs)
    if stats.generated_tokens == 0:
        stats.first_token_s = time.perf_counter() - sequence.started
    else:
        stats.decode_s += time.perf_counter() - started
    return Token(token_id, logprob, tuple(top))


def decode_one(scheduler: Scheduler, sequence: Sequence, token_id: int) -> NDArray[np.float32]:
    """Append a token; the logits [1, V] after it. Other sequences' steps are computed in the same pass."""
    logits = sequence.logits[:1]
    scheduler.step(sequence.session, token_id, logits)
    return logits


def speculate(
    scheduler: Scheduler, sequence: Sequence, token_id: int, draft: list[int]
) -> NDArray[np.float32]:
    """Append a token and n guesses in one pass; the logits [n + 1, V] after each of them."""
    logits = sequence.logits[: len(draft) + 1]
    scheduler.forward(sequence.session, np.array([token_id, *draft], np.int32), logits)
    return logits
