"""Checkpoints carried to other processes: every bit of weights, moments and step arrives, and the data goes on."""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from components.pretraining.config import PretrainConfig
from tests.pretraining.children import Children
from tests.pretraining.factory import run_config
from tests.pretraining.test_dropping import backward, build
from tests.pretraining.test_launcher import write_request
from tests.pretraining.test_training import flip, lines, saved

KEYS = ("fp32", "exp_avg", "exp_avg_sq")


def fragments(engine: Any) -> list[dict[str, Any]]:
    """This rank's pieces of the state, with where each belongs."""
    zero, found = engine.optimizer, []
    for group, parameters in enumerate(zero.bit16_groups):
        flat = zero.single_partition_of_fp32_groups[group]
        state = zero.optimizer.state[flat]
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            at, of = mapping.hp_fragment_address, mapping.lp_fragment_address
            values = {"fp32": flat, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            found.append({
                "name": zero.param_names[parameter],
                "shape": tuple(parameter.shape),
                "experts": getattr(parameter, "ds_autoep_uc_meta", {}).get("local_experts"),
                "start": of.start,
                **{key: value.detach().narrow(0, at.start, at.numel).clone() for key, value in values.items()},
                "step": float(state["step"]),
            })  # fmt: skip
    return found


def weights(engine: Any) -> dict[str, Any]:
    """The weights that the forward pass uses."""
    return {
        name: (getattr(value, "ds_autoep_uc_meta", {}).get("local_experts"), value.detach().clone())
        for name, value in engine.module.named_parameters()
    }


def official(name: str) -> str:
    return name.replace("experts.experts.w1", "experts.gate_up_proj").replace(
        "experts.experts.w2", "experts.down_proj"
    )


def together(folder: Path, experts: int = 4) -> dict[str, Any]:
    """The whole state out of all ranks' pieces, covering every element."""
    whole: dict[str, Any] = {}
    for path in sorted(folder.glob("rank-*.pt")):
        for piece in torch.load(path, weights_only=False):
            if piece["name"].endswith("experts.experts.w3"):
                assert not piece["fp32"].any()
                continue
            local = piece["experts"]
            shape = (experts, *piece["shape"][1:]) if local else piece["shape"]
            entry = whole.setdefault(
                official(piece["name"]), {key: torch.full(shape, torch.nan) for key in KEYS}
            )
            for key in KEYS:
                part = entry[key][local[0] : local[-1] + 1] if local else entry[key]
                part.view(-1).narrow(0, piece["start"], piece[key].numel()).copy_(piece[key])
            assert entry.setdefault("step", piece["step"]) == piece["step"]
    for name, entry in whole.items():
        for key in KEYS:
            assert not entry[key].isnan().any(), (name, key)
    return whole


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys() and len(one) > 10
    for name, entry in one.items():
        assert entry["step"] == other[name]["step"] > 0
        for key in KEYS:
            assert torch.equal(entry[key], other[name][key]), (name, key)


def link(values: dict[str, Any], place: Path, first: int) -> None:
    """One mesh of a chain: take over the newest checkpoint, say what arrived, train three steps, save."""
    from components.pretraining.checkpoints.resharding import load_universal, universal
    from components.pretraining.checkpoints.saving import Saver, find_newest
    from components.pretraining.deepspeed.engine import load_engine
    from components.pretraining.processes.collectives import Collectives
    from components.weights.checkpoint_store import CheckpointStore

    config = PretrainConfig.model_validate(values)
    engine, ranks = build(config)
    store = CheckpointStore(place / "checkpoints", 10)
    collectives = Collectives(ranks)
    checkpoint, complaints = find_newest(store, None, ranks, collectives)
    assert complaints == []

    def dump(name: str) -> None:
        folder = place / name
        folder.mkdir(exist_ok=True)
        torch.save(fragments(engine), folder / f"rank-{ranks.rank}.pt")
        torch.save(weights(engine), folder / f"weights-{ranks.rank}.pt")

    if first:
        assert checkpoint is not None and checkpoint.step == first
        if checkpoint.mesh == ranks.mesh():
            state = load_engine(engine, checkpoint.path)
        else:
            state = load_universal(engine, universal(store, checkpoint, ranks, collectives))
        assert state == {"mark": first} and engine.global_steps == first
        dump(f"arrived-{first}")
    for step in range(first, first + 3):
        backward(engine, config, ranks, step)
        engine.step()
    saver = Saver(store, ranks, ranks.mesh(), in_background=True)
    saver.save(engine, first + 3, {"mark": first + 3})
    saver.wait()
    dump(f"left-{first + 3}")
    collectives.barrier()
    os._exit(0)


def run_chain(children: Children, place: Path, meshes: list[tuple[int, int]], **values: Any) -> None:
    """Meshes are (processes, expert_parallel); each takes over from the one before."""
    for number, (world, expert_parallel) in enumerate(meshes):
        config = run_config(sequences_per_micro_batch=2, **values)
        if expert_parallel > 1:
            config["expert_parallel"] = expert_parallel
        children.call_ranks(world, link, config, place, 3 * number)
    for number, _ in enumerate(pairwise(meshes), 1):
        left, arrived = (together(place / f"{when}-{3 * number}") for when in ("left", "arrived"))
        assert_same_state(left, arrived)
        for path in (place / f"arrived-{3 * number}").glob("weights-*.pt"):
            for name, (local, weight) in torch.load(path, weights_only=False).items():
                if name.endswith("experts.experts.w3"):
                    continue
                master = arrived[official(name)]["fp32"]
                master = master[local[0] : local[-1] + 1] if local else master
                assert torch.equal(weight, master.to(weight.dtype)), name


def test_two_processes_take_over_from_one_and_one_from_two(tmp_path: Path, children: Children) -> None:
    run_chain(children, tmp_path, [(1, 1), (2, 1), (1, 1)], precision="bf16", zero_stage=2)
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    steps = {f"step-{step:08d}" for step in (3, 6, 9)}
    assert folders == {*steps, "step-00000003-universal", "step-00000006-universal"}


@pytest.mark.campaign
@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_two_four_one(tmp_path: Path, children: Children, precision: str, zero_stage: int) -> None:
    run_chain(
        children, tmp_path, [(1, 1), (2, 1), (4, 1), (1, 1)], precision=precision, zero_stage=zero_stage
    )


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("precision", "zero_stage", "meshes"),
    [
        ("fp32", 1, [(1, 1), (2, 2), (2, 1), (2, 2), (1, 1)]),
        ("bf16", 2, [(1, 1), (4, 2), (4, 4), (2, 2), (1, 1)]),
    ],
)
def test_experts_are_dealt_anew(
    tmp_path: Path, children: Children, precision: str, zero_stage: int, meshes: list[tuple[int, int]]
) -> None:
    run_chain(children, tmp_path, meshes, precision=precision, zero_stage=zero_stage)


