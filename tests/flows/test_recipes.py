"""Recipes: every one resolves, overrides change exactly what they name, and wrong ones are refused in one sentence."""

from __future__ import annotations

import json

import pytest

from flows.overrides import RecipeError, resolve
from flows.recipes import RECIPES
from flows.stages import STAGE_NAMES


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_has_a_part_for_every_stage_in_plain_json(name: str) -> None:
    recipe = resolve(name)
    for stage in STAGE_NAMES:
        part = recipe.part(stage)
        assert json.loads(json.dumps(part)) == part


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_vocabulary_known_without_the_model_is_the_models(name: str) -> None:
    from components.pretraining.architecture import model_config

    config = resolve(name).pretrain
    assert config.model.vocab_size == model_config(config).vocab_size


def test_an_override_changes_what_it_names_and_nothing_else() -> None:
    plain = resolve("nano")
    changed = resolve(
        "nano", ["posttrain.epochs=2", "pretrain.stages.2.context=256", "synthesize.mga.documents.code=3"]
    )
    assert changed.posttrain.epochs == 2
    assert changed.pretrain.stages[2].context == 256
    assert changed.synthesize.mga.documents == {**plain.synthesize.mga.documents, "code": 3}
    same = [name for name in STAGE_NAMES if changed.part(name) == plain.part(name)]
    assert set(STAGE_NAMES) - set(same) == {"posttrain", "pretrain", "synthesize"}
    assert resolve("nano", ["pretrain.model.overrides.num_hidden_layers=4"]).pretrain.model.overrides == {
        "num_hidden_layers": 4
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pretrain.seed=many"], "pretrain.seed = 'many': Input should be a valid integer"),
        (
            ["curate.quality_threshold=7"],
            "curate.quality_threshold = 7: Input should be less than or equal to 1",
        ),
        (["pretrain.sead=1"], "no field 'pretrain.sead'; fields there: "),
        (["pretrain.stages.3.context=64"], "its list has the indices 0 to 2"),
        (["pretrain.seed.deeper=1"], "fields there: none: it is a plain value"),
        (["pretrain"], "'pretrain' is not an override; write field.path=value"),
        (["pretrain.stages.0.tokens=0"], "pretrain.stages.0.tokens = 0"),
        (["tokenize.vocab_size=8192"], "tokenize.vocab_size is 8192 and the model has 4096 tokens"),
        (["pretrain.optimizer.warmup_steps=100000"], "warmup_steps is 100000; the run has 1711 steps"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_allowed(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve("nano", overrides)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message and len(message) < 800


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match="no recipe is called '5b'; the recipes are nano, smoke, 21b-slim, 4b, 21b"
    ):
        resolve("5b")
