"""Configurations of the stages ``evalsets`` and ``evaluate``; defaults are the nano values."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.artifacts import StageConfig

LocalTask = Literal[
    "mmlu",
    "mmlu_cloze",
    "parables_zh",
    "topic",
    "topic_plain",
    "topic_generated",
    "arithmetic",
    "gsm",
    "humaneval",
]
LOCAL_TASKS: tuple[LocalTask, ...] = (
    "mmlu",
    "mmlu_cloze",
    "parables_zh",
    "topic",
    "topic_plain",
    "topic_generated",
    "arithmetic",
    "gsm",
    "humaneval",
)


class EvalSetsConfig(StageConfig):
    """How many questions of each set are used. The choice is by hash, so a larger set contains the smaller."""

    mmlu_questions: int = Field(200, ge=4, le=1331, description="MMLU questions; the package has 1,331")
    mmlu_max_chars: int = Field(
        1200, ge=200, le=100_000, description="longer MMLU questions are left out (the nano context is short)"
    )
    parables_zh_questions: int = Field(100, ge=4, le=1930, description="Chinese parables, five morals each")
    parables_zh_max_chars: int = Field(
        340, ge=280, le=100_000, description="longer parables (with their morals) are left out"
    )
    topic_per_class: int = Field(24, ge=2, le=100, description="held-out summaries per topic, at most")
    arithmetic_questions: int = Field(300, ge=4, le=1000, description="sums and differences of two numbers")
    gsm_questions: int = Field(100, ge=4, le=10_000, description="grade-school maths problems")
    humaneval_problems: int = Field(16, ge=2, le=164, description="HumanEval problems")
    dev_share: float = Field(
        0.4, ge=0.1, le=0.9, description="share of each set that sweeps may use; the rest is the test split"
    )


class EvaluateConfig(StageConfig):
    """What is measured, on how much, and by which means."""

    tasks: tuple[LocalTask, ...] = Field(
        LOCAL_TASKS, description="tasks on the evaluation sets of this run; none needs a network"
    )
    stock_tasks: tuple[str, ...] = Field(
        (),
        description="lm-eval's own tasks by name (mmlu, gpqa_diamond_zeroshot, minerva_math500, ifeval, ...);"
        " they download their data from a hub",
    )
    stock_limit: int | None = Field(None, ge=1, description="questions per stock task; null: all")
    chat_stock_tasks: bool = Field(
        True, description="stock tasks through the chat template for the models after SFT"
    )
    backend: Literal["shared-prefix", "hf"] = Field(
        "shared-prefix",
        description="shared-prefix: contexts run once for all their options; hf: lm-eval's own HFLM",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of weights and compute")
    batch_size: int = Field(128, ge=1, le=4096, description="sequences held at once")
    limit: int | None = Field(None, ge=1, description="questions per task; null: the whole test split")
    gsm_max_new_tokens: int = Field(64, ge=8, le=2048, description="length of a worked answer, in tokens")
    humaneval_max_new_tokens: int = Field(48, ge=8, le=2048, description="length of a program, in tokens")
    humaneval_timeout_s: float = Field(3.0, ge=0.5, le=60, description="seconds for one program's tests")
    heldout_tokens_per_category: int = Field(
        16_384,
        ge=256,
        le=100_000_000,
        description="held-out tokens per category for bits per byte and routing",
    )
    heldout_context_tokens: int = Field(512, ge=32, le=131_072, description="length of one held-out window")
    heldout_batch_windows: int = Field(4, ge=1, le=1024, description="held-out windows per forward")
