"""Every answer of a teacher, kept as it arrives: ``Ledger(path).get(key, digest)``; survives ``kill -9``."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from components.artifacts import canonical_json


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    Attributes:
        text: the answer; for a failure, the reason.
        finish: ``stop``, ``length``, or ``failed``.
        prompt_tokens: as the server counted.
        completion_tokens: as the server counted.
    """

    text: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def failed(self) -> bool:
        """Whether there is no answer."""
        return self.finish == "failed"


def digest_of(payload: Mapping[str, Any]) -> str:
    """Identity of a request: SHA-256 of its canonical JSON, 32 hex digits."""
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()[:32]


class Ledger:
    """A sqlite file of answers by key (item and step); an answer counts only for the very same request."""

    def __init__(self, path: Path):
        self._database = sqlite3.connect(path, isolation_level=None)
        # WAL: a killed process leaves whole answers; only a power cut could take the last ones, which are asked again.
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, digest TEXT NOT NULL, text TEXT NOT NULL, "
            "finish TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)"
        )
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value REAL NOT NULL)"
        )

    def get(self, key: str, digest: str) -> Answer | None:
        """The answer kept for this key and request, if any."""
        row = self._database.execute(
            "SELECT text, finish, prompt_tokens, completion_tokens FROM answers WHERE key = ? AND digest = ?",
            (key, digest),
        ).fetchone()
        return Answer(*row) if row else None

    def put(self, key: str, digest: str, answer: Answer) -> None:
        """Keep an answer, durable against the death of this process when it returns."""
        self._database.execute(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            (key, digest, answer.text, answer.finish, answer.prompt_tokens, answer.completion_tokens),
        )

    def totals(self) -> dict[str, int]:
        """Requests, failures and tokens of everything kept."""
        row = self._database.execute(
            "SELECT COUNT(*), COALESCE(SUM(finish = 'failed'), 0), COALESCE(SUM(prompt_tokens), 0), "
            "COALESCE(SUM(completion_tokens), 0) FROM answers"
        ).fetchone()
        names = ("requests", "failed", "prompt_tokens", "completion_tokens")
        return dict(zip(names, map(int, row), strict=True))

    def last_failure(self) -> str:
        """The reason of the newest failure, empty when there is none."""
        row = self._database.execute(
            "SELECT text FROM answers WHERE finish = 'failed' ORDER BY rowid DESC LIMIT 1"
        ).fetchone()
        return str(row[0]) if row else ""

    def add_fact(self, name: str, value: float) -> None:
        """Add to a number that outlives this process, such as the seconds spent asking."""
        self._database.execute(
            "INSERT INTO facts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            (name, value),
        )

    def fact(self, name: str) -> float:
        """A number kept by :meth:`add_fact`, 0 when there is none."""
        row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return float(row[0]) if row else 0.0

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
