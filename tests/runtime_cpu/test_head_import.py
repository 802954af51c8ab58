"""The authors' predictor file: read as untrusted bytes, and run as numpy says."""

from __future__ import annotations

import io
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_cpu import Engine, inspect, pack, torch_file
from runtime_cpu.checkpoint_files import CheckpointError
from runtime_cpu.head_import import DEFAULT_THRESHOLD, ImportedPredictor
from runtime_cpu.torch_file import TorchFile
from tests.runtime_cpu import small_folders
from tests.runtime_cpu.small_models import Shape, random_weights, write_model

SHAPE = Shape(layers=2, hidden=64, heads=4, head_dim=16, experts=4, used=2, expert_hidden=64, vocab=1500)
WIDTH = 32
PROMPT = [3, 149, 7, 7, 80, 64, 2, 90, 11]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tensors(
    dtype: torch.dtype = torch.float32, hidden: int = 64, vocab: int = 1500, width: int = WIDTH
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(width, hidden, generator=generator) / 2
    up = torch.randn(vocab, width, generator=generator) / 2
    return {"fc1.weight": down.to(dtype), "fc2.weight": up.to(dtype)}


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def rewritten(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], **options: Any) -> Path:
    """The archive with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for entry in entries:
            changed = change(*entry)
            if changed is not None:
                archive.writestr(*changed)
    return path


def with_pickle(path: Path, data: bytes) -> Path:
    saved(path, tensors())
    return rewritten(path, lambda name, old: (name, data if name.endswith("data.pkl") else old))


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def as_module(values: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """A module's state: an ordered dictionary that carries a version beside its items."""
    module = torch.nn.Module()
    for name, value in values.items():
        layer = torch.nn.Linear(value.shape[1], value.shape[0], bias=False, dtype=value.dtype)
        layer.weight.data = value
        module.add_module(name.split(".")[0], layer)
    state: OrderedDict[str, torch.Tensor] = module.state_dict()
    assert "_metadata" in vars(state)
    return state


FORMS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "dict": dict,
    "ordered": OrderedDict,
    "state": as_module,
    "parameters": lambda values: {name: torch.nn.Parameter(value) for name, value in values.items()},
    # Both in one storage, behind each other and with something in front.
    "shared": lambda values: _shared(values),
}


def _shared(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    whole = torch.cat(
        [torch.zeros(5, dtype=values["fc1.weight"].dtype), *map(torch.flatten, values.values())]
    )
    result, start = {}, 5
    for name, value in values.items():
        result[name] = whole[start : start + value.numel()].view(value.shape)
        start += value.numel()
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: str, form: str) -> None:
    values = tensors(DTYPES[dtype])
    path = saved(tmp_path / "p.pt", FORMS[form](values))
    with TorchFile(path) as file:
        assert list(file.tensors) == list(values)
        for name, value in values.items():
            assert file.tensors[name].shape == tuple(value.shape)
            for at_once in (777, 1 << 20):
                data = b"".join(part.tobytes() for part in file.read(name, at_once))
                assert data == value.view(torch.uint8).numpy().tobytes()


def expected_rows(path: Path, values: dict[str, torch.Tensor], threshold: float) -> np.ndarray:
    """What the tensors name by numpy alone, with the states that the file's exact logits are solved for."""
    kind = gguf.GGMLQuantizationType.Q4_0
    down, up = (
        gguf.quants.dequantize(gguf.quants.quantize(value.float().numpy(), kind), kind)
        for value in values.values()
    )
    with Engine.open(path, kernels="reference") as engine:
        exact = engine.logits(PROMPT)
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    head = stored["output.weight"].astype(np.float64)
    states = np.linalg.lstsq(head, exact.T.astype(np.float64), rcond=None)[0].T
    return states @ down.T.astype(np.float64) @ up.T > threshold


