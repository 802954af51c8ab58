"""One task of curation: a part of a source through every document-wise step: ``UnitPipeline(job).run(None, rank)``.

``UnitPipeline`` is an ordinary datatrove step, so the same job also runs under datatrove's cluster executors. Its
output appears whole or not at all: a folder per unit, renamed into place.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline  # type: ignore[import-untyped]
from datatrove.pipeline.base import PipelineStep  # type: ignore[import-untyped]
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature  # type: ignore[import-untyped]
from datatrove.pipeline.extractors import Trafilatura  # type: ignore[import-untyped]
from datatrove.pipeline.readers import HuggingFaceDatasetReader, ParquetReader  # type: ignore[import-untyped]
from datatrove.pipeline.writers import JsonlWriter  # type: ignore[import-untyped]

from components.artifacts import die_with_parent, write_json
from components.corpus.categories import Category
from components.corpus.overlap import OverlapFilter
from components.curation.config import CorpusSource, CurateConfig, HubSource, PolicyName
from components.curation.corpora import CORPORA, spread
from components.curation.funnel import Measured
from components.curation.policies import EXTRACTION_TIMEOUT_S, POLICIES, language
from components.curation.quality import QualityFilter

DOCUMENTS_NAME = "00000.jsonl"
SIGNATURES_NAME = "signatures"
FUNNEL_NAME = "funnel.json"


def end_with_parent() -> None:
    """End this worker of a pool with the process that started it, even if that is gone already."""
    parent = multiprocessing.parent_process()
    die_with_parent(None if parent is None else parent.pid)


@dataclass(frozen=True)
class Unit:
    """One part of one source. ``folder`` is the unpacked package, unused where there is none."""

    source: CorpusSource | HubSource
    category: Category
    policy: PolicyName
    part: int
    folder: Path

    @property
    def name(self) -> str:
        """Name of the unit's output folder."""
        return f"{self.source.label.replace('/', '_').replace(':', '_')}-{self.part:04d}"


@dataclass(frozen=True)
class CurationJob:
    """Everything the units need, picklable: the units, the config, and the files made before they start."""

    units: tuple[Unit, ...]
    config: CurateConfig
    language_model: Path
    quality_models: dict[str, Path]
    overlap_index: Path
    output: Path


class CorpusReader(PipelineStep):  # type: ignore[misc]
    """Reads one part of a built-in corpus: every ``parts``-th of the chosen entries."""

    type = "📖 - READER"
    name = "Corpus"

    def __init__(self, unit: Unit):
        super().__init__()
        self.unit = unit

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the part's documents in a stable order."""
        source = self.unit.source
        assert isinstance(source, CorpusSource)
        corpus = CORPORA[source.name]
        entries = corpus.entries(self.unit.folder)
        for index in spread(len(entries), source.max_documents)[self.unit.part :: source.parts]:
            item = corpus.load(entries[index])
            yield Document(text=item.text, id=f"{source.label}/{item.id}", metadata=dict(item.metadata))


class PageExtractor(Trafilatura):  # type: ignore[misc]
    """Trafilatura whose sandbox process ends with the process that started it."""

    def extract(self, text: str) -> str | None:
        """The main text of an HTML page, or none."""
        end_with_parent()
        result: str | None = super().extract(text)
        return result


