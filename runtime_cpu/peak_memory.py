"""The most memory that a process has held: ``peak_resident_bytes()``.

Without any import of ours: ``bench_worker.py`` loads this file in environments that hold only the peer.
"""

from __future__ import annotations

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
