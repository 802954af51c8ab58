"""Which weights decay: ``torch.optim.AdamW(parameter_groups(model, weight_decay=0.1))``."""

from __future__ import annotations

from typing import Any

import torch


def parameter_groups(model: torch.nn.Module, weight_decay: float, muon: bool = False) -> list[dict[str, Any]]:
    """Matrices of attention, router and experts decay; norms, embeddings and the output matrix do not.

    With ``muon``, groups say by a key of that name whether they are Muon's: the matrices of attention and experts.

    Decay bounds the scale of matrices whose output is normalised. An embedding row of a rare token gets gradients
    seldom, and decay would shrink it in between. Experts of which this rank holds a part form groups of their own:
    ZeRO partitions them over fewer ranks.
    """
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    matrices: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_table = "embed_tokens" in name or "lm_head" in name
        if parameter.ndim < 2 or is_table:
            free.append(parameter)
        elif muon and "router" not in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": free, "weight_decay": 0.0, "name": "free"},
    ]
    if muon:
        groups.append({"params": matrices, "weight_decay": weight_decay, "name": "matrices"})
        for group in groups:
            group["muon"] = group["name"] == "matrices"
    if any(not getattr(parameter, "allreduce", True) for group in groups for parameter in group["params"]):
        from deepspeed.moe.utils import (  # type: ignore[import-untyped]
            split_params_into_different_moe_groups_for_optimizer,
        )

        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    return groups
