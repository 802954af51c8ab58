"""The curate stage end to end on planted packages: what is kept, determinism, kill and full disk."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import StageContext, StageError
from components.curation import CurateConfig, run
from tests.curation.planted import RESERVED, plant_all, plant_evalsets
from tests.waiting import state_of, wait_for

ROOT = Path(__file__).parents[2]
CONFIG = CurateConfig(
    sources=(
        {"name": "owt"},
        {"name": "summaries", "parts": 2, "max_documents": 90},
        {"name": "python-stdlib", "max_documents": 12},
        {"name": "sanguo"},
        {"name": "idioms"},
    ),
    quality_threshold=0.0,  # the planted prose is word salad
    heldout_min_bytes=500,
    workers=1,
).model_dump(mode="json")


def context(base: Path, out: Path, config: dict[str, Any] | None = None) -> StageContext:
    return StageContext(
        "curate", "test", config or CONFIG, {"evalsets": base / "evalsets"}, out, base / "cache"
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curate")
    plant_all(folder / "cache")
    plant_evalsets(folder / "evalsets")
    return folder


@pytest.fixture(scope="module")
def curated(base: Path) -> tuple[Path, dict[str, float]]:
    out = base / "first"
    out.mkdir()
    return out, run(context(base, out))


def documents(out: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted((out / split).glob("*.jsonl")) for line in path.open()]


def digests(out: Path) -> dict[str, str]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and ".work" not in path.parts)
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_documents_follow_the_contract(curated: tuple[Path, dict[str, float]]) -> None:
    out, metrics = curated
    train, heldout = documents(out, "train"), documents(out, "heldout")
    everything = train + heldout
    assert {path.stem for path in (out / "train").iterdir()} == {"general", "code", "chinese"}
    assert {path.stem for path in (out / "heldout").iterdir()} == {"general", "code", "chinese"}
    assert len({document["id"] for document in everything}) == len(everything) == metrics["documents_kept"]
    assert len(heldout) < len(train) / 2
    for document in everything:
        assert set(document) == {"text", "id", "metadata"} and document["text"]
        metadata = document["metadata"]
        assert metadata["synthetic"] is False and 0 <= metadata["quality"] <= 1
        assert document["id"].startswith(f"{metadata['source']}/")
        assert "reserved_key" not in metadata


def test_bad_documents_are_dropped_and_counted(curated: tuple[Path, dict[str, float]]) -> None:
    out, _ = curated
    funnel = json.loads((out / "funnel.json").read_text())
    texts = [document["text"] for document in documents(out, "train") + documents(out, "heldout")]
    assert not any(RESERVED in text or "maison" in text or "click here click" in text for text in texts)
    steps = {step["step"]: step for step in funnel["sources"]["owt"]["steps"]}
    assert steps["Language"]["dropped"] == {"Language": 1}
    assert steps["Decontamination"]["dropped"] == {"shares words with demo": 1}
    assert steps["Near-duplicates"]["dropped"] == {"Near-duplicates": 2}
    assert "maison" in steps["Language"]["examples"][0]["text"]
    assert RESERVED[:60] in steps["Decontamination"]["examples"][0]["text"]
    for entry in funnel["sources"].values():
        for before, after in zip(entry["steps"], entry["steps"][1:], strict=False):
            assert (before["documents_out"], before["bytes_out"]) == (
                after["documents_in"],
                after["bytes_in"],
            )
        for step in entry["steps"]:
            assert step["documents_in"] - step["documents_out"] == sum(step["dropped"].values())
            assert len(step["examples"]) <= 3 and all(len(e["text"]) <= 200 for e in step["examples"])
        assert entry["train"] + entry["heldout"] == entry["steps"][-1]["documents_out"]
    assert (out / "funnel.png").read_bytes().startswith(b"\x89PNG")


DRIVER = """
import json, sys
from pathlib import Path
from components.artifacts import StageContext, StageError
from components.curation import run
def main():
    base, out, config, limit = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
    if limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(StageContext("curate", "test", config, {"evalsets": base / "evalsets"}, out, base / "cache"))
    except StageError as error:
        print(error)
        sys.exit(3)
if __name__ == "__main__":
    main()
elif len(sys.argv) > 5:  # a worker, which stops once this unit is there: the run cannot end before it is killed
    from tests.freezing import freeze_when
    freeze_when(lambda: any((Path(sys.argv[2]) / ".work/units").glob(sys.argv[5])))
"""


def start(base: Path, out: Path, limit: int = 0, until: str | None = None) -> subprocess.Popen[str]:
    driver = base / "driver.py"
    driver.write_text(DRIVER)
    out.mkdir(exist_ok=True)
    command = [sys.executable, str(driver), str(base), str(out), json.dumps(CONFIG), str(limit)]
    command += [] if until is None else [until]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_killed_then_full_disk_then_same_bytes(curated: tuple[Path, dict[str, float]], base: Path) -> None:
    out = base / "second"
    process = start(base, out, until="owt-*")

    def unit_made() -> bool:
        assert process.poll() is None
        return any((out / ".work/units").glob("owt-*"))

    wait_for(unit_made, "the first unit")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "funnel.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (out / ".work/units").glob("[!.]*")}
    limited = start(base, out, limit=40_000)
    message = limited.communicate()[0]
    assert limited.returncode == 3, message
    assert message.count("\n") == 1 and "could not write" in message and "make room" in message
    assert run(context(base, out)) == curated[1]
    assert digests(out) == digests(curated[0])
    assert finished and all(path.stat().st_mtime_ns == then for path, then in finished.items())


def test_no_worker_outlives_a_killed_stage(base: Path) -> None:
    process = start(base, base / "third")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def working() -> bool:
        assert process.poll() is None
        return any((base / "third/.work/units").glob("*"))

    wait_for(working, "a worker's first file")
    workers = [int(pid) for pid in children.read_text().split()]
    assert len(workers) >= 2  # multiprocessing's resource tracker and the worker
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(map(state_of, workers)), "the workers' end")


def test_missing_evaluation_files_and_wrong_config(base: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"(?s)config of stage curate.*heldout_fraction"):
        run(context(base, tmp_path, {**CONFIG, "heldout_fraction": 2}))
    (tmp_path / "evalsets").mkdir()
    (tmp_path / "evalsets/bad.jsonl").write_text('{"id": 1}\n')
    broken = StageContext(
        "curate", "t", CONFIG, {"evalsets": tmp_path / "evalsets"}, tmp_path, base / "cache"
    )
    with pytest.raises(StageError, match=r"bad\.jsonl line 1"):
        run(broken)


def test_empty_category_is_an_error(base: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "sources": [{"name": "owt", "max_documents": 30}], "language_threshold": 1.0}
    with pytest.raises(StageError, match=r"nothing is left of category general"):
        run(context(base, tmp_path, config))
