"""The memory plan: what an engine will hold, computed before anything is allocated.

parse_bytes("1GiB")                     # 1073741824
plan = MemoryPlan(...); plan.total_bytes
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from runtime_cpu._core import EngineError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}ib"] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[_letter] = 1024**_power


class MemoryBudgetError(EngineError):
    """The model does not fit in the memory that it may use.

    Attributes:
        needed_bytes: the smallest budget that would have been enough.
    """

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


def parse_bytes(value: int | str) -> int:
    """Bytes of ``"1GiB"``, ``"800MB"``, ``"512M"`` (binary) or a plain number.

    Raises:
        ValueError: not a positive size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
        if match is None or match.group(2) not in _UNITS:
            raise ValueError(f"memory is {value!r}; write bytes or a size such as '800MiB' or '1.5GiB'")
        size = int(float(match.group(1)) * _UNITS[match.group(2)])
    if size <= 0:
        raise ValueError(f"memory is {value!r}; it has to be more than 0 bytes")
    return size


def format_bytes(size: int) -> str:
    """A size for people: ``1.50 GiB``."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{int(value)} {unit}" if unit == "bytes" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, for the whole process.

    Attributes:
        weight_bytes: weights that always stay in memory, without the experts below.
        expert_bytes: room for experts: ``experts_in_memory`` of ``experts``; the others are read on demand. 0 of 0 when
            this file's experts can only be mapped: they are part of ``weight_bytes`` then.
        kv_bytes: keys and values of all sessions.
        scratch_bytes: what a forward pass writes, and buffers for reading.
        interpreter_bytes: what the process holds before loading, and a reserve for what it will allocate besides.
    """

    weight_bytes: int
    expert_bytes: int
    experts_in_memory: int
    experts: int
    kv_bytes: int
    scratch_bytes: int
    interpreter_bytes: int
    budget_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """All of it."""
        parts = (
            self.weight_bytes,
            self.expert_bytes,
            self.kv_bytes,
            self.scratch_bytes,
            self.interpreter_bytes,
        )
        return sum(parts)

    @property
    def offloads(self) -> bool:
        """Whether some experts stay on disk."""
        return self.experts_in_memory < self.experts

    def __str__(self) -> str:
        experts = f"experts {format_bytes(self.expert_bytes)}"
        if self.offloads:
            experts += f" for {self.experts_in_memory} of {self.experts}"
        parts = [f"weights {format_bytes(self.weight_bytes)}", *([experts] if self.experts else [])]
        parts += [
            f"{name} {format_bytes(size)}"
            for name, size in (
                ("KV cache", self.kv_bytes),
                ("scratch", self.scratch_bytes),
                ("interpreter", self.interpreter_bytes),
            )
        ]
        return f"{format_bytes(self.total_bytes)} ({', '.join(parts)})"
