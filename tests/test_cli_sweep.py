"""`lm-sweep` as a user meets it: dry run, refusals, adoption, sessions, what follows, and sweeps that are killed."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bytekiln import cli_sweep
from bytekiln.config import FIELDS, changed_mathematics
from bytekiln.sweep.coordinate import run_sweep
from bytekiln.sweep.folder import run_folder, store_trials
from bytekiln.sweep.process import stated_threads
from bytekiln.sweep.results import read_results
from lm_runs import ONE_THREAD, TINY, tokens
from sweep_driver import Start, run_here, write_result
from sweep_kills import make, outcome, start

HERE = Path(__file__).parent
FLAGS = [f"--{k}={str(v).lower()}" for k, v in TINY.items() if k != "lr"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with token files."""
    monkeypatch.chdir(tmp_path)
    tokens(tmp_path / "train.npy")
    tokens(tmp_path / "val.npy", 200, seed=1)
    return tmp_path


@pytest.fixture
def sweep(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """`sweep("tinystories-lr", …, status=2)` in this process, its runs trivial; (stdout, stderr)."""

    def run(*argv: object, status: int = 0, begins: Start | None = None) -> tuple[str, str]:
        return run_here(monkeypatch, capsys, cli_sweep, begins or Start(), argv, status)

    return run


DATA = ("--train-data", "train.npy", "--val-data", "val.npy")


def test_dry_run_lists_runs_and_their_sum(sweep, here: Path) -> None:
    out, _ = sweep("tinystories-lr", *DATA, *FLAGS, "--seeds", 2, "--dry-run", "--jobs", 2)
    lines = out.splitlines()
    assert lines[0].split() == ["run", "parameters", "steps", "tokens", "FLOPs", "time", "disk"]
    assert lines[1].startswith("lr=3e-4,seed=1") and lines[12].startswith("lr=1.2e-3,seed=2")
    assert lines[13].startswith("all") and "12 runs" in lines[-1] and "2 at once" in lines[-1]
    assert not (here / "tinystories-lr").exists()


def test_the_table_and_the_best(sweep, here: Path) -> None:
    out, err = sweep("tinystories-lr", *DATA, "--no-tensorboard", "--lrs", "2.5e-4 3e-4")
    assert "best: lr=2.5e-4, validation loss 2.0000 at step 6" in out and "tinystories-lr/lr_sweep_results.json" in out
    assert "2 runs in tinystories-lr, 1 at once" in err and "lr=3e-4: completed" in err
    assert [r.lr_str for r in read_results(here / "tinystories-lr/lr_sweep_results.json")] == ["2.5e-4", "3e-4"]
    begun = Start()
    sweep("tinystories-lr", begins=begun)  # by its name alone: as it was begun here
    sweep("./tinystories-lr", begins=begun)
    assert begun.started == []


def test_another_spec_is_refused_by_what_differs(sweep, here: Path) -> None:
    base = ("tinystories-lr", *DATA, "--no-tensorboard")
    sweep(*base, "--lrs", "3e-4")
    _, err = sweep(*base, "--lrs", "3e-4 4e-4", status=2)
    assert "sweep.toml: axes.lr: found [0.0003]; expected [0.0003, 0.0004]" in err and "--folder" in err
    _, err = sweep(*base, "--lrs", "3e-4", "--batch-size", 8, status=2)
    assert "base.batch_size: found nothing; expected 8" in err
    sweep(*base, "--lrs", "3e-4 4e-4", "--overwrite", begins=(begun := Start()))
    assert begun.started == ["lr=3e-4", "lr=4e-4"]
    sweep(*base, "--lrs", "3e-4", "--folder", "other", begins=(begun := Start()))
    assert begun.started == [] or begun.started == ["lr=3e-4"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "found no sweep; expected a preset"),
        (("tinystories-lrr",), "did you mean tinystories-lr?"),
        (("tinystories-lr", "--axis", "learning_rat=1 2", *DATA), "did you mean learning_rate?"),
        (("tinystories-lr", "--set", "d_modle=3", *DATA), "unknown key d_modle; did you mean d_model?"),
        (("tinystories-lr", "--set", "d_model", *DATA), "expected FIELD=VALUE"),
        (("tinystories-lr", "--lrs", "a b", *DATA), "--lrs: found 'a b'"),
        (("tinystories-lr", "--lrs", "", *DATA), "--lrs: found ''"),
        (("tinystories-lr", "--seeds", "", *DATA), "--seeds: found ''"),
        (("debug", "--axis", "learning_rate=1e-3", "--axis", "max_lr=1e-2", *DATA), "--axis: found lr twice"),
        (("tinystories-lr", "--lr", "1e-3", *DATA), "expected --lrs"),
        (("tinystories-lr", "--seeds", "0", *DATA), "--seeds: found '0'"),
        (("tinystories-lr", "--jobs", "0", *DATA), "expected a whole number from 1 on"),
        (("tinystories-lr", "--scale", "gpu", *DATA), "expected one that tinystories-lr has: cpu"),
        (("tinystories-lr", "--retry", "faild", "--no-tensorboard", *DATA), "retry: found faild"),
        (("tinystories-lr", "--seeds", "1000000000", *DATA), "found 1000000000; expected at most"),
        (("tinystories-lr", "--seeds", "100000", *DATA), "found 600,000 runs; expected at most 1,000, or --yes"),
        (("tinystories-lr", "--lrss", "1"), "unknown flag --lrss; did you mean --lrs?"),
        (("tinystories-lr",), "make it with: bpe-train --dataset tinystories && bpe-encode --dataset tinystories"),
        (("debug", "--seeds", "2"), "train_data: found none"),
        (("debug", "--axis", "seed=" + " ".join(map(str, range(10_000))), *DATA), "found 10,000 runs"),
        (("worker", "nowhere"), "trials.json: no such file"),
        (("adopt", "nowhere", "--as", "lr=1e-3", "--sweep", "debug"), "nowhere: no such folder"),
        (("adopt", "checkpoints/other", "--as", "lr=1e-3"), "expected --sweep"),
        (("adopt", "checkpoints/tinystories", "--as", "lr"), "--as: found 'lr'"),
        (("tinystories-lr", "--detach", "a.b", *DATA), "--detach: "),
        (("tinystories-lr", "--stack", "--ray", "--detach", "x", *DATA), "--stack: found it with --ray"),
        (("tinystories-lr", "--retry", "pending", *DATA), "retry: found pending"),
        (("debug", "--train-data", os.devnull, "--val-data", "empty.npy"), "empty.npy: empty file; expected the data"),
    ],
)
def test_refusals(sweep, here: Path, argv: tuple[str, ...], words: str) -> None:
    (here / "empty.npy").touch()
    _, err = sweep(*argv, status=2)
    assert words in err
    assert not [p for p in here.iterdir() if p.is_dir()], "nothing was begun"


