"""How each rank of a run ended, in one file that all nodes see: ``RankReports(path).write(rank, {"error": …})``.

Every rank has a slot of fixed size. The file is written in full before the run begins, so that a rank can say why it
ends on a disk that has become full, and ranks of several nodes need no lock.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from components.artifacts import fsync_path, write_atomically

_SLOT_BYTES = 4096  # a page, so that no two nodes write the same one
_LONGEST_TEXT = 3000


class RankReports:
    """The reports of one run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def create(self, world: int) -> None:
        """Make room for ``world`` ranks; earlier reports are gone."""
        write_atomically(self._path, b" " * (_SLOT_BYTES * world))

    def write(self, rank: int, report: dict[str, Any]) -> None:
        """Leave a rank's report; long texts are cut."""
        cut = {
            name: value[:_LONGEST_TEXT] if isinstance(value, str) else value for name, value in report.items()
        }
        text = json.dumps(cut).encode()
        if len(text) > _SLOT_BYTES:  # escapes
            text = json.dumps({name: str(value)[:200] for name, value in cut.items()}).encode()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(descriptor, text.ljust(_SLOT_BYTES)[:_SLOT_BYTES], rank * _SLOT_BYTES)
        finally:
            os.close(descriptor)
        fsync_path(self._path)

    @property
    def world(self) -> int:
        """Ranks that there is room for."""
        return self._path.stat().st_size // _SLOT_BYTES

    def read(self) -> dict[int, dict[str, Any]]:
        """The reports there are, by rank."""
        content = self._path.read_bytes()
        reports = {}
        for rank in range(len(content) // _SLOT_BYTES):
            text = content[rank * _SLOT_BYTES : (rank + 1) * _SLOT_BYTES].strip()
            if text:
                reports[rank] = json.loads(text)
        return reports
