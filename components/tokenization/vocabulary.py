"""Vocabularies: a byte-level BPE trained with Qwen's rules, or Qwen's own: ``train_tokenizer(texts, 4096)``."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from components.artifacts import StageError, write_atomically, write_json
from components.corpus.special_tokens import END_OF_TEXT, TURN_END, TURN_START

SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer: GPT-4's with single digits (arXiv:2309.16609, section 2.2)."""

_QWEN_RANKS = 151_643
_QWEN_FURTHER_SPECIAL = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_QWEN_FURTHER_PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without a default system turn. No ``{% generation %}`` marks: plain Jinja engines on devices lack them."""


def _around(model: models.BPE) -> Tokenizer:
    """Qwen's normaliser, pre-tokenizer and decoder around a BPE."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    return tokenizer


def _special(text: str, special: bool = True) -> AddedToken:
    return AddedToken(text, normalized=False, special=special)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly ``vocab_size`` ids, the last three being the special tokens.

    Raises:
        StageError: the text is too small for that many merges.
    """
    tokenizer = _around(models.BPE())
    ordinary = vocab_size - len(SPECIAL_TOKENS)
    trainer = BpeTrainer(
        vocab_size=ordinary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != ordinary:
        raise StageError(
            f"the training text gives {found} tokens, vocab_size {vocab_size} needs {ordinary} and "
            f"{len(SPECIAL_TOKENS)} special ones; lower tokenize.vocab_size or curate more text"
        )
    tokenizer.add_special_tokens([_special(text) for text in SPECIAL_TOKENS])
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a tiktoken file: one ``base64 rank`` a line.

    Raises:
        StageError: a line is malformed or the ranks are not 0, 1, 2, …
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise StageError(f"{path.name} line {number} is not a token and a rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise StageError(f"{path.name} does not hold the ranks 0 to {len(ranks) - 1} once each")
    return ranks


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The ordered merges behind tiktoken ranks.

    A token's merge is found by running the BPE on its bytes with lower ranks only: two parts remain.

    Raises:
        StageError: a token cannot be reached by merging two earlier ones.
    """
    merges: list[tuple[bytes, bytes]] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _split_below(ranks, token, rank)
        if len(parts) != 2:
            raise StageError(f"token {token!r} of rank {rank} is not a merge of two earlier tokens")
        merges.append((parts[0], parts[1]))
    return merges


def _split_below(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, where = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], limit)
            if rank < best:
                best, where = rank, i
        if where < 0:
            break
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return parts


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for every byte, as ``tokenizers`` uses it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + number) for number, byte in enumerate(others)}


def tokenizer_from_ranks(ranks: dict[bytes, int], added: Iterable[tuple[str, bool]]) -> Tokenizer:
    """A tokenizer from tiktoken ranks; ``added`` tokens (text, special) take the ids that follow."""
    characters = _byte_characters()

    def shown(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {shown(token): rank for token, rank in ranks.items()}
    merges = [(shown(a), shown(b)) for a, b in merges_of(ranks)]
    tokenizer = _around(models.BPE(vocab=vocabulary, merges=merges))
    for text, special in added:
        token = _special(text, special)
        tokenizer.add_special_tokens([token]) if special else tokenizer.add_tokens([token])
    return tokenizer


def qwen_tokenizer(path: Path) -> Tokenizer:
    """Qwen's tokenizer (151,669 ids) from ``qwen.tiktoken``.

    Raises:
        StageError: the file does not hold Qwen's 151,643 ranks.
    """
    ranks = read_ranks(path)
    if len(ranks) != _QWEN_RANKS:
        raise StageError(f"{path.name} holds {len(ranks)} ranks, Qwen's vocabulary has {_QWEN_RANKS}")
    special = [(text, True) for text in (*SPECIAL_TOKENS, *_QWEN_FURTHER_SPECIAL)]
    return tokenizer_from_ranks(ranks, [*special, *((text, False) for text in _QWEN_FURTHER_PLAIN)])


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for transformers' AutoTokenizer.

    ``eos_token`` is ``<|endoftext|>`` as in Qwen's base models: it ends documents. A chat also stops at
    ``<|im_end|>``, which generation configs list beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    decoder = tokenizer.get_added_tokens_decoder()
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(number): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for number, token in sorted(decoder.items())
        },
        "additional_special_tokens": [TURN_START, TURN_END],
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHATML_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "errors": "replace",
        "model_max_length": 32_768,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)