def test_many_runs_are_made_on_demand(sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_sweep, "MANY_RUNS", 2)
    argv = ("debug", "--seeds", 3, *DATA)
    assert "found 3 runs; expected at most 2, or --yes" in sweep(*argv, status=2)[1]
    assert "seed=3" in sweep(*argv, "--yes")[0]


def test_missing_programs_and_packages_are_one_line(sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setenv("PATH", "/nowhere")
        _, err = sweep("tinystories-lr", "--detach", "x", *DATA, status=2)
        assert "tmux is not installed" in err and "apt install tmux" in err
    find = cli_sweep.importlib.util.find_spec
    monkeypatch.setattr(cli_sweep.importlib.util, "find_spec", lambda n: None if n == "tensorboard" else find(n))
    _, err = sweep("tinystories-lr", *DATA, status=2)
    assert 'pip install "bytekiln[track]", or --no-tensorboard' in err
    monkeypatch.setitem(sys.modules, "ray", None)
    _, err = sweep("tinystories-lr", *DATA, "--no-tensorboard", "--ray", status=2)
    assert not Path("tinystories-lr").exists()
    assert 'pip install "bytekiln[ray]"' in err


def test_a_sweep_of_ones_own_by_the_name_of_a_preset_gets_none_of_its_files(sweep, here: Path) -> None:
    """What follows is decided by where a sweep was loaded from, which its folder remembers."""
    base = "[base]\nd_model = 16\nnum_heads = 2\ntrain_data = 'train.npy'\nval_data = 'val.npy'\n"
    (here / "mine.toml").write_text(f'name = "lr-search-quick"\nshipped = "lr-search-quick"\naxes.lr = [1e-3]\n{base}')
    sweep("mine.toml", "--folder", "mine")
    sweep("mine")  # by its folder
    assert (here / "mine/lr_sweep_results.json").exists() and not (here / "mine/lr_recommendation.json").exists()
    sweep("lr-search-quick", *DATA, "--no-tensorboard", "--folder", "theirs")
    told = here / "theirs/lr_recommendation.json"
    assert told.exists()
    told.unlink()
    sweep("theirs")
    assert told.exists()


class Cluster:
    """Ray, as far as a sweep asks for it; its tasks are done at once."""

    def __init__(self, *cpus: int, gpus: int = 0) -> None:
        self.cpus, self.gpus = cpus, gpus
        self.asked: list[float] = []

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(sum(self.cpus)), "GPU": float(self.gpus)}

    def nodes(self) -> list[dict[str, object]]:
        alive = [{"Alive": True, "Resources": {"CPU": float(n)}} for n in self.cpus]
        return [*alive, {"Alive": False, "Resources": {"CPU": 512.0}}]

    def remote(self, num_cpus: float, **_: object) -> Callable[[object], object]:
        self.asked.append(num_cpus)
        return lambda task: SimpleNamespace(remote=lambda folder, threads: write_result(Path(folder)) or 0)

    def wait(self, tasks: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return tasks, []

    def get(self, task: int) -> int:
        return task


@pytest.mark.parametrize(
    ("cluster", "jobs", "stated", "asked", "at_once"),
    [
        (Cluster(4, 4), 1, "", 4, 1),  # not this machine's cores: what the largest of theirs has
        (Cluster(4, 4), 2, "", 4, 2),
        (Cluster(4, 4), 3, "", 2, 3),  # with more threads the third would wait for room
        (Cluster(4, 4), None, "", 1, 8),
        (Cluster(4, 4), 1, "2", 2, 1),  # OMP_NUM_THREADS goes before
        (Cluster(4, 4), None, "2", 2, 4),
        (Cluster(16, gpus=4), None, "", 4, 4),
        (Cluster(2), 16, "", 1, 16),
    ],
)
def test_a_ray_task_asks_for_the_threads_of_its_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path,
    cluster: Cluster, jobs: int | None, stated: str, asked: int, at_once: int,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.setattr("bytekiln.sweep.coordinate.cores", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    argv = [
        "tinystories-lr",
        *DATA,
        "--no-tensorboard",
        "--lrs",
        "3e-4",
        "--ray",
        *(["--jobs", str(jobs)] * bool(jobs)),
    ]
    assert cli_sweep.sweep(argv) == 0
    assert cluster.asked[-1] == asked and f"{at_once} at once" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "status", "follows"), [(0, 0, True), (3, 0, True), (1, 1, False)])
