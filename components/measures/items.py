"""Items of an evaluation set: ``rows_of(path, "dev")``. Sweeps read ``dev`` only; ``test`` is for the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from components.artifacts import StageError

Split = Literal["dev", "test"]


def rows_of(path: Path, split: Split | None = None) -> list[dict[str, Any]]:
    """Read an evaluation set; all its rows, or those of one split.

    Raises:
        StageError: the file is missing or a line is not a row of the contract.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError as error:
        raise StageError(f"the evaluation set {path} is missing; run the stage evalsets") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise StageError(f"{path.name} line {number} is not JSON: {error}") from error
        problem = _problem(row)
        if problem:
            raise StageError(f"{path.name} line {number}: {problem}")
        if split is None or row["split"] == split:
            rows.append(row)
    return rows


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "a row is an object with id, question, answer and split"
    for field in ("id", "question"):
        if not isinstance(row.get(field), str) or not row[field]:
            return f"{field!r} must be a non-empty string"
    if row.get("split") not in ("dev", "test"):
        return f"'split' is {row.get('split')!r}; allowed are 'dev' and 'test'"
    answer = row.get("answer")
    if "choices" not in row:
        return None if isinstance(answer, str) and answer else "'answer' must be a non-empty string"
    choices = row["choices"]
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c for c in choices)
    ):
        return "'choices' must be two or more non-empty strings"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f"'answer' is {answer!r}; allowed are 0 to {len(choices) - 1}"
    return None
