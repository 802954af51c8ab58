"""The ``tokenize`` stage: ``run(context)`` writes the tokenizer, the token shards and their index."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from datatrove.data import Document  # type: ignore[import-untyped]
from datatrove.pipeline.tokens import DocumentTokenizer  # type: ignore[import-untyped]
from datatrove.utils.logging import logger  # type: ignore[import-untyped]
from datatrove.utils.tokenization import PipelineStepWithTokenizer  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from tqdm import tqdm

from components.artifacts import StageContext, StageError, parse_config, write_json
from components.corpus.categories import CATEGORIES
from components.corpus.hashing import hash_fraction
from components.corpus.shards import HELD_OUT_SPLIT, INDEX_NAME, TOKENIZER_FOLDER, TokenShards
from components.corpus.special_tokens import END_OF_TEXT
from components.corpus.text_bytes import count_bytes, token_bytes
from components.sources import fetch
from components.tokenization.config import TokenizeConfig
from components.tokenization.texts import SPLITS, Text, TextSources
from components.tokenization.vocabulary import (
    SPECIAL_TOKENS,
    qwen_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

SHARDS_FOLDER = "shards"
_SAMPLE_CHARS = 20_000
_ROUND_TRIPS = 100
_BATCH_DOCUMENTS = 1_000
# Of one file: its document ends are held in memory while it is written and shuffled.
FILE_DOCUMENTS = 1 << 20


def run(context: StageContext) -> dict[str, float]:
    """Build the tokenizer and turn every text into token shards.

    Raises:
        StageError: a wrong config, damaged input, a tokenizer that loses text, a full disk.
    """
    config = parse_config(TokenizeConfig, context)
    logger.remove()  # datatrove logs to stderr by default
    os.environ["RAYON_NUM_THREADS"] = str(config.workers)  # threads of the tokenizers library
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if config.workers > 1 else "false"
    try:
        return _tokenize(context, config)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        free = shutil.disk_usage(context.out).free / 2**20
        raise StageError(
            f"tokenize could not write {error.filename or 'its output'} ({error.strerror}; {free:.0f} MiB free under "
            f"{context.out}): make room and run the same command again"
        ) from error


def _tokenize(context: StageContext, config: TokenizeConfig) -> dict[str, float]:
    for name in (TOKENIZER_FOLDER, SHARDS_FOLDER):  # of a killed attempt; the whole stage takes seconds
        shutil.rmtree(context.out / name, ignore_errors=True)
    (context.out / INDEX_NAME).unlink(missing_ok=True)
    sources = TextSources(context.inputs["curate"], context.inputs["synthesize"], SPECIAL_TOKENS)
    if config.tokenizer == "qwen":
        folder = fetch("dashscope", context.cache, context.note)
        tokenizer = qwen_tokenizer(folder / "dashscope/resources/qwen.tiktoken")
    else:
        tokenizer = train_tokenizer(training_sample(sources, config.training_bytes), config.vocab_size)
    save_tokenizer(tokenizer, context.out / TOKENIZER_FOLDER)
    index = _write_shards(context, config, sources, tokenizer)
    write_json(context.out / INDEX_NAME, index)
    shards = TokenShards.open(context.out)
    shards.check_ids()
    # Every later stage asks for it, and could only learn it by reading the whole split.
    lengths = token_bytes(tokenizer, config.vocab_size)
    for category, entry in index["splits"][HELD_OUT_SPLIT].items():
        entry["token_bytes"] = count_bytes(shards.shard(HELD_OUT_SPLIT, category), lengths)
    write_json(context.out / INDEX_NAME, index)
    if sources.quoting_rows:
        context.note(f"{sources.quoting_rows} chat rows quote a special token and were left out")
    return _metrics(index, tokenizer, _check_round_trip(sources, tokenizer))


def training_sample(sources: TextSources, limit_bytes: int) -> Iterator[str]:
    """About ``limit_bytes`` of training text, chosen by hash of the id and in the categories' proportions.

    Long documents give their beginning only, so that none dominates the vocabulary.
    """
    sizes = {
        category: sum(min(len(text.text), _SAMPLE_CHARS) for text in sources.texts("train", category))
        for category in CATEGORIES
    }
    kept_share = limit_bytes / max(1, sum(sizes.values()))
    for category in CATEGORIES:
        taken, limit = 0, sizes[category] * kept_share
        for text in sources.texts("train", category):
            if taken < limit and hash_fraction(text.id) < 1.2 * kept_share:
                piece = text.text[:_SAMPLE_CHARS]
                for token in SPECIAL_TOKENS:
                    piece = piece.replace(token, "\n")
                taken += len(piece)
                yield piece


class PlainDocumentTokenizer(DocumentTokenizer):  # type: ignore[misc]
    """datatrove's tokenizer step for text in which ``<|endoftext|>`` is only text, never the special token."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which encodes special tokens found in a text as ordinary characters."""
        tokenizer: Tokenizer = PipelineStepWithTokenizer.tokenizer.func(self)
        tokenizer.encode_special_tokens = True
        return tokenizer


