"""What the teacher is asked: ``rewrite(text, pair)``, ``persona_of(text)``, ``retell(problem, persona)``, ….

The methods are MGA (arXiv:2502.04235) and Persona Hub (arXiv:2406.20094); the sentences are our own.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

Message = dict[str, str]

_POOLS: Final = Path(__file__).with_name("pools.toml")
EDITOR: Final = "You are a careful editor. You keep to the facts of the text you are given and add none."
TUTOR: Final = "You are a helpful and precise assistant."


@dataclass(frozen=True)
class Pair:
    """A genre and an audience, by name, with their descriptions."""

    genre: str
    audience: str
    genre_text: str
    audience_text: str

    @property
    def titles(self) -> tuple[str, str]:
        """Both descriptions' first sentences, as parts of a sentence: ``("a letter to a friend", "farmers who …")``."""
        genre, audience = (text.split(".", 1)[0] for text in (self.genre_text, self.audience_text))
        return genre[0].lower() + genre[1:], audience[0].lower() + audience[1:]


@lru_cache(maxsize=1)
def pairs() -> tuple[Pair, ...]:
    """Every genre with every audience of ``pools.toml``, in the file's order."""
    pools = tomllib.loads(_POOLS.read_text(encoding="utf-8"))
    return tuple(
        Pair(genre, audience, genre_text, audience_text)
        for genre, genre_text in pools["genres"].items()
        for audience, audience_text in pools["audiences"].items()
    )


def rewrite(text: str, pair: Pair, *, brief: bool = False) -> list[Message]:
    """MGA, stage 2: the document once more, for a genre and an audience.

    Args:
        brief: name genre and audience only; a small teacher repeats longer descriptions instead of following them.
    """
    if brief:
        genre, audience = pair.titles
        return _chat(
            EDITOR,
            f"Rewrite the following text as {genre}, for {audience}. Keep its names, numbers and facts.\n\n{text}",
        )
    return _chat(
        EDITOR,
        f"Rewrite the text below.\n\nForm: {pair.genre_text}\nReaders: {pair.audience_text}\n"
        "Keep its names, numbers and facts, leave out what the readers do not need, add nothing, and write in the "
        f"language of the text. Answer with the new text only.\n\nText:\n{text}",
    )


def judge(text: str, rewritten: str) -> list[Message]:
    """MGA's limited consistency, 1 to 5: omissions and style are free, lost or invented facts are not."""
    return _chat(
        EDITOR,
        "Compare a text with a rewrite of it. The rewrite may leave things out and change style and order. Score 5 if "
        "everything it states follows from the text, 3 if it is recognisably about the same facts with small "
        "additions, 1 if it shares no fact with the text or cannot be recognised; 4 and 2 lie between.\n\n"
        f'Text:\n{text}\n\nRewrite:\n{rewritten}\n\nAnswer with JSON such as {{"score": 3}}.',
    )


JUDGE_SCHEMA: Final[dict[str, Any]] = {
    "type": "json_schema",
    "json_schema": {
        "name": "judgement",
        "schema": {
            "type": "object",
            "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}},
            "required": ["score"],
            "additionalProperties": False,
        },
    },
}


def read_score(answer: str) -> int | None:
    """The judge's score, or ``None`` when the answer holds none between 1 and 5."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        score = json.loads(answer[start : end + 1])["score"]
    except (ValueError, KeyError, TypeError):
        return None
    return score if isinstance(score, int) and not isinstance(score, bool) and 1 <= score <= 5 else None


def persona_of(text: str) -> list[Message]:
    """Persona Hub's text-to-persona: who would read, write or like this text?"""
    return _chat(
        TUTOR,
        "Who is likely to read or write the text below? Describe one such person in one sentence of ten to twenty-five "
        f'words, with a profession or role and an interest. Begin with "A" or "An".\n\nText:\n{text}',
    )


def retell(problem: str, persona: str) -> list[Message]:
    """A maths problem in a persona's world; its numbers, and so its answer, must survive."""
    return _chat(
        EDITOR,
        f"Retell the maths problem below so that it happens to this person: {persona}\nKeep every number and every "
        "relation between the numbers exactly as they are, and end with the same question. Answer with the problem "
        f"only, without solving it.\n\nProblem:\n{problem}",
    )


def frame(persona: str) -> list[Message]:
    """A sentence about a persona, to stand before a maths problem that stays word for word."""
    return _chat(
        TUTOR,
        f"Here is a person: {persona}\nWrite one sentence about what this person is doing today. Use no numbers and "
        "ask nothing. Answer with the sentence only.",
    )


def ask_as(persona: str) -> list[Message]:
    """A question that a persona would ask."""
    return _chat(
        TUTOR,
        f"Here is a person: {persona}\nWrite one question that this person would ask an assistant, about knowledge "
        "that the person needs. Answer with the question only, in one sentence that ends with a question mark.",
    )


def answer_to(question: str) -> list[Message]:
    """The question itself, answered in a few sentences."""
    return _chat(TUTOR, f"{question}\n\nAnswer in three to five sentences.")


def _chat(system: str, user: str) -> list[Message]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
