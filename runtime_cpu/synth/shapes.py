"""The dimensions of the models that can be made: those of the two released ones, or any others."""

from __future__ import annotations

from dataclasses import dataclass


class SynthError(Exception):
    """The model that was asked for cannot be made; the message says why."""


@dataclass(frozen=True)
class Shape:
    """A model's dimensions; ``window`` 0: no windowed layer. Layouts follow llama.cpp's rule."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    used: int
    expert_hidden: int
    vocab: int
    context: int
    window: int
    softmax: bool
    tied: bool


SHAPES = {
    "4b": Shape("SmallThinker-4BA0.6B", 32, 1536, 12, 2, 128, 32, 4, 768, 151936, 32768, 0, False, True),
    "21b": Shape("SmallThinker-21BA3B", 52, 2560, 28, 4, 128, 64, 6, 768, 151936, 16384, 4096, True, False),
}
