"""The stage from end to end, with a teacher of every temper in another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.artifacts import StageContext, StageError
from components.corpus.templates import TOPICS, is_reserved
from components.synthesis import run
from components.synthesis import stage as stage_module
from components.synthesis.teacher import client as client_module
from tests.waiting import wait_for

from .conftest import TestTeacher

Contexts = Callable[..., StageContext]
Teachers = Callable[..., TestTeacher]
NAMES = ("documents.jsonl", "sft.jsonl", "counts.json")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_sums(counts: dict[str, Any]) -> None:
    for kind in counts["items"].values():
        assert kind["planned"] == kind["accepted"] + sum(kind["rejected"].values())


def test_good_teacher(context: Contexts, teachers: Teachers) -> None:
    teacher = teachers("good")
    made = context(teacher=teacher.config())
    metrics = run(made)
    documents, sft = rows(made.out / "documents.jsonl"), rows(made.out / "sft.jsonl")
    counts = json.loads((made.out / "counts.json").read_text())
    check_sums(counts)
    assert counts["items"]["mga"]["accepted"] == len(documents) == 12
    assert counts["items"]["persona_problem"]["accepted"] >= 1
    assert counts["items"]["persona_question"]["accepted"] >= 1
    assert metrics["documents"] == 12 and metrics["sft_rows"] == len(sft)
    for document in documents:
        metadata = document["metadata"]
        assert (
            metadata["category"] == "general"
            and metadata["synthetic"] is True
            and metadata["teacher"] == "pupil"
        )
        assert metadata["parent"].startswith("summaries/") and metadata["genre"] and metadata["audience"]
        assert not document["text"].startswith("Here is")
    assert len({document["id"] for document in documents}) == 12
    for row in sft:
        assert set(row) == {"messages", "task", "source"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    problem = next(row for row in sft if row["task"] == "persona_problem")
    assert "market" in problem["messages"][0]["content"] and "####" in problem["messages"][1]["content"]
    topics = [row for row in sft if row["task"] == "topic"]
    assert topics and all(row["messages"][1]["content"] in TOPICS for row in topics)
    for row in (row for row in sft if row["task"] == "arithmetic"):
        assert not is_reserved(row["messages"][0]["content"].removeprefix("What is ").removesuffix("?"))
    assert not list(made.out.glob(".*.part"))


def test_same_teacher_same_bytes(context: Contexts, teachers: Teachers) -> None:
    teacher = teachers("good")
    made = context(teacher=teacher.config())
    run(made)
    first = {name: (made.out / name).read_bytes() for name in NAMES[:2]}
    (made.scratch / "asked.json").unlink()
    (made.scratch / "answers.sqlite").unlink()
    run(context(teacher=teacher.config(concurrency=1)))
    assert {name: (made.out / name).read_bytes() for name in NAMES[:2]} == first


def test_garbage_is_dropped_and_counted(context: Contexts, teachers: Teachers) -> None:
    made = context(teacher=teachers("garbage").config())
    run(made)
    counts = json.loads((made.out / "counts.json").read_text())
    check_sums(counts)
    assert (made.out / "documents.jsonl").read_text() == ""
    assert counts["items"]["mga"]["rejected"] == {"noise": 12}
    assert counts["items"]["mga"]["examples"]["noise"]
    assert {row["task"] for row in rows(made.out / "sft.jsonl")} == {"topic", "arithmetic", "gsm_symbolic"}
    assert any("passed the filters" in note for note in made.notes)


@pytest.mark.parametrize(
    ("mode", "more", "said"),
    [
        ("broken", {}, "HTTP 500"),
        ("html", {}, "not a chat completion"),
        ("silent", {"request_timeout_s": 0.2, "concurrency": 16}, "no answer within 0.2 s"),
        ("refusing", {}, "TEACHER_API_KEY"),
    ],
)
def test_useless_teacher_is_one_clear_error(
    context: Contexts, teachers: Teachers, mode: str, more: dict[str, Any], said: str
) -> None:
    teacher = teachers(mode)
    made = context(teacher=teacher.config(**more))
    with pytest.raises(StageError, match=said):
        run(made)
    assert not any((made.out / name).exists() for name in NAMES)


def test_unreachable_endpoint_names_url_and_alternatives(context: Contexts) -> None:
    dead = {"kind": "endpoint", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    with pytest.raises(StageError, match=r"http://127\.0\.0\.1:9/v1.*cannot be reached.*kind=engine"):
        run(context(teacher=dead))


def test_time_limit_is_counted(
    context: Contexts, teachers: Teachers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still but for 0.3 s per question: the fourth is asked after 0.9 s."""
    teacher = teachers("good")
    clock = SimpleNamespace(monotonic=lambda: 0.3 * len(teacher.asked()))
    for module in (client_module, stage_module):
        monkeypatch.setattr(module, "time", clock)
    # time is the subject: of the clock above
    made = context(teacher=teacher.config(concurrency=1), time_limit_s=0.8)
    run(made)
    counts = json.loads((made.out / "counts.json").read_text())
    check_sums(counts)
    unasked = sum(kind["rejected"].get("out_of_time", 0) for kind in counts["items"].values())
    assert len(teacher.asked()) == 3 and unasked == 22 - 3
    assert any("not asked within" in note for note in made.notes)


