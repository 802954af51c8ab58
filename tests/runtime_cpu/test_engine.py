"""The engine as its users call it: generating, cancelling, sharing, refusing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime_cpu import Engine, EngineBusyError, EngineError, MemoryBudgetError, ModelFileError
from runtime_cpu.memory import parse_bytes
from tests.runtime_cpu.small_models import Shape, random_weights, write_model

GOLDEN = Path(__file__).parent.parent / "golden" / "gguf"
FILE = GOLDEN / "tiny-21b-q4_0.gguf"
PROMPT = [int(i) for i in np.load(GOLDEN / "tiny-21b-q4_0.npz")["input_ids"][:24]]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.open(FILE, threads=2, context=256) as opened:
        yield opened


def ids_of(engine: Engine, prompt: list[int], **options: object) -> list[int]:
    options = {"max_tokens": 20, "stop_ids": ()} | options
    return [token.id for token in engine.generate(prompt, **options)]  # type: ignore[arg-type]


def test_greedy_tokens_are_the_greatest_logits(engine: Engine) -> None:
    generated = ids_of(engine, PROMPT)
    rows = engine.logits(PROMPT + generated)
    assert generated == rows[len(PROMPT) - 1 : -1].argmax(1).tolist()


def test_logprobs_are_those_of_the_logits(engine: Engine) -> None:
    tokens = list(engine.generate(PROMPT, max_tokens=5, stop_ids=(), logprobs=4, temperature=0.8, seed=3))
    rows = engine.logits(PROMPT + [token.id for token in tokens])[len(PROMPT) - 1 : -1].astype(np.float64)
    logprobs = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    for row, token in zip(logprobs, tokens, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        assert [i for i, _ in token.top] == np.argsort(-row, kind="stable")[:4].tolist()
        assert [p for _, p in token.top] == pytest.approx(np.sort(row)[::-1][:4].tolist(), abs=1e-4)


def test_a_seed_reproduces_and_seeds_differ(engine: Engine) -> None:
    options = {"temperature": 1.0, "top_p": 0.95, "min_p": 0.001, "top_k": 200}
    first = ids_of(engine, PROMPT, seed=7, **options)
    assert ids_of(engine, PROMPT, seed=7, **options) == first
    assert ids_of(engine, PROMPT, seed=8, **options) != first
    drawn = ids_of(engine, PROMPT, **options)
    assert ids_of(engine, PROMPT, seed=engine.stats.seed, **options) == drawn


def test_bias_and_penalties_act(engine: Engine) -> None:
    plain = ids_of(engine, PROMPT)
    assert ids_of(engine, PROMPT, logit_bias={plain[0]: float("-inf")})[0] != plain[0]
    assert set(ids_of(engine, PROMPT, logit_bias={5: 1e6})) == {5}
    unrepeated = ids_of(engine, PROMPT, presence_penalty=100.0)
    assert len(set(unrepeated)) == len(unrepeated)


def test_stop_tokens_end_the_answer_and_are_not_given_out(engine: Engine) -> None:
    plain = ids_of(engine, PROMPT)
    stop = plain[6]
    cut = plain[: plain.index(stop)]
    assert ids_of(engine, PROMPT, stop_ids=[stop]) == cut
    assert (engine.stats.finish_reason, engine.stats.stop_id) == ("stop", stop)
    assert engine.stats.generated_tokens == len(cut)


def test_statistics(engine: Engine) -> None:
    generated = ids_of(engine, PROMPT)
    stats = engine.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finish_reason) == (
        24,
        len(generated),
        "length",
    )
    assert stats.prompt_tokens_per_s > 0 and stats.decode_tokens_per_s > 0
    assert 0 < stats.prompt_s <= stats.first_token_s
    assert (
        0.2 < stats.active_neuron_share < 0.8
        and len(stats.active_neuron_share_by_layer) == engine.info.layers
    )
    computed = 24 + 19  # the last token is not fed back
    assert [sum(row) for row in stats.expert_counts] == [
        computed * engine.info.experts_per_token
    ] * engine.info.layers
    assert stats.peak_rss_bytes > 1 << 20


def test_the_context_ends_an_answer() -> None:
    with Engine.open(FILE, context=30) as engine:
        assert len(ids_of(engine, PROMPT, max_tokens=None)) == 6
        assert engine.stats.finish_reason == "length"
        with pytest.raises(ValueError, match="31 tokens and room for 30"):
            engine.logits([1] * 31)


def test_no_tokens_asked_for(engine: Engine) -> None:
    assert ids_of(engine, PROMPT, max_tokens=0) == []


def test_cancelling(engine: Engine) -> None:
    with engine.generate(PROMPT, stop_ids=()) as generation:
        next(generation)
    assert generation.stats.finish_reason == engine.stats.finish_reason == "cancelled"
    assert list(generation) == []
    abandoned = engine.generate(PROMPT, stop_ids=())
    next(abandoned)
    del abandoned
    gc.collect()
    unstarted = engine.generate(PROMPT)
    unstarted.close()
    assert unstarted.stats.finish_reason == "cancelled"
    assert ids_of(engine, PROMPT)


def test_shared_beginnings_are_not_computed_again(engine: Engine, tmp_path: Path) -> None:
    first = ids_of(engine, PROMPT)
    longer = PROMPT + first[:5] + [3, 4, 5]
    with Engine.open(FILE, threads=2, context=256) as fresh:
        expected = ids_of(fresh, longer)
    assert ids_of(engine, longer) == expected
    assert engine.stats.reused_tokens == len(PROMPT) + 5
    assert ids_of(engine, PROMPT) == first  # shorter than what is held: one token is computed again
    assert engine.stats.reused_tokens == len(PROMPT) - 1


def test_a_ring_that_forgot_is_filled_again(tmp_path: Path) -> None:
    shape = Shape(window=9, context=400)
    path = write_model(tmp_path / "m.gguf", shape, random_weights(shape))
    prompt = np.random.default_rng(0).integers(0, shape.vocab, 20).tolist()
    with Engine.open(path, chunk_tokens=8) as engine:
        expected = ids_of(engine, prompt)
        ids_of(engine, prompt, max_tokens=300)
        assert ids_of(engine, prompt) == expected
        assert engine.stats.reused_tokens == 0


def test_interleaved_and_threaded_requests_do_not_disturb_each_other(engine: Engine) -> None:
    prompts = [PROMPT[: 5 + i] for i in range(4)]
    expected = [ids_of(engine, prompt) for prompt in prompts]
    open_now = [engine.generate(prompt, max_tokens=20, stop_ids=()) for prompt in prompts]
    rounds = [[next(generation).id for generation in open_now] for _ in range(20)]
    assert [list(answer) for answer in zip(*rounds, strict=True)] == expected
    for generation in open_now:
        generation.close()

    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        results[index] = ids_of(engine, prompts[index % 4])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(12)] == expected * 3


def test_too_many_open_generations() -> None:
    # time is the subject: the first sequence ends after the second has given up, so that any limit is exceeded
    with Engine.open(FILE, context=64, sessions=1, wait_s=0.05) as engine:
        first = engine.generate(PROMPT, stop_ids=())
        next(first)
        with pytest.raises(EngineBusyError, match="1 sequence states"):
            next(engine.generate(PROMPT, stop_ids=()))
        first.close()
        assert next(engine.generate(PROMPT, stop_ids=()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; allowed is \[0.0, 100.0\]"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0.0; allowed is \(0.0, 1.0\]"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"logprobs": 5000}, "logprobs is 5000"),
        ({"logit_bias": {320: 1.0}}, "logit_bias names id 320; allowed is 0 to 319"),
        ({"logit_bias": {1: float("nan")}}, r"logit_bias\[1\] is nan"),
    ],
)
def test_bad_options_are_refused_at_the_call(
    engine: Engine, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPT, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one id"),
        ([[1, 2]], "flat list"),
        ([1.5], "integers"),
        ([1, 320], r"token_ids\[1\] is 320; allowed is 0 to 319"),
        ([-1], r"token_ids\[0\] is -1"),
        ([2**40], "allowed is 0 to 319"),
    ],
)
def test_bad_ids_are_refused(engine: Engine, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.logits(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0; allowed is a whole number from 1 to 256"),
        ({"threads": True}, "threads is True"),
        ({"context": 16385}, "context is 16385; allowed is a whole number from 1 to 16384"),
        ({"memory": "lots"}, "write bytes or a size"),
        ({"memory": 0}, "more than 0"),
        ({"kernels": "sse9"}, "kernels is 'sse9'; this machine offers auto, reference"),
        ({"kv_type": "q4"}, "kv_type is 'q4'"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"sessions": 0}, "sessions is 0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine.open(FILE, **options)  # type: ignore[arg-type]


def test_memory_is_planned_and_refused() -> None:
    with Engine.open(FILE, memory="2GiB", context=16384) as engine:
        plan = engine.info.plan
        assert plan.total_bytes <= 2 << 30 and plan.budget_bytes == 2 << 30
        assert engine.info.sessions == 4
    with pytest.raises(MemoryBudgetError, match="allow at least") as refused:
        Engine.open(FILE, memory="1MiB")
    needed = refused.value.needed_bytes
    with Engine.open(FILE, memory=needed + (8 << 20)) as engine:  # the interpreter grows a little meanwhile
        assert engine.info.sessions == 1 and engine.info.context >= 256
        assert engine.info.plan.total_bytes <= needed + (8 << 20)
        assert ids_of(engine, PROMPT)


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("1GiB", "1.5 MiB", "2k", "3MB", "7", 9)] == [
        1 << 30,
        3 << 19,
        2048,
        3_000_000,
        7,
        9,
    ]


def test_a_closed_engine_says_so(engine: Engine) -> None:
    running = engine.generate(PROMPT, stop_ids=())
    next(running)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.logits(PROMPT)
    with pytest.raises(EngineError, match="closed"):
        next(running)
    running.close()


def test_information(engine: Engine) -> None:
    info = engine.info
    assert (info.architecture, info.layers, info.experts, info.vocab_size) == ("smallthinker", 8, 8, 320)
    assert (info.file_type, info.router, info.window, info.kv_type) == ("Q4_0", "softmax", 4096, "f16")
    assert info.file_bytes == FILE.stat().st_size > info.weight_bytes
    assert info.rope_layout == info.sliding_window_layout == (0, 1, 1, 1) * 2
    assert (
        engine.metadata["general.name"] == "golden-21b"
        and len(engine.metadata["tokenizer.ggml.tokens"]) == 320
    )


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model file"):
        Engine.open(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError):
        Engine.open(tmp_path)
    data = FILE.read_bytes()
    for name, content, message in (
        ("empty", b"", "empty"),
        ("text", b"# not a model, only some text that is long enough", "does not begin with 'GGUF'"),
        ("torn", data[:-1], "past the end of the file"),
        ("head", data[:4000], "the file ends inside"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=message) as refused:
            Engine.open(path)
        assert isinstance(refused.value, EngineError) and str(path) in str(refused.value)


def test_a_file_that_does_not_name_its_router(tmp_path: Path) -> None:
    shape = Shape(softmax=False)
    weights = random_weights(shape)
    with Engine.open(write_model(tmp_path / "a.gguf", shape, weights)) as engine:
        expected = engine.logits([1, 2, 3])
    silent = write_model(tmp_path / "b.gguf", shape, weights, gating=False)
    with pytest.warns(UserWarning, match="expert_gating_func"), Engine.open(silent) as engine:
        assert engine.info.router == "sigmoid" and engine.info.warnings
        assert np.array_equal(engine.logits([1, 2, 3]), expected)


def test_kernels_by_environment() -> None:
    code = f"from runtime_cpu import Engine; print(Engine.open({str(FILE)!r}, context=64).info.kernels)"
    environment = os.environ | {"RUNTIME_CPU_KERNELS": "reference"}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "reference"


def test_runs_without_torch_and_the_pipeline() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'pydantic', 'prefect', 'mlflow', 'gguf'): sys.modules[name] = None\n"
        "from runtime_cpu import Engine\n"
        f"engine = Engine.open({str(FILE)!r}, context=64)\n"
        "print(len(list(engine.generate(engine.tokenizer.encode('Hello'), max_tokens=3, stop_ids=()))))\n"
        "print(any(n.startswith(('components', 'flows', 'model.')) for n in sys.modules))\n"
        "print('jinja2' in sys.modules)\n"  # conversations alone need it, and it would delay every first token
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["3", "False", "False"]
