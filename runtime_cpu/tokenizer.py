"""Byte-level BPE tokenizer built from a GGUF file's metadata.

    tokenizer = Tokenizer.from_metadata(metadata)      # metadata: key -> value, arrays as sequences
    ids = tokenizer.encode("Hello <|im_end|>")          # user text never becomes control tokens
    text = tokenizer.decode(ids)
    stream = tokenizer.stream()
    for token_id in ids:
        print(stream.push(token_id), end="")            # never half a character
    print(stream.finish())

The pre-tokenizer is Qwen2's (``tokenizer.ggml.pre = qwen2``): NFC, then its regular expression, then bytes.
Merging is done by the ``tokenizers`` library, so ids equal those of the Hugging Face tokenizer of origin.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

# Qwen2's pattern, as in its tokenizer.json and in llama.cpp (LLAMA_VOCAB_PRE_TYPE_QWEN2).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_STOP_TEXTS = ("<|endoftext|>", "<|im_end|>")


class TokenizerError(ValueError):
    """The metadata does not describe a tokenizer that this engine can run exactly."""


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``, as in llama.cpp's ``llama_token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes (index = byte)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    extra = iter(range(256, 512))
    return [characters[byte] if byte in characters else chr(next(extra)) for byte in range(256)]


_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(byte_alphabet())}
_BYTE_OF_CODE_POINT = {ord(character): byte for character, byte in _BYTE_OF_CHARACTER.items()}


class Tokenizer:
    """Text to ids and back. Thread safe: it holds no state between calls.

    Attributes:
        vocab_size: number of ids, padding ids included.
        bos_id, eos_id, eot_id: ids named by the metadata, or ``None``.
        add_bos: whether :meth:`encode` puts ``bos_id`` first (``tokenizer.ggml.add_bos_token``).
        stop_ids: ids that end an answer.
        control_tokens: text -> id of the tokens that carry structure (``<|im_start|>``, …).
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[tuple[str, str]],
        token_types: Sequence[int],
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eot_id: int | None = None,
        add_bos: bool = False,
    ) -> None:
        if len(tokens) != len(token_types):
            raise TokenizerError(
                f"tokenizer.ggml.token_type has {len(token_types)} entries, "
                f"tokenizer.ggml.tokens has {len(tokens)}"
            )
        self.vocab_size = len(tokens)
        self.bos_id, self.eos_id, self.eot_id, self.add_bos = bos_id, eos_id, eot_id, add_bos
        for name, value in (("bos", bos_id), ("eos", eos_id), ("eot", eot_id)):
            if value is not None and not 0 <= value < len(tokens):
                raise TokenizerError(
                    f"tokenizer.ggml.{name}_token_id is {value}, the vocabulary ends at {len(tokens) - 1}"
                )
        if add_bos and bos_id is None:
            raise TokenizerError(
                "tokenizer.ggml.add_bos_token is set and tokenizer.ggml.bos_token_id is missing"
            )

        # 150,000 tokens a start: everything that touches each of them is one call over all.
        is_normal = np.asarray(token_types) == TokenType.NORMAL
        normal = np.flatnonzero(is_normal).tolist()
        texts = [tokens[index] for index in normal]
        vocabulary = dict(zip(texts, normal, strict=True))
        if len(vocabulary) != len(texts):
            _refuse_repeated(texts, normal)
        missing = [byte for character, byte in _BYTE_OF_CHARACTER.items() if character not in vocabulary]
        if missing:
            raise TokenizerError(
                f"the vocabulary lacks {len(missing)} of the 256 bytes, first 0x{missing[0]:02x}"
            )
        if not _BYTE_OF_CHARACTER.keys() >= set("".join(texts)):
            _refuse_character(texts, normal)

        added: dict[str, int] = {}
        self.control_tokens: dict[str, int] = {}
        for index in np.flatnonzero(~is_normal).tolist():
            text, kind = tokens[index], token_types[index]
            if kind not in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED):
                raise TokenizerError(f"token {index} has type {kind}; byte-level BPE knows 1, 3, 4 and 5")
            if kind == TokenType.UNUSED:
                continue
            if not text or text in added:
                raise TokenizerError(f"special token {index} is empty or repeats another: {text!r}")
            added[text] = index
            if kind == TokenType.CONTROL:
                self.control_tokens[text] = index
        if not added.keys().isdisjoint(map("".join, merges)):
            left, right = next(pair for pair in merges if "".join(pair) in added)
            raise TokenizerError(f"the merge {left!r} {right!r} makes the special token {left + right!r}")
        self._user_defined = {text: i for text, i in added.items() if text not in self.control_tokens}
        self._plain = self._build(vocabulary, merges, self._user_defined)
        # One text and its cuts: 150,000 small objects would weigh several times as much.
        pieces: list[bytes] = []
        lengths: list[int] = [0]
        changes = (np.flatnonzero(np.diff(is_normal)) + 1).tolist()
        for begin, end in pairwise([0, *changes, len(tokens)]):
            names = tokens[begin:end]
            if is_normal[begin]:
                pieces.append("".join(names).translate(_BYTE_OF_CODE_POINT).encode("latin-1"))
                lengths += map(len, names)
            else:
                pieces += (raw := [text.encode("utf-8", "surrogateescape") for text in names])
                lengths += map(len, raw)
        self._bytes = b"".join(pieces)
        self._ends = np.cumsum(lengths, dtype=np.int64)
        stops = [eos_id, eot_id, *(self.control_tokens.get(text) for text in _STOP_TEXTS)]
        self.stop_ids = frozenset(token_id for token_id in stops if token_id is not None)
        self._control_ids = frozenset(self.control_tokens.values())
        self._control_pattern = _alternatives(self.control_tokens)

    @staticmethod
    def _build(
        vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Mapping[str, int]
    ) -> tokenizers.Tokenizer:
        # Added tokens get their ids from the model's vocabulary.
        try:
            model = models.BPE(vocab={**vocabulary, **added}, merges=list(merges))
        except Exception as error:  # the library raises plain Exception for merges outside the vocabulary
            raise TokenizerError(
                f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}"
            ) from error
        built = tokenizers.Tokenizer(model)
        built.normalizer = normalizers.NFC()
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        built.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in added])
        return built

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata (``tokenizer.ggml.*``).

        Raises:
            TokenizerError: a key is missing or malformed, or the tokenizer is of another kind.
        """
        kind = _get(metadata, "tokenizer.ggml.model", str)
        if kind != "gpt2":
            raise TokenizerError(
                f"tokenizer.ggml.model is {kind!r}; this engine runs 'gpt2' (byte-level BPE)"
            )
        pre = _get(metadata, "tokenizer.ggml.pre", str)
        if pre != "qwen2":
            raise TokenizerError(f"tokenizer.ggml.pre is {pre!r}; this engine runs 'qwen2'")
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        lines = _strings(metadata, "tokenizer.ggml.merges")
        merges: list[Any] = [tuple(line.split(" ")) for line in lines]
        if not set(map(len, merges)) <= {2} or not all(map(all, merges)):
            index = next(i for i, pair in enumerate(merges) if len(pair) != 2 or not all(pair))
            raise TokenizerError(
                f"tokenizer.ggml.merges[{index}] is {lines[index]!r}; it should be two tokens and a space"
            )
        raw_types = metadata.get("tokenizer.ggml.token_type")
        types = [TokenType.NORMAL] * len(tokens) if raw_types is None else [int(kind) for kind in raw_types]
        return cls(
            tokens,
            merges,
            types,
            bos_id=_optional_id(metadata, "tokenizer.ggml.bos_token_id"),
            eos_id=_optional_id(metadata, "tokenizer.ggml.eos_token_id"),
            eot_id=_optional_id(metadata, "tokenizer.ggml.eot_token_id"),
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        )

    def encode(self, text: str, parse_special: bool = False, add_bos: bool | None = None) -> list[int]:
        """Ids of ``text``.

        Args:
            parse_special: turn the text of control tokens into those tokens. Leave it off for text that a
                user wrote: then ``<|im_end|>`` is ten ordinary characters.
            add_bos: put the file's BOS first; by default as the file says.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no UTF-8 form
        ids: list[int] = []
        # One tokenizer serves both: what lies between control tokens is encoded by itself, as it would be anyway.
        for piece, control in self.split_control(text) if parse_special else [(text, None)]:
            if control is None:
                ids += self._plain.encode(piece, add_special_tokens=False).ids
            else:
                ids.append(control)
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise TokenizerError("add_bos was asked for and the file names no BOS token")
            ids.insert(0, self.bos_id)
        return ids

    def split_control(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Cut ``text`` at control tokens, longest first: pairs of (piece, id or ``None`` for plain text)."""
        position = 0
        if self._control_pattern is not None:
            for match in self._control_pattern.finditer(text):
                if match.start() > position:
                    yield text[position : match.start()], None
                yield match.group(), self.control_tokens[match.group()]
                position = match.end()
        if position < len(text):
            yield text[position:], None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; the name of the token for control tokens."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._bytes[self._ends[token_id] : self._ends[token_id + 1]]

    def is_control(self, token_id: int) -> bool:
        """Whether the id carries structure and is no text of an answer."""
        return token_id in self._control_ids

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """Text of ``ids``; bytes that form no character become U+FFFD."""
        kept = (i for i in ids if not (skip_control and self.is_control(i)))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def stream(self, skip_control: bool = True) -> StreamDecoder:
        """A decoder that takes one id at a time and gives out whole characters only."""
        return StreamDecoder(self, skip_control)


class StreamDecoder:
    """Incremental decoding: the concatenation of all pieces equals :meth:`Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_control: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that became complete with this id; often empty in the middle of a character."""
        if self._skip_control and self._tokenizer.is_control(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Whatever is left at the end: U+FFFD for an unfinished character."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _refuse_repeated(texts: Sequence[str], indices: Sequence[int]) -> None:
    first: dict[str, int] = {}
    for text, index in zip(texts, indices, strict=True):
        if text in first:
            raise TokenizerError(f"token {text!r} occurs twice, as {first[text]} and {index}")
        first[text] = index


def _refuse_character(texts: Sequence[str], indices: Sequence[int]) -> None:
    for text, index in zip(texts, indices, strict=True):
        for character in text:
            if character not in _BYTE_OF_CHARACTER:
                raise TokenizerError(
                    f"token {index} ({text!r}) has the character {character!r}, which stands for no byte"
                )


def _alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _get(metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    value = metadata.get(key)
    if value is None:
        raise TokenizerError(f"the file has no {key}; export it with its tokenizer")
    if not isinstance(value, kind):
        raise TokenizerError(f"{key} should be {kind.__name__}, it is {type(value).__name__}")
    return value


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if value is None:
        raise TokenizerError(f"the file has no {key}; export it with its tokenizer")
    if not set(map(type, value)) <= {str}:
        index, item = next(pair for pair in enumerate(value) if type(pair[1]) is not str)
        raise TokenizerError(f"{key}[{index}] should be text, it is {type(item).__name__}")
    return list(value)


def _optional_id(metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TokenizerError(f"{key} should be an integer, it is {type(value).__name__}")
    return value
