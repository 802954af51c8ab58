"""A router that reads the stream of earlier layers: one function in torch and, by either way, in the engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from components.artifacts import StageError
from components.export.gguf_file import GGUFModel, write_gguf
from model import OfficialCheckpoint, SmallThinkerForCausalLM
from runtime_cpu import Engine
from runtime_cpu.pack.__main__ import main as pack_main
from tests.model.factory import tiny, tiny_config, token_ids


def saved(folder: Path, lead: int) -> tuple[SmallThinkerForCausalLM, Path]:
    model = tiny(seed=lead, router_lead=lead, hidden_size=64, moe_ffn_hidden_size=32, head_dim=16)
    model.save_pretrained(folder)
    return model, folder


def logits(model: SmallThinkerForCausalLM, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(ids).logits[0])


@pytest.mark.parametrize("lead", [0, 1, 3])
def test_the_router_reads_the_stream_as_it_entered_that_many_layers_earlier(lead: int) -> None:
    model = tiny(router_lead=lead)
    read: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.block_sparse_moe.primary_router.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        entering = model(token_ids(2, 9), output_hidden_states=True).hidden_states
    for index, x_TD in enumerate(read):
        assert torch.equal(x_TD, entering[max(0, index - lead)].flatten(0, 1))
    assert len(read) == 4


@pytest.mark.parametrize("lead", [1, 2, 3, 9])  # the last: as 3
def test_every_way_to_the_engine_gives_the_same_logits(lead: int, tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "folder", lead)
    ids = token_ids(1, 40)
    expected = logits(model, ids)
    again = SmallThinkerForCausalLM.from_pretrained(folder)
    np.testing.assert_array_equal(logits(again, ids), expected)

    exported, packed = tmp_path / "exported.gguf", tmp_path / "packed.gguf"
    write_gguf(OfficialCheckpoint(folder), {"f32": exported}, "toy", None)
    assert GGUFModel(exported).config.router_lead == lead
    assert pack_main([str(folder), str(packed), "--type", "f32", "--layout", "stock"]) == 0
    for path in (exported, packed):
        # Another architecture's name: a reader that knows nothing of the lead has to refuse the file.
        assert GGUFReader(path).fields["general.architecture"].contents() == "smallthinker-lead"
        with Engine.open(path, threads=2) as engine:
            assert engine.info.router_lead == lead
            np.testing.assert_allclose(engine.logits(ids[0].numpy()), expected, rtol=0, atol=1e-4)


def test_without_a_lead_files_are_what_they_were(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "folder", 0)
    assert "router_lead" not in (folder / "config.json").read_text()
    write_gguf(OfficialCheckpoint(folder), {"f32": tmp_path / "m.gguf"}, "toy", None)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.architecture"].contents() == "smallthinker"
    assert not any("router_lead" in name for name in fields)


@pytest.mark.parametrize("lead", [-1, 1.5, "1", True])
def test_an_impossible_lead_is_named(
    lead: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"router_lead is .*from 0 on"):
        tiny_config(router_lead=lead)
    _, folder = saved(tmp_path / "folder", 0)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"router_lead": lead}))
    assert pack_main([str(folder), str(tmp_path / "m.gguf")]) == 2
    assert "router_lead" in capsys.readouterr().err


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "folder", 1)
    path = tmp_path / "m.gguf"
    write_gguf(OfficialCheckpoint(folder), {"f32": path}, "toy", None)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"smallthinker-lead", b"smallthinker-late", 1))
    with pytest.raises(StageError, match="smallthinker-late"):
        GGUFModel(path)
