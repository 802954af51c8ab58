"""Padding and packed documents: every document's result equals that of the document alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from model.flex import document_blocks
from model.masks import build_layer_mask
from tests.model.factory import tiny, token_ids


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing_for_real_tokens(side: str) -> None:
    model = tiny()
    ids = token_ids(1, 17)
    expected = model(ids)
    pad = torch.zeros(1, 6, dtype=torch.int64)
    zeros, ones = torch.zeros_like(pad), torch.ones_like(ids)
    if side == "left":
        padded, mask, real = torch.cat((pad, ids), 1), torch.cat((zeros, ones), 1), slice(6, None)
    else:
        padded, mask, real = torch.cat((ids, pad), 1), torch.cat((ones, zeros), 1), slice(0, 17)
    found = model(padded, attention_mask=mask)
    assert torch.allclose(found.logits[:, real], expected.logits, atol=1e-5)
    assert torch.isfinite(found.logits).all()
    # statistics and losses leave padding out
    assert torch.equal(found.router_stats.expert_counts, expected.router_stats.expert_counts)
    assert torch.equal(
        found.router_stats.active_neurons_by_expert, expected.router_stats.active_neurons_by_expert
    )
    assert int(found.router_stats.tokens) == 17
    assert torch.allclose(found.load_balance_loss, expected.load_balance_loss, atol=1e-5)
    assert torch.allclose(found.router_z_loss, expected.router_z_loss, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=5), st.integers(0, 4), st.integers(0, 9))
def test_packed_documents_equal_single_ones(lengths: list[int], padding: int, seed: int) -> None:
    model = tiny(seed=seed).double()  # in fp32 a near-tie between experts may fall either way
    pieces = [token_ids(1, length, seed=i) for i, length in enumerate(lengths)]
    ids = torch.cat([*pieces, torch.zeros(1, padding, dtype=torch.int64)], dim=1)
    documents = torch.cat(
        [torch.full((length,), 7 * i) for i, length in enumerate(lengths)] + [torch.full((padding,), -1)]
    )[None]
    with torch.no_grad():
        packed = model(ids, document_ids=documents, labels=ids)
        start, loss, labels = 0, 0.0, 0
        for piece in pieces:
            alone = model(piece, labels=piece)
            stop = start + piece.shape[1]
            assert torch.allclose(packed.logits[:, start:stop], alone.logits, atol=1e-5)
            loss += float(alone.ce_loss) * (piece.shape[1] - 1)
            labels += piece.shape[1] - 1
            start = stop
    assert float(packed.ce_loss) == pytest.approx(loss / max(labels, 1), abs=1e-4)
    assert int(packed.router_stats.tokens) == sum(lengths)


def test_documents_with_a_cache_or_a_mask_are_refused() -> None:
    model, ids = tiny(), token_ids(1, 4)
    with pytest.raises(ValueError, match="document_ids"):
        model(ids, document_ids=torch.zeros_like(ids), attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="document_ids"):
        model(ids, document_ids=torch.zeros_like(ids), use_cache=True)


def _brute(
    queries: int, keys: int, offset: int, past: int, window: int | None, padding: Tensor | None
) -> Tensor:
    allowed = torch.zeros(queries, keys, dtype=torch.bool)
    for q in range(queries):
        for k in range(keys):
            distance = (q + past) - (k + offset)
            seen = distance >= 0 and (window is None or distance < window)
            real = padding is None or bool(padding[0, k + offset])
            allowed[q, k] = (seen and real) or distance == 0
    return allowed


@settings(max_examples=200, deadline=None)
@given(
    queries=st.integers(1, 9),
    past=st.integers(0, 12),
    window=st.one_of(st.none(), st.integers(2, 8)),
    padded=st.integers(0, 5),
)
def test_masks_equal_the_definition(queries: int, past: int, window: int | None, padded: int) -> None:
    offset = 0 if window is None else max(past - window + 1, 0)
    keys = past - offset + queries
    padding = None
    if padded:
        padding = torch.ones(1, past + queries, dtype=torch.bool)
        padding[:, :padded] = False
    mask = build_layer_mask(
        queries=queries,
        keys=keys,
        key_offset=offset,
        past_tokens=past,
        window=window,
        padding_BS=padding,
        documents_BT=None,
        device=torch.device("cpu"),
    )
    expected = _brute(queries, keys, offset, past, window, padding)
    found = torch.isfinite(mask.additive(queries, keys, torch.zeros(())))[0, 0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", [128, 200, 300])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_equal_masks_in_memory(tokens: int, padded: bool) -> None:
    """FlexAttention, which GPUs train with, over packed documents, global and windowed layers, grouped queries."""
    model = tiny(max_position_embeddings=512).double()
    assert {0, 1} == set(model.config.sliding_window_layout) and model.config.sliding_window_size < tokens
    ids_BT = token_ids(2, tokens)
    starts_BT = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens)) < 0.03
    documents_BT = starts_BT.long().cumsum(dim=1)
    if padded:
        documents_BT[1, -7:] = -1
    outputs = []
    for backend in ("sdpa", "flex"):
        model.set_attention_backend(backend)
        with torch.no_grad():
            outputs.append(model(ids_BT, document_ids=documents_BT).logits)
    real_BT = documents_BT >= 0
    torch.testing.assert_close(outputs[1][real_BT], outputs[0][real_BT], atol=1e-9, rtol=0)
    with torch.no_grad():
        blind = model(ids_BT, document_ids=torch.zeros_like(documents_BT)).logits
    assert (blind - outputs[0]).abs().max() > 1e-3  # the documents matter


@pytest.mark.parametrize("window", [None, 1, 129, 256, 400])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.02, 0.3])
def test_block_masks_are_those_that_torch_makes_from_every_pair(window: int | None, density: float) -> None:
    for tokens in (64, 128, 300, 512):
        starts_BT = torch.rand(3, tokens, generator=torch.Generator().manual_seed(tokens)) < density
        documents_BT = starts_BT.long().cumsum(dim=1)

        def allowed(
            b: torch.Tensor,
            h: torch.Tensor,
            query: torch.Tensor,
            key: torch.Tensor,
            documents_BT: torch.Tensor = documents_BT,
        ) -> torch.Tensor:
            seen = (query >= key) & (documents_BT[b, query] == documents_BT[b, key])
            return seen if window is None else seen & (query - key < window)

        expected = create_block_mask(
            lambda b, h, q, k: allowed(b, h, q, k), 3, None, tokens, tokens, device="cpu"
        )
        found = document_blocks(documents_BT, window)
        assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
        for kind in ("", "full_"):
            for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
                assert torch.equal(getattr(found, kind + name), getattr(expected, kind + name)), (
                    tokens,
                    name,
                )


def test_block_masks_cover_documents_whose_numbers_fall() -> None:
    """Padding is a document of number -1 at either end: every visible pair lies in a block that is computed."""
    documents_BT = torch.tensor([[-1] * 130 + [0] * 100 + [3] * 60 + [1] * 94 + [-1] * 256])
    found = document_blocks(documents_BT, None)
    slots_T = torch.arange(documents_BT.shape[1])
    seen_TT = (slots_T[:, None] >= slots_T) & (documents_BT[0][:, None] == documents_BT[0])
    seen_JKqk = seen_TT.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2)
    computed_JK, whole_JK = torch.zeros(5, 5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
    for j in range(5):
        whole_JK[j, found.full_kv_indices[0, 0, j, : found.full_kv_num_blocks[0, 0, j]].long()] = True
        computed_JK[j, found.kv_indices[0, 0, j, : found.kv_num_blocks[0, 0, j]].long()] = True
    assert ((computed_JK | whole_JK) >= seen_JKqk.flatten(2).any(2)).all()
    assert (whole_JK <= seen_JKqk.flatten(2).all(2)).all() and whole_JK.any()
