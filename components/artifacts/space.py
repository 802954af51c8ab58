"""Says in one sentence that a disk is full: ``no_room(error, context)``."""

from __future__ import annotations

import errno
import shutil

from components.artifacts.stage import StageContext

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's writer of checkpoints tells a failed write from others by nothing but its words.
_TORCH = ("PytorchStreamWriter failed", "unexpected pos", "No space left on device", "file write failed")


def _means_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH)


def no_room(error: BaseException, context: StageContext) -> str | None:
    """What to do about an error that a full disk caused, directly or as the cause of others; ``None`` for another."""
    seen: BaseException | None = error
    while seen is not None and not _means_full(seen):
        seen = seen.__cause__ or seen.__context__
    if seen is None:
        return None
    named = seen.filename if isinstance(seen, OSError) else None
    free_bytes = shutil.disk_usage(context.out).free
    return (
        f"no room left while stage {context.stage} was writing{f' {named}' if named else ''} "
        f"({free_bytes / 2**20:.0f} MiB free under {context.out}). What was finished is kept: make room and run "
        "the same command again"
    )