@pytest.mark.parametrize("route", ["stock file", "packed file", "folder", "packed folder"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine_names_the_rows_that_the_file_names(
    tmp_path: Path, dtype: str, route: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = "folder" in route
    vocab = small_folders.VOCAB if folder else SHAPE.vocab
    values = tensors(DTYPES[dtype], vocab=vocab)
    predictor = saved(tmp_path / "model_lm_head.pt", values)
    if folder:
        source = small_folders.write_folder(tmp_path / "model")
    else:
        source = write_model(tmp_path / "source.gguf", SHAPE, random_weights(SHAPE), "Q4_0")
    layout = [] if "packed" in route else ["--layout", "stock"]
    arguments = [str(source), str(tmp_path / "out.gguf"), "--head-predictor", str(predictor)]
    assert pack.main([*arguments, *layout, "--head-threshold", "1.5"]) == 0, capsys.readouterr().err
    plain = source
    if folder:
        plain = tmp_path / "plain.gguf"
        assert pack.main([str(source), str(plain), "--layout", "stock"]) == 0
    capsys.readouterr()
    expected = expected_rows(plain, values, 1.5)
    with Engine.open(tmp_path / "out.gguf", kernels="reference") as engine:
        exact = engine.logits(PROMPT)
        assert bool(engine._model.packed) is ("packed" in route)
    with Engine.open(tmp_path / "out.gguf", kernels="reference", head="predictor") as engine:
        found = engine.logits(PROMPT)
        info = engine.info.head_predictor
    named = ~np.isneginf(found)
    assert info is not None and (info.width, info.threshold, info.recall) == (WIDTH, 1.5, None)
    assert 0.02 < expected.mean() < 0.98 and (named != expected).mean() < 1e-3
    assert np.array_equal(found[named], exact[named])
    names = {name: size for name, _, _, _, size in engine._model.tensors() if "predictor" in name}
    assert len(names) == 2
    if "packed" not in route:
        kind = gguf.GGMLQuantizationType.Q4_0
        written = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
        for ours, value in zip(("down", "up"), values.values(), strict=True):
            data = written[f"head_predictor.{ours}.weight"].data.tobytes()
            assert data == gguf.quants.quantize(value.float().numpy(), kind).tobytes()


def test_a_damaged_imported_matrix_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.gguf", SHAPE, random_weights(SHAPE), "Q4_0")
    with ImportedPredictor(saved(tmp_path / "p.pt", tensors())) as predictor:
        pack.pack(source, tmp_path / "out.gguf", predictor=predictor)
    with Engine.open(tmp_path / "out.gguf", head="predictor") as engine:
        places = {name: offset for name, _, _, offset, _ in engine._model.tensors()}
    data = bytearray((tmp_path / "out.gguf").read_bytes())
    data[places["head_predictor.up.tiles"] + 100] ^= 1
    (tmp_path / "out.gguf").write_bytes(data)
    with pytest.raises(Exception, match="checksum"):
        Engine.open(tmp_path / "out.gguf", head="predictor")


def test_sizes_that_no_block_divides_become_half_precision(tmp_path: Path) -> None:
    shape = Shape(layers=1)  # hidden 48
    source = write_model(tmp_path / "m.gguf", shape, random_weights(shape))
    values = tensors(hidden=48, vocab=shape.vocab, width=10)
    with ImportedPredictor(saved(tmp_path / "p.pt", values), 0.0) as predictor:
        pack.add_predictor(source, tmp_path / "out.gguf", predictor)
    written = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert np.array_equal(
        written["head_predictor.up.weight"].data, values["fc2.weight"].numpy().astype(np.float16)
    )
    with Engine.open(tmp_path / "out.gguf") as engine, Engine.open(source) as plain:
        assert np.array_equal(engine.logits([1, 2, 3]), plain.logits([1, 2, 3]))
        left, right = engine.metadata, plain.metadata
        assert {key: value for key, value in left.items() if "head_predictor" not in key} == right


def test_people_are_told_that_nothing_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "m.gguf", SHAPE, random_weights(SHAPE), "Q4_0")
    path = saved(tmp_path / "p.pt", tensors())
    assert pack.main([str(source), str(tmp_path / "out.gguf"), "--head-predictor", str(path)]) == 0
    assert inspect.main([str(tmp_path / "out.gguf")]) == 0
    assert "tokens can be lost, and how many was not measured" in capsys.readouterr().out
    report = inspect.inspect(tmp_path / "out.gguf")["head_predictor"]
    assert report == {"width": WIDTH, "threshold": DEFAULT_THRESHOLD, "recall": None, "missed_argmax": None}
    assert pack.main([str(tmp_path / "out.gguf"), str(tmp_path / "x"), "--head-predictor", str(path)]) == 2
    assert "packed already" in capsys.readouterr().err
    stock = ["--layout", "stock", "--head-predictor", str(path)]
    assert pack.main([str(source), str(tmp_path / "stock.gguf"), *stock]) == 0
    assert pack.main([str(tmp_path / "stock.gguf"), str(tmp_path / "x"), *stock]) == 2
    assert "has a predictor of its head's rows already" in capsys.readouterr().err


def test_a_folders_predictor_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_folders.write_folder(tmp_path / "model")
    saved(folder / "model_lm_head.pt", tensors(vocab=small_folders.VOCAB))
    target = tmp_path / "out.gguf"
    assert pack.main([str(folder), str(target)]) == 0
    said = capsys.readouterr().err
    assert "can lose tokens: --head-predictor" in said and "model/model_lm_head.pt adds it" in said
    assert inspect.inspect(target)["head_predictor"] is None
    assert pack.main([str(folder), str(target), "--head-predictor", str(folder / "model_lm_head.pt")]) == 0
    assert "can lose tokens" not in capsys.readouterr().err
    assert inspect.inspect(target)["head_predictor"]["width"] == WIDTH


def other(**change: Any) -> Callable[[Path], Path]:
    """A saved dictionary with some entries changed, or left out when ``None``."""

    def make(path: Path) -> Path:
        values: dict[str, Any] = tensors() | {name.replace("_", "."): value for name, value in change.items()}
        return saved(path, {name: value for name, value in values.items() if value is not None})

    return make


def entry(ending: str, data: bytes) -> Callable[[Path], Path]:
    return lambda path: rewritten(
        saved(path, tensors()), lambda name, old: (name, data if name.endswith(ending) else old)
    )


def cut(share: float) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        data = saved(path, tensors()).read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    return make


def bent(path: Path) -> Path:
    """One bit of a weight."""
    data = bytearray(saved(path, tensors()).read_bytes())
    data[data.index(tensors()["fc2.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    return path


def claiming(old: bytes, new: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        data = pickle_of(saved(path, tensors()))
        assert data.count(old) >= 1
        return with_pickle(path, data.replace(old, new, 1))

    return make


VOCAB_BYTES, HUGE = b"M" + (1500).to_bytes(2, "little"), b"\x8a\x06" + b"\xff" * 5 + b"\x7f"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "is missing"),
        (lambda path: path.mkdir() or path, "is no file"),
        (lambda path: path.touch() or path, "no zip archive"),
        (lambda path: saved(path, tensors(), _use_new_zipfile_serialization=False), "before version 1.6"),
        (lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0{}") and path, "it is no zip archive"),
        (other(fc2_weight=None), "holds 'fc1.weight'; a predictor of the head's rows is 'fc1.weight' and"),
        (other(fc1_bias=torch.zeros(3)), "'fc1.bias'; a predictor"),
        (other(fc1_weight=torch.zeros(3)), r"fc1.weight has the shape \[3\]"),
        (other(fc1_weight=torch.zeros(31, 64)), r"\[31, 64\] and fc2.weight \[1500, 32\]"),
        (other(fc1_weight=torch.zeros(0, 64), fc2_weight=torch.zeros(1500, 0)), r"has the shape \[0, 64\]"),
        (other(fc1_weight=torch.zeros(64, 32).T), "only contiguous ones"),
        (other(fc1_weight=torch.zeros(32, 128)[:, ::2]), "only contiguous ones"),
        (other(fc1_weight=torch.zeros(32, 1).expand(32, 64)), "only contiguous ones"),
        (other(fc1_weight=torch.zeros(32, 64, dtype=torch.float64)), "torch.DoubleStorage; FloatStorage"),
        (other(fc1_weight=torch.zeros(32, 64, dtype=torch.int8)), "torch.CharStorage"),
        (other(fc1_weight=torch.zeros(32, 64).to_sparse()), "_rebuild_sparse_tensor"),
        (other(fc1_weight=[1, 2]), "'fc1.weight' is a list and no tensor"),
        (
            other(fc1_weight=torch.full((32, 64), torch.inf)),
            "fc1.weight holds a weight that is no finite number",
        ),
        (lambda path: saved(path, [1, 2]), "holds a list; a dictionary"),
        (lambda path: saved(path, torch.zeros(3)), "holds a tensor; a dictionary"),
        (lambda path: saved(path, {3: torch.zeros(3)}), "a key that is a int"),
        (lambda path: saved(path, torch.nn.Linear(3, 3)), "holds torch.nn.modules.linear.Linear"),
        (lambda path: saved(path, tensors(hidden=16, width=32)), "32 wide; at most the hidden size 16"),
        (entry("byteorder", b"big"), "byte order b'big'"),
        (entry("data/0", bytes(100)), "in data/0, which has 100 bytes"),
        (entry("data.pkl", b"\x80\x02}" + b"q\x00" * (64 << 10) + b"."), "at most 65536 are read"),
        (entry("data.pkl", b""), "cannot be read"),
        (entry("data.pkl", b"\x80\x02}q\x00"), "cannot be read"),
        (entry("data.pkl", b"\x80\x02}r\xff\xff\xff\x7f."), "an object with the number 2147483647"),
        (claiming(VOCAB_BYTES, HUGE), "elements from 0 on; its storage has"),
        (claiming(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"), "in data/7, which is missing"),
        (
            claiming(b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00strange"),
            "in another way than torch.save",
        ),
        (cut(0.3), "damaged"),
        (cut(0.999), "damaged"),
        (bent, "damaged: Bad CRC-32"),
        (
            lambda path: rewritten(
                saved(path, tensors()), lambda *old: old, compression=zipfile.ZIP_DEFLATED
            ),
            "compresses",
        ),
        (
            lambda path: rewritten(
                saved(path, tensors()), lambda name, data: None if name.endswith("data/1") else (name, data)
            ),
            "in data/1, which is missing",
        ),
    ],
)
def test_what_is_no_such_predictor_is_named(
    tmp_path: Path, make: Callable[[Path], Path], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "p.pt")
    source = tmp_path / "m.gguf"
    write_model(source, SHAPE, random_weights(SHAPE), "Q4_0")
    with pytest.raises(CheckpointError, match=message), ImportedPredictor(path) as predictor:
        pack.pack(source, tmp_path / "out.gguf", predictor=predictor)
    assert pack.main([str(source), str(tmp_path / "out.gguf"), "--head-predictor", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not [left for left in tmp_path.iterdir() if "out" in left.name]


@pytest.mark.parametrize("form", ["dict", "shared"])
def test_a_bent_weight_is_found_before_anything_is_read(tmp_path: Path, form: str) -> None:
    path = saved(tmp_path / "p.pt", FORMS[form](tensors()))
    data = bytearray(path.read_bytes())
    data[data.index(tensors()["fc2.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        TorchFile(path)


@pytest.mark.parametrize(
    ("sizes", "threshold", "message"),
    [
        ({"hidden": 96}, None, "1500 rows of 96; .*m.gguf has 1500 of 64"),
        ({"vocab": 1501}, None, "1501 rows of 64"),
        ({}, "nan", "threshold is nan"),
        ({}, "inf", "threshold is inf"),
    ],
)
def test_another_models_predictor_is_refused(
    tmp_path: Path,
    sizes: dict[str, int],
    threshold: str | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_model(tmp_path / "m.gguf", SHAPE, random_weights(SHAPE), "Q4_0")
    path = saved(tmp_path / "p.pt", tensors(**sizes))
    arguments = [str(source), str(tmp_path / "out.gguf"), "--head-predictor", str(path)]
    if threshold is not None:
        arguments += ["--head-threshold", threshold]
    for more in ([], ["--layout", "stock"]):
        assert pack.main([*arguments, *more]) == 2
        assert re.search(message, capsys.readouterr().err)
    folder = small_folders.write_folder(tmp_path / "model")
    assert pack.main([str(folder), *arguments[1:]]) == 2
    assert pack.main([str(source), str(tmp_path / "out.gguf"), "--head-threshold", "0"]) == 2
    assert "--head-threshold belongs to --head-predictor" in capsys.readouterr().err
    assert {left.name for left in tmp_path.iterdir()} == {"m.gguf", "p.pt", "model"}


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def hostile(marker: Path) -> dict[str, bytes]:
    import os
    import subprocess

    rebuild = torch._utils._rebuild_tensor_v2
    code = f"open({str(marker)!r}, 'w')"
    return {
        "system": pickle.dumps(Call(os.system, f"touch {marker}"), 2),
        "popen": pickle.dumps({"fc1.weight": Call(subprocess.Popen, ["touch", str(marker)])}, 2),
        "eval": pickle.dumps(Call(eval, code), 2),
        "exec in protocol 5": pickle.dumps(Call(exec, code), 5),
        "getattr": pickle.dumps(Call(getattr, OrderedDict, "fromkeys"), 4),
        "a name with dots": b"\x80\x04\x8c\x0bcollections\x8c\x16OrderedDict.__init__.x\x93.",
        "a module's own": b"\x80\x02cruntime_cpu.torch_file\nos\n.",
        "torch.load": b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00a\x85R.",
        "extension": b"\x80\x02\x82\x01.",
        "a function's attributes": pickle.dumps(
            Call(rebuild, 1, 2, 3, 4, state=(None, {"__class__": int, "storage": 3})), 2
        ),
        "no record of a tensor": pickle.dumps({"fc1.weight": Call(rebuild, 1, 0, (2,), (1,))}, 2),
        "sizes that are none": pickle.dumps({"fc1.weight": Call(rebuild, 1, -1, ("a",), (None,))}, 2),
        "nested deeply": b"\x80\x02" + b"(" * 30_000 + b"t" * 30_000 + b".",
        "a large claim": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
    }


@pytest.mark.parametrize("attack", hostile(Path("none")))
def test_a_pickle_runs_nothing(tmp_path: Path, attack: str) -> None:
    marker = tmp_path / "ran"
    before = dict(vars(torch_file))
    loaded = set(sys.modules)
    path = with_pickle(tmp_path / "p.pt", hostile(marker)[attack])
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not marker.exists() and set(sys.modules) == loaded and vars(torch_file) == before


def test_the_attacks_would_work_elsewhere(tmp_path: Path) -> None:
    """A test of the tests: plain pickle runs them."""
    for attack in ("system", "eval", "exec in protocol 5"):
        marker = tmp_path / attack.replace(" ", "_")
        pickle.loads(hostile(marker)[attack])
        assert marker.exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("small")
    return saved(folder / "p.pt", as_module(tensors(hidden=32, vocab=40, width=4))).read_bytes()


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_bent_files_are_refused_or_whole(
    small: bytes, tmp_path: Path, changes: list[tuple[float, int]], in_pickle: bool
) -> None:
    data = bytearray(small)
    start, size = (small.index(b"\x80\x02c"), 700) if in_pickle else (0, len(data))
    for place, value in changes:
        data[min(start + int(place * size), len(data) - 1)] = value
    if in_pickle:  # past the checksum, into the unpickler
        with zipfile.ZipFile(io.BytesIO(small)) as archive:
            entries = {info.filename: (info.header_offset, archive.read(info)) for info in archive.infolist()}
        name = next(name for name in entries if name.endswith("data.pkl"))
        pickled = bytes(data[start : start + len(entries[name][1])])
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for other_name, (_, contents) in entries.items():
                archive.writestr(other_name, pickled if other_name == name else contents)
        data = bytearray(buffer.getvalue())
    (tmp_path / "p.pt").write_bytes(data)
    try:
        with TorchFile(tmp_path / "p.pt") as file:
            for name, tensor in file.tensors.items():
                assert sum(len(part) for part in file.read(name, 1000)) == tensor.count
    except CheckpointError:
        return
