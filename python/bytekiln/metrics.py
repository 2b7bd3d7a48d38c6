"""What a run writes down as it goes: `metrics.csv`, one row a step, and the machinery of every such file.

In: one `Row` a step. Out: a file that `report` and spreadsheets read, never shortened but for rows that will be
written again. Called by `train`, by `layer_stats` (whose `layers.csv` is a `RowFile` too) and `tracking`. No torch.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import Field, astuple, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TextIO, TypeVar

from bytekiln.atomic import sync_folder
from bytekiln.errors import FileError, FormatError


@dataclass(frozen=True)
class Row:
    """One optimizer step; losses in nats a token. Row 0 is the evaluation before the first step.

    A measured value that is not finite is none: the cell stays empty, and JSON (`state.json`) has no word for it.
    """

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
    skipped: int = 0
    """1 where the update was left out (a spike, or an overflow of fp16)."""
    val_loss: float | None = None
    val_perplexity: float | None = None
    """e to the power of `val_loss`."""
    val_accuracy: float | None = None
    """Share of validation targets that are the most likely token."""
    bits_per_byte: float | None = None
    """`val_loss` in bits a byte of validation text: comparable between vocabularies."""
    train_eval_loss: float | None = None
    """Loss on training data in evaluation mode, as many windows as for `val_loss`."""
    train_eval_accuracy: float | None = None
    eval_time_s: float | None = None
    """Time of the evaluation; no part of `step_time_s`."""
    expert_load: float | None = None
    """Mixture of experts: tokens of the busiest expert of a layer over the mean; 1 is even."""

    def __post_init__(self) -> None:
        """Take away what is not finite."""
        for name in _MEASURED:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)


class Stepped(Protocol):
    """A frozen dataclass of numbers and texts without line breaks, whose first field is `step`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def step(self) -> int:
        """The optimizer step that the row belongs to."""


R = TypeVar("R", bound=Stepped)
COLUMNS = [f.name for f in fields(Row)]
_MEASURED = [f.name for f in fields(Row) if f.default is None]


def _line(values: Iterable[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(["" if v is None else v for v in values])
    return out.getvalue()


class RowFile(Generic[R]):
    """A CSV file of rows by step, open for appending."""

    def __init__(
        self, path: Path, kind: type[R], keep_until: int = -1, source: Path | None = None, *, what: str
    ) -> None:
        """Start the file, or go on with it (with a copy of `source`) behind the rows of step `keep_until`.

        Rows behind it, which the run will write again, and a half-written last line are dropped by an atomic rewrite.

        Args:
            path: the file.
            kind: the rows' class; its fields are the columns.
            keep_until: the last step whose rows stay; -1: none.
            source: the file to go on with, where it is another one.
            what: what the file is, for the words of an error.

        Raises:
            FileError: the file cannot be written.
            FormatError: an existing file has other columns.
        """
        self.path = path
        lines = [_line(f.name for f in fields(kind))]
        source = source or path
        self.kept: list[R] = []
        """The rows that stayed."""
        if keep_until >= 0 and source.exists() and source.stat().st_size:
            self.kept = [r for r in read_rows(source, kind, what) if r.step <= keep_until]
            lines += [_line(astuple(r)) for r in self.kept]
        write_atomically(path, "".join(lines).encode())
        self._out: TextIO = path.open("a", encoding="utf-8", newline="")

    def append(self, *rows: R) -> None:
        """Write rows; they survive the death of the process from here on.

        Raises:
            FileError: the disk is full, or the file is gone from it.
        """
        try:
            self._out.write("".join(_line(astuple(row)) for row in rows))
            self._out.flush()
        except OSError as exc:
            raise _not_written(self.path, exc) from None

    def sync(self) -> None:
        """Make the rows survive the death of the machine: before the checkpoint that relies on them.

        Raises:
            FileError: the disk is full.
        """
        try:
            self._out.flush()
            os.fsync(self._out.fileno())
        except OSError as exc:
            raise _not_written(self.path, exc) from None

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # all that was written has been flushed, but for a row whose failure was told
            self._out.close()


class MetricsFile(RowFile[Row]):
    """`metrics.csv`, open for appending."""

    def __init__(self, path: Path, keep_until: int = -1, source: Path | None = None, last: Row | None = None) -> None:
        """As `RowFile`; `last` is put behind the rows that stayed where they do not reach to it."""
        super().__init__(path, Row, keep_until, source, what="a run's metrics")
        if last is not None and all(row.step < last.step for row in self.kept[-1:]):
            self.append(last)
        self.kept = []  # a long run's rows are many, and nobody asks for them here


def read_metrics(path: Path) -> list[Row]:
    """All whole rows, by step.

    Raises:
        FileError: the file is missing or unreadable.
        FormatError: the columns or a value are not those of a metrics file.
    """
    return read_rows(path, Row, "a run's metrics")


def read_rows(path: Path, kind: type[R], what: str) -> list[R]:
    """All whole rows of a `RowFile`.

    Raises:
        FileError: the file is missing or unreadable.
        FormatError: it has other columns, or a value is not of its column's type.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected {what}") from None
    except UnicodeDecodeError as exc:
        raise FormatError(f"{path}: invalid UTF-8 at byte {exc.start}; expected {what}") from None
    readers = {f.name: _reader(str(f.type)) for f in fields(kind)}
    header = ",".join(readers)
    lines = text.split("\n")[:-1]  # what follows the last line break is a half-written row
    if not lines or lines[0] != header:
        raise FormatError(f"{path}: line 1: found {lines[0][:60] if lines else 'nothing'!r}; expected {header}")
    rows = []
    for number, values in enumerate(csv.reader(lines[1:]), start=2):
        try:
            rows.append(kind(*(read(v) for read, v in zip(readers.values(), values, strict=True))))
        except ValueError:
            raise FormatError(
                f"{path}: line {number}: found {','.join(values)[:60]!r}; expected {len(readers)} values, "
                f"as in {header}"
            ) from None
    return rows


def _reader(annotation: str) -> Callable[[str], object]:
    """From the text of a cell to the value that a field of this type holds."""
    if annotation == "float | None":
        return lambda text: float(text) if text else None
    known: dict[str, Callable[[str], object]] = {"int": int, "float": float, "str": str}
    return known[annotation]


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
        raise _not_written(path, exc) from None


def _not_written(path: Path, exc: OSError) -> FileError:
    return FileError(
        f"{path}: cannot be written: {(exc.strerror or str(exc)).lower()}; expected a writable folder with space"
    )
