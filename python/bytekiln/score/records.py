"""What an evaluation has found so far: a file of JSON lines beside the result, taken up again after an interruption.

In: one record a question or a window. Out: those of an earlier, interrupted run of the same evaluation. The first line
says what is evaluated: another model, other data or another setting is refused. A half-written last line is cut off.
Called by `cli_score`; no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from bytekiln.atomic import in_our_words
from bytekiln.errors import FileError, FormatError, MismatchError, OutputExistsError

FORMAT, VERSION = "bytekiln-score-records", 1


class Records:
    """Records by their number; in a file, or in memory where there is no path.

    Attributes:
        found: what an earlier run wrote.
    """

    def __init__(
        self, path: Path | None, about: Mapping[str, Any], key: str, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        """Open the file, or start it.

        Args:
            path: the file; None: nothing is kept.
            about: all that decides the records.
            key: name of a record's number: question or window.
            resume: take up what is there.
            overwrite: start anew.

        Raises:
            OutputExistsError: there is one, and neither was asked for.
            MismatchError: it is of another evaluation.
            FormatError: it is no such file.
            FileError: it cannot be written, or another process does.
        """
        self.path, self.key = path, key
        self.found: dict[int, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        head = {"format": FORMAT, "version": VERSION, **about}
        if path.exists() and not resume and not overwrite:
            raise OutputExistsError(
                f"{path}: exists already; expected --resume to go on with it, --overwrite, or another --out"
            )
        try:
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileError(f"{path}: another process is writing it; expected to be its only writer") from None
            except OSError:
                pass  # a file system without locks
            end = self._read(json.loads(json.dumps(head))) if resume else 0
            self._file.truncate(end)
            self._file.seek(end)
            if not end:
                self._write([head])
        except OSError as exc:
            self.close()
            raise in_our_words(path, exc) from None
        except BaseException:
            self.close()
            raise

    def _read(self, head: dict[str, Any]) -> int:
        """Take the records up; returns where the whole lines end."""
        assert self._file is not None and self.path is not None
        data = self._file.read()
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if number > 1:
                    self.found[int(record[self.key])] = record
            except (ValueError, KeyError, TypeError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise FormatError(f"{self.path}: line {number}: found {line[:40]!r}; expected a record of lm-score")
            if number == 1 and record != head:
                name = next(k for k in {**head, **record} if head.get(k) != record.get(k))
                raise MismatchError(
                    f"{self.path}: {name}: found {record.get(name)}; expected {head.get(name)}: it is of another "
                    "evaluation (--overwrite starts anew)"
                )
        return data.rfind(b"\n") + 1

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records; they survive the death of the process from here on.

        Raises:
            FileError: the disk is full.
        """
        if self._file is not None:
            self._write(records)

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        assert self._file is not None and self.path is not None
        try:
            self._file.write("".join(json.dumps(r, allow_nan=False) + "\n" for r in records).encode())
            self._file.flush()
        except OSError as exc:
            raise in_our_words(self.path, exc) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def __enter__(self) -> Records:
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()
