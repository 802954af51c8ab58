"""Loss by position: which documents count, what the bands say, and whether chance is told from effect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from components.artifacts import StageError
from components.corpus.shards import TokenShards
from components.measures.positions import compare, document_beginnings, measure, nats_by_position
from components.pretraining.architecture import model_config
from components.pretraining.config import PretrainConfig
from components.pretraining.deepspeed.initial_model import initial_model
from tests.pretraining.factory import CONTEXT, run_config, write_shard

EOS = 0


def test_only_beginnings_of_long_documents_count(tmp_path: Path) -> None:
    documents = [[1, 2, EOS], [3, 4, 5, EOS], [6, 7, 8, 9, EOS], [1, 2, EOS]]
    tokens = write_shard(tmp_path, "a.ds", documents)
    entry = {"tokens": tokens, "documents": len(documents), "bytes": 9, "files": ["a.ds"]}
    empty = {"tokens": 0, "documents": 0, "bytes": 0, "files": []}
    splits = {"heldout": {"general": entry, "maths": empty}}
    index = {"dtype": "uint16", "vocab_size": 10, "eos_id": EOS, "splits": splits}
    (tmp_path / "index.json").write_text(json.dumps(index))
    shards = TokenShards.open(tmp_path)
    shard = shards.shard("heldout", "general")
    assert document_beginnings(shard, EOS, 3, 10).tolist() == [[EOS, 3, 4, 5], [EOS, 6, 7, 8]]
    assert document_beginnings(shard, EOS, 3, 1).tolist() == [[EOS, 3, 4, 5]]
    assert document_beginnings(shard, EOS, 5, 10).shape == (0, 6)
    assert document_beginnings(shards.shard("heldout", "maths"), EOS, 2, 10).shape == (0, 3)


def test_nats_are_those_of_one_forward_pass() -> None:
    config = PretrainConfig.model_validate(run_config())
    model = initial_model(config, model_config(config)).train()
    windows = np.random.default_rng(0).integers(0, 384, (5, 2 * CONTEXT + 1))
    found = nats_by_position(model, windows, batch=2)
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[:, :-1], use_cache=False).logits
    wanted = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5)


def test_an_effect_is_told_from_chance() -> None:
    random = np.random.default_rng(1)
    before = 5 + random.normal(size=(60, 32)) + random.normal(size=(60, 1))
    after = before + 0.3 * random.normal(size=before.shape)
    after[:, 16:] -= 0.4
    bands = compare(before, after, old_context=16)
    assert [(band.start, band.end) for band in bands] == [
        (0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 24), (24, 28), (28, 32), (0, 16), (16, 32),
    ]  # fmt: skip
    for band in bands:
        assert band.change == pytest.approx(band.after - band.before)
        assert band.change_low < band.change < band.change_high
    near, far = bands[-2:]
    assert near.change_low < 0 < near.change_high and abs(near.change) < 0.05
    assert far.change_high < -0.3


def test_a_shorter_context_is_refused(tokens: Path) -> None:
    with pytest.raises(StageError, match="new context is 16 tokens and the old 16"):
        measure(tokens, tokens, tokens, (16, 16))
