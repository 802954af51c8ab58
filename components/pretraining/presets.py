"""Pretraining values of the recipes: ``pretrain_config_smoke()``, ``_21b_slim()``, ``_4b()``, ``_21b()``.

Nano's are the defaults of ``components/pretraining/config.py``.

Marked [paper] where arXiv 2507.20984 gives the value and [ours] with a reason where it does not: the paper is silent
on warm-up, clipping, loss weights, group size, training stages' shares, mixtures, precision and hardware.
"""

from __future__ import annotations

from components.pretraining.config import (
    EvaluationPart,
    HardwarePart,
    ModelPart,
    OptimizerPart,
    PretrainConfig,
    TrainingStage,
)

# [ours] The paper names the kinds of data and that later training stages raise knowledge-dense text, not the shares.
_FOUNDATION = {"general": 0.55, "maths": 0.08, "code": 0.12, "web_stem": 0.10, "chinese": 0.15}
_KNOWLEDGE = {"general": 0.35, "maths": 0.18, "code": 0.17, "web_stem": 0.20, "chinese": 0.10}
_FINISHING = {"general": 0.22, "maths": 0.20, "code": 0.16, "web_stem": 0.17, "chinese": 0.10, "sft": 0.15}


def pretrain_config_nano() -> PretrainConfig:
    """Nano: 3.5 million tokens in some six minutes of one CPU core. All values [ours], tuned for that time."""
    return PretrainConfig()


def pretrain_config_smoke() -> PretrainConfig:
    """Smoke: every branch of the stage in seconds; the model learns little."""
    return PretrainConfig(
        model=ModelPart(
            preset="nano",
            overrides={
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "moe_num_primary_experts": 4,
                "moe_ffn_hidden_size": 64,
                "rope_layout": [0, 1, 1, 1],
                "sliding_window_layout": [0, 1, 1, 1],
                "sliding_window_size": 64,
                "vocab_size": 1024,
            },
        ),
        stages=tuple(
            TrainingStage(
                tokens=tokens,
                context=context,
                sequences_per_step=1024 // context,
                rope_theta=theta,
                mixture=mixture,
            )
            for tokens, context, theta, mixture in (
                (30_720, 64, 1e5, _FOUNDATION),
                (20_480, 64, 1e5, _KNOWLEDGE),
                (20_480, 128, 1.5e6, _FINISHING),
            )
        ),
        optimizer=OptimizerPart(peak_lr=6e-3, warmup_steps=5),
        evaluation=EvaluationPart(tokens_per_category=1024, bigram_tokens_per_category=200_000),
        sequences_per_micro_batch=16,
        checkpoint_every_steps=25,
        log_every_steps=5,
    )


def pretrain_config_21b_slim() -> PretrainConfig:
    """The 21B's layers in small, for CPUs and one GPU: one period of four layers, 64 experts of which 6 act, untied.

    Trains on nano's tokens (vocabulary 4,096): 20 million parameters, some 1.2 million tokens. All values [ours].
    """
    nano = pretrain_config_nano()
    return nano.model_copy(
        update={
            "model": ModelPart(
                preset="21b",
                overrides={
                    "hidden_size": 256,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 7,  # seven query heads share a key head, as in the 21B
                    "num_key_value_heads": 1,
                    "head_dim": 64,
                    "moe_ffn_hidden_size": 96,
                    "rope_layout": [0, 1, 1, 1],
                    "sliding_window_layout": [0, 1, 1, 1],
                    "sliding_window_size": 256,
                    "vocab_size": 4096,
                    "initializer_range": 0.04,
                },
            ),
            "stages": tuple(
                stage.model_copy(update={"tokens": tokens})
                for stage, tokens in zip(nano.stages, (700_000, 300_000, 200_000), strict=True)
            ),
            "optimizer": OptimizerPart(peak_lr=2e-3, warmup_steps=40),
        }
    )


