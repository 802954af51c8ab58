"""Fake CUDA tensors that can be differentiated without CUDA: ``load_fake_cuda()``, before torch is imported.

torch's ``FakeTensorMode`` makes tensors that are on a GPU by name and have no memory. A build of torch without CUDA can
make them but not run their backward pass: autograd asks the device for its stream. ``fake_cuda.cpp`` answers; it is
compiled once per version of torch (some seconds) into the user's cache. It changes what torch believes about the whole
process, so it belongs into processes of their own, like that of ``components.pretraining.dry_run``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from components.artifacts import StageError

_SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise StageError("A dry run needs torch; install the extra: pip install 'smallthinker[pipeline]'.")
    return Path(spec.origin).parent


def _library(torch_folder: Path) -> Path:
    """The compiled library, made now if this torch has none yet."""
    compiler = os.environ.get("CXX", "c++")
    key = hashlib.sha256(
        f"{version('torch')} {torch_folder} {sys.platform} {compiler}".encode() + _SOURCE.read_bytes()
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smallthinker"
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"fake_cuda-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made, libraries = Path(folder) / library.name, torch_folder / "lib"
        command = [
            compiler,
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            f"-I{torch_folder / 'include'}",
            str(_SOURCE),
        ]
        command += [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}", "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise StageError(
                f"A dry run compiles one small file and finds no C++ compiler {compiler!r}; set CXX."
            ) from error
        except subprocess.CalledProcessError as error:
            raise StageError(
                f"{compiler} could not compile {_SOURCE.name}:\n{error.stderr[-2000:]}"
            ) from error
        made.rename(library)
    return library


def load_fake_cuda() -> None:
    """Let fake CUDA tensors be differentiated in this process; with a CUDA build of torch, torch itself does.

    Raises:
        StageError: torch was imported before, is missing, or there is no C++ compiler.
    """
    if "torch" in sys.modules:
        raise StageError(
            "Fake CUDA must be loaded before torch is imported; run the dry run in its own process."
        )
    folder = _torch_folder()
    if any((folder / "lib").glob("libtorch_cuda.*")):
        return
    ctypes.CDLL(str(_library(folder)))
