"""`lm-report` as a user types it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bytekiln.cli_report import report
from bytekiln.errors import ConfigError, FileError, OutputExistsError
from bytekiln.metrics import Row
from report_files import write_run, write_sweep


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", 3.0)
    write_run(tmp_path / "b", 3.2, position="none")
    return tmp_path


def made(folder: Path) -> set[str]:
    return {
        p.name
        for p in folder.iterdir()
        if p.is_file() and p.suffix in (".html", ".png", ".csv") and "metrics" not in p.name
    }


def test_one_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["a"]) == 0
    assert report(["a"]) == 0, "the run's own page is written anew"
    assert made(here / "a") == {"report.html"} and made(here) == set()
    said = capsys.readouterr().out
    assert "status           completed" in said and "a reaches a validation loss of 3.0" in said
    assert "page: a/report.html" in said
    assert report(["a", "--png", "--csv"]) == 0
    assert {"loss.png", "schedule.png", "report_runs.csv", "report_curves.csv"} <= made(here / "a")


def test_several_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["a", "b", "--baseline", "b"]) == 0
    assert made(here) == {"report.html"}
    assert "one seed" in capsys.readouterr().out
    with pytest.raises(OutputExistsError, match="--overwrite"):
        report(["a", "b"])
    assert report(["a", "b", "--overwrite"]) == 0
    assert report(["a", "b", "--out", "c.html", "--title", "Two runs", "--csv", "tables", "--png", "pictures"]) == 0
    assert "<title>Two runs</title>" in (here / "c.html").read_text("utf-8")
    assert len(made(here / "tables")) == 3 and "loss.png" in made(here / "pictures")


def test_what_stands_in_a_named_folder_is_not_ours(here: Path) -> None:
    (here / "tables").mkdir()
    (here / "tables/report_runs.csv").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        report(["a", "--csv", "tables"])
    (here / "pictures").mkdir()
    (here / "pictures/loss.png").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        report(["a", "--png", "pictures"])
    assert (here / "pictures/loss.png").read_text() == "mine"
    assert (here / "tables/report_runs.csv").read_text() == "mine"
    assert report(["a", "--csv", "tables", "--overwrite"]) == 0
    assert report(["a", "--csv", "beside"]) == 0 and "report_runs.csv" in made(here / "beside")


def test_one_picture_and_no_page(here: Path) -> None:
    assert report(["a", "b", "--png", "--out", "both.png"]) == 0
    assert report(["a", "b", "--png", "too.png"]) == 0
    assert made(here) == {"both.png", "too.png"}
    with pytest.raises(OutputExistsError, match="--overwrite"):
        report(["a", "--png", "--out", "both.png"])
    assert report(["a", "b", "--png", "three.png", "--out", "c.html"]) == 0
    assert made(here) == {"both.png", "too.png", "three.png", "c.html"}


def test_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {f"lr={lr}": (None, {"lr": lr}, 3 + lr) for lr in (0.001, 0.002, 0.003)}
    runs |= {f"x{i}": (None, {"lr": 0.1 + i}, 5.0) for i in range(30)}
    folder = write_sweep(tmp_path / "s", runs)
    assert report([str(folder), "--baseline", "lr=0.001"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("lr=0.001") and "and 13 more" in said
    assert made(folder) == {"report.html"}


def test_refusals(here: Path, command: Callable[..., object]) -> None:
    for argv, words in (
        (["a", "--out", "none/x.html"], "none: no such folder; expected the folder for x.html"),
        (["a", "--png", "none/x.png"], "none: no such folder"),
        (["a", "--csv", "none/x"], "none: no such folder"),
        (["a", "--csv", "a/metrics.csv"], "found a file; expected a folder"),
        (["none"], "none: no such folder; expected a run or a sweep"),
        (["a", "b", "--baseline", "c"], "--baseline: found c"),
        (["a", "--out", "x.pdf"], "--out: found x.pdf; expected FILE.html"),
    ):
        with pytest.raises((ConfigError, FileError)) as told:
            report(argv)
        assert words in str(told.value)
    assert made(here) == set()
    assert "no such folder" in command("lm-report", "none", status=2).stderr
    assert "did you mean --baseline" in command("lm-report", "a", "--base-line", "x", status=2).stderr
    (here / "a/report.html").mkdir()
    assert "directory" in command("lm-report", "a", status=2).stderr


def test_a_run_that_overflowed_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row(0, 0, 0.0), *(Row(s, s, 1.0, loss=4.0 if s == 3 else None, lr=1e-3) for s in (1, 2, 3, 4))]
    folder = write_run(tmp_path / "run", rows=rows, max_steps=4)
    assert report([str(folder), "--png"]) == 0
    assert (folder / "loss.png").is_file()
    assert "4 of 4" in capsys.readouterr().out


def test_no_torch_and_a_light_help(here: Path) -> None:
    code = (
        "import sys\nfrom bytekiln.cli import run\n"
        "try:\n    run('lm-report', ['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert run('lm-report', ['a', '--png', 'x.png', '--out', 'x.html', '--csv']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
