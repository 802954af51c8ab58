"""Recipes: a size of the system as one typed, frozen, validated object; every stage gets its own part.

``RECIPES["nano"]()`` builds one; ``flows/overrides.py`` changes single values. The resolved recipe goes into every
manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from pydantic import model_validator

from components.artifacts import StageConfig
from components.curation.config import CorpusSource, CurateConfig, HubSource
from components.devices.config import BenchmarkConfig
from components.evaluation.config import EvalSetsConfig, EvaluateConfig
from components.export.config import ExportConfig
from components.merging.config import MergeConfig
from components.posttraining.config import PosttrainConfig
from components.pretraining import presets
from components.pretraining.config import PretrainConfig
from components.synthesis.config import MgaConfig, PersonaConfig, SynthesizeConfig, TaskConfig, TeacherConfig
from components.tokenization.config import TokenizeConfig


class Recipe(StageConfig):
    """One size of the system: a part per stage."""

    name: str
    evalsets: EvalSetsConfig
    curate: CurateConfig
    synthesize: SynthesizeConfig
    tokenize: TokenizeConfig
    pretrain: PretrainConfig
    posttrain: PosttrainConfig
    merge: MergeConfig
    evaluate: EvaluateConfig
    export: ExportConfig
    benchmark: BenchmarkConfig

    @model_validator(mode="after")
    def _check_vocabulary(self) -> Self:
        tokens, model = self.tokenize.vocab_size, self.pretrain.model.vocab_size
        if tokens > model:
            raise ValueError(
                f"tokenize.vocab_size is {tokens} and the model has {model} tokens; lower the one or raise "
                "pretrain.model.overrides.vocab_size"
            )
        return self

    def part(self, stage: str) -> dict[str, Any]:
        """A stage's config as plain JSON values."""
        config: StageConfig = getattr(self, stage)
        return config.declared()

    def placement(self, stage: str) -> frozenset[str]:
        """The fields of a stage's config that do not enter its artefact's fingerprint."""
        config: StageConfig = getattr(self, stage)
        return config.PLACEMENT


def nano() -> Recipe:
    """The whole system on two laptop cores in minutes: every stage real, only small."""
    return Recipe(
        name="nano",
        evalsets=EvalSetsConfig(),
        curate=CurateConfig(),
        synthesize=SynthesizeConfig(),
        tokenize=TokenizeConfig(),
        pretrain=presets.pretrain_config_nano(),
        posttrain=PosttrainConfig(),
        merge=MergeConfig(),
        evaluate=EvaluateConfig(),
        export=ExportConfig(max_position_embeddings=1024),
        benchmark=BenchmarkConfig(),
    )


def smoke() -> Recipe:
    """The nano pipeline at its smallest setting, for tests: every stage and every branch, no useful model."""
    return Recipe(
        name="smoke",
        evalsets=EvalSetsConfig(
            mmlu_questions=12,
            parables_zh_questions=6,
            topic_per_class=4,
            arithmetic_questions=24,
            gsm_questions=6,
            humaneval_problems=2,
        ),
        curate=CurateConfig(
            sources=(
                CorpusSource(name="summaries", max_documents=600),
                CorpusSource(name="gsm", max_documents=200),
                CorpusSource(name="python-stdlib", max_documents=40),
                CorpusSource(name="docstrings", max_documents=40),
                CorpusSource(name="news-pages"),
                CorpusSource(name="sanguo"),
            ),
            heldout_min_bytes=8_000,
        ),
        # The teacher is our own engine with a random model: it speaks the protocol, and the filters drop what it says.
        synthesize=SynthesizeConfig(
            teacher=TeacherConfig(kind="engine", engine_model="tests/golden/gguf/tiny-4b-q8_0.gguf"),
            mga=MgaConfig(documents={"general": 4}, max_tokens=16, source_chars=120, min_source_chars=60),
            personas=PersonaConfig(
                from_documents=1, problems=2, questions=1, short_max_tokens=12, answer_max_tokens=12
            ),
            tasks=TaskConfig(topic_rows=150, arithmetic_rows=150, generated_rows={"gsm_symbolic": 20}),
        ),
        tokenize=TokenizeConfig(vocab_size=1024, training_bytes=400_000),
        pretrain=presets.pretrain_config_smoke(),
        posttrain=PosttrainConfig(
            context=128,
            max_steps=12,
            heldout_dialogues=40,
            task_items=20,
            text_tokens_per_category=256,
            checkpoint_every_steps=5,
        ),
        merge=MergeConfig(
            candidates=({"sft": 1.0}, {"sft": 0.5, "stage3": 0.5}, {"stage3": 1.0}),
            task_items=10,
            text_tokens_per_category=256,
            context=128,
        ),
        evaluate=EvaluateConfig(
            limit=8,
            gsm_max_new_tokens=8,
            humaneval_max_new_tokens=8,
            heldout_tokens_per_category=512,
            heldout_context_tokens=128,
        ),
        export=ExportConfig(max_position_embeddings=512, verify_tokens=96),
        benchmark=BenchmarkConfig(
            runs=2, prompt_tokens=32, decode_tokens=16, heldout_tokens=1024, check_tokens=96
        ),
    )


