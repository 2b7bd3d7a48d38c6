"""Ctrl-C and SIGTERM for long jobs: an end at a place of our choosing, at once where nothing is lost.

Called by `train`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C arrived at a place where the step can be abandoned."""


class Signals:
    """Turns the first SIGTERM or Ctrl-C into `Interrupted`, at once or where `hold` ends.

    A second Ctrl-C raises KeyboardInterrupt wherever it comes.
    """

    def __init__(self) -> None:
        """Nothing arrived yet."""
        self.number: int | None = None
        self._holding = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take over the handlers; only the main thread may, elsewhere the process's own rules stay."""
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back; an `Interrupted` that nobody caught is the process's own matter again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(exc, Interrupted) and self.number is not None:
            signal.raise_signal(self.number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        if not self._holding:
            raise Interrupted

    @contextmanager
    def hold(self) -> Iterator[None]:
        """No interruption in here: what began is finished."""
        outer, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = outer
        if self.number is not None and not outer:
            raise Interrupted
