"""Who runs which trial: claims in Optuna's journal file, which several workers and machines share.

In: events of this worker. Out: for every trial its attempt, its holder, its end, the same for all who read the same
file. The order of the events decides: the first claim of an attempt is the valid one, so that none is run twice at
once and none is lost. Called by `sweep`; imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytekiln.errors import FileError, FormatError, MissingExtraError
from bytekiln.section import Value

BEAT_S, STALE_S = 30.0, 150.0
"""How often a worker shows that it lives, and for how long a silent one on another machine is believed to."""
GRACE_S = 10
"""Seconds after which the journal's lock is taken from a writer that was killed."""
FORMAT, VERSION = "bytekiln-journal", 1


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that runs trials."""

    worker: str
    host: str
    machine: str
    """Host, boot and space of process numbers: where a process number means something."""
    pid: int
    born: str
    """When it was started, since process numbers come again; empty where the system does not tell."""

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        host, pid = socket.gethostname(), os.getpid()
        boot, space = "", ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        with suppress(OSError):
            space = str(Path("/proc/self/ns/pid").readlink())
        return cls(f"{host}:{pid}:{time.time_ns():x}", host, f"{host} {boot} {space}".strip(), pid, born(pid))

    def runs_here(self) -> bool | None:
        """Whether it lives, if it is a process of this machine; None: it is not."""
        return is_alive(self.pid, self.born) if self.machine == Holder.me().machine else None

    def __str__(self) -> str:
        """For people."""
        return f"process {self.pid} on {self.host}"


def at_work(path: Path) -> dict[str, Holder]:
    """Which trials of a journal a living process holds, and who; none of a journal that is missing or damaged.

    A process of another machine is believed to live while anyone writes into the journal.
    """
    if not path.exists():
        return {}
    try:
        silent = silence(path)  # before our own opening of it
        places = Journal(path).places
    except FormatError:
        return {}
    me, found = Holder.me(), {}
    for name, place in places.items():
        holder = place.holder
        if holder is None or (holder.machine, holder.pid) == (me.machine, me.pid):
            continue
        here = holder.runs_here()
        if here or (here is None and silent < STALE_S):
            found[name] = holder
    return found


def silence(path: Path) -> float:
    """Seconds since a file was last written, by the clock of the machine that keeps it.

    Raises:
        OSError: it is gone, or its folder cannot be written.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def born(pid: int) -> str:
    """When a process was started, in the system's ticks; empty where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_alive(pid: int, since: str) -> bool:
    """Whether the process `pid` that was started at `since` lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False  # no number of a process
    except PermissionError:
        pass
    return not since or born(pid) in ("", since)


@dataclasses.dataclass
class Place:
    """Where one trial stands."""

    attempt: int = 0
    holder: Holder | None = None
    done: dict[str, Any] | None = None
    """The event that ended it: status, exit_status, why, error, elapsed."""
    threads: int = 0
    """Threads of its first attempt: a resumed run is bit-identical only with as many."""


