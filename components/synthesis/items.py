"""What is asked, item by item: ``await item.run(client, tools)`` returns what it made or raises ``Rejected``.

Every item is a short dialogue with the teacher and checks of its own; what concerns several items (near-duplicates,
overlap with evaluation sets) happens in ``stage.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from components.synthesis import prompts
from components.synthesis.config import SynthesizeConfig
from components.synthesis.filters.answers import AnswerFilter, Language
from components.synthesis.filters.consistency import compare, equations, relations, same_problem
from components.synthesis.personas import read_persona
from components.synthesis.prompts import Message, Pair
from components.synthesis.teacher.client import Client, Rejected
from components.synthesis.teacher.ledger import Answer
from components.synthesis.texts import (
    clean,
    content_words,
    first_sentence,
    ngrams,
    numbers,
    whole_sentences,
    words,
)

Document = dict[str, Any]


@dataclass(frozen=True)
class Tools:
    """What items check with."""

    config: SynthesizeConfig
    answers: AnswerFilter
    teacher: str


@dataclass(frozen=True)
class Made:
    """What an item made.

    Attributes:
        text: what near-duplicates and overlap are judged by.
        generated_question: the generated problem inside, word for word. Evaluation shares the generator's templates
            on purpose, with other numbers, so only the whole problem is compared with its items, not n-grams.
        document: a document in datatrove's schema, or
        messages: an SFT dialogue.
    """

    text: str
    document: Document | None = None
    messages: list[Message] | None = None
    generated_question: str | None = None


class Item(Protocol):
    """One unit of work: a kind that is counted, an id that is stable, and a dialogue."""

    kind: ClassVar[str]

    @property
    def id(self) -> str:
        """Identity; keys of the ledger begin with it."""
        ...

    async def run(self, client: Client, tools: Tools) -> Made:
        """Ask, check, and return what was made.

        Raises:
            Rejected: nothing was.
        """
        ...


@dataclass(frozen=True)
class Rewrite:
    """MGA: a document's beginning once more, for a genre and an audience."""

    kind: ClassVar[str] = "mga"
    source: Document
    text: str
    pair: Pair

    @property
    def id(self) -> str:
        """See :class:`Item`."""
        return f"mga/{self.source['id']}"

    async def run(self, client: Client, tools: Tools) -> Made:
        """See :class:`Item`."""
        mga, filters = tools.config.mga, tools.config.filters
        category = str(self.source["metadata"]["category"])
        language: Language = "zh" if category == "chinese" else "en"
        answer = await client.ask(
            f"{self.id}#rewrite",
            prompts.rewrite(self.text, self.pair, brief=mga.prompt == "brief"),
            max_tokens=mga.max_tokens,
            temperature=mga.temperature,
        )
        text = _finished(answer)
        most = int(filters.max_growth * len(words(self.text)))
        reason = tools.answers.problem(
            text, least_words=filters.min_words, most_words=most, language=language
        )
        if reason is None and repeats_prompt(text, self.text, self.pair):
            reason = "prompt_leak"
        comparison = compare(self.text, text)
        reason = reason or comparison.problem(filters)
        if reason is not None:
            raise Rejected(reason, text or answer.text)
        if mga.judge_minimum is not None:
            await self._judge(client, tools, text, mga.judge_minimum)
        parent = self.source["metadata"]
        metadata = {
            "category": category,
            "source": "mga",
            "synthetic": True,
            "teacher": tools.teacher,
            "prompt": "mga",
            "genre": self.pair.genre,
            "audience": self.pair.audience,
            "parent": self.source["id"],
            "parent_source": parent.get("source"),
            "shared": round(comparison.shared, 3),
            "grounded": round(comparison.grounded, 3),
        }
        if "quality" in parent:
            metadata["quality"] = parent["quality"]
        return Made(text, document={"text": text, "id": self.id, "metadata": metadata})

    async def _judge(self, client: Client, tools: Tools, text: str, minimum: int) -> None:
        schema = prompts.JUDGE_SCHEMA if tools.config.teacher.structured_output else None
        answer = await client.ask(
            f"{self.id}#judge", prompts.judge(self.text, text), max_tokens=24, temperature=0.0, schema=schema
        )
        score = prompts.read_score(answer.text)
        if score is None:
            raise Rejected("judge_unclear", answer.text)
        if score < minimum:
            raise Rejected("judge_low", text)