def _full_size(name: str, pretrain: PretrainConfig) -> Recipe:
    """What the 4B and the 21B share: hub data sets, Qwen's vocabulary, a large teacher, lm-eval's own tasks."""
    context = pretrain.stages[-1].context
    return Recipe(
        name=name,
        evalsets=EvalSetsConfig(mmlu_questions=1331, gsm_questions=1000, humaneval_problems=164),
        curate=CurateConfig(
            sources=(
                HubSource(dataset="HuggingFaceFW/fineweb-edu", category="general", policy="web", parts=512),
                HubSource(
                    dataset="HuggingFaceTB/finemath",
                    subset="finemath-3plus",
                    category="maths",
                    policy="technical",
                    parts=128,
                ),
                HubSource(
                    dataset="LLM360/MegaMath",
                    subset="megamath-web-pro",
                    category="maths",
                    policy="technical",
                    parts=128,
                ),
                HubSource(
                    dataset="OpenCoder-LLM/opc-fineweb-code-corpus",
                    category="code",
                    policy="technical",
                    parts=128,
                ),
                HubSource(dataset="nvidia/Nemotron-CC-v2", category="web_stem", policy="web", parts=512),
                HubSource(
                    dataset="opencsg/chinese-fineweb-edu-v2", category="chinese", policy="chinese", parts=256
                ),
            ),
            workers=64,
        ),
        synthesize=SynthesizeConfig(
            teacher=TeacherConfig(
                kind="endpoint", base_url="http://127.0.0.1:8000/v1", model="Qwen/Qwen3-32B", concurrency=256
            ),
            mga=MgaConfig(
                documents={"general": 2_000_000, "maths": 500_000, "web_stem": 500_000, "chinese": 500_000},
                source_chars=6000,
                max_tokens=2048,
                judge_minimum=3,
            ),
            personas=PersonaConfig(
                from_documents=200_000,
                problems=500_000,
                questions=500_000,
                short_max_tokens=512,
                answer_max_tokens=4096,
            ),
            time_limit_s=None,
        ),
        tokenize=TokenizeConfig(tokenizer="qwen", vocab_size=151_936, workers=64),
        pretrain=pretrain,
        posttrain=PosttrainConfig(
            context=context,
            rows_per_step=128,
            rows_per_micro_batch=1,
            epochs=2.0,
            max_steps=100_000,
            peak_lr=2e-5,
            gradient_checkpointing=True,
            device="cuda",
            checkpoint_every_steps=500,
        ),
        merge=MergeConfig(device="cuda", context=4096, task_items=500),
        evaluate=EvaluateConfig(
            stock_tasks=("mmlu", "gpqa_diamond_zeroshot", "minerva_math500", "ifeval", "humaneval"),
            device="cuda",
            dtype="bfloat16",
            gsm_max_new_tokens=512,
            humaneval_max_new_tokens=512,
            heldout_context_tokens=4096,
            heldout_tokens_per_category=1_000_000,
        ),
        export=ExportConfig(onnx=False, max_position_embeddings=context),
        benchmark=BenchmarkConfig(check_tokens=0, prompt_tokens=512, decode_tokens=128),
    )


def four_b() -> Recipe:
    """SmallThinker-4B-A0.6B at full size."""
    return _full_size("4b", presets.pretrain_config_4b())


def twenty_one_b() -> Recipe:
    """SmallThinker-21B-A3B at full size."""
    return _full_size("21b", presets.pretrain_config_21b())


def twenty_one_b_slim() -> Recipe:
    """The 21B's layers in small, on nano's data."""
    return nano().model_copy(update={"name": "21b-slim", "pretrain": presets.pretrain_config_21b_slim()})


RECIPES: dict[str, Callable[[], Recipe]] = {
    "nano": nano,
    "smoke": smoke,
    "21b-slim": twenty_one_b_slim,
    "4b": four_b,
    "21b": twenty_one_b,
}
