"""Light scores for model selection: ``score_topic(model, tokenizer, rows)``; ``evaluate`` uses lm-eval itself.

Sweeps may use rows with ``"split": "dev"`` only (``rows_of(path, "dev")``): ``test`` is for the final evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from components.artifacts import StageError
from components.measures.inference import ChatTokenizer, option_scores
from components.measures.intervals import Score
from model import SmallThinkerForCausalLM

Row = Mapping[str, Any]
Split = Literal["dev", "test"]
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


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


def chat_prompt(tokenizer: ChatTokenizer, question: str) -> list[int]:
    """Token ids of one user turn, up to where the assistant's answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


def end_ids(tokenizer: ChatTokenizer) -> list[int]:
    """Ids at which an answer ends."""
    ids = {tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS} | {tokenizer.eos_token_id}
    return sorted(index for index in ids if index is not None and index >= 0)


def score_topic(
    model: SmallThinkerForCausalLM, tokenizer: ChatTokenizer, rows: Sequence[Row], batch_size: int = 128
) -> Score:
    """Share of rows whose right choice has the highest log-likelihood after the chat prompt.

    Works for any multiple-choice rows; ``batch_size`` counts sequences, so rows x choices.
    """
    contexts = [chat_prompt(tokenizer, row["question"]) for row in rows]
    encoded: dict[str, list[int]] = {}
    for row in rows:
        for choice in row["choices"]:
            if choice not in encoded:
                encoded[choice] = tokenizer.encode(choice, add_special_tokens=False)
    options = [[encoded[choice] for choice in row["choices"]] for row in rows]
    was_training = model.training
    model.train(False)
    try:
        scores = option_scores(model, contexts, options, batch_size)
    finally:
        model.train(was_training)
    right = 0
    for row, choices in zip(rows, scores, strict=True):
        best = max(range(len(choices)), key=lambda index: choices[index].logprob)
        right += best == row["answer"]
    return Score.of(right, len(rows))
