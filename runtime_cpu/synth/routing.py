"""Which experts tokens share: the groups of ids that stay together in text, and how routers have to weigh them.

ids = text_like_ids(vocab, 128, seed=1)                # consecutive ones share TEXT_OVERLAP of a layer's experts
routing = simulate_routing(SHAPES["4b"], TEXT_OVERLAP)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from runtime_cpu.synth.shapes import Shape, SynthError

Floats = NDArray[np.float64]

# Real text: two consecutive tokens share 36-38 % of a layer's experts (traces of Qwen3-30B-A3B and Gemma-4-26B-A4B).
TEXT_OVERLAP = 0.37
ROUTER_SCALE = 1.5
UNFORESEEN = 0.4  # share of the routers' variance that comes from O
_STAY = 0.9  # a text stays in its group with this probability per token
_NORMAL = NormalDist()
# Of the routers' biases; the step lifts the most popular quarter.
_POPULARITY_SPREAD, _POPULARITY_STEP = 0.4, 0.4


@dataclass(frozen=True)
class Routing:
    """What the routers of a model do, from a simulation with the file's distribution.

    Attributes:
        frequency_E: how often each expert is chosen, ascending; layers permute it.
        squared_weights: mean of the sum of a token's squared expert weights.
        bias_E: the experts' biases in units of the noise.
        group_share: share of the noise's variance that a group's tokens have in common.
        independent_overlap: share of experts that two independent tokens have in common.
    """

    frequency_E: Floats
    squared_weights: float
    bias_E: Floats
    group_share: float
    independent_overlap: float


def group_size(vocab: int) -> int:
    """Neighbouring ids that form a group."""
    return max(8, min(256, vocab // 64))


def text_like_ids(vocab: int, count: int, seed: int) -> list[int]:
    """``count`` ids whose routing is as persistent as that of real text, for files that this module wrote.

    Uniform ids instead give independent tokens. Expert frequencies show over some 10,000 tokens, not over a few.
    """
    random = np.random.default_rng(seed)
    size = group_size(vocab)
    groups = -(-vocab // size)
    ids, group = [], int(random.integers(groups))
    for leaves in random.random(count) >= _STAY:
        group = int(random.integers(groups)) if leaves else group
        ids.append(int(random.integers(group * size, min((group + 1) * size, vocab))))
    return ids


def simulate_routing(shape: Shape, overlap: float, tokens: int = 8192) -> Routing:
    """Find the share of the group that makes text share ``overlap`` of a layer's experts.

    Raises:
        SynthError: popularity alone shares more, or no persistence shares that much.
    """
    random = np.random.default_rng(1)
    count, k = shape.experts, shape.used
    quantiles = np.array([_NORMAL.inv_cdf((i + 0.5) / count) for i in range(count)])
    bias = _POPULARITY_SPREAD * quantiles + _POPULARITY_STEP * (np.arange(count) >= count * 3 // 4)
    first, other = random.standard_normal((2, tokens, count))
    logits = bias + first
    chosen = np.argsort(-logits, axis=1)[:, :k]
    marks = np.zeros((tokens, count), bool)
    np.put_along_axis(marks, chosen, True, axis=1)

    def shared(correlation: float) -> float:
        follower = bias + correlation * first + math.sqrt(1 - correlation**2) * other
        next_chosen = np.argpartition(-follower, k - 1, axis=1)[:, :k]
        return float(np.take_along_axis(marks, next_chosen, axis=1).mean())

    independent, most = shared(0.0), 1 - UNFORESEEN
    low, high = 0.0, most
    if not independent <= overlap <= _STAY * shared(most) + (1 - _STAY) * independent:
        limit = _STAY * shared(most) + (1 - _STAY) * independent
        raise SynthError(
            f"--overlap is {overlap}; popularity alone gives {independent:.2f}, and at most {limit:.2f} is possible"
        )
    for _ in range(20):
        middle = (low + high) / 2
        reached = _STAY * shared(middle) + (1 - _STAY) * independent
        low, high = (middle, high) if reached < overlap else (low, middle)
    scores = ROUTER_SCALE * np.take_along_axis(logits, chosen, axis=1)
    weights = np.exp(scores - scores.max(1, keepdims=True)) if shape.softmax else 1 / (1 + np.exp(-scores))
    weights /= weights.sum(1, keepdims=True)
    return Routing(marks.mean(0), float((weights**2).sum(1).mean()), bias, low, independent)
