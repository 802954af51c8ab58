"""Byte-level BPE tokenizer built from a GGUF file's metadata.

    tokenizer = Tokenizer.from_model(model)            # an opened file
    tokenizer = Tokenizer.from_metadata(metadata)      # key -> value, arrays as sequences
    ids = tokenizer.encode("Hello <|im_end|>")          # user text never becomes control tokens
    text = tokenizer.decode(ids)
    stream = tokenizer.stream()
    for token_id in ids:
        print(stream.push(token_id), end="")            # never half a character
    print(stream.finish())

The pre-tokenizer is Qwen2's (``tokenizer.ggml.pre = qwen2``): NFC, then its regular expression, both by the
``tokenizers`` library. Bytes are merged by the core (``csrc/model/vocabulary.hpp``), which takes the file's tables as
they are: the library's own model of 150,000 tokens takes ten times as long to make and five times the memory. Ids equal
those of the Hugging Face tokenizer of origin.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

from runtime_cpu import _core
from runtime_cpu._core import TokenizerError as TokenizerError
from runtime_cpu._core import TokenType

# Qwen2's pattern, as in its tokenizer.json and in llama.cpp (LLAMA_VOCAB_PRE_TYPE_QWEN2).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WINDOW_CHARACTERS = 1 << 14
_STOP_TEXTS = ("<|endoftext|>", "<|im_end|>")


class Tokenizer:
    """Text to ids and back. Thread safe: it holds no state between calls.

    Attributes:
        vocab_size: number of ids, padding ids included.
        bos_id: the id that the metadata name as the beginning of a text, or ``None``.
        eos_id: the same for the end of a text.
        eot_id: the same for the end of a turn.
        add_bos: whether :meth:`encode` puts ``bos_id`` first (``tokenizer.ggml.add_bos_token``).
        stop_ids: ids that end an answer.
        control_tokens: text -> id of the tokens that carry structure (``<|im_start|>``, …).
        longest_token_bytes: of any id.
    """

    def __init__(
        self,
        vocabulary: _core.Vocabulary,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eot_id: int | None = None,
        add_bos: bool = False,
    ) -> None:
        self.vocab_size = len(vocabulary)
        self.bos_id, self.eos_id, self.eot_id, self.add_bos = bos_id, eos_id, eot_id, add_bos
        for name, value in (("bos", bos_id), ("eos", eos_id), ("eot", eot_id)):
            if value is not None and not 0 <= value < self.vocab_size:
                raise TokenizerError(
                    f"tokenizer.ggml.{name}_token_id is {value}, the vocabulary ends at {self.vocab_size - 1}"
                )
        if add_bos and bos_id is None:
            raise TokenizerError(
                "tokenizer.ggml.add_bos_token is set and tokenizer.ggml.bos_token_id is missing"
            )
        self._vocabulary = vocabulary
        self._normalizer = normalizers.NFC()
        self._pre_tokenizer = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
        self.control_tokens = vocabulary.tokens_of_kind(TokenType.CONTROL)
        self._user_defined = vocabulary.tokens_of_kind(TokenType.USER_DEFINED)
        self.longest_token_bytes = vocabulary.longest_token_bytes
        stops = [eos_id, eot_id, *(self.control_tokens.get(text) for text in _STOP_TEXTS)]
        self.stop_ids = frozenset(token_id for token_id in stops if token_id is not None)
        self._control_ids = frozenset(self.control_tokens.values())
        self._control_pattern = _alternatives(self.control_tokens)
        self._user_defined_pattern = _alternatives(self._user_defined)

    @classmethod
    def from_model(cls, model: _core.Model) -> Tokenizer:
        """The tokenizer of an opened file.

        Raises:
            TokenizerError: the file has none, or one of another kind.
        """
        metadata = model.metadata(arrays=False)
        _check_kind(metadata)
        return cls(model.vocabulary(), **_named_ids(metadata))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata (``tokenizer.ggml.*``).

        Raises:
            TokenizerError: a key is missing or malformed, or the tokenizer is of another kind.
        """
        _check_kind(metadata)
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        merges = _strings(metadata, "tokenizer.ggml.merges")
        raw_kinds = metadata.get("tokenizer.ggml.token_type")
        kinds = None if raw_kinds is None else [int(kind) for kind in raw_kinds]
        vocabulary = _core.Vocabulary.of(tokens, kinds=kinds, merges=merges)
        return cls(vocabulary, **_named_ids(metadata))

    def encode(self, text: str, parse_special: bool = False, add_bos: bool | None = None) -> list[int]:
        """Ids of ``text``.

        Args:
            parse_special: turn the text of control tokens into those tokens. Leave it off for text that a
                user wrote: then ``<|im_end|>`` is ten ordinary characters.
            add_bos: put the file's BOS first; by default as the file says.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no UTF-8 form
        ids: list[int] = []
        for piece, control in self.split_control(text) if parse_special else [(text, None)]:
            if control is None:
                ids += self._encode_plain(piece)
            else:
                ids.append(control)
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise TokenizerError("add_bos was asked for and the file names no BOS token")
            ids.insert(0, self.bos_id)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece, known in _split(text, self._user_defined_pattern, self._user_defined):
            if known is None:
                for words in self._words(self._normalizer.normalize_str(piece)):
                    ids += self._vocabulary.encode(words)
            else:
                ids.append(known)
        return ids

    def _words(self, text: str) -> Iterator[list[str]]:
        """Words of ``text``, some thousands at a time: those of a megabyte weigh a hundred."""
        begin, size = 0, WINDOW_CHARACTERS
        while begin < len(text):
            whole = begin + size >= len(text)
            words = self._pre_tokenizer.pre_tokenize_str(text[begin : begin + size])
            if not whole:
                # What lies behind the window may change its last word, and how the blanks before its end are cut.
                while words and words[-1][0].isspace():
                    words.pop()
                words = words[:-1]
                if not words:
                    size *= 2
                    continue
            yield [word for word, _ in words]
            begin = len(text) if whole else begin + words[-1][1][1]
            size = WINDOW_CHARACTERS

    def split_control(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Cut ``text`` at control tokens, longest first: pairs of (piece, id or ``None`` for plain text)."""
        return _split(text, self._control_pattern, self.control_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; the name of the token for control tokens."""
        return self._vocabulary.token_bytes(token_id)

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


def _alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _split(
    text: str, pattern: re.Pattern[str] | None, ids: Mapping[str, int]
) -> Iterator[tuple[str, int | None]]:
    position = 0
    if pattern is not None:
        for match in pattern.finditer(text):
            if match.start() > position:
                yield text[position : match.start()], None
            yield match.group(), ids[match.group()]
            position = match.end()
    if position < len(text):
        yield text[position:], None


def _check_kind(metadata: Mapping[str, Any]) -> None:
    kind = _get(metadata, "tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise TokenizerError(f"tokenizer.ggml.model is {kind!r}; this engine runs 'gpt2' (byte-level BPE)")
    pre = _get(metadata, "tokenizer.ggml.pre", str)
    if pre != "qwen2":
        raise TokenizerError(f"tokenizer.ggml.pre is {pre!r}; this engine runs 'qwen2'")


def _named_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bos_id": _optional_id(metadata, "tokenizer.ggml.bos_token_id"),
        "eos_id": _optional_id(metadata, "tokenizer.ggml.eos_token_id"),
        "eot_id": _optional_id(metadata, "tokenizer.ggml.eot_token_id"),
        "add_bos": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
    }


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
