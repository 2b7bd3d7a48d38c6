"""Sweeps whose runs train nothing: who runs what, what the results say, and what survives whom."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, OutputExistsError
from bytekiln.metrics import Row, RowFile
from bytekiln.signals import Interrupted, Signals
from bytekiln.sweep import journal as sweep_journal
from bytekiln.sweep.coordinate import run_sweep, work
from bytekiln.sweep.folder import coordinating, remove_sweep, store_trials, stored_trials
from bytekiln.sweep.journal import Holder, Journal
from bytekiln.sweep.process import command, ending, environment
from bytekiln.sweep.progress import Follower, ProgressBoard, plain_line
from bytekiln.sweep.results import TrialResult, best_of, exit_status, read_results, update_results, write_results
from conftest import ROOT
from sweep_driver import Start, trials, write_result

HERE = Path(__file__).parent


def driver(said: Path, *args: object) -> subprocess.Popen[bytes]:
    """A sweep in a process of its own; what it says goes into the file `said`."""
    with said.open("wb") as out:
        line = [sys.executable, str(HERE / "sweep_driver.py"), *map(str, args)]
        return subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)


def wait_for(path: Path, words: str) -> None:
    """Until a file has these words."""
    until = time.monotonic() + 60
    while not (path.exists() and words in path.read_text()):
        assert time.monotonic() < until, path.read_text() if path.exists() else path
        time.sleep(0.02)


def statuses(folder: Path) -> dict[str, str]:
    return {r.name: r.status for r in read_results(folder / "results.json")}


def test_runs_all_and_skips_what_is_done(tmp_path: Path) -> None:
    start = Start({"seed=2": 3})
    results = run_sweep(trials(), tmp_path / "s", start=start)
    assert [r.status for r in results] == ["completed", "diverged", "completed"] and exit_status(results) == 0
    assert read_results(tmp_path / "s/results.json") == results
    again = Start()
    assert run_sweep(trials(), tmp_path / "s", start=again) == results and again.started == []
    assert results[0].run_dir == "runs/seed=1" and results[0].exit_status == 0 and results[1].exit_status == 3


def test_a_failed_run_stops_nothing_and_is_retried_on_demand(tmp_path: Path) -> None:
    results = run_sweep(trials(), tmp_path / "s", start=Start({"seed=1": 2}))
    assert [r.status for r in results] == ["failed", "completed", "completed"] and exit_status(results) == 4
    assert results[0].error == "oh dear" and results[0].exit_status == 2
    again = Start()
    assert run_sweep(trials(), tmp_path / "s", start=again)[0].status == "failed" and again.started == []
    assert run_sweep(trials(), tmp_path / "s", start=again, retry=["failed"])[0].status == "completed"
    assert again.started == ["seed=1"]
    with pytest.raises(ConfigError, match="retry: found faild"):
        run_sweep(trials(), tmp_path / "s", retry=["faild"])


def test_all_failed_is_one(tmp_path: Path) -> None:
    results = run_sweep(trials(), tmp_path / "s", start=Start(dict.fromkeys(("seed=1", "seed=2", "seed=3"), 1)))
    assert exit_status(results) == 1 and best_of(results) is None


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        (0, "failed", None), (3, "failed", None), (2, "failed", "x: found y"), (1, "failed", "x: found y"),
        (130, "interrupted", None), (143, "interrupted", None), (-9, "interrupted", None), (-15, "interrupted", None),
        (-11, "failed", "x: found y"),
    ],
)  # fmt: skip
def test_exit_statuses(tmp_path: Path, code: int, status: str, error: str | None) -> None:
    (tmp_path / "log.txt").write_text("error: an earlier attempt\nIter 1\nerror: x: found y\nrandom words\n")
    told = ending(tmp_path, code, 27)
    assert told.status == status and (error is None or told.error == error)


def test_status_0_counts_only_with_its_result(tmp_path: Path) -> None:
    write_result(tmp_path, "early_stopped")
    assert ending(tmp_path, 0).status == "early_stopped" and ending(tmp_path, 3).status == "failed"
    (tmp_path / "result.json").write_text("{")
    told = ending(tmp_path, 0)
    assert told.status == "failed" and told.error is not None and "result.json" in told.error


def test_a_corrupt_result_of_one_run_loses_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run_sweep(trials(), folder, start=Start())
    damages = [b"{", b"[]", b"[" * 100_000, b'{"status": "completed", "best_val_loss": "low"}']
    for name in ("steps", "best_step", "tokens", "parameters", "max_steps"):
        damages += [f'{{"status": "completed", "{name}": {v}}}'.encode() for v in ("3.5", "-1", "9" * 400)]
    for damage in damages:
        (folder / "runs/seed=2/result.json").write_bytes(damage)
        (folder / "results.json").write_bytes(b"nonsense")
        results = run_sweep(trials(), folder, start=(start := Start()))
        assert [r.status for r in results] == ["completed", "failed", "completed"] and start.started == []
        assert "runs/seed=2/result.json" in (results[1].error or "")
    results = run_sweep(trials(), folder, start=(start := Start()), retry=["failed"])
    assert [r.status for r in results] == ["completed"] * 3 and start.started == ["seed=2"]


def test_a_lost_journal_costs_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    results = run_sweep(trials(), folder, start=Start({"seed=3": 3}))
    (folder / "journal.log").write_bytes(b'{"op":"begin"}\nnonsense\n{}\n')
    with pytest.raises(FormatError, match=r"journal\.log: line 2"):
        run_sweep(trials(), folder, start=Start())
    (folder / "journal.log").unlink()
    assert run_sweep(trials(), folder, start=(start := Start())) == results and start.started == []


def test_a_torn_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run_sweep(trials(2), folder, start=Start())
    with (folder / "journal.log").open("ab") as f:
        f.write(b'{"op":"claim","tri')
    results = run_sweep(trials(3), folder, start=(start := Start()))
    assert start.started == ["seed=3"] and [r.status for r in results] == ["completed"] * 3


def test_results_are_valid_json_without_nan(tmp_path: Path) -> None:
    start = Start()
    run_sweep(trials(1), tmp_path / "s", start=start)
    write_result(tmp_path / "s/runs/seed=1", best_val_loss=float("nan"), tokens_per_s=float("inf"))
    (result,) = run_sweep(trials(1), tmp_path / "s", start=start)
    assert result.best_val_loss is None and result.tokens_per_s is None
    json.loads((tmp_path / "s/results.json").read_text(), parse_constant=lambda c: pytest.fail(c))


def test_fields_of_seed_000(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = {"checkpoint_dir": "checkpoints/x_lr{lr}", "tensorboard_dir": "runs/x_lr{lr}"}
    made = trials(1, axes={"lr": [3e-4]}, seeds=(), output=output, base={"vocab_size": 61, "tensorboard": True})
    run_sweep(made, "s", start=Start(), results="lr_sweep_results.json")
    (entry,) = json.loads(Path("s/lr_sweep_results.json").read_text())
    wanted = {"lr": 3e-4, "lr_str": "3e-4", "min_lr": 3e-5, "status": "completed", "elapsed_time": 1.0,
              "checkpoint_dir": "checkpoints/x_lr3e-4", "final_checkpoint": None,
              "tensorboard_dir": "runs/x_lr3e-4", "best_val_loss": 2.0, "best_step": 6}  # fmt: skip
    assert {k: entry[k] for k in wanted} == wanted


def test_a_reader_refuses_what_is_no_results_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(FileError, match="no such file"):
        read_results(path)
    for text, words in (("{}", "found dict"), ("[1]", "run 1: found int"), ('[{"name": "a"}]', "found no variant"),
                        ("[", "results in JSON")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(FormatError, match=words):
            read_results(path)
    good = TrialResult("a", None, {}, 1e-3, "1e-3", 1e-4, 1, "completed")
    write_results(path, [good])
    entry = json.loads(path.read_text())
    path.write_text(json.dumps([{**entry[0], "status": "done"}]))
    with pytest.raises(FormatError, match="status: found done"):
        read_results(path)
    path.write_text(json.dumps([{**entry[0], "lr": "1e-3"}]))
    with pytest.raises(FormatError, match="lr: found '1e-3'"):
        read_results(path)
    path.write_text(json.dumps([{**entry[0], "of_a_later_version": 1}]))
    assert read_results(path) == [good]


def test_best_is_the_best_loss_of_what_ended_well() -> None:
    def result(status: str, best: float | None, final: float | None = 1.0) -> TrialResult:
        return TrialResult(f"{status}{best}", None, {}, 1e-3, "1e-3", 1e-4, 1, status, best_val_loss=best,
                           final_val_loss=final)  # fmt: skip

    found = best_of(
        [result(s, 0.1) for s in ("diverged", "interrupted", "failed", "running", "pending")]
        + [result("completed", None), result("completed", 2.0, 0.5), result("early_stopped", 1.5, 9.0)]
    )
    assert found is not None and found.status == "early_stopped"


def test_what_a_search_pruned_stays_until_the_run_is_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    why = "the worse half at step 100"

    def told(status: str, steps: int, pruned: str | None = None) -> TrialResult:
        return TrialResult("a", None, {}, 1e-3, "1e-3", 1e-4, 1, status, steps=steps, pruned=pruned)

    for status, steps, stays in (("interrupted", 100, True), ("running", 100, False), ("interrupted", 120, False),
                                 ("completed", 200, False)):  # fmt: skip
        update_results(path, [told("interrupted", 100, why)])
        update_results(path, [told(status, steps)])
        assert read_results(path)[0].pruned == (why if stays else None), (status, steps)


def test_a_given_up_run_that_goes_on_has_no_reason_any_more(tmp_path: Path) -> None:
    """Not even where it is stopped again before the first step."""
    folder = tmp_path / "s"
    run_sweep(trials(2), folder, start=Start({"seed=1": 130}))
    (one, _) = read_results(folder / "results.json")
    assert one.status == "interrupted"
    update_results(folder / "results.json", [dataclasses.replace(one, pruned="0.3 above the best at step 2")])
    run_sweep(trials(2)[1:], folder, start=Start())
    assert [r.pruned for r in read_results(folder / "results.json") if r.name == one.name] != [None], "not taken up"
    results = run_sweep(trials(2), folder, start=(start := Start({"seed=1": 130})))
    assert start.started == ["seed=1"] and results[0].status == "interrupted" and results[0].pruned is None


def test_a_run_that_still_saves_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sweep was killed; it holds its folder for minutes, and is never called failed."""
    folder, clock = tmp_path / "s", time.monotonic
    place = folder / "runs/seed=1"
    place.mkdir(parents=True)
    fd = os.open(place, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    saves = threading.Timer(1.5, os.close, [fd])
    monkeypatch.setattr(time, "monotonic", lambda: 100 * clock())
    said: list[str] = []
    saves.start()
    results = run_sweep(trials(2), folder, start=(start := Start()), say=said.append)
    saves.join()
    assert [r.status for r in results] == ["completed"] * 2 and start.started == ["seed=2", "seed=1"]
    waits = [line for line in said if "waits" in line]
    assert f"seed=1: waits for the process that still trains or saves in {place}" in waits[0]
    assert 2 <= len(waits) <= 4 and "waits, for 1 min" in waits[1]


def test_limits_may_rise_but_the_mathematics_may_not(tmp_path: Path) -> None:
    base = {"vocab_size": 61, "max_steps": 6}
    run_sweep(trials(2, base=base), tmp_path / "s", start=Start())
    run_sweep(trials(2, base={**base, "max_steps": 12}), tmp_path / "s", start=(start := Start()))
    assert start.started == ["seed=1", "seed=2"]
    with pytest.raises(MismatchError, match=r"runs/seed=1: found a run with d_model 768; expected 384"):
        run_sweep(trials(2, base={**base, "d_model": 384}), tmp_path / "s", start=start)


def test_more_trials_join_a_folder(tmp_path: Path) -> None:
    run_sweep(trials(1), tmp_path / "s", start=Start())
    run_sweep(trials(3)[1:], tmp_path / "s", start=(start := Start()))
    assert start.started == ["seed=2", "seed=3"] and list(statuses(tmp_path / "s").values()) == ["completed"] * 3
    assert len(stored_trials(tmp_path / "s")[1]) == 3


def test_foreign_checkpoints_are_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "c/checkpoint_4").mkdir(parents=True)
    made = trials(1, output={"checkpoint_dir": str(tmp_path / "c")}, seeds=())
    with pytest.raises(OutputExistsError, match=r"checkpoint_4 of another run.*lm-sweep adopt"):
        run_sweep(made, tmp_path / "s", start=Start())


