"""A byte-level BPE tokenizer of any size, made here: ``synthetic_vocabulary(151936)`` is GGUF metadata.

Real vocabularies come with licences and downloads; speed needs only their size. Bytes, groups of letters, special
tokens at the released ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from runtime_cpu._core import TokenType, byte_alphabet
from runtime_cpu.files.gguf_writer import Value
from runtime_cpu.synth.shapes import SynthError
from runtime_cpu.text.chat_template import CHATML_TEMPLATE

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_UNUSED_IDS = 290  # 151646 to 151935, as in the released vocabulary


def synthetic_vocabulary(vocab: int) -> dict[str, Value]:
    """GGUF metadata of a byte-level BPE tokenizer with ``vocab`` ids: bytes, letter groups, special tokens.

    Raises:
        SynthError: fewer ids than bytes and special tokens.
    """
    unused = _UNUSED_IDS if vocab > 100_000 else 5
    wanted = vocab - 256 - len(_SPECIAL) - unused
    if wanted < 0:
        raise SynthError(f"the vocabulary has {vocab} ids; at least {vocab - wanted} are needed")
    merges = list(itertools.islice(_merges(), wanted))
    if len(merges) < wanted:
        raise SynthError(
            f"the vocabulary has {vocab} ids; at most {vocab - wanted + len(merges)} can be made"
        )
    tokens = [*byte_alphabet(), *(left + right for left, right in merges), *_SPECIAL]
    first_special = len(tokens) - len(_SPECIAL)
    types = [TokenType.NORMAL] * first_special + [TokenType.CONTROL] * len(_SPECIAL)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab)]
    types += [TokenType.UNUSED] * unused
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": first_special,
        "tokenizer.ggml.padding_token_id": first_special,
        "tokenizer.ggml.eos_token_id": first_special + 2,
        "tokenizer.ggml.eot_token_id": first_special + 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML_TEMPLATE,
    }


def _merges() -> Iterator[tuple[str, str]]:
    """Merges in order of rank; each makes a new token of two that exist."""
    letters, space = "abcdefghijklmnopqrstuvwxyz", byte_alphabet()[ord(" ")]
    pairs = [a + b for a in letters for b in letters]
    yield from ((a, b) for a in letters for b in letters)
    yield from ((space, pair) for pair in pairs)
    yield from ((pair, letter) for pair in pairs for letter in letters)
    yield from ((space, pair + letter) for pair in pairs for letter in letters)
    total = len(pairs) ** 2
    for index in range(total):
        left, right = divmod(index * 100_003 % total, len(pairs))  # coprime: every pair of pairs once
        yield pairs[left], pairs[right]
