"""Model folders in Hugging Face's layout: ``load_model(folder, device)``, ``save_model(model, tokenizer, folder)``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from components.artifacts import StageError, fsync_path
from components.corpus.dialogues import DialogueEncoder
from model import SmallThinkerForCausalLM


def load_model(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | Literal["auto"] = torch.float32
) -> SmallThinkerForCausalLM:
    """Load a checkpoint in evaluation mode; ``auto``: in the dtype that it is stored in.

    Raises:
        StageError: the folder holds no readable model.
    """
    if not (folder / "config.json").is_file():
        raise StageError(f"{folder} holds no model: config.json is missing; run the stage that trains it.")
    try:
        model = SmallThinkerForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StageError(f"the model in {folder} cannot be loaded: {error}") from error
    torch.nn.Module.to(model, device)
    model.train(False)
    return model


def check_vocabulary(model: SmallThinkerForCausalLM, encoder: DialogueEncoder) -> None:
    """Every token id must have an embedding.

    Raises:
        StageError: the tokenizer is larger than the model's vocabulary.
    """
    tokens, rows = len(encoder.tokenizer), model.config.vocab_size
    if tokens > rows:
        raise StageError(
            f"the tokenizer has {tokens} tokens and the model's vocabulary only {rows}; they must match."
        )


def save_model(
    model: SmallThinkerForCausalLM,
    encoder: DialogueEncoder,
    tokenizer_folder: Path,
    folder: Path,
    scratch: Path,
) -> None:
    """Write weights, config, generation config and tokenizer; ``folder`` appears by one rename.

    Args:
        model: what to write.
        encoder: names the tokens that end a generation.
        tokenizer_folder: its files are copied beside the weights.
        folder: the target; replaced when it exists.
        scratch: a folder on the same file system for the draft.
    """
    draft = scratch / f"{folder.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    model.config.eos_token_id = encoder.stop_ids
    model.config.bos_token_id = encoder.end_of_text_id
    generation = model.generation_config
    assert generation is not None
    generation.eos_token_id = encoder.stop_ids
    generation.bos_token_id = encoder.end_of_text_id
    generation.pad_token_id = encoder.end_of_text_id
    model.save_pretrained(draft)
    copy_tokenizer(tokenizer_folder, draft)
    for path in draft.iterdir():
        fsync_path(path)
    replace_folder(draft, folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer folder's files beside a model."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(path, target / path.name)


def replace_folder(draft: Path, folder: Path) -> None:
    """Put a finished draft in ``folder``'s place; a crash in between leaves no half-written folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    fsync_path(folder.parent)