def test_jobs_run_at_once_and_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytekiln.sweep.coordinate.cores", lambda: 8)
    began = time.monotonic()
    run_sweep(trials(4), tmp_path / "s", jobs=4, start=(start := Start(seconds=1.0)))
    assert time.monotonic() - began < 3.5 and start.threads == {2}
    # a run that is resumed gets the threads of its first attempt: bit-identical only with as many
    places = Journal(tmp_path / "s/journal.log").places
    assert {p.threads for p in places.values()} == {2}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment(2)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment(2)["OMP_NUM_THREADS"] == "5"
    assert command(Path("/x"))[1:4] == ["-m", "bytekiln.cli", "lm-train"]


def test_eight_workers_share_400_trials(tmp_path: Path) -> None:
    """None is lost, none is run twice (Optuna's journal decides)."""
    folder = tmp_path / "s"
    folder.mkdir()
    store_trials(folder, trials(400), "results.json")
    workers = [driver(tmp_path / f"said{i}", "work", folder) for i in range(8)]
    for i, w in enumerate(workers):
        assert w.wait(280) == 0, (tmp_path / f"said{i}").read_text()
    ran = [line.split() for line in (folder / "ran.txt").read_text().splitlines()]
    assert Counter(Counter(name for name, _ in ran).values()) == {1: 400}
    assert len({pid for _, pid in ran}) == 8
    assert Counter(statuses(folder).values()) == {"completed": 400}


