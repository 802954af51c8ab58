"""Which model a recipe trains: ``model_config(config, shards)``."""

from __future__ import annotations

from components.artifacts import StageError
from components.corpus.shards import TokenShards
from components.pretraining.config import PretrainConfig
from model import PRESETS, ConfigError, SmallThinkerConfig, preset


def model_config(config: PretrainConfig, shards: TokenShards | None = None) -> SmallThinkerConfig:
    """The model's configuration from the recipe, with the shards' vocabulary checked against it.

    Raises:
        StageError: an override is impossible, or the shards' token ids do not fit the vocabulary.
    """
    overrides = {
        "load_balance_coef": config.load_balance_coef,
        "router_z_coef": config.router_z_coef,
        **config.model.overrides,
    }
    try:
        named = preset(config.model.preset)
        for key, value in overrides.items():
            if not hasattr(named, key) or callable(getattr(named, key)):
                raise ConfigError(f"{key} is no key of SmallThinkerConfig")
            if type(getattr(named, key)) is int and type(value) is not int:
                raise ConfigError(f"{key} is {value!r}; a whole number is needed")
            if key.endswith("_layout") and not isinstance(value, list):
                raise ConfigError(f"{key} is {value!r}; a list of 0 and 1 is needed")
        result = SmallThinkerConfig(**{**PRESETS[config.model.preset], **overrides})
    except (ConfigError, TypeError) as error:
        raise StageError(f"model.overrides of the pretrain recipe: {error}") from error
    if shards is not None and shards.vocab_size > result.vocab_size:
        raise StageError(
            f"The shards use a vocabulary of {shards.vocab_size} tokens and the model has {result.vocab_size}; "
            "set model.overrides.vocab_size to at least the tokenizer's size."
        )
    if shards is not None:
        # As in the official files: <|endoftext|> opens and ends texts, <|im_end|> (two ids later) ends a turn.
        turn_end = shards.eos_id + 2
        result.bos_token_id = shards.eos_id
        result.eos_token_id = [shards.eos_id, *([turn_end] if turn_end < shards.vocab_size else [])]
    longest = max(stage.context for stage in config.stages)
    if longest > result.max_position_embeddings:
        raise StageError(
            f"The longest stage has a context of {longest} tokens and the model's max_position_embeddings is "
            f"{result.max_position_embeddings}; raise it in model.overrides or shorten the stage."
        )
    return result
