"""What the engine counts in a file of :mod:`runtime_cpu.synth`, against what was asked for: ``measure(path)``.

``python -m runtime_cpu.synth 4b OUT.gguf --check`` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from runtime_cpu.engine.engine import Engine
from runtime_cpu.synth.routing import text_like_ids
from runtime_cpu.synth.shapes import SynthError


@dataclass(frozen=True)
class Measured:
    """What the engine counted.

    Attributes:
        sparsity: share of neurons at zero by layer.
        rare_experts: mean over the layers of the share of experts with a frequency under 0.14.
        overlaps: share of experts that consecutive tokens have in common, by kind of text.
        logit_std: standard deviation of a row of logits; ``largest_logit``: the greatest absolute one.
        distinct_greedy: different tokens among the greedily generated ones (``greedy_tokens``).
    """

    sparsity: list[float]
    rare_experts: float
    overlaps: dict[str, float]
    logit_std: float
    largest_logit: float
    greedy_tokens: int
    distinct_greedy: int


def measure(path: Path, tokens: int = 512, steps: int = 48, threads: int | None = None) -> Measured:
    """Run a file through the engine: ``tokens`` independent ids at once, and ``steps`` ids of each kind one by one.

    Raises:
        SynthError: logits are not finite.
        EngineError, OSError: the file cannot be opened.
    """
    with Engine.open(path, threads=threads, context=max(tokens, 2 * steps) + 8, sessions=1) as engine:
        vocab, k = engine.info.vocab_size, engine.info.experts_per_token
        ids = np.random.default_rng(5).integers(0, vocab, tokens).tolist()
        rows = engine.logits(ids[:16])
        if not np.isfinite(rows).all():
            raise SynthError("the logits are not finite")
        with engine.generate(ids, max_tokens=1, stop_ids=()) as generation:
            list(generation)
        stats = generation.stats
        frequency = np.array(stats.expert_counts) / tokens

        def overlap(text: list[int] | None) -> tuple[float, list[int]]:
            """Each step is a request that computes one token: the rest is still in the KV cache."""
            produced = ids[:1] if text is None else text[:1]
            previous, shared = None, []
            for step in range(1, steps):
                with engine.generate(produced, max_tokens=1, stop_ids=()) as generation:
                    (token,) = generation
                counts = np.array(generation.stats.expert_counts) > 0
                if previous is not None:
                    shared.append(float((counts & previous).sum(1).mean()) / k)
                previous = counts if generation.stats.reused_tokens == len(produced) - 1 else None
                produced = [*produced, token.id if text is None else text[step]]
            return fmean(shared), produced

        overlaps = {
            "text-like": overlap(text_like_ids(vocab, steps, 7))[0],
            "independent": overlap(ids[:steps])[0],
        }
        overlaps["greedy"], greedy = overlap(None)
    return Measured(
        sparsity=[1 - share for share in stats.active_neuron_share_by_layer],
        rare_experts=float((frequency < 0.14).mean()),
        overlaps=overlaps,
        logit_std=float(rows.std(1).mean()),
        largest_logit=float(np.abs(rows).max()),
        greedy_tokens=len(greedy) - 1,
        distinct_greedy=len(set(greedy[1:])),
    )


def report(measured: Measured) -> str:
    """The measurement for people."""
    sparsity = measured.sparsity
    overlaps = ", ".join(f"{kind} {share:.2f}" for kind, share in measured.overlaps.items())
    return (
        f"neurons at zero: {fmean(sparsity):.3f} on average, {min(sparsity):.3f} in the least sparse layer, "
        f"{', '.join(f'{share:.2f}' for share in sparsity[:2])} in the first\n"
        f"experts with a frequency under 0.14: {measured.rare_experts:.0%}\n"
        f"experts shared by consecutive tokens: {overlaps}\n"
        f"logits: standard deviation {measured.logit_std:.2f}, largest {measured.largest_logit:.1f}; "
        f"{measured.distinct_greedy} different tokens among {measured.greedy_tokens} greedy ones\n"
    )
