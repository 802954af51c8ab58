"""Small artefacts in the contract's formats, made from nothing: ``make_inputs(folder)``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from components.artifacts import StageContext
from model import PRESETS, SmallThinkerConfig, SmallThinkerForCausalLM

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOPICS = {
    "Geography": "river mountain city coast island valley lake capital border province",
    "Mathematics": "number theorem proof equation algebra matrix integer function sum triangle",
    "Biology": "species plant animal cell leaf bird fish flower gene tree",
    "Music": "song album guitar singer band piano concert melody drum opera",
}
VOCABULARY = 512


def sentences(seed: int, count: int) -> list[tuple[str, str]]:
    """(text, topic) pairs whose words tell the topic."""
    random = np.random.default_rng(seed)
    names = sorted(TOPICS)
    pairs = []
    for _ in range(count):
        topic = names[int(random.integers(len(names)))]
        words = random.choice(TOPICS[topic].split(), size=5)
        pairs.append(
            (f"The {words[0]} and the {words[1]} of a {words[2]} with {words[3]} {words[4]}.", topic)
        )
    return pairs


def question(text: str) -> str:
    """The topic task's user turn."""
    return f"Which topic does this text belong to?\n\n{text}"


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with ChatML's special tokens and write it as the stage tokenize does."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (question(text) + " " + topic for text, topic in sentences(0, 400)), trainer
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    fast.save_pretrained(folder)
    return fast


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sft_rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    rows = [
        {
            "messages": [
                {"role": "user", "content": question(text)},
                {"role": "assistant", "content": topic},
            ],
            "task": "topic",
            "source": "made",
        }
        for text, topic in sentences(seed, count)
    ]
    random = np.random.default_rng(seed)
    for _ in range(count // 4):
        a, b = random.integers(1, 10, size=2).tolist()
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"What is {a} + {b}?"},
                    {"role": "assistant", "content": str(a + b)},
                ],
                "task": "arithmetic",
                "source": "made",
            }
        )
    return rows


def make_evalsets(folder: Path, count: int) -> None:
    names = sorted(TOPICS)
    topic = [
        {
            "id": f"t{i}",
            "question": question(text),
            "choices": names,
            "answer": names.index(label),
            "split": "dev" if i % 2 else "test",
        }
        for i, (text, label) in enumerate(sentences(99, count))
    ]
    arithmetic = [
        {
            "id": f"a{i}",
            "question": f"What is {i % 9 + 1} + {i % 7 + 1}?",
            "answer": str(i % 9 + i % 7 + 2),
            "split": "dev",
        }
        for i in range(count)
    ]
    write_jsonl(folder / "topic.jsonl", topic)
    write_jsonl(folder / "arithmetic.jsonl", arithmetic)
    entry = {"n": count, "chance": 0.25, "source": "made", "licence": "none"}
    index = {"topic": {"kind": "choice", **entry}, "arithmetic": {"kind": "generated", **entry}}
    (folder / "index.json").write_text(json.dumps(index))


def make_shards(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Token shards of two splits and one category, in datatrove's format."""
    splits: dict[str, Any] = {}
    for split, seed, count in (("train", 5, 60), ("heldout", 6, 40)):
        texts = [text for text, _ in sentences(seed, count)]
        stream: list[int] = []
        ends: list[int] = []
        for text in texts:
            stream += [*tokenizer.encode(text), tokenizer.eos_token_id]
            ends.append(len(stream))
        name = f"shards/{split}/general/00000.ds"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.asarray(stream, dtype="<u2").tofile(path)
        np.asarray(ends, dtype="<u8").tofile(path.with_name(path.name + ".index"))
        splits[split] = {
            "general": {
                "tokens": len(stream),
                "documents": len(texts),
                "bytes": sum(len(text.encode()) for text in texts),
                "files": [name],
            }
        }
    index = {
        "dtype": "uint16",
        "vocab_size": VOCABULARY,
        "eos_id": tokenizer.eos_token_id,
        "splits": splits,
    }
    (folder / "index.json").write_text(json.dumps(index))


def small_model(seed: int = 0, **overrides: Any) -> SmallThinkerForCausalLM:
    """A random model of the smallest useful size."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "moe_num_primary_experts": 4,
        "moe_num_active_primary_experts": 2,
        "moe_ffn_hidden_size": 64,
        "rope_layout": [0, 1, 1, 1],
        "sliding_window_layout": [0, 1, 1, 1],
        "sliding_window_size": 64,
    }
    return SmallThinkerForCausalLM(SmallThinkerConfig(**{**PRESETS["nano"], **values, **overrides}))


@dataclass
class Inputs:
    """Parents' folders by role, and the tokenizer in them."""

    folders: dict[str, Path]
    tokenizer: PreTrainedTokenizerFast

    def context(self, stage: str, out: Path, config: dict[str, Any]) -> StageContext:
        out.mkdir(parents=True, exist_ok=True)
        return StageContext(
            stage=stage,
            recipe="tiny",
            config=config,
            inputs=self.folders,
            out=out,
            cache=out.parent / "cache",
        )


def make_inputs(folder: Path, dialogues: int = 400) -> Inputs:
    """Everything that ``posttrain`` reads."""
    folders = {role: folder / role for role in ("pretrain", "tokenize", "synthesize", "evalsets")}
    tokenizer = make_tokenizer(folders["tokenize"] / "tokenizer")
    make_shards(folders["tokenize"], tokenizer)
    write_jsonl(folders["synthesize"] / "sft.jsonl", sft_rows(dialogues))
    make_evalsets(folders["evalsets"], 60)
    for number, stage in enumerate(("stage1", "stage2", "stage3")):
        target = folders["pretrain"] / stage
        small_model(number, rope_theta=1.5e6 if stage == "stage3" else 1e5).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return Inputs(folders, tokenizer)
