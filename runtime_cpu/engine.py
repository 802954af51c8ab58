"""Opening a model and asking it: logits of given tokens, or a stream of new ones.

    engine = Engine.open("model-q4_0.gguf", threads=2, context=4096, memory="1GiB")
    rows = engine.logits([1, 2, 3])                       # float32 [3, V]
    ids = [token.id for token in engine.generate([1, 2, 3], max_tokens=16)]

Any number of threads may use one engine. Every open generation has a sequence state of its own; the computing itself
is done by one call at a time (a lock), so requests advance in turns, token by token. The GIL is released meanwhile.
At most ``sessions`` generations are open at once; a further one waits for a free state and then raises
:class:`EngineBusyError`. Results depend neither on other requests, nor on the number of threads, nor on how a prompt
is cut into chunks: the same file, kernels and KV type give the same bits.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import _core
from runtime_cpu.chat_template import ChatTemplate
from runtime_cpu.generation import Generation, SamplingOptions, Stats, check_token_ids
from runtime_cpu.head import HeadPredictorInfo, choose_head
from runtime_cpu.memory import (
    MemoryBudgetError,
    MemoryPlan,
    format_bytes,
    parse_bytes,
    peak_resident_bytes,
    release_free_memory,
    resident_bytes,
)
from runtime_cpu.tokenizer import Tokenizer, TokenizerError

KERNELS_VARIABLE = "RUNTIME_CPU_KERNELS"
MAX_THREADS = 256
_CHUNK_TOKENS = 256
_CONTEXT_STEP = 256
_WORTH_OFFLOADING = 4096  # a shorter context than this is not worth keeping all experts in memory
_RESERVE_BYTES = 24 << 20  # for what Python allocates while it serves
_HUGE_PAGE = 2 << 20
_DEFAULT_SESSIONS = 4


class EngineBusyError(_core.EngineError):
    """Every sequence state stayed in use for ``wait_s``: close a generation, or open with more ``sessions``."""


@dataclass(frozen=True)
class ModelInfo:
    """What was opened, and how it runs. Sizes are in elements unless the name says otherwise.

    Attributes:
        context_length: the longest text that the model was made for; ``context``: what this engine has room for.
        window: keys that a windowed layer sees (0: no such layer).
        rope_layout, sliding_window_layout: 1 where the layer rotates, 1 where it is windowed.
        router: ``"softmax"`` or ``"sigmoid"``.
        file_type: the storage type of most weights; ``parameters`` counts every stored weight once.
        kv_type: ``"f32"`` or ``"f16"``; ``kernels``: ``"reference"``, ``"avx2"``, …
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


