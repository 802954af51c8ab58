"""A running server and the openai client, for the tests that speak to one."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.runtime_cpu.servers import CONTEXT, MODEL, Server, running_server
from tests.waiting import CEILING_S


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Serves the tiny model to four waiting requests at most, anew for every module."""
    with running_server(MODEL, "--context", str(CONTEXT), "--queue", "4") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """Speaks to :func:`server`."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=CEILING_S)
