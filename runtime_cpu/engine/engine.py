"""Opening a model and asking it: logits of given tokens, or a stream of new ones.

    engine = Engine.open("model-q4_0.gguf", threads=2, context=4096, memory="1GiB")
    rows = engine.logits([1, 2, 3])                       # float32 [3, V]
    ids = [token.id for token in engine.generate([1, 2, 3], max_tokens=16)]

Any number of threads may use one engine. Every open generation has a sequence state of its own; generations that run at
the same time take their steps together, as one pass over the weights (``scheduling.py``), with the GIL released. At
most ``sessions`` generations are open at once; a further one waits for a free state and then raises
:class:`EngineBusyError`. Results depend neither on other requests, nor on the number of threads, nor on how a prompt
is cut into chunks: the same file, kernels and KV type give the same bits.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import _core
from runtime_cpu.closing import ClosedAtExit
from runtime_cpu.engine import decoding
from runtime_cpu.engine.generation import Generation
from runtime_cpu.engine.head_predictor import choose_head
from runtime_cpu.engine.info import ModelInfo
from runtime_cpu.engine.lookup import MOST_DRAFTED
from runtime_cpu.engine.options import (
    CHUNK_TOKENS,
    MAX_CHUNK_TOKENS,
    MAX_SESSIONS,
    check_kv_type,
    choose_kernels,
    choose_threads,
    model_file,
    whole_number,
)
from runtime_cpu.engine.sampling import SamplingOptions, Token
from runtime_cpu.engine.scheduling import Scheduler
from runtime_cpu.engine.sessions import SessionPool
from runtime_cpu.engine.stats import Stats
from runtime_cpu.memory.plan import parse_bytes
from runtime_cpu.memory.planner import Planner, preload
from runtime_cpu.memory.process import peak_resident_bytes
from runtime_cpu.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime_cpu.text.chat_template import ChatTemplate

# Whoever wants to see the memory plan sets a handler for the name (`serve` does).
_log = logging.getLogger("runtime_cpu.engine")


class Engine(ClosedAtExit):
    """A model ready to run. Open it with :meth:`open`; close it with :meth:`close` or ``with``."""

    def __init__(
        self, runtime: _core.Runtime, model: _core.Model, info: ModelInfo, chunk_tokens: int, wait_s: float
    ) -> None:
        self.info = info
        self.stats = Stats()
        self._model = model
        self._scheduler = Scheduler(runtime, chunk_tokens)
        self._sessions = SessionPool(self._scheduler, info.sessions, wait_s)

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
        experts_in_memory: int | None = None,
    ) -> Engine:
        """Map a GGUF file and prepare to run it.

        Args:
            threads: computing threads, 1 to 256; by default the cores that this process may use.
            context: tokens per sequence, 1 to the model's ``context_length``; by default all of it, or as much as
                ``memory`` allows.
            memory: bytes for the whole process (weights, KV cache, scratch, tokenizer, interpreter): a number or
                ``"1GiB"``. When not all experts fit, they are read from the file as they are needed.
            kernels: ``"auto"`` or a name of :func:`.available_kernels`; by default ``$RUNTIME_CPU_KERNELS``, else auto.
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
            experts_in_memory: of all layers together, instead of as many as ``memory`` allows; for studies of reading.

        Raises:
            FileNotFoundError: no such file, or a folder: a checkpoint's has to be packed first.
            ModelFileError: the file is damaged, or no SmallThinker model.
            EngineError: ``head`` is ``"predictor"`` and the file has none.
            MemoryBudgetError: it does not fit in ``memory``; the message and ``needed_bytes`` say what would.
            ValueError: another argument is out of its range.
        """
        file = model_file(path)
        threads = choose_threads(threads)
        chunk_tokens = whole_number("chunk_tokens", chunk_tokens, 1, MAX_CHUNK_TOKENS)
        check_kv_type(kv_type)
        kernels = choose_kernels(kernels)
        budget = None if memory is None else parse_bytes(memory)
        if sessions is not None:
            sessions = whole_number("sessions", sessions, 1, MAX_SESSIONS)
        if experts_in_memory is not None and memory is not None:
            raise ValueError("memory and experts_in_memory cannot both be given: the one decides the other")

        model = _core.Model.open(str(file))
        for message in model.warnings:
            warnings.warn(f"{file.name}: {message}", stacklevel=2)
        predictor = choose_head(model, head, file.name)
        if context is not None:
            context = whole_number("context", context, 1, model.context_length)
        tokenizer = None if budget is None else preload(model)
        if experts_in_memory is not None:
            every = model.layers * model.experts
            whole_number("experts_in_memory", experts_in_memory, model.experts_per_token, every)
        planner = Planner(model, threads, kv_type, chunk_tokens, kernels, budget, head, experts_in_memory)
        context, sessions, plan = planner.fit(context, sessions)
        _log.info("%s: memory %s", file.name, plan)
        # Room for exactly so many, where that was asked for; the plan's is in whole pages.
        cache_bytes = (
            plan.expert_bytes if experts_in_memory is None else experts_in_memory * model.expert_bytes
        )
        runtime = _core.Runtime(
            model,
            threads=threads,
            context=context,
            kv_type=kv_type,
            kernels=kernels,
            chunk_tokens=chunk_tokens,
            expert_cache_bytes=cache_bytes if plan.offloads else 0,
            reader=reader,
            policy=policy or "",
            speculate=speculate,
            predict_head=head == "predictor",
        )
        info = ModelInfo.of(
            file,
            model,
            runtime,
            context=context,
            sessions=sessions,
            plan=plan,
            head=head,
            head_predictor=predictor,
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
        from runtime_cpu.text.chat_template import ChatTemplate

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
        chunk = self._scheduler.chunk_tokens
        with self._sessions.borrow(None) as session:
            for start in range(0, len(ids), chunk):
                self._scheduler.forward(session, ids[start : start + chunk], rows[start : start + chunk])
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
            and self._scheduler.chunk_tokens > MOST_DRAFTED,
        )
        stats = Stats(prompt_tokens=len(prompt))
        return Generation(self._decode(prompt, options, stats), stats)

    @contextmanager
    def head_rows(self, rows: str) -> Iterator[None]:
        """For measuring a predicted head: :meth:`logits` then gives all rows (``"all"``), or scores (``"scores"``).

        Raises:
            EngineError: another word, or the engine is closed.
        """
        with self._scheduler.head_rows(rows):
            yield

    def close(self) -> None:
        """Free threads, KV cache and mapping. Later calls raise :class:`EngineError`."""
        self._scheduler.close()
        self._sessions.close()

    def _decode(
        self, prompt: NDArray[np.int32], options: SamplingOptions, stats: Stats
    ) -> Generator[Token, None, None]:
        """The tokens of one :class:`Generation`; it holds a sequence state from the first to the last of them."""
        stats.seed = secrets.randbits(64) if options.seed is None else options.seed
        sampler = options.sampler(self.info.vocab_size, stats.seed)
        sampler.observe_prompt(prompt.tolist())
        started = time.perf_counter()
        room = self.info.context - len(prompt)
        limit = room if options.max_tokens is None else min(options.max_tokens, room)
        logits = np.empty(((MOST_DRAFTED if options.lookup else 0) + 1, self.info.vocab_size), np.float32)
        with self._sessions.borrow(prompt) as session:
            try:
                sequence = decoding.Sequence(session, sampler, options, stats, started, logits)
                yield from decoding.decode(self._scheduler, sequence, prompt, limit)
            except GeneratorExit:
                stats.finish_reason = "cancelled"
                raise
            finally:
                self._finish(stats, session)

    def _finish(self, stats: Stats, session: _core.Session) -> None:
        self._scheduler.leave(session)
        stats.set_counters(session.take_counters())
        stats.peak_rss_bytes = peak_resident_bytes()
        self.stats = stats

    def _check_prompt(self, token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        self._scheduler.check_open()
        ids = _check_token_ids(token_ids, self.info.vocab_size)
        if len(ids) > self.info.context:
            raise ValueError(
                f"there are {len(ids)} tokens and room for {self.info.context}; shorten them, or open the engine "
                f"with a context of up to {self.info.context_length}"
            )
        return ids


def _check_token_ids(token_ids: Sequence[int] | NDArray[np.integer], vocab_size: int) -> NDArray[np.int32]:
    """Token ids as int32 [T].

    Raises:
        ValueError: not a flat, non-empty list of integers inside the vocabulary.
    """
    array = np.asarray(token_ids)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"token_ids has shape {array.shape}; it has to be a flat list of at least one id")
    if array.dtype.kind not in "iu":
        raise ValueError(f"token_ids has type {array.dtype}; it has to hold integers")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        index = int(outside[0])
        raise ValueError(f"token_ids[{index}] is {int(array[index])}; allowed is 0 to {vocab_size - 1}")
    return np.ascontiguousarray(array, dtype=np.int32)
