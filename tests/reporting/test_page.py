"""The report page holds what the manifests say, escaped, in one file."""

from __future__ import annotations

import json
from pathlib import Path

from components.artifacts import Manifest, write_json
from components.artifacts.manifest import collect_files
from components.reporting import write_report


def make(folder: Path, stage: str, **values) -> tuple[Path, Manifest]:
    folder.mkdir(exist_ok=True)
    fields = {
        "stage": stage,
        "stage_version": 1,
        "recipe": "toy",
        "fingerprint": "f" * 64,
        "config": {"seed": 1},
        "parents": {},
        "files": collect_files(folder),
        "metrics": {},
        "code_revision": "abc",
        "created_at": "2026-01-01T00:00:00.000+00:00",
        "duration_s": 60.0,
        "peak_memory_bytes": 3 << 30,
        **values,
    }
    return folder, Manifest(**fields)


def test_the_page_shows_results_devices_pictures_and_lineage(tmp_path):
    for stage in ("curate", "evaluate", "benchmark"):
        (tmp_path / stage).mkdir()
    (tmp_path / "curate" / "funnel.png").write_bytes(b"\x89PNG pixels")
    cell = {"metric": "acc", "value": 0.51, "ci_low": 0.4, "ci_high": 0.6, "n": 200, "chance": 0.25}
    write_json(
        tmp_path / "evaluate" / "results.json",
        {"base": {"mmlu": cell}, "merged": {"mmlu": cell, "gsm": cell}},
    )
    write_json(
        tmp_path / "benchmark" / "bench.json",
        {"devices": [{"device": "<local>", "decode_tokens_per_s": 123.4}]},
    )
    artefacts = [
        make(tmp_path / "curate", "curate", metrics={"documents_kept": 1234.0}, notes=["<b>left out</b>"]),
        make(tmp_path / "evaluate", "evaluate"),
        make(tmp_path / "benchmark", "benchmark"),
    ]
    page = write_report("toy", artefacts, tmp_path / "report.html").read_text()
    for expected in (
        "data:image/png;base64,",
        "1,234",
        "0.5100",
        "[0.4000, 0.6000]",
        "&lt;local&gt;",
        "123.4",
        "ffffffffffff",
    ):
        assert expected in page, expected
    assert "<b>left out</b>" not in page and "&lt;b&gt;left out&lt;/b&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert json.dumps({"seed": 1})[1:-1] in page.replace("&#34;", '"')


def test_a_page_with_nothing_finished_is_still_a_page(tmp_path):
    assert "0 stages" in write_report("toy", [], tmp_path / "report.html").read_text()
