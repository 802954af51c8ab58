"""Merging: the algebra is exact, and checkpoints that do not fit are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from components.artifacts import StageError
from components.merging.linear import merge, tensor_names
from model import SmallThinkerForCausalLM
from tests.posttraining.factory import small_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Parts = dict[str, tuple[Path, float]]


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("a+b@c d")  # MergeKit gives "+" and "@" a meaning of their own in names
    folders = {}
    for number, name in enumerate(("a", "b", "c")):
        folders[name] = root / name
        model = small_model(number)
        with torch.no_grad():
            model.model.norm.weight[0] = -0.0
        model.save_pretrained(folders[name])
    return folders


def merged(checkpoints: dict[str, Path], out: Path, **weights: float) -> dict[str, torch.Tensor]:
    merge({name: (checkpoints[name], weight) for name, weight in weights.items()}, out)
    return load(out)


def test_endpoints_are_bit_equal(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert same(merged(checkpoints, tmp_path / "1", a=1.0, b=0.0), load(checkpoints["a"]))
    assert same(merged(checkpoints, tmp_path / "2", a=0.0, b=0.3), load(checkpoints["b"]))


def test_weighted_mean_in_float32(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = merged(checkpoints, tmp_path / "m", a=0.5, b=0.25, c=1.25)
    parts = {name: load(folder) for name, folder in checkpoints.items()}
    for name, tensor in out.items():
        a, b, c = (parts[part][name].double() for part in ("a", "b", "c"))
        torch.testing.assert_close(tensor.double(), 0.25 * a + 0.125 * b + 0.625 * c, atol=1e-8, rtol=2e-7)
    assert (
        out.keys()
        == parts["a"].keys()
        == tensor_names(AutoConfig.from_pretrained(checkpoints["a"]), HEAD in parts["a"])
    )


def test_order_and_scale_of_the_weights_do_not_matter(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    one = merged(checkpoints, tmp_path / "1", a=0.75, b=0.25)
    assert same(one, merged(checkpoints, tmp_path / "2", b=0.25, a=0.75))
    assert same(one, merged(checkpoints, tmp_path / "3", a=3.0, b=1.0))


def test_merging_a_checkpoint_with_itself_changes_nothing(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(checkpoints["a"], twin)
    original = load(checkpoints["a"])
    merge({"a": (checkpoints["a"], 0.5), "twin": (twin, 0.5)}, tmp_path / "half")
    out = load(tmp_path / "half")
    assert out.keys() == original.keys() and all(torch.equal(out[name], original[name]) for name in original)
    merge({"a": (checkpoints["a"], 0.7), "twin": (twin, 0.1)}, tmp_path / "uneven")  # up to rounding
    for name, tensor in load(tmp_path / "uneven").items():
        torch.testing.assert_close(tensor, original[name], atol=1e-9, rtol=3e-7)


@pytest.mark.parametrize("heads", [(True, True), (True, False), (False, False)])
def test_tied_embeddings_stay_one_matrix(
    checkpoints: dict[str, Path], tmp_path: Path, heads: tuple[bool, bool]
) -> None:
    """Whether files carry the tied head as a second tensor, as the released 4B does, or not."""
    for name, with_head in zip(("a", "b"), heads, strict=True):
        shutil.copytree(checkpoints[name], tmp_path / name)

        def set_head(tensors: dict[str, torch.Tensor], with_head: bool = with_head) -> None:
            tensors.pop(HEAD, None)
            if with_head:
                tensors[HEAD] = tensors[EMBEDDING].clone()

        edit_tensors(tmp_path / name, set_head)
    merge({"a": (tmp_path / "a", 0.3), "b": (tmp_path / "b", 0.7)}, tmp_path / "m")
    out = load(tmp_path / "m")
    assert (HEAD in out) == any(heads) and torch.equal(out.get(HEAD, out[EMBEDDING]), out[EMBEDDING])
    model = SmallThinkerForCausalLM.from_pretrained(tmp_path / "m")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.model.embed_tokens.weight, out[EMBEDDING])


def test_a_tied_head_that_differs_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["b"], tmp_path / "b")
    edit_tensors(tmp_path / "b", lambda t: t.update({HEAD: t[EMBEDDING] + 1e-3}))
    with pytest.raises(StageError, match=rf"its tensors {HEAD} and {EMBEDDING} differ"):
        merge({"a": (checkpoints["a"], 0.5), "b": (tmp_path / "b", 0.5)}, tmp_path / "m")


def test_untied_heads_are_merged(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        small_model(number, tie_word_embeddings=False).save_pretrained(tmp_path / name)
    merge({"a": (tmp_path / "a", 1.0), "b": (tmp_path / "b", 1.0)}, tmp_path / "m")
    a, b, out = (load(tmp_path / name)["lm_head.weight"] for name in ("a", "b", "m"))
    torch.testing.assert_close(out, (a + b) / 2)


def test_bfloat16_is_merged_in_float32_and_stored_as_it_was(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        small_model(number).bfloat16().save_pretrained(tmp_path / name)
    merge({"a": (tmp_path / "a", 0.9), "b": (tmp_path / "b", 0.1)}, tmp_path / "m")
    a, b, out = (load(tmp_path / name) for name in ("a", "b", "m"))
    for name, tensor in out.items():
        assert tensor.dtype == torch.bfloat16
        exact = 0.9 * a[name].double() + 0.1 * b[name].double()
        assert float((tensor.double() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8


def test_shards_are_read_and_written(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    parts: Parts = {"a": (checkpoints["a"], 0.6), "b": (checkpoints["b"], 0.4)}
    merge(parts, tmp_path / "one")
    merge(parts, tmp_path / "many", shard_bytes=200_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert same(load(tmp_path / "one"), load(tmp_path / "many"))
    merge({"many": (tmp_path / "many", 1.0), "c": (checkpoints["c"], 1.0)}, tmp_path / "again")
    merge({"one": (tmp_path / "one", 1.0), "c": (checkpoints["c"], 1.0)}, tmp_path / "direct")
    assert same(load(tmp_path / "again"), load(tmp_path / "direct"))
    merge({"many": (tmp_path / "many", 1.0)}, tmp_path / "copied")
    SmallThinkerForCausalLM.from_pretrained(tmp_path / "copied")


def test_a_changed_file_is_read_anew(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """MergeKit caches loaders by path."""
    shutil.copytree(checkpoints["a"], tmp_path / "x")
    parts: Parts = {"x": (tmp_path / "x", 1.0), "c": (checkpoints["c"], 1.0)}
    merge(parts, tmp_path / "1")
    shutil.copyfile(checkpoints["b"] / "model.safetensors", tmp_path / "x" / "model.safetensors")
    merge(parts, tmp_path / "2")
    assert not same(load(tmp_path / "1"), load(tmp_path / "2"))


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


ROUTER = "model.layers.2.block_sparse_moe.primary_router.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: edit_config(f, sliding_window_size=32), r"sliding_window_size is 64 in a and 32 in b"),
        (lambda f: edit_config(f, rope_theta=7.0), r"rope_theta is .* in a and 7\.0 in b.*allow_rope_change"),
        (lambda f: edit_tensors(f, lambda t: t.pop(ROUTER)), rf"tensor {ROUTER} is in a and not in b"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({ROUTER: t[ROUTER][:, :-1].contiguous()})),
            rf"tensor {ROUTER} is F32 \[4, 64\] in a and F32 \[4, 63\] in b",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({ROUTER: t[ROUTER].half()})),
            rf"tensor {ROUTER} is F32 \[4, 64\] in a and F16 \[4, 64\] in b",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update(extra=t[ROUTER].clone())),
            "tensor extra is in b and not in a",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "not a whole safetensors file",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    broken = tmp_path / "b"
    shutil.copytree(checkpoints["b"], broken)
    damage(broken)
    with pytest.raises(StageError, match=words):
        merge({"a": (checkpoints["a"], 0.5), "b": (broken, 0.5)}, tmp_path / "m")


def test_rope_may_differ_when_asked_for(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["b"], tmp_path / "b")
    edit_config(tmp_path / "b", rope_theta=7.0)
    for weights, theta in (((0.4, 0.6), 7.0), ((0.6, 0.4), 1e5)):
        out = tmp_path / f"m{theta}"
        parts: Parts = {"a": (checkpoints["a"], weights[0]), "b": (tmp_path / "b", weights[1])}
        merge(parts, out, allow_rope_change=True)
        assert AutoConfig.from_pretrained(out).rope_theta == theta


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -0.5)])
def test_impossible_weights_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, weights: tuple[float, float]
) -> None:
    with pytest.raises(StageError, match="need to be >= 0"):
        merge({n: (checkpoints[n], w) for n, w in zip(("a", "b"), weights, strict=True)}, tmp_path / "m")
