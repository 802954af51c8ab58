"""Official config.json files in all their variants, presets, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model import ConfigError, SmallThinkerConfig, SmallThinkerForCausalLM, preset
from model.accounting import count_parameters, kv_cache_bytes, training_flops_per_token
from model.checkpoint import official_layout
from tests.model.factory import tiny_config
from tests.model.golden import FOLDERS


def read(folder: Path, contents: dict[str, Any]) -> SmallThinkerConfig:
    (folder / "config.json").write_text(json.dumps(contents))
    return SmallThinkerConfig.from_pretrained(folder)


def official(name: str) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((FOLDERS[name] / "config.json").read_text())
    return contents


def test_released_variants(tmp_path: Path) -> None:
    large, small = official("21b"), official("4b")
    assert "model_type" not in large and "moe_primary_router_apply_softmax" not in small
    config = read(tmp_path, large)
    assert config.model_type == "smallthinker" and config.moe_primary_router_apply_softmax
    assert config.layer_types[:2] == ["full_attention", "sliding_attention"] and config.sliding_window == 8
    config = read(tmp_path, small)
    assert not config.moe_primary_router_apply_softmax
    assert config.rope_layout == [1] * 6 and config.sliding_window_layout == [0] * 6
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("eos", [1, [1], [1, 2], None])
def test_end_of_sequence_as_scalar_or_list(tmp_path: Path, eos: Any) -> None:
    config = read(tmp_path, {**official("21b"), "eos_token_id": eos})
    assert config.eos_token_id == eos
    config.save_pretrained(tmp_path)
    assert SmallThinkerConfig.from_pretrained(tmp_path).eos_token_id == eos


def test_extra_keys_of_releases_and_older_writers(tmp_path: Path) -> None:
    extra = {
        "auto_map": {"AutoConfig": "configuration_smallthinker.SmallThinkerConfig"},
        "sliding_window": 99,
        "sliding_window_pattern": [1] * 8,
        "max_length": None,
        "temperature": None,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    config = read(tmp_path, {**official("21b"), **extra})
    assert config.sliding_window_size == config.sliding_window == 8
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in written and written["tokenizer_class"] == "Qwen2Tokenizer"


@pytest.mark.parametrize("theta", [1.5e6, "1.5e6", 1500000])
def test_rope_theta_spellings(tmp_path: Path, theta: Any) -> None:
    assert read(tmp_path, {**official("21b"), "rope_theta": theta}).rope_theta == 1.5e6
    text = json.dumps({**official("21b"), "rope_theta": 0}).replace('"rope_theta": 0', '"rope_theta": 1.5e6')
    (tmp_path / "config.json").write_text(text)
    assert SmallThinkerConfig.from_pretrained(tmp_path).rope_theta == 1.5e6


def test_transformers_5_rope_parameters(tmp_path: Path) -> None:
    contents = {key: value for key, value in official("21b").items() if not key.startswith("rope_theta")}
    contents["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    assert read(tmp_path, contents).rope_theta == 77.0
    contents["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 77.0}
    with pytest.raises(ConfigError, match="yarn"):
        read(tmp_path, contents)


@pytest.mark.parametrize("name", ["21b", "4b"])
def test_written_files_hold_every_official_key_with_its_value(tmp_path: Path, name: str) -> None:
    original = official(name)
    read(tmp_path, original).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for key, value in original.items():
        if key != "transformers_version":
            assert written[key] == value, key
    assert written["model_type"] == "smallthinker"
    assert written["moe_primary_router_apply_softmax"] is (name == "21b")
    assert not {"dtype", "rope_parameters", "layer_types", "load_balance_coef"} & written.keys()


def test_training_coefficients_survive_only_when_set(tmp_path: Path) -> None:
    tiny_config(load_balance_coef=0.01).save_pretrained(tmp_path)
    config = SmallThinkerConfig.from_pretrained(tmp_path)
    assert config.load_balance_coef == 0.01 and config.router_z_coef == 0.0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope_layout", [0, 1], "rope_layout.*4 layers"),
        ("rope_layout", [0, 1, 2, 1], "rope_layout"),
        ("sliding_window_layout", [0] * 5, "sliding_window_layout.*4 layers"),
        ("num_key_value_heads", 3, "multiple"),
        ("head_dim", 7, "even"),
        ("moe_num_active_primary_experts", 9, "cannot exceed"),
        ("moe_num_active_primary_experts", 0, "at least 1"),
        ("hidden_size", -1, "at least 1"),
        ("rope_theta", "big", "rope_theta"),
        ("rope_theta", -1.0, "positive"),
        ("sliding_window_size", 1, "2 or more"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}, "null"),
        ("attention_dropout", 0.1, "0 only"),
    ],
)
def test_impossible_values_are_named(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_config(**{key: value})


def test_presets() -> None:
    small, large, hybrid = preset("4b"), preset("21b"), preset("4b-hybrid")
    assert sum(small.sliding_window_layout or []) == 0 and sum(small.rope_layout or []) == 32
    assert large.rope_layout == [0, 1, 1, 1] * 13 == large.sliding_window_layout
    assert hybrid.rope_layout == [0, 1, 1, 1] * 8 and hybrid.hidden_size == small.hidden_size
    assert preset("nano", vocab_size=512).vocab_size == 512
    assert preset("nano", rope_layout=[1] * 4, eos_token_id=3).rope_layout == [1] * 4
    with pytest.raises(ConfigError, match="nano, 4b"):
        preset("7b")
    with pytest.raises(ConfigError, match="hiden_size"):
        preset("nano", hiden_size=3)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("4b", 4_035_085_824, 630_818_304), ("21b", 21_506_562_560, 2_939_558_400)],
)
def test_parameter_counts(name: str, total: int, active: int) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = SmallThinkerForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    counts = count_parameters(config)
    assert (counts.total, counts.active) == (total, active)
    files = [torch.Size(entry.shape).numel() for entry in official_layout(config)]
    assert len(files) == {"4b": 3299, "21b": 10_351}[name]
    assert sum(files) == total + (counts.vocabulary if config.tie_word_embeddings else 0)
    if name == "21b":
        assert 2 * sum(files) == 43_013_125_120  # bytes in bfloat16, the published total_size


def test_kv_bytes_and_flops() -> None:
    large = preset("21b")
    assert kv_cache_bytes(large, 16384) == 728 * 2**20
    assert kv_cache_bytes(preset("4b"), 32768) == 1024 * 2**20
    assert training_flops_per_token(large, 4096) == pytest.approx(2.455e10, rel=1e-3)


def test_auto_classes(tmp_path: Path) -> None:
    model = SmallThinkerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SmallThinkerConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), SmallThinkerForCausalLM)
