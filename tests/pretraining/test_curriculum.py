"""Learning rate, spans and token counts as functions of the step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from components.pretraining.config import PretrainConfig
from components.pretraining.data.curriculum import Curriculum
from components.pretraining.presets import PRESETS
from tests.pretraining.factory import run_config, stage_config


@st.composite
def configs(draw: st.DrawFn) -> PretrainConfig:
    """Runs of 3 to 120 steps whose stages differ in everything that counts here."""
    batch = st.sampled_from([1, 2, 4, 8])
    parts = [
        stage_config(
            tokens=draw(st.integers(1, 1280)),
            context=draw(st.sampled_from([8, 16, 32])),
            sequences_per_step=size,
        )
        for size in draw(st.lists(batch, min_size=3, max_size=3))
    ]
    steps = sum(-(-part["tokens"] // (part["context"] * part["sequences_per_step"])) for part in parts)
    optimizer = {
        "peak_lr": draw(st.floats(1e-6, 1.0)),
        "final_lr_ratio": draw(st.floats(0.0, 1.0)),
        "warmup_steps": draw(st.integers(0, max(0, steps - 2))),
    }
    return PretrainConfig.model_validate(
        run_config(stages=parts, optimizer=optimizer, sequences_per_micro_batch=1)
    )


@given(configs())
def test_learning_rate(config: PretrainConfig) -> None:
    curriculum, part = Curriculum(config), config.optimizer
    rates = [curriculum.learning_rate(step) for step in range(curriculum.total_steps)]
    warm = part.warmup_steps
    assert rates[:warm] == pytest.approx([part.peak_lr * (i + 1) / warm for i in range(warm)])
    assert rates[warm] == pytest.approx(part.peak_lr)  # the cosine begins where the warm-up ends
    falling = rates[warm:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(falling))
    assert rates[-1] == part.final_lr_ratio * part.peak_lr or len(falling) == 1  # exactly
    assert max(rates) <= part.peak_lr * (1 + 1e-12)


@given(configs(), st.sampled_from(["linear", "1-sqrt"]), st.floats(0.01, 1.0))
def test_warm_up_then_stable_then_decay(config: PretrainConfig, shape: str, share: float) -> None:
    steps, warm = config.total_steps, config.optimizer.warmup_steps
    wanted = {**config.model_dump(), "optimizer": {
        **config.optimizer.model_dump(), "schedule": "wsd", "decay_share": share, "decay_shape": shape,
    }}  # fmt: skip
    decaying = round(share * steps)
    if warm + decaying > steps:
        with pytest.raises(
            ValidationError, match=r"optimizer.decay_share is .* after \d+ of warm-up; at most "
        ):
            PretrainConfig.model_validate(wanted)
        return
    part = PretrainConfig.model_validate(wanted).optimizer
    curriculum = Curriculum(PretrainConfig.model_validate(wanted))
    rates = [curriculum.learning_rate(step) for step in range(steps)]
    assert rates[:warm] == pytest.approx([part.peak_lr * (i + 1) / warm for i in range(warm)])
    stable = rates[warm : steps - decaying]
    assert stable == [part.peak_lr] * len(stable)
    for place in range(decaying):
        done = (place + 1) / decaying if steps - decaying > warm else place / max(1, decaying - 1)
        height = 1 - (done if shape == "linear" else done**0.5)
        expected = part.peak_lr * (part.final_lr_ratio + (1 - part.final_lr_ratio) * height)
        assert rates[steps - decaying + place] == pytest.approx(expected)


@given(configs())
def test_spans_and_tokens(config: PretrainConfig) -> None:
    curriculum = Curriculum(config)
    assert [span.name for span in curriculum.spans] == ["stage1", "stage2", "stage3"]
    seen = 0
    for step in range(curriculum.total_steps):
        span = curriculum.at(step)
        assert span.stage is config.stages[span.index] and span.start <= step < span.end
        assert curriculum.tokens_before(step) == seen
        seen += span.stage.context * span.stage.sequences_per_step
    assert curriculum.tokens_before(curriculum.total_steps) == seen
    for span in curriculum.spans:
        # Rounded up to whole steps: what was asked for is trained, and less than one step more.
        trained = curriculum.tokens_before(span.end) - curriculum.tokens_before(span.start)
        assert 0 <= trained - span.stage.tokens < span.stage.context * span.stage.sequences_per_step
    for outside in (-1, curriculum.total_steps):
        with pytest.raises(IndexError, match=str(outside)):
            curriculum.at(outside)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_warm_up_peak_and_end(name: str) -> None:
    config = PRESETS[name]()
    curriculum, part = Curriculum(config), config.optimizer
    assert curriculum.learning_rate(0) == part.peak_lr / part.warmup_steps
    assert curriculum.learning_rate(part.warmup_steps - 1) == part.peak_lr
    assert curriculum.learning_rate(curriculum.total_steps - 1) == part.final_lr_ratio * part.peak_lr
