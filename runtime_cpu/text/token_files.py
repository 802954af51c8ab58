"""Token ids from a file, for the commands that compute on given text: ``read_tokens(path, engine.tokenizer)``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime_cpu.text.tokenizer import Tokenizer


def read_tokens(path: Path, tokenizer: Tokenizer) -> NDArray[np.integer]:
    """Token ids [T] of a file: ``.npy``; ``.ds`` (little-endian, 2 bytes per id while the vocabulary fits); or text.

    Raises:
        ValueError: the file is not what its name says.
    """
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"{path.name} holds {array.dtype} of shape {array.shape}; it should be a list of ids"
            )
        ids: NDArray[np.integer] = array
    elif path.suffix == ".ds":
        kind = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        if path.stat().st_size % kind.itemsize:
            raise ValueError(f"{path.name} is cut: {path.stat().st_size} bytes are no whole number of tokens")
        ids = np.fromfile(path, kind)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name} is neither .npy, .ds nor UTF-8 text: {error}") from error
        ids = np.array(tokenizer.encode(text), np.int64)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise ValueError(f"{path.name} holds ids outside the model's vocabulary of {tokenizer.vocab_size}")
    return ids
