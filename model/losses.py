"""Losses: next-token cross-entropy, load balance over a data-parallel group, router z-loss; each returned by itself.

The load-balance loss follows Qiu et al. (arXiv 2501.11873): expert frequencies are all-reduced over a group of
data-parallel ranks and summed over the micro-steps since the last optimizer step, because balance within one
micro-batch hinders experts from specialising.

Legend: B batch, T tokens, V vocabulary, L layers, E experts, K top-k.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy with its gradient computed alongside, a few rows at a time so that they stay in cache.

    The plain formulation makes four passes over float32 copies of the logits (256 MiB at 4096 x 4096), most of
    whose time goes into page faults on a CPU.
    """

    _CHUNK_BYTES = 1 << 20

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        rows = max(1, _ChunkedCrossEntropy._CHUNK_BYTES // (4 * logits_TV.shape[1]))
        gradient_TV = torch.empty_like(logits_TV) if ctx.needs_input_grad[0] else None
        keep_T = targets_T != IGNORED_LABEL
        index_T1 = targets_T.where(keep_T, 0)[:, None]
        weight_T = keep_T.float() / keep_T.sum().clamp(min=1)
        total = torch.zeros(())
        for start in range(0, logits_TV.shape[0], rows):
            chunk_tV = logits_TV[start : start + rows].float()
            index_t1, weight_t = index_T1[start : start + rows], weight_T[start : start + rows]
            chosen_t1 = chunk_tV.gather(1, index_t1)
            normaliser_t1 = torch.logsumexp(chunk_tV, dim=1, keepdim=True)
            total += ((normaliser_t1 - chosen_t1)[:, 0] * weight_t).sum()
            if gradient_TV is not None:
                gradient_tV = torch.sub(chunk_tV, normaliser_t1).exp_().mul_(weight_t[:, None])
                gradient_tV.scatter_add_(1, index_t1, -weight_t[:, None])
                gradient_TV[start : start + rows] = gradient_tV
        ctx.gradient_TV = gradient_TV
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        gradient_TV, ctx.gradient_TV = ctx.gradient_TV, None
        if gradient_TV is None:
            raise RuntimeError("The cross-entropy's gradient was already used; it cannot be taken twice.")
        return gradient_TV if scale.item() == 1.0 else gradient_TV.mul_(scale), None


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    """Mean cross-entropy (nats) of predicting ``labels[:, t + 1]`` from position t.

    Labels of -100 are ignored, and so is the first token of a packed document, which nothing in it predicts. A batch
    without any valid label gives 0.
    """
    targets_BT = labels_BT[:, 1:]
    if documents_BT is not None:
        crosses_BT = documents_BT[:, 1:] != documents_BT[:, :-1]
        targets_BT = targets_BT.masked_fill(crosses_BT | (documents_BT[:, 1:] < 0), IGNORED_LABEL)
    targets = F.pad(targets_BT, (0, 1), value=IGNORED_LABEL).reshape(-1)
    logits = logits_BTV.flatten(0, 1)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        loss: Tensor = _ChunkedCrossEntropy.apply(logits, targets)
        return loss
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (targets != IGNORED_LABEL).sum().clamp(min=1)


def router_scores(logits_TE: Tensor, softmax: bool) -> Tensor:
    """Scores s over *all* experts for the load-balance loss, float32, each row summing to 1.

    Softmax routing: softmax over E. Sigmoid routing: sigmoids divided by their sum.
    """
    logits_TE = logits_TE.float()
    if softmax:
        return torch.softmax(logits_TE, dim=-1)
    scores_TE = torch.sigmoid(logits_TE)
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True)


def masked_mean(x: Tensor, valid_T: Tensor | None) -> Tensor:
    """Mean over the first axis of ``[T, ...]``, counting valid tokens only."""
    if valid_T is None:
        return x.mean(dim=0)
    weight_T = valid_T.to(x.dtype)
    total = torch.einsum("t...,t->...", x, weight_T)
    return total / weight_T.sum().clamp(min=1)


class LoadBalance:
    """Expert frequencies since the last optimizer step, pooled over a data-parallel group.

    With ``n_i`` the tokens of a rank and micro-step that select expert i, and T its valid tokens,
    ``f_i = sum n_i / (K * sum T)`` over the group's ranks and the micro-steps so far (a constant for the gradient), and
    a layer's ``loss = E * sum_i f_i * P_i`` where ``P_i`` is the rank's own mean score and carries the gradient. It is
    1 at balance. No factor for the group's size is needed: the data-parallel mean of the ranks' losses supplies it.

    Call :meth:`reset` after each optimizer step. In the running form early micro-steps use fewer counts than late ones;
    :meth:`counting` gives the exact form: first run all micro-batches within it (no gradient), then train on them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """``group`` pools the counts; ``None`` keeps to this rank."""
        self.group = group
        self._pooled: Tensor | None = None  # [L, E + 1]: counts per expert, then valid tokens
        self._frozen = False
        self._counting = False

    def reset(self) -> None:
        """Forget all counts: to be called after each optimizer step."""
        self._pooled = None
        self._frozen = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Collect exact counts: forwards within only count, and forwards after use these counts until the reset."""
        self.reset()
        self._counting = True
        try:
            yield
        finally:
            self._counting = False
        self._frozen = self._pooled is not None

    @property
    def counts(self) -> Tensor | None:
        """Pooled counts ``[L, E]`` since the reset, or ``None``."""
        return None if self._pooled is None else self._pooled[:, :-1]

    @torch.no_grad()
    def frequencies(self, counts_LE: Tensor, tokens: Tensor, training: bool) -> Tensor:
        """f, ``[L, E]`` float32 with rows summing to 1, after taking this micro-step's counts into account.

        Args:
            counts_LE: valid tokens of this micro-step that chose each expert.
            tokens: number of valid tokens of this micro-step, int64 scalar.
            training: False leaves the running counts untouched and uses this micro-step's own.
        """
        step = torch.cat((counts_LE, tokens.expand(counts_LE.shape[0], 1)), dim=1)
        if not (training or self._counting):
            pooled = step
        elif self._frozen:
            assert self._pooled is not None
            pooled = self._pooled
        else:
            if self.group is not None:
                step = step.clone()
                dist.all_reduce(step, group=self.group)
            pooled = step if self._pooled is None else self._pooled + step
            self._pooled = pooled
        counts = pooled[:, :-1].float()
        return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def load_balance_loss(frequencies_LE: Tensor, mean_scores_LE: Tensor) -> Tensor:
    """``E * sum_i f_i P_i`` of every layer: ``[L]``, each 1 at perfect balance.

    Gradient flows through the mean scores only. What is minimised is the *sum* over layers, so that a coefficient means
    the same at any depth (Megatron-LM, Qiu et al.).
    """
    experts = frequencies_LE.shape[1]
    return experts * (frequencies_LE.detach() * mean_scores_LE).sum(dim=1)


def router_z(logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """Mean over valid tokens of ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, equation 5)."""
    return masked_mean(torch.logsumexp(logits_TE.float(), dim=-1).square(), valid_T)
