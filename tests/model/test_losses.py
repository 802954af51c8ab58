"""The load-balance loss against its definition, alone and over a process group; the z-loss; the counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.losses import LoadBalance, load_balance_loss, router_scores, router_z
from tests.model.factory import tiny, token_ids
from tests.waiting import CEILING_S, wait_for


def pooled_loss(logits: torch.Tensor, top_k: int, softmax: bool) -> torch.Tensor:
    """The definition on all tokens at once: E * sum_i f_i P_i for one layer, ``[T, E]`` logits."""
    tokens, experts = logits.shape
    chosen = logits.topk(top_k, dim=-1).indices
    f = torch.bincount(chosen.flatten(), minlength=experts).double() / (top_k * tokens)
    scores = logits.softmax(-1) if softmax else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    return experts * (f * scores.mean(0)).sum()


@pytest.mark.parametrize("softmax", [True, False])
def test_a_single_micro_step_equals_the_definition(softmax: bool) -> None:
    model = tiny(
        num_hidden_layers=1,
        rope_layout=[0],
        sliding_window_layout=[0],
        moe_primary_router_apply_softmax=softmax,
    )
    model.double()
    ids = token_ids(3, 15)
    with torch.no_grad():
        output = model.train()(ids, output_hidden_states=True)
        router = model.model.layers[0].block_sparse_moe.primary_router
        logits = output.hidden_states[0].flatten(0, 1) @ router.weight.t()
    expected = pooled_loss(logits, 3, softmax)
    assert float(output.load_balance_loss) == pytest.approx(float(expected), abs=1e-6)
    assert float(output.router_z_loss) == pytest.approx(float(logits.logsumexp(-1).square().mean()), rel=1e-6)


def test_balance_has_loss_one_and_collapse_has_more() -> None:
    uniform = torch.full((1, 8), 1 / 8)
    assert float(load_balance_loss(uniform, uniform)) == pytest.approx(1.0)
    collapsed = torch.zeros(1, 8)
    collapsed[0, 0] = 1.0
    assert float(load_balance_loss(collapsed, collapsed)) == pytest.approx(8.0)


@pytest.mark.parametrize("layers", [1, 3])
def test_every_layer_counts_whole_however_many_there_are(layers: int) -> None:
    layout = [0] * layers
    shape = {"num_hidden_layers": layers, "rope_layout": layout, "sliding_window_layout": layout}
    model = tiny(**shape, load_balance_coef=0.3, router_z_coef=0.2).double().train()
    ids = token_ids(2, 9)
    output = model(ids, labels=ids, output_hidden_states=True)
    expected = 0.0
    for layer, hidden in zip(model.model.layers, output.hidden_states, strict=False):
        logits = (hidden.flatten(0, 1) @ layer.block_sparse_moe.primary_router.weight.t()).detach()
        expected += 0.3 * float(pooled_loss(logits, 3, softmax=True))
        expected += 0.2 * float(logits.logsumexp(-1).square().mean())
    assert float((output.loss - output.ce_loss).detach()) == pytest.approx(expected, rel=1e-5)
    assert output.load_balance_loss.shape == output.router_z_loss.shape == (layers,)


def test_scores_sum_to_one() -> None:
    logits = torch.randn(5, 8) * 4
    for softmax in (True, False):
        assert torch.allclose(router_scores(logits, softmax).sum(-1), torch.ones(5))
    assert torch.allclose(
        router_z(logits, torch.tensor([True, False, True, True, True])),
        torch.logsumexp(logits[[0, 2, 3, 4]], -1).square().mean(),
    )


def test_running_counts_accumulate_and_reset() -> None:
    model = tiny().train()
    first, second = token_ids(2, 9, seed=1), token_ids(1, 13, seed=2)
    one = model(first).router_stats.expert_counts
    two = model(second).router_stats.expert_counts
    assert torch.equal(model.balance.counts, one + two)
    model.balance.reset()
    assert model.balance.counts is None


def test_evaluation_and_no_update() -> None:
    model = tiny().train()
    model(token_ids(2, 9))
    before = model.balance.counts.clone()
    model.eval()
    with torch.no_grad():
        model(token_ids(2, 9, seed=5))
    assert torch.equal(model.balance.counts, before)


def _micro_batches() -> list[torch.Tensor]:
    return [token_ids(2, 8, seed=seed) for seed in range(4)]


def test_two_passes_equal_the_pooled_batch_in_value_and_gradient() -> None:
    model = tiny().double().train()
    batches = _micro_batches()
    model(torch.cat(batches)).load_balance_loss.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad(), model.balance.counting():
        for batch in batches:
            model(batch)
    counts = model.balance.counts.clone()
    total = 0.0
    for batch in batches:
        loss = model(batch).load_balance_loss.sum() / len(batches)
        loss.backward()
        total += float(loss.detach())
    assert torch.equal(model.balance.counts, counts)  # frozen until the reset
    model.balance.reset()
    pooled = model(torch.cat(batches)).load_balance_loss.sum().item()
    assert total == pytest.approx(pooled, abs=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in expected:
            assert torch.allclose(parameter.grad, expected[name], atol=1e-7), name


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)  # forked from a process that may have used several
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for group_size in (1, 2):
        groups = [dist.new_group(list(range(s, s + group_size))) for s in range(0, world, group_size)]
        model = tiny().double().train()
        model.balance = LoadBalance(groups[rank // group_size])
        batch = _micro_batches()[rank]
        with torch.no_grad(), model.balance.counting():
            model(batch)
        loss = model(batch).load_balance_loss.sum()
        loss.backward()
        gradient = model.model.layers[1].block_sparse_moe.primary_router.weight.grad / world
        value = loss.detach() / world
        dist.all_reduce(gradient)
        dist.all_reduce(value)
        if rank == 0:
            torch.save({"value": value, "gradient": gradient}, f"{folder}/{group_size}.pt")
    dist.destroy_process_group()


def test_process_groups_pool_their_counts(tmp_path: Path) -> None:
    context = mp.start_processes(_rank, args=(2, str(tmp_path)), nprocs=2, join=False, start_method="fork")
    wait_for(lambda: context.join(timeout=CEILING_S), "the end of the two ranks")
    batches = _micro_batches()[:2]
    for group_size in (1, 2):
        found = torch.load(tmp_path / f"{group_size}.pt")
        model = tiny().double().train()
        expected = 0.0
        # A group of two pools its counts: as if one process saw all tokens, with no factor of the group's size.
        for part in [torch.cat(batches)] if group_size == 2 else batches:
            loss = model(part).load_balance_loss.sum() * group_size / 2
            loss.backward()
            model.balance.reset()
            expected += float(loss.detach())
        gradient = model.model.layers[1].block_sparse_moe.primary_router.weight.grad
        assert float(found["value"]) == pytest.approx(expected, abs=1e-6)
        assert torch.allclose(found["gradient"], gradient, atol=1e-9)
