"""Batches made ahead in a thread, while the model works on the last ones. Called by the training loop.

In: a source whose batches are a pure function of (step, first window, place, count). Out: the same batches, sooner. The
thread guesses what is asked for next; a wrong guess costs work, never a result.

Handing a batch from thread to thread costs 40 µs and the interpreter's lock (measured); a small batch of windows in
memory is made in less. So the thread begins only where making takes long: large batches, packing, a slow disk.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from bytekiln.batch import Batch, pinned

Request = tuple[int, int, int, int]
"""(step, number of the step's first window in the run, place of the micro-step's first window in the step, count)."""


WORTH_S, SLOW_STEPS = 5e-4, 3
"""The thread begins when making a step's batches took longer than this so many times in succession."""


class Source(Protocol):
    """What makes batches, `TrainSource` for one."""

    def batch(self, step: int, first: int, place: int, count: int) -> Batch:
        """A pure function of its arguments."""


class Prefetcher:
    """Answers the requests of one step after another from work done ahead.

    A step's requests are expected to be the last step's, one step later, with the first window moved on by as much as
    the last time (the first time: by the windows of the request). When that is wrong, as where the batch grows, what
    was made ahead is dropped.
    """

    def __init__(self, source: Source, depth: int, *, pin: bool = False, worth_s: float = WORTH_S) -> None:
        """Start nothing yet.

        Args:
            source: makes the batches; used by the thread and, for what was not expected, by the caller.
            depth: steps made ahead; 0: none, and no thread.
            pin: put batches into pinned memory in the thread, for CUDA.
            worth_s: seconds of making beyond which the thread begins; 0: at once.
        """
        self._source, self._depth, self._pin, self._worth_s = source, depth, pin, worth_s
        self._slow = 0 if worth_s else SLOW_STEPS
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bytekiln-prefetch") if depth else None
        self._ahead: deque[tuple[tuple[Request, ...], Future[list[Batch]]]] = deque()
        self._last: tuple[Request, ...] = ()
        self._stride: int | None = None

    def get(self, requests: Sequence[Request]) -> list[Batch]:
        """The batch of each request.

        Raises:
            Exception: whatever the source raised for this request, in the thread or here. An interruption of the wait
                (Ctrl-C) leaves everything as it was: the same request can be made again.
        """
        wanted = tuple(requests)
        self._note(wanted)
        if self._ahead and self._ahead[0][0] != wanted:
            self._drop()
        if self._ahead:
            made = self._ahead[0][1]
            try:
                batches = made.result()
            except Exception:
                self._drop()
                raise
            self._ahead.popleft()
            self._make_ahead(wanted)
            return batches
        began = time.perf_counter()
        batches = self._make(wanted)
        if self._slow < SLOW_STEPS:
            self._slow = self._slow + 1 if time.perf_counter() - began > self._worth_s else 0
        self._make_ahead(wanted)
        return batches

    def close(self) -> None:
        """Wait for what is being made, drop the rest, end the thread. Later requests are answered without it."""
        if self._pool is not None:
            self._drop()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self, requests: tuple[Request, ...]) -> list[Batch]:
        batches = [self._source.batch(*request) for request in requests]
        return [pinned(batch) for batch in batches] if self._pin else batches

    def _note(self, wanted: tuple[Request, ...]) -> None:
        """Learn by how much the first window moves from one step to the next."""
        if self._last and wanted and wanted[0][0] == self._last[0][0] + 1:
            self._stride = wanted[0][1] - self._last[0][1]
        elif self._stride is None:
            self._stride = sum(count for *_, count in wanted)
        self._last = wanted

    def _make_ahead(self, wanted: tuple[Request, ...]) -> None:
        if self._pool is None or self._stride is None or self._slow < SLOW_STEPS:
            return
        newest = self._ahead[-1][0] if self._ahead else wanted
        while len(self._ahead) < self._depth:
            newest = tuple((step + 1, first + self._stride, place, count) for step, first, place, count in newest)
            self._ahead.append((newest, self._pool.submit(self._make, newest)))

    def _drop(self) -> None:
        for _, made in self._ahead:
            made.cancel()
        self._ahead.clear()
