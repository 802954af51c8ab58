"""Hugging Face folders: the same model as the trainer's export writes; damaged ones refused with one sentence."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from runtime_cpu import Engine, pack
from runtime_cpu.bench import main as bench_main
from runtime_cpu.inspect import main as inspect_main
from runtime_cpu.quantiser import WeightError, encode, to_float32
from tests.freezing import await_frozen
from tests.runtime_cpu import gguf_vocabulary
from tests.runtime_cpu.small_folders import (
    CONFIG,
    VOCAB,
    random_tensors,
    stored,
    write_folder,
    write_tokenizer,
)
from tests.waiting import CEILING_S

GOLDEN = Path(__file__).parent.parent / "golden" / "hf"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ONE_FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder with a tokenizer, which tests copy before they bend it."""
    path = write_folder(tmp_path_factory.mktemp("folder") / "toy")
    write_tokenizer(path, gguf_vocabulary.train(), chat_template=TEMPLATE)
    return path


@pytest.fixture
def bent(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "bent"))


def convert(source: Path, target: Path, kind: str) -> Path:
    assert pack.main([str(source), str(target), "--type", kind, "--layout", "stock"]) == 0
    return target


# --- the same model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-4b", "tiny-21b"])
def test_a_golden_folder_gives_its_logits(name: str, tmp_path: Path) -> None:
    path = convert(GOLDEN / name, tmp_path / "m.gguf", "f32")
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with Engine.open(path, threads=2) as engine:
        assert engine.info.tied_embeddings == (name == "tiny-4b")
        for ids, logits in zip(expected["input_ids"], expected["logits"], strict=True):
            np.testing.assert_allclose(engine.logits(ids), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_tensor_is_quantised_as_the_gguf_package_does(dtype: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "toy", dtype=dtype)
    held = random_tensors(CONFIG, dtype)
    storage = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[dtype]
    for kind in ("Q4_0", "Q8_0", "F16"):
        path = convert(source, tmp_path / f"{kind}.gguf", kind.lower())
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        for gguf_name, name in (
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.3.attn_output.weight", "model.layers.3.self_attn.o_proj.weight"),
        ):
            _, shape, data = held[name]
            values = to_float32(np.frombuffer(data, storage), dtype).reshape(shape)
            expected = quants.quantize(values, GGMLQuantizationType[kind])
            assert np.array_equal(tensors[gguf_name].data, expected)
        down = tensors["blk.2.ffn_down_exps.weight"].data
        for expert in range(CONFIG["moe_num_primary_experts"]):
            _, shape, data = held[f"model.layers.2.block_sparse_moe.experts.{expert}.down.weight"]
            values = to_float32(np.frombuffer(data, storage), dtype).reshape(shape)
            assert np.array_equal(down[expert], quants.quantize(values, GGMLQuantizationType[kind]))
        kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
        assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"


FINITE = {"min_value": -1000, "max_value": 1000, "width": 32}


@settings(max_examples=150, deadline=None)
@given(
    values=hnp.arrays(
        np.float32,
        (7, 32),
        elements=st.floats(**FINITE) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 1e-39, 3e-41]),
    ),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
)
@example(values=np.tile(np.float32([1e-44, -1e-44] * 16), (7, 1)), dtype="F32")  # no scale has an inverse
@example(values=np.tile(np.float32([-127, 63.5, 0.5, -0.5] * 8), (7, 1)), dtype="F32")  # halves
def test_quantised_blocks_are_the_reference_s(values: np.ndarray, dtype: str) -> None:
    raw = np.frombuffer(stored(values, dtype), {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[dtype])
    exact = to_float32(raw, dtype).reshape(values.shape)
    for kind in ("Q4_0", "Q8_0"):
        with np.errstate(all="ignore"):
            expected = quants.quantize(exact, GGMLQuantizationType[kind])
        assert np.array_equal(encode(raw, dtype, kind), expected.ravel())


def test_weights_that_a_type_cannot_hold_are_refused() -> None:
    block = np.ones(64, np.float32)
    for value, kind, message in (
        (np.nan, "F32", "no finite"),
        (np.inf, "F16", "no finite"),
        (np.nan, "Q4_0", "no finite"),
        (-np.inf, "Q8_0", "no finite"),
        (1e6, "F16", "too large for F16"),
        (1e6, "Q4_0", "too large for Q4_0"),
        (1e8, "Q8_0", "too large for Q8_0"),
    ):
        block[40] = value
        with pytest.raises(WeightError, match=message):
            encode(block, "F32", kind)


def test_shards_links_and_threads_change_nothing(folder: Path, bent: Path, tmp_path: Path) -> None:
    (bent / ONE_FILE).unlink()
    write_folder(bent, shards=5)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(bent.glob("*.safetensors"))):  # as a hub's cache has them
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    whole = convert(folder, tmp_path / "whole.gguf", "q4_0").read_bytes()
    assert convert(bent, tmp_path / "sharded.gguf", "q4_0").read_bytes() == whole
    pack.pack_folder(bent, tmp_path / "threads.gguf", layout="stock", threads=7)
    assert (tmp_path / "threads.gguf").read_bytes() == whole


