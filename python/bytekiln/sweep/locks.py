"""Who may work in a sweep: one coordinator at a time, one process in a run's folder.

In: folders. Out: locks on them, or who has them. Called by `sweep` and `adopt`; imports no torch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bytekiln.errors import BytekilnError, FileError
from bytekiln.sweep.journal import BEAT_S, Holder, at_work, is_alive, silence

LOCK, JOURNAL, RUNS = "coordinator.lock", "journal.log", "runs"


@contextmanager
def coordinating(folder: Path) -> Iterator[None]:
    """Be the one process that decides about a sweep.

    Raises:
        FileError: another one is (named), or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as exc:
        raise trouble(path, exc) from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder, _owner(path)) from None
        except OSError:  # a file system without locks: what the file says decides
            owner = _owner(path)
            if owner is not None and _seems_alive(path, owner):
                raise _in_use(folder, owner) from None
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(dataclasses.asdict(Holder.me())).encode() + b"\n", 0)
        except OSError as exc:
            raise trouble(path, exc) from None
        yield
        with suppress(OSError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def still_coordinating(folder: Path) -> None:
    """Show that the coordinator lives, where locks do not."""
    with suppress(OSError):
        os.utime(folder / LOCK)


def _owner(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _seems_alive(path: Path, owner: Holder) -> bool:
    here = owner.runs_here()
    if here is not None:
        return here
    return silence(path) < 3 * BEAT_S


def _in_use(folder: Path, owner: Holder | None) -> FileError:
    who = str(owner) if owner else "another process"
    return FileError(
        f"{folder}: found a sweep run by {who}; expected one coordinator (lm-sweep worker {folder} joins it)"
    )


def trouble(path: Path, exc: OSError) -> BytekilnError:
    """An error of the operating system in our words."""
    if isinstance(exc, BytekilnError):
        return exc
    reason = (exc.strerror or str(exc)).lower()
    return FileError(f"{exc.filename or path}: {reason}; expected a writable folder with space for the sweep")


def _hold(place: Path) -> int:
    """A descriptor that holds a folder as whoever trains there does; BlockingIOError: another process holds it."""
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:
        pass  # a file system without locks
    return fd


@contextmanager
def held(*places: Path) -> Iterator[None]:
    """Hold the folders of a run, those that are there.

    Raises:
        FileError: another process holds one of them, or it cannot be opened.
    """
    with ExitStack() as open_ones:
        for place in {p.resolve(): p for p in places if p.is_dir()}.values():
            try:
                open_ones.callback(os.close, _hold(place))
            except BlockingIOError:
                raise FileError(f"{place}: in use by another process; expected a run that nobody trains") from None
            except OSError as exc:
                raise trouble(place, exc) from None
        yield


def is_free(place: Path) -> bool:
    """Whether no process trains in a run's folder."""
    try:
        os.close(_hold(place))
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    except OSError as exc:
        raise trouble(place, exc) from None
    return True


def check_idle(folder: Path) -> None:
    """Refuse to replace a sweep of which somebody trains a run: a worker, or a run that outlived its sweep.

    Raises:
        FileError: somebody does (named, where the journal knows), or a file cannot be read.
    """
    runs = folder / RUNS
    expected = "expected a sweep that nobody trains (wait until it ends, or stop it)"
    try:
        for name, holder in at_work(folder / JOURNAL).items():
            raise FileError(f"{runs / name}: found a run trained by {holder}; {expected}")
        for place in sorted(p for p in runs.iterdir() if p.is_dir()) if runs.is_dir() else []:
            if not is_free(place):
                raise FileError(f"{place}: found a run trained by another process; {expected}")
    except OSError as exc:
        raise trouble(runs, exc) from None


def remove_unfinished(folder: Path, names: Collection[str] = ()) -> None:
    """Remove temporary files (`write_atomically`) whose writers are dead; called where nobody else writes them.

    One with our own number is of a process before us; one whose number another process of this machine has stays.

    Args:
        folder: where they are.
        names: of the files that were to be written; none: whatever there is.
    """
    for path in folder.glob(".*.tmp"):
        parts = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", path.name)
        if parts is None or (names and parts[1] not in names) or not path.is_file():
            continue
        if (pid := int(parts[2])) == os.getpid() or not is_alive(pid, ""):
            with suppress(OSError):
                path.unlink()