def test_teacher_that_dies_then_returns(context: Contexts, teachers: Teachers) -> None:
    first = teachers("dying")
    made = context(teacher=first.config(concurrency=1))
    with pytest.raises(StageError, match="in a row"):
        run(made)
    done = len(first.asked()) - 1  # the last one was never answered
    second = teachers("good")
    run(context(teacher=second.config(concurrency=1)))
    reference = {json.dumps(body, sort_keys=True) for body in first.asked()[:done]}
    assert not reference & {json.dumps(body, sort_keys=True) for body in second.asked()}
    assert len(rows(made.out / "documents.jsonl")) == 12


_RUN = """
import json, sys
from pathlib import Path
from components.artifacts import StageContext
from components.synthesis import run
request = json.loads(sys.argv[1])
run(StageContext("synthesize", "test", request["config"], {k: Path(v) for k, v in request["inputs"].items()},
    Path(request["out"]), Path(request["cache"])))
"""


def test_killed_and_run_again(context: Contexts, teachers: Teachers) -> None:
    """kill -9 at several moments: nothing is asked twice but what was in flight, and the files are the same."""
    teacher = teachers("good")
    quick: dict[str, Any] = {  # without reasoning_gym, which takes seconds to import
        "personas": {"from_documents": 4, "problems": 0, "questions": 4},
        "tasks": {"topic_rows": 20, "arithmetic_rows": 0, "generated_rows": {}},
    }
    made = context(teacher=teacher.config(concurrency=2), **quick)
    request = {
        "config": dict(made.config),
        "inputs": {role: str(path) for role, path in made.inputs.items()},
        "out": str(made.out),
        "cache": str(made.cache),
    }
    for kill_at in (5, 14):
        teacher.answer_until(kill_at)
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, json.dumps(request)],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

        def enough_asked(process: subprocess.Popen[bytes] = process, kill_at: int = kill_at) -> bool:
            assert process.poll() is None
            return len(teacher.asked()) > kill_at

        wait_for(enough_asked, f"{kill_at} answers and one more question")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not any((made.out / name).exists() for name in NAMES)
    teacher.answer_until(1000)
    run(made)
    asked = Counter(json.dumps(body, sort_keys=True) for body in teacher.asked())
    assert sum(asked.values()) - len(asked) <= 2 * 2, "more was asked twice than two kills can lose in flight"
    killed = {name: (made.out / name).read_bytes() for name in NAMES[:2]}
    quiet = teachers("good")
    (made.scratch / "asked.json").unlink()
    (made.scratch / "answers.sqlite").unlink()
    run(context(teacher=quiet.config(), **quick))
    assert {name: (made.out / name).read_bytes() for name in NAMES[:2]} == killed
    once = Counter(json.dumps(body, sort_keys=True) for body in quiet.asked())
    assert set(once) == set(asked) and set(once.values()) == {1}


def test_damaged_input_names_the_line(context: Contexts, teachers: Teachers, tmp_path: Path) -> None:
    made = context(teacher=teachers("good").config())
    bad = tmp_path / "curate/train"
    bad.mkdir(parents=True)
    text = (made.inputs["curate"] / "train/general.jsonl").read_text()
    (bad / "general.jsonl").write_text(text[: len(text) - 30])
    made.inputs = {**made.inputs, "curate": tmp_path / "curate"}
    with pytest.raises(StageError, match=r"general\.jsonl line 60 is not a document"):
        run(made)


def test_without_items_no_teacher_is_needed(context: Contexts) -> None:
    made = context(
        mga={"documents": {}},
        personas={"from_documents": 0, "problems": 0, "questions": 0},
        teacher={"kind": "endpoint", "base_url": "http://127.0.0.1:9/v1", "model": "m"},
    )
    metrics = run(made)
    assert metrics["items"] == 0 and metrics["sft_rows"] > 20
