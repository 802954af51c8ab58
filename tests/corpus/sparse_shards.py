"""Token shards of any size that take no room: ``write_sparse(folder, {"train": {"general": (4, 2**30, 2**20)}})``.

Files are holes but for every file's first and last document end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = 256
TOKEN_BYTES = 4


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 bytes and ``<|endoftext|>``, in Hugging Face's layout."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_sparse(
    folder: Path, sizes: dict[str, dict[str, tuple[int, int, int]]], token_bytes: bool = True
) -> Path:
    """An artefact of stage ``tokenize`` of 32-bit tokens.

    Args:
        folder: where to.
        sizes: files, tokens of each and documents of each, by split and category.
        token_bytes: whether the index says what held-out tokens stand for.
    """
    byte_tokenizer(folder / "tokenizer")
    splits: dict[str, Any] = {}
    for split, categories in sizes.items():
        splits[split] = {}
        for category, (files, tokens, documents) in categories.items():
            names = [f"shards/{split}/{category}/{number:05}.ds" for number in range(files)]
            for name in names:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    file.truncate(tokens * TOKEN_BYTES)
                with path.with_name(f"{path.name}.index").open("wb") as ends:
                    ends.write(np.array([tokens - documents + 1], "<u8").tobytes())
                    ends.seek((documents - 1) * 8)
                    ends.write(np.array([tokens], "<u8").tobytes())
            entry = {
                "tokens": files * tokens,
                "documents": files * documents,
                "bytes": files * tokens,
                "files": names,
            }
            if split == "heldout" and token_bytes:
                entry["token_bytes"] = files * tokens
            splits[split][category] = entry
    index = {"dtype": "uint32", "vocab_size": EOS + 1, "eos_id": EOS, "splits": splits}
    (folder / "index.json").write_text(json.dumps(index))
    return folder
