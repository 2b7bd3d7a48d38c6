"""`metrics.csv`: every digit, every row, and never shortened but for rows that come again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytekiln.errors import FileError, FormatError
from bytekiln.metrics import COLUMNS, MetricsFile, Row, read_metrics


def write(path: Path, steps: range) -> None:
    file = MetricsFile(path)
    for s in steps:
        file.append(Row(s, 10 * s, 0.5 * s, loss=s / 3, lr=1e-3, val_loss=0.1 if s == 2 else None))
    file.close()


def test_columns_are_the_format() -> None:
    said = "step,tokens,elapsed_s,loss,lr,grad_norm,step_time_s,tokens_per_s,val_loss,train_eval_loss,bits_per_byte"
    assert said.split(",") == COLUMNS


@given(loss=st.floats(allow_nan=False), norm=st.none() | st.floats(allow_nan=False))
def test_every_digit_comes_back(tmp_path_factory: pytest.TempPathFactory, loss: float, norm: float | None) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.csv"
    file = MetricsFile(path)
    file.append(Row(1, 2, 3.5, loss=loss, grad_norm=norm))
    file.close()
    assert read_metrics(path) == [Row(1, 2, 3.5, loss=loss, grad_norm=norm)]


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


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none.csv: no such file"):
        read_metrics(tmp_path / "none.csv")
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(FormatError, match="line 1: found 'step,loss'"):
        MetricsFile(path, keep_until=3)
    write(path, range(3))
    path.write_text(path.read_text() + "4,x,1.0,,,,,,,,\n")
    with pytest.raises(FormatError, match="line 5: found '4,x"):
        read_metrics(path)
    with pytest.raises(FileError, match="cannot be written"):
        MetricsFile(tmp_path / "no" / "metrics.csv")