@pytest.mark.campaign
def test_a_damaged_universal_form_is_made_again(tmp_path: Path, children: Children) -> None:
    config = run_config(sequences_per_micro_batch=2, precision="fp32")
    children.call_ranks(1, link, config, tmp_path, 0)
    children.call_ranks(1, link, {**config, "zero_stage": 2}, tmp_path, 3)
    made = tmp_path / "checkpoints" / "step-00000003-universal"
    damaged = next(made.glob("zero/model.embed_tokens.weight/exp_avg.pt"))
    wanted = damaged.read_bytes()
    flip(damaged)
    (tmp_path / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    children.call_ranks(1, link, {**config, "zero_stage": 2}, tmp_path, 3)
    assert damaged.read_bytes() == wanted
    assert_same_state(together(tmp_path / "left-3"), together(tmp_path / "arrived-3"))


# ---------------------------------------------------------------- whole runs


def train_part(request: Path, log: Path, stop_at: int) -> None:
    """A rank of a run that writes down every row it trains on, and is told to stop at a step."""
    from components.pretraining import worker
    from components.pretraining.data.prefetch import Prefetcher

    original = Prefetcher.take
    rank = int(os.environ["RANK"])

    def watched(self: Prefetcher, step: int) -> Any:
        groups = original(self, step)
        rows = [row for group in groups for batch in group for row in batch.input_ids_BT.tolist()]
        with (log / f"rank-{os.getpid()}").open("a") as handle:
            handle.write(json.dumps([step, rows]) + "\n")
        if step == stop_at and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return groups

    Prefetcher.take = watched  # type: ignore[method-assign]
    worker._GRACE_S = 0.0
    worker.main([str(request)])
    os._exit(0)


def consumed(log: Path) -> dict[int, list[list[int]]]:
    """Rows by step, in no order, over all ranks."""
    rows: dict[int, list[list[int]]] = {}
    for path in log.iterdir():
        for line in path.read_text().splitlines():
            step, seen = json.loads(line)
            rows.setdefault(step, []).extend(seen)
    return {step: sorted(seen) for step, seen in rows.items()}


def run_parts(
    children: Children, tokens: Path, place: Path, parts: list[tuple[dict[str, Any], int, int]], **values: Any
) -> dict[int, list[list[int]]]:
    """A run in parts of (fields, processes, step to stop at); what it trained on."""
    log = place / "log"
    log.mkdir(parents=True)
    for fields, world, stop_at in parts:
        config = run_config(sequences_per_micro_batch=2, **values, **fields)
        request = place / "out" / ".work" / "request.json"
        if request.exists():
            request.write_text(json.dumps({**json.loads(request.read_text()), "config": config}))
        else:
            write_request(place / "out", tokens, config)
        children.call_ranks(world, train_part, request, log, stop_at)
    answer = json.loads(request.with_name("result.json").read_text())
    assert "error" not in answer, answer
    return consumed(log)


def assert_near(out: Path, one: Path, rel: float) -> None:
    found, wanted = lines(out), lines(one)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, expected in zip(found, wanted, strict=True):
        assert row["metrics"].keys() == expected["metrics"].keys()
        for name, value in expected["metrics"].items():
            if name.startswith(("train/ce", "heldout")):
                assert row["metrics"][name] == pytest.approx(value, rel=rel), (row["step"], name)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("precision", "rel"),
    # Sums in another order: rounding, grown over 36 steps at a high learning rate.
    [("fp32", 1e-3), ("bf16", 3e-2)],
)
def test_a_run_that_changes_its_processes_ends_like_one_that_does_not(
    tmp_path: Path, tokens: Path, children: Children, precision: str, rel: float
) -> None:
    """With exact expert counts: running ones depend on how many micro-steps a process takes."""
    values = {"precision": precision, "load_balance_counts": "exact"}
    whole = run_parts(children, tokens, tmp_path / "whole", [({}, 1, -1)], **values)
    parts = [({}, 1, 7), ({"processes": 2}, 2, 15), ({"processes": 4}, 4, 25), ({}, 1, -1)]
    moved = run_parts(children, tokens, tmp_path / "moved", parts, **values)
    assert moved == whole and sorted(whole) == list(range(36))
    assert_near(tmp_path / "moved" / "out", tmp_path / "whole" / "out", rel)
    assert saved(tmp_path / "moved" / "out") == [35, 36]
