"""The router's choice with a bias, and its logits in float32."""

from __future__ import annotations

import pytest
import torch

from model.experts import Router
from tests.model.factory import tiny, tiny_config, token_ids


def router_and_rows(softmax: bool, dtype: torch.dtype = torch.float32) -> tuple[Router, torch.Tensor]:
    router = Router(tiny_config(moe_primary_router_apply_softmax=softmax))
    generator = torch.Generator().manual_seed(5)
    torch.nn.init.normal_(router.weight, std=0.2, generator=generator)
    rows = torch.randn(40, router.weight.shape[1], generator=generator)
    return router.to(dtype), rows.to(dtype)


@pytest.mark.parametrize("softmax", [True, False])
def test_a_bias_decides_the_choice_and_never_the_weights(softmax: bool) -> None:
    router, rows = router_and_rows(softmax)
    plain = router(rows)
    assert torch.equal(router(rows, torch.zeros(len(router.weight))).experts_TK, plain.experts_TK)
    bias = torch.zeros(len(router.weight))
    bias[2], bias[5] = 2.0, -2.0  # beyond the sigmoid's range: expert 2 always, expert 5 never
    routing = router(rows, bias)
    assert (routing.experts_TK == 2).any(dim=1).all() and not (routing.experts_TK == 5).any()
    chosen = plain.logits_TE.gather(1, routing.experts_TK)
    weights = chosen.softmax(-1) if softmax else chosen.sigmoid() / chosen.sigmoid().sum(-1, keepdim=True)
    assert torch.allclose(routing.weights_TK, weights) and torch.equal(routing.logits_TE, plain.logits_TE)
    routing.weights_TK.sum().backward()
    assert bias.grad is None


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_a_small_bias_moves_only_near_ties(rate: float) -> None:
    router, rows = router_and_rows(softmax=True)
    plain, bias = router(rows), torch.zeros(len(router.weight))
    bias[0] = rate
    moved = (router(rows, bias).experts_TK.sort().values != plain.experts_TK.sort().values).any(dim=1)
    scores = plain.logits_TE.sigmoid()
    third = scores.topk(router.top_k, dim=1).values[:, -1]
    expected = (scores[:, 0] < third) & (scores[:, 0] + rate > third)
    assert torch.equal(moved, expected)


def test_a_model_chooses_with_its_bias_in_training_only() -> None:
    model, ids = tiny(), token_ids(2, 9)
    bias = torch.zeros(len(model.model.layers), model.config.moe_num_primary_experts)
    bias[1, 3] = -2.0
    model.set_choice_bias(bias)
    trained = model.train()(ids).router_stats.expert_counts
    used = model.eval()(ids).router_stats.expert_counts
    assert trained[1, 3] == 0 < used[1, 3]
    model.set_choice_bias(None)
    assert torch.equal(model.train()(ids).router_stats.expert_counts, used)


def test_recomputed_layers_choose_with_the_bias_again() -> None:
    gradients = []
    for recompute in (False, True):
        model, ids = tiny(load_balance_coef=0.1).train(), token_ids(2, 9)
        torch.manual_seed(0)
        model.set_choice_bias(torch.randn(len(model.model.layers), model.config.moe_num_primary_experts))
        if recompute:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].block_sparse_moe.experts.down_proj.grad)
    assert torch.allclose(*gradients, atol=1e-7) and gradients[0].abs().sum() > 0


def test_logits_in_fp32() -> None:
    """Rows that differ in what bfloat16 products round away: only fp32 logits tell the experts apart."""
    router, rows = router_and_rows(softmax=True, dtype=torch.bfloat16)
    exact = rows.double() @ router.weight.double().t()
    low = router(rows)
    assert low.logits_TE.dtype == torch.bfloat16
    router.in_fp32 = True
    high = router(rows)
    assert high.logits_TE.dtype == torch.float32 and high.weights_TK.dtype == torch.bfloat16
    assert torch.allclose(high.logits_TE.double(), exact, atol=1e-5)
    assert (low.logits_TE.double() - exact).abs().max() > 100 * (high.logits_TE.double() - exact).abs().max()
    assert torch.equal(high.experts_TK, exact.topk(router.top_k, dim=1).indices)
    high.logits_TE.sum().backward()
    assert router.weight.grad is not None and router.weight.grad.dtype == torch.bfloat16
    model, ids = tiny().bfloat16(), token_ids(2, 9)
    before = model(ids).logits
    model.set_router_fp32(True)
    assert not torch.equal(model(ids).logits, before)
