"""No test's verdict hangs on time: a busy machine makes tests slow, never red."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.contracts.timing import findings

PROJECT = Path(__file__).resolve().parents[2]

HANGING = {
    "a duration": (
        "import time\ndef test():\n    began = time.monotonic()\n    work()\n    assert time.monotonic() - began < 5\n"
    ),
    "a duration by another name": (
        "from time import perf_counter as now\ndef test():\n    start, count = now(), 0\n    work()\n"
        "    taken = now() - start\n    ok = taken > 1\n    assert ok\n"
    ),
    "a duration through a function": (
        "import time\ndef measured():\n    start = time.process_time()\n    work()\n"
        "    return time.process_time() - start\ndef test():\n    assert measured() < 2 * measured()\n"
    ),
    "the day": "import datetime\ndef test():\n    assert made() <= datetime.now()\n",
    "a deadline of its own": (
        "import time\ndef test():\n    deadline = time.time() + 10\n    while time.time() < deadline:\n        look()\n"
    ),
    "a reported time": 'def test():\n    assert 0 < report["first_token_s"]["median"] < 10\n',
    "a reported speed": "def test():\n    assert stats.tokens_per_s > 1e3\n",
    "a share of measured times": "def test():\n    elapsed = split()\n    assert elapsed < 0.5\n",
    "a sleep": "import time\ndef test():\n    start()\n    time.sleep(0.5)\n    assert started()\n",
    "a sleep in a coroutine": "import asyncio\nasync def test():\n    await asyncio.sleep(0.1)\n",
    "sleeps in a row": "import time\ndef test():\n    for _ in range(3):\n        time.sleep(0.1)\n    check()\n",
    "a sleep in a function within a loop": (
        "import time\nwhile not done():\n    def f():\n        time.sleep(1)\n    f()\n"
    ),
    "a limit on a command": "def test():\n    subprocess.run(command, timeout=20)\n",
    "a limit on a process": "def test():\n    assert process.wait(30) == 0\n",
    "a limit on a thread": "def test():\n    thread.join(0.3)\n    assert thread.is_alive()\n",
    "a limit on a queue": "def test():\n    assert queue.get(timeout=5) == 1\n",
    "a limit on a queue by position": "def test():\n    assert queue.get(True, 5) == 1\n",
    "a limit on a lock": "def test():\n    assert lock.acquire(True, 1)\n",
    "a limit on a future": "def test():\n    future.result(10)\n",
    "a limit on a pipe": "def test():\n    process.communicate(None, 10)\n",
    "a limit on an answer": "def test():\n    urlopen(url, timeout=5)\n",
    "a limit of our own": "def test():\n    assert run_program(source, timeout_s=10).passed\n",
    "a limit of our own by position": "def test():\n    assert judge_programs(samples, 1.0) == [True]\n",
    "a limit that nobody asked for": "import httpx\ndef test():\n    httpx.get(url)\n",
    "a limit on drawing": "@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])\ndef test(): ...\n",
    "a limit on an example": "@settings(deadline=200)\ndef test(): ...\n",
    "a program in a string": 'CODE = """\nimport time\ntime.sleep(1)\n"""\n',
    "an allowance without a reason": "def test():\n    thread.join(0.3)  # time is the subject\n",
    "an allowance without need": "def test():\n    work()  # time is the subject: it has to be over\n",
}

INNOCENT = {
    "a condition": "def test():\n    wait_for(lambda: marker.exists(), 'the marker')\n",
    "a poll": "import time\ndef test():\n    while not done():\n        time.sleep(0.01)\n",
    "a poll that may end": (
        "import time\ndef test():\n    while True:\n        if done():\n            break\n        time.sleep(0.01)\n"
    ),
    "one that is there to be killed": 'CODE = "import time; time.sleep(600)"\n',
    "a generous limit": "def test():\n    subprocess.run(command, timeout=600)\n    thread.join(CEILING_S)\n",
    "a dictionary": "def test():\n    assert counts.get('x', 0) == 2 and ', '.join(names)\n",
    "a given clock": "def test():\n    clock = Clock()\n    clock.now = 3.0\n    assert limiter(clock).left == 2\n",
    "a time that is merely there": "def test():\n    assert report['first_token_s'] > 0\n",
    "times in their order": "def test():\n    assert 0 < stats.prompt_s <= stats.first_token_s\n",
    "a time that was given": "def test():\n    assert rows[1]['time_s'] == 3.0\n",
    "a time that is shown": "import time\ndef test():\n    began = time.time()\n    print(time.time() - began)\n",
    "httpx with a limit": "import httpx\ndef test():\n    httpx.get(url, timeout=CEILING_S)\n",
    "examples without limits": "@settings(max_examples=9, deadline=None)\ndef test(): ...\n",
    "where time is the subject": (
        "def test():\n    # time is the subject: the program has no end, so any limit is exceeded\n"
        "    assert run_program(endless, timeout_s=0.5).reason == 'timeout'\n"
    ),
}


@pytest.mark.parametrize("source", HANGING.values(), ids=HANGING)
def test_what_hangs_on_time_is_seen(source: str) -> None:
    assert len(findings(source)) == 1, findings(source)


@pytest.mark.parametrize("source", INNOCENT.values(), ids=INNOCENT)
def test_what_does_not_is_left_alone(source: str) -> None:
    assert findings(source) == []


def test_lines_are_those_of_the_file() -> None:
    source = (
        'import x\n\nCODE = """\nimport time\n\ntime.sleep(1)\n"""\n\n\ndef test():\n    thread.join(2)\n'
    )
    assert [line for line, _ in findings(source)] == [6, 11]


def test_no_verdict_hangs_on_time() -> None:
    found = [
        f"{path.relative_to(PROJECT)}:{line}: {sentence}"
        for path in sorted((PROJECT / "tests").rglob("*.py"))
        if path != Path(__file__).resolve()
        for line, sentence in findings(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_property_tests_have_no_limit_on_time() -> None:
    assert settings.default is not None and settings.default.deadline is None
    assert HealthCheck.too_slow in settings.default.suppress_health_check


# A sleep that polls, or of which the comment says that no check hangs on it.
CPP_CLOCK = re.compile(r"\b(?:sleep_for|sleep_until|wait_until|usleep|nanosleep|(?:steady|system)_clock)\b")
CPP_POLL = re.compile(r"\bwhile \(")


def cpp_findings(source: str) -> list[int]:
    """Lines of a C++ source at which a clock or a sleep decides something."""
    lines = source.splitlines()
    return [
        number
        for number, line in enumerate(lines, 1)
        if CPP_CLOCK.search(line)
        and not CPP_POLL.search(line)
        and not any("no check hangs on it" in near for near in lines[max(0, number - 2) : number])
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("start();\nstd::this_thread::sleep_for(5ms);\nCHECK(started);", [2]),
        ("const auto begin = std::chrono::steady_clock::now();", [1]),
        ("while (held) std::this_thread::sleep_for(1ms);", []),
        ("// Lets them fall asleep; no check hangs on it.\nstd::this_thread::sleep_for(20ms);", []),
    ],
)
def test_sleeps_of_the_core_s_tests_are_seen(source: str, found: list[int]) -> None:
    assert cpp_findings(source) == found


def test_no_check_of_the_core_hangs_on_time() -> None:
    sources = [path for path in (PROJECT / "runtime_cpu").rglob("*.[ch]pp") if "tests" in path.parts]
    assert sources
    found = {str(path.relative_to(PROJECT)): cpp_findings(path.read_text()) for path in sources}
    assert not {name: lines for name, lines in found.items() if lines}
