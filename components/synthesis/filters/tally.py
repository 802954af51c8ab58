"""What became of every item, counted by reason with examples: ``Tally().count("mga", "repetition", text)``."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

EXAMPLES_PER_REASON = 3
EXAMPLE_CHARS = 280


class Tally:
    """Counts per kind; ``planned = accepted + sum of the rejected`` holds by construction."""

    def __init__(self) -> None:
        self._accepted: Counter[str] = Counter()
        self._rejected: dict[str, Counter[str]] = defaultdict(Counter)
        self._examples: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def count(self, kind: str, reason: str | None, example: str = "") -> None:
        """Count one item of ``kind``: accepted when ``reason`` is ``None``; the first examples are kept."""
        if reason is None:
            self._accepted[kind] += 1
        else:
            self._rejected[kind][reason] += 1
        shown = self._examples[kind][reason or "accepted"]
        if example and len(shown) < EXAMPLES_PER_REASON:
            shown.append(example[:EXAMPLE_CHARS] + ("…" if len(example) > EXAMPLE_CHARS else ""))

    def accepted(self, kind: str | None = None) -> int:
        """Accepted items of a kind, or of all."""
        return self._accepted.total() if kind is None else self._accepted[kind]

    def rejected(self, reason: str | None = None) -> int:
        """Rejected items, or those with one reason."""
        return sum(c.total() if reason is None else c[reason] for c in self._rejected.values())

    def as_json(self) -> dict[str, Any]:
        """Per kind: ``planned``, ``accepted``, ``rejected`` by reason, ``examples`` by reason."""
        kinds = sorted({*self._accepted, *self._rejected})
        return {
            kind: {
                "planned": self._accepted[kind] + self._rejected[kind].total(),
                "accepted": self._accepted[kind],
                "rejected": dict(sorted(self._rejected[kind].items())),
                "examples": {
                    reason: list(texts) for reason, texts in sorted(self._examples[kind].items()) if texts
                },
            }
            for kind in kinds
        }
