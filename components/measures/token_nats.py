"""Losses of given next tokens with few logits at a time: ``out, nats_BT = next_token_nats(model, inputs, targets)``.

With a vocabulary of 151,936 the logits of one window of 32,768 tokens are 10 GB, and 20 GB more in float32 and as its
logarithms: an evaluation that made them would need more memory than training, which never does
(``components.pretraining.training.head_loss``).

Legend: B windows, T tokens, D model, R = B * T positions.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_POSITIONS = 1024
"""Positions whose logits are held at once."""


@torch.no_grad()
def next_token_nats(
    model: Any,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    documents_BT: Tensor | None = None,
    chunk_positions: int = CHUNK_POSITIONS,
) -> tuple[Any, Tensor]:
    """Cross-entropy of every target after its inputs, without gradients.

    Args:
        model: a :class:`model.SmallThinkerForCausalLM`.
        inputs_BT: int64 ids ``[B, T]``.
        targets_BT: the ids that follow, ``[B, T]``.
        documents_BT: document numbers, as the model takes them.
        chunk_positions: positions whose logits are held at once.

    Returns:
        The layers' output (:class:`model.modeling.ModelOutputWithStats`), and nats ``[B, T]`` in float32.
    """
    out = model.model(input_ids=inputs_BT, document_ids=documents_BT, use_cache=False)
    x_RD, targets_R = out.last_hidden_state.flatten(0, 1), targets_BT.flatten()
    nats_R = torch.empty(len(x_RD), dtype=torch.float32, device=x_RD.device)
    for start in range(0, len(x_RD), chunk_positions):
        part = slice(start, start + chunk_positions)
        logits_rV = model.lm_head(x_RD[part])
        nats_R[part] = F.cross_entropy(logits_rV.float(), targets_R[part], reduction="none")
    return out, nats_R.view(targets_BT.shape)
