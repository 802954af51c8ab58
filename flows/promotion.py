"""Moves the registry's aliases after a pipeline (``candidate``, ``champion``, ``edge-stable``), each through a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flows.runner import StageOutcome

if TYPE_CHECKING:
    from components.tracking.registry import ModelRegistry

# alias -> (stage, metric, higher is better): the figure that must not be worse than the present holder's.
GATES: dict[str, tuple[str, str, bool]] = {
    "candidate": ("merge", "utility", True),
    "champion": ("evaluate", "merged_topic_accuracy", True),
    "edge-stable": ("benchmark", "q4_0_decode_tokens_per_s", True),
}


def promote(registry: ModelRegistry, run_id: str, outcomes: Mapping[str, StageOutcome]) -> list[str]:
    """Register the merged model and move each alias whose gate passes; returns the recorded reasons."""
    if "merge" not in outcomes:
        return []
    merged = outcomes["merge"]
    version = registry.add_version(run_id, merged.identity, merged.folder, merged.manifest)
    reasons = []
    for alias, (stage, metric, higher_is_better) in GATES.items():
        if stage not in outcomes:
            continue
        value = outcomes[stage].manifest.metrics.get(metric)
        if value is None:
            reasons.append(f"{alias} stays: {stage} reported no {metric}")
        else:
            reasons.append(registry.gate(alias, version, metric, value, higher_is_better))
    return reasons
