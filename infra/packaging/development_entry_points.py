"""Entry points of the editable install alone: a dynamic-metadata provider of ``pyproject.toml``.

The edge wheel holds ``runtime_cpu`` and nothing of the pipeline. An entry point into ``flows`` would dangle there, and
every program of that environment that looks for Prefect plugins would report it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Provider:
    """Adds the ``entry-points`` of its settings when the build is of an editable install."""

    def __init__(self) -> None:
        self._editable = False

    def build_state(self, state: str) -> None:
        """Told by the build backend what it is building, before anything is asked."""
        self._editable = state in ("editable", "metadata_editable")

    def dynamic_metadata(self, settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
        """Give the part of ``[project]`` that this provider adds."""
        return {"entry-points": settings["entry-points"] if self._editable else {}}
