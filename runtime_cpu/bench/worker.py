"""The measuring process of :mod:`runtime_cpu.bench`: opens one engine and obeys JSON lines on stdin.

    python -m runtime_cpu.bench.worker '{"engine": "runtime_cpu", "model": "m.gguf", "threads": 2, "context": 512}'
    ["hello"]
    ["measure", {"before": [], "prompt": [5, 6, 7], "decode_tokens": 64}]
    ["memory"]

llama.cpp may live in another environment, so this file needs numpy alone until it opens our engine:
``PEER_PYTHON runtime_cpu/bench/worker.py ...``.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

PEER_MODULE = "llama_cpp"
_PEER_BATCH_TOKENS = 512

Ids = NDArray[np.int32]


class Measured(Protocol):
    """An open engine; ``settings`` say what decides the bytes that it reads."""

    vocab_size: int
    settings: dict[str, str]

    def measure(self, before: Ids, prompt: Ids, decode_tokens: int) -> dict[str, float]:
        """Put ``before`` into the context, then time ``prompt`` and greedy decoding.

        Returns:
            ``prompt_s`` of the prompt, ``first_token_s`` from its start to the first token, ``decode_s`` of
            ``decode_tokens`` further tokens.
        """
        ...


class OurEngine:
    """runtime_cpu, asked as its users ask it."""

    def __init__(
        self,
        model: str,
        threads: int,
        context: int,
        memory: int | None,
        kv_type: str = "auto",
        head: str = "exact",
    ) -> None:
        from runtime_cpu.engine.engine import Engine

        self.engine = Engine.open(model, threads, context, memory, sessions=1, kv_type=kv_type, head=head)
        info = self.engine.info
        self.vocab_size = info.vocab_size
        self.settings = {"kernels": info.kernels, "kv_type": info.kv_type, "head": info.head}

    def measure(self, before: Ids, prompt: Ids, decode_tokens: int) -> dict[str, float]:
        if before.size:  # its keys and values stay in the sequence state, so a run computes them once
            with self.engine.generate(before, 1, stop_ids=()) as generation:
                list(generation)
        ids = np.concatenate([before, prompt])
        with self.engine.generate(ids, decode_tokens + 1, stop_ids=(), lookup=False) as generation:
            for _ in generation:
                pass
        stats = generation.stats
        if stats.reused_tokens != before.size:
            raise ValueError(
                f"{stats.reused_tokens} tokens of the context were kept instead of {before.size}"
            )
        times = {"prompt_s": stats.prompt_s, "decode_s": stats.decode_s, "first_token_s": stats.first_token_s}
        if self.engine.info.plan.offloads:
            times |= {
                "cache_hit_rate": stats.cache_hit_rate,
                "bytes_read_per_token": (stats.bytes_read - stats.prompt_bytes_read)
                / max(stats.decode_steps, 1),
            }
        return {
            **times,
            "active_neuron_share": stats.active_neuron_share,
            "head_row_share": stats.head_row_share,
        }


class Peer:
    """llama.cpp by its C functions: prompt in batches of 512, then the greatest logit, token by token."""

    def __init__(self, model: str, threads: int, context: int, repack: bool) -> None:
        lib = self.lib = importlib.import_module(PEER_MODULE)  # optional: no stubs, no dependency
        # A silent llama.cpp; the callback has to outlive it.
        self._log = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        options.use_extra_bufts = repack  # False: weights stay mapped, nothing is copied
        self._model = lib.llama_model_load_from_file(model.encode(), options)
        if not self._model:
            raise ValueError(f"llama.cpp cannot open {model}")
        settings = lib.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = _PEER_BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self._model, settings)
        if not self.context:
            raise ValueError(f"llama.cpp cannot make a context of {context} tokens")
        self.vocab_size = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
        self.settings = {"kv_type": "f16"}  # its default
        self._held: Ids = np.empty(0, np.int32)

    def measure(self, before: Ids, prompt: Ids, decode_tokens: int) -> dict[str, float]:
        memory = self.lib.llama_get_memory(self.context)
        kept = np.array_equal(self._held, before) and self.lib.llama_memory_seq_rm(
            memory, 0, int(before.size), -1
        )
        if not kept:
            self.lib.llama_memory_clear(memory, True)
            self.compute(before)
            self._held = before
        started = time.perf_counter()
        self.compute(prompt)
        token = self._greatest()
        first = time.perf_counter()
        for _ in range(decode_tokens):
            self.compute(np.array([token], np.int32))
            token = self._greatest()
        ended = time.perf_counter()
        return {"prompt_s": first - started, "decode_s": ended - first, "first_token_s": first - started}

    def compute(self, ids: Ids) -> None:
        """Append ``ids`` to the context."""
        for start in range(0, ids.size, _PEER_BATCH_TOKENS):
            part = np.ascontiguousarray(ids[start : start + _PEER_BATCH_TOKENS])
            pointer = part.ctypes.data_as(ctypes.POINTER(self.lib.llama_token))
            status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(pointer, part.size))
            if status:
                raise ValueError(f"llama_decode ended with {status}")
        if ids.size:
            self.lib.llama_synchronize(self.context)

    def _greatest(self) -> int:
        row = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(row, (self.vocab_size,)).argmax())


def _peak_resident_bytes() -> int:
    # By its place: the peer's environment need not have our package.
    file = Path(__file__).resolve().parents[1] / "memory" / "process.py"
    spec = importlib.util.spec_from_file_location("process", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(module.peak_resident_bytes())


def versions() -> dict[str, str]:
    """Versions of what takes part; the peer's only when it is installed here."""
    found = {"python": platform.python_version(), "numpy": np.__version__}
    for name, package in (("smallthinker", "smallthinker"), (PEER_MODULE, "llama-cpp-python")):
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _open(settings: dict[str, Any]) -> Measured:
    model, threads, context = settings["model"], settings["threads"], settings["context"]
    if settings["engine"] == PEER_MODULE:
        return Peer(model, threads, context, settings["repack"])
    return OurEngine(
        model,
        threads,
        context,
        settings.get("memory_bytes"),
        settings.get("kv_type", "auto"),
        settings.get("head", "exact"),
    )


def _serve(settings: dict[str, Any]) -> int:
    engine: Measured | None = None
    for line in sys.stdin:
        operation, *values = json.loads(line)
        answer: dict[str, Any]
        try:
            if operation == "hello":
                engine = _open(settings)
                answer = {
                    "versions": versions(),
                    "vocab_size": engine.vocab_size,
                    "settings": engine.settings,
                }
            elif operation == "memory":
                answer = {"peak_rss_bytes": _peak_resident_bytes()}
            else:
                assert engine is not None
                run = values[0]
                before, prompt = (np.array(run[name], np.int32) for name in ("before", "prompt"))
                answer = dict(engine.measure(before, prompt, run["decode_tokens"]))
        except Exception as error:  # whatever it is, the parent reports it; the classes belong to two engines
            answer = {"error": str(error) or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "versions":
        sys.stdout.write(json.dumps(versions()) + "\n")
    else:
        sys.exit(_serve(json.loads(sys.argv[1])))