def test_then_follows_unless_every_run_failed(sweep, here: Path, code: int, status: int, follows: bool) -> None:
    codes = dict.fromkeys(("lr=3e-4", "lr=4e-4"), code)
    argv = ("tinystories-lr", *DATA, "--no-tensorboard", "--lrs", "3e-4 4e-4")
    _, err = sweep(*argv, "--then", "echo done > then.txt", status=status, begins=Start(codes))
    assert (here / "then.txt").exists() == follows
    if not follows:
        assert "not run, since every run failed" in err


def test_some_failed_is_four_and_nothing_follows_by_itself(sweep, here: Path) -> None:
    argv = ("tinystories-lr", *DATA, "--no-tensorboard", "--lrs", "3e-4 4e-4")
    out, _ = sweep(*argv, status=4, begins=Start({"lr=3e-4": 2}))
    assert "lr=3e-4: oh dear" in out
    sweep(*argv, "--retry", "failed")


# --- whole commands ---------------------------------------------------------------------------------------------


def lm(here: Path, *argv: object, status: int = 0) -> str:
    """A command in a process of its own; its output."""
    run = subprocess.run(
        [sys.executable, "-m", "bytekiln.cli", *map(str, argv)],
        capture_output=True, text=True, cwd=here, timeout=280, env={**os.environ, **ONE_THREAD, "NO_COLOR": "1"},
    )  # fmt: skip
    assert run.returncode == status, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_seed_000_from_the_baseline_to_the_resume(here: Path) -> None:
    """Rename what exists, sweep, look at the results, resume one rate by hand: the document's order."""
    data = [*DATA, *(f for f in FLAGS if not f.startswith(("--precision", "--vocab_size")))]  # as `auto` settles it
    adopt = ("lm-sweep", "adopt", "checkpoints/tinystories", "--as")
    lm(here, "lm-train", "tinystories", *data, "--checkpoint-dir", "checkpoints/tinystories", "--tensorboard",
       "--tensorboard-dir", "runs/tinystories/tinystories-4L-512d", "--out-dir", "runs/tinystories")  # fmt: skip
    rows = (here / "runs/tinystories/metrics.csv").read_text()
    said = lm(here, *adopt, "lr=8e-4", status=2)
    assert "lr: found 6e-4 in the run's config; expected 8e-4" in said
    said = lm(here, *adopt, "lr=6e-4", status=2)  # nor is it the preset's model: the way out is said
    flags = said[said.index("--set") : said.index(", if the sweep")].split()
    assert "context_length: found 8 in the run's config; expected " in said and "d_model=16" in flags
    lm(here, *adopt, "lr=6e-4", *flags)
    assert not (here / "checkpoints/tinystories").exists()
    assert (here / "checkpoints/tinystories_lr6e-4/checkpoint_final").is_dir()
    assert [p.name for p in (here / "runs/tinystories").iterdir()] == ["tinystories-4L-512d_lr6e-4"]
    assert (here / "tinystories-lr/runs/lr=6e-4/metrics.csv").read_text() == rows
    said = lm(here, "lm-sweep", "tinystories-lr", *data, "--lrs", "6e-4 8e-4")
    assert "lr=6e-4: begins" not in said and "lr=8e-4: completed" in said
    entries = json.loads((here / "tinystories-lr/lr_sweep_results.json").read_text())
    for entry, lr in zip(entries, ("6e-4", "8e-4"), strict=True):
        wanted = {
            "lr": float(lr), "lr_str": lr, "min_lr": float(lr) / 10, "status": "completed", "exit_status": 0,
            "checkpoint_dir": f"checkpoints/tinystories_lr{lr}",
            "final_checkpoint": f"checkpoints/tinystories_lr{lr}/checkpoint_final",
            "tensorboard_dir": f"runs/tinystories/tinystories-4L-512d_lr{lr}",
        }  # fmt: skip
        assert {k: pytest.approx(v) if k == "min_lr" else v for k, v in wanted.items()} == {k: entry[k] for k in wanted}
        assert entry["best_step"] == 6 and entry["final_val_loss"] > 0 and entry["elapsed_time"] > 0
        assert list((here / entry["tensorboard_dir"]).glob("events.out.tfevents.*"))
    config = here / "configs/train_tinystories.json"
    config.parent.mkdir()
    stated = {k: v for k, v in TINY.items() if k not in ("lr", "vocab_size", "precision")}
    config.write_text(json.dumps(stated | {"train_data": "train.npy"}))
    said = lm(here, "lm-train", "--config", "configs/train_tinystories.json", "--max-lr", "8e-4", "--min-lr", "8e-5",
              "--tensorboard", "--resume", "checkpoints/tinystories_lr8e-4/checkpoint_4.pt")  # fmt: skip
    assert "Resuming from step 4" in said and "completed" in said


