"""What an open engine says about itself: ``engine.info``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime_cpu import _core
from runtime_cpu.engine.head_predictor import HeadPredictorInfo
from runtime_cpu.memory.plan import MemoryPlan


@dataclass(frozen=True)
class ModelInfo:
    """What was opened, and how it runs. Sizes are in elements unless the name says otherwise.

    Attributes:
        context_length: the longest text that the model was made for; ``context``: what this engine has room for.
        window: keys that a windowed layer sees (0: no such layer).
        rope_layout: 1 where the layer rotates.
        sliding_window_layout: 1 where the layer is windowed.
        router: ``"softmax"`` or ``"sigmoid"``; ``router_lead``: layers between the stream that it reads and its own.
        file_type: the storage type of most weights; ``parameters`` counts every stored weight once.
        kv_type: ``"f32"``, ``"f16"`` or ``"q8"``; ``kernels``: ``"reference"``, ``"avx2"``, …
        head: ``"exact"`` or ``"predictor"``; ``head_predictor``: that of the file, whether in use or not.
    """

    path: str
    name: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    expert_hidden: int
    vocab_size: int
    context_length: int
    window: int
    rope_layout: tuple[int, ...]
    sliding_window_layout: tuple[int, ...]
    rope_theta: float
    rms_epsilon: float
    router: str
    router_lead: int
    tied_embeddings: bool
    file_type: str
    file_bytes: int
    weight_bytes: int
    parameters: int
    context: int
    threads: int
    kernels: str
    kv_type: str
    head: str
    head_predictor: HeadPredictorInfo | None
    sessions: int
    plan: MemoryPlan
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls,
        file: Path,
        model: _core.Model,
        runtime: _core.Runtime,
        *,
        context: int,
        sessions: int,
        plan: MemoryPlan,
        head: str,
        head_predictor: HeadPredictorInfo | None,
    ) -> ModelInfo:
        """What ``model`` and ``runtime`` say, and what was decided when they were opened."""
        metadata = model.metadata(arrays=False)
        return cls(
            path=str(file),
            name=str(metadata.get("general.name", file.stem)),
            architecture=str(metadata["general.architecture"]),
            layers=model.layers,
            hidden=model.hidden,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            experts=model.experts,
            experts_per_token=model.experts_per_token,
            expert_hidden=model.expert_hidden,
            vocab_size=model.vocab_size,
            context_length=model.context_length,
            window=model.window,
            rope_layout=tuple(model.rope_layout),
            sliding_window_layout=tuple(model.sliding_window_layout),
            rope_theta=model.rope_theta,
            rms_epsilon=model.rms_epsilon,
            router=model.router,
            router_lead=model.router_lead,
            tied_embeddings=model.tied_embeddings,
            file_type=model.file_type,
            file_bytes=model.file_bytes,
            weight_bytes=model.weight_bytes,
            parameters=model.parameters,
            context=context,
            threads=runtime.threads,
            kernels=runtime.kernels,
            kv_type=runtime.kv_type,
            head=head,
            head_predictor=head_predictor,
            sessions=sessions,
            plan=plan,
            warnings=tuple(model.warnings),
        )
