"""The record of a run: `metrics.csv`, one row a step, never shortened but for rows that will be written again.

In: one `Row` a step. Out: a file that `report` and spreadsheets read. Called by `train`; imports no torch.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TextIO

from bytekiln.errors import FileError, FormatError


@dataclass(frozen=True)
class Row:
    """One optimizer step; losses in nats a token. Row 0 is the evaluation before the first step."""

    step: int
    tokens: int
    """Training tokens read up to here."""
    elapsed_s: float
    """Time spent on the run up to here, that before a resume included."""
    loss: float | None = None
    """Training loss of this step's batch, before the update."""
    lr: float | None = None
    grad_norm: float | None = None
    """Norm of the gradient before clipping."""
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    val_loss: float | None = None
    train_eval_loss: float | None = None
    """Loss on training data in evaluation mode, as many windows as for `val_loss`."""
    bits_per_byte: float | None = None
    """`val_loss` in bits a byte of validation text: comparable between vocabularies."""


COLUMNS = [f.name for f in fields(Row)]
WHOLE = ("step", "tokens")


def _line(values: Iterable[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(["" if v is None else v for v in values])
    return out.getvalue()


class MetricsFile:
    """`metrics.csv`, open for appending."""

    def __init__(self, path: Path, keep_until: int = -1, source: Path | None = None) -> None:
        """Start the file, or go on with it (with a copy of `source`) behind the row of step `keep_until`.

        Rows behind it, which the run will write again, and a half-written last line are dropped by an atomic rewrite.

        Raises:
            FileError: the file cannot be written.
            FormatError: an existing file has other columns.
        """
        self.path = path
        kept = [_line(COLUMNS)]
        source = source or path
        if keep_until >= 0 and source.exists():
            kept += [_line(astuple(r)) for r in read_metrics(source) if r.step <= keep_until]
        write_atomically(path, "".join(kept).encode())
        self._out: TextIO = path.open("a", encoding="utf-8", newline="")

    def append(self, row: Row) -> None:
        """Write one row; it survives the death of the process from here on."""
        self._out.write(_line(astuple(row)))
        self._out.flush()

    def sync(self) -> None:
        """Make the rows survive the death of the machine: before the checkpoint that relies on them."""
        self._out.flush()
        os.fsync(self._out.fileno())

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def read_metrics(path: Path) -> list[Row]:
    """All whole rows, by step.

    Raises:
        FileError: the file is missing or unreadable.
        FormatError: the columns or a value are not those of a metrics file.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected a run's metrics") from None
    except UnicodeDecodeError as exc:
        raise FormatError(f"{path}: invalid UTF-8 at byte {exc.start}; expected a run's metrics") from None
    lines = text.split("\n")[:-1]  # what follows the last line break is a half-written row
    if not lines or lines[0] != ",".join(COLUMNS):
        raise FormatError(
            f"{path}: line 1: found {lines[0][:60] if lines else 'nothing'!r}; expected {','.join(COLUMNS)}"
        )
    rows = []
    for number, values in enumerate(csv.reader(lines[1:]), start=2):
        try:
            named = dict(zip(COLUMNS, values, strict=True))
            rows.append(Row(**{k: _value(k, v) for k, v in named.items()}))  # type: ignore[arg-type]
        except ValueError:
            raise FormatError(
                f"{path}: line {number}: found {','.join(values)[:60]!r}; expected {len(COLUMNS)} numbers"
            ) from None
    return rows


def _value(column: str, text: str) -> int | float | None:
    if column in WHOLE:
        return int(text)
    return float(text) if text else None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` so that a reader sees the old or the new, even after a power cut.

    Raises:
        FileError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            temporary.rename(path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise FileError(
            f"{path}: cannot be written: {(exc.strerror or str(exc)).lower()}; expected a writable folder with space"
        ) from None


def sync_folder(path: Path) -> None:
    """Make names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
