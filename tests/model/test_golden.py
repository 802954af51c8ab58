"""The forward pass against golden logits, and proof that wrong variants would be noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model import SmallThinkerForCausalLM, modeling
from model.attention import Attention
from model.experts import Backend, Router
from model.masks import build_layer_mask
from model.modeling import SmallThinkerDecoderLayer
from tests.model.golden import load

TOLERANCE = 2e-5
NAMES = ("21b", "4b")


@torch.no_grad()
def worst_error(model: SmallThinkerForCausalLM, ids: Tensor, expected: Tensor) -> float:
    return float((model(ids).logits - expected).abs().max())


@pytest.mark.parametrize("backend", ["auto", "loop", "grouped", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_golden_ones(name: str, backend: Backend) -> None:
    model, ids, expected = load(name)
    model.set_expert_backend(backend)
    assert worst_error(model, ids, expected) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_expert_choice_equals_that_of_double_precision(name: str) -> None:
    # The golden logits were computed in float64 and are reproduced there to 1e-6 (their own rounding), so float64
    # routing is the golden routing.
    model, ids, expected = load(name)
    with torch.no_grad(), model.record_experts():
        single = model(ids).router_stats
        exact = model.double()(ids)
    assert float((exact.logits - expected).abs().max()) < 1e-6
    chosen = exact.router_stats.experts
    assert torch.equal(single.experts.sort(-1).values, chosen.sort(-1).values)
    assert chosen.shape == (
        model.config.num_hidden_layers,
        2,
        40,
        model.config.moe_num_active_primary_experts,
    )
    counts = torch.stack([torch.bincount(layer.flatten(), minlength=8) for layer in chosen])
    assert torch.equal(counts, single.expert_counts)


def _router_on_normed_input(monkeypatch: pytest.MonkeyPatch, model: SmallThinkerForCausalLM) -> None:
    for layer in model.model.layers:
        router = layer.block_sparse_moe.primary_router
        original, norm = router.forward, layer.input_layernorm
        monkeypatch.setattr(router, "forward", lambda x, _, f=original, n=norm: f(n(x)))


def _router_on_expert_input(monkeypatch: pytest.MonkeyPatch, model: SmallThinkerForCausalLM) -> None:
    original = SmallThinkerDecoderLayer.forward

    def forward(self: SmallThinkerDecoderLayer, x: Tensor, *args: object, **kwargs: object) -> object:
        router = self.block_sparse_moe.primary_router
        y = x + self.self_attn(self.input_layernorm(x), *args[:3], None)
        saved = router.forward
        router.forward = lambda *_: saved(self.post_attention_layernorm(y).flatten(0, 1))
        try:
            return original(self, x, *args, **kwargs)
        finally:
            router.forward = saved

    monkeypatch.setattr(SmallThinkerDecoderLayer, "forward", forward)


def _swapped_scoring(monkeypatch: pytest.MonkeyPatch, model: SmallThinkerForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, Router):
            monkeypatch.setattr(module, "softmax", not module.softmax)


def _full_softmax_weights(monkeypatch: pytest.MonkeyPatch, model: SmallThinkerForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, Router):
            original = module.forward

            def forward(x: Tensor, _: None, f: Callable[[Tensor], object] = original) -> object:
                routing = f(x)
                weights = routing.logits_TE.softmax(-1).gather(1, routing.experts_TK)
                return routing._replace(weights_TK=weights)

            monkeypatch.setattr(module, "forward", forward)


def _window_off_by(delta: int) -> Callable[[pytest.MonkeyPatch, SmallThinkerForCausalLM], None]:
    def apply(monkeypatch: pytest.MonkeyPatch, model: SmallThinkerForCausalLM) -> None:
        def wrong(**kwargs: object) -> object:
            if kwargs["window"] is not None:
                kwargs["window"] += delta
            return build_layer_mask(**kwargs)

        monkeypatch.setattr(modeling, "build_layer_mask", wrong)

    return apply


def _rope(value: bool) -> Callable[[pytest.MonkeyPatch, SmallThinkerForCausalLM], None]:
    def apply(monkeypatch: pytest.MonkeyPatch, model: SmallThinkerForCausalLM) -> None:
        for module in model.modules():
            if isinstance(module, Attention):
                monkeypatch.setattr(module, "uses_rope", value)

    return apply


BOTH = {
    "router on the normed input": _router_on_normed_input,
    "router after attention": _router_on_expert_input,
    "swapped scoring": _swapped_scoring,
    "softmax over all experts, not renormalised": _full_softmax_weights,
}
ONLY_21B = {
    "window one too wide": _window_off_by(1),
    "window one too narrow": _window_off_by(-1),
    "RoPE everywhere": _rope(True),
    "RoPE nowhere": _rope(False),
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in NAMES for variant in BOTH] + [("21b", variant) for variant in ONLY_21B],
)
def test_wrong_variants_fail_the_comparison(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, expected = load(name)
    {**BOTH, **ONLY_21B}[variant](monkeypatch, model)
    assert worst_error(model, ids, expected) > 1000 * TOLERANCE


def test_bfloat16_is_close_and_chooses_mostly_the_same_experts() -> None:
    model, ids, expected = load("21b")
    with torch.no_grad(), model.record_experts():
        exact = model(ids).router_stats.experts
        low = model.bfloat16()(ids)
    assert low.logits.dtype == torch.bfloat16
    error = (low.logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.05
    same = (exact.sort(-1).values == low.router_stats.experts.sort(-1).values).float().mean()
    assert same > 0.9
