"""Untrusted folders: whatever is wrong in a file is refused with one sentence, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_cpu import pack
from runtime_cpu.checkpoint_files import MAX_HEADER_BYTES, CheckpointError, WeightFile
from runtime_cpu.huggingface import HuggingFaceFolder
from tests.runtime_cpu import gguf_vocabulary
from tests.runtime_cpu.small_folders import CONFIG, VOCAB, safetensors_bytes, write_folder, write_tokenizer

ONE_FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder with a tokenizer, which tests copy before they bend it."""
    path = write_folder(tmp_path_factory.mktemp("folder") / "toy")
    write_tokenizer(path, gguf_vocabulary.train())
    return path


@pytest.fixture
def bent(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "bent"))


def refusal(source: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        HuggingFaceFolder(source).close()
    message = str(refused.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": True}, "hidden_size is 'True'"),
        ({"hidden_size": 10**10}, "hidden_size is '10000000000'"),
        ({"hidden_size": 32}, "has the shape"),
        ({"num_hidden_layers": 5}, "sliding_window_layout is"),
        (
            {"num_hidden_layers": 3, "rope_layout": None, "sliding_window_layout": None},
            "unknown tensors model.layers.3",
        ),
        ({"num_hidden_layers": 10**9}, "from 1 to 10000"),
        (
            {"moe_num_primary_experts": 2**31 - 1},
            "lacks the tensors model.layers.0.block_sparse_moe.experts.4",
        ),
        ({"moe_num_primary_experts": 1}, "2 of 1 experts"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        ({"head_dim": 15}, "even number"),
        ({"rope_theta": "fast"}, "rope_theta is 'fast'"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"rms_norm_eps": -1}, "positive number"),
        ({"rms_norm_eps": 1e-60}, "positive number"),
        ({"rope_layout": [0, 1, 2, 1]}, "one 0 or 1"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "unscaled RoPE"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"architectures": ["LlamaForCausalLM"]}, "SmallThinkerForCausalLM is needed"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"tie_word_embeddings": 1}, "true or false"),
        ({"sliding_window_size": None}, "lacks sliding_window_size"),
        ({"eos_token_id": "x"}, "a token id"),
    ],
)
def test_impossible_configurations_are_refused(bent: Path, change: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    (bent / "config.json").write_text(json.dumps(config))
    assert message in refusal(bent)


def test_keys_that_releases_leave_out_have_their_meaning(bent: Path) -> None:
    config = {**CONFIG, "model_type": "smallthinker", "rope_parameters": {"rope_theta": 1e4}}
    for key in (
        "moe_primary_router_apply_softmax",
        "rope_layout",
        "tie_word_embeddings",
        "model_name",
        "rope_theta",
    ):
        del config[key]
    (bent / "config.json").write_text(json.dumps(config))
    with HuggingFaceFolder(bent) as folder:
        parsed = folder.config
        assert not parsed.softmax and parsed.tied and parsed.rope_layout == (1, 1, 1, 1)
        assert folder.name == "bent" and parsed.rope_theta == 1e4
        folder.check_tied()
        assert any("the different lm_head.weight is not used" in warning for warning in folder.warnings)


def edited(header: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of the only weight file; the weights stay."""

    def apply(folder: Path) -> None:
        data = (folder / ONE_FILE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        contents = json.loads(data[8 : 8 + length])
        text = json.dumps(header(contents) or contents).encode()
        (folder / ONE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / ONE_FILE).write_bytes(change((folder / ONE_FILE).read_bytes()))

    return apply


def index(weight_map: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


def sparse_header(folder: Path) -> None:
    with (folder / ONE_FILE).open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(1 << 30)


NORM = "model.norm.weight"
DUPLICATE = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
MALFORMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "torn config": (lambda f: (f / "config.json").write_text('{"a": '), "no valid JSON"),
    "list as config": (lambda f: (f / "config.json").write_text("[]"), "not an object"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 10**5), "no valid JSON"),
    "latin config": (lambda f: (f / "config.json").write_bytes(b'{"\xe9": 1}'), "no UTF-8"),
    "no weights": (lambda f: (f / ONE_FILE).unlink(), "neither model.safetensors.index.json nor"),
    "empty file": (raw(lambda b: b""), "has 0 bytes"),
    "header past the end": (raw(lambda b: struct.pack("<Q", 1 << 63) + b[8:]), "says that its header has"),
    "header bomb": (sparse_header, "at most 16777216 are read"),
    "no JSON": (raw(lambda b: b[:8] + b" " + b[9:]), "does not begin with '{'"),
    "torn weights": (raw(lambda b: b[:-2]), "the file has"),
    "more bytes": (raw(lambda b: b + b"xx"), "2 bytes behind"),
    "twice": (raw(lambda b: struct.pack("<Q", len(DUPLICATE)) + DUPLICATE), "occurs twice"),
    "NaN": (raw(lambda b: struct.pack("<Q", 9) + b'{"a":NaN}'), "NaN is no JSON number"),
    "metadata": (edited(lambda h: h["__metadata__"].update(a=1)), "__metadata__"),
    "entry": (edited(lambda h: h[NORM].update(more=1)), "needs exactly dtype, shape and data_offsets"),
    "dtype": (edited(lambda h: h[NORM].update(dtype="Q4")), "the type 'Q4'"),
    "integers": (edited(lambda h: h[NORM].update(dtype="I16")), "stored as I16; BF16, F16, F32"),
    "shape": (edited(lambda h: h[NORM].update(shape=[64, 1])), "has the shape [64, 1]"),
    "negative shape": (edited(lambda h: h[NORM].update(shape=[-64, -1])), "impossible shape"),
    "many sizes": (edited(lambda h: h[NORM].update(shape=[1] * 10**5)), "impossible shape"),
    "size of nothing": (edited(lambda h: h[NORM].update(shape=[32])), "needs another number"),
    "offsets": (edited(lambda h: h[NORM].update(data_offsets=[0, 1.5])), "impossible data_offsets"),
    "offsets outside": (
        edited(lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 128])),
        "the file has",
    ),
    "overlap": (edited(lambda h: h[NORM].update(data_offsets=[0, 128])), "overlaps"),
    "hole": (
        edited(lambda h: {k: v for k, v in h.items() if k != "model.layers.1.input_layernorm.weight"}),
        "hole",
    ),
    "unknown": (edited(lambda h: h.update(extra=h.pop(NORM))), "lacks the tensors model.norm.weight"),
    "index outside": (index({NORM: "../../model.safetensors"}), "no safetensors file of this folder"),
    "index absolute": (index({NORM: "/etc/x.safetensors"}), "no safetensors file of this folder"),
    "index pickle": (index({NORM: "pytorch_model.bin"}), "no safetensors file of this folder"),
    "index number": (index({NORM: 7}), "no safetensors file of this folder"),
    "index list": (index([]), "has no weight_map"),
    "index of nothing": (index({NORM: "other.safetensors"}), "has both"),
    "index of the rest": (index({NORM: ONE_FILE}), "does not place there"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_folders_are_refused(name: str, bent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = MALFORMED[name]
    damage(bent)
    assert message in refusal(bent)
    assert pack.main([str(bent), str(bent / "out.gguf")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not list(bent.glob("*out.gguf*"))


def test_malformed_shards_are_refused(bent: Path) -> None:
    (bent / ONE_FILE).unlink()
    write_folder(bent, shards=3)
    shards = sorted(bent.glob("*.safetensors"))
    data = shards[1].read_bytes()
    shards[1].unlink()
    assert "00002-of-00003.safetensors is missing" in refusal(bent)
    os.mkfifo(shards[1])  # must not be waited for
    assert "no regular file" in refusal(bent)
    shards[1].unlink()
    shards[1].write_bytes(shards[0].read_bytes())
    assert " lies in " in refusal(bent)
    shards[1].write_bytes(safetensors_bytes({}))
    assert "in files that lack them" in refusal(bent)
    shards[1].write_bytes(data)
    (bent / ONE_FILE).write_bytes(data)
    assert "has both" in refusal(bent)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {"a": ("F32", (2, 3), bytes(24)), "b": ("BF16", (5,), bytes(10)), "c": ("U8", (0,), b"")}
    path = tmp_path_factory.mktemp("small") / "whole.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    return path


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_bent_headers_are_read_as_the_safetensors_package_reads_them(
    small_file: Path, data: st.DataObject
) -> None:
    """Whatever passes here passes there, with the same shapes and bytes."""
    content = bytearray(small_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.sampled_from([b"", b"0", b"9", b"-", b"]", b"}", b",", b'"', b"\xff", b" ", b"1e1"])
        )
        content[at : at + data.draw(st.integers(0, 2))] = piece
    path = small_file.with_name("bent.safetensors")
    path.write_bytes(content)
    try:
        file = WeightFile(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    with safetensors.safe_open(path, framework="numpy") as other:
        assert set(other.keys()) == set(file.tensors)
        for name, entry in file.tensors.items():
            assert tuple(other.get_slice(name).get_shape()) == entry.shape
    file.close()


def test_weights_that_end_early_or_are_not_finite_leave_nothing(
    bent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bent / ONE_FILE
    with HuggingFaceFolder(bent) as folder:
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(CheckpointError, match="inside its weights"):
            folder.write(bent / "out.gguf", "q4_0", threads=2)
    write_folder(bent)
    os.truncate(path, path.stat().st_size - 2)
    with path.open("ab") as file:
        file.write(b"\xc0\x7f")  # a bfloat16 NaN ends lm_head
    assert pack.main([str(bent), str(bent / "out.gguf")]) == 2
    assert "lm_head.weight holds a weight that is no finite number" in capsys.readouterr().err
    assert sorted(p.name for p in bent.iterdir() if "out" in p.name) == []


def change_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "tokenizer.json"
        contents = json.loads(path.read_text())
        change(contents)
        path.write_text(json.dumps(contents))

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="WordPiece"), "is a WordPiece tokenizer"),
        (lambda t: t["model"].update(byte_fallback=True), "sets byte_fallback to True"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(), "Qwen2's pre-tokenizer"),
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="a"),
            "Qwen2's pre-tokenizer",
        ),
        (lambda t: t.update(pre_tokenizer=None), "Qwen2's pre-tokenizer"),
        (lambda t: t.update(normalizer={"type": "NFKC"}), "uses NFC"),
        (lambda t: t["model"]["vocab"].update(zz=VOCAB), f"the id {VOCAB}; the model has {VOCAB}"),
        (lambda t: t["model"]["vocab"].update(zz=-1), "the id -1"),
        (lambda t: t["model"]["vocab"].update(zz=5), "gives the id 5 to"),
        (lambda t: t["model"]["vocab"].update(zz="5"), "gives the token 'zz' the id '5'"),
        (lambda t: t["model"]["vocab"].update({"\ud800": 510}), "no valid text"),
        (lambda t: t["model"]["vocab"].pop("!"), "lacks 1 of the 256 bytes"),
        (lambda t: t["model"].update(vocab=[]), "needs a vocab object"),
        (lambda t: t["model"]["merges"].append(["a"]), "two tokens are needed"),
        (lambda t: t["model"]["merges"].append(["Q", "zzz"]), "cannot be used"),
        (lambda t: t["added_tokens"].append("x"), "added_tokens that are no objects"),
        (lambda t: t["added_tokens"].append({"id": 515}), "gives the token 'None' the id '515'"),
    ],
)
def test_tokenizers_of_another_kind_are_refused(
    bent: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change_tokenizer(change)(bent)
    assert message in refusal(bent)
