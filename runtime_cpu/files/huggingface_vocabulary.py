"""The tokenizer of a Hugging Face folder as GGUF metadata: ``read_vocabulary(folder, 151936, eos_ids)``.

Byte-level BPE of the Qwen2 kind, from ``tokenizer.json`` or, where that is missing, from ``vocab.json`` and
``merges.txt``. A tokenizer that a GGUF file could only name wrongly is refused, and so is one that this engine could
not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime_cpu._core import TokenType
from runtime_cpu.files.checkpoint_files import CheckpointError, read_json, read_text
from runtime_cpu.files.gguf_writer import Value
from runtime_cpu.text.tokenizer import QWEN2_PATTERN, Tokenizer, TokenizerError

_TOKENIZER, _SETTINGS, _VOCAB, _MERGES = "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"
_PLAIN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# Features of the BPE model that the engine lacks, and the values that turn them off.
_UNUSED_FEATURES = {
    "dropout": (None, 0, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}


@dataclass(frozen=True)
class Vocabulary:
    """``metadata`` for the GGUF file, and what a reader of that file will not know."""

    metadata: dict[str, Value]
    warnings: tuple[str, ...]


@dataclass
class _Parts:
    """A tokenizer before its ids are laid out; ``added`` holds (id, text, special)."""

    vocab: Mapping[str, Any]
    merges: list[str]
    added: list[tuple[Any, Any, bool]]


def read_vocabulary(folder: Path, vocab_size: int, eos_ids: Iterable[int]) -> Vocabulary | None:
    """The tokenizer of ``folder``; ``None`` if it has none.

    Args:
        vocab_size: rows of the embedding; ids that the tokenizer leaves free become unused tokens.
        eos_ids: the ids that config.json and generation_config.json let an answer end with.

    Raises:
        CheckpointError: files are damaged, or describe a tokenizer of another kind.
    """
    settings = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    if (folder / _TOKENIZER).is_file():
        source = folder / _TOKENIZER
        parts = _from_tokenizer(read_json(source), source)
    elif (folder / _VOCAB).is_file() and (folder / _MERGES).is_file():
        source = folder / _VOCAB
        parts = _from_vocab(folder, settings)
    else:
        return None

    texts: list[str | None] = [None] * vocab_size
    types = np.full(vocab_size, TokenType.UNUSED, np.int32)
    for text, token_id in parts.vocab.items():
        _place(texts, token_id, text, source)
        types[token_id] = TokenType.NORMAL
    for token_id, text, special in parts.added:
        _place(texts, token_id, text, source)
        types[token_id] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    tokens = [f"[PAD{index}]" if text is None else text for index, text in enumerate(texts)]
    ids = {text: index for index, text in enumerate(tokens)}

    def special_id(key: str) -> int | None:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        return ids.get(text, ids.get("<|endoftext|>")) if isinstance(text, str) else ids.get("<|endoftext|>")

    ends = [token_id for token_id in eos_ids if token_id < vocab_size]
    eos = special_id("eos_token")
    named_ids = {
        "bos": special_id("bos_token"),
        "eos": ends[0] if eos is None and ends else eos,
        "padding": special_id("pad_token"),
        "eot": ids.get("<|im_end|>"),
    }
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": parts.merges if parts.merges else np.zeros(0, np.int32),
    }
    for key, found in named_ids.items():
        if found is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = np.uint32(found)
    metadata["tokenizer.ggml.add_bos_token"] = False
    template = _chat_template(folder, settings)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    try:
        known = {
            key: int(value) if isinstance(value, np.generic) else value for key, value in metadata.items()
        }
        tokenizer = Tokenizer.from_metadata(known)
    except TokenizerError as error:
        raise CheckpointError(f"{source} cannot be used: {error}") from None
    unsaid = [f"{token_id} ({tokens[token_id]!r})" for token_id in ends if token_id not in tokenizer.stop_ids]
    note = f"the GGUF file cannot say that these ids end an answer too: {', '.join(unsaid)}"
    return Vocabulary(metadata, (note,) if unsaid else ())


def _from_tokenizer(contents: dict[str, Any], source: Path) -> _Parts:
    model = contents.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(f"{source} is a {kind} tokenizer; byte-level BPE is needed")
    for key, allowed in _UNUSED_FEATURES.items():
        if model.get(key) not in allowed:
            raise CheckpointError(
                f"{source} sets {key} to {model[key]!r}, which this engine's tokenizer lacks"
            )
    if not _is_qwen2(contents.get("pre_tokenizer")):
        raise CheckpointError(
            f"{source} does not use Qwen2's pre-tokenizer; GGUF readers have no name for another"
        )
    normalizer = contents.get("normalizer")
    if normalizer != {"type": "NFC"}:
        raise CheckpointError(f"{source} normalises by {str(normalizer)[:80]}; Qwen2's tokenizer uses NFC")
    vocab, merges, added = model.get("vocab"), model.get("merges", []), contents.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise CheckpointError(f"{source} needs a vocab object and lists of merges and added_tokens")
    pairs = [merge if isinstance(merge, str) else _joined(merge, source) for merge in merges]
    if not all(isinstance(entry, dict) for entry in added):
        raise CheckpointError(f"{source} has added_tokens that are no objects")
    entries = [(entry.get("id"), entry.get("content"), bool(entry.get("special"))) for entry in added]
    return _Parts(vocab, pairs, entries)


def _from_vocab(folder: Path, settings: Mapping[str, Any]) -> _Parts:
    """The older form: which pre-tokenizer it means is said by the class alone."""
    kind = settings.get("tokenizer_class")
    if kind not in _PLAIN_CLASSES:
        raise CheckpointError(
            f"{folder} has {_VOCAB} and no {_TOKENIZER}, and its tokenizer_class is {kind!r}; "
            f"only {_PLAIN_CLASSES[0]} is known by its name"
        )
    lines = read_text(folder / _MERGES).split("\n")
    merges = [line.rstrip("\r") for line in lines[lines[0].startswith("#version") :]]
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict) or not all(
        key.isdecimal() and len(key) < 10 and isinstance(entry, dict) for key, entry in decoder.items()
    ):
        raise CheckpointError(
            f"{folder / _SETTINGS} has an added_tokens_decoder that does not map ids to objects"
        )
    added = [(int(key), entry.get("content"), bool(entry.get("special"))) for key, entry in decoder.items()]
    if (folder / "added_tokens.json").is_file():
        known = {text for _, text, _ in added}
        extra = read_json(folder / "added_tokens.json")
        added += [(token_id, text, False) for text, token_id in extra.items() if text not in known]
    return _Parts(read_json(folder / _VOCAB), [line for line in merges if line], added)


def _joined(merge: Any, source: Path) -> str:
    if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(part, str) for part in merge):
        raise CheckpointError(f"{source} has the merge {str(merge)[:80]}; two tokens are needed")
    return " ".join(merge)


def _place(texts: list[str | None], token_id: Any, text: Any, source: Path) -> None:
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not isinstance(text, str):
        raise CheckpointError(f"{source} gives the token {str(text)[:40]!r} the id {str(token_id)[:40]!r}")
    if not 0 <= token_id < len(texts):
        raise CheckpointError(
            f"{source} gives {text!r} the id {token_id}; the model has {len(texts)} embedding rows"
        )
    if texts[token_id] not in (None, text):
        raise CheckpointError(f"{source} gives the id {token_id} to {texts[token_id]!r} and to {text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{source}: the token {token_id} is no valid text") from None
    texts[token_id] = text


def _is_qwen2(pre_tokenizer: Any) -> bool:
    if not isinstance(pre_tokenizer, dict) or pre_tokenizer.get("type") != "Sequence":
        return False
    match pre_tokenizer.get("pretokenizers"):
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} as split,
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return bool(pattern == QWEN2_PATTERN and not split.get("invert", False))
    return False


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    file = folder / "chat_template.jinja"
    if template is None and file.is_file():
        template = read_text(file)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder / _SETTINGS} has a chat_template that is no text")
    return template
