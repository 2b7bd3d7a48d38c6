"""Sweeps that are replaced: never under somebody's hands, and no result of the one before counts in the new one."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bytekiln import cli_sweep
from bytekiln.atomic import AtomicFile
from bytekiln.config import load_config
from bytekiln.errors import FileError, FormatError
from bytekiln.sweep.coordinate import run_sweep, work
from bytekiln.sweep.folder import coordinating, open_folder, remove_sweep, store_trials
from bytekiln.sweep.journal import Holder, Journal
from bytekiln.sweep.results import best_of, read_results
from bytekiln.sweep.spec import read_spec
from sweep_driver import BASE, Start, run_here, trials
from test_sweep import driver, statuses, wait_for


@contextmanager
def training(place: Path) -> Iterator[None]:
    """Hold a run's folder as `lm-train` does."""
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def test_a_worker_keeps_its_sweep_from_being_replaced(tmp_path: Path) -> None:
    folder, said = tmp_path / "s", tmp_path / "said"
    spec = read_spec({"base": BASE, "seeds": 3}, "t.toml", "t", tmp_path)
    open_folder(spec, folder)
    store_trials(folder, trials(), "results.json")
    worker = driver(said, "work", folder, 60)  # there is no coordinator, or none any more
    try:
        wait_for(said, "begins")
        with pytest.raises(FileError, match=f"runs/seed=.: found a run trained by process {worker.pid} on .*stop it"):
            open_folder(spec, folder, overwrite=True)
        assert (folder / "journal.log").exists() and len(list(folder.glob("runs/*/trial.toml"))) == 3
    finally:
        worker.kill()
        worker.wait()
    open_folder(spec, folder, overwrite=True)
    assert not (folder / "journal.log").exists()


def test_a_worker_of_another_machine_does_as_long_as_the_journal_grows(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    store_trials(folder, trials(), "results.json")
    path = folder / "journal.log"
    there = Journal(path)
    there.me = Holder("far:1", "far", "far boot pid", 1, "")
    assert there.claim("seed=2", 1)
    with pytest.raises(FileError, match="seed=2: found a run trained by process 1 on far"):
        remove_sweep(folder)
    os.utime(path, (time.time() - 200,) * 2)
    remove_sweep(folder)
    assert not path.exists()


@pytest.mark.parametrize("flags", [(), ("--detach", "lr_sweep")])
def test_a_run_that_is_trained_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    """Detached it is refused at once, where the user still looks."""
    monkeypatch.setattr(cli_sweep, "check", lambda name: name)
    monkeypatch.setattr(cli_sweep, "detach", lambda *_: pytest.fail("was started"))
    base = "".join(f"{k} = {v}\n" for k, v in BASE.items())
    (tmp_path / "train.npy").write_bytes(b"tokens")
    (tmp_path / "t.toml").write_text(f'seeds = 2\n[base]\ntrain_data = "{tmp_path}/train.npy"\n{base}')
    folder, argv = tmp_path / "s", [tmp_path / "t.toml", "--folder", tmp_path / "s"]
    run_here(monkeypatch, capsys, cli_sweep, Start(), argv)
    before = read_results(folder / "results.json")
    replace = [*argv, "--overwrite", "--set", "max_steps=7", *flags]
    with training(folder / "runs/seed=2"):
        _, err = run_here(monkeypatch, capsys, cli_sweep, Start(), replace, status=2)
        assert "runs/seed=2: found a run trained by another process; expected a sweep that nobody trains" in err
    with coordinating(folder):
        _, err = run_here(monkeypatch, capsys, cli_sweep, Start(), replace, status=2)
        assert f"found a sweep run by process {os.getpid()}" in err
    assert read_results(folder / "results.json") == before


def test_who_comes_back_to_a_replaced_sweep_says_nothing_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    old = Journal(path)
    assert old.claim("a", 1)
    path.unlink()
    new = Journal(path)
    with pytest.raises(FileError, match="found the journal of another sweep"):
        old.finish("a", "completed")
    with pytest.raises(FileError, match="replaced meanwhile"):
        old.read()
    new.read()
    assert new.place("a").done is None
    path.unlink()
    with pytest.raises(FileError, match=r"journal\.log: cannot be written: no such file"):
        new.claim("a", 1)
    assert not path.exists()


@pytest.mark.parametrize("journal", [True, False])
def test_the_result_of_another_run_does_not_count(tmp_path: Path, journal: bool) -> None:
    """As one that was still trained for the sweep that was replaced: here the seed is another one."""
    folder = tmp_path / "s"
    run_sweep(trials(2), folder, start=Start())
    path = folder / "runs/seed=1/config.toml"
    path.write_text(load_config(path).with_(seed=42).to_toml())
    if not journal:
        (folder / "journal.log").unlink()
    results = run_sweep(trials(2), folder, start=(start := Start()))
    assert [r.status for r in results] == ["failed", "completed"] and start.started == []
    assert results[0].why == "its result is that of another run" and results[0].best_val_loss is None
    assert (results[0].error or "").startswith(f"{path}: seed: found 42; expected 1")
    assert best_of(results[:1]) is None


def test_a_worker_does_not_take_the_result_of_another_run(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run_sweep(trials(2), folder, start=Start())
    path = folder / "runs/seed=1/config.toml"
    path.write_text(load_config(path).with_(seed=42).to_toml())
    (folder / "journal.log").unlink()
    work(folder, start=(start := Start()))
    assert start.started == ["seed=1"] and statuses(folder) == {"seed=1": "completed", "seed=2": "completed"}


def test_what_the_run_itself_has_settled_is_no_other_run(tmp_path: Path) -> None:
    made = trials(1, base={**BASE, "vocab_size": 0})
    folder = tmp_path / "s"
    run_sweep(made, folder, start=Start())
    path = folder / "runs/seed=1/config.toml"
    path.write_text(load_config(path).with_(vocab_size=61, precision="fp32").to_toml())
    assert run_sweep(made, folder, start=Start())[0].status == "completed"


def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_the_dead_left_half_written_goes(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run_sweep(trials(1), folder, start=Start())
    gone, alive = dead(), os.getppid()
    left = [f".results.json.{gone}.tmp", f".trials.json.{gone}.tmp", f"runs/seed=1/.trial.toml.{gone}.tmp"]
    left += [".analysis.md.partial", ".report.html.partial"]
    kept = [f".results.json.{alive}.tmp", f".notes.txt.{gone}.tmp", ".results.json.tmp", ".notes.txt.partial"]
    kept += [".comparison.png.partial"]
    for name in (*left, *kept):
        (folder / name).touch()
    with AtomicFile(folder / "comparison.png", overwrite=True):  # whose writer lives
        run_sweep(trials(1), folder, start=Start())
        assert (folder / kept.pop()).exists()
    assert not [n for n in left if (folder / n).exists()] and all((folder / n).exists() for n in kept)


def test_a_damaged_list_of_runs_says_how_it_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    results = run_sweep(trials(2), folder, start=Start())
    (folder / "trials.json").write_text("{")
    with pytest.raises(FormatError, match=r"trials\.json: .*the file may be deleted: .* makes it anew"):
        run_sweep(trials(2), folder, start=Start())
    (folder / "trials.json").unlink()
    assert run_sweep(trials(2), folder, start=(start := Start())) == results and start.started == []