def _write_shards(
    context: StageContext, config: TokenizeConfig, sources: TextSources, tokenizer: Tokenizer
) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    jobs = [(split, category) for split in SPLITS for category in CATEGORIES]
    for split, category in tqdm(jobs, desc="tokenize", unit="shard", file=sys.stderr, disable=None):
        folder = context.out / SHARDS_FOLDER / split / category
        counted = _Counted(sources.texts(split, category))
        step_class = DocumentTokenizer if category == "sft" else PlainDocumentTokenizer
        step = step_class(
            str(folder),
            str(context.out / TOKENIZER_FOLDER / "tokenizer.json"),
            eos_token=END_OF_TEXT,
            shuffle_documents=split == "train",
            seed=config.seed,
            batch_size=_BATCH_DOCUMENTS,
            save_final_metadata=False,  # it would hold a path of this machine
        )
        documents = iter(counted)
        for number in itertools.count():
            first = next(documents, None)
            if first is None:
                break
            part = itertools.islice(documents, FILE_DOCUMENTS - 1)
            step.run(itertools.chain([first], part), number, 1)
        files = sorted(folder.glob("*.ds"))
        itemsize = step.token_size
        splits[split][category] = {
            "tokens": sum(file.stat().st_size for file in files) // itemsize,
            "documents": counted.documents,
            "bytes": counted.bytes,
            "files": [file.relative_to(context.out).as_posix() for file in files],
        }
    if not any(entry["tokens"] for entry in splits["train"].values()):
        raise StageError(f"{context.inputs['curate']} holds no training text; rebuild the stage curate")
    small = tokenizer.get_vocab_size() <= 1 << 16
    return {
        "dtype": "uint16" if small else "uint32",
        "vocab_size": config.vocab_size,
        "eos_id": tokenizer.token_to_id(END_OF_TEXT),
        "splits": splits,
    }


class _Counted:
    """Texts as datatrove documents, counted as they pass."""

    def __init__(self, texts: Iterator[Text]):
        self.texts = texts
        self.documents = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[Document]:
        for text in self.texts:
            self.documents += 1
            self.bytes += len(text.text.encode())
            yield Document(text=text.text, id=text.id)


def _check_round_trip(sources: TextSources, tokenizer: Tokenizer) -> int:
    """Decode what was encoded for a sample of every category; NFC is the only change allowed."""
    checked = 0
    tokenizer.encode_special_tokens = True
    for category in CATEGORIES:
        for number, text in enumerate(sources.texts("train", category)):
            if number >= _ROUND_TRIPS:
                break
            ids = tokenizer.encode(text.text, add_special_tokens=False).ids
            if tokenizer.decode(ids, skip_special_tokens=False) != unicodedata.normalize("NFC", text.text):
                raise StageError(
                    f"the tokenizer does not give document {text.id} of {category} back unchanged"
                )
            checked += 1
    return checked


def _metrics(index: dict[str, Any], tokenizer: Tokenizer, round_trips: int) -> dict[str, float]:
    metrics: dict[str, float] = {
        "tokenizer_ids": tokenizer.get_vocab_size(),
        "round_trips": round_trips,
        "train_tokens": sum(entry["tokens"] for entry in index["splits"]["train"].values()),
        "heldout_tokens": sum(entry["tokens"] for entry in index["splits"]["heldout"].values()),
    }
    for category, entry in index["splits"]["train"].items():
        if entry["tokens"]:
            metrics[f"{category}_tokens"] = entry["tokens"]
            metrics[f"{category}_bytes_per_token"] = round(entry["bytes"] / entry["tokens"], 3)
    return metrics
