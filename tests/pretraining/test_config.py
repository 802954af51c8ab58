"""Wrong values of a recipe end in one sentence that names the field and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.artifacts import StageContext, StageError, parse_config
from components.corpus.shards import TokenShards
from components.pretraining.architecture import model_config
from components.pretraining.config import PretrainConfig
from components.pretraining.presets import PRESETS
from tests.pretraining.factory import (
    BATCH,
    CONTEXT,
    MIXTURE,
    MODEL,
    STEPS,
    VOCABULARY,
    run_config,
    stage_config,
)


def parse(values: dict[str, Any]) -> PretrainConfig:
    return parse_config(PretrainConfig, StageContext("pretrain", "test", values, {}, Path(), Path()))


def stages(**first: Any) -> dict[str, Any]:
    return run_config(stages=[stage_config(**first), stage_config(), stage_config()])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (stages(mixture={**MIXTURE, "sft": 0.0}), ("stages.0.mixture", "sum to 0.9", "must sum to 1")),
        (stages(mixture={"general": float("nan"), "maths": 1.0}), ("stages.0.mixture.general",)),
        (stages(mixture={"general": 2.0, "maths": -1.0}), ("stages.0.mixture.maths", "greater than or equal to 0")),
        (
            stages(mixture={"generals": 1.0}),
            ("unknown category generals", "allowed are general, maths, code, web_stem, chinese, sft"),
        ),
        (
            run_config(optimizer={"warmup_steps": STEPS}),
            (f"optimizer.warmup_steps is {STEPS}", f"the run has {STEPS} steps", f"0 to {STEPS - 1} are allowed"),
        ),
        (
            run_config(load_balance_groups=BATCH // 2 + 1),
            (
                f"load_balance_groups is {BATCH // 2 + 1}",
                f"stages[2] has {BATCH // 2} sequences a step, so 1 to {BATCH // 2} are allowed",
            ),
        ),
        (run_config(stages=[stage_config()] * 2), ("stages", "at least 3")),
        (run_config(precision="fp16"), ("precision = 'fp16'", "'auto', 'fp32' or 'bf16'")),
        (run_config(spike_ratio=1.0), ("spike_ratio = 1.0", "greater than 1")),
        (run_config(zero_stage=3), ("zero_stage = 3", "ZeRO-3 is not supported", "allowed are 1 and 2")),
        (run_config(expert_parallel=0), ("expert_parallel = 0", "greater than or equal to 1")),
        (run_config(sede=1), ("sede = 1", "not permitted")),
        (run_config(optimizer={"peak_lr": float("nan")}), ("optimizer.peak_lr = nan", "Input should be")),
        (run_config(model={"preset": "nona"}), ("model.preset = 'nona'", "'nano', '4b', '4b-hybrid' or '21b'")),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(StageError) as caught:
        parse(values)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    # One clear sentence: no dump of the whole recipe.
    assert "\n" not in message and len(message) < 420, message


def test_the_largest_allowed_warm_up_passes() -> None:
    assert parse(run_config(optimizer={"warmup_steps": STEPS - 1})).total_steps == STEPS


def with_overrides(**overrides: Any) -> PretrainConfig:
    return parse(run_config(model={"preset": "nano", "overrides": {**MODEL, **overrides}}))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hiden_size": 64}, "hiden_size"),
        ({"save_pretrained": 64}, "save_pretrained"),  # an attribute, and yet no key
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5"),
        ({"rope_layout": 1}, "rope_layout is 1"),
        ({"rope_layout": [0, 1, 1]}, "one 0 or 1 for each of the 2 layers"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "must be a multiple of num_key_value_heads"),
        ({"moe_num_primary_experts": 1}, "cannot exceed moe_num_primary_experts, which is 1"),
    ],
)
def test_an_impossible_model_is_named(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(StageError, match=r"model\.overrides of the pretrain recipe") as caught:
        model_config(with_overrides(**overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_context_beyond_the_positions_is_named() -> None:
    assert model_config(with_overrides(max_position_embeddings=2 * CONTEXT)).vocab_size == MODEL["vocab_size"]
    with pytest.raises(StageError, match=f"context of {2 * CONTEXT} tokens.*max_position_embeddings is 31"):
        model_config(with_overrides(max_position_embeddings=31))


def test_the_shards_must_fit_the_vocabulary(tokens: Path) -> None:
    shards = TokenShards.open(tokens)
    fitting = model_config(with_overrides(vocab_size=VOCABULARY), shards)
    assert (fitting.bos_token_id, fitting.eos_token_id) == (shards.eos_id, [shards.eos_id, shards.eos_id + 2])
    with pytest.raises(
        StageError, match=f"vocabulary of {VOCABULARY} tokens and the model has {VOCABULARY - 1}"
    ):
        model_config(with_overrides(vocab_size=VOCABULARY - 1), shards)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_survives_json(name: str) -> None:
    config = PRESETS[name]()
    assert parse(config.model_dump(mode="json")) == config
    model_config(config)
