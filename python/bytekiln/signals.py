"""Ctrl-C, SIGTERM and SIGHUP for long jobs: an end at a place of our choosing, at once where nothing is lost.

Called by `train`.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

GRACE_S = 2.5
"""How long a call into C (a backward pass, say) may keep Python from noticing a signal before `late` acts instead."""
AT_ONCE_S = 0.5
"""How long a second Ctrl-C leaves the process to end by itself."""


class Interrupted(BaseException):
    """SIGTERM, SIGHUP or Ctrl-C arrived at a place where the step can be abandoned."""


class Signals:
    """Turns the first SIGTERM, SIGHUP or Ctrl-C into `Interrupted`, at once or where `hold` ends.

    SIGHUP says that the terminal was closed. A second Ctrl-C raises KeyboardInterrupt wherever it comes. Python runs a
    handler only between two of its own instructions. If one call takes longer than `GRACE_S`, a thread that is woken by
    the signal itself calls `late`, which saves what the call does not touch and ends the process. The same thread ends
    it, with nothing saved, where a job that said `at_once` is still not over `AT_ONCE_S` after a second Ctrl-C.
    """

    def __init__(self) -> None:
        """Nothing arrived yet."""
        self.number: int | None = None
        self.late: Callable[[int], object] | None = None
        """Called in a thread when the main one does not answer; must not return to the job."""
        self.deferred = False
        """Never interrupt by yourself: several processes first agree where (they look at `number`)."""
        self.at_once = False
        """Whether a second Ctrl-C may end the process in the middle of anything: no other process depends on it."""
        self._holding = False
        self._before: dict[int, Any] = {}
        self._noticed = threading.Event()
        self._turn = threading.Lock()
        """Held by whoever may change what is saved: the main thread in `hold`, or `late`."""
        self._pipe: tuple[int, int] | None = None
        self._old_wakeup = -1

    def __enter__(self) -> Self:
        """Take over the handlers; only the main thread may, elsewhere the process's own rules stay.

        A signal that comes meanwhile does what it does outside (`__exit__`): nothing has begun.
        """
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
            self._old_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            taken = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else nohup: it is to outlive its terminal
                taken.append(signal.SIGHUP)
            self.deferred = True
            for number in taken:
                self._before[number] = signal.signal(number, self._on_signal)
            # Children inherit what their parent blocks, and Ray blocks Ctrl-C in all that it starts: it may be waiting.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)
            self.deferred = False
            if self.number is not None:
                self.__exit__(Interrupted, Interrupted(), None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back; an `Interrupted` that nobody caught is the process's own matter again.

        Raises:
            KeyboardInterrupt: after a SIGINT that the process was started to ignore (`command &` in a script).
            SystemExit: 129 after a SIGHUP that would kill it, so that what is around the job ends in order.
        """
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._old_wakeup)
            self._noticed.set()
            os.close(self._pipe[1])  # the thread reads the end of the pipe and closes the other side
            self._pipe = None
        if isinstance(exc, Interrupted) and self.number is not None:
            way = self._before[self.number]
            if self.number == signal.SIGINT and way is signal.SIG_IGN:
                raise KeyboardInterrupt
            if self.number == signal.SIGHUP and way is signal.SIG_DFL:
                raise SystemExit(128 + signal.SIGHUP)
            signal.raise_signal(self.number)

    def _watch(self, reader: int) -> None:
        """In a thread, woken by the signals themselves: the main one may be deaf in a long call."""
        came = 0
        try:
            while word := os.read(reader, 1):
                number = word[0]
                if number not in self._before:
                    continue
                came = 1 if self._noticed.is_set() and self.number is None else came + 1
                if came == 1:
                    threading.Thread(target=self._unnoticed, args=(number,), daemon=True).start()
                elif number == signal.SIGINT and self.at_once and not _closes_within(reader, AT_ONCE_S):
                    os._exit(128 + number)  # what is being written has another name until it is whole
        finally:
            os.close(reader)

    def _unnoticed(self, number: int) -> None:
        if self._noticed.wait(GRACE_S):
            return
        with self._turn:  # from here on the main thread waits, should it come back
            if not self._noticed.is_set() and not self._holding and self.late is not None:
                self.late(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._noticed.is_set() and self.number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        if not self._holding:
            # Not `with`: the handler may interrupt itself, and the thread that holds the turn ends the process.
            while not self._turn.acquire(blocking=False):
                time.sleep(0.01)
            self._turn.release()
        self._noticed.set()
        self.number = number
        if number == signal.SIGHUP:
            _write_nowhere()
        if self.deferred:
            overdue = threading.Timer(GRACE_S, self._overdue, (number,))
            overdue.daemon = True
            overdue.start()
        elif not self._holding:
            raise Interrupted

    def _overdue(self, number: int) -> None:
        with self._turn:
            if not self._holding and self.late is not None:
                self.late(number)

    def claim(self) -> None:
        """The main thread has noticed and acts: from here on `late` is not called."""
        with self._turn:
            self.late = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """No interruption in here: what began is finished, and `late` waits for it."""
        outer, self._holding = self._holding, True
        if not outer:
            self._turn.acquire()
        try:
            yield
        finally:
            self._holding = outer
            if not outer:
                self._turn.release()
        if self.number is not None and not outer and not self.deferred:
            raise Interrupted


def _closes_within(reader: int, seconds: float) -> bool:
    """Whether the other side of a pipe is closed in time, whatever is written to it until then."""
    os.set_blocking(reader, False)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if not os.read(reader, 1):
                return True
        except BlockingIOError:
            time.sleep(0.01)
    return False


def _write_nowhere() -> None:
    """Let what is still said to a terminal go nowhere: a closed one answers every write with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(fd).st_mode):  # isatty says no of a closed terminal
                os.dup2(nowhere, fd)
    os.close(nowhere)
