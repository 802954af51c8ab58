"""What the machine under a benchmark is and can do: processor, memory bandwidth, disk rate, memory cgroups.

python -m runtime_cpu.bench.machine 1 2      # bytes per second read from memory by 1 and by 2 threads, as JSON
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_cpu.engine.options import available_cores, available_kernels

_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "neon",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
_BANDWIDTH_BYTES = 512 << 20  # many times the caches; less on small machines
_HUGE_PAGE_BYTES = 2 << 20
_DISK_BLOCK_BYTES = 8 << 20
_DISK_BYTES, _DISK_S, _DISK_READS = 2 << 30, 3.0, 4
_CGROUP_ROOTS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))  # version 1, version 2


class MachineError(Exception):
    """Something about the machine could not be measured or set up; the message says why."""


def describe_machine() -> dict[str, Any]:
    """Processor, instruction sets, cores, memory and system. No host name: reports get published."""
    cpu, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                cpu = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": available_cores(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "kernels": available_kernels(),
    }


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_bandwidth(thread_counts: Sequence[int]) -> dict[str, int]:
    """Bytes per second that so many threads of a child process read from memory, by number of threads.

    Raises:
        MachineError: the child failed.
    """
    command = [sys.executable, "-m", "runtime_cpu.bench.machine", *map(str, thread_counts)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise MachineError(f"measuring memory bandwidth failed: {done.stderr.strip().splitlines()[-1:]}")
    speeds: dict[str, int] = json.loads(done.stdout)
    return speeds


def measure_bandwidth(threads: int) -> float:
    """Bytes per second read by ``threads`` threads of this process, in huge pages where there are any: best of 6.

    The inner loop is BLAS's dot product of an array's halves: two streams of loads per thread.
    """
    size = min(_BANDWIDTH_BYTES, _memory_bytes() // 8) // threads // 8 * 8
    halves = []
    for _ in range(threads):
        array = _huge_pages(size).view(np.float32)
        array[:] = 1
        halves.append((array[: array.size // 2], array[array.size // 2 :]))
    best = 0.0
    for _ in range(6):
        workers = [threading.Thread(target=np.dot, args=pair) for pair in halves]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, threads * size / (time.perf_counter() - started))
    return best


def _huge_pages(size: int) -> NDArray[np.uint8]:
    """``size`` bytes that begin at a huge page, where the system has them, and live as long as the array."""
    memory = mmap.mmap(-1, size + _HUGE_PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(memory, np.uint8)
    start = -room.ctypes.data % _HUGE_PAGE_BYTES
    return room[start : start + size]


def disk_rate(file: Path) -> dict[str, Any]:
    """How fast ``file`` comes from the disk: O_DIRECT reads of 8 MiB, four at a time as the engine's reader has them.

    In order, at most 2 GiB or 3 s, into huge pages where there are any: small ones cut a read into many.

    Returns:
        ``read_bytes_per_s`` and the ``bytes`` read, or ``unavailable`` with the reason (a small file, no O_DIRECT).
    """
    size = file.stat().st_size
    if size < 8 * _DISK_BLOCK_BYTES:
        return {"unavailable": "the file is too small to tell"}
    if not hasattr(os, "O_DIRECT"):
        return {"unavailable": f"{platform.system()} has no O_DIRECT"}
    offsets = iter(range(0, min(size, _DISK_BYTES) - _DISK_BLOCK_BYTES + 1, _DISK_BLOCK_BYTES))
    deadline = time.perf_counter() + _DISK_S

    def read_share(descriptor: int) -> int:
        block = _huge_pages(_DISK_BLOCK_BYTES).data
        total = 0
        for offset in offsets:
            total += os.preadv(descriptor, [block], offset)
            if time.perf_counter() > deadline:
                break
        return total

    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        try:
            started = time.perf_counter()
            with ThreadPoolExecutor(_DISK_READS) as pool:
                total = sum(pool.map(read_share, [descriptor] * _DISK_READS))
            seconds = time.perf_counter() - started
        finally:
            os.close(descriptor)
    except OSError as error:
        return {"unavailable": f"the file system offers no O_DIRECT ({error.strerror})"}
    return {"read_bytes_per_s": round(total / seconds), "bytes": total}


def drop_cached(file: Path) -> None:
    """Ask the kernel to forget the pages of ``file``: a cgroup pays only for pages that it reads itself."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def busy_cpu_s() -> float | None:
    """Seconds that all cores together were busy or stolen since the start; ``None`` where the system does not tell."""
    try:
        user, nice, system, _idle, _wait, irq, soft, stolen = map(
            int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")


def process_cpu_s(process_id: int) -> float | None:
    """Seconds of processor time that a process has used; ``None`` where the system does not tell."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


class MemoryCgroup:
    """A memory limit enforced by the kernel: page cache counts, exceeding it kills. Version 1 or 2 of cgroups.

    Attributes:
        folder: the group, in the system's tree of them.
    """

    def __init__(self, limit_bytes: int, name: str) -> None:
        """Make the group.

        Raises:
            MachineError: there is no memory controller that this process may use.
        """
        reasons = []
        for root in _CGROUP_ROOTS:
            old = (root / "memory.limit_in_bytes").exists()
            if not old and not (root / "cgroup.controllers").exists():
                continue
            self.folder = root / name
            self._limit = self.folder / ("memory.limit_in_bytes" if old else "memory.max")
            self._peak = self.folder / ("memory.max_usage_in_bytes" if old else "memory.peak")
            try:
                self.folder.mkdir(exist_ok=True)
                self._limit.write_text(str(limit_bytes))
                return
            except OSError as error:
                reasons.append(f"{root}: {error.strerror}")
                self.remove()
        raise MachineError(f"no memory cgroup can be made ({'; '.join(reasons) or 'none is mounted'})")

    def enter(self) -> None:
        """Move this process into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        """The most memory that was charged, page cache included; ``None`` where the kernel does not tell."""
        try:
            return int(self._peak.read_text())
        except (OSError, ValueError):
            return None

    def remove(self) -> None:
        """Remove the group; its processes have to be gone."""
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # pages of an ended process may still be on their way out
                time.sleep(0.02)


@contextmanager
def contention(wanted: bool) -> Iterator[None]:
    """While the block runs, another process burns one core (if ``wanted``)."""
    if not wanted:
        yield
        return
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        burner.kill()
        burner.wait()


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps({count: round(measure_bandwidth(int(count))) for count in sys.argv[1:]}) + "\n"
    )
