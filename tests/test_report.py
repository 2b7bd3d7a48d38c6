"""Reports: from the files alone, without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bytekiln.errors import ConfigError, FileError, FormatError, OutputExistsError
from bytekiln.report import Run, draw, smoothed, summary
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
