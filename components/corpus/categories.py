"""Kinds of text in their one order, that of mixtures, shards, tables and pictures."""

from __future__ import annotations

from typing import Literal

Category = Literal["general", "maths", "code", "web_stem", "chinese"]
"""The kinds of curated documents."""
TEXT_CATEGORIES: tuple[Category, ...] = ("general", "maths", "code", "web_stem", "chinese")
CATEGORIES: tuple[str, ...] = (*TEXT_CATEGORIES, "sft")
"""The kinds of curated documents, and dialogues."""
