"""Reports: from the files alone, without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bytekiln import cli_lm
from bytekiln.errors import ConfigError, FileError, FormatError, OutputExistsError
from bytekiln.metrics import MetricsFile, Row
from bytekiln.report import Run, _draw_losses, draw, smoothed, summary
from bytekiln.train import train
from lm_runs import tiny

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    out = [folder / "one", folder / "two"]
    for run, lr in zip(out, (1e-2, 1e-3), strict=True):
        train(tiny(folder, lr=lr, out_dir=str(run)))
    return out


def test_draws_one_and_several(folders: list[Path], tmp_path: Path) -> None:
    runs = [Run.read(f) for f in folders]
    for chosen in (runs[:1], runs):
        out = tmp_path / f"{len(chosen)}.png"
        draw(chosen, out)
        assert out.read_bytes().startswith(PNG)
        with pytest.raises(OutputExistsError, match="--overwrite"):
            draw(chosen, out)
    draw(runs, tmp_path / "1.png", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.png", "2.png"]


def test_summary(folders: list[Path]) -> None:
    told = dict(summary(Run.read(folders[0])))
    assert told["status"] == "completed"
    assert told["step"] == "6 of 6"
    assert float(told["validation loss"]) > 0


def test_runs_without_a_result_or_validation(tmp_path: Path) -> None:
    train(tiny(tmp_path, val_data=""))
    (tmp_path / "run/result.json").unlink()
    run = Run.read(tmp_path / "run")
    draw([run], tmp_path / "x.png")
    assert dict(summary(run))["status"] == "no result yet"


def test_no_torch(folders: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom bytekiln.cli_lm import report\n"
        f"assert report([{str(folders[0])!r}, '--png', '--out', {str(tmp_path / 'x.png')!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_refusals(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileError, match="expected a run folder"):
        Run.read(tmp_path)
    with pytest.raises(FileError, match="cannot be written"):
        draw([Run.read(folders[0])], tmp_path / "no" / "x.png")
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "metrics.csv").write_text((folders[0] / "metrics.csv").read_text().splitlines()[0] + "\n")
    with pytest.raises(FormatError, match="found no step"):
        Run.read(tmp_path)


def written(folder: Path, rows: list[Row], status: str = "completed", **values: object) -> Run:
    """A run folder as `train` leaves it, its rows made up."""
    config = tiny(folder, out_dir=str(folder / "run"), **values)
    (folder / "run").mkdir()
    (folder / "run/config.toml").write_text(config.to_toml(), "utf-8")
    file = MetricsFile(folder / "run/metrics.csv")
    file.append(*rows)
    file.close()
    (folder / "run/result.json").write_text(json.dumps({"status": status, "parameters": 9}), "utf-8")
    return Run.read(folder / "run")


def step(number: int, loss: float | None, val_loss: float | None = None, perplexity: float | None = None) -> Row:
    return Row(number, number, 1.0, loss=loss, lr=1e-3, val_loss=val_loss, val_perplexity=perplexity)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        # fp16: the first and the last update overflowed, and there is no validation
        ([Row(0, 0, 0.0), step(1, None), step(2, 4.0), step(3, 3.5), step(4, None)],
         {"step": "4 of 4", "training loss": "3.5000 at step 3: later ones are not finite"}),
        ([Row(0, 0, 0.0), step(1, float("inf")), step(2, None)],
         {"step": "2 of 4", "training loss": "none that is finite"}),
        ([Row(0, 0, 0.0), step(1, 3.0)], {"step": "1 of 4", "training loss": "3.0000"}),  # one point: no height
        ([step(0, None, 800.0), step(1, 790.0), step(2, 5.0, 4.0, 54.6)],
         {"validation loss": "4.0000", "best": "4.0000 at step 2"}),
        # a perfect loss is the best one, and of equal ones the first
        ([step(0, None, 4.0, 54.6), step(1, 1.0, 0.0, 1.0), step(2, 0.5, 0.0, 1.0), step(3, 0.5, 0.2, 1.2)],
         {"validation loss": "0.2000", "best": "0.0000 at step 1"}),
        # the first losses are not there to say how high the picture goes, and the run has diverged
        ([Row(0, 0, 0.0), step(1, None), step(2, None), step(3, 4.0), step(4, 900.0)], {"training loss": "900.0000"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("others", [0, 1])
def test_runs_whose_numbers_are_not_all_there(
    tmp_path: Path, folders: list[Path], rows: list[Row], told: dict[str, str], others: int
) -> None:
    run = written(tmp_path, rows, max_steps=4)
    draw([run, *map(Run.read, folders[:others])], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    said = dict(summary(run))
    assert {k: said[k] for k in told} == told
    assert ("best" in said) is any(r.val_loss is not None for r in rows)


def test_the_command_reports_a_run_that_overflowed_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row(0, 0, 0.0), step(1, None), step(2, None), step(3, 4.0), step(4, None)]
    run = written(tmp_path, rows, max_steps=4, val_data="")
    assert cli_lm.report([str(run.folder), "--png"]) == 0
    assert (run.folder / "loss.png").read_bytes().startswith(PNG)
    assert "4 of 4" in capsys.readouterr().out


def test_a_run_that_ends_by_time_has_no_last_step(tmp_path: Path) -> None:
    run = written(tmp_path, [step(0, None, 4.0), step(1, 3.9), step(2, 3.8, 3.7)], max_time=60, max_steps=10**9)
    assert dict(summary(run))["step"] == "2"


@pytest.mark.parametrize("status", ["early_stopped", "diverged", "interrupted"])
def test_runs_that_ended_early_are_drawn_with_their_evaluations(tmp_path: Path, status: str) -> None:
    """The first half of a run, its last evaluation being the best or the worst, and an end between two of them."""
    rows = [step(0, None, 4.1, 60.0), step(1, 4.0), step(2, 3.5, 3.6, 36.0), step(3, 3.4), step(4, 3.3, 3.9, 49.0)]
    run = written(tmp_path, [*rows, step(5, 9.0)], status, max_steps=1000)
    axes = drawn(run)
    (curve,) = [line for line in axes.get_lines() if str(line.get_label()).startswith("validation")]
    assert [*map(float, curve.get_xdata())] == [0, 2, 4] and [*map(float, curve.get_ydata())] == [4.1, 3.6, 3.9]
    assert curve.get_label() == "validation, best 3.600"
    said = dict(summary(run))
    assert (said["status"], said["step"], said["best"]) == (status, "5 of 1,000", "3.6000 at step 2")


def drawn(run: Run) -> Axes:
    """The axes with the losses, as `draw` fills them."""
    axes = Figure().subplots()
    _draw_losses(axes, run, "#000000", alone=True)
    return axes


def test_smoothing_starts_at_the_first_value() -> None:
    out = smoothed([8.0] + [2.0] * 50, 10)
    assert out[0] == 8.0
    assert out[1] < 8.0
    assert out[-1] == pytest.approx(2.0, abs=0.01)


def test_damaged_files_and_odd_names(folders: list[Path], tmp_path: Path) -> None:
    odd = tmp_path / "x_{$"
    shutil.copytree(folders[0], odd)
    draw([Run.read(odd)], tmp_path / "x.png")
    draw([Run.read(odd), Run.read(folders[1])], tmp_path / "y.png")
    with pytest.raises(ConfigError, match=r"expected \.png"):
        draw([Run.read(odd)], tmp_path / "x.jpg")
    for text in ("[]", '{"parameters": "x"}'):
        (odd / "result.json").write_text(text)
        with pytest.raises(FormatError, match="found other JSON"):
            Run.read(odd)
    (odd / "metrics.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="invalid UTF-8"):
        Run.read(odd)
