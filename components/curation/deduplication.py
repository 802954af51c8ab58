"""Near-duplicates across all units: datatrove's MinHash stages over the signatures the units left behind.

Signatures and their n-grams are made in ``units.py``; ``config.py`` says how many bands and rows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document  # type: ignore[import-untyped]
from datatrove.pipeline.dedup.minhash import (  # type: ignore[import-untyped]
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-untyped]

from components.curation.funnel import Measured
from components.curation.units import DOCUMENTS_NAME, SIGNATURES_NAME

STEP_NAME = "Near-duplicates"


class Duplicates:
    """Which documents of which unit are near-duplicates of another, found once: ``Duplicates.find(…)``."""

    def __init__(self, folder: Path, numbers: dict[str, int]):
        self.folder = folder
        self.numbers = numbers

    @classmethod
    def find(cls, units: list[Path], work: Path, config: MinhashConfig) -> Duplicates:
        """Compare the signatures of all ``units`` (their output folders, in order); quick to repeat."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        signed = [unit for unit in units if (unit / SIGNATURES_NAME).is_dir()]
        numbers = {unit.name: number for number, unit in enumerate(signed)}
        for unit in signed:
            for bucket in sorted((unit / SIGNATURES_NAME).iterdir()):
                target = work / SIGNATURES_NAME / bucket.name / f"{numbers[unit.name]:05d}.minhash.sig"
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(bucket / "00000.minhash.sig", target)
        if signed:
            buckets = MinhashDedupBuckets(
                str(work / SIGNATURES_NAME), str(work / "pairs"), config=config, only_dedup_in_index=False
            )
            for bucket_number in range(config.num_buckets):
                buckets.run(None, bucket_number, config.num_buckets)
            MinhashDedupCluster(str(work / "pairs"), str(work / "remove"), config).run(None, 0, 1)
        return cls(work / "remove", numbers)

    def survivors(self, unit: Path) -> tuple[Iterator[Document], Measured]:
        """The unit's documents without near-duplicates, and the count of the step."""
        number = self.numbers.get(unit.name)
        reader = JsonlReader(str(unit), glob_pattern=DOCUMENTS_NAME, compression=None, add_file_path=False)
        documents = reader.run(None, 0, 1)
        if number is None or not (self.folder / f"{number:06d}.remove").is_file():
            measured = Measured.of(_Everything(), STEP_NAME)
        else:
            measured = Measured.of(_Numbered(MinhashDedupFilter(str(self.folder)), number), STEP_NAME)
        return measured.run(documents), measured


class _Everything:
    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from data


class _Numbered:
    """The MinHash filter at a given file number."""

    def __init__(self, step: MinhashDedupFilter, number: int):
        self.step, self.number = step, number

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from self.step.run(data, self.number, 1)
