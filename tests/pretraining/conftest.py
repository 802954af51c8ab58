"""Token shards, a fork server and one undisturbed run, shared by the folder's tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.pretraining.children import Children
from tests.pretraining.factory import make_tokens, run_config


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact of stage ``tokenize``."""
    return make_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """Processes that run the stage."""
    started = Children(tmp_path_factory.mktemp("children"))
    yield started
    started.close()


@pytest.fixture(scope="session", autouse=True)
def _early_start(request: pytest.FixtureRequest) -> None:
    """Let the fork server import while the tests that need no process run."""
    if any("children" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("children")


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    out: Path
    answer: dict[str, Any]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tokens: Path, children: Children) -> Finished:
    """The stage, run once without disturbance."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return Finished(out, children.run(tokens, out, run_config()))
