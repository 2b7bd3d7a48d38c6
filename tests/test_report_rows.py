"""The fast reader against the strict one; thinning that keeps what matters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekiln.errors import FileError, FormatError
from bytekiln.layer_warnings import LayerRow
from bytekiln.metrics import MetricsFile, Row, RowFile, read_metrics
from bytekiln.report.curves import averaged, points_for, sampled, smoothed, thinned
from bytekiln.report.rows import EVALUATION, EVERY_ROW, HERE_AND_THERE, LAYER_STEPS, READ, read_layers, read_table
from report_files import rows_to

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


def write(path: Path, rows: list[Row]) -> Path:
    file = MetricsFile(path)
    file.append(*rows)
    file.close()
    return path


def agree(path: Path) -> None:
    """Every cell as `read_metrics` has it."""
    table, rows = read_table(path), read_metrics(path)
    assert table.damaged == 0
    assert table.steps.tolist() == [r.step for r in rows]
    for name in (*EVERY_ROW, *HERE_AND_THERE, *EVALUATION):
        told = {r.step: v for r in rows if (v := getattr(r, name)) is not None}
        x, y = table.of(name)
        assert dict(zip(x.tolist(), y.tolist(), strict=True)) == told


@settings(max_examples=40)
@given(st.lists(st.tuples(*[numbers] * 14), max_size=12))
def test_any_rows_are_read_as_the_strict_reader_reads_them(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[float | None, ...]]
) -> None:
    rows = []
    for i, c in enumerate(cells):
        rows.append(Row(i, 8 * i, 0.5 * i, *c[:5], 0, *c[5:13]))
    agree(write(tmp_path_factory.mktemp("rows") / "metrics.csv", rows))


def test_a_run_with_evaluations(tmp_path: Path) -> None:
    agree(write(tmp_path / "metrics.csv", rows_to(3.0, steps=500)))
    agree(write(tmp_path / "empty.csv", []))


def test_a_long_file_is_read_here_and_there_where_nothing_is_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.csv", rows_to(3.0, steps=3 * READ, every=1000))
    table = read_table(path)
    assert len(table.of("loss")[0]) == 3 * READ and len(table.of("val_loss")[0]) == 7
    x, y = table.of("lr")
    assert 1990 <= len(x) <= READ and x[-1] == 3 * READ and set(y.tolist()) == {1e-3}


@pytest.mark.parametrize(
    ("text", "steps", "damaged"),
    [
        ("1,2,0.1,3.0\n2,4,0.2,2.9\n3,6,0.3", [1, 2], 0),  # torn by a kill
        ("1,2,0.1,3.0\n\n2,4\n3,6,0.3,2.8\n", [1, 3], 2),
        ("1,2,0.1,abc\n2,4,0.2,2.9\n", [1, 2], 1),
        ("x,2,0.1,3.0\n2,4,0.2,2.9\n", [2], 1),
        ("2,4,0.2,2.9\n1,2,0.1,3.0\n", [1, 2], 0),  # no order
        ("1,2,0.1,nan\n2,4,0.2,inf\n3,6,0.3,-inf\n", [1, 2, 3], 0),
        ("", [], 0),
        ("1,2,0.1,3.0\r\n2,4,0.2,2.9\r\n", [1, 2], 0),
    ],
)
def test_damaged_and_old_files(tmp_path: Path, text: str, steps: list[int], damaged: int) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"step,tokens,elapsed_s,loss\n" + text.encode())
    table = read_table(tmp_path / "metrics.csv")
    assert table.steps.tolist() == steps
    assert table.damaged == damaged
    assert np.isfinite(table.of("loss")[1]).all()
    assert table.of("val_loss")[0].size == 0, "an older file lacks a column"


def test_no_metrics_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        read_table(tmp_path / "metrics.csv")
    for data in (b"", b"\xff\xfe\x00", b"a,b\n1,2\n", b"step,step\n1,1\n"):
        (tmp_path / "metrics.csv").write_bytes(data)
        with pytest.raises(FormatError, match="expected the columns"):
            read_table(tmp_path / "metrics.csv")


def test_layers_are_put_together(tmp_path: Path) -> None:
    out = RowFile(tmp_path / "layers.csv", LayerRow, what="layers")
    for step in range(1, 201):
        for name, norm in (("layers.0.attn.q_proj.weight", 3.0), ("layers.0.attn.k_proj.weight", 4.0)):
            out.append(LayerRow(step, name, "gradient", norm / step, 0, 0, 0, 0, 0, "1 2"))
        out.append(LayerRow(step, "layers.0.ffn", "expert_load", 1.0, 0, 0, 0, 0, 0, "5 6"))
    out.close()
    layers = read_layers(tmp_path / "layers.csv")
    assert len(layers.steps) == LAYER_STEPS and (layers.steps[0], layers.steps[-1]) == (1, 200)
    assert layers.norms["gradient"]["layers.0.attn"][0] == pytest.approx(5.0)
    assert layers.norms["gradient"]["layers.0.attn"][-1] == pytest.approx(5.0 / 200)
    assert layers.counts == {"layers.0.attn": [2, 4]}
    text = (tmp_path / "layers.csv").read_text().replace("\n1,layers.0.attn.q", "\n1,layers.0.attn.q,oops", 1)
    (tmp_path / "layers.csv").write_text(text)
    assert read_layers(tmp_path / "layers.csv").damaged == 1
    (tmp_path / "layers.csv").write_text("a\n")
    with pytest.raises(FormatError, match="expected the columns of a run's layers"):
        read_layers(tmp_path / "layers.csv")


# --- thinning -----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=400), st.integers(4, 50))
def test_extremes_and_ends_survive(values: list[float], points: int) -> None:
    y = np.array(values)
    x = np.arange(len(y), dtype=float)
    curve = thinned(x, y, points)
    known = y[np.isfinite(y)]
    assert len(curve) <= points
    if len(known):
        assert (curve.y.min(), curve.y.max()) == (known.min(), known.max())
        assert (curve.y[0], curve.y[-1]) == (known[0], known[-1])
        assert np.all(np.diff(curve.x) > 0)
        assert all(y[int(a)] == b for a, b in zip(curve.x, curve.y, strict=True)), "points of the curve, no means"


def test_every_planted_spike_stays() -> None:
    y = np.random.default_rng(0).normal(3, 0.05, 40_000)
    spikes = [17, 12_345, 20_000, 39_998]
    y[spikes] += 2
    curve = thinned(np.arange(40_000.0), y, 800)
    assert set(spikes) <= set(curve.x.astype(int).tolist())


def test_other_curves() -> None:
    x = np.arange(1000.0)
    mean = averaged(x, x, 10)
    assert len(mean) == 10 and mean.y[0] == pytest.approx(49.5)
    some = sampled(x, x, 10)
    assert (len(some), some.x[0], some.x[-1]) == (10, 0, 999)
    assert points_for(0) == points_for(1) > points_for(500) >= 100
    out = smoothed(np.array([8.0] + [2.0] * 50), 10)
    assert out[0] == 8.0 and out[1] < 8.0 and out[-1] == pytest.approx(2.0, abs=0.01)
    assert smoothed(np.array([]), 10).size == 0