def test_adopting_needs_no_result_and_goes_on_after_a_kill(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bytekiln.sweep import adopt as module
    from bytekiln.sweep import move
    from bytekiln.sweep.spec import changed, load_spec, trials_of
    from bytekiln.train import train
    from lm_runs import tiny

    config = tiny(here, checkpoint_dir=str(here / "checkpoints/tinystories"), out_dir=str(here / "r"), lr=6e-4)
    train(config)
    (here / "r/result.json").unlink()
    preset = next(t.config for t in trials_of(load_spec("tinystories-lr")) if t.name == "lr=6e-4")
    differ = {f: was for f, was, _ in changed_mathematics(config, preset, FIELDS) if f not in ("preset", "min_lr")}
    as_begun = functools.partial(changed, given={**differ, "max_steps": 6})
    with monkeypatch.context() as m:
        m.setattr(move, "_remove_old", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            module.adopt(Path("checkpoints/tinystories"), {"lr": 6e-4}, changes=as_begun)
    assert (here / "checkpoints/tinystories/checkpoint_final").is_dir(), "what was there goes last"
    entry, path = module.adopt(Path("checkpoints/tinystories"), {"lr": 6e-4}, changes=as_begun)
    assert entry.status == "completed" and entry.best_step == 6 and read_results(path) == [entry]
    assert not (here / "checkpoints/tinystories").exists() and not (here / "r").exists()
    again = train(config.with_(out_dir=str(here / "tinystories-lr/runs/lr=6e-4"), max_steps=8,
                               checkpoint_dir=entry.checkpoint_dir), resume="auto", given={"max_steps": 8})  # fmt: skip
    assert again.status == "completed" and again.steps == 8, "its checkpoints are whole and know their new place"


@pytest.fixture
def tmux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A tmux server of its own."""
    program = shutil.which("tmux")
    if program is None:
        pytest.skip("tmux is not installed")
    monkeypatch.setenv("TMUX_TMPDIR", str(tmp_path))
    monkeypatch.delenv("TMUX", raising=False)
    yield program
    subprocess.run([program, "kill-server"], capture_output=True, check=False)


def test_detached_in_a_session(sweep, here: Path, tmux: str) -> None:
    argv = ("tinystories-lr", *DATA, "--no-tensorboard", "--lrs", "3e-4")
    sweep(*argv)  # trivially done, so that the session only looks back
    out, _ = sweep(*argv, "--detach", "lr_sweep", "--then", "echo $TMUX > then.txt; sleep 60")
    assert "tmux attach -t lr_sweep" in out
    _, err = sweep(*argv, "--detach", "lr_sweep", status=2)
    assert "found a tmux session lr_sweep" in err and "tmux attach -t lr_sweep" in err
    until = time.monotonic() + 60
    while not (here / "then.txt").exists():
        assert time.monotonic() < until, subprocess.run([tmux, "capture-pane", "-p", "-t", "lr_sweep"],
                                                        capture_output=True, text=True).stdout  # fmt: skip
        time.sleep(0.1)
    assert "tmux" in (here / "then.txt").read_text()


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(tmp_path: Path) -> None:
    """Six sweeps and six runs, killed with SIGKILL: the results file of the whole sweep, weights bit for bit."""
    run = subprocess.run(
        [sys.executable, str(HERE / "sweep_kills.py"), str(tmp_path), "7", "12"],
        capture_output=True, text=True, timeout=1500, env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)["results"]
    assert {r["killed"] for r in told} == {"sweep", "run"}
    for r in told:
        assert r["ends"][-1] == 0 and not r["left"] and not r["different"], told


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_goes_on_bit_for_bit(tmp_path: Path, number: signal.Signals) -> None:
    spec = make(tmp_path)
    assert start(spec, tmp_path / "whole").wait(280) == 0
    sweep = start(spec, tmp_path / "stopped")
    checkpoints = tmp_path / "stopped/runs"
    until = time.monotonic() + 200
    while not list(checkpoints.glob("*/checkpoints/checkpoint_5")):
        assert time.monotonic() < until
        time.sleep(0.01)
    sweep.send_signal(number)
    assert sweep.wait(200) == 128 + number
    assert "interrupted" in {r.status for r in read_results(tmp_path / "stopped/results.json")}
    assert start(spec, tmp_path / "stopped").wait(280) == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    assert re.search(r"goes on", (tmp_path / "stopped.said").read_text())


def _wait_for(what: Callable[[], bool], seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.1)


@pytest.mark.slow
def test_on_a_local_ray_cluster(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", functools.partial(  # a cluster of our own in the place of one that is there
        lambda begin, address, **how: begin(num_cpus=2, include_dashboard=False, _temp_dir="/tmp/bytekiln-ray", **how),
        ray.init,
    ))  # fmt: skip
    try:
        from bytekiln.sweep.ray import RayStart
        from bytekiln.sweep.spec import changed, load_spec, trials_of

        base = {k: v for k, v in TINY.items() if k != "lr"} | {"train_data": "train.npy", "tensorboard": False}
        spec = changed(load_spec("tinystories-lr"), lrs=[1e-3, 1e9], given=base)
        begin = RayStart()
        assert signal.getsignal(signal.SIGTERM) is before
        assert begin.jobs(1) == 2 and (begin.threads(1), begin.threads(2)) == (stated_threads() or 2, 1)
        results = run_sweep(trials_of(spec), here / "s", jobs=2, start=begin, threads=begin.threads(2))
        endless = changed(load_spec("tinystories-lr"), lrs=[2e-3], given={**base, "max_steps": 1_000_000})
        store_trials(here / "e", trials_of(endless), "results.json")
        place = run_folder(here / "e", trials_of(endless)[0].name)
        run = begin(place, 1)
        _wait_for(lambda: any(Path(endless.output.checkpoint_dir.format(lr="2e-3")).glob("checkpoint_*")))
        run.send(signal.SIGINT)  # which Ray blocks in all that it starts
        _wait_for(lambda: run.poll() is not None)
        assert run.poll() == 130
    finally:
        ray.shutdown()
    assert [r.status for r in results] == ["completed", "diverged"]
