"""A small tokenizer trained here as Qwen's are, and the GGUF metadata that an exporter writes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "</think>")
# Written out again on purpose: this is Qwen's own tokenizer.json, not the engine's constant.
PATTERN = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dogs don't care; they've seen it, and I'll bet they'd sleep.",
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]\n\n\tclass A: pass\r\n",
    "北京是中国的首都。今天天气很好，我们去公园散步。你好，世界！你好！",
    "Numbers 1234567890, 3.14159; e-mails a@b.example; naïve café Ångström déjà vu — “quotes” … 🎉👩‍👩‍👧",
] * 8


def train(vocab_size: int = 700) -> tokenizers.Tokenizer:
    """A Hugging Face tokenizer with Qwen's normalizer, pre-tokenizer and special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in USER_DEFINED])
    return tokenizer


def write_gguf(
    path: Path, tokenizer: tokenizers.Tokenizer, padding: int = 8, template: str | None = None
) -> None:
    """Write the tokenizer's metadata with the gguf package, as llama.cpp's converter does."""
    import json

    size = tokenizer.get_vocab_size()
    texts = [tokenizer.id_to_token(index) for index in range(size)] + [
        f"[PAD{size + i}]" for i in range(padding)
    ]
    kinds = [
        3 if text in CONTROL else 4 if text in USER_DEFINED else 5 if index >= size else 1
        for index, text in enumerate(texts)
    ]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "smallthinker")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(texts.index("<|im_end|>"))
    writer.add_bos_token_id(texts.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata with the gguf package's reader, which shares no code with the engine's."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
