"""How many bytes of text tokens stand for: ``count_bytes(shard, token_bytes(tokenizer, vocab_size))``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from components.corpus.shards import Shard

Int64s = npt.NDArray[np.int64]


def token_bytes(tokenizer: Tokenizer, size: int) -> Int64s:
    """UTF-8 bytes that each token of a byte-level BPE stands for; special tokens stand for none. ``[V]``"""
    lengths = np.zeros(size, dtype=np.int64)
    for text, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number < size:
            lengths[number] = len(text)  # the byte-level alphabet writes one character per byte
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if number < size:
            lengths[number] = 0 if token.special else len(token.content.encode())
    return lengths


def count_bytes(shard: Shard, lengths_V: Int64s, count: int | None = None) -> int:
    """Bytes that the shard's first ``count`` tokens, or all, stand for by ``lengths_V``.

    Of all tokens the artefact's index knows it, unless it is from before it did: then they are read, block by block.
    """
    if (count is None or count == len(shard)) and shard.token_bytes is not None:
        return shard.token_bytes
    return sum(int(lengths_V[tokens].sum()) for tokens in shard.blocks(count))
