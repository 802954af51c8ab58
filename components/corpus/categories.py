"""Kinds of text in their one order, that of mixtures, shards, tables and pictures."""

from __future__ import annotations

from typing import Literal

Category = Literal["general", "maths", "code", "web_stem", "chinese"]
"""What curated documents are."""
TEXT_CATEGORIES: tuple[Category, ...] = ("general", "maths", "code", "web_stem", "chinese")
CATEGORIES: tuple[str, ...] = (*TEXT_CATEGORIES, "sft")
"""Those, and dialogues."""