def _full_size(
    preset: str,
    *,
    horizon_tokens: float,
    global_batch: int,
    peak_lr: float,
    final_context: int,
    final_batch: int,
    hardware: HardwarePart,
    micro_batch: int,
    recompute_every: int,
    expert_parallel: int,
) -> PretrainConfig:
    # [ours] 85 % / 12 % / 3 %: the bulk on general text, then knowledge, then a short training stage for length and
    # instruction style; published runs of this kind spend 1-5 % of their tokens on extending the context.
    shares = (0.85, 0.12, 0.03)
    mixtures = (_FOUNDATION, _KNOWLEDGE, _FINISHING)
    shapes = (
        (4096, global_batch, 1e5),  # [paper] sequence 4096, global batch, RoPE base
        (4096, global_batch, 1e5),
        (
            final_context,
            final_batch,
            1.5e6,
        ),  # [paper] length and base; [ours] batch: about as many tokens a step
    )
    return PretrainConfig(
        model=ModelPart(preset=preset),
        stages=tuple(
            TrainingStage(
                tokens=int(share * horizon_tokens),
                context=context,
                sequences_per_step=batch,
                rope_theta=theta,
                mixture=mixture,
            )
            for share, mixture, (context, batch, theta) in zip(shares, mixtures, shapes, strict=True)
        ),
        optimizer=OptimizerPart(
            peak_lr=peak_lr,  # [paper]
            final_lr_ratio=0.1,  # [paper] cosine to 10 %
            warmup_steps=2000,  # [ours] half a percent of the steps, the usual length for AdamW at this batch
            beta1=0.9,  # [paper]
            beta2=0.95,  # [paper]
            eps=1e-8,  # [ours] torch's default
            weight_decay=0.1,  # [paper]
            clip_norm=1.0,  # [ours] as in Llama, Qwen and DeepSeek
        ),
        # [ours] enough for +-0.005 bits per byte; the bigram counts a sample that fits a node's memory; losses by
        # position load two models into one process: the command of long_context.py does that elsewhere.
        evaluation=EvaluationPart(
            tokens_per_category=2_000_000,
            bigram_tokens_per_category=20_000_000,
            sequences_per_batch=2,
            position_documents=0,
        ),
        load_balance_coef=0.008,  # [ours] the ablation's weight in Qiu et al., arXiv 2501.11873
        # [ours] one group per 32 GPUs: hundreds of sequences, far above the 128 beyond which Qiu et al. see no gain.
        load_balance_groups=hardware.gpus // 32,
        load_balance_domains="mixed",  # [ours] sharded groups halved specialisation at nano size (docs/pretraining.md)
        router_z_coef=1e-3,  # [ours] ST-MoE, arXiv 2202.08906
        absent_category="error",  # [ours] at this cost a missing category is a mistake
        sequences_per_micro_batch=micro_batch,  # [ours] what fits beside the weights, see the plan
        hardware=hardware,
        precision="bf16",  # [ours] with fp32 master weights in the optimizer
        export_dtype="bf16",  # as the released checkpoints
        zero_stage=1,  # [ours] gradients are summed where they are made and sent once a step; there is room for that
        expert_parallel=expert_parallel,
        loss_chunk_tokens=4096,  # [ours] 151,936 logits a token: a whole long sequence's would fill the GPU
        compile_layers=True,  # [ours] norms and RoPE in one pass each; experts stay as they are, their sizes vary
        activation_checkpointing=True,  # [ours] memory; costs a third more FLOPs in the layers that are recomputed
        recompute_every=recompute_every,  # [ours] as few layers as the memory asks for, see the plan
        device="cuda",
        threads=8,
        processes=8,
        checkpoint_every_steps=500,  # [ours] at most about 50 minutes lost
        keep_checkpoints=3,
        # [ours] a step, some 300 GB (21B) to a shared file system by 32 nodes, and reading them back once to checksum
        save_grace_s=840,
        spike_ratio=1.5,
        grad_spike_ratio=10.0,
        # [ours] A job that stops at a spike wastes its allocation. PaLM (arXiv 2204.02311, section 5.1) went back some
        # 100 steps and left out 200 to 500 batches, which is on_spike = rewind.
        on_spike="skip",
    )


def pretrain_config_4b() -> PretrainConfig:
    """SmallThinker-4B-A0.6B: 2.5T tokens [paper], final context 32,768 [paper]."""
    return _full_size(
        "4b",
        horizon_tokens=2.5e12,
        global_batch=1536,
        peak_lr=3e-4,
        final_context=32_768,
        final_batch=192,
        micro_batch=8,
        recompute_every=2,
        expert_parallel=1,  # [ours] 8 GB of weights fit, and an expert gets 4096 rows: an exchange would only cost
        hardware=HardwarePart(gpus=64, gpu_memory_gb=80.0, peak_tflops=989.0, assumed_mfu=0.3),
    )


def pretrain_config_21b() -> PretrainConfig:
    """SmallThinker-21B-A3B: 7.2T tokens [paper], final context 16,384 [paper]."""
    return _full_size(
        "21b",
        horizon_tokens=7.2e12,
        global_batch=4352,
        peak_lr=4.2e-4,
        final_context=16_384,
        final_batch=1024,
        micro_batch=1,
        recompute_every=1,
        # [ours] One node, whose NVLink carries the all-to-all: 36 GB of weights less on each GPU, and 3072 instead of
        # 384 rows for each expert in a product.
        expert_parallel=8,
        hardware=HardwarePart(gpus=256, gpu_memory_gb=80.0, peak_tflops=989.0, assumed_mfu=0.3),
    )


PRESETS = {
    "smoke": pretrain_config_smoke,
    "nano": pretrain_config_nano,
    "21b-slim": pretrain_config_21b_slim,
    "4b": pretrain_config_4b,
    "21b": pretrain_config_21b,
}


def benchmark_config(
    preset: str,
    steps: int,
    context: int,
    micro_batch: int,
    accumulation: int,
    layers: int,
    device: str,
    threads: int,
) -> PretrainConfig:
    """A recipe's training on one process, cut down to what is measured. 0: the recipe's own value."""
    recipe = PRESETS[preset]()
    context = context or recipe.stages[0].context
    micro_batch = micro_batch or recipe.micro_batch(0)
    stage = TrainingStage(
        tokens=steps * context * micro_batch * accumulation,
        context=context,
        sequences_per_step=micro_batch * accumulation,
        rope_theta=recipe.stages[0].rope_theta,
        mixture=recipe.stages[0].mixture,
    )
    overrides = dict(recipe.model.overrides)
    if layers:
        overrides["num_hidden_layers"] = layers
        from model import preset as named

        for key in ("rope_layout", "sliding_window_layout"):
            overrides[key] = list(overrides.get(key) or getattr(named(recipe.model.preset), key))[:layers]
    values = {
        **recipe.model_dump(),
        "model": {"preset": recipe.model.preset, "overrides": overrides},
        "stages": [stage.model_dump()] * 3,
        "optimizer": {**recipe.optimizer.model_dump(), "warmup_steps": 0},
        "sequences_per_micro_batch": micro_batch,
        "load_balance_groups": 1,
        "load_balance_domains": "mixed",
        "expert_parallel": 1,
        "processes": 1,
        "zero_stage": 1,
        "device": device,
        "threads": threads or recipe.threads,
        "hardware": {**recipe.hardware.model_dump(), "gpus": 0},
        "spike_ratio": 100.0,
        "grad_spike_ratio": 1e6,
    }
    return PretrainConfig.model_validate(values)