class Journal:
    """The journal of a sweep's folder, and what it says."""

    def __init__(self, path: Path) -> None:
        """Open it, or begin it.

        Raises:
            MissingExtraError: optuna is not installed.
            FileError, FormatError: the file cannot be written or read.
        """
        try:
            from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
        except ImportError:
            raise MissingExtraError(
                'lm-sweep: the package optuna is not installed; expected pip install "bytekiln[sweep]"'
            ) from None
        self.path = path.absolute()  # the lock is a link to it
        self.me = Holder.me()
        self.places: dict[str, Place] = {}
        self._heard: dict[str, float] = {}
        self._read = 0
        self._beaten = 0.0
        self._first = b""
        try:
            self._lock = JournalFileSymlinkLock(str(self.path), grace_period=GRACE_S)
            self._backend = JournalFileBackend(str(self.path), lock_obj=self._lock)
            self._cut_torn_line()
        except OSError as exc:
            raise self._trouble(exc) from None
        self.read()
        if not self._read:
            self.append("begin", format=FORMAT, version=VERSION)
        try:
            self._first = self._first_line()
        except OSError as exc:
            raise self._trouble(exc) from None

    def _first_line(self) -> bytes:
        with self.path.open("rb") as f:
            return f.readline(1000)

    def _check_same(self) -> None:
        """Refuse the journal of a sweep that has replaced this one: nothing of ours may be told there.

        Raises:
            FileError: it is another one. OSError: it is gone.
        """
        if self._first and self._first_line() != self._first:  # who began it, and when
            raise FileError(
                f"{self.path}: found the journal of another sweep; expected the one that was there before "
                "(the sweep was replaced meanwhile)"
            )

    def _cut_torn_line(self) -> None:
        """Cut off what a writer that was killed, or a full disk, left half written: it was never valid."""
        with self.path.open("rb") as f:
            f.seek(max(self.path.stat().st_size - 1, 0))
            if f.read(1) in (b"", b"\n"):
                return
        self._lock.acquire()
        try:
            text = self.path.read_bytes()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                os.truncate(self.path, whole)
        finally:
            self._lock.release()

    def read(self) -> None:
        """Take in what was written since.

        Raises:
            FileError, FormatError: the file is gone, or damaged.
        """
        try:
            self._check_same()
            for event in self._backend.read_logs(self._read):
                self._read += 1
                self._take(event)
        except OSError as exc:
            raise self._trouble(exc) from None
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise FormatError(
                f"{self.path}: line {self._read + 1}: {exc}; expected a sweep's journal (without the file, "
                "what the runs themselves have written counts)"
            ) from None

    def append(self, op: str, **fields: object) -> None:
        """Write an event, then take in everything up to it.

        Raises:
            FileError: the disk is full, or the folder is not writable.
        """
        try:
            self._check_same()
            self._backend.append_logs([{"op": op, "worker": self.me.worker, **fields}])
        except OSError as exc:
            with suppress(OSError):
                self._cut_torn_line()
            raise self._trouble(exc) from None
        self._beaten = time.monotonic()
        self.read()

    def place(self, name: str) -> Place:
        """Where a trial stands."""
        return self.places.setdefault(name, Place())

    def claim(self, name: str, threads: int) -> bool:
        """Try to take a trial that nobody holds."""
        place = self.place(name)
        if place.holder is not None or place.done is not None:
            return False
        me = dataclasses.asdict(self.me)
        self.append("claim", trial=name, attempt=place.attempt, holder=me, threads=place.threads or threads)
        return place.holder == self.me

    def release(self, name: str, why: str) -> None:
        """Give a trial back, one's own or that of a dead worker."""
        self.append("release", trial=name, attempt=self.place(name).attempt, why=why)

    def finish(self, name: str, status: str, **about: Value | None) -> bool:
        """Say how a trial ended; false where it is no longer this worker's."""
        place = self.place(name)
        self.append("done", trial=name, attempt=place.attempt, status=status, **about)
        return place.done is not None and place.done["worker"] == self.me.worker

    def reopen(self, name: str) -> None:
        """Let a trial that ended be run again."""
        self.append("reopen", trial=name, attempt=self.place(name).attempt)

    def beat(self) -> None:
        """Show the other machines that this worker lives, now and then."""
        if time.monotonic() - self._beaten > BEAT_S:
            self.append("beat")

    def lives(self, holder: Holder) -> bool:
        """Whether a worker lives: of this machine by its process, of another by its signs of life.

        The clocks of two machines are never compared: what counts is for how long this process has heard nothing.
        """
        here = holder.runs_here()
        if here is not None:
            return here
        return time.monotonic() - self._heard.get(holder.worker, 0.0) < STALE_S

    def take_from_the_dead(self, names: Collection[str]) -> list[tuple[str, Holder]]:
        """Free the trials whose worker has died; which, and whose."""
        freed = []
        for name in names:
            holder = self.place(name).holder
            if holder is not None and holder != self.me and not self.lives(holder):
                self.release(name, f"{holder} has died")
                freed.append((name, holder))
        return freed

    def _take(self, event: dict[str, Any]) -> None:
        op, worker = event["op"], event["worker"]
        self._heard[worker] = time.monotonic()
        if op in ("begin", "beat"):
            if op == "begin" and (event["format"], event["version"]) != (FORMAT, VERSION):
                raise ValueError(f"found {event['format']}, version {event['version']}; expected {FORMAT}, {VERSION}")
            return
        place = self.place(event["trial"])
        if event["attempt"] != place.attempt:
            return  # another worker's event came first
        free, holder = place.holder is None and place.done is None, place.holder
        if op == "claim" and free:
            place.holder = Holder(**event["holder"])
            place.threads = place.threads or int(event["threads"])
        elif op == "done" and (free or (holder is not None and holder.worker == worker and place.done is None)):
            place.done, place.holder = event, None
        elif (op == "release" and holder is not None) or (op == "reopen" and place.done is not None):
            place.attempt, place.holder, place.done = place.attempt + 1, None, None

    def _trouble(self, exc: OSError) -> FileError:
        reason = (exc.strerror or str(exc)).lower()
        return FileError(f"{self.path}: cannot be written: {reason}; expected a writable folder with space")
