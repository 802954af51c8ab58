"""Checkpoints: bit-equal round trips, tied heads, torn folders, and bounded memory while streaming."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import CheckpointError, OfficialCheckpoint, SmallThinkerConfig, SmallThinkerForCausalLM
from model.checkpoint import INDEX_NAME, official_layout, parse_size
from tests.model.factory import tiny, token_ids
from tests.model.golden import FOLDERS


def equal(a: SmallThinkerForCausalLM, b: SmallThinkerForCausalLM) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", ["21b", "4b"])
@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_load_and_save_reproduce_the_official_file(tmp_path: Path, name: str, shard: str) -> None:
    model = SmallThinkerForCausalLM.from_pretrained(FOLDERS[name])
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path, max_shard_size=shard)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 10) == (shard == "20KB") and (tmp_path / INDEX_NAME).exists() == (len(shards) > 1)
    written = {key: value for path in shards for key, value in load_file(path).items()}
    original = load_file(FOLDERS[name] / "model.safetensors")
    assert written.keys() == original.keys()  # one tensor per expert; the tied 4B's lm_head too
    assert all(torch.equal(written[key], original[key]) for key in original)
    assert equal(SmallThinkerForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_are_bit_equal(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=4000)
    again = SmallThinkerForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype and equal(again, model)
    with torch.device("meta"):
        streamed = SmallThinkerForCausalLM(SmallThinkerConfig.from_pretrained(tmp_path))
    OfficialCheckpoint(tmp_path).fill(streamed, dtype)
    assert equal(streamed, model)
    allocated = tiny(seed=5, tie_word_embeddings=tied).to(dtype)
    OfficialCheckpoint(tmp_path).fill(allocated)
    assert equal(allocated, model)
    assert (allocated.lm_head.weight is allocated.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(streamed(token_ids(1, 9)).logits, model(token_ids(1, 9)).logits)


def test_a_smaller_save_removes_stale_shards(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size=4000)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert not list(tmp_path.glob(".*"))


def corrupt_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_embedding_wins_over_a_different_head_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(FOLDERS["4b"], tmp_path, dirs_exist_ok=True)
    original = SmallThinkerForCausalLM.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="model"):
        SmallThinkerForCausalLM.from_pretrained(tmp_path)
        dict(OfficialCheckpoint(tmp_path).stacked())
        assert not caplog.records
        corrupt_head(tmp_path)
        model = SmallThinkerForCausalLM.from_pretrained(tmp_path)
        assert [record for record in caplog.records if "lm_head.weight" in record.message]
        caplog.clear()
        streamed = tiny_like(tmp_path)
        OfficialCheckpoint(tmp_path).fill(streamed)
        assert [record for record in caplog.records if "lm_head.weight" in record.message]
    for loaded in (model, streamed):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert equal(loaded, original)


def tiny_like(folder: Path) -> SmallThinkerForCausalLM:
    with torch.device("meta"):
        return SmallThinkerForCausalLM(SmallThinkerConfig.from_pretrained(folder))


def test_a_tied_file_without_a_head_loads(tmp_path: Path) -> None:
    shutil.copytree(FOLDERS["4b"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    original = SmallThinkerForCausalLM.from_pretrained(FOLDERS["4b"])
    assert equal(SmallThinkerForCausalLM.from_pretrained(tmp_path), original)
    assert dict(OfficialCheckpoint(tmp_path).stacked()).keys() == dict(original.named_parameters()).keys()


def saved(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path, max_shard_size=20_000)
    return tmp_path


def test_missing_shard(tmp_path: Path) -> None:
    victim = sorted(saved(tmp_path).glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        OfficialCheckpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_torn_shard(tmp_path: Path, keep: int) -> None:
    victim = sorted(saved(tmp_path).glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="torn"):
        OfficialCheckpoint(tmp_path)


def test_torn_index_and_missing_files(tmp_path: Path) -> None:
    index = saved(tmp_path) / INDEX_NAME
    index.write_text(index.read_text()[:100])
    with pytest.raises(CheckpointError, match="index"):
        OfficialCheckpoint(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match="neither"):
        OfficialCheckpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        OfficialCheckpoint(tmp_path)


def test_tensors_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.block_sparse_moe.experts.3.up.weight"

    def rewrite(changes: dict[str, torch.Tensor | None]) -> None:
        changed = {**tensors, **changes}
        save_file({k: v for k, v in changed.items() if v is not None}, file, metadata={"format": "pt"})

    rewrite({name: None})
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        OfficialCheckpoint(tmp_path)
    rewrite({name: tensors[name][:-1].clone()})
    with pytest.raises(CheckpointError, match="has shape"):
        OfficialCheckpoint(tmp_path)
    rewrite({"model.layers.2.mystery.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="mystery"):
        OfficialCheckpoint(tmp_path)


def test_sizes() -> None:
    assert [parse_size(s) for s in (5, "5GB", "1.5 MiB", "7")] == [5, 5 * 10**9, 3 * 2**19, 7]
    with pytest.raises(CheckpointError, match="5 apples"):
        parse_size("5 apples")


_STREAM = """
import json, resource, sys, threading, time
import torch
from model import OfficialCheckpoint

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
base, peak, total = anonymous_bytes(), 0, 0
for name, tensor in OfficialCheckpoint(sys.argv[1]).stacked(torch.float32):
    peak = max(peak, anonymous_bytes() - base)
    total += tensor.nbytes
    del tensor
print(json.dumps({"peak": peak, "total": total}))
"""


def test_streaming_holds_one_stack_at_a_time(tmp_path: Path) -> None:
    """A many-shard checkpoint of 150 MB is converted within a small part of its size, in a process of its own."""
    overrides = {
        "num_hidden_layers": 12,
        "rope_layout": [1] * 12,
        "sliding_window_layout": [0] * 12,
        "hidden_size": 256,
        "moe_ffn_hidden_size": 256,
        "moe_num_primary_experts": 16,
    }
    model = tiny(**overrides)
    model.save_pretrained(tmp_path, max_shard_size="3MB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 40
    run = subprocess.run(
        [sys.executable, "-c", _STREAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout)
    assert result["total"] > 100e6
    # Two stacks of 8 MB are live; the rest is what the allocator keeps, which differs between machines.
    assert result["peak"] < 0.4 * result["total"]


def test_layout_names_are_unique_and_complete() -> None:
    config = SmallThinkerConfig.from_pretrained(FOLDERS["21b"])
    names = [entry.name for entry in official_layout(config)]
    assert len(set(names)) == len(names)
    assert set(names) == set(load_file(FOLDERS["21b"] / "model.safetensors"))