def test_a_second_coordinator_is_refused_and_a_worker_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    first = driver(tmp_path / "said", "run", folder, 1.5)
    wait_for(tmp_path / "said", "begins")
    with pytest.raises(FileError, match=rf"found a sweep run by process {first.pid} on .*lm-sweep worker"):
        run_sweep(trials(), folder, start=Start())
    results = work(folder, start=(start := Start(seconds=0.2)))
    assert first.wait(30) == 0
    assert start.started and [r.status for r in results] == ["completed"] * 3
    assert sorted(line.split()[0] for line in (folder / "ran.txt").read_text().splitlines()) == [
        "seed=1", "seed=2", "seed=3",
    ]  # fmt: skip
    with coordinating(folder):
        pass


@pytest.mark.parametrize("who", ["run", "work"])
def test_the_claims_of_the_dead_are_taken_up(tmp_path: Path, who: str) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    store_trials(folder, trials(), "results.json")
    dead = driver(tmp_path / "said", who, folder, 60)
    wait_for(tmp_path / "said", "begins")
    dead.kill()
    dead.wait()
    said: list[str] = []
    results = run_sweep(trials(), folder, start=(start := Start()), say=said.append)
    assert [r.status for r in results] == ["completed"] * 3 and len(start.started) == 3
    assert any(f"process {dead.pid} on" in line and "has died" in line for line in said)