def test_a_folder_packs_to_what_its_stock_file_packs_to(folder: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps({"expert_counts": [[1, 5, 2, 9]] * CONFIG["num_hidden_layers"]}))
    stock = convert(folder, tmp_path / "stock.gguf", "q4_0")
    for arguments in ([], ["--stats", str(stats)]):
        assert pack.main([str(stock), str(tmp_path / "two.gguf"), *arguments]) == 0
        assert pack.main([str(folder), str(tmp_path / "one.gguf"), *arguments]) == 0
        assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))
    with Engine.open(tmp_path / "one.gguf") as engine, Engine.open(stock) as other:
        assert engine.info.name == "toy"
        np.testing.assert_allclose(engine.logits([1, 2, 3]), other.logits([1, 2, 3]), rtol=0, atol=5e-3)


# --- the tokenizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_the_tokenizer_travels_along(plain: bool, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "toy")
    original = gguf_vocabulary.train()
    write_tokenizer(source, original, plain)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    with Engine.open(convert(source, tmp_path / "m.gguf", "q8_0")) as engine:
        tokenizer = engine.tokenizer
        for text in gguf_vocabulary.CORPUS[:4]:
            assert tokenizer.encode(text) == original.encode(text).ids
        assert tokenizer.vocab_size == VOCAB > original.get_vocab_size()
        assert tokenizer.control_tokens.keys() == set(gguf_vocabulary.CONTROL)
        assert tokenizer.decode([tokenizer.eos_id]) == "<|im_end|>"
        assert engine.render_chat([{"role": "user", "content": "Hi"}]).startswith("<|im_start|>user\nHi")


def test_what_the_file_cannot_say_is_a_warning(bent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bent / "generation_config.json").write_text('{"eos_token_id": [492, 7]}')
    convert(bent, bent / "m.gguf", "f16")
    assert "end an answer too: 1 ('\"'), 7 (" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bent / name).unlink()
    convert(bent, bent / "m.gguf", "f16")
    assert "token ids only" in capsys.readouterr().err


