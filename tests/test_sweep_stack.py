"""`lm-sweep --stack`: which runs share a process, how each of them ends, and what a signal does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from bytekiln import cli
from bytekiln.metrics import read_metrics
from bytekiln.sweep import coordinate
from bytekiln.sweep.coordinate import run_sweep
from bytekiln.sweep.results import read_results
from lm_runs import ONE_THREAD, TINY, tokens
from sweep_driver import Start, Trivial, trials

BASE = {"vocab_size": 61, "d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 8, "max_steps": 6}


class FakeStack:
    """Several trivial runs as one process."""

    made: ClassVar[list[FakeStack]] = []

    def __init__(
        self, folders: Sequence[Path], threads: int, seconds: float = 0.0, codes: dict[str, int] | None = None
    ):
        self.runs = [Trivial(f, codes or {}, seconds, "") for f in folders]
        self.signals: list[int] = []
        FakeStack.made.append(self)

    def poll(self) -> int | None:
        codes = [r.poll() for r in self.runs]
        return next((c for c in codes if c is None or c > 100), 0)

    def send(self, number: int) -> None:
        self.signals.append(number)
        for r in self.runs:
            r.send(number)

    def kill(self) -> None:
        pass


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[FakeStack]:
    """The stacks that were started."""
    FakeStack.made = []
    monkeypatch.setattr(coordinate, "Together", FakeStack)
    return FakeStack.made


def members(stacks: list[FakeStack]) -> list[list[str]]:
    return [[r.folder.name for r in s.runs] for s in stacks]


def test_runs_of_one_shape_share_a_process_up_to_the_number_asked_for(tmp_path: Path, stacks: list[FakeStack]) -> None:
    said: list[str] = []
    asked = trials(5, base={**BASE, "precision": "fp32"})
    results = run_sweep(asked, tmp_path / "s", stack=3, start=(alone := Start()), say=said.append)
    assert members(stacks) == [["seed=1", "seed=2", "seed=3"], ["seed=4", "seed=5"]] and not alone.started
    assert [r.status for r in results] == ["completed"] * 5
    assert "seed=2: begins (one of 3 in one process)" in said


def test_a_shape_of_its_own_and_dropout_are_trained_alone(tmp_path: Path, stacks: list[FakeStack]) -> None:
    said: list[str] = []
    variant = {"wide": {"d_model": 32}, "drop": {"dropout": 0.1}}
    asked = trials(2, base={**BASE, "precision": "fp32"}, variant=variant)
    run_sweep(asked, tmp_path / "s", stack=8, start=(alone := Start()), say=said.append)
    assert members(stacks) == [["base,seed=1", "base,seed=2"], ["wide,seed=1", "wide,seed=2"]]
    assert alone.started == ["drop,seed=1", "drop,seed=2"]
    assert sum("is trained by itself: dropout" in line for line in said) == 1


def test_a_run_that_diverged_or_failed_in_a_stack_is_that_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {"seed=2": 3, "seed=3": 5}
    monkeypatch.setattr(coordinate, "Together", lambda f, n: FakeStack(f, n, codes=codes))
    results = run_sweep(trials(3, base={**BASE, "precision": "fp32"}), tmp_path / "s", stack=3, start=Start())
    assert [r.status for r in results] == ["completed", "diverged", "failed"]
    assert [r.exit_status for r in results] == [0, 3, 0] and "no result.json" in str(results[2].why)


def test_a_stack_that_cannot_be_trained_is_trained_run_by_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One damaged folder of three costs the others nothing."""

    class Refused(FakeStack):
        def poll(self) -> int | None:
            return 2

    monkeypatch.setattr(coordinate, "Together", Refused)
    alone = Start(codes={"seed=2": 2})
    results = run_sweep(trials(3, base={**BASE, "precision": "fp32"}), tmp_path / "s", stack=3, start=alone)
    assert alone.started == ["seed=1", "seed=2", "seed=3"]
    assert [r.status for r in results] == ["completed", "failed", "completed"]


def test_a_signal_reaches_a_stack_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would not wait for the checkpoints."""
    FakeStack.made = []

    def begin(folders: Sequence[Path], threads: int) -> FakeStack:
        signal.raise_signal(signal.SIGINT)
        return FakeStack(folders, threads, seconds=60)

    monkeypatch.setattr(coordinate, "Together", begin)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(trials(3, base={**BASE, "precision": "fp32"}), tmp_path / "s", stack=3)
    assert FakeStack.made[0].signals == [signal.SIGINT]
    assert [r.status for r in read_results(tmp_path / "s/results.json")] == ["interrupted"] * 3


FLAGS = [f"--{k}={str(v).lower()}" for k, v in {**TINY, "precision": "fp32"}.items() if k != "lr"]


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A real sweep of three rates, the last of which diverges; both data files in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tokens(tmp_path / "train.npy")
    tokens(tmp_path / "val.npy", 200, seed=1)
    spec = tmp_path / "spec.toml"
    spec.write_text("axes.lr = [1e-3, 1e-2, 1e9]\n[base]\ntrain_data = 'train.npy'\nval_data = 'val.npy'\n")
    return [str(spec), *FLAGS]


def test_a_real_stack_ends_as_single_runs_do(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("lm-sweep", [*argv, "--folder", "one", "--jobs", "2"]) == 0
    assert cli.run("lm-sweep", [*argv, "--folder", "all", "--stack"]) == 0
    assert "one of 3 in one process" in capsys.readouterr().err
    one, stacked = (read_results(Path(f) / "lr_sweep_results.json") for f in ("one", "all"))
    assert [r.status for r in stacked] == [r.status for r in one] == ["completed", "completed", "diverged"]
    for a, b in zip(one[:2], stacked[:2], strict=True):
        rows = [read_metrics(Path(f) / r.run_dir / "metrics.csv") for f, r in (("one", a), ("all", b))]
        losses = [[row.loss for row in rows_of if row.loss is not None] for rows_of in rows]
        assert len(losses[0]) > 3 and losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert a.best_val_loss == pytest.approx(b.best_val_loss, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_or_killed_stack_goes_on(argv: list[str], tmp_path: Path, number: signal.Signals) -> None:
    line = [sys.executable, "-m", "bytekiln.cli", "lm-sweep", *argv, "--max-steps=400", "--checkpoint-interval=5"]
    env = {**os.environ, **ONE_THREAD}
    whole = [*line, "--folder", "whole", "--stack"]
    assert subprocess.run(whole, env=env, capture_output=True, timeout=200, check=False).returncode == 0
    sweep = subprocess.Popen([*line, "--folder", "s", "--stack"], env=env, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while not list((tmp_path / "s/runs").glob("*/checkpoints/checkpoint_5")):
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.5)
    sweep.send_signal(number)
    assert sweep.wait(60) in (130, -signal.SIGKILL)
    again = subprocess.run([*line, "--folder", "s", "--stack"], env=env, capture_output=True, timeout=200, check=False)
    assert again.returncode == 0, again.stderr
    expected, found = (read_results(Path(f) / "lr_sweep_results.json") for f in ("whole", "s"))
    assert [r.status for r in found] == [r.status for r in expected]
    assert [r.best_val_loss for r in found] == pytest.approx([r.best_val_loss for r in expected], abs=1e-5)