def test_a_silent_worker_of_another_machine_is_believed_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Journal(tmp_path / "journal.log")
    there.me = Holder("far:1", "far", "far boot pid", 1, "")
    assert there.claim("a", 1)
    here = Journal(tmp_path / "journal.log")
    assert here.take_from_the_dead(["a"]) == [] and not here.claim("a", 1)
    monkeypatch.setattr(sweep_journal, "STALE_S", 0.0)
    assert [name for name, _ in here.take_from_the_dead(["a"])] == ["a"]
    assert here.claim("a", 1)
    assert not there.finish("a", "completed"), "who was taken for dead no longer speaks for the trial"
    assert here.finish("a", "completed") and here.place("a").done is not None


def test_first_claim_wins_whatever_the_readers_order(tmp_path: Path) -> None:
    one, two = Journal(tmp_path / "j.log"), Journal(tmp_path / "j.log")
    two.me = Holder.me()
    assert one.claim("a", 1) and not two.claim("a", 1)
    assert two.claim("b", 1)
    one.release("a", "x")
    one.release("a", "x")  # a second one of the same attempt changes nothing
    assert one.place("a").attempt == 1
    two.read()
    assert two.claim("a", 1) and two.place("a").attempt == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_results_say_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "s"
    p = driver(tmp_path / "said", "run", folder, 60)
    wait_for(tmp_path / "said", "begins")
    p.send_signal(number)
    p.wait(60)
    assert p.returncode in (-number, 130)  # the driver has no handler of its own: Python's KeyboardInterrupt
    assert statuses(folder) == {"seed=1": "interrupted", "seed=2": "pending", "seed=3": "pending"}
    results = run_sweep(trials(), folder, start=(start := Start()))
    assert [r.status for r in results] == ["completed"] * 3 and start.started[0] == "seed=1"


