"""Training of the quality classifiers does not depend on what lay in memory before."""

import ctypes
import hashlib
from pathlib import Path

import pytest
from fasttext.FastText import train_supervised

from components.curation.quality import train_reliably


@pytest.fixture
def dirty_heap() -> list[int]:
    """Leaves large free chunks full of NaN bits in the heap, between chunks that stay."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    assert libc.mallopt(-3, 1 << 24)  # M_MMAP_THRESHOLD: the chunks come from the heap
    chunks = [libc.malloc(size) for _ in range(8) for size in (2_200_000, 64)]
    for chunk in chunks[::2]:
        ctypes.memset(chunk, 0xFF, 2_200_000)
        libc.free(chunk)
    return chunks[1::2]


def test_the_same_text_gives_the_same_bytes_whatever_memory_held(
    tmp_path: Path, dirty_heap: list[int]
) -> None:
    text = tmp_path / "text"
    text.write_text("".join(f"__label__{n % 2} word{n % 2} and word{n % 7} again\n" for n in range(200)))
    digests = set()
    for _ in range(6):
        model = train_reliably(train_supervised, text, dim=8, epoch=5, lr=0.1, minn=1, maxn=3, bucket=50_000)
        model.save_model(str(tmp_path / "model"))
        digests.add(hashlib.sha256((tmp_path / "model").read_bytes()).hexdigest())
    assert len(digests) == 1
    assert len(dirty_heap) == 8
