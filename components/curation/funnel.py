"""The data funnel: what every step of curation let through, counted and drawn: ``draw(funnel, path)``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline  # type: ignore[import-untyped]
from datatrove.pipeline.base import PipelineStep  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict

EXAMPLES = 3
EXAMPLE_CHARS = 200
STEP_ORDER = (
    "HTML extraction",
    "Language",
    "Code rules",
    "Chinese share",
    "Gopher Repetition",
    "Gopher Quality",
    "C4 Quality",
    "FineWeb Quality",
    "Quality score",
    "Decontamination",
    "Near-duplicates",
)
"""Every step in the order it is applied; a policy leaves some out."""


class StepCount(BaseModel):
    """Documents and UTF-8 bytes into and out of one step, why documents were dropped, and examples of it."""

    model_config = ConfigDict(extra="forbid")

    step: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    dropped: dict[str, int] = {}
    examples: list[dict[str, str]] = []

    def drop(self, identifier: str, reason: str, text: str) -> None:
        """Count a dropped document, and keep it as an example when its reason has none yet or there is room."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if len(self.examples) < EXAMPLES and (self.dropped[reason] == 1 or len(self.dropped) == 1):
            self.examples.append({"id": identifier, "reason": reason, "text": shortened(text)})

    def add(self, other: StepCount) -> None:
        """Add another part's counts of the same step."""
        self.documents_in += other.documents_in
        self.bytes_in += other.bytes_in
        self.documents_out += other.documents_out
        self.bytes_out += other.bytes_out
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.examples.extend(other.examples[: EXAMPLES - len(self.examples)])


def shortened(text: str) -> str:
    """``text`` on one line of at most 200 characters."""
    line = " ".join(text[: 4 * EXAMPLE_CHARS].split())
    return line if len(line) <= EXAMPLE_CHARS else line[: EXAMPLE_CHARS - 1] + "…"


@dataclass
class Measured:
    """A datatrove step whose documents are counted: those that enter and do not come out were dropped."""

    step: PipelineStep
    count: StepCount
    _pending: Document | None = field(default=None, repr=False)
    _before: str = field(default="", repr=False)

    @classmethod
    def of(cls, step: PipelineStep, name: str) -> Measured:
        """Count ``step`` under ``name``."""
        if hasattr(step, "exclusion_writer"):
            step.exclusion_writer = _KeepReason()
        return cls(step, StepCount(step=name))

    def run(self, data: DocumentsPipeline) -> DocumentsPipeline:
        """Run the step over ``data``, one document at a time."""
        for document in self.step.run(self._entering(data), 0, 1):
            self.count.documents_out += 1
            self.count.bytes_out += len(document.text.encode())
            self._pending = None
            yield document

    def _entering(self, data: DocumentsPipeline) -> Iterator[Document]:
        for document in data:
            self._count_if_dropped()
            self.count.documents_in += 1
            self.count.bytes_in += len(document.text.encode())
            self._pending, self._before = document, document.text
            yield document
        self._count_if_dropped()

    def _count_if_dropped(self) -> None:
        if self._pending is not None:
            reason = self._pending.metadata.get(
                "filter_reason", "nothing left" if not self._pending.text else ""
            )
            self.count.drop(self._pending.id, str(reason) or self.count.step, self._before)
            self._pending = None


class _KeepReason:
    """In the place of datatrove's writer of dropped documents: with one set, datatrove records the reason."""

    def __enter__(self) -> _KeepReason:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def write(self, document: Document, rank: int = 0) -> None:
        """Nothing to do: the reason is in the document's metadata now."""


Funnel = dict[str, dict[str, Any]]
"""Label of the source -> {"category", "policy", "licence", "steps": [StepCount as JSON]}."""


def by_category(funnel: Funnel, categories: Sequence[str]) -> dict[str, list[StepCount]]:
    """Sum the funnel over each category's sources; steps keep their order of first appearance."""
    result: dict[str, list[StepCount]] = {}
    for category in categories:
        steps: dict[str, StepCount] = {}
        sources = [entry for entry in funnel.values() if entry["category"] == category]
        for entry in sources:
            for raw in entry["steps"]:
                count = StepCount.model_validate(raw)
                steps.setdefault(count.step, StepCount(step=count.step)).add(count)
        if steps:
            result[category] = sorted(steps.values(), key=lambda count: _order(count.step))
    return result


def _order(step: str) -> int:
    return STEP_ORDER.index(step) if step in STEP_ORDER else len(STEP_ORDER)


_STEP_COLOURS = (
    "#d9dde3", "#7b6ba8", "#4c78a8", "#72b7b2", "#54a24b", "#b7a531", "#eeca3b", "#f58518", "#e45756", "#b279a2",
    "#9d755d", "#bab0ac",
)  # fmt: skip
_KEPT_COLOUR = "#2f6f4f"


def draw(funnel: Funnel, path: Path) -> None:
    """Draw where each source's documents went: one bar per source, dropped by step, kept at the left."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.patches import Patch

    from components.measures.figures import save_figure

    labels = list(funnel)
    dropping = {
        raw["step"]
        for entry in funnel.values()
        for raw in entry["steps"]
        if raw["documents_in"] > raw["documents_out"]
    }
    steps = sorted(dropping, key=_order)
    colours = {step: _STEP_COLOURS[number % len(_STEP_COLOURS)] for number, step in enumerate(steps)}
    figure = Figure(figsize=(11, 2.4 + 0.36 * len(labels)), layout="constrained")
    axis = figure.subplots()
    previous = None
    ticks: list[float] = []
    position = 0.0
    for label in labels:
        entry = funnel[label]
        if previous is not None and entry["category"] != previous:
            position += 0.5
        previous = entry["category"]
        _bar(axis, entry, position, colours)
        ticks.append(position)
        position += 1
    axis.set_yticks(ticks, [f"{label}  ·  {funnel[label]['category']}" for label in labels], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of the documents read (%)")
    axis.set_title(
        "Data funnel: what each step dropped, by source", loc="left", fontsize=12, fontweight="bold"
    )
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    handles = [Patch(color=_KEPT_COLOUR, label="kept")] + [Patch(color=colours[s], label=s) for s in steps]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    save_figure(figure, path)


def _bar(axis: Any, entry: Mapping[str, Any], position: float, colours: Mapping[str, str]) -> None:
    total = entry["steps"][0]["documents_in"] if entry["steps"] else 0
    kept = entry["steps"][-1] if entry["steps"] else {"documents_out": 0, "bytes_out": 0}
    left = 100 * kept["documents_out"] / total if total else 0.0
    axis.barh(position, left, color=_KEPT_COLOUR, height=0.78)
    for raw in entry["steps"]:
        width = 100 * (raw["documents_in"] - raw["documents_out"]) / total if total else 0.0
        if width > 0:
            axis.barh(position, width, left=left, color=colours[raw["step"]], height=0.78)
            left += width
    text = f"{kept['documents_out']:,} of {total:,} · {kept['bytes_out'] / 1e6:.2f} MB"
    axis.text(101, position, text, va="center", fontsize=8, color="#444444", clip_on=False)
