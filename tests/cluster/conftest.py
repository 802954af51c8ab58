"""Token shards for the runs of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretraining.factory import make_tokens


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact of stage ``tokenize``, without manifest."""
    return make_tokens(tmp_path_factory.mktemp("tokens"))
