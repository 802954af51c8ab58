"""Context managers that close at their end: ``class Reader(ClosedAtExit)`` with a ``close()`` of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class ClosedAtExit(ABC):
    """``with`` gives the object itself and calls :meth:`close` at the end, whatever ended it."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; harmless when it is closed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
