"""Losses without the logits of all positions: the same numbers, and nothing of positions x vocabulary is ever made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from components.measures.heldout import HeldOut
from components.measures.positions import nats_by_position
from components.measures.token_nats import CHUNK_POSITIONS, next_token_nats
from tests.model.factory import tiny, token_ids

VOCAB, TOKENS = 1777, 700


class RowsOfLogits(TorchDispatchMode):
    """The most rows of any operator's result that is as wide as the vocabulary."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.shape[-1:] == (VOCAB,):
                self.most = max(self.most, value.numel() // VOCAB)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_the_numbers_are_those_of_all_logits_at_once(chunk: int, dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    ids = token_ids(3, 40)
    documents = torch.arange(39)[None].expand(3, -1) // 11
    with torch.no_grad():
        logits = model(ids[:, :-1], document_ids=documents).logits.float()
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 39)
    out, nats_BT = next_token_nats(model, ids[:, :-1], ids[:, 1:], documents, chunk)
    torch.testing.assert_close(nats_BT, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert out.router_stats.tokens == 3 * 39 and not nats_BT.requires_grad


def _held_out(windows: int) -> HeldOut:
    stream = np.arange(TOKENS * windows, dtype=np.uint16) % (VOCAB - 1) + 1  # no document ends: whole windows
    return HeldOut({"general": stream}, {"general": 1e4}, 0, windows, None)


def _evaluate(model: Any) -> None:
    _held_out(2).evaluate(model, TOKENS, torch.device("cpu"))


def _by_position(model: Any) -> None:
    nats_by_position(model, np.arange(2 * (TOKENS + 1)).reshape(2, -1) % VOCAB)


@pytest.mark.parametrize("measure", [_evaluate, _by_position])
def test_no_measure_makes_the_logits_of_a_batch(measure: Callable[[Any], None]) -> None:
    model = tiny(vocab_size=VOCAB, max_position_embeddings=TOKENS)
    with RowsOfLogits() as logits:
        measure(model)
    assert logits.most == CHUNK_POSITIONS
    with RowsOfLogits() as logits, torch.no_grad():
        model(token_ids(2, TOKENS, vocab=VOCAB), use_cache=False)
    assert logits.most == 2 * TOKENS > CHUNK_POSITIONS  # so that the above can fail


@pytest.mark.parametrize(("context", "rows"), [(8, 6), (16, 4), (17, 3), (64, 1), (200, 1)])
def test_longer_windows_are_scored_fewer_at_a_time(context: int, rows: int) -> None:
    model = tiny()
    stream = np.arange(2000, dtype=np.uint16) % 90 + 1
    shapes: list[tuple[int, int]] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    HeldOut({"general": stream}, {"general": 1e4}, 0, 6, 64).evaluate(model, context, torch.device("cpu"))
    assert max(rows for rows, _ in shapes) == rows
    one_by_one = HeldOut({"general": stream}, {"general": 1e4}, 0, 1, None)
    several = HeldOut({"general": stream}, {"general": 1e4}, 0, 6, 64)
    scores = [h.evaluate(model, context, torch.device("cpu")) for h in (one_by_one, several)]
    assert scores[0] is not None and scores[1] is not None
    assert scores[0].bits_per_byte["overall"] == pytest.approx(scores[1].bits_per_byte["overall"], rel=1e-6)