def _hub_reader(source: HubSource) -> PipelineStep:
    limit = -1 if source.max_documents is None else max(1, source.max_documents // source.parts)
    if source.glob is not None:
        return ParquetReader(
            f"hf://datasets/{source.dataset}",
            glob_pattern=source.glob,
            limit=limit,
            text_key=source.text_key,
            id_key=source.id_key,
        )
    options: dict[str, Any] = {"split": source.split}
    if source.subset is not None:
        options["name"] = source.subset
    return HuggingFaceDatasetReader(
        source.dataset, options, streaming=True, limit=limit, text_key=source.text_key, id_key=source.id_key
    )


class UnitPipeline(PipelineStep):  # type: ignore[misc]
    """Runs unit ``rank`` of a job: read, extract, filter, score, decontaminate, write, sign."""

    type = "🧹 - CURATE"
    name = "Unit"

    def __init__(self, job: CurationJob):
        super().__init__()
        self.job = job

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Do the unit's work unless its folder is already there."""
        unit = self.job.units[rank]
        final = self.job.output / unit.name
        if final.is_dir():
            return
        temporary = self.job.output / f".{unit.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        steps = self._steps(unit)
        stream: Iterator[Document] = self._reader(unit, rank)
        for step in steps:
            stream = step.run(stream)
        stream = JsonlWriter(str(temporary), "${rank}.jsonl", compression=None).run(
            _finished(stream, unit), 0, 1
        )
        self._drain(stream, unit, temporary)
        (temporary / DOCUMENTS_NAME).touch()
        write_json(temporary / FUNNEL_NAME, [step.count.model_dump() for step in steps])
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # another attempt's worker may have finished the same unit first
                raise
            shutil.rmtree(temporary, ignore_errors=True)

    def _reader(self, unit: Unit, rank: int) -> Iterator[Document]:
        if isinstance(unit.source, CorpusSource):
            yield from CorpusReader(unit).run()
            return
        for document in _hub_reader(unit.source).run(None, unit.part, unit.source.parts):
            document.id = f"{unit.source.label}/{document.id}"
            yield document

    def _steps(self, unit: Unit) -> list[Measured]:
        job, policy = self.job, POLICIES[unit.policy]
        steps: list[Measured] = []
        if isinstance(unit.source, CorpusSource) and CORPORA[unit.source.name].html:
            extractor = PageExtractor(
                favour_precision=False, favor_recall=True, deduplicate=False, timeout=EXTRACTION_TIMEOUT_S
            )
            steps.append(Measured.of(extractor, "HTML extraction"))
        for step in language(policy, job.language_model, job.config.language_threshold):
            steps.append(Measured.of(step, "Language"))
        for step in policy.rules():
            steps.append(Measured.of(step, _plain_name(step)))
        model = job.quality_models.get(policy.quality)
        threshold = 0.0 if policy.quality == "none" else job.config.quality_threshold
        steps.append(Measured.of(QualityFilter(model, policy.quality, threshold), "Quality score"))
        overlap = OverlapFilter(job.overlap_index, policy.words, policy.overlap == "question")
        steps.append(Measured.of(overlap, "Decontamination"))
        return steps

    def _drain(self, stream: Iterator[Document], unit: Unit, folder: Path) -> None:
        policy = POLICIES[unit.policy]
        first = next(iter(stream), None)
        if first is None:
            return
        whole = itertools.chain([first], stream)
        if not policy.minhash:
            for _ in whole:
                pass
            return
        config = minhash_config(self.job.config)
        MinhashDedupSignature(str(folder / SIGNATURES_NAME), config, language=policy.words).run(whole, 0, 1)


def minhash_config(config: CurateConfig) -> MinhashConfig:
    """The near-duplicate search's parameters: 5-grams in ``minhash_buckets`` bands."""
    return MinhashConfig(
        n_grams=5,
        num_buckets=config.minhash_buckets,
        hashes_per_bucket=config.minhash_hashes,
        seed=config.seed,
    )


def _finished(stream: Iterator[Document], unit: Unit) -> Iterator[Document]:
    """Documents with the metadata that every later pipeline stage relies on."""
    for document in stream:
        kept = {key: document.metadata[key] for key in ("quality", "topic") if key in document.metadata}
        common = {"category": unit.category, "source": unit.source.label, "synthetic": False}
        document.metadata = {**common, **kept}
        yield document


def _plain_name(step: PipelineStep) -> str:
    """A step's name without datatrove's leading pictogram."""
    return str(step.name).split(" ", 1)[1] if not str(step.name)[0].isascii() else str(step.name)
