"""The CUDA path against plain references in float32, forward and backward: ``attention_errors(...)`` and others.

Every function computes one piece of training twice from the same values, rounded to the working dtype: as the GPU does
it, within ``path()``, and by a formulation that is easy to believe. It returns the relative error of every result and
gradient: the norm of the difference over the norm of what is right, 0 where both are zero. ``path`` is
``interpreted_kernels`` on CPUs, and nothing on a GPU.

Legend: B batch, T tokens, N query heads, G key/value heads, H head dim, D model, E experts, K top-k, V vocabulary.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from components.pretraining.training.head_loss import fused_token_losses
from model import SmallThinkerConfig
from model.experts import Experts
from model.flex import attend, document_blocks
from model.masks import build_layer_mask

Path = Callable[[], AbstractContextManager[Any]]
# A few roundings of what is stored; sums are in float32 everywhere.
TOLERANCE = {
    torch.float32: 32 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}


def relative_errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """By name, the norm of the difference over that of what is right; not a number where one of them is not."""
    if found.keys() != right.keys():
        raise ValueError(f"compared are {sorted(found)} with {sorted(right)}; the names must be the same")
    errors = {}
    for name, value in right.items():
        wanted = value.detach().to(torch.float64)
        off = (found[name].detach().to(wanted) - wanted).norm()
        size = wanted.norm()
        errors[name] = float(off / size if float(size) else off)
    return errors


def beyond_tolerance(errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """The errors that are larger than roundings in ``dtype`` explain."""
    return {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}


def random_values(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Normal values in float32, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def packed_documents(batch: int, tokens: int, count: int, device: torch.device) -> Tensor:
    """Rows of ``count`` documents each, ``[B, T]``; they end anywhere within the kernels' blocks."""
    generator = torch.Generator().manual_seed(tokens)
    starts_BT = torch.zeros(batch, tokens, dtype=torch.int64)
    for row in starts_BT:
        row[torch.randperm(tokens - 1, generator=generator)[: count - 1] + 1] = 1
    return starts_BT.cumsum(dim=1).to(device)


def _leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype).requires_grad_()


def _gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.grad for name, value in tensors.items() if value.grad is not None}


@dataclass(frozen=True)
class AttentionCase:
    """Shapes of one attention.

    Attributes:
        tokens, window, documents: of a row; no window is ``None``.
        heads, groups, head_dim, batch: N, G, H and B.
    """

    tokens: int
    window: int | None = None
    documents: int = 1
    heads: int = 2
    groups: int = 1
    head_dim: int = 32
    batch: int = 1


def attention_errors(
    case: AttentionCase,
    dtype: torch.dtype,
    device: torch.device,
    path: Path,
    kernels_window: int | None = None,
) -> dict[str, float]:
    """FlexAttention against a softmax with the trainer's own mask in memory.

    Args:
        case: the shapes. On long rows only the first key's heads are compared, whose scores lie in memory.
        dtype: of the kernels' inputs.
        device: where both are computed.
        path: makes the GPU's path be taken.
        kernels_window: another window for the kernels than for the reference, to see that it is noticed.
    """
    shapes = [(case.batch, n, case.tokens, case.head_dim) for n in (case.heads, case.groups, case.groups)]
    values = [random_values(*shape, seed=i, device=device).to(dtype) for i, shape in enumerate(shapes)]
    up_BNTH = random_values(*shapes[0], seed=9, device=device).to(dtype)
    documents_BT = packed_documents(case.batch, case.tokens, case.documents, device)
    ours = dict(zip("qkv", (_leaf(value, dtype) for value in values), strict=True))
    with path():
        blocks = document_blocks(documents_BT, kernels_window or case.window)
        out_BNTH = attend(ours["q"], ours["k"], ours["v"], blocks)
        out_BNTH.backward(up_BNTH)
    mask = build_layer_mask(
        queries=case.tokens,
        keys=case.tokens,
        key_offset=0,
        past_tokens=0,
        window=case.window,
        padding_BS=None,
        documents_BT=documents_BT,
        device=device,
    )
    compared = case.heads if case.tokens <= 2048 else case.heads // case.groups
    groups = case.groups * compared // case.heads
    parts = [value[:, :n] for value, n in zip(values, (compared, groups, groups), strict=True)]
    plain = dict(zip("qkv", (_leaf(part, torch.float32) for part in parts), strict=True))
    reference = F.scaled_dot_product_attention(
        plain["q"], plain["k"], plain["v"], attn_mask=mask.allowed, enable_gqa=compared != groups
    )
    reference.backward(up_BNTH[:, :compared].float())
    found = {"out": out_BNTH, **_gradients(ours)}
    right = {"out": reference, **_gradients(plain)}
    return relative_errors({name: value[:, : right[name].shape[1]] for name, value in found.items()}, right)


