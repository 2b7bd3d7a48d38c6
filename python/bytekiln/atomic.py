"""Writing a file so that a reader sees the old one or the whole new one, as the Rust core does it (`atomic.rs`).

In: a path and bytes. Out: a file that takes its name only when it is complete and on the disk. Called by `characters`,
`characters_file`, reports and `sweep.folder`. The temporary name and the lock are the core's: both refuse a second
writer.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from bytekiln.errors import BytekilnError, FileError, OutputExistsError

_TROUBLE = {
    errno.ENOENT: "no such file; expected an existing one",
    errno.EACCES: "permission denied; expected read and write rights there",
    errno.EISDIR: "is a directory; expected a file",
    errno.ENOSPC: "no space left on the device; expected room for the output",
    errno.EFBIG: "the file grew past the limit of its size; expected room for the output",
    errno.EROFS: "read-only file system; expected a writable folder",
}


def in_our_words(path: Path, error: OSError) -> BytekilnError:
    """An error of the operating system as `where: what was found; expected what`."""
    if isinstance(error, BytekilnError):
        return error
    reason = (error.strerror or str(error)).lower()
    return FileError(f"{path}: {_TROUBLE.get(error.errno or 0, f'{reason}; expected a readable and writable file')}")


class AtomicFile:
    """An output that takes its name only in `commit`; closed before, it leaves nothing behind.

    Use it in a `with` statement. Its methods raise `FileError`, which names the output, where the disk is full.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        """Begin to write `path`.

        Raises:
            OutputExistsError: it is there, and `overwrite` is false.
            FileError: no folder for it, or another process is writing it.
        """
        self.path, self._overwrite, self._committed = path, overwrite, False
        self.partial = path.with_name(f".{path.name}.partial")
        self._refuse()
        try:
            self.file = self._open()
        except OSError as error:
            raise in_our_words(path, error) from None

    def _refuse(self) -> None:
        path = self.path
        if not path.parent.is_dir():
            raise FileError(f"{path.parent}: no such folder; expected the folder of {path}")
        if path.is_dir():
            raise FileError(f"{path}: is a directory; expected the name of an output file")
        if (path.exists() or path.is_symlink()) and not self._overwrite:
            raise OutputExistsError(
                f"{path}: exists already; expected a new name, or ask to overwrite it (--overwrite)"
            )

    def _open(self) -> BinaryIO:
        while True:
            # Neither truncated before it is ours, nor followed where someone put a link.
            fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise FileError(
                    f"{self.path}: another process is writing it ({self.partial}); expected to be its only writer"
                ) from None
            except OSError:
                pass  # a file system without locks
            if self._bears_its_name(fd):
                os.ftruncate(fd, 0)  # what a killed writer left behind
                return os.fdopen(fd, "r+b")
            # Another writer finished in between: what was opened bears the output's name by now.
            os.close(fd)
            self._refuse()

    def _bears_its_name(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self.partial.stat())
        except OSError:
            return False

    def __enter__(self) -> AtomicFile:
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take back what was not committed."""
        if not self._committed:
            self.partial.unlink(missing_ok=True)  # before the lock goes with the file
        with suppress(OSError):  # closed all the same; what it could not flush is not wanted
            self.file.close()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        with self._named():
            self.file.write(data)

    def write_head(self, data: bytes) -> None:
        """Replace the bytes at the beginning."""
        with self._named():
            self.file.seek(0)
            self.file.write(data)
            self.file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        """Bring what was written to the disk."""
        with self._named():
            self.file.flush()
            os.fsync(self.file.fileno())

    def commit(self) -> None:
        """Make it durable under its name."""
        self.sync()
        with self._named():
            self.partial.rename(self.path)
            self._committed = True
            sync_folder(self.path.parent)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise in_our_words(self.path, error) from None


def write_file(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write a small file whole.

    Raises:
        OutputExistsError, FileError: as `AtomicFile`.
    """
    with AtomicFile(path, overwrite=overwrite) as file:
        file.write(data)
        file.commit()


def remove_partial(path: Path) -> None:
    """Remove what a killed writer of `path` left half written; that of a living one stays."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        fd = os.open(partial, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return  # there is none
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink(missing_ok=True)  # before the lock goes with the file
    except OSError:
        pass  # it is being written, or nobody can tell
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Make names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