@dataclass(frozen=True)
class Problem:
    """A generated maths problem with a known answer, put into a persona's world."""

    kind: ClassVar[str] = "persona_problem"
    number: int
    question: str
    solution: str
    answer: str
    persona: str

    @property
    def id(self) -> str:
        """See :class:`Item`."""
        return f"problem/{self.number}"

    async def run(self, client: Client, tools: Tools) -> Made:
        """See :class:`Item`."""
        if tools.config.personas.problem_form == "frame":
            return await self._frame(client, tools)
        return await self._retell(client, tools)

    async def _frame(self, client: Client, tools: Tools) -> Made:
        personas = tools.config.personas
        answer = await client.ask(
            f"{self.id}#frame",
            prompts.frame(self.persona),
            max_tokens=personas.short_max_tokens,
            temperature=personas.temperature,
        )
        sentence = first_sentence(clean(answer.text))
        reason = tools.answers.problem(sentence, least_words=6, most_words=50)
        if reason is None and (numbers(sentence) or relations(sentence)):
            reason = "numbers_changed"
        if reason is None and "?" in sentence:
            reason = "a_question"
        if reason is not None:
            raise Rejected(reason, sentence or answer.text)
        question = f"{sentence} {self.question}"
        return Made(question, messages=_dialogue(question, self.solution), generated_question=self.question)

    async def _retell(self, client: Client, tools: Tools) -> Made:
        answer = await client.ask(
            f"{self.id}#retell",
            prompts.retell(self.question, self.persona),
            max_tokens=max(tools.config.personas.short_max_tokens, 2 * len(self.question) // 3),
            temperature=tools.config.personas.temperature,
        )
        if answer.finish == "length":
            raise Rejected("cut_off", answer.text)
        retold = clean(answer.text)
        reason = tools.answers.problem(retold, least_words=10, most_words=4 * len(words(self.question)))
        reason = reason or same_problem(self.question, retold)
        if reason is None and compare(self.question, retold).copied > 0.9:
            reason = "copied"
        if reason is not None:
            raise Rejected(reason, retold or answer.text)
        solution = "\n".join([*equations(self.solution), f"#### {self.answer}"])
        return Made(retold, messages=_dialogue(retold, solution), generated_question=self.question)


@dataclass(frozen=True)
class Question:
    """A persona's question, answered by the teacher. Without a persona, one is read from ``text`` first."""

    kind: ClassVar[str] = "persona_question"
    number: int
    persona: str

    @property
    def id(self) -> str:
        """See :class:`Item`."""
        return f"question/{self.number}"

    async def run(self, client: Client, tools: Tools) -> Made:
        """See :class:`Item`."""
        return await _question_and_answer(self.id, self.persona, client, tools)


@dataclass(frozen=True)
class DocumentPersona:
    """Text-to-persona: who would read or write this document, and what would that person ask?"""

    kind: ClassVar[str] = "document_persona"
    source: Document
    text: str

    @property
    def id(self) -> str:
        """See :class:`Item`."""
        return f"persona/{self.source['id']}"

    async def run(self, client: Client, tools: Tools) -> Made:
        """See :class:`Item`."""
        personas = tools.config.personas
        answer = await client.ask(
            f"{self.id}#persona",
            prompts.persona_of(self.text),
            max_tokens=personas.short_max_tokens,
            temperature=personas.temperature,
        )
        persona = read_persona(clean(answer.text))
        if persona is None:
            raise Rejected("no_persona", answer.text)
        reason = tools.answers.problem(persona, least_words=5)
        if reason is not None:
            raise Rejected(f"persona_{reason}", answer.text)
        return await _question_and_answer(self.id, persona, client, tools)


async def _question_and_answer(key: str, persona: str, client: Client, tools: Tools) -> Made:
    personas, filters = tools.config.personas, tools.config.filters
    asked = await client.ask(
        f"{key}#question",
        prompts.ask_as(persona),
        max_tokens=personas.short_max_tokens,
        temperature=personas.temperature,
    )
    question = _first_question(clean(asked.text))
    reason = tools.answers.problem(question, least_words=5, most_words=60)
    if reason is not None:
        raise Rejected("no_question" if reason == "empty" else f"question_{reason}", asked.text)
    answered = await client.ask(
        f"{key}#answer",
        prompts.answer_to(question),
        max_tokens=personas.answer_max_tokens,
        temperature=personas.temperature,
    )
    text = _finished(answered)
    reason = tools.answers.problem(text, least_words=filters.min_words)
    if reason is None and not _on_topic(question, text):
        reason = "off_topic"
    if reason is not None:
        raise Rejected(reason, text or answered.text)
    return Made(f"{question}\n\n{text}", messages=_dialogue(question, text))


def repeats_prompt(text: str, source: str, pair: Pair) -> bool:
    """Whether a rewrite holds five words in a row of its genre's or audience's description, not of its source."""
    described = ngrams(pair.genre_text, _PROMPT_NGRAM) | ngrams(pair.audience_text, _PROMPT_NGRAM)
    return bool((ngrams(text, _PROMPT_NGRAM) & described) - ngrams(source, _PROMPT_NGRAM))


_PROMPT_NGRAM = 5
_ANNOUNCED = re.compile(
    r"""^(?:\d+[.)]\s*|[-*]\s*)?(?:[^?\n"“]{0,80}?\b(?:ask|asks|question(?: is)?)\b\s*[:,]\s*)?["“'‘]*"""
)


def _first_question(text: str) -> str:
    """The first line's first question, without what announces it; empty when there is none."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    head, mark, _ = line.partition("?")
    question = _ANNOUNCED.sub("", head, count=1)
    return question[:1].upper() + question[1:] + mark if mark else ""


def _on_topic(question: str, answer: str) -> bool:
    asked = content_words(question)
    return not asked or bool(asked & content_words(answer))


def _finished(answer: Answer) -> str:
    """The cleaned answer; one that hit the token limit loses its last, broken sentence."""
    text = clean(answer.text)
    return whole_sentences(text) if answer.finish == "length" else text


def _dialogue(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
