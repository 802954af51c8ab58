"""Choices that depend on a document's id alone: ``held_out = hash_fraction(document_id) < 0.01``."""

from __future__ import annotations

import hashlib


def hash_fraction(identifier: str) -> float:
    """SHA-256 of an id as a fraction in [0, 1): a split by it depends neither on order nor on other documents."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big") / 2**64
