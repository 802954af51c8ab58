"""Small real stages that the runner's tests run in processes of their own."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

from components.artifacts import StageAborted, StageContext, StageError, StageInterrupted

VERSION = 1


def run(context: StageContext) -> dict[str, float]:
    config = context.config
    attempts = context.scratch / "attempts"
    with attempts.open("a") as handle:
        handle.write("x")
    if config.get("fail"):
        raise StageError("the value 7 is wrong; allowed are 1 to 5")
    if config.get("abort"):
        raise StageAborted("a node was lost")
    if config.get("interrupted"):
        raise StageInterrupted("stopped by SIGTERM, saved")
    if config.get("torn_checkpoint"):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
    if config.get("crash"):
        raise ZeroDivisionError("a defect")
    if config.get("full_disk"):
        raise RuntimeError("writer failed") from OSError(errno.ENOSPC, "No space left on device", "shard.ds")
    if config.get("full_metrics"):
        (context.out / "metrics.jsonl").symlink_to("/dev/full")
        context.log_metrics({"loss": 1.0}, 0)
    if config.get("die"):
        os.kill(os.getpid(), 9)
    if gate := config.get("saves_after"):

        def stop(number: int, frame: object) -> None:
            (context.scratch / "saving").touch()
            while not Path(gate).exists():
                time.sleep(0.02)
            (context.scratch / "saved").touch()
            sys.exit(1)

        signal.signal(signal.SIGTERM, stop)
        context.log_metrics({"loss": 1.0}, 0)
        while True:
            signal.pause()
    for step in range(3):
        context.log_metrics({"loss": 3.0 - step}, step)
    if awaited := config.get("wait_for"):
        (context.out / "started").write_text(str(os.getpid()))
        while not Path(awaited).exists():
            time.sleep(0.02)
    parents = "".join((path / "data.txt").read_text() for path in context.inputs.values())
    (context.out / "data.txt").write_text(f"{parents}{context.stage}={config['value']};")
    context.note("a note")
    context.peaks = config.get("peaks")
    return {"value": config["value"], "attempts": attempts.stat().st_size}
