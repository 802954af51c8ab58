"""Builds the report page: ``write_report("nano", [(folder, manifest), …], path)``.

Everything on the page comes from manifests and from files that a manifest lists; pictures are embedded, so the page is
one file that can be mailed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from components.artifacts import Manifest, write_atomically

_TITLES = {
    "evalsets": "Evaluation sets",
    "curate": "Curation",
    "synthesize": "Synthesis",
    "tokenize": "Tokenizer and shards",
    "pretrain": "Pretraining",
    "posttrain": "Post-training",
    "merge": "Merging",
    "evaluate": "Evaluation",
    "export": "Export",
    "benchmark": "Device benchmark",
}


_FIRST_DEVICE_COLUMNS = (
    "device",
    "file",
    "threads",
    "decode_tokens_per_s",
    "prompt_tokens_per_s",
    "first_token_s",
    "peak_memory_bytes",
    "perplexity",
)


def write_report(recipe: str, artefacts: Sequence[tuple[Path, Manifest]], path: Path) -> Path:
    """Write the page for the finished artefacts of one recipe, in pipeline order; returns ``path``."""
    environment = Environment(
        loader=PackageLoader("components.reporting", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["size"] = _size
    sections = [_section(folder, manifest) for folder, manifest in artefacts]
    by_stage = {section["stage"]: section for section in sections}
    html = environment.get_template("page.html.j2").render(
        recipe=recipe,
        sections=sections,
        evaluation=_evaluation_rows(by_stage),
        devices=_device_rows(by_stage),
        total_s=sum(section["manifest"].duration_s for section in sections),
        peak_bytes=max((section["manifest"].peak_memory_bytes for section in sections), default=0),
        revisions=sorted({section["manifest"].code_revision[:12] for section in sections}),
        newest=max((section["manifest"].created_at for section in sections), default=""),
    )
    write_atomically(path, html.encode())
    return path


def _section(folder: Path, manifest: Manifest) -> dict[str, Any]:
    pictures = [
        {"name": name, "data": base64.b64encode((folder / name).read_bytes()).decode()}
        for name in sorted(manifest.files)
        if name.endswith(".png") and "/" not in name
    ]
    return {
        "stage": manifest.stage,
        "title": _TITLES.get(manifest.stage, manifest.stage),
        "folder": folder,
        "manifest": manifest,
        "pictures": pictures,
        "bytes": sum(entry.size_bytes for entry in manifest.files.values()),
    }


def _load(section: dict[str, Any] | None, name: str) -> Any:
    if section is None or name not in section["manifest"].files:
        return None
    return json.loads((section["folder"] / name).read_text())


def _evaluation_rows(by_stage: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    results = _load(by_stage.get("evaluate"), "results.json")
    if not results:
        return None
    models = [name for name, tasks in results.items() if isinstance(tasks, dict)]
    tasks: list[str] = []
    for model in models:
        tasks += [
            task for task in results[model] if task not in tasks and isinstance(results[model][task], dict)
        ]
    rows = []
    for task in tasks:
        cells = [results[model].get(task) for model in models]
        first = next(cell for cell in cells if cell)
        rows.append({"task": task, "first": first, "cells": cells})
    return {"models": models, "rows": rows}


def _device_rows(by_stage: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    bench = _load(by_stage.get("benchmark"), "bench.json")
    if not bench:
        return []
    rows: list[dict[str, Any]] = bench.get("devices", bench.get("rows", []))
    first = [name for name in _FIRST_DEVICE_COLUMNS if rows and name in rows[0]]
    return [{name: row.get(name) for name in dict.fromkeys([*first, *row])} for row in rows]


def _number(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1 else f"{value:.4f}"
    if isinstance(value, list):
        return ", ".join(_number(item) for item in value)
    return str(value)


def _size(value_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value_bytes < 1024 or unit == "GiB":
            return f"{value_bytes:.0f} {unit}" if unit == "B" else f"{value_bytes:.1f} {unit}"
        value_bytes /= 1024
    raise AssertionError("unreachable")
