"""Sweeps for the tests: runs that train nothing, as functions and as processes that the tests kill.

Usage: python sweep_driver.py work|run FOLDER [SECONDS]. Each trivial run appends its name to `ran.txt` in the sweep's
folder when it ends, and leaves the result that a real one would.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from bytekiln import cli
from bytekiln.sweep.coordinate import run_sweep, work
from bytekiln.sweep.spec import Trial, read_spec, trials_of

BASE = {"vocab_size": 61, "d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 8, "max_steps": 6}


def trials(count: int = 3, **table: object) -> list[Trial]:
    """Runs that differ in their seed."""
    return trials_of(read_spec({"base": BASE, "seeds": count, **table}, "t.toml", "t", Path()))


def write_result(folder: Path, status: str = "completed", **values: object) -> None:
    """A run's `result.json`."""
    told = {"status": status, "why": "all steps done", "steps": 6, "max_steps": 6, "wall_time_s": 1.0, "tokens": 144}
    told |= {"final_val_loss": 2.0, "best_val_loss": 2.0, "best_step": 6, **values}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(told))


class Trivial:
    """A run that trains nothing; a `sweep.process.Start` makes it."""

    def __init__(self, folder: Path, codes: Mapping[str, int], seconds: float, log: str) -> None:
        self.folder, self.code, self.signal = folder, codes.get(folder.name, 0), 0
        self.until, self.log = time.monotonic() + seconds, log

    def poll(self) -> int | None:
        if self.signal:
            write_result(self.folder, "interrupted", signal=self.signal)
            return 128 + self.signal
        if time.monotonic() < self.until:
            return None
        with (self.folder / "log.txt").open("a") as f:
            f.write(self.log)
        (self.folder / "config.toml").write_bytes((self.folder / "trial.toml").read_bytes())
        if self.code in (0, 3):
            write_result(self.folder, {0: "completed", 3: "diverged"}[self.code])
        fd = os.open(self.folder.parent.parent / "ran.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{self.folder.name} {os.getpid()}\n".encode())
        os.close(fd)
        return self.code

    def send(self, number: int) -> None:
        self.signal = number

    def kill(self) -> None:
        self.code = -9


class Start:
    """Starts trivial runs, and remembers which."""

    def __init__(
        self, codes: Mapping[str, int] | None = None, seconds: float = 0.0, log: str = "error: oh dear\n"
    ) -> None:
        self.codes, self.seconds, self.log = codes or {}, seconds, log
        self.started: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, folder: Path, threads: int) -> Trivial:
        self.started.append(folder.name)
        self.threads.add(threads)
        return Trivial(folder, self.codes, self.seconds, self.log)


def run_here(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: ModuleType,
    start: Callable[..., object],
    argv: Sequence[object],
    status: int = 0,
) -> tuple[str, str]:
    """`lm-sweep …` in this process, its runs begun by `start` in the place of processes; (stdout, stderr).

    `module` is the one that calls `run_sweep`. A user's mistake must be one line.
    """
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(module, "run_sweep", functools.partial(run_sweep, start=start))
    ended = cli.run("lm-sweep", [str(a) for a in argv])
    out, err = capsys.readouterr()
    assert ended == status, err
    if status == 2:
        assert err.count("error: ") == 1 and err.rstrip().count("\n") == err[: err.index("error: ")].count("\n"), err
    return out, err


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    start = Start(seconds=float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
    if what == "work":
        work(where, start=start, say=lambda line: print(line, flush=True))
    else:
        run_sweep(trials(), where, start=start, say=lambda line: print(line, flush=True))
