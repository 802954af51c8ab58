"""The export stage on a small random model: what other programs read must be the model that was merged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from components.artifacts import StageContext, StageError
from components.export import run
from model import SmallThinkerConfig, SmallThinkerForCausalLM
from runtime_cpu import Engine
from tests.freezing import await_frozen
from tests.runtime_cpu.gguf_vocabulary import train

PROJECT = Path(__file__).resolve().parents[2]
VOCAB, LAYERS, EXPERTS = 704, 4, 4
TEXTS = ("The river is 12 km long.", "def f(x):\n    return x + 1", "山高水长，人间四月")
CONFIG: dict[str, Any] = {"max_position_embeddings": 512, "verify_tokens": 96}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = SmallThinkerConfig(
        hidden_size=64,
        num_hidden_layers=LAYERS,
        rope_layout=[0, 1, 1, 1],
        sliding_window_layout=[0, 1, 1, 1],
        sliding_window_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        moe_num_primary_experts=EXPERTS,
        moe_num_active_primary_experts=2,
        moe_primary_router_apply_softmax=True,
        moe_ffn_hidden_size=64,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    SmallThinkerForCausalLM(config).save_pretrained(folder / "merge/model")
    PreTrainedTokenizerFast(tokenizer_object=train(), eos_token="<|im_end|>").save_pretrained(
        folder / "tokenize/tokenizer"
    )
    (folder / "evaluate").mkdir()
    statistics = {
        "expert_frequency": [[0.5] * EXPERTS] * LAYERS,
        "neuron_sparsity": [[0.6] * EXPERTS] * LAYERS,
    }
    (folder / "evaluate/activation_stats.json").write_text(json.dumps(statistics))
    return {name: folder / name for name in ("merge", "evaluate", "tokenize")}


def context(inputs: dict[str, Path], out: Path, **config: Any) -> StageContext:
    out.mkdir(exist_ok=True)
    return StageContext("export", "toy", {**CONFIG, **config}, inputs, out, out)


@pytest.fixture(scope="module")
def exported(
    inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("export")
    return out, run(context(inputs, out))


@pytest.fixture(scope="module")
def expected(inputs: dict[str, Path]) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Token ids beyond the window's edge, and torch's logits [T, V]."""
    generator = np.random.default_rng(5)
    ids = generator.integers(0, VOCAB, 80).tolist()
    network = SmallThinkerForCausalLM.from_pretrained(inputs["merge"] / "model").eval()
    with torch.no_grad():
        return ids, network(torch.tensor([ids])).logits[0].numpy()


def test_the_official_folder_is_the_model_with_its_tokenizer(exported, inputs, expected) -> None:
    folder = exported[0] / "hf"
    ids, logits = expected
    network = SmallThinkerForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert np.array_equal(network(torch.tensor([ids])).logits[0].numpy(), logits)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "smallthinker" and config["max_position_embeddings"] == 512
    assert config["architectures"] == ["SmallThinkerForCausalLM"]
    mine, given = (AutoTokenizer.from_pretrained(path) for path in (folder, inputs["tokenize"] / "tokenizer"))
    for text in TEXTS:
        assert mine.encode(text) == given.encode(text)


@pytest.mark.parametrize(("kind", "median"), [("f32", 1e-5), ("f16", 2e-3), ("q4_0", 0.45)])
def test_the_engine_reads_every_gguf_file_as_the_same_model(exported, expected, kind, median) -> None:
    ids, logits = expected
    with Engine.open(exported[0] / f"gguf/toy-{kind}.gguf") as engine:
        found = engine.logits(ids)
    rows = np.linalg.norm(found - logits, axis=1) / np.linalg.norm(logits, axis=1)
    assert np.median(rows) < median
    assert kind == "f32" or np.median(rows) > median / 1000, "a rounded file cannot be exact"


def test_the_gguf_file_holds_its_tokenizer_and_statistics(exported, inputs) -> None:
    path = exported[0] / "gguf/toy-q4_0.gguf"
    reader = GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "smallthinker"
    assert reader.fields["smallthinker.expert_count"].contents() == EXPERTS
    assert reader.fields["smallthinker.context_length"].contents() == 512
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == "Q4_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == "Q8_0"
    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")
    with Engine.open(path) as engine:
        for text in TEXTS:
            assert list(engine.tokenizer.encode(text)) == tokenizer.encode(text)


def test_onnx_computes_the_same_for_other_shapes_than_it_was_traced_with(exported, expected) -> None:
    ids, logits = expected
    session = onnxruntime.InferenceSession(exported[0] / "onnx/model.onnx")
    names = [entry.name for entry in session.get_inputs()]
    for length in (1, 33, len(ids)):
        batch = np.array([ids[:length]], dtype=np.int64)
        feed = {"input_ids": batch, "attention_mask": np.ones_like(batch)}
        (found,) = session.run(None, {name: feed[name] for name in names})[:1]
        assert np.abs(found[0] - logits[:length]).max() < 1e-3


def test_the_report_says_what_was_measured(exported) -> None:
    out, metrics = exported
    report = json.loads((out / "verification.json").read_text())
    for name, entry in report["files"].items():
        data = (out / name).read_bytes()
        assert entry["bytes"] == len(data) and entry["sha256"] == hashlib.sha256(data).hexdigest()
    assert metrics["hf_logit_max_error"] == 0.0 and metrics["gguf_f32_weight_rms_error"] == 0.0
    assert 0.0 < metrics["gguf_f16_logit_row_error"] < metrics["gguf_q4_0_logit_row_error"]
    assert metrics["gguf_q4_0_bytes"] < metrics["gguf_f16_bytes"] < metrics["gguf_f32_bytes"]


def test_damaged_inputs_are_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    copies = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in inputs.items()}
    weights = copies["merge"] / "model/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1000])
    with pytest.raises(StageError, match=r"merged model cannot be read.*model\.safetensors"):
        run(context(copies, tmp_path / "out"))
    weights.write_bytes(data)
    statistics = copies["evaluate"] / "activation_stats.json"
    statistics.write_text(json.dumps({"expert_frequency": [[0.5] * 3] * LAYERS}))
    with pytest.raises(StageError, match="4 layers x 4 experts are needed"):
        run(context(copies, tmp_path / "out"))
    statistics.unlink()
    with pytest.raises(StageError, match=r"activation_stats\.json is missing"):
        run(context(copies, tmp_path / "out"))


DRIVER = """
import json, sys
from pathlib import Path
from components.artifacts import StageContext
from components.export import run
from tests.freezing import freeze_when
inputs, out, config = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
freeze_when(lambda: (out / "gguf").exists())
run(StageContext("export", "toy", config, {k: Path(v) for k, v in inputs.items()}, out, out))
"""


def test_a_killed_export_leaves_nothing_that_looks_whole_and_goes_on(
    exported, inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    arguments = [json.dumps({k: str(v) for k, v in inputs.items()}), str(out), json.dumps(CONFIG)]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments], cwd=PROJECT, env={**os.environ, "TQDM_DISABLE": "1"}
    )
    await_frozen(process.pid, lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "verification.json").exists()
    run(context(inputs, out))
    for path in sorted((exported[0] / "gguf").iterdir()):
        assert (out / "gguf" / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in (out / "gguf").iterdir()) == sorted(
        p.name for p in (exported[0] / "gguf").iterdir()
    )
