"""`metrics.csv` and `layers.csv` read for a report: fast, and whatever is in them.

In: a path. Out: columns as arrays, and what was wrong in a sentence. Called by `report.runs`; numpy only.

`metrics.read_metrics` is the strict reader; it makes an object a row. A report of 200 runs has 8 million rows.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytekiln.errors import FileError, FormatError

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
EVERY_ROW = ("loss", "grad_norm")
"""Columns of which each step's value counts; those below have no spikes, and many rows are read here and there."""
HERE_AND_THERE = ("tokens", "elapsed_s", "lr", "tokens_per_s", "expert_load")
EVALUATION = ("val_loss", "val_accuracy", "bits_per_byte", "train_eval_loss")
"""Columns of which every cell is read that is not empty."""
READ = 2000
"""How many rows of a column in HERE_AND_THERE are read, the first and the last among them."""
LAYER_STEPS = 48
"""Steps of `layers.csv` that a report shows at most, spread over the run."""
COMMA, NEWLINE = 44, 10


@dataclass
class Table:
    """Columns by name."""

    steps: Floats
    """Of every row, in order."""
    columns: dict[str, tuple[Floats, Floats]]
    """name -> (steps, values) of cells that hold a finite number."""
    damaged: int = 0
    """Lines that were no row of numbers; they are left out, or their damaged cells are."""

    def of(self, name: str) -> tuple[Floats, Floats]:
        """Steps and values; none where the file has no such column."""
        return self.columns.get(name, (np.empty(0), np.empty(0)))


def read_table(path: Path) -> Table:
    """The columns of a metrics file that a report shows, the rows by step.

    Raises:
        FileError: it is missing or unreadable.
        FormatError: it is no metrics file.
    """
    text = _text(path)
    head, _, body = text.partition(b"\n")
    names = [n.strip().decode("utf-8", "replace") for n in head.split(b",")]
    if "step" not in names or len(set(names)) < len(names):
        found = head[:60].decode("utf-8", "replace")
        raise FormatError(f"{path}: line 1: found {found!r}; expected the columns of a run's metrics")
    cells = _Cells(body[: body.rfind(b"\n") + 1], len(names))  # what follows the last line break was torn by a kill
    every = np.arange(len(cells.ends))
    steps = cells.column(names.index("step"), every)
    rows = np.flatnonzero(np.isfinite(steps))
    cells.damaged |= set(np.flatnonzero(~np.isfinite(steps)).tolist())
    if len(rows) and np.any(np.diff(steps[rows]) < 0):
        rows = rows[np.argsort(steps[rows], kind="stable")]
    some = rows[np.unique(np.linspace(0, len(rows) - 1, READ).round().astype(int))] if len(rows) > READ else rows
    columns = {}
    for name in (*EVERY_ROW, *HERE_AND_THERE, *EVALUATION):
        if name in names and len(rows):
            of = some if name in HERE_AND_THERE else rows
            values = cells.column(names.index(name), of)
            known = np.isfinite(values)
            columns[name] = (steps[of][known], values[known])
    return Table(steps[rows], columns, cells.torn + len(cells.damaged))


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected a file of a run") from None


class _Cells:
    """A CSV file without quotes as one array of bytes, and where its cells are; a column is parsed in one go.

    Four times as fast as rows one by one, most of which are not looked at but for two or three of their cells.
    """

    def __init__(self, body: bytes, width: int) -> None:
        """`body`: whole lines. Lines with another number of cells than `width` are left out, and counted."""
        self._bytes = np.frombuffer(body, np.uint8)
        marks = np.flatnonzero((self._bytes == COMMA) | (self._bytes == NEWLINE))
        last = np.flatnonzero(self._bytes[marks] == NEWLINE)  # of each line, its place among the marks
        first = np.concatenate([[0], last[:-1] + 1]).astype(np.int64)[: len(last)]
        good = last - first == width - 1
        self.torn = int(np.count_nonzero(~good))
        begins = np.concatenate([[0], marks[last] + 1])[: len(last)][good]
        self.ends: Whole = marks[first[good][:, None] + np.arange(width)].astype(np.int64)
        """rows × columns: where the mark behind each cell is."""
        self.starts: Whole = np.concatenate([begins[:, None], self.ends[:, :-1] + 1], axis=1).astype(np.int64)
        self.damaged: set[int] = set()
        """Rows with a cell that is no number."""

    def column(self, number: int, rows: NDArray[np.int_]) -> Floats:
        """Values of a column in some rows; NaN where a cell is empty or no number."""
        out = np.full(len(rows), np.nan)
        starts, ends = self.starts[rows, number], self.ends[rows, number]
        filled = np.flatnonzero(ends > starts)
        if not len(filled):
            return out
        starts, ends = starts[filled], ends[filled]
        sizes = ends - starts + 1
        behind = np.cumsum(sizes)
        text = self._bytes[np.arange(behind[-1]) + np.repeat(starts - (behind - sizes), sizes)]
        text[behind - 1] = COMMA
        cells = text[:-1].tobytes()
        try:
            read = np.fromstring(cells, sep=",")  # by far the fastest reader of decimal numbers that numpy has
        except (ValueError, DeprecationWarning):  # a warning where numpy only warns of text that is no number
            read = np.empty(0)
        if len(read) != len(filled):
            read = np.array([_number(c) for c in cells.split(b",")])
            self.damaged |= set(np.asarray(rows)[filled[np.isnan(read)]].tolist())
        out[filled] = read
        return out


