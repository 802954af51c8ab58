"""Names of expert weights with and without expert parallelism: ``official_parameter("….experts.experts.w1")``."""

from __future__ import annotations

_STACKS = {"w1": "gate_up_proj", "w2": "down_proj"}


def official_parameter(name: str) -> str | None:
    """A parameter's name in a model whose experts are not sharded.

    ``….experts.experts.w1`` of a sharded model is ``….experts.gate_up_proj``; ``None`` for ``w3``, which only a
    sharded model has.
    """
    owner, _, leaf = name.rpartition(".")
    if not owner.endswith(".experts.experts"):
        return name
    return f"{owner.removesuffix('.experts')}.{_STACKS[leaf]}" if leaf in _STACKS else None


def sharded_parameter(official: str) -> str:
    """The inverse of :func:`official_parameter`: the name where experts are sharded."""
    owner, _, leaf = official.rpartition(".")
    stacks = {stack: name for name, stack in _STACKS.items()}
    return f"{owner}.experts.{stacks[leaf]}" if leaf in stacks else official
