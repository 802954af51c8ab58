"""Personas: from a registry's collection of prompts, and how to read one from a teacher's answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from components.synthesis.texts import first_sentence, words

_ROLE: Final = re.compile(
    r"\bact(?:ing)? as (?:an? |the |my )?([a-z][a-z '/-]{3,50}?)"
    r"(?=[.,;:\n(]| (?:who|that|for|with|and|in|to)\b|$)",
    re.IGNORECASE,
)
_NOT_A_PERSON: Final = frozenset(
    """
    ai app assistant bot chatbot chatgpt console creation device engine expander generator gpt interface
    interpreter llm machine maker mode model platform prompt prompts program reviewer scraper sheet
    simulator software solver specializing summarizer system tasked terminal tester tool translator
    validator vessel wizard
    """.split()  # noqa: SIM905
)
_PERSONA: Final = re.compile(r"^(?:An?|The)\s+[\w'’-]+", re.IGNORECASE)


def read_collection(path: Path) -> list[str]:
    """Distinct roles such as ``"a career counselor"`` from ai-personas' prompts, in alphabetical order.

    Prompts that address a program, a file format or an image model are left out.
    """
    roles = set()
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        found = _ROLE.search(str(entry.get("prompt", ""))[:300])
        if found is None:
            continue
        role = " ".join(found[1].lower().split())
        parts = role.split()
        if (
            1 <= len(parts) <= 4
            and not _NOT_A_PERSON.intersection(re.split(r"[ /-]", role))
            and "'" not in role
        ):
            roles.add(role)
    return [f"{'an' if role[0] in 'aeiou' else 'a'} {role}" for role in sorted(roles)]


def read_persona(answer: str) -> str | None:
    """The persona in a teacher's answer: its first sentence, when that describes somebody."""
    sentence = first_sentence(answer)
    if not _PERSONA.match(sentence):
        return None
    return sentence if 5 <= len(words(sentence)) <= 45 and "?" not in sentence else None
