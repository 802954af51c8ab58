"""Next-token loss with the output matrix inside: ``mean, losses_BT = fused_token_losses(x, head, labels, 4096)``.

With a vocabulary of 151,936 the logits of a micro-batch are larger than all its other activations. They are computed
for some positions at a time, and their gradient in the same pass, so that nothing of size positions x vocabulary is
kept and no product is done twice (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989, in plain torch;
what lies between the products is compiled into one kernel on GPUs).

Legend: B sequences, T tokens, D model, V vocabulary, R = B * (T - 1) predictions, r some of them.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.compiling import compiled, takes_kernels


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of every next token: ``[B, T - 1]``."""
    losses_R = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten(), reduction="none"
    )
    return losses_R.view(labels_BT.shape[0], -1)


def _losses_and_gradient(logits_rV: Tensor, labels_r: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``[r]`` in float32, and softmax minus one-hot ``[r, V]`` in the logits' dtype; may overwrite these."""
    wide_rV = logits_rV.float()
    normaliser_r1 = torch.logsumexp(wide_rV, dim=1, keepdim=True)
    losses_r = (normaliser_r1 - wide_rV.gather(1, labels_r[:, None]))[:, 0]
    wide_rV.sub_(normaliser_r1).exp_()
    wide_rV.scatter_add_(1, labels_r[:, None], wide_rV.new_full((len(labels_r), 1), -1.0))
    return losses_r, wide_rV.to(logits_rV.dtype)


def _as_one_kernel(logits_rV: Tensor, labels_r: Tensor) -> tuple[Tensor, Tensor]:
    """The same without writing in place, which compiles into one pass over the logits."""
    wide_rV = logits_rV.float()
    normaliser_r1 = torch.logsumexp(wide_rV, dim=1, keepdim=True)
    losses_r = (normaliser_r1 - wide_rV.gather(1, labels_r[:, None]))[:, 0]
    columns_V = torch.arange(logits_rV.shape[1], device=logits_rV.device)
    gradient_rV = torch.exp(wide_rV - normaliser_r1) - (columns_V[None] == labels_r[:, None]).float()
    return losses_r, gradient_rV.to(logits_rV.dtype)


_one_kernel = compiled(_as_one_kernel, dynamic=True)


class _FusedCrossEntropy(torch.autograd.Function):
    """Mean and single losses; the gradients with respect to x and the output matrix are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, head_VD: Tensor, labels_R: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        rows = x_RD.shape[0]
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        losses_and_gradient = _one_kernel if takes_kernels(x_RD) else _losses_and_gradient
        losses_R = torch.empty(rows, dtype=torch.float32, device=x_RD.device)
        grad_x_RD = torch.empty_like(x_RD) if wanted else None
        # Chunks are added up in float32: in bfloat16 the small late ones would be lost.
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wanted else None
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits_rV = x_RD[part] @ head_VD.t()
            losses_R[part], gradient_rV = losses_and_gradient(logits_rV, labels_R[part])
            del logits_rV  # a gigabyte at full sizes, which the next chunk needs
            if grad_x_RD is not None and grad_head_VD is not None:
                torch.mm(gradient_rV, head_VD, out=grad_x_RD[part])
                if head_VD.dtype == torch.float32:
                    grad_head_VD.addmm_(gradient_rV.t(), x_RD[part])
                else:
                    grad_head_VD += gradient_rV.t() @ x_RD[part]
            del gradient_rV
        # Not by save_for_backward: the backward pass scales them in place.
        ctx.gradients = grad_x_RD, grad_head_VD
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(losses_R)
        return losses_R.mean(), losses_R

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad_x_RD, grad_head_VD), ctx.gradients = ctx.gradients, (None, None)
        if grad_x_RD is None:
            raise RuntimeError("The loss's gradient was already used; it cannot be taken twice.")
        factor = scale / grad_x_RD.shape[0]
        grad_x = grad_x_RD.mul_(factor.to(grad_x_RD.dtype))
        return grad_x, grad_head_VD.mul_(factor).to(ctx.head_dtype), None, None


def fused_token_losses(
    x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and every next token's, like :func:`token_losses` of ``x @ head.T``, in little memory.

    Args:
        x_BTD: normed residual stream.
        head_VD: output matrix, in the dtype of x.
        labels_BT: int64 ids, unshifted.
        chunk_tokens: positions whose logits are held at once.

    Returns:
        The mean in nats, float32, which carries the gradient, and the losses ``[B, T - 1]``, which do not.
    """
    x_RD, labels_R = x_BTD[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
    mean, losses_R = _FusedCrossEntropy.apply(x_RD, head_VD, labels_R, chunk_tokens)
    return mean, losses_R.view(labels_BT.shape[0], -1)
