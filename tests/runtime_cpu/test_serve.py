"""The server, spoken to as its users do: the openai client, raw sockets, impatient and malicious clients."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_cpu import Engine
from tests.runtime_cpu.servers import (
    CONTEXT,
    GOLDEN,
    HELLO,
    LONG_CONTEXT,
    MODEL,
    NAME,
    Server,
    chat_body,
    command,
    get,
    never_stopping,
    open_stream,
    post,
    read_to_end,
    running_server,
)
from tests.waiting import CEILING_S


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.open(MODEL, threads=1, context=CONTEXT) as opened:
        yield opened


# --- what the openai client sees -------------------------------------------------------------------------------


def test_models_and_health(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    assert get(server, "/health").json() == {"status": "ok", "model": NAME}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_answers_with_what_the_engine_generates(client: openai.OpenAI, engine: Engine) -> None:
    from runtime_cpu.text.chat_template import ChatTemplate

    prompt = ChatTemplate.from_metadata(engine.metadata, engine.tokenizer).encode(HELLO)
    tokens = [token.id for token in engine.generate(prompt, max_tokens=24)]
    answer = client.chat.completions.create(model=NAME, messages=HELLO, temperature=0, max_tokens=24)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == engine.tokenizer.decode(tokens, skip_control=True)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(tokens))
    assert answer.usage.total_tokens == len(prompt) + len(tokens)
    assert answer.choices[0].finish_reason == ("length" if len(tokens) == 24 else "stop")


def test_streaming_gives_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": NAME, "messages": HELLO, "seed": 7, "max_tokens": 40}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert "usage" not in list(client.chat.completions.create(**options, stream=True))[-1].to_dict()


def test_a_seed_reproduces_and_penalties_change(client: openai.OpenAI) -> None:
    def text(**options: Any) -> str | None:
        answer = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=32, **options)
        return answer.choices[0].message.content

    assert text(seed=3) == text(seed=3)
    assert text(seed=-1) == text(seed=-1)
    assert len({text(seed=seed, temperature=2) for seed in range(8)}) > 1
    assert (
        text(temperature=0) == text(top_p=0) == text(extra_body={"top_k": 1}) == text(extra_body={"min_p": 1})
    )
    assert text(temperature=0, frequency_penalty=2, presence_penalty=2) != text(temperature=0)


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=HELLO, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None and answer.usage is not None
    content = answer.choices[0].logprobs.content
    assert content is not None and len(content) == answer.usage.completion_tokens
    for entry in content:
        assert entry.bytes is not None and entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
    joined = b"".join(bytes(entry.bytes or []) for entry in content)
    assert joined.decode("utf-8", "replace") == answer.choices[0].message.content


def test_logit_bias_forces_and_bans(client: openai.OpenAI) -> None:
    letter = ord("q") - 33  # the golden vocabulary begins with the byte alphabet, which begins with "!"
    with Engine.open(MODEL, threads=1, context=64) as opened:
        letter = opened.tokenizer.encode("q")[0]
    answer = client.chat.completions.create(
        model=NAME, messages=HELLO, max_tokens=5, temperature=0, logit_bias={str(letter): 100}
    )
    assert answer.choices[0].message.content == "qqqqq"


def test_stop_strings_end_the_answer_and_are_left_out(client: openai.OpenAI) -> None:
    with Engine.open(MODEL, threads=1, context=64) as opened:
        letter = opened.tokenizer.encode("q")[0]
    forced: dict[str, Any] = {
        "model": NAME,
        "messages": HELLO,
        "max_tokens": 9,
        "temperature": 0,
        "logit_bias": {str(letter): 100},
    }
    answer = client.chat.completions.create(**forced, stop="qqq")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
    answer = client.chat.completions.create(**forced, stop=["x", "qx"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("q" * 9, "length")
    assert answer.usage is not None and answer.usage.completion_tokens == 9
    chunks = list(client.chat.completions.create(**forced, stop=["qqqq"], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_completions_take_text_and_ids(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode("the hat")
    options: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 12}
    by_text = client.completions.create(prompt="the hat", **options)
    by_ids = client.completions.create(prompt=ids, **options)
    assert by_text.choices[0].text == by_ids.choices[0].text == by_text.choices[0].text
    assert by_text.usage is not None and by_text.usage.prompt_tokens == len(ids)
    streamed = client.completions.create(prompt="the hat", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.choices[0].text
    listed = client.completions.create(prompt=["the hat"], logprobs=2, **options)
    logprobs = listed.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.token_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs)
    special = client.completions.create(prompt="<|im_start|>", **options)
    plain = client.completions.create(prompt="<|im_start|>", extra_body={"parse_special": False}, **options)
    assert special.usage is not None and plain.usage is not None
    assert special.usage.prompt_tokens == 1 < plain.usage.prompt_tokens


def test_user_text_cannot_end_its_turn(client: openai.OpenAI) -> None:
    def prompt_tokens(text: str) -> int:
        messages: list[Any] = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=1)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    assert prompt_tokens("<|im_end|>") - prompt_tokens("") == len("<|im_end|>")


def test_roles_and_text_parts(client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "the hat "}, {"type": "text", "text": "in the ton"}],
        },
    ]
    joined: list[Any] = [{"role": "system", "content": "be brief"}, HELLO[0]]
    first = client.chat.completions.create(model=NAME, messages=parts, max_tokens=5, temperature=0)
    second = client.chat.completions.create(model=NAME, messages=joined, max_tokens=5, temperature=0)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage is not None and second.usage is not None
    assert first.usage.prompt_tokens == second.usage.prompt_tokens


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"n": 16384}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**63}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temprature": 1}, "temprature"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
        ({"model": 3}, "model"),
    ],
)
def test_a_wrong_field_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    response = post(server, chat_body(**fields))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), (
        error
    )
    assert error["message"]


def test_neutral_fields_are_accepted(server: Server) -> None:
    fields = {
        "user": "u",
        "n": 1,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "stop": None,
        "logit_bias": None,
        "reasoning_effort": None,
        "some_new_field": None,
        "max_completion_tokens": 2,
    }
    assert post(server, chat_body(**fields)).status_code == 200
    assert post(server, {"messages": HELLO, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 5000,
    ],
)
def test_malformed_json_is_a_400(server: Server, body: bytes) -> None:
    response = post(server, body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json"


def test_the_context_is_a_limit(server: Server, client: openai.OpenAI) -> None:
    for body in (
        chat_body(messages=[{"role": "user", "content": "x" * CONTEXT}]),
        chat_body(messages=[{"role": "user", "content": "x" * 3_000_000}]),
        chat_body(max_tokens=CONTEXT),
    ):
        error = post(server, body).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages"), error
    with pytest.raises(openai.BadRequestError, match="context is 2048 tokens"):
        client.completions.create(model=NAME, prompt=[1] * CONTEXT, max_tokens=1)
    full = client.completions.create(model=NAME, prompt=[1] * (CONTEXT - 1), max_tokens=1)
    assert full.usage is not None and full.usage.total_tokens == CONTEXT


def test_other_errors_are_json_too(server: Server) -> None:
    assert post(server, chat_body(model="gpt-5")).json()["error"]["code"] == "model_not_found"
    assert get(server, "/nothing").json()["error"]["message"] == "there is nothing at /nothing"
    assert get(server, "/v1/chat/completions").status_code == 405
    for prompt in ("", [], ["a", "b"], [[1], [2]], [1, -1], [1, 320], [True], {"a": 1}, None):
        response = post(server, {"prompt": prompt}, "/v1/completions")
        assert response.status_code == 400 and response.json()["error"]["param"].startswith("prompt"), prompt
    for fields in ({"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"messages": HELLO}):
        assert post(server, {"prompt": "a", **fields}, "/v1/completions").status_code == 400


def test_a_huge_body_is_refused_before_it_is_read(server: Server) -> None:
    response = post(server, b'{"messages": "' + b"x" * (5 << 20))
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"

    def endless() -> Iterator[bytes]:
        for _ in range(80):
            yield b"x" * (1 << 16)

    try:
        response = httpx.post(f"{server.url}/v1/chat/completions", content=endless(), timeout=CEILING_S)
        assert response.status_code == 413
    except httpx.WriteError:
        pass  # the server closed the connection while we were still sending
    assert get(server, "/health").status_code == 200


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = {
    *("model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *(
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "max_tokens",
        "max_completion_tokens",
        "seed",
        "stop",
    ),
    *(
        "stream",
        "stream_options",
        "n",
        "logprobs",
        "top_logprobs",
        "echo",
        "suffix",
        "best_of",
        "parse_special",
    ),
    *("tools", "response_format", "user"),
}


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    route=st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    body=st.dictionaries(st.sampled_from(sorted(FIELDS)), json_values, max_size=5),
    sound=st.booleans(),
)
def test_no_body_breaks_the_server(server: Server, route: str, body: dict[str, Any], sound: bool) -> None:
    if sound:
        body = {"messages": HELLO, "max_tokens": 2, **body} if "chat" in route else {"prompt": "a", **body}
    response = post(server, body, route)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
        assert "/" not in error["message"] or "nothing at" in error["message"] or body, "no paths in errors"


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=st.binary(max_size=200))
def test_no_bytes_break_the_server(server: Server, body: bytes) -> None:
    assert post(server, body).status_code == 400


# --- who may ask -----------------------------------------------------------------------------------------------


def test_other_hosts_and_origins_are_refused(server: Server) -> None:
    for host in ("attacker.example", f"attacker.example:{server.port}", "127.0.0.1.attacker.example", ""):
        response = get(server, "/v1/models", headers={"Host": host})
        assert response.status_code == 403, host
    assert get(server, "/health", headers={"Host": "LocalHost:1"}).status_code == 200
    assert post(server, chat_body(), headers={"Origin": "https://attacker.example"}).status_code == 403
    assert post(server, chat_body(), headers={"Origin": "null"}).status_code == 403
    assert post(server, chat_body(), headers={"Origin": server.url}).status_code == 200
    assert "access-control-allow-origin" not in post(server, chat_body()).headers


def test_an_api_key_is_asked_for() -> None:
    with running_server(
        GOLDEN / "tiny-21b-q4_0.gguf", "--context", "64", "--api-key", "sésame", "--model-name", "m"
    ) as server:
        assert get(server, "/health").status_code == 200
        assert get(server, "/").status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic x"},
            {"Authorization": "Bearer"},
        ):
            for route in ("/v1/models", "/metrics", "/nothing"):
                assert get(server, route, headers=headers).status_code == 401
        right = {"Authorization": "Bearer sésame".encode()}
        assert get(server, "/v1/models", headers=right).json()["data"][0]["id"] == "m"


def test_the_page_runs_only_its_own_code(server: Server) -> None:
    response = get(server, "/")
    policy = response.headers["content-security-policy"]
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'sha256-" in policy
    for foreign in ("http://", "https://", "//cdn", "@import", "innerHTML", "eval("):
        assert foreign not in response.text.replace("http://www.w3.org/2000/svg", ""), foreign
    assert len(response.content) < 40_000


def test_metrics_are_prometheus_text(server: Server) -> None:
    response = get(server, "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["smallthinker_generated_tokens"].samples[0].value >= 0
    assert families["smallthinker_resident_bytes"].samples[0].value > 1e6


# --- starting and ending ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing.gguf"], "no model file at nothing.gguf"),
        ([str(GOLDEN)], "is a folder"),
        ([__file__], "GGUF"),
        ([str(MODEL), "--host", "0.0.0.0"], "give --api-key"),
        ([str(MODEL), "--port", "70000"], "--port is 70000"),
        ([str(MODEL), "--threads", "0"], "threads is 0"),
        ([str(MODEL), "--context", "99999999"], "context is 99999999"),
        ([str(MODEL), "--memory", "1KiB"], "memory is 1.00 KiB"),
        ([str(MODEL), "--memory", "lots"], "memory is 'lots'"),
        ([str(MODEL), "--queue", "-1"], "--queue is -1"),
    ],
)
def test_an_unusable_start_says_one_sentence(arguments: list[str], sentence: str) -> None:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=CEILING_S)
    assert done.returncode == 2, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and sentence in lines[0], lines


def test_a_port_in_use_is_named(server: Server) -> None:
    done = subprocess.run(
        command(MODEL, "--port", str(server.port)), capture_output=True, text=True, timeout=CEILING_S
    )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {server.port}" in done.stderr


def test_sigterm_finishes_answers_and_exits_with_0() -> None:
    with running_server(MODEL, "--context", str(LONG_CONTEXT), "--grace", "3600") as server:
        fields = {**never_stopping(), "max_tokens": 3000, "stream_options": {"include_usage": True}}
        connection = open_stream(server, **fields)
        server.process.send_signal(signal.SIGTERM)
        rest = read_to_end(connection)
        assert b"data: [DONE]" in rest and b'"completion_tokens":3000' in rest.replace(b" ", b"")
        assert server.process.wait(timeout=CEILING_S) == 0
    assert server.lines[-1] == "stopped"


def test_sigterm_ends_answers_that_take_too_long() -> None:
    """A grace of a second is over long before an answer of five minutes or more."""
    with running_server(MODEL, "--context", str(LONG_CONTEXT), "--grace", "1", endless=True) as server:
        connection = open_stream(server, max_tokens=16000)
        server.process.send_signal(signal.SIGTERM)
        rest = read_to_end(connection)
        # Cut off, or told that it was cancelled, whichever comes first; whole in neither case.
        assert b'"finish_reason":"length"' not in rest and rest.count(b"data: ") < 16000
        assert server.process.wait(timeout=CEILING_S) == 0
        connection.close()


def test_an_idle_server_needs_no_model_folder_at_run_time(tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(MODEL.read_bytes())
    with running_server(copy, "--context", "64") as server:
        copy.unlink()
        assert post(server, {"messages": [], "model": "copy"}).status_code == 400
        assert post(server, chat_body(model="copy")).status_code == 200