def experts_errors(
    config: SmallThinkerConfig,
    tokens: int,
    chosen: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    path: Path,
) -> dict[str, float]:
    """The grouped experts against the loop over experts, for tokens that choose K times among ``chosen``.

    Args:
        config: the architecture; top-k, experts and widths count.
        tokens: T, which may be 0.
        chosen: experts that get rows; all others get none.
        dtype: of weights and inputs.
        device: where both are computed.
        path: makes the GPU's path be taken.
    """
    top_k, width = config.moe_num_active_primary_experts, config.hidden_size
    generator = torch.Generator().manual_seed(tokens)
    experts_TK = torch.tensor(list(chosen))[torch.randint(len(chosen), (tokens, top_k), generator=generator)]
    given = [
        random_values(*shape, seed=5 + i, device=device).to(dtype)
        for i, shape in enumerate(((tokens, width), (tokens, top_k), (tokens, width)))
    ]
    runs: list[dict[str, Tensor]] = []
    for working in (torch.float32, dtype):
        is_ours = len(runs) == 1
        with torch.device("meta"):
            layer = Experts(config)
        layer.backend = "auto" if is_ours else "loop"
        for seed, (name, parameter) in enumerate(list(layer.named_parameters())):
            value = random_values(*parameter.shape, seed=seed, device=device) / parameter.shape[2] ** 0.5
            setattr(layer, name, torch.nn.Parameter(value.to(dtype).to(working)))
        m_TD, weights_TK = (_leaf(value, working) for value in given[:2])

        def run(layer: Any = layer, m_TD: Tensor = m_TD, weights_TK: Tensor = weights_TK) -> Any:
            out_TD, active_E = layer(m_TD, weights_TK, experts_TK.to(device))
            out_TD.backward(given[2].to(out_TD.dtype))
            return out_TD, active_E

        if is_ours and tokens:
            with path():
                out_TD, active_E = run()
        else:
            out_TD, active_E = run()
        gradients = _gradients({"m": m_TD, "weights": weights_TK, **dict(layer.named_parameters())})
        runs.append({"out": out_TD, "active": active_E, **gradients})
    right, found = runs
    return relative_errors(found, right)


def loss_errors(
    rows: int, width: int, vocabulary: int, chunk: int, dtype: torch.dtype, device: torch.device, path: Path
) -> dict[str, float]:
    """The fused loss of two rows of ``rows`` tokens against torch's cross-entropy of all logits."""
    x = random_values(2, rows, width, seed=0, device=device).to(dtype)
    head = (random_values(vocabulary, width, seed=1, device=device) * (3 / width**0.5)).to(dtype)
    labels_BT = torch.randint(vocabulary, (2, rows), generator=torch.Generator().manual_seed(2)).to(device)
    ours = {"x": _leaf(x, dtype), "head": _leaf(head, dtype)}
    with path():
        mean, losses_BT = fused_token_losses(ours["x"], ours["head"], labels_BT, chunk)
        mean.backward()
    plain = {"x": _leaf(x, torch.float32), "head": _leaf(head, torch.float32)}
    logits_RV = (plain["x"][:, :-1] @ plain["head"].t()).flatten(0, 1)
    losses_R = F.cross_entropy(logits_RV, labels_BT[:, 1:].flatten(), reduction="none")
    losses_R.mean().backward()
    return relative_errors(
        {"losses": losses_BT.flatten(), **_gradients(ours)}, {"losses": losses_R, **_gradients(plain)}
    )
