"""Runs the stage in processes that can be killed: ``Children().start(tokens, out, config)``.

With ``freeze_when`` a run stops itself at an instant at which the function, called in the run, holds. A fork server
imports torch and DeepSpeed once; every run is then a real process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.freezing import await_frozen, freeze_when
from tests.waiting import CEILING_S, wait_for

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

Instant = Callable[[], bool]


def train(
    tokens: Path, out: Path, config: dict[str, Any], answer: Path, instant: Instant | None = None
) -> None:
    """The child: run the stage and write down how it ended."""
    from components.artifacts import StageContext, StageError
    from components.pretraining import run

    out.mkdir(parents=True, exist_ok=True)
    context = StageContext("pretrain", "tiny", config, {"tokenize": tokens}, out, out.parent / "cache")
    if instant is not None:
        look, log_metrics = freeze_when(instant), context.log_metrics

        def log_and_look(*arguments: Any, **named: Any) -> None:
            log_metrics(*arguments, **named)
            look()

        context.log_metrics = log_and_look  # type: ignore[method-assign]
    result: dict[str, Any] = {}
    try:
        result["metrics"] = run(context)
    except StageError as error:
        result["error"], result["type"] = str(error), type(error).__name__
    finally:
        context.close()
    answer.write_text(json.dumps({**result, "notes": context.notes}))


def work(environment: dict[str, str], request: Path) -> None:
    """The child as torchrun starts it: one rank of several."""
    from components.pretraining.worker import main

    os.environ.update(environment)
    raise SystemExit(main([str(request)]))


def call(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The child as one rank of several, calling a function of a test module."""
    os.environ.update(environment)
    function(*arguments)


def preload() -> None:
    """Import what every child needs, in the fork server."""
    import deepspeed  # type: ignore[import-untyped]  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    import components.pretraining.deepspeed.expert_parallel
    import components.pretraining.training.trainer  # noqa: F401


if (
    multiprocessing.current_process().name == "MainProcess"
    and os.environ.get("PRETRAIN_TESTS_PRELOAD") == "1"
):
    preload()


@dataclass
class Child:
    """A run in its own process."""

    process: ForkServerProcess
    answer: Path

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def await_frozen(self) -> None:
        """Return when the process has stopped itself (see :meth:`Children.start`)."""
        assert self.process.pid is not None
        await_frozen(self.process.pid, lambda: self.alive)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.signal(signal.SIGKILL)
        self.process.join(CEILING_S)
        assert self.process.exitcode == -signal.SIGKILL

    def end(self) -> dict[str, Any]:
        """Wait for the end; what the run answered."""
        self.process.join(CEILING_S)
        assert self.process.exitcode == 0, f"exit code {self.process.exitcode}"
        result: dict[str, Any] = json.loads(self.answer.read_text())
        return result


class Children:
    """Starts runs from a fork server that has everything imported."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._started: list[ForkServerProcess] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        os.environ["PRETRAIN_TESTS_PRELOAD"] = "1"
        try:
            forkserver.ensure_running()  # imports in the background
        finally:
            del os.environ["PRETRAIN_TESTS_PRELOAD"]

    def _fork(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> ForkServerProcess:
        process = self._context.Process(target=target, args=arguments)
        process.start()
        self._started.append(process)
        return process

    def start(
        self, tokens: Path, out: Path, config: dict[str, Any], freeze_when: Instant | None = None
    ) -> Child:
        """Begin or resume a run in ``out``; ``freeze_when`` is pickled (a function of a module, or a partial one)."""
        self._count += 1
        answer = self._folder / f"answer-{self._count}.json"
        return Child(self._fork(train, (tokens, out, config, answer, freeze_when)), answer)

    def run(self, tokens: Path, out: Path, config: dict[str, Any]) -> dict[str, Any]:
        """A run to its end."""
        return self.start(tokens, out, config).end()

    def start_rank(self, environment: Mapping[str, str], request: Path) -> ForkServerProcess:
        """One rank of a run, with torchrun's environment."""
        return self._fork(work, (dict(environment), request))

    @staticmethod
    def places(world: int) -> list[dict[str, str]]:
        """The environments of ``world`` processes that find each other."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        return [
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            for rank in range(world)
        ]

    def start_ranks(self, world: int, request: Path) -> list[ForkServerProcess]:
        """Begin or resume a run with several processes, as torchrun starts them."""
        return [self.start_rank(place, request) for place in self.places(world)]

    def call_ranks(self, world: int, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a module's function in ``world`` processes that can join one group; all must end well."""
        ranks = [self._fork(call, (place, function, arguments)) for place in self.places(world)]

        def ended() -> bool:
            # One that failed is enough: the others wait for it in a collective.
            return any(process.exitcode for process in ranks) or not any(p.is_alive() for p in ranks)

        try:
            wait_for(ended, "the end of the ranks")
        finally:
            codes = [process.exitcode for process in ranks]
            for process in ranks:
                if process.is_alive():
                    process.kill()
                    process.join()
        assert codes == [0] * world, f"exit codes of the ranks: {codes}"

    def close(self) -> None:
        """End what a failed test left behind."""
        for process in self._started:
            if process.is_alive():
                process.kill()
                process.join()
