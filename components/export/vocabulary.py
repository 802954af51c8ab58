"""The tokenizer as GGUF metadata: ``read_vocabulary(folder, vocab_size=4096)``.

A GGUF file carries byte-level BPE as three lists (tokens, token types, merges) and names its pre-tokenizer;
readers know ``qwen2``, so a tokenizer with any other pre-tokenizer is refused rather than written under a
wrong name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from components.artifacts import StageError
from components.corpus.special_tokens import END_OF_TEXT, TURN_END

# Qwen2's pre-tokenizer, as its tokenizer.json writes it.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about its tokenizer.

    Attributes:
        tokens: text of each id, in the byte-level alphabet; padded to the model's vocabulary.
        types: ``gguf.TokenType`` of each id.
        merges: pairs joined by a space, in order of rank.
        bos_id, eos_id, pad_id, eot_id: special ids, where they exist; ``eot`` ends a chat turn.
        chat_template: Jinja source.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    eot_id: int | None
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add the metadata to a file under construction."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        if self.bos_id is not None:
            writer.add_bos_token_id(self.bos_id)
        if self.eos_id is not None:
            writer.add_eos_token_id(self.eos_id)
        if self.pad_id is not None:
            writer.add_pad_token_id(self.pad_id)
        if self.eot_id is not None:
            writer.add_eot_token_id(self.eot_id)
        writer.add_add_bos_token(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read a Hugging Face tokenizer folder.

    Args:
        folder: holds ``tokenizer.json`` and ``tokenizer_config.json``.
        vocab_size: rows of the model's embedding; ids that the tokenizer leaves free become unused tokens.

    Raises:
        StageError: files are missing or torn, or the tokenizer is not byte-level BPE with Qwen2's
        pre-tokenizer.
    """
    tokenizer = _read_json(folder / "tokenizer.json")
    settings = _read_json(folder / "tokenizer_config.json")
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE":
        raise StageError(
            f"{folder}/tokenizer.json is a {model.get('type')} tokenizer; GGUF needs byte-level BPE."
        )
    _check_pre_tokenizer(tokenizer.get("pre_tokenizer"), folder)

    tokens: list[str | None] = [None] * vocab_size
    types = [int(TokenType.UNUSED)] * vocab_size
    for text, token_id in model["vocab"].items():
        _place(tokens, token_id, text, vocab_size, folder)
        types[token_id] = int(TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        _place(tokens, added["id"], added["content"], vocab_size, folder)
        types[added["id"]] = int(TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED)
    named = [f"[PAD{i}]" if text is None else text for i, text in enumerate(tokens)]
    ids = {text: i for i, text in enumerate(named)}

    def special(key: str) -> int | None:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        return ids.get(text) if text is not None else None

    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    end_of_text = ids.get(END_OF_TEXT)
    template_file = folder / "chat_template.jinja"
    template = settings.get("chat_template")
    if template is None and template_file.is_file():
        template = template_file.read_text()
    bos, eos, pad = special("bos_token"), special("eos_token"), special("pad_token")
    return Vocabulary(
        tokens=named,
        types=types,
        merges=merges,
        bos_id=end_of_text if bos is None else bos,
        eos_id=end_of_text if eos is None else eos,
        pad_id=end_of_text if pad is None else pad,
        eot_id=ids.get(TURN_END),
        chat_template=template,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing; the export needs the tokenizer's folder.") from error
    except ValueError as error:
        raise StageError(f"{path} is not valid JSON: {error}.") from error
    return contents


def _place(tokens: list[str | None], token_id: int, text: str, vocab_size: int, folder: Path) -> None:
    if not 0 <= token_id < vocab_size:
        raise StageError(
            f"{folder}/tokenizer.json gives {text!r} the id {token_id}; the model has {vocab_size} embedding rows."
        )
    tokens[token_id] = text


def _check_pre_tokenizer(pre_tokenizer: dict[str, Any] | None, folder: Path) -> None:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if patterns != [QWEN2_PATTERN] or not byte_level or byte_level[0].get("use_regex", True):
        raise StageError(
            f"{folder}/tokenizer.json does not use Qwen2's pre-tokenizer; GGUF readers have no name for another."
        )
