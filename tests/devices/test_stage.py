"""The benchmark stage on a random model that our own exporter wrote: real engine, real torch, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from components.artifacts import StageContext, StageError
from components.corpus.shards import TokenShards
from components.devices import BenchmarkConfig, run
from components.devices import stage as stage_module
from components.devices.logit_comparison import compare_logits
from components.devices.matrix import DeviceUnavailable, read_matrix
from components.export.gguf_file import write_gguf
from components.export.vocabulary import read_vocabulary
from model import OfficialCheckpoint, SmallThinkerConfig, SmallThinkerForCausalLM
from tests.freezing import await_frozen
from tests.runtime_cpu.gguf_vocabulary import CORPUS, train
from tests.waiting import CEILING_S

PROJECT = Path(__file__).resolve().parents[2]
VOCAB = 704
SMALL = {
    "runs": 1,
    "prompt_tokens": 16,
    "decode_tokens": 4,
    "heldout_tokens": 512,
    "window_tokens": 64,
    "check_tokens": 128,
}


def write_shard(folder: Path, category: str, documents: list[list[int]]) -> dict[str, Any]:
    tokens = np.concatenate([np.array(document, "<u2") for document in documents])
    name = f"shards/heldout/{category}/00000.ds"
    (folder / name).parent.mkdir(parents=True)
    tokens.tofile(folder / name)
    np.cumsum([len(document) for document in documents]).astype("<u8").tofile(folder / f"{name}.index")
    return {"tokens": len(tokens), "documents": len(documents), "bytes": len(tokens) * 2, "files": [name]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artefacts")
    tokenizer = train()
    end = tokenizer.token_to_id("<|endoftext|>")
    torch.manual_seed(0)
    config = SmallThinkerConfig(
        hidden_size=64,
        num_hidden_layers=4,
        rope_layout=[0, 1, 1, 1],
        sliding_window_layout=[0, 1, 1, 1],
        sliding_window_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        moe_num_primary_experts=4,
        moe_num_active_primary_experts=2,
        moe_primary_router_apply_softmax=True,
        moe_ffn_hidden_size=64,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    network = SmallThinkerForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # logits far from uniform, as a trained model's
    network.save_pretrained(folder / "merge" / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(
        folder / "tokenize" / "tokenizer"
    )
    vocabulary = read_vocabulary(folder / "tokenize" / "tokenizer", VOCAB)
    kinds = ("f32", "f16", "q4_0")
    paths = {kind: folder / "export" / "gguf" / f"toy-{kind}.gguf" for kind in kinds}
    write_gguf(OfficialCheckpoint(folder / "merge" / "model"), paths, "toy", vocabulary)
    documents = [[*tokenizer.encode(text).ids, end] for text in CORPUS]
    index = {
        "dtype": "uint16",
        "vocab_size": VOCAB,
        "eos_id": end,
        "splits": {
            "heldout": {
                "general": write_shard(folder / "tokenize", "general", documents),
                "code": write_shard(folder / "tokenize", "code", documents[:9]),
            }
        },
    }
    (folder / "tokenize" / "index.json").write_text(json.dumps(index))
    return {name: folder / name for name in ("export", "merge", "tokenize")}


def context(inputs: dict[str, Path], out: Path, **config: Any) -> StageContext:
    out.mkdir(exist_ok=True)
    return StageContext("benchmark", "toy", {**SMALL, **config}, inputs, out, out)


@pytest.fixture(scope="module")
def finished(
    inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, float], Path]:
    out = tmp_path_factory.mktemp("benchmark")
    return run(context(inputs, out)), out


def test_the_stage_measures_everything(
    inputs: dict[str, Path], finished: tuple[dict[str, float], Path]
) -> None:
    metrics, out = finished
    bench = json.loads((out / "bench.json").read_text())
    assert metrics["logits_error_against_torch"] < 1e-4
    assert bench["logits_against_torch"]["same_choice"] == 1.0
    assert bench["logits_against_torch"]["tokens"] == 128
    assert metrics["q4_0_decode_tokens_per_s"] > 0
    assert metrics["f16_perplexity"] == pytest.approx(metrics["f32_perplexity"], rel=0.02)
    assert metrics["q4_0_perplexity_increase"] == pytest.approx(
        metrics["q4_0_perplexity"] / metrics["f32_perplexity"] - 1
    )
    rows = bench["devices"]
    assert {(row["device"], row["type"]) for row in rows} == {("local", "f16"), ("local", "q4_0")}
    for row in rows:
        assert row["decode_tokens_per_s_low"] <= row["decode_tokens_per_s"] <= row["decode_tokens_per_s_high"]
        assert row["peak_memory_bytes"] > 10 << 20 and row["first_token_s"] > 0 and row["perplexity"] > 1
        assert row["file_bytes"] == (inputs["export"] / "gguf" / row["file"]).stat().st_size
    assert {row["threads"] for row in rows} >= {1}
    assert bench["machines"]["raspberry-pi-5"]["status"] == "not run: not asked for"
    assert bench["machines"]["local"]["status"] == "measured"
    assert sum(bench["perplexity"]["by_category"].values()) <= 512
    png = (out / "bench.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_perplexity_equals_torch(inputs: dict[str, Path], finished: tuple[dict[str, float], Path]) -> None:
    metrics, _ = finished
    tokens, _ = stage_module.heldout_tokens(TokenShards.open(inputs["tokenize"]), 512, 64)
    network = SmallThinkerForCausalLM.from_pretrained(inputs["merge"] / "model", dtype=torch.float32)
    nats = []
    with torch.inference_mode():
        for start in range(0, len(tokens), 64):
            part = torch.tensor(tokens[start : start + 64].astype(np.int64))
            logits = network(input_ids=part[None]).logits[0, :-1].double()
            nats.append(torch.nn.functional.cross_entropy(logits, part[1:], reduction="none"))
    assert metrics["f32_perplexity"] == pytest.approx(float(torch.cat(nats).mean().exp()), rel=1e-5)


def test_a_killed_stage_goes_on_where_it_was(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    program = (
        "import sys, json\nfrom pathlib import Path\nfrom components.artifacts import StageContext\n"
        "from components.devices import run\n"
        "from tests.freezing import freeze_when\n"
        "inputs = {k: Path(v) for k, v in json.loads(sys.argv[1]).items()}\n"
        "out = Path(sys.argv[2])\n"
        "freeze_when(lambda: (out / '.work/agreement.json').exists())\n"
        "run(StageContext('benchmark', 'toy', json.loads(sys.argv[3]), inputs, out, out))\n"
    )
    roles = json.dumps({role: str(path) for role, path in inputs.items()})
    child = subprocess.Popen(
        [sys.executable, "-c", program, roles, str(out), json.dumps(SMALL)],
        cwd=PROJECT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    marker = out / ".work" / "agreement.json"
    await_frozen(child.pid, lambda: child.poll() is None)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (out / "bench.json").exists()
    first = marker.stat().st_mtime_ns
    metrics = run(context(inputs, out))
    assert marker.stat().st_mtime_ns == first, "what was known is not computed again"
    assert metrics["q4_0_decode_tokens_per_s"] > 0


def test_logits_of_other_weights_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    network = SmallThinkerForCausalLM.from_pretrained(inputs["merge"] / "model", dtype=torch.float32)
    with torch.no_grad():
        network.get_input_embeddings().weight[5] += 0.01
    network.save_pretrained(tmp_path / "merge" / "model")
    with pytest.raises(StageError, match=r"F32 logits are .* from torch's"):
        run(context({**inputs, "merge": tmp_path / "merge"}, tmp_path / "out"))


def test_a_costly_quantisation_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    export = tmp_path / "export" / "gguf"
    export.mkdir(parents=True)
    for path in (inputs["export"] / "gguf").iterdir():
        (export / path.name).symlink_to(path)
    random = tmp_path / "random" / "model"
    torch.manual_seed(9)
    other = SmallThinkerForCausalLM(SmallThinkerForCausalLM.from_pretrained(inputs["merge"] / "model").config)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    other.save_pretrained(random)
    (export / "toy-q4_0.gguf").unlink()
    vocabulary = read_vocabulary(inputs["tokenize"] / "tokenizer", VOCAB)
    write_gguf(OfficialCheckpoint(random), {"q4_0": export / "toy-q4_0.gguf"}, "toy", vocabulary)
    with pytest.raises(StageError, match="Q4_0 raises the perplexity by"):
        run(context({**inputs, "export": tmp_path / "export"}, tmp_path / "out", check_tokens=0))


def test_missing_inputs_are_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(StageError, match="holds no gguf"):
        run(context({**inputs, "export": empty}, tmp_path / "out"))
    with pytest.raises(StageError, match=r"index.json"):
        run(context({**inputs, "tokenize": empty}, tmp_path / "out"))
    with pytest.raises(StageError, match=r"benchmark.devices names moon"):
        run(context(inputs, tmp_path / "out", devices=["moon"]))
    with pytest.raises(StageError, match=r"benchmark.runs = 0"):
        run(context(inputs, tmp_path / "out", runs=0))
    with pytest.raises(StageError, match="do not fit into the model's context"):
        run(context(inputs, tmp_path / "out", prompt_tokens=5000))


def test_a_torn_file_is_one_error(inputs: dict[str, Path], tmp_path: Path) -> None:
    export = tmp_path / "export" / "gguf"
    export.mkdir(parents=True)
    for path in (inputs["export"] / "gguf").iterdir():
        (export / path.name).write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(StageError, match=r"toy-f32.gguf with code 2"):
        run(context({**inputs, "export": tmp_path / "export"}, tmp_path / "out"))


def device_table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    return path


LOCAL = (PROJECT / "infra/devices/matrix.toml").read_text().split("[[device]]")[1]


def test_other_devices_run_or_say_why_not(inputs: dict[str, Path], tmp_path: Path) -> None:
    """A second device that is this machine reached through a shell, and two that are not there."""
    matrix = device_table(
        tmp_path,
        f'''[[device]]{LOCAL}
[[device]]
name = "board"
description = "reached through a shell"
folder = "{tmp_path}/board"
host = "here"
probe = "mkdir -p {{folder}}"
probe_timeout_s = {CEILING_S}
copy_model = "cp {{model}} {{folder}}/{{file}}"
bench = """env BOARD={{host}} {{python}} -m runtime_cpu.bench {{folder}}/{{file}} --threads 1 --json - \\
  --runs {{runs}} --prompt {{prompt}} --decode {{decode}}"""
[[device]]
name = "away"
description = "does not answer"
probe = "false"
bench = "true"
[[device]]
name = "mute"
description = "answers nonsense"
bench = "echo hello"
''',
    )
    made = context(
        inputs,
        tmp_path / "out",
        matrix=str(matrix),
        devices=["local", "board", "away", "mute"],
        check_tokens=0,
    )
    run(made)
    bench = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {row["device"] for row in bench["devices"]} == {"local", "board"}
    assert bench["machines"]["away"]["status"].startswith("not run: probe failed with code 1")
    assert bench["machines"]["mute"]["status"].startswith("not run: bench printed no report")
    assert len(made.notes) == 2 and made.notes[0].startswith("away not run")


def test_a_device_that_failed_is_asked_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    matrix = device_table(
        tmp_path,
        f'''[[device]]
name = "local"
description = "here, once there is a file"
bench = """sh -c 'cat {tmp_path}/there >&2 && {{python}} -m runtime_cpu.bench {{model}} --threads 1 --json - \
  --runs {{runs}} --prompt {{prompt}} --decode {{decode}}'"""
''',
    )
    out = tmp_path / "out"
    values: dict[str, Any] = {"matrix": str(matrix), "devices": ["local"], "check_tokens": 0}
    with pytest.raises(StageError, match="could not be measured here: bench failed with code 1"):
        run(context(inputs, out, **values))
    (tmp_path / "there").touch()
    run(context(inputs, out, **values))
    assert json.loads((out / "bench.json").read_text())["machines"]["local"]["status"] == "measured"


def test_the_committed_matrix_is_sound() -> None:
    devices = read_matrix(PROJECT / "infra/devices/matrix.toml")
    assert next(iter(devices)) == "local" and len(devices) > 2
    missing = devices["raspberry-pi-5"].model_copy(update={"probe": "no-such-command-here {host}"})
    with pytest.raises(DeviceUnavailable, match="no command 'no-such-command-here'"):
        missing.measure(Path("x.gguf"), runs=1, prompt_tokens=1, decode_tokens=1, timeout_s=CEILING_S)
    slow = devices["local"].model_copy(update={"probe": "sleep 3600", "probe_timeout_s": 0.1})
    with pytest.raises(DeviceUnavailable, match=r"did not end within 0.1 s"):
        slow.measure(Path("x.gguf"), runs=1, prompt_tokens=1, decode_tokens=1, timeout_s=CEILING_S)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "device: Field required"),
        ("[[device]]\nname = 'a'", "device.0.description"),
        ("[[device]]\nname = 'A b'\ndescription = ''\nbench = ''", "device.0.name"),
        ("[[device]]\nname = 'a'\ndescription = ''\nbench = '{nothing}'", "malformed"),
        ("[[device]]\nname = 'a'\ndescription = ''\nbench = \"'\"", "malformed"),
        ("[[device]]\nname = 'a'\ndescription = ''\nbench = 'x'\ncolour = 1", "device.0.colour"),
        ("[[device]\n", "not valid TOML"),
        (
            "[[device]]\nname='a'\ndescription=''\nbench=''\n[[device]]\nname='a'\ndescription=''\nbench=''",
            "twice",
        ),
    ],
)
def test_a_malformed_matrix_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        read_matrix(device_table(tmp_path, text))


def test_a_missing_matrix_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="cannot be read"):
        read_matrix(tmp_path / "nothing.toml")


def test_comparison_of_logits() -> None:
    theirs = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    assert compare_logits(theirs, theirs).max_row_error == 0
    ours = theirs.copy()
    ours[2] *= 1.01
    assert compare_logits(ours, theirs).max_row_error == pytest.approx(0.01, rel=1e-3)
    ours[2, 3] = np.nan
    assert compare_logits(ours, theirs).max_row_error == np.inf
    with pytest.raises(StageError, match="logits of shape"):
        compare_logits(ours[:, :6], theirs)


def test_the_default_config_is_nano() -> None:
    config = BenchmarkConfig()
    assert config.devices == ("local",) and config.max_logits_error == 1e-4
