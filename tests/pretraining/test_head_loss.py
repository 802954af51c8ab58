"""The fused cross-entropy gives the losses and gradients of the plain one."""

from __future__ import annotations

import pytest
import torch

from components.pretraining.training.head_loss import (
    _as_one_kernel,
    _losses_and_gradient,
    fused_token_losses,
    token_losses,
)


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x_BTD = torch.randn(3, 8, 6).to(dtype).requires_grad_()
    head_VD = (3 * torch.randn(11, 6)).to(dtype).requires_grad_()
    return x_BTD, head_VD, torch.randint(0, 11, (3, 8))


@pytest.mark.parametrize("chunk", [1, 5, 21, 1000])
def test_fused_equals_plain(chunk: int) -> None:
    x_BTD, head_VD, labels_BT = example()
    plain_BT = token_losses(x_BTD @ head_VD.T, labels_BT)
    mean, losses_BT = fused_token_losses(x_BTD, head_VD, labels_BT, chunk)
    torch.testing.assert_close(losses_BT, plain_BT)
    torch.testing.assert_close(mean, plain_BT.mean())
    # As training uses it: scaled, and with a second path into the gradient of x.
    wanted = torch.autograd.grad(0.25 * plain_BT.mean() + x_BTD.square().sum(), (x_BTD, head_VD))
    found = torch.autograd.grad(0.25 * mean + x_BTD.square().sum(), (x_BTD, head_VD))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert not losses_BT.requires_grad


def test_chunks_in_bfloat16_are_added_in_float32() -> None:
    """Two thousand small contributions to the matrix: in bfloat16 most would vanish."""
    torch.manual_seed(1)
    x_BTD = torch.randn(1, 2049, 4).bfloat16()
    head_VD = torch.randn(7, 4).bfloat16().requires_grad_()
    labels_BT = torch.randint(0, 7, (1, 2049))
    mean, _ = fused_token_losses(x_BTD, head_VD, labels_BT, 1)
    (found,) = torch.autograd.grad(mean, head_VD)
    exact_VD = head_VD.detach().double().requires_grad_()
    exact = token_losses((x_BTD.double() @ exact_VD.T), labels_BT).mean()
    (wanted,) = torch.autograd.grad(exact, exact_VD)
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_the_gradient_are_the_same(dtype: torch.dtype) -> None:
    """The one that GPUs compile, and the one that CPUs run."""
    torch.manual_seed(2)
    logits_rV, labels_r = (4 * torch.randn(9, 13)).to(dtype), torch.randint(0, 13, (9,))
    wanted = _as_one_kernel(logits_rV, labels_r)
    for one, other in zip(_losses_and_gradient(logits_rV.clone(), labels_r), wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)


def test_without_gradients_none_are_made() -> None:
    x_BTD, head_VD, labels_BT = example()
    with torch.no_grad():
        mean, losses_BT = fused_token_losses(x_BTD, head_VD, labels_BT, 5)
    assert not mean.requires_grad
    torch.testing.assert_close(losses_BT, token_losses(x_BTD @ head_VD.T, labels_BT))
