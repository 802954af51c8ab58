"""Every Triton kernel of a recipe, compiled without a GPU: ``python -m components.pretraining.kernel_proofs.compile``.

Runs the trainer's passes over fake CUDA tensors, lets Inductor write their kernels for an H100 and a B200, and makes
machine code of each with Triton and NVIDIA's assembler, which come with the package ``triton``. Says for every kernel
what shared memory and registers it takes, and fails when one cannot be compiled or launched. What the GPU's libraries
do instead (matrix products, sorting, embedding, the optimizer) is listed beside. No kernel runs, so nothing is said
about results or time.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

from components.artifacts import StageError
from components.pretraining.kernel_proofs.targets import TARGETS, Target
from components.pretraining.presets import PRESETS

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
# What a training step launches that is neither Triton's nor seen by Inductor.
ATEN_KERNELS = (
    "embedding and its backward pass",
    "mm of router, output matrix and, eager, of the loss",
    "topk, sort, scatter_, scatter_add_, cumsum of the routing",
    "index_select of rows to their experts",
    "grouped_mm, forward and backward",
    "softmax, sigmoid, logsumexp of the routers' losses",
    "the final norm, the angles of RoPE and the block masks",
    "index_add_ after an all-to-all (expert parallelism)",
    "AdamW's fused step, norms and copies of ZeRO",
)


def assembler(target: Target) -> str:
    """Version of the assembler that Triton brings for ``target``."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if target.arch >= 100 else knobs.nvidia.ptxas
    printed = subprocess.run([tool.path, "--version"], check=True, capture_output=True, text=True).stdout
    return next(word for word in printed.split() if re.fullmatch(r"V[\d.]+", word))


def _compile_one(source: str, name: str, target: Target) -> list[dict[str, Any]]:
    """Machine code of a kernel in each of its configurations, between which the GPU would choose by time."""
    from torch._inductor.codecache import PyCodeCache

    made = []
    tuner = getattr(PyCodeCache.load(source), name)
    for config in tuner.configs:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = tuner._precompile_config(config).kernel
        cubin, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
        registers, spills = _REGISTERS.search(log.getvalue()), _SPILLS.search(log.getvalue())
        assert registers is not None and spills is not None, "the assembler's report has another form"
        entry = {
            "config": dict(config.kwargs),
            "warps": config.num_warps,
            "stages": config.num_stages,
            "shared_bytes": int(kernel.metadata.shared),
            "tensor_columns": int(getattr(kernel.metadata, "tmem_size", 0) or 0),
            "registers": int(registers[1]),
            "spilled_bytes": int(spills[1]) + int(spills[2]),
            "cubin_bytes": len(cubin) if cubin[:4] == b"\x7fELF" else 0,
            "products": next((word for word in _PRODUCTS if word in ptx), ""),
        }
        entry["faults"] = limits_exceeded(entry, target)
        made.append(entry)
    return made


def limits_exceeded(entry: dict[str, Any], target: Target) -> list[str]:
    """Why a compiled kernel could not be launched on ``target``; empty when it could."""
    threads = 32 * entry["warps"]
    asked = (
        ("bytes of shared memory a block", entry["shared_bytes"], target.block_shared_bytes),
        ("columns of tensor memory a block", entry["tensor_columns"], target.tensor_columns),
        ("registers a thread", entry["registers"], target.thread_registers),
        ("registers a block", entry["registers"] * threads, target.block_registers),
        ("threads a block", threads, 1024),
    )
    faults = [f"{value} {what}, of at most {most}" for what, value, most in asked if value > most]
    return faults if entry["cubin_bytes"] else [*faults, "no machine code was made"]


def _cpu_s() -> float:
    """CPU time of this process and those that it has run."""
    return sum(os.times()[:4])


