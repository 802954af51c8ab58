"""Opening a model and asking it: logits of given tokens, or a stream of new ones.

    engine = Engine.open("model-q4_0.gguf", threads=2, context=4096, memory="1GiB")
    rows = engine.logits([1, 2, 3])                       # float32 [3, V]
    ids = [token.id for token in engine.generate([1, 2, 3], max_tokens=16)]

Any number of threads may use one engine. Every open generation has a sequence state of its own; generations that run at
the same time take their steps together, as one pass over the weights (``batching.py``). The GIL is released meanwhile.
At most ``sessions`` generations are open at once; a further one waits for a free state and then raises
:class:`EngineBusyError`. Results depend neither on other requests, nor on the number of threads, nor on how a prompt
is cut into chunks: the same file, kernels and KV type give the same bits.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import _core
from runtime_cpu.batching import Batcher
from runtime_cpu.closing import ClosedAtExit
from runtime_cpu.generation import Generation, SamplingOptions, Stats, check_token_ids
from runtime_cpu.head_predictor import HeadPredictorInfo, choose_head
from runtime_cpu.lookup import MOST_DRAFTED
from runtime_cpu.memory import MemoryPlan, parse_bytes
from runtime_cpu.peak_memory import peak_resident_bytes
from runtime_cpu.planning import CHUNK_TOKENS, KV_TYPES, Planner, load_what_counts
from runtime_cpu.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime_cpu.chat_template import ChatTemplate

_log = logging.getLogger(__name__)

KERNELS_VARIABLE = "RUNTIME_CPU_KERNELS"
_MOST_TOGETHER = 16  # sequences in one step
MAX_THREADS = 256


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


class Engine(ClosedAtExit):
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
        self._batcher = Batcher(self._compute_lock, self._decode, min(_MOST_TOGETHER, chunk_tokens))
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
        chunk_tokens: int = CHUNK_TOKENS,
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
            kv_type: of keys and values: ``"f32"``, ``"f16"``, ``"q8"`` (8 bits and a scale for each 32: half the
                bytes, rounded) or ``"auto"`` (f16; f32 for files that hold F32 weights only).
            sessions: generations open at once; by default 4, fewer if ``memory`` is short.
            chunk_tokens: prompt tokens computed together, 1 to 4096.
            wait_s: how long a further generation waits for a free sequence state.
            reader: how experts are read under a budget: ``"io_uring"``, ``"threads"`` or ``"page_cache"``; by default
                the first that works.
            policy: which experts make room: ``"lru"``, ``"lfu"``, ``"lrfu"``, … (docs/engine.md); by default the best
                of our measurements.
            speculate: read what the next layers will probably want, as far as such guesses have been right.
            head: ``"exact"``, or ``"predictor"``: of the output matrix only the rows that the file's predictor names
                are computed, and the other logits are minus infinity. Faster, and it can lose tokens.

        Raises:
            FileNotFoundError: no such file, or a folder: a checkpoint's has to be packed first.
            ModelFileError: the file is damaged, or no SmallThinker model.
            EngineError: ``head`` is ``"predictor"`` and the file has none.
            MemoryBudgetError: it does not fit in ``memory``; the message and ``needed_bytes`` say what would.
            ValueError: another argument is out of its range.
        """
        file = model_file(path)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(cores, MAX_THREADS) if threads is None else _integer("threads", threads, 1, MAX_THREADS)
        chunk_tokens = _integer("chunk_tokens", chunk_tokens, 1, 4096)
        if kv_type not in KV_TYPES:
            raise ValueError(f"kv_type is {kv_type!r}; allowed are {', '.join(map(repr, KV_TYPES))}")
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
        tokenizer = None if budget is None else load_what_counts(model)
        planner = Planner(model, threads, kv_type, chunk_tokens, kernels, budget, head)
        context, sessions, plan = planner.fit(context, sessions)
        _log.info("%s: memory %s", file.name, plan)
        runtime = _core.Runtime(
            model,
            threads=threads,
            context=context,
            kv_type=kv_type,
            kernels=kernels,
            chunk_tokens=chunk_tokens,
            expert_cache_bytes=plan.expert_bytes if plan.offloads else 0,
            reader=reader,
            policy=policy or "",
            speculate=speculate,
            predict_head=head == "predictor",
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
        if plan.offloads:
            counters = runtime.expert_counters()
            reason = f" ({counters['backend_reason']})" if counters["backend_reason"] else ""
            _log.info("%s: experts are read through %s%s", file.name, counters["backend"], reason)
        engine = cls(runtime, model, info, chunk_tokens, wait_s)
        if tokenizer is not None:
            engine.__dict__["tokenizer"] = tokenizer
        return engine

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """Every key of the file; arrays are lists, and those of a large tokenizer take 40 MB."""
        return self._model.metadata()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside the file.

        Raises:
            TokenizerError: the file has none, or one of another kind.
        """
        return Tokenizer.from_model(self._model)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for ``messages`` by the file's chat template, as text to look at.

        What a model is fed should come from :meth:`encode_chat`: there a message's text cannot become control
        tokens.

        Raises:
            ChatTemplateError: the template refuses the conversation.
        """
        return self.chat_template.render(messages, add_generation_prompt)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """The prompt for ``messages`` as ids."""
        return self.chat_template.encode(messages, add_generation_prompt)

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's chat template; ChatML when it has none.

        Raises:
            ChatTemplateError: it is no valid template.
            TokenizerError: the file has no tokenizer, or one of another kind.
        """
        # Jinja takes a quarter of the package's import, and only conversations need it.
        from runtime_cpu.chat_template import ChatTemplate

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
        lookup: bool | None = None,
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
            lookup: guess by prompt lookup while that is faster (``lookup.py``); the output does not change. By default
                when all experts are in memory: guesses touch more experts, and each may be a read.

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
            # A rejected guess is cut off again; windowed layers remember as far back as a chunk is long.
            lookup=(not self.info.plan.offloads if lookup is None else lookup)
            and self._chunk_tokens > MOST_DRAFTED,
        )
        return Generation(self, prompt, options)

    @contextmanager
    def head_rows(self, rows: str) -> Iterator[None]:
        """For measuring a predicted head: :meth:`logits` then gives all rows (``"all"``), or scores (``"scores"``).

        Raises:
            EngineError: another word, or the engine is closed.
        """
        with self._compute_lock:
            self._open_runtime().set_head_rows(rows)
        try:
            yield
        finally:
            with self._compute_lock:
                if self._runtime is not None:
                    self._runtime.set_head_rows("named")

    def close(self) -> None:
        """Free threads, KV cache and mapping. Later calls raise :class:`EngineError`."""
        with self._compute_lock:
            self._runtime = None
        with self._sessions_changed:
            self._idle.clear()

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
            self._open_runtime().forward(session, token_ids, logits=logits)

    def _decode(
        self, sessions: Sequence[_core.Session], token_ids: NDArray[np.int32], logits: NDArray[np.float32]
    ) -> None:
        self._open_runtime().decode(sessions, token_ids, logits=logits)

    def _sample(
        self, sampler: _core.Sampler, row: NDArray[np.float32], top_logprobs: int
    ) -> tuple[int, float, list[tuple[int, float]]]:
        return self._open_runtime().sample(sampler, row, top_logprobs=top_logprobs)

    def _finish(self, stats: Stats, session: _core.Session) -> None:
        self._batcher.leave(session)
        stats.set_counters(session.take_counters())
        stats.peak_rss_bytes = peak_resident_bytes()
        self.stats = stats


def available_kernels() -> list[str]:
    """Names of the kernel sets that this machine can run, slowest first."""
    return _core.available_kernels()


def model_file(path: str | os.PathLike[str]) -> Path:
    """``path`` if a file is there.

    Raises:
        FileNotFoundError: none is; for the folder of a checkpoint the message says how to make one.
    """
    file = Path(path)
    if file.is_file():
        return file
    if (file / "config.json").is_file():
        name = file.resolve().name
        command = f"python -m runtime_cpu.pack {shlex.quote(str(file))} {shlex.quote(name + '.gguf')}"
        raise FileNotFoundError(
            f"{file} is a folder in Hugging Face's format, which has to be packed first: {command}"
        )
    if file.is_dir():
        raise FileNotFoundError(f"{file} is a folder; give the GGUF file in it")
    raise FileNotFoundError(f"there is no model file at {file}")


def _integer(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed is a whole number from {low} to {high}")
    return value
