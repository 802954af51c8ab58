"""Gradients: chunked cross-entropy, fused expert loop, low precision, checkpointing and compilation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.experts import _pad_rows, _row_quantum
from model.losses import next_token_loss
from tests.model.factory import tiny, token_ids


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("softmax", [True, False])
def test_backends_give_the_gradients_of_the_dense_form(backend: str, softmax: bool) -> None:
    # dense is plain autograd over every expert, so it is the reference for the hand-written backward
    model = tiny(moe_primary_router_apply_softmax=softmax, load_balance_coef=0.1, router_z_coef=0.01)
    ids = token_ids(2, 21)
    model.set_expert_backend("dense")
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_expert_backend(backend)
    model(ids, labels=ids).loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_grouped_experts_equal_the_loop(dtype: torch.dtype, padded: bool) -> None:
    """Outputs, counts and gradients on rows that leave one expert idle, against the loop in float32."""
    experts, generator = tiny().model.layers[0].block_sparse_moe.experts, torch.Generator().manual_seed(3)
    count, width, top_k = experts.num_experts, experts.down_proj.shape[1], 2
    m_TD = torch.randn(37, width, generator=generator)
    chosen_TK = torch.stack([torch.randperm(count - 1, generator=generator)[:top_k] for _ in range(37)])
    weights_TK = torch.rand(37, top_k, generator=generator)
    g_TD = torch.randn(37, width, generator=generator)
    valid_T = torch.arange(37) < 30 if padded else None
    for parameter in experts.parameters():  # both see the same rounded values
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        parameter.data = parameter.data.to(dtype).float()
    results = []
    for backend, working in (("loop", torch.float32), ("grouped", dtype)):
        copied = copy.deepcopy(experts).to(working)
        copied.backend = backend
        m, weights = (x.to(dtype).to(working).requires_grad_() for x in (m_TD, weights_TK))
        out_TD, active_E = copied(m, weights, chosen_TK, valid_T)
        out_TD.backward(g_TD.to(dtype).to(working))
        found = (out_TD, m.grad, weights.grad, copied.gate_up_proj.grad, copied.down_proj.grad)
        results.append(([x.detach().float() for x in found], active_E))
    (expected, active_E), (found, grouped_active_E) = results
    assert torch.equal(found[3][count - 1], torch.zeros_like(found[3][count - 1]))
    bound = 1e-5 if dtype == torch.float32 else 0.02
    for one, other in zip(expected, found, strict=True):
        assert (other - one).norm() <= bound * one.norm()
    assert grouped_active_E.sum() > 0
    if dtype == torch.float32:
        assert torch.equal(grouped_active_E, active_E)


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    model = tiny(moe_num_active_primary_experts=1)
    model.set_expert_backend("loop")
    ids = token_ids(1, 2)
    output = model(ids, labels=ids)
    output.loss.backward()
    idle = output.router_stats.expert_counts[0] == 0
    assert idle.any()
    gradient = model.model.layers[0].block_sparse_moe.experts.gate_up_proj.grad
    assert torch.equal(gradient[idle], torch.zeros_like(gradient[idle]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(2, 33), st.integers(2, 50), st.integers(0, 99), st.booleans())
def test_chunked_cross_entropy_equals_torchs(
    batch: int, tokens: int, vocab: int, seed: int, low: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if low else torch.float32
    logits = (8 * torch.randn(batch, tokens, vocab, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (batch, tokens), generator=generator)
    labels[torch.rand(batch, tokens, generator=generator) < 0.3] = -100
    loss = next_token_loss(logits, labels)
    (3.0 * loss).backward()
    reference = logits.detach().float().requires_grad_()
    targets = labels[:, 1:].reshape(-1)
    expected = F.cross_entropy(reference[:, :-1].flatten(0, 1), targets, reduction="sum")
    expected = expected / (targets != -100).sum().clamp(min=1)
    (3.0 * expected).backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    # Where p is almost 1, p - 1 is rounded: 3e-6 is the worst of 6,000 cases in float32.
    assert torch.allclose(logits.grad.float(), reference.grad, atol=2e-2 if low else 1e-5)


def test_labels_all_ignored_give_zero() -> None:
    model, ids = tiny(), token_ids(1, 5)
    output = model(ids, labels=torch.full_like(ids, -100))
    assert output.ce_loss.item() == 0.0
    output.loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


@pytest.mark.parametrize("mode", ["autocast", "pure"])
@pytest.mark.parametrize("documents", [False, True])
def test_bfloat16_training_follows_float32(mode: str, documents: bool) -> None:
    # Takes the paths made for low precision on CPUs: padded expert rows, attention by plain products.
    model = tiny(initializer_range=0.05).train()
    ids = token_ids(4, 40)
    packed = (torch.arange(40) // 13)[None].expand(4, -1) if documents else None
    twin = copy.deepcopy(model)
    model(ids, labels=ids, document_ids=packed).loss.backward()
    if mode == "pure":
        twin.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        twin(ids, labels=ids, document_ids=packed).loss.backward()
    expected, found = gradients(model), gradients(twin)
    for name, value in expected.items():
        error = (found[name].float() - value).norm() / value.norm().clamp(min=1e-6)
        assert error < 0.35, (name, float(error))  # a near tie of experts may flip
    whole = torch.cat([value.flatten() for value in expected.values()])
    other = torch.cat([found[name].float().flatten() for name in expected])
    assert F.cosine_similarity(whole, other, dim=0) > 0.99


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9))
def test_padding_rows_keeps_order_and_experts(sizes: list[int]) -> None:
    experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    quantum = _row_quantum(sum(sizes), len(sizes))
    padded, slots = _pad_rows(sizes, quantum, experts)
    assert all(
        wide % quantum == 0 and 0 <= wide - size < quantum for wide, size in zip(padded, sizes, strict=True)
    )
    starts = [sum(padded[:e]) for e in range(len(sizes))]
    expected = [starts[e] + i for e, size in enumerate(sizes) for i in range(size)]
    assert slots.tolist() == expected


@pytest.mark.parametrize("lead", [0, 2])
def test_gradient_checkpointing_changes_nothing_and_counts_once(lead: int) -> None:
    model = tiny(load_balance_coef=0.1, router_lead=lead).train()
    ids = token_ids(2, 19)
    model(ids, labels=ids).loss.backward()
    expected, counts = gradients(model), model.balance.counts.clone()
    model.zero_grad()
    model.balance.reset()
    model.activation_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert torch.equal(model.balance.counts, counts)
    for name, value in gradients(model).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


@pytest.mark.campaign
def test_compiled_forward_and_backward() -> None:
    model = tiny(load_balance_coef=0.1)
    ids = token_ids(2, 19)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model)
    output = compiled(ids, labels=ids)
    output.loss.backward()
    for name, value in gradients(model).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_training_learns() -> None:
    model = tiny(initializer_range=0.05, load_balance_coef=0.01).train()
    ids = token_ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.balance.reset()
        losses.append(output.ce_loss.item())
    assert losses[-1] < 0.3 * losses[0]
