"""What this process holds: ``resident_bytes()`` now, ``peak_resident_bytes()`` at its most.

Without any import of ours: ``bench/worker.py`` loads this file in environments that hold only the peer.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """Since this process became this program.

    ``getrusage`` would not do: Linux carries the parent's figure over ``exec``. Other systems offer nothing else.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Memory that this process holds now (0 where the system does not tell)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * resource.getpagesize()


def release_free_memory() -> None:
    """Give memory that Python and its libraries have freed back to the system, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