def _number(cell: bytes) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


# --- layers -----------------------------------------------------------------------------------------------------


@dataclass
class Layers:
    """What the layers of a run did: the norm of each tensor by kind, layer and step."""

    steps: list[int] = field(default_factory=list)
    norms: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    """kind -> layer -> one value a step: square root of the sum of squares over the tensors of the layer."""
    counts: dict[str, list[int]] = field(default_factory=dict)
    """layer -> histogram of the sizes of its gradients at the last step, by powers of 4."""
    damaged: int = 0


KINDS = ("gradient", "weight", "activation")


def read_layers(path: Path) -> Layers:
    """Norms of layers at up to `LAYER_STEPS` steps, the first and the last among them.

    Raises:
        FileError: it is missing or unreadable.
        FormatError: it has not the columns of a layers file.
    """
    lines = _text(path).split(b"\n")[:-1]
    names = lines[0].decode("utf-8", "replace").split(",") if lines else []
    if not {"step", "layer", "kind", "norm", "counts"} <= set(names):
        raise FormatError(f"{path}: line 1: found {','.join(names)[:60]!r}; expected the columns of a run's layers")
    at = {n: names.index(n) for n in ("step", "layer", "kind", "norm", "counts")}
    seen: dict[bytes, list[bytes]] = {}
    for line in lines[1:]:
        seen.setdefault(line.split(b",", 1)[0], []).append(line)
    found = sorted((int(s), rows) for s, rows in seen.items() if s.isdigit())
    out = Layers(damaged=sum(len(rows) for s, rows in seen.items() if not s.isdigit()))
    if len(found) > LAYER_STEPS:
        found = [found[i] for i in np.linspace(0, len(found) - 1, LAYER_STEPS).round().astype(int)]
    squares: dict[tuple[str, str], dict[int, float]] = {}
    for step, rows in found:
        for cells in csv.reader(r.decode("utf-8", "replace") for r in rows):
            try:
                layer, kind, norm = cells[at["layer"]], cells[at["kind"]], float(cells[at["norm"]])
                if len(cells) != len(names):
                    raise ValueError
            except (IndexError, ValueError):
                out.damaged += 1
                continue
            if kind not in KINDS:
                continue
            name = layer if kind == "activation" else _layer_of(layer)
            of = squares.setdefault((kind, name), {})
            of[step] = of.get(step, 0.0) + norm * norm
            if kind == "gradient" and step == found[-1][0]:
                _add_counts(out.counts, name, cells[at["counts"]])
    out.steps = [s for s, _ in found]
    for (kind, name), of in squares.items():
        values = [of[s] ** 0.5 if s in of and np.isfinite(of[s]) else None for s in out.steps]
        out.norms.setdefault(kind, {})[name] = values
    return out


def _layer_of(parameter: str) -> str:
    """A block's attention, feed-forward or norms; embeddings; the head.

    >>> _layer_of("layers.3.attn.q_proj.weight"), _layer_of("lm_head.weight")
    ('layers.3.attn', 'lm_head')
    """
    parts = parameter.split(".")
    return ".".join(parts[:3]) if parts[0] == "layers" else parts[0]


def _add_counts(counts: dict[str, list[int]], name: str, text: str) -> None:
    parts = text.split()
    if not all(p.isdigit() for p in parts):
        return
    new = [int(p) for p in parts]
    old = counts.get(name)
    if old is None:
        counts[name] = new
    elif len(old) == len(new):
        counts[name] = [a + b for a, b in zip(old, new, strict=True)]