# --- the command -------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = convert(folder, tmp_path / "stock.gguf", "q4_0")
    stats = tmp_path / "stats.json"
    stats.write_text('{"expert_counts": [[1]]}')
    capsys.readouterr()
    out = tmp_path / "x.gguf"
    for arguments, message in (
        ([folder, out, "--type", "q8_0"], "choose --type q4_0 or --layout stock"),
        ([folder, out, "--layout", "stock", "--stats", stats], "no such order"),
        ([folder, out, "--stats", stats], "the model has 4 layers of 4 experts"),
        ([folder, tmp_path / "none" / "x.gguf"], "No such file"),
        ([folder, tmp_path], "is a folder; name the file"),
        ([folder, out, "--threads", "0"], "--threads is 0"),
        ([stock, out, "--type", "q4_0"], "a GGUF file keeps its types"),
        ([tmp_path / "none", out], "no model file"),
    ):
        assert pack.main(list(map(str, arguments))) == 2
        assert message in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert pack.main([str(folder), str(out)]) == 2
    assert "1000 bytes are free" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_folder_is_not_run_and_the_message_says_what_to_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"python -m runtime_cpu.pack {folder} toy.gguf"
    with pytest.raises(FileNotFoundError, match="packed first") as refused:
        Engine.open(folder)
    assert command in str(refused.value)
    for main in (inspect_main, bench_main):
        assert main([str(folder)]) == 2
        assert command in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="give the GGUF file in it"):
        Engine.open(tmp_path)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 MB in four files, most of it in the embedding and the head."""
    wide = {
        "hidden_size": 1024, "num_hidden_layers": 2, "rope_layout": [0, 1], "sliding_window_layout": [0, 1],
        "moe_ffn_hidden_size": 256, "num_attention_heads": 8, "head_dim": 128, "vocab_size": 50000,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("larger") / "wide"
    write_folder(folder, {**CONFIG, **wide}, shards=4)
    yield folder
    shutil.rmtree(folder)


def end_once_there_is(name: str, source: Path, target: Path, number: signal.Signals) -> int:
    """Start the command, send the signal once it has written a file of this name, and return its exit code."""
    frozen = ["tests.freezing", str(target.parent), name]
    process = subprocess.Popen(
        [sys.executable, "-m", *frozen, "runtime_cpu.pack", str(source), str(target)],
        stderr=subprocess.DEVNULL,
    )
    await_frozen(process.pid, lambda: process.poll() is None)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    return process.wait(CEILING_S)


def test_an_interrupted_run_leaves_nothing_that_is_taken_for_a_model(
    larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.gguf"
    # Converted and not yet renamed, converted, and about to get its name.
    for name in ("..m.gguf.stock.partial", ".m.gguf.stock", ".m.gguf.partial"):
        for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
            assert end_once_there_is(name, larger, target, number) == code
            left = [path.name for path in tmp_path.iterdir()]
            assert (left == []) if number == signal.SIGTERM else (name in left and target.name not in left)
            for path in tmp_path.iterdir():
                path.unlink()
    # While it converts.
    command = [sys.executable, "-m", "tests.freezing", "--bytes", "10000000", "runtime_cpu.pack"]
    done = subprocess.run([*command, str(larger), str(target)], stderr=subprocess.DEVNULL, timeout=CEILING_S)
    assert done.returncode == -signal.SIGXFSZ and not target.exists()

    def interrupted(*_: object) -> None:
        assert (tmp_path / ".m.gguf.stock").is_file()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pack, "pack", interrupted)
        assert pack.main([str(larger), str(target)]) == 130
        assert not (tmp_path / ".m.gguf.stock").exists() and "interrupted" in capsys.readouterr().err
    assert pack.main([str(larger), str(target)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    with Engine.open(target, context=32) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()


# VmHWM: getrusage's maximum would begin with that of the process which started this one.
MEASURE = """
import sys
from pathlib import Path
from runtime_cpu import pack
def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) * 1024
before = peak()
assert pack.main(sys.argv[1:]) == 0
print(peak() - before)
"""


@pytest.mark.parametrize(("layout", "most"), [("stock", 50e6), ("packed", 100e6)])
def test_memory_does_not_grow_with_the_folder(larger: Path, tmp_path: Path, layout: str, most: float) -> None:
    """A head of 102 MB costs slices of some MB; packing it costs that matrix as Q4_0 (29 MB), at most twice."""
    arguments = [str(larger), str(tmp_path / "m.gguf"), "--threads", "2", "--layout", layout]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    assert 1e6 < int(done.stdout.splitlines()[-1]) < most