def test_an_unwritable_or_full_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="expected a writable folder"):
        run_sweep(trials(), tmp_path / "file/s", start=Start())
    folder, start = tmp_path / "s", Start()
    run_sweep(trials(1), folder, start=start)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="no space left on device"):
            run_sweep(trials(3), folder, start=start)
    results = run_sweep(trials(3), folder, start=start)
    assert [r.status for r in results] == ["completed"] * 3
    assert start.started.count("seed=1") == 1


def test_overwriting_removes_the_sweeps_own_files_only(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    output = {"checkpoint_dir": str(tmp_path / "c_{seed}")}
    run_sweep(trials(2, output=output), folder, start=Start())
    (tmp_path / "c_1/checkpoint_2").mkdir(parents=True)
    (tmp_path / "c_1/checkpoint_2/state.json").write_text("{}")
    (tmp_path / "c_1/notes.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    remove_sweep(folder)
    assert not (tmp_path / "c_1/checkpoint_2").exists() and (tmp_path / "c_1/notes.txt").exists()
    assert (folder / "notes.txt").exists() and not (folder / "journal.log").exists()
    run_sweep(trials(2, output=output), folder, start=Start())


def test_progress_follows_a_growing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs/a/metrics.csv"
    path.parent.mkdir(parents=True)
    file = RowFile(path, Row, what="metrics")
    follower = Follower(path)
    assert follower.look().step == 0
    file.append(Row(0, 0, 0.0, val_loss=4.0), Row(1, 10, 1.0, loss=3.5), Row(2, 20, 2.0, loss=3.0, val_loss=3.25))
    seen = follower.look()
    assert seen == (2, 2.0, 3.0, 3.25, 3.25)
    file.append(Row(3, 30, 3.0, loss=2.5, val_loss=3.5))
    assert follower.look() == (3, 3.0, 2.5, 3.5, 3.25)
    r = TrialResult("a", None, {}, 1e-3, "1e-3", 1e-4, 1, "running", run_dir="runs/a", max_steps=9)
    said: list[str] = []
    board = ProgressBoard(said.append, live=False)
    monkeypatch.setattr("bytekiln.sweep.progress.PLAIN_INTERVAL_S", 0.0)
    board.show([r], tmp_path)
    assert said == ["a: step 3 of 9, loss 2.5000, validation 3.5000, 6.0 s left, 0 of 1 runs done, ETA -"]
    assert plain_line(r, follower.seen, None, [r]).startswith("a: step 3 of 9")
    file.close()


def test_the_live_table_shows_runs_losses_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from bytekiln.sweep.progress import Seen, table_of

    results = [
        TrialResult(f"lr={i}", None, {}, 1e-3, "1e-3", 1e-4, 1, "pending" if i else "running", max_steps=100)
        for i in range(60)
    ]
    console = Console(width=100)
    console.print(table_of(results, {"lr=0": Seen(50, 5.0, 3.0, 2.5, 2.25)}, {"lr=0": 5.0}))
    shown = capsys.readouterr().out
    for words in ("0 of 60 runs done", "running", "50/100", "3.0000", "2.5000", "2.2500", "5.0 s", "and 20 more"):
        assert words in shown


def test_the_end_of_the_whole_sweep_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two workers, one that begins its next run; of what an earlier sweep did nothing counts as pace."""
    monkeypatch.setattr("bytekiln.sweep.progress.PLAIN_INTERVAL_S", 0.0)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    files: dict[str, RowFile] = {}
    born: dict[str, float] = {}

    def run(name: str, status: str, steps: int = 0, code: int | None = None) -> TrialResult:
        where = f"runs/{name}"
        if status == "running" and name not in files:
            (tmp_path / where).mkdir(parents=True)
            files[name] = RowFile(tmp_path / where / "metrics.csv", Row, what="metrics")
        if status == "running":
            files[name].append(Row(steps, 10 * steps, now - born.setdefault(name, now), loss=3.0))
        return TrialResult(name, None, {}, 1e-3, "1e-3", 1e-4, 1, status, run_dir=where, max_steps=100, steps=steps,
                           exit_status=code)  # fmt: skip

    said: list[str] = []
    board = ProgressBoard(said.append, live=False)

    def eta(*results: TrialResult) -> str:
        board.show(results, tmp_path)
        return said[-1].rpartition("ETA ")[2]

    old = [run("old", "completed", 100), run("stopped", "interrupted", 90, 143), run("fell", "diverged", 3, 3)]
    assert eta(*old, run("a", "running", 0), run("b", "running", 50), run("c", "pending")) == "-"
    now += 10
    assert eta(*old, run("a", "running", 10), run("b", "running", 60), run("c", "pending")) == "-"
    now += 10  # 20 steps in 10 s; 80 + 30 + 100 remain
    assert eta(*old, run("a", "running", 20), run("b", "running", 70), run("c", "pending")) == "1 min 45 s"
    now += 20  # 70 steps in 30 s, and 160 remain: 69 s; but a alone needs longer
    assert eta(*old, run("a", "running", 30), run("b", "completed", 100), run("c", "running", 10)) == "1 min 33 s"
    now += 400  # what is long ago does not count: 80 steps in 400 s; of 30 + 50, c alone needs longer
    assert eta(*old, run("a", "running", 70), run("b", "completed", 100), run("c", "running", 50)) == "8 min 20 s"
    now += 1
    assert eta(*old, *(run(n, "running", 100) for n in "ac"), run("b", "completed", 100)) == "0 ms"
    assert said[-1].endswith("3 of 6 runs done, ETA 0 ms")

    from rich.console import Console

    from bytekiln.sweep.progress import table_of

    for known, shown in ((None, "ETA -"), (125.0, "ETA 2 min 05 s")):
        Console(width=100).print(table_of(old, {}, {}, known))
        assert f"2 of 3 runs done, {shown}" in capsys.readouterr().out
    for file in files.values():
        file.close()


def test_another_folder_on_the_same_board_has_a_pace_of_its_own(tmp_path: Path) -> None:
    """A search shows its stages on one board; runs of two of them may have one name."""
    board = ProgressBoard(lambda _: None, live=False)
    for stage, steps in (("coarse", 30), ("transfer", 4)):
        place = tmp_path / stage / "runs/a"
        place.mkdir(parents=True)
        file = RowFile(place / "metrics.csv", Row, what="metrics")
        file.append(Row(steps, 10, 1.0, loss=3.0))
        file.close()
        r = TrialResult("a", None, {}, 1e-3, "1e-3", 1e-4, 1, "running", run_dir="runs/a", max_steps=100)
        board.show([r], tmp_path / stage)
        assert board._followers["a"].seen.step == steps


def test_run_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    done: list[TrialResult] = []
    thread = threading.Thread(target=lambda: done.extend(run_sweep(trials(1), tmp_path / "s", start=Start())))
    thread.start()
    thread.join(30)
    assert [r.status for r in done] == ["completed"]


def test_no_optuna_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna.storages.journal", None)
    with pytest.raises(BytekilnError, match=r'pip install "bytekiln\[sweep\]"'):
        run_sweep(trials(1), tmp_path / "s", start=Start())


@pytest.mark.parametrize("status", ["diverged", "early_stopped"])
def test_a_retried_run_is_trained_again_from_its_first_step(tmp_path: Path, status: str) -> None:
    folder = tmp_path / "s"
    run_sweep(trials(2), folder, start=Start({"seed=1": 3}))
    place = folder / "runs/seed=1"
    if status == "early_stopped":
        Journal(folder / "journal.log").reopen("seed=1")
        write_result(place, status)
    (place / "checkpoints/checkpoint_2").mkdir(parents=True)
    (place / "checkpoints/checkpoint_2/state.json").write_text("{}")
    results = run_sweep(trials(2), folder, start=(start := Start()), retry=[status])
    assert start.started == ["seed=1"] and results[0].status == "completed"
    assert not (place / "checkpoints/checkpoint_2").exists()


@pytest.mark.parametrize("status", ["completed", "pending", "running", "faild"])
def test_what_cannot_be_retried_is_refused_first(tmp_path: Path, status: str) -> None:
    with pytest.raises(ConfigError, match=f"retry: found {status}; expected failed, diverged"):
        run_sweep(trials(), tmp_path / "s", retry=[status])
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("file", ["trials.json", "runs/seed=1/trial.toml"])
def test_a_damaged_file_does_not_keep_a_sweep_from_being_replaced(tmp_path: Path, file: str) -> None:
    folder, output = tmp_path / "s", {"checkpoint_dir": str(tmp_path / "c_{seed}")}
    run_sweep(trials(2, output=output), folder, start=Start())
    for seed in (1, 2):
        (tmp_path / f"c_{seed}/checkpoint_2").mkdir(parents=True)
        (tmp_path / f"c_{seed}/checkpoint_2/state.json").write_text("{}")
    (folder / "runs/mine").mkdir()
    (folder / file).write_text("nonsense")
    remove_sweep(folder)
    assert [p.name for p in (folder / "runs").iterdir()] == ["mine"] and not (folder / "results.json").exists()
    assert not list(tmp_path.glob("c_*/checkpoint_*"))
    run_sweep(trials(2, output=output), folder, start=(start := Start()))
    assert start.started == ["seed=1", "seed=2"]


def test_a_damaged_trial_is_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    results = run_sweep(trials(2), folder, start=Start())
    path = folder / "runs/seed=1/trial.toml"
    said = path.read_bytes()
    for text in (b"nonsense", b"d_model = true\n", b"\xff", b""):
        path.write_bytes(text)
        assert run_sweep(trials(2), folder, start=(start := Start())) == results and start.started == []
        assert path.read_bytes() == said


def test_foreign_checkpoints_of_any_run_are_found_before_the_first_begins(tmp_path: Path) -> None:
    made = trials(2, output={"checkpoint_dir": str(tmp_path / "c_{seed}")})
    (tmp_path / "c_2/checkpoint_4").mkdir(parents=True)
    for _ in range(2):  # what is written down of a run that has not begun makes its folder no more its own
        with pytest.raises(OutputExistsError, match="c_2: found checkpoint_4 of another run"):
            run_sweep(made, tmp_path / "s", start=(start := Start()))
        assert start.started == [] and not (tmp_path / "s/runs/seed=1").exists()


def test_a_closed_terminal_interrupts(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    code = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    )
    line = [sys.executable, "-c", code, sys.executable, str(HERE / "sweep_driver.py"), "run", str(folder), "60"]
    with (tmp_path / "said").open("wb") as out:
        p = subprocess.Popen(line, stdout=out, cwd=ROOT)
    wait_for(tmp_path / "said", "begins")
    p.send_signal(signal.SIGHUP)
    assert p.wait(60) == 129
    assert statuses(folder) == {"seed=1": "interrupted", "seed=2": "pending", "seed=3": "pending"}


def test_runs_that_cannot_be_told_to_end_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a cluster, which are told by a file, where the disk is full."""
    killed: list[str] = []

    class Deaf(Start):
        def __call__(self, folder: Path, threads: int) -> Any:
            run = super().__call__(folder, threads)
            run.send = refuse  # type: ignore[method-assign]
            run.kill = lambda: killed.append(folder.name)  # type: ignore[method-assign]
            return run

    def refuse(*_: object) -> None:
        raise FileError("signal: no space left on device")

    class Breaks:
        def show(self, results: Sequence[TrialResult], folder: Path) -> None:
            if [r.status for r in results] == ["running"] * 2:
                raise FileError("what broke it")

    monkeypatch.setattr("bytekiln.sweep.coordinate.END_S", 0.2)
    monkeypatch.setattr("bytekiln.sweep.coordinate.LOOK_S", 0.1)
    with pytest.raises(FileError, match="what broke it"):
        run_sweep(trials(2), tmp_path / "s", jobs=2, start=Deaf(seconds=60), board=Breaks())
    assert sorted(killed) == ["seed=1", "seed=2"]


def test_ctrl_c_ends_what_was_started_to_ignore_it(tmp_path: Path) -> None:
    """As `lm-sweep … &` of a script is."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), Signals() as signals:
            signals.deferred = True
            signal.raise_signal(signal.SIGINT)
            raise Interrupted
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("early", [False, True])
def test_ctrl_c_reaches_what_was_started_with_it_blocked(early: bool) -> None:
    """As everything that a Ray cluster starts is; one that came before was waiting."""
    before, number = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]), signal.SIGINT
    try:
        if early:
            signal.pthread_kill(threading.get_ident(), number)  # other threads may not block it
        with pytest.raises(KeyboardInterrupt), Signals():
            assert not early
            signal.pthread_kill(threading.get_ident(), number)
            time.sleep(5)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
