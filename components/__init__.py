"""One folder per pipeline stage, what several stages share, and the observers of a run; see docs/contracts.md.

Commands that moved answer to their earlier names too: ``python -m components.pretraining.benchmark``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_MOVED_COMMANDS = {
    "components.pretraining.benchmark": "pretraining/studies/benchmark.py",
    "components.pretraining.long_context": "pretraining/studies/long_context.py",
    "components.pretraining.replay": "pretraining/studies/replay.py",
    "components.pretraining.specialisation": "pretraining/studies/specialisation.py",
}


class _MovedCommands(MetaPathFinder):
    """Finds a command under its earlier name: a file there would be a second module for each of them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _MOVED_COMMANDS:
            return None
        return importlib.util.spec_from_file_location(name, Path(__file__).parent / _MOVED_COMMANDS[name])


sys.meta_path.append(_MovedCommands())
