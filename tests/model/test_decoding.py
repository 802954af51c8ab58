"""Decoding with a cache equals the full forward, also across the window's edge; windowed caches stay small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.model.factory import tiny, token_ids
from tests.model.golden import load


@pytest.mark.parametrize("name", ["21b", "4b"])
@torch.no_grad()
def test_step_by_step_equals_the_full_forward(name: str) -> None:
    model, ids, expected = load(name)
    window = model.config.sliding_window_size
    cache = None
    for step in range(ids.shape[1]):
        output = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        assert (output.logits[:, 0] - expected[:, step]).abs().max() < 1e-5
        for layer, windowed in zip(cache.layers, model.config.sliding_window_layout, strict=True):
            held = layer.keys.shape[2]
            assert held <= window if windowed else held == step + 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 13), min_size=1, max_size=6),
    st.integers(2, 12),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_any_split_into_chunks_gives_the_same_logits(
    chunks: list[int], window: int, seed: int, lead: int
) -> None:
    model = tiny(seed=seed, sliding_window_size=window, router_lead=lead)
    ids = token_ids(2, sum(chunks), seed=seed)
    with torch.no_grad():
        expected = model(ids).logits
        cache, position = None, 0
        for chunk in chunks:
            piece = ids[:, position : position + chunk]
            output = model(piece, past_key_values=cache, use_cache=True)
            assert torch.allclose(output.logits, expected[:, position : position + chunk], atol=1e-5)
            cache, position = output.past_key_values, position + chunk
            kept = {layer.keys.shape[2] for layer, w in zip(cache.layers, [0, 1, 1, 1], strict=True) if w}
            assert kept == {min(position, window - 1)}  # a key older than that is never asked for again


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_generate_equals_greedy_by_full_forwards(tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    ids = token_ids(1, 5)
    found = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = ids
    for _ in range(20):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_generate_with_left_padding_equals_each_row_alone() -> None:
    model = tiny()
    short, long = token_ids(1, 4, seed=2), token_ids(1, 11, seed=3)
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.int64), short), dim=1)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :7] = 0
    both = model.generate(
        torch.cat((padded, long)), attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0
    )
    for row, alone in ((both[0, 11:], short), (both[1, 11:], long)):
        single = model.generate(alone, max_new_tokens=15, do_sample=False, pad_token_id=0)
        assert torch.equal(row, single[0, alone.shape[1] :])


@torch.no_grad()
def test_beam_search_reorders_the_cache() -> None:
    model = tiny()
    found = model.generate(token_ids(2, 12), max_new_tokens=10, num_beams=3, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 22)
    without = model.generate(
        token_ids(2, 12), max_new_tokens=10, num_beams=3, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(found, without)


@torch.no_grad()
def test_a_cache_of_the_callers_own_is_used() -> None:
    model = tiny()
    ids = token_ids(1, 20)
    cache = DynamicCache(config=model.config)
    model(ids[:, :19], past_key_values=cache)
    last = model(ids[:, 19:], past_key_values=cache).logits[:, 0]
    assert torch.allclose(last, model(ids).logits[:, -1], atol=1e-5)


@torch.no_grad()
def test_logits_to_keep() -> None:
    model = tiny()
    ids = token_ids(2, 9)
    full = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=2).logits, full[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=2)
