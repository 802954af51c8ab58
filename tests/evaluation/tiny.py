"""A tiny random model and a byte-level tokenizer with the ChatML template, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model import SmallThinkerConfig, SmallThinkerForCausalLM

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and the three special tokens: every text is encodable, ids 256 to 258 are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def tiny_config(**overrides: object) -> SmallThinkerConfig:
    """Four layers, global and windowed, four experts; wide enough that window and context edges are crossed."""
    fields: dict[str, object] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "moe_num_primary_experts": 4,
        "moe_num_active_primary_experts": 2,
        "moe_ffn_hidden_size": 16,
        "rope_layout": [0, 1, 1, 1],
        "sliding_window_layout": [0, 1, 1, 1],
        "sliding_window_size": 16,
        "max_position_embeddings": 512,
    }
    return SmallThinkerConfig(**(fields | overrides))


def tiny_model(seed: int = 0, scale: float = 4.0, **overrides: object) -> SmallThinkerForCausalLM:
    """Random weights, scaled up so that the logits are far from uniform."""
    torch.manual_seed(seed)
    model = SmallThinkerForCausalLM(tiny_config(**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.train(False)


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A Hugging Face folder with tokenizer, as the training stages write it."""
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_shards(folder: Path, texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast) -> Path:
    """Token shards of held-out documents by category, with their tokenizer, as the stage tokenize writes them."""
    eos = tokenizer.eos_token_id
    entries = {}
    for category, documents in texts.items():
        tokens: list[int] = []
        ends = []
        for text in documents:
            tokens += [*tokenizer.encode(text, add_special_tokens=False), eos]
            ends.append(len(tokens))
        name = f"shards/heldout/{category}/00000.ds"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.array(tokens, dtype="<u2").tofile(path)
        np.array(ends, dtype="<u8").tofile(path.with_name(path.name + ".index"))
        entries[category] = {
            "tokens": len(tokens),
            "documents": len(documents),
            "bytes": sum(len(text.encode()) for text in documents),
            "files": [name],
        }
    index = {"dtype": "uint16", "vocab_size": len(tokenizer), "eos_id": eos, "splits": {"heldout": entries}}
    (folder / "index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder
