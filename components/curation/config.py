"""The part of a recipe that says which text is curated and how strictly: ``CurateConfig()`` is nano."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from components.artifacts import StageConfig
from components.corpus.categories import Category

CorpusName = Literal[
    "owt",
    "wikipedia",
    "web-samples",
    "summaries",
    "news-pages",
    "gsm",
    "gap-manual",
    "python-stdlib",
    "codeio",
    "code-samples",
    "python-doc",
    "git-doc",
    "postgresql-doc",
    "docstrings",
    "sanguo",
    "idioms",
    "manpages-zh",
    "libreoffice-zh",
]
PolicyName = Literal["web", "encyclopedia", "technical", "generated", "code", "chinese", "chinese_short"]


class _SourceBase(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    max_documents: int | None = Field(
        default=None, ge=1, description="documents read at most, spread evenly over the source; none = all"
    )
    parts: int = Field(default=1, ge=1, le=10_000, description="tasks the source is split into")


class CorpusSource(_SourceBase):
    """A built-in corpus carried by a package registry or by Python itself (``corpora.py``)."""

    kind: Literal["corpus"] = "corpus"
    name: CorpusName = Field(description="which built-in corpus")

    @property
    def label(self) -> str:
        """Name in the funnel and in the documents' metadata."""
        return self.name


class HubSource(_SourceBase):
    """A data set of the Hugging Face hub, for the full sizes: streamed, or as parquet files when globbed."""

    kind: Literal["hub"] = "hub"
    dataset: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name on the hub")
    category: Category = Field(description="category of all its documents")
    policy: PolicyName = Field(description="which filters apply (docs/data.md)")
    subset: str | None = Field(default=None, description="configuration of the data set")
    split: str = Field(default="train", min_length=1, description="split to read")
    glob: str | None = Field(
        default=None, description="read these parquet files with ParquetReader instead of streaming"
    )
    text_key: str = Field(default="text", min_length=1, description="column with the text")
    id_key: str = Field(default="id", min_length=1, description="column with the id, if there is one")

    @property
    def label(self) -> str:
        """Name in the funnel and in the documents' metadata."""
        return f"hub:{self.dataset}" + (f"/{self.subset}" if self.subset else "")


def _kind(value: object) -> object:
    """``kind`` of a source, ``corpus`` where it is not given."""
    return value.get("kind", "corpus") if isinstance(value, dict) else getattr(value, "kind", None)


Source = Annotated[
    Annotated[CorpusSource, Tag("corpus")] | Annotated[HubSource, Tag("hub")], Discriminator(_kind)
]

NANO_SOURCES: tuple[CorpusSource | HubSource, ...] = (
    CorpusSource(name="summaries", parts=4),
    CorpusSource(name="owt"),
    CorpusSource(name="wikipedia"),
    CorpusSource(name="web-samples"),
    CorpusSource(name="news-pages"),
    CorpusSource(name="gsm", max_documents=4_000),
    CorpusSource(name="gap-manual", max_documents=70, parts=2),
    CorpusSource(name="python-stdlib", max_documents=140, parts=2),
    CorpusSource(name="codeio", max_documents=700),
    CorpusSource(name="code-samples"),
    CorpusSource(name="python-doc", max_documents=120, parts=2),
    CorpusSource(name="git-doc", max_documents=100, parts=2),
    CorpusSource(name="postgresql-doc", max_documents=400, parts=2),
    CorpusSource(name="docstrings", max_documents=120),
    CorpusSource(name="sanguo", parts=2),
    CorpusSource(name="idioms", max_documents=4_000, parts=2),
    CorpusSource(name="manpages-zh", max_documents=300, parts=2),
    CorpusSource(name="libreoffice-zh", max_documents=400),
)


class CurateConfig(StageConfig):
    """What the ``curate`` stage reads, keeps and holds out; defaults are the nano recipe's."""

    sources: tuple[Source, ...] = Field(
        default=NANO_SOURCES, min_length=1, description="where text comes from, in the order it is written"
    )
    language_threshold: float = Field(
        default=0.5, ge=0, le=1, description="least fastText probability of the policy's language"
    )
    quality_threshold: float = Field(
        default=0.4, ge=0, le=1, description="least quality score a document needs to be kept"
    )
    decontamination_ngram: int = Field(
        default=13,
        ge=5,
        le=50,
        description="words in the n-grams that must not be shared with evaluation items",
    )
    decontamination_min_words: int = Field(
        default=8, ge=3, le=50, description="shorter evaluation questions are too common to match on"
    )
    minhash_buckets: int = Field(default=14, ge=1, le=64, description="bands of the near-duplicate search")
    minhash_hashes: int = Field(default=8, ge=1, le=32, description="hashes per band")
    heldout_fraction: float = Field(default=0.025, gt=0, le=0.5, description="share of documents held out")
    heldout_min_bytes: int = Field(
        default=40_000, ge=0, description="UTF-8 bytes that every category holds out at least, if it can"
    )
    workers: int = Field(default=2, ge=1, le=1_024, description="processes working at once")
    seed: int = Field(default=20, ge=0, lt=2**31, description="seed of the quality classifier and samples")

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        labels = [source.label for source in self.sources]
        doubled = sorted({label for label in labels if labels.count(label) > 1})
        if doubled:
            raise ValueError(f"sources must be distinct, {', '.join(doubled)} is listed more than once")
        if self.decontamination_min_words > self.decontamination_ngram:
            raise ValueError(
                f"decontamination_min_words {self.decontamination_min_words} must not exceed "
                f"decontamination_ngram {self.decontamination_ngram}"
            )
        return self
