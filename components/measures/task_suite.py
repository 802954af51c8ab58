"""Scores of the templated tasks on development items: ``TaskSuite.open(evalsets, names, items).score(model, encoder)``.

Only rows with ``"split": "dev"`` are read: SFT is judged and merging coefficients are chosen on them, and the ``test``
rows stay unseen until the final evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import StageError
from components.corpus.dialogues import DialogueEncoder
from components.measures.inference import greedy_tokens, option_scores
from components.measures.intervals import Score, paired_interval
from components.measures.items import rows_of
from model import SmallThinkerForCausalLM

_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task.

    Attributes:
        right: per item, whether the answer was right.
        answer_nats: mean over items of the right answer's negative log-likelihood; smoother than the share.
        chance: share that guessing would get right; 0 for generated answers.
    """

    right: tuple[bool, ...]
    answer_nats: float
    chance: float

    @property
    def score(self) -> Score:
        """Share of right answers with its 95 % Wilson interval."""
        return Score.of(sum(self.right), len(self.right))

    def to_json(self) -> dict[str, float | int]:
        """Plain JSON values."""
        score = self.score
        return {
            "score": score.value,
            "n": score.n,
            "ci_low": score.ci_low,
            "ci_high": score.ci_high,
            "chance": self.chance,
            "answer_nats": self.answer_nats,
        }


@dataclass(frozen=True)
class Gain:
    """Difference of two scores on the same items, with a 95 % interval of the paired difference."""

    value: float
    ci_low: float
    ci_high: float

    @classmethod
    def between(cls, before: TaskScore, after: TaskScore) -> Gain:
        """Gain of ``after`` over ``before``; both must have answered the same items."""
        differences = [float(b) - float(a) for a, b in zip(before.right, after.right, strict=True)]
        return cls(*paired_interval(differences))

    def to_json(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"value": self.value, "ci_low": self.ci_low, "ci_high": self.ci_high}


class TaskSuite:
    """Development items of some templated tasks.

    Args:
        rows: per task its items, all multiple choice or all generated.
    """

    def __init__(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.rows = {name: list(items) for name, items in rows.items()}

    @classmethod
    def open(cls, folder: Path, names: Sequence[str], items: int) -> TaskSuite:
        """Read up to ``items`` development items of each task.

        Raises:
            StageError: a task is not among the evaluation sets, or has no development items.
        """
        try:
            index = json.loads((folder / "index.json").read_text())
        except FileNotFoundError as error:
            raise StageError(f"{folder / 'index.json'} is missing; the stage evalsets writes it.") from error
        rows = {}
        for name in names:
            if name not in index:
                raise StageError(
                    f"there is no evaluation set {name!r}; there are {', '.join(sorted(index))}."
                )
            rows[name] = rows_of(folder / f"{name}.jsonl", "dev")[:items]
            if not rows[name]:
                raise StageError(
                    f"the evaluation set {name} has no items with split 'dev'; at least one is needed."
                )
        return cls(rows)

    def score(self, model: SmallThinkerForCausalLM, encoder: DialogueEncoder) -> dict[str, TaskScore]:
        """Score a model on every task.

        Multiple choice: the choice of highest log-likelihood after the chat prompt must be the right one; this
        asks nothing of the model's format and so is fair to a base model. Generated answers: greedy decoding after
        the chat prompt must give exactly the answer, spaces aside; of a reply that runs on only the first line
        counts, again for the base model's sake.
        """
        was_training = model.training
        model.train(False)
        try:
            return {name: self._score(model, encoder, rows) for name, rows in self.rows.items()}
        finally:
            model.train(was_training)

    @staticmethod
    def _score(
        model: SmallThinkerForCausalLM, encoder: DialogueEncoder, rows: Sequence[Mapping[str, Any]]
    ) -> TaskScore:
        prompts = [encoder.encode_prompt([{"role": "user", "content": row["question"]}]) for row in rows]
        if "choices" in rows[0]:
            options = [[encoder.encode_answer(choice)[:-1] for choice in row["choices"]] for row in rows]
            scores = [
                [option.logprob for option in found] for found in option_scores(model, prompts, options)
            ]
            right = [
                max(range(len(found)), key=found.__getitem__) == row["answer"]
                for found, row in zip(scores, rows, strict=True)
            ]
            nats = [-found[row["answer"]] for found, row in zip(scores, rows, strict=True)]
            chance = math.fsum(1.0 / len(row["choices"]) for row in rows) / len(rows)
        else:
            answers = [[encoder.encode_answer(row["answer"])] for row in rows]
            nats = [-found[0].logprob for found in option_scores(model, prompts, answers)]
            replies = greedy_tokens(model, prompts, _ANSWER_TOKENS, encoder.stop_ids, batch_size=256)
            right = [
                encoder.decode(reply).strip().split("\n")[0].strip() == row["answer"].strip()
                for reply, row in zip(replies, rows, strict=True)
            ]
            chance = 0.0
        return TaskScore(tuple(right), math.fsum(nats) / len(nats), chance)
