"""Speculative decoding by prompt lookup: what followed the last words earlier in the text is guessed to follow again.

    lookup = PromptLookup(prompt)
    draft = lookup.draft()             # ids that may come next; often none
    lookup.extend([7, 9])              # what did come

The engine computes the draft together with the last token and keeps what the sampler would have chosen anyway, so the
output is the same, bit for bit (Saxena 2023, "Prompt Lookup Decoding"; verification as in Leviathan et al. 2023).
A sparse model pays more for a wider step, since more experts are touched; :class:`Pace` watches what steps cost and
what they bring, and keeps drafting only while that is faster.
"""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST, _SHORTEST = 4, 2  # tokens that have to agree before a continuation is trusted
MOST_DRAFTED = 6
_SMOOTHING = 0.2
_PAUSE_TOKENS = 64


class PromptLookup:
    """An index of the text so far: where each run of 2 to 4 tokens occurred last, before its end."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._next_of: dict[tuple[int, ...], int] = {}  # run of tokens -> index of what followed it
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append to the text."""
        for token in tokens:
            end = len(self._tokens)
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._next_of[tuple(self._tokens[end - size : end])] = end
            self._tokens.append(token)

    def draft(self, most: int = MOST_DRAFTED) -> list[int]:
        """Up to ``most`` ids that followed the longest known run of the last tokens."""
        end = len(self._tokens)
        for size in range(min(_LONGEST, end), _SHORTEST - 1, -1):
            start = self._next_of.get(tuple(self._tokens[end - size :]))
            if start is not None:
                return self._tokens[start : start + most]
        return []


class Pace:
    """Whether drafting pays, from the steps taken so far. Costs are seconds; the smoothing forgets old ones."""

    def __init__(self) -> None:
        self._plain_s: float | None = None  # per token of a step without a draft
        self._drafted_s: float | None = None  # per token gained by a step with one
        self._pause = 0

    def wants_draft(self) -> bool:
        """Ask before every step."""
        if self._plain_s is None:
            return False  # there has to be something to compare with
        if self._pause > 0:
            self._pause -= 1
            return False
        return True

    def record(self, drafted: int, gained: int, seconds: float) -> None:
        """A step took ``seconds`` for ``gained`` tokens, ``drafted`` of which had been guessed or more."""
        cost = seconds / max(gained, 1)
        if drafted == 0:
            self._plain_s = cost if self._plain_s is None else self._mix(self._plain_s, cost)
            return
        self._drafted_s = cost if self._drafted_s is None else self._mix(self._drafted_s, cost)
        if self._plain_s is not None and self._drafted_s > self._plain_s:
            self._pause = _PAUSE_TOKENS
            self._drafted_s = None

    @staticmethod
    def _mix(old: float, new: float) -> float:
        return (1 - _SMOOTHING) * old + _SMOOTHING * new
