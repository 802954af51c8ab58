"""Near-duplicates among accepted texts: ``NearDuplicates(0.7).add(text)`` says whether it is new.

MinHash over word 5-grams (Broder 1997) with 64 permutations, 16 bands of 4 rows: pairs of Jaccard similarity 0.7
collide in a band with probability 0.99, of 0.3 with 0.12, and the signatures then decide.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

from components.synthesis.texts import ngrams

_PERMUTATIONS: Final = 64
_ROWS: Final = 4
_GRAM: Final = 5
_PRIME: Final = np.uint64((1 << 31) - 1)  # products of two 31-bit numbers fit 64 bits
_random = np.random.default_rng(2502_04235)
_FACTORS: Final = _random.integers(1, int(_PRIME), _PERMUTATIONS, dtype=np.uint64)
_OFFSETS: Final = _random.integers(0, int(_PRIME), _PERMUTATIONS, dtype=np.uint64)


def signature(text: str) -> npt.NDArray[np.uint64]:
    """MinHash signature [64] of a text's word 5-grams."""
    hashes = [
        int.from_bytes(hashlib.blake2b(" ".join(gram).encode(), digest_size=8).digest(), "big") % int(_PRIME)
        for gram in ngrams(text, _GRAM)
    ] or [0]
    grams = np.array(hashes, dtype=np.uint64)
    mixed = (grams[:, None] * _FACTORS[None, :] + _OFFSETS[None, :]) % _PRIME
    return np.asarray(mixed.min(axis=0), dtype=np.uint64)


class NearDuplicates:
    """Texts seen so far, by bands of their signatures."""

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._signatures: list[npt.NDArray[np.uint64]] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def add(self, text: str) -> bool:
        """Remember ``text``; ``False``, and nothing remembered, when one very like it was there."""
        new = signature(text)
        keys = [(band, new[band : band + _ROWS].tobytes()) for band in range(0, _PERMUTATIONS, _ROWS)]
        candidates = {number for key in keys for number in self._bands.get(key, ())}
        if any(np.mean(self._signatures[number] == new) >= self._threshold for number in candidates):
            return False
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(new)
        return True
