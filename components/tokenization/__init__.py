"""The ``tokenize`` stage: tokenizer and token shards. ``components.corpus.shards`` reads them."""

from __future__ import annotations

from components.artifacts import StageContext
from components.tokenization.config import TokenizeConfig

VERSION = 1

__all__ = ["VERSION", "TokenizeConfig", "run"]


def run(context: StageContext) -> dict[str, float]:
    """Run the stage; see :func:`components.tokenization.stage.run`."""
    from components.tokenization.stage import run as run_stage  # here: datatrove is slow to import

    return run_stage(context)
