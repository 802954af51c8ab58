"""A tokenizer, token shards and a two-layer run made from nothing: ``make_tokens(folder)``, ``run_config()``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

WORDS = {
    "general": "river mountain city coast island valley lake capital border province",
    "maths": "number theorem proof equation algebra matrix integer sum triangle 12 34",
    "code": "def return class import lambda while yield assert raise global",
    "web_stem": "species plant cell atom gene force energy mass orbit acid",
    "sft": "user assistant question answer please sure thanks 中文 hello help",
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 320
TRAIN_DOCUMENTS, HELD_OUT_DOCUMENTS = 150, 12
# chinese is wanted and absent; code has no held-out text: both are branches of the stage.
ABSENT, UNMEASURED = "chinese", "code"
STAGE_STEPS = 12
STEPS = 3 * STAGE_STEPS
BATCH, CONTEXT = 8, 16
MIXTURE = {"general": 0.4, "maths": 0.2, "code": 0.1, "web_stem": 0.1, "chinese": 0.1, "sft": 0.1}
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "moe_num_primary_experts": 4,
    "moe_ffn_hidden_size": 32,
    "rope_layout": [0, 1],
    "sliding_window_layout": [0, 1],
    "sliding_window_size": 8,
    "vocab_size": 384,  # more than the tokenizer's, as in the full sizes
    "max_position_embeddings": 64,
}


def texts(category: str, seed: int, count: int) -> list[str]:
    """Documents of five to twelve words."""
    random = np.random.default_rng([seed, sorted(WORDS).index(category)])
    words = WORDS[category].split()
    return [" ".join(random.choice(words, size=int(random.integers(5, 13)))) for _ in range(count)]


def make_tokenizer(folder: Path) -> Tokenizer:
    """Train a byte-level BPE and write ``tokenizer.json``."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for name in WORDS for text in texts(name, 0, 40)), trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_shard(folder: Path, name: str, documents: list[list[int]]) -> int:
    """One ``.ds`` file with its index; returns its tokens."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = np.asarray([token for document in documents for token in document], dtype="<u2")
    stream.tofile(path)
    np.cumsum([len(document) for document in documents], dtype="<u8").tofile(
        path.with_name(f"{path.name}.index")
    )
    return len(stream)


def make_tokens(folder: Path) -> Path:
    """The artefact of stage ``tokenize``: two splits; every training category in two files."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    eos = tokenizer.token_to_id("<|endoftext|>")
    splits: dict[str, Any] = {}
    for split, seed, count in (("train", 1, TRAIN_DOCUMENTS), ("heldout", 2, HELD_OUT_DOCUMENTS)):
        splits[split] = {}
        for category in WORDS:
            if split == "heldout" and category == UNMEASURED:
                continue
            lines = texts(category, seed, count)
            documents = [[*tokenizer.encode(line).ids, eos] for line in lines]
            names = [f"shards/{split}/{category}/{part:05}.ds" for part in range(2)]
            half = count // 2
            tokens = sum(
                write_shard(folder, name, part)
                for name, part in zip(names, (documents[:half], documents[half:]), strict=True)
            )
            splits[split][category] = {
                "tokens": tokens,
                "documents": count,
                "bytes": sum(len(line.encode()) for line in lines),
                "files": names,
            }
    index = {"dtype": "uint16", "vocab_size": VOCABULARY, "eos_id": eos, "splits": splits}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def stage_config(**values: Any) -> dict[str, Any]:
    """One training stage of ``STAGE_STEPS`` steps."""
    part: dict[str, Any] = {
        "tokens": STAGE_STEPS * BATCH * CONTEXT - 3,  # rounded up to whole steps
        "context": CONTEXT,
        "sequences_per_step": BATCH,
        "rope_theta": 1e5,
        "mixture": MIXTURE,
    }
    return {**part, **values}


def run_config(**values: Any) -> dict[str, Any]:
    """36 steps of a two-layer model; log lines and checkpoints fall on different steps."""
    config: dict[str, Any] = {
        "seed": 11,
        "model": {"preset": "nano", "overrides": MODEL},
        "stages": [
            stage_config(),
            stage_config(mixture={**MIXTURE, "general": 0.2, "maths": 0.4}),
            stage_config(context=2 * CONTEXT, sequences_per_step=BATCH // 2, rope_theta=1.5e6),
        ],
        "optimizer": {"peak_lr": 1e-2, "warmup_steps": 4},
        "evaluation": {"tokens_per_category": 64, "bigram_tokens_per_category": 10_000},
        "sequences_per_micro_batch": 4,
        "device": "cpu",
        "precision": "fp32",
        "threads": 1,
        "log_every_steps": 3,
        "checkpoint_every_steps": 5,
    }
    return {**config, **values}
