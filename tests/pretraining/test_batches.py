"""Document numbers, held-out windows and bits per byte."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from components.artifacts import StageError
from components.corpus.shards import TokenShards
from components.corpus.text_bytes import token_bytes
from components.measures.heldout import HeldOut, held_out_windows
from components.pretraining.architecture import model_config
from components.pretraining.config import PretrainConfig
from components.pretraining.deepspeed.initial_model import initial_model
from model.masks import document_ids
from tests.pretraining.factory import HELD_OUT_DOCUMENTS, VOCABULARY, run_config, texts

EOS = 9
CPU = torch.device("cpu")


@given(st.lists(st.lists(st.sampled_from([1, 2, EOS]), min_size=7, max_size=7), min_size=1, max_size=3))
def test_document_ids(rows: list[list[int]]) -> None:
    numbers = document_ids(torch.tensor(rows), EOS)
    assert numbers.dtype == torch.int64
    for row, found in zip(rows, numbers.tolist(), strict=True):
        number = 0
        for token, got in zip(row, found, strict=True):
            number += token == EOS  # <|endoftext|> opens a document
            assert got == number


@given(length=st.integers(0, 300), context=st.integers(8, 40))
def test_every_token_is_scored_once_with_enough_in_view(length: int, context: int) -> None:
    stream = np.arange(100, 100 + length, dtype=np.int64)
    scored: list[int] = []
    for window, first in held_out_windows(stream, context, EOS):
        assert 1 <= first < len(window) <= context + 1
        if scored:
            assert first >= context // 2
        scored += window[first:].tolist()
        # The window is a piece of the opened stream.
        begin = 0 if window[0] == EOS else int(window[0]) - 99
        assert window.tolist() == [EOS, *stream.tolist()][begin : begin + len(window)]
    assert scored == stream.tolist()


def test_token_bytes(tokens: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer" / "tokenizer.json"))
    lengths = token_bytes(tokenizer, VOCABULARY)
    for text in ("river 中文 🙂\n", *texts("sft", 3, 20)):
        assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())
    special = [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert lengths[special].tolist() == [0, 0, 0]


def test_bits_per_byte_equal_the_formula(tokens: Path) -> None:
    """One window holds everything: a single forward pass says what the windows must add up to."""
    shards = TokenShards.open(tokens)
    config = PretrainConfig.model_validate(run_config())
    model = initial_model(config, model_config(config, shards)).eval()
    heldout = HeldOut.open(shards, tokens / "tokenizer" / "tokenizer.json", 100_000, 2)
    assert set(heldout.streams) == set(shards.categories("heldout")) and "code" not in heldout.streams
    scores = heldout.evaluate(model, 1024, CPU)
    assert scores is not None
    nats, size = 0.0, 0
    for name, stream in heldout.streams.items():
        written = sum(len(text.encode()) for text in texts(name, 2, HELD_OUT_DOCUMENTS))
        assert heldout.text_bytes[name] == written
        ids = torch.from_numpy(np.concatenate([[shards.eos_id], stream]))[None]
        with torch.no_grad():
            out = model(
                input_ids=ids[:, :-1], document_ids=document_ids(ids[:, :-1], shards.eos_id), use_cache=False
            )
        expected = float(F.cross_entropy(out.logits[0].double(), ids[0, 1:], reduction="sum"))
        assert scores.bits_per_byte[name] == pytest.approx(expected / math.log(2) / written, rel=1e-6)
        assert scores.nats_per_token[name] == pytest.approx(expected / len(stream), rel=1e-6)
        nats, size = nats + expected, size + written
    assert scores.bits_per_byte["overall"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert scores.tokens == sum(map(len, heldout.streams.values())) == scores.activations["tokens"]
    frequencies = np.array(scores.activations["expert_frequency"])
    assert frequencies.sum(axis=1) == pytest.approx([2.0, 2.0])  # each token takes two experts
    assert heldout.evaluate(model, 1024, CPU, should_stop=lambda: True) is None


def test_batching_does_not_change_the_scores(tokens: Path) -> None:
    shards = TokenShards.open(tokens)
    config = PretrainConfig.model_validate(run_config())
    model = initial_model(config, model_config(config, shards))
    file = tokens / "tokenizer" / "tokenizer.json"
    scores = [HeldOut.open(shards, file, 90, size).evaluate(model, 16, CPU) for size in (1, 5)]
    assert scores[0] is not None and scores[1] is not None
    assert scores[0].bits_per_byte == pytest.approx(scores[1].bits_per_byte, rel=1e-5)
    assert scores[0].tokens == 90 * 4 and model.training


def test_no_held_out_text_is_named(tokens: Path) -> None:
    shards = TokenShards.open(tokens)
    del shards.shards["heldout"]
    with pytest.raises(StageError, match="no text in split heldout"):
        HeldOut.open(shards, tokens / "tokenizer" / "tokenizer.json", 10_000)