def compile_kernels(recipe: str, name: str) -> dict[str, Any]:
    """Lower and compile everything of ``recipe`` for one target; in a process that has not imported torch.

    Args:
        recipe: its name.
        name: the target's.

    Returns:
        The kernels and what the generated code calls of the libraries, ready for JSON.
    """
    from components.pretraining.dry_run.fake_cuda import load_fake_cuda

    load_fake_cuda()
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # the assembler's report is not in Triton's cache
    import torch

    from components.pretraining.kernel_proofs.targets import stand_in
    from components.pretraining.kernel_proofs.training_passes import run_passes

    target = TARGETS[name]
    collected = run_passes(recipe, target)
    lowered = _cpu_s()
    kernels = []
    with stand_in(target), torch._inductor.config.patch(use_static_triton_launcher=False):
        for source, (kernel, moment) in collected.kernels.items():
            entry: dict[str, Any] = {"kernel": kernel, "moment": moment, "configs": [], "error": ""}
            try:
                entry["configs"] = _compile_one(source, kernel, target)
            except Exception as error:  # whatever a compiler says is this kernel's verdict
                entry["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            kernels.append(entry)
    return {
        "target": name,
        "arch": f"sm_{target.arch}a",
        "assembler": assembler(target),
        "graphs": collected.graphs,
        "kernels": kernels,
        "library_calls": dict(collected.library_calls.most_common()),
        "lowering_cpu_s": lowered,
        "compiling_cpu_s": _cpu_s() - lowered,
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong with one target's kernels, a sentence each."""
    found = []
    for kernel in result["kernels"]:
        if kernel["error"] or not kernel["configs"]:
            found.append(f"{kernel['kernel']} ({kernel['moment']}): {kernel['error'] or 'no configuration'}")
        for entry in kernel["configs"]:
            found += [f"{kernel['kernel']} ({kernel['moment']}): {fault}" for fault in entry["faults"]]
    return found


def table(result: dict[str, Any]) -> str:
    """One line a kernel: the most that any of its configurations takes."""
    lines = [
        f"{result['arch']}: {len(result['kernels'])} kernels of {result['graphs']} graphs in "
        f"{sum(len(kernel['configs']) for kernel in result['kernels'])} configurations, assembler "
        f"{result['assembler']}; written in {result['lowering_cpu_s']:.0f} s of CPU time, compiled in "
        f"{result['compiling_cpu_s']:.0f}",
        f"{'first met in':<22}{'kernel':<58}{'shared B':>9}{'regs':>5}{'spilled B':>10}{'cubin B':>9}  products",
    ]
    for kernel in result["kernels"]:
        entries = kernel["configs"]
        if not entries:
            lines.append(f"{kernel['moment']:<22}{kernel['kernel'][7:64]:<58} {kernel['error'][:40]}")
            continue
        shared, registers, spilled, cubin = (
            max(entry[key] for entry in entries)
            for key in ("shared_bytes", "registers", "spilled_bytes", "cubin_bytes")
        )
        lines.append(
            f"{kernel['moment']:<22}{kernel['kernel'][7:64]:<58}{shared:>9}{registers:>5}{spilled:>10}{cubin:>9}"
            f"  {entries[0]['products']}"
        )
    calls = ", ".join(f"{count} x {name}" for name, count in result["library_calls"].items())
    lines.append(f"library calls in the generated code: {calls}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m components.pretraining.kernel_proofs.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", choices=sorted(PRESETS), default="21b")
    parser.add_argument("--target", choices=sorted(TARGETS), help="one of them; default: each")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: tables on stderr, JSON on stdout; 1 when a kernel is at fault."""
    options = parser().parse_args(arguments)
    if find_spec("triton") is None:
        raise StageError(
            "Compiling kernels needs the package triton, which comes with torch's CUDA builds and with the extra "
            "'dev': pip install 'smallthinker[dev]'."
        )
    from importlib.metadata import version

    targets = [options.target] if options.target else sorted(TARGETS, reverse=True)
    began = time.perf_counter()
    # A process each, since what torch believes about the GPU holds for a whole process.
    with ProcessPoolExecutor(len(targets), multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(compile_kernels, [options.recipe] * len(targets), targets))
    for result in results:
        sys.stderr.write(table(result) + "\n\n")
    sys.stderr.write("launched outside Triton: " + "; ".join(ATEN_KERNELS) + "\n")
    found = [f"{result['arch']}: {fault}" for result in results for fault in faults(result)]
    sys.stderr.write(
        f"torch {version('torch')}, triton {version('triton')}: "
        + ("\n".join(["not every kernel can run:", *found]) if found else "every kernel compiles and fits")
        + f" ({time.perf_counter() - began:.0f} s)\n"
    )
    sys.stdout.write(json.dumps({"recipe": options.recipe, "faults": found, "targets": results}) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
