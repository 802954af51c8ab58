"""Results that a resumed stage does not compute again: ``once(context.scratch / "base.json", compute)``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.artifacts.files import write_json


def once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``compute`` gave, as JSON values, kept in ``path``; a file that does not parse is computed again."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        write_json(path, compute())
        kept = json.loads(path.read_text())
    return kept
