"""`metrics.csv` and the files like it: every digit, every row, and never shortened but for rows that come again."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytekiln.errors import FileError, FormatError
from bytekiln.metrics import COLUMNS, MetricsFile, Row, RowFile, read_metrics, read_rows
from bytekiln.result import Result
from bytekiln.run_state import State

DOCS = Path(__file__).parent.parent / "docs" / "formats.md"


def write(path: Path, steps: range) -> None:
    file = MetricsFile(path)
    for s in steps:
        file.append(Row(s, 10 * s, 0.5 * s, loss=s / 3, lr=1e-3, val_loss=0.1 if s == 2 else None))
    file.close()


def test_columns_are_the_format() -> None:
    said = (
        "step,tokens,elapsed_s,loss,lr,grad_norm,step_time_s,tokens_per_s,skipped,val_loss,val_perplexity,"
        "val_accuracy,bits_per_byte,train_eval_loss,train_eval_accuracy,eval_time_s,expert_load"
    )
    assert said.split(",") == COLUMNS
    section = DOCS.read_text("utf-8").split("\n## metrics.csv\n")[1].split("\n## ")[0]
    assert [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")] == COLUMNS


@pytest.mark.parametrize(
    ("title", "kind", "also"),
    [("result.json", Result, {"format", "version"}), ("Checkpoint folder", State, {"format", "version", "data"})],
)
def test_what_is_written_of_a_run_is_described(title: str, kind: type, also: set[str]) -> None:
    section = DOCS.read_text("utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    table = section.partition("| `state.json` | |\n")[2].partition("\n\n")[0] if kind is State else section
    said = {name for line in table.splitlines() for name in re.findall("`([a-z_]+)`", line.split(" | ")[0])}
    assert {f.name for f in fields(kind)} <= said
    if kind is State:
        assert said == {f.name for f in fields(kind)} | also


@given(loss=st.floats(), norm=st.none() | st.floats(allow_nan=False), skipped=st.integers(0, 1))
def test_every_digit_comes_back(
    tmp_path_factory: pytest.TempPathFactory, loss: float, norm: float | None, skipped: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.csv"
    row = Row(1, 2, 3.5, loss=loss, grad_norm=norm, skipped=skipped, expert_load=norm)
    file = MetricsFile(path)
    file.append(row)
    file.close()
    assert read_metrics(path) == [row]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_an_empty_cell(tmp_path: Path, value: float) -> None:
    """A validation loss above 709 has no perplexity that a float could hold."""
    row = Row(1, 2, 3.5, loss=value, grad_norm=value, val_loss=710.0, val_perplexity=value)
    assert row == Row(1, 2, 3.5, val_loss=710.0)
    json.dumps(asdict(row), allow_nan=False)
    file = MetricsFile(tmp_path / "metrics.csv")
    file.append(row)
    file.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1,2,3.5,,,,,,0,710.0,,,,,,,"
    assert read_metrics(tmp_path / "metrics.csv") == [row]
    older = (tmp_path / "metrics.csv").read_text().replace("710.0,,", f"710.0,{value},")
    (tmp_path / "metrics.csv").write_text(older)
    assert read_metrics(tmp_path / "metrics.csv") == [row], "written before there was such a rule"


def test_going_on_keeps_rows_up_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write(path, range(6))
    before = path.read_text().splitlines()
    with path.open("a") as f:
        f.write("6,60,3.0,2.")  # torn by a kill
    file = MetricsFile(path, keep_until=3)
    assert path.read_text().splitlines() == before[:5]
    file.append(Row(4, 40, 2.0))
    file.close()
    assert [r.step for r in read_metrics(path)] == [0, 1, 2, 3, 4]


def test_a_row_is_there_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.append(Row(0, 0, 0.0))
    assert len(read_metrics(tmp_path / "metrics.csv")) == 1
    file.close()


@dataclass(frozen=True)
class Word:
    """Rows of another kind, several a step."""

    step: int
    word: str
    size: float
    share: float | None = None


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)


@given(rows=st.lists(st.builds(Word, st.integers(0, 9), WORDS, st.floats(allow_nan=False))), keep=st.integers(-1, 9))
def test_rows_of_any_kind_are_kept_by_step(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Word], keep: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    file = RowFile(folder / "words.csv", Word, what="words")
    file.append(*rows)
    file.close()
    assert read_rows(folder / "words.csv", Word, "words") == rows
    other = RowFile(folder / "other.csv", Word, keep, folder / "words.csv", what="words")
    other.close()
    expected = [r for r in rows if r.step <= keep]
    assert other.kept == expected == read_rows(folder / "other.csv", Word, "words")


def test_a_full_disk_is_told_once_in_our_words(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file._out.close()
    file._out = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115 - as the class does
    with pytest.raises(FileError, match=r"metrics\.csv: cannot be written: no space left on device; expected"):
        file.append(Row(1, 2, 3.0))
    with pytest.raises(FileError, match="no space left"):
        file.sync()
    file.close()  # would hide the error above if it raised another one


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none.csv: no such file"):
        read_metrics(tmp_path / "none.csv")
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(FormatError, match="line 1: found 'step,loss'"):
        MetricsFile(path, keep_until=3)
    write(path, range(3))
    good = path.read_text()
    for wrong in ("4,x,1.0" + "," * 14, "4,1,1.0" + "," * 14, "4,1,1.0,,"):  # a word; no `skipped`; too few
        path.write_text(f"{good}{wrong}\n")
        with pytest.raises(FormatError, match=r"line 5: found '4,.*; expected 17 values"):
            read_metrics(path)
    with pytest.raises(FileError, match="cannot be written"):
        MetricsFile(tmp_path / "no" / "metrics.csv")