class Engine:
    """A model ready to run. Open it with :meth:`open`; close it with :meth:`close` or ``with``."""

    def __init__(
        self, runtime: _core.Runtime, model: _core.Model, info: ModelInfo, chunk_tokens: int, wait_s: float
    ):
        self.info = info
        self.stats = Stats()
        self._runtime: _core.Runtime | None = runtime
        self._model = model
        self._chunk_tokens = chunk_tokens
        self._wait_s = wait_s
        self._compute_lock = threading.Lock()
        self._sessions_changed = threading.Condition()
        self._idle: list[_core.Session] = []
        self._created = 0

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        threads: int | None = None,
        context: int | None = None,
        memory: int | str | None = None,
        *,
        kernels: str | None = None,
        kv_type: str = "auto",
        sessions: int | None = None,
        chunk_tokens: int = _CHUNK_TOKENS,
        wait_s: float = 600.0,
        reader: str = "auto",
        policy: str | None = None,
        speculate: bool = True,
        head: str = "exact",
    ) -> Engine:
        """Map a GGUF file and prepare to run it.

        Args:
            threads: computing threads, 1 to 256; by default the cores that this process may use.
            context: tokens per sequence, 1 to the model's ``context_length``; by default all of it, or as much as
                ``memory`` allows.
            memory: bytes for the whole process (weights, KV cache, scratch, tokenizer, interpreter): a number or
                ``"1GiB"``. When not all experts fit, they are read from the file as they are needed.
            kernels: ``"auto"`` or a name of :func:`available_kernels`; by default ``$RUNTIME_CPU_KERNELS``, else auto.
            kv_type: ``"f32"``, ``"f16"`` or ``"auto"`` (f32 for files that hold F32 weights only).
            sessions: generations open at once; by default 4, fewer if ``memory`` is short.
            chunk_tokens: prompt tokens computed together, 1 to 4096.
            wait_s: how long a further generation waits for a free sequence state.
            reader: how experts are read under a budget: ``"io_uring"``, ``"threads"`` or ``"page_cache"``; by default
                the first that works.
            policy: which experts make room: ``"lru"``, ``"lfu"``, ``"lrfu"``, … (docs/engine.md); by default the best of
                our measurements.
            speculate: read what the next layer will probably want while the disk would idle.
            head: ``"exact"``, or ``"predictor"``: of the output matrix only the rows that the file's predictor names
                are computed, and the other logits are minus infinity. Faster, and it can lose tokens.

        Raises:
            FileNotFoundError: no such file.
            ModelFileError: the file is damaged, or no SmallThinker model.
            EngineError: ``head`` is ``"predictor"`` and the file has none.
            MemoryBudgetError: it does not fit in ``memory``; the message and ``needed_bytes`` say what would.
            ValueError: another argument is out of its range.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"there is no model file at {file}")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(cores, MAX_THREADS) if threads is None else _integer("threads", threads, 1, MAX_THREADS)
        chunk_tokens = _integer("chunk_tokens", chunk_tokens, 1, 4096)
        if kv_type not in ("auto", "f32", "f16"):
            raise ValueError(f"kv_type is {kv_type!r}; allowed are 'auto', 'f32' and 'f16'")
        kernels = kernels or os.environ.get(KERNELS_VARIABLE) or "auto"
        allowed = ["auto", *_core.available_kernels()]
        if kernels not in allowed:
            raise ValueError(f"kernels is {kernels!r}; this machine offers {', '.join(allowed)}")
        budget = None if memory is None else parse_bytes(memory)
        if sessions is not None:
            sessions = _integer("sessions", sessions, 1, 1024)

        model = _core.Model.open(str(file))
        for message in model.warnings:
            warnings.warn(f"{file.name}: {message}", stacklevel=2)
        predictor = choose_head(model, head, file.name)
        if context is not None:
            context = _integer("context", context, 1, model.context_length)
        metadata = model.metadata(arrays=False)
        tokenizer = None
        if budget is not None:
            # A promise over the whole process: what would be loaded later is loaded, and counted, now.
            with suppress(TokenizerError):
                tokenizer = Tokenizer.from_metadata(model.metadata())
            release_free_memory()
        planner = _Planner(model, threads, kv_type, chunk_tokens, kernels, budget, head)
        context, sessions, plan = planner.fit(context, sessions)
        runtime = _core.Runtime(
            model,
            threads,
            context,
            kv_type,
            kernels,
            chunk_tokens,
            plan.expert_bytes if plan.offloads else 0,
            reader,
            policy or "",
            speculate,
            head == "predictor",
        )
        info = ModelInfo(
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
            head_predictor=predictor,
            sessions=sessions,
            plan=plan,
            warnings=tuple(model.warnings),
        )
        engine = cls(runtime, model, info, chunk_tokens, wait_s)
        if tokenizer is not None:
            engine.__dict__["tokenizer"] = tokenizer
        return engine

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """Every key of the file; arrays are lists."""
        return self._model.metadata()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside the file.

        Raises:
            TokenizerError: the file has none, or one of another kind.
        """
        return Tokenizer.from_metadata(self.metadata)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for ``messages`` by the file's chat template, as text to look at.

        What a model is fed should come from :meth:`encode_chat`: there a message's text cannot become control
        tokens.

        Raises:
            ChatTemplateError: the template refuses the conversation.
        """
        return self._chat_template.render(messages, add_generation_prompt)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """The prompt for ``messages`` as ids."""
        return self._chat_template.encode(messages, add_generation_prompt)

    @functools.cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate.from_metadata(self._model.metadata(arrays=False), self.tokenizer)

    def logits(self, token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """Logits after every one of ``token_ids`` [T]: float32 [T, V]; row t predicts token t + 1.

        Raises:
            ValueError: an empty list, an id outside the vocabulary, or more ids than ``info.context``.
        """
        ids = self._check_prompt(token_ids)
        rows = np.empty((len(ids), self.info.vocab_size), np.float32)
        stats = Stats(prompt_tokens=len(ids))
        started = time.perf_counter()
        with self._borrow_session(None) as session:
            for start in range(0, len(ids), self._chunk_tokens):
                stop = start + self._chunk_tokens
                self._compute(session, ids[start:stop], rows[start:stop])
            stats.prompt_s = time.perf_counter() - started
            self._finish(stats, session)
        return rows

    def generate(
        self,
        token_ids: Sequence[int] | NDArray[np.integer],
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int = 0,
    ) -> Generation:
        """Continue ``token_ids``; an iterator of :class:`Token` that may be closed at any time.

        The logits pass through, in this order: ``logit_bias``; ``repetition_penalty`` (prompt and answer, as in
        Keskar et al. 2019); ``presence_penalty`` and ``frequency_penalty`` (answer only, as OpenAI defines them);
        ``temperature`` (0: the greatest logit, the lowest id among equals); ``min_p``; ``top_k``; ``top_p``.

        Args:
            max_tokens: at most this many; by default until the context is full.
            stop_ids: ids that end the answer and are not given out; by default those that the tokenizer names.
            seed: makes the sampling reproducible; by default drawn anew and found in ``stats.seed``.
            logprobs: how many of the most probable tokens each :class:`Token` lists.

        Raises:
            ValueError: an argument is out of range (at the call, not at the first token).
            EngineBusyError: at the first token, when no sequence state became free in time.
        """
        prompt = self._check_prompt(token_ids)
        bias = dict(logit_bias or {})
        for token_id in bias:
            if not 0 <= token_id < self.info.vocab_size:
                raise ValueError(
                    f"logit_bias names id {token_id}; allowed is 0 to {self.info.vocab_size - 1}"
                )
        options = SamplingOptions(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop_ids=frozenset(self.tokenizer.stop_ids if stop_ids is None else stop_ids),
            logit_bias=bias,
            logprobs=logprobs,
        )
        return Generation(self, prompt, options)

    def close(self) -> None:
        """Free threads, KV cache and mapping. Later calls raise :class:`EngineError`."""
        with self._compute_lock:
            self._runtime = None
        with self._sessions_changed:
            self._idle.clear()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_runtime(self) -> _core.Runtime:
        if self._runtime is None:
            raise _core.EngineError("the engine is closed; open it again with Engine.open")
        return self._runtime

    def _check_prompt(self, token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        self._open_runtime()
        ids = check_token_ids(token_ids, self.info.vocab_size)
        if len(ids) > self.info.context:
            raise ValueError(
                f"there are {len(ids)} tokens and room for {self.info.context}; shorten them, or open the engine "
                f"with a context of up to {self.info.context_length}"
            )
        return ids

    @contextmanager
    def _borrow_session(self, prompt: NDArray[np.int32] | None) -> Iterator[_core.Session]:
        """A sequence state cut back to what it shares with ``prompt`` (to nothing when that is ``None``)."""
        session = self._take_session(prompt)
        try:
            keep = 0
            if prompt is not None and session.length:
                held = np.asarray(session.tokens()[: len(prompt) - 1], np.int32)
                differing = np.flatnonzero(held != prompt[: len(held)])
                keep = int(differing[0]) if differing.size else len(held)
            session.truncate(keep)
            session.take_counters()
            yield session
        finally:
            with self._sessions_changed:
                if self._runtime is not None:
                    self._idle.append(session)
                self._sessions_changed.notify()

    def _take_session(self, prompt: NDArray[np.int32] | None) -> _core.Session:
        deadline = time.monotonic() + self._wait_s
        with self._sessions_changed:
            while True:
                runtime = self._open_runtime()
                if self._idle:
                    best = 0 if prompt is None else max(range(len(self._idle)), key=self._shared_with(prompt))
                    return self._idle.pop(best)
                if self._created < self.info.sessions:
                    session = runtime.new_session()
                    self._created += 1
                    return session
                if not self._sessions_changed.wait(deadline - time.monotonic()):
                    raise EngineBusyError(
                        f"all {self.info.sessions} sequence states were in use for {self._wait_s:g} s; close a "
                        "generation, or open the engine with more sessions"
                    )

    def _shared_with(self, prompt: NDArray[np.int32]) -> Any:
        wanted = prompt.tolist()

        def shared(index: int) -> int:
            count = 0
            for held, new in zip(self._idle[index].tokens(), wanted, strict=False):
                if held != new:
                    break
                count += 1
            return count

        return shared

    def _compute(
        self,
        session: _core.Session,
        token_ids: NDArray[np.int32],
        logits: NDArray[np.float32] | None,
    ) -> None:
        """Append ``token_ids`` to ``session``; fill ``logits`` with as many last rows as it has."""
        with self._compute_lock:
            self._open_runtime().forward(session, token_ids, logits)

    def _finish(self, stats: Stats, session: _core.Session) -> None:
        stats.set_counters(session.take_counters())
        stats.peak_rss_bytes = peak_resident_bytes()
        self.stats = stats


def available_kernels() -> list[str]:
    """Names of the kernel sets that this machine can run, slowest first."""
    return _core.available_kernels()


def _integer(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed is a whole number from {low} to {high}")
    return value


class _Planner:
    """Finds context, sessions and room for experts within a budget."""

    def __init__(
        self,
        model: _core.Model,
        threads: int,
        kv_type: str,
        chunk_tokens: int,
        kernels: str,
        budget: int | None,
        head: str = "exact",
    ) -> None:
        self._model = model
        self._predict_head = head == "predictor"
        self._budget = budget
        self._arguments = (threads, kv_type, chunk_tokens, kernels)
        self._interpreter_bytes = resident_bytes() + (0 if budget is None else _RESERVE_BYTES)
        self._all_experts = model.layers * model.experts

    def plan(self, context: int, sessions: int, slots: int | None = None) -> MemoryPlan:
        """With all experts in memory, or room for ``slots`` of them."""
        threads, kv_type, chunk_tokens, kernels = self._arguments
        base = _core.plan(
            self._model,
            threads,
            context,
            kv_type,
            chunk_tokens,
            kernels,
            slots is not None,
            self._predict_head,
        )
        experts = self._all_experts if base.expert_bytes else 0
        held = experts if slots is None else min(slots, experts)
        return MemoryPlan(
            weight_bytes=base.weight_bytes,
            expert_bytes=_whole_pages(held * base.expert_bytes),
            experts_in_memory=held,
            experts=experts,
            kv_bytes=base.kv_bytes_per_session * sessions,
            scratch_bytes=base.scratch_bytes + (base.offload_bytes if held < experts else 0),
            interpreter_bytes=self._interpreter_bytes,
            budget_bytes=self._budget,
        )

    def fit(self, context: int | None, sessions: int | None) -> tuple[int, int, MemoryPlan]:
        """What was asked for, else the most that the budget allows.

        Everything in memory comes first, if need be with a shorter context; then as many experts as fit beside a context
        whose KV cache takes at most an eighth of the budget.
        """
        whole = self._model.context_length
        if self._budget is None:
            context, sessions = context or whole, sessions or _DEFAULT_SESSIONS
            return context, sessions, self.plan(context, sessions)
        session_choices = [sessions] if sessions else list(range(_DEFAULT_SESSIONS, 0, -1))
        least = session_choices[-1]
        steps = range((whole - 1) // _CONTEXT_STEP * _CONTEXT_STEP, 0, -_CONTEXT_STEP)
        contexts = [context] if context else [whole, *steps]
        can_offload = self._can_offload()
        for size in contexts:
            if can_offload and size < min(contexts[0], _WORTH_OFFLOADING):
                break
            if self._fits(self.plan(size, least)):
                # One long sequence is worth more than several short ones: first the context, then the sessions.
                for count in session_choices:
                    plan = self.plan(size, count)
                    if self._fits(plan):
                        return size, count, plan
        smallest = context or min(whole, _CONTEXT_STEP)
        needed = self.plan(smallest, least, self._model.experts_per_token if can_offload else None)
        if not self._fits(needed):
            total = needed.total_bytes
            raise MemoryBudgetError(
                f"memory is {format_bytes(self._budget)} and the smallest plan needs {needed}; "
                f"allow at least {total} bytes ({total / 2**20:.1f} MiB)",
                total,
            )
        if not can_offload:
            return smallest, least, needed
        offloading = [size for size in contexts if size <= _WORTH_OFFLOADING] or contexts[-1:]
        for size in offloading:
            plan = self._with_most_experts(size, least)
            if plan is not None and (context or plan.kv_bytes <= self._budget // 8 or size == offloading[-1]):
                return size, least, plan
        return smallest, least, self._with_most_experts(smallest, least) or needed

    def _fits(self, plan: MemoryPlan) -> bool:
        return self._budget is None or plan.total_bytes <= self._budget

    def _can_offload(self) -> bool:
        return self.plan(1, 1, 1).experts > 0

    def _with_most_experts(self, context: int, sessions: int) -> MemoryPlan | None:
        assert self._budget is not None
        empty = self.plan(context, sessions, 0)
        room = (self._budget - empty.total_bytes) // _HUGE_PAGE * _HUGE_PAGE
        slots = room // self._model.expert_bytes
        return self.plan(context, sessions, slots) if slots >= self._model.experts_per_token else None


def _whole_pages(size: int) -> int:
    return -(-size // _HUGE_PAGE) * _HUGE_PAGE
