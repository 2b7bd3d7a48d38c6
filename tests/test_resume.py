"""A run that is killed anywhere ends where the unbroken one ends, bit for bit; and what a resume refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bytekiln.checkpoint import load_checkpoint, save_checkpoint
from bytekiln.config import UNLIMITED_STEPS, from_flat, load_config
from bytekiln.errors import FileError, MismatchError, OutputExistsError
from bytekiln.metrics import read_metrics
from bytekiln.train import train
from lm_runs import ONE_THREAD, TIMES, tiny, tokens

MOMENTS = 20


def rows(run: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in vars(r).items() if k not in TIMES} for r in read_metrics(run / "metrics.csv")]


def weights(run: Path) -> bytes:
    return (run / "checkpoints/checkpoint_final/model.safetensors").read_bytes()


@pytest.mark.slow
def test_bit_identical_after_kill_at_twenty_moments(tmp_path: Path) -> None:
    driver = Path(__file__).with_name("kill_driver.py")
    ran = subprocess.run(
        [sys.executable, driver, tmp_path, "17", str(MOMENTS)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **ONE_THREAD},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout)
    assert told["kinds"] == ["evaluate", "fsync", "micro", "rename", "rmtree", "row"]
    results = told["results"]
    assert len(results) == MOMENTS
    for result in results:
        assert result["killed"] == -signal.SIGKILL, result
        assert result["again"] in (-signal.SIGKILL, 0), result
        assert result["ended"] == 0, result
        assert result["different"] == [], result
    assert set(Counter(r["kind"] for r in results)) == set(told["kinds"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(tiny(folder, dropout=0.2))
    return folder


def test_raised_max_steps_goes_on(tmp_path: Path, whole: Path) -> None:
    fixed = {"dropout": 0.2, "decay_steps": 6}
    train(tiny(tmp_path, **fixed, max_steps=3))
    said: list[str] = []
    result = train(tiny(tmp_path, **fixed), resume="auto", given={"max_steps": 6}, notice=said.append)
    assert (result.status, result.steps) == ("completed", 6)
    assert said == []
    assert weights(tmp_path / "run") == weights(whole / "run")


def test_counters_and_clocks_go_on(tmp_path: Path) -> None:
    """A checkpoint with numbers of which no trace is left unless they are taken over."""
    train(tiny(tmp_path, max_steps=2))
    for path in (tmp_path / "run/checkpoints").iterdir():
        saved = load_checkpoint(path)
        counted = {"elapsed_s": 1000.0, "training_s": 500.0, "best_val_loss": 0.001, "best_step": 2, "tokens": 100_000}
        save_checkpoint(path, dataclasses.replace(saved, state={**saved.state, **counted}))
    best = (tmp_path / "run/checkpoints/checkpoint_best/model.safetensors").read_bytes()
    result = train(tiny(tmp_path), resume="auto", given={"max_steps": 4})
    assert (result.status, result.best_val_loss, result.best_step) == ("completed", 0.001, 2)
    assert (tmp_path / "run/checkpoints/checkpoint_best/model.safetensors").read_bytes() == best
    assert result.wall_time_s > 1000
    assert result.tokens == 100_000 + 2 * 3 * 8
    assert result.tokens_per_s == pytest.approx(result.tokens / 500, rel=0.05)
    assert all(r.elapsed_s > 1000 for r in read_metrics(tmp_path / "run/metrics.csv")[3:])


def test_high_losses_are_counted_across_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytekiln.loop.HIGH_FACTOR", 0.0)
    assert train(tiny(tmp_path, max_steps=2)).status == "completed"
    result = train(tiny(tmp_path), resume="auto", given={"max_steps": 6})
    assert (result.status, result.steps) == ("diverged", 3), "two before the resume and one behind it"


def test_rising_end_moves_an_open_decay_and_says_so(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=2))
    said: list[str] = []
    train(tiny(tmp_path, max_steps=4), resume="auto", given={"max_steps": 4}, notice=said.append)
    assert said == ["max_steps rises from 2 to 4; the decay now ends there too"]


def test_complete_run_stays_as_it_is(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    said: list[str] = []
    assert train(tiny(tmp_path), resume="auto", notice=said.append).status == "completed"
    assert "complete at step 6" in said[0]
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_existing_run_is_refused_with_the_three_ways(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    before = (tmp_path / "run/metrics.csv").read_bytes()
    with pytest.raises(OutputExistsError, match=r"--resume auto.*--overwrite.*--out-dir"):
        train(tiny(tmp_path))
    assert (tmp_path / "run/metrics.csv").read_bytes() == before
    assert train(tiny(tmp_path, max_steps=2), overwrite=True).steps == 2
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 0.5}, "lr: found 0.5; expected 0.01"),
        ({"n_layer": 3}, "num_layers: found 3; expected 2"),
        ({"batch_size": 4}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"dropout": 0.3}, "dropout"),
    ],
)
def test_changed_mathematics_is_refused_by_name(whole: Path, given: dict[str, object], words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        train(tiny(whole), resume="auto", given={**given, "max_steps": 8})


@pytest.mark.parametrize(
    "given",
    [
        {"dropout": "0"},
        {"qk_norm": False},
        {"token_corruption": 0},
        {"logit_softcap": 0.0},
        {"skip_spikes": "false"},
        {"batch_stages": ""},
        {"warmup_steps": 0},
        {"loss_chunk": "auto"},
    ],
    ids=str,
)
def test_switching_off_is_a_change_too(tmp_path_factory: pytest.TempPathFactory, given: dict[str, object]) -> None:
    folder = tmp_path_factory.getbasetemp() / "switched-on"
    on = {"dropout": 0.2, "qk_norm": True, "token_corruption": 0.1, "logit_softcap": 15.0, "skip_spikes": True}
    on |= {"batch_stages": "0.5:2", "loss_chunk": 5, "max_steps": 2}
    if not folder.exists():
        train(tiny(folder, **on))
    name = next(iter(given))
    with pytest.raises(MismatchError, match=f"{name}: found .*; expected {on.get(name, 2)}"):
        train(tiny(folder), resume="auto", given={**given, "max_steps": 3})


def test_what_is_left_open_stays_as_the_run_has_chosen(tmp_path: Path) -> None:
    train(tiny(tmp_path, precision="fp16", max_steps=2))
    given = {"dtype": "auto", "vocab_size": 0, "max_steps": 3}
    assert train(tiny(tmp_path), resume="auto", given=given).precision == "fp16"


def test_fields_that_change_nothing_may_change(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=2))
    given = {"max_steps": 3, "lr": 1e-2, "eval_interval": 1, "checkpoint_interval": 1, "precision": "fp32", "d_ff": 0}
    assert train(tiny(tmp_path), resume="auto", given=given).steps == 3


def test_other_data_is_refused(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=2))
    tokens(tmp_path / "train.npy", seed=9)
    with pytest.raises(MismatchError, match=r"train\.npy: found data"):
        train(tiny(tmp_path), resume="auto", given={"max_steps": 4})


def damage(folder: Path, name: str = "model.safetensors") -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def test_auto_falls_back_from_a_damaged_checkpoint(tmp_path: Path, whole: Path) -> None:
    train(tiny(tmp_path, dropout=0.2))
    saved = tmp_path / "run/checkpoints"
    for name in ("checkpoint_final", "checkpoint_6", "checkpoint_best"):
        if (saved / name).exists():
            damage(saved / name)
    said: list[str] = []
    train(tiny(tmp_path), resume="auto", notice=said.append)
    assert any("checkpoint_final/model.safetensors: found other bytes" in s for s in said)
    assert weights(tmp_path / "run") == weights(whole / "run")
    assert rows(tmp_path / "run") == rows(whole / "run")


def test_damaged_path_is_refused_and_damage_everywhere_too(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    saved = tmp_path / "run/checkpoints"
    for folder in saved.iterdir():
        damage(folder)
    with pytest.raises(MismatchError, match=r"checkpoint_4/model.safetensors: found other bytes"):
        train(tiny(tmp_path), resume=saved / "checkpoint_4")
    with pytest.raises(FileError, match="damaged checkpoints only"):
        train(tiny(tmp_path), resume="auto")


def test_path_goes_back_to_that_step(tmp_path: Path, whole: Path) -> None:
    train(tiny(tmp_path, dropout=0.2))
    result = train(from_flat({}), resume=tmp_path / "run/checkpoints/checkpoint_2.pt")
    assert result.steps == 6, "the run folder is found from the checkpoint"
    assert weights(tmp_path / "run") == weights(whole / "run")
    assert rows(tmp_path / "run") == rows(whole / "run")


def test_auto_without_a_checkpoint_starts(tmp_path: Path, whole: Path) -> None:
    said: list[str] = []
    train(tiny(tmp_path, dropout=0.2), resume="auto", notice=said.append)
    assert "no checkpoint to resume from; starting at step 0" in said[0]
    assert rows(tmp_path / "run") == rows(whole / "run")


LONG = {"dropout": 0.1, "max_steps": 100_000, "eval_interval": 50, "checkpoint_interval": 0, "decay_steps": 400}


def command(folder: Path, *flags: str) -> list[str]:
    (folder / "config.toml").write_text(tiny(folder, **LONG).to_toml(), encoding="utf-8")
    return [sys.executable, "-m", "bytekiln.cli", "lm-train", str(folder / "config.toml"), *flags]


HEARS = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
"""Runs a command that may be hung up on, whatever the tests themselves were started by."""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_leaves_a_checkpoint_and_the_run_goes_on(tmp_path: Path, number: int, status: int) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS, *command(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and not (
        (run / "metrics.csv").exists() and (run / "metrics.csv").stat().st_size > 900
    ):
        time.sleep(0.01)
    asked = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert time.monotonic() - asked < 5
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["signal"]) == ("interrupted", int(number))
    step = result["steps"]
    assert load_checkpoint(run / f"checkpoints/checkpoint_{step}").step == step
    assert read_metrics(run / "metrics.csv")[-1].step == step
    train(tiny(tmp_path, **LONG), resume="auto", given={"max_steps": step + 3})
    train(tiny(tmp_path, **{**LONG, "max_steps": step + 3}, out_dir=str(tmp_path / "other")))
    assert [r["loss"] for r in rows(run)] == [r["loss"] for r in rows(tmp_path / "other")]


def test_the_least_rate_may_be_said_as_the_ratio_makes_it(tmp_path: Path) -> None:
    """The guide's line for a resume: --max-lr 8e-4 --min-lr 8e-5 of a run that was started with --max-lr 8e-4 alone."""
    train(tiny(tmp_path / "a", lr=8e-4, max_steps=4))
    train(tiny(tmp_path / "b", lr=8e-4, max_steps=4, checkpoint_interval=2))
    back = tmp_path / "b/run/checkpoints/checkpoint_2"
    train(tiny(tmp_path / "b"), resume=back, given={"max_lr": "8e-4", "min_lr": "8e-5"})
    assert weights(tmp_path / "a/run") == weights(tmp_path / "b/run")
    with pytest.raises(MismatchError, match="min_lr: found 9e-05"):
        train(tiny(tmp_path / "b"), resume="auto", given={"min_lr": 9e-5, "max_steps": 5})


def test_another_validation_begins_the_best_anew(tmp_path: Path) -> None:
    """Losses on other data, or on another number of batches, do not compare."""
    train(tiny(tmp_path, max_steps=4, eval_interval=1, early_stopping_patience=9))
    tokens(tmp_path / "other.npy", 200, seed=5)
    for given in ({"val_data": str(tmp_path / "other.npy")}, {"num_eval_batches": 3}):
        said: list[str] = []
        steps = load_config(tmp_path / "run").training.max_steps + 1
        result = train(tiny(tmp_path), resume="auto", given={**given, "max_steps": steps}, notice=said.append)
        assert any("begin anew" in line and next(iter(given)) in line for line in said), said
        assert result.best_step == steps, "the only evaluation of the new kind"


def test_a_moved_limit_says_where_the_decay_ends(tmp_path: Path) -> None:
    steps = {"max_steps": UNLIMITED_STEPS, "progress": "tokens"}
    train(tiny(tmp_path, token_budget=100, **steps))
    said: list[str] = []
    train(tiny(tmp_path), resume="auto", given={"token_budget": 200}, notice=said.append)
    assert "token_budget changes from 100 to 200; the decay now ends there too" in said


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"optimizer": "muon"}, {"normuon": True}),
        ({"ffn": "moe", "num_experts": 4, "load_balancing": "loss"}, {"load_balancing": "bias"}),
        ({"ffn": "moe", "num_experts": 4, "load_balancing": "bias"}, {"load_balancing": "loss"}),
        ({"sampling": "random"}, {"windows": "packed"}),
    ],
    ids=str,
)
def test_an_allowed_change_goes_on(tmp_path: Path, before: dict[str, object], now: dict[str, object]) -> None:
    tokens(tmp_path / "train.npy", eot=7)
    tokens(tmp_path / "val.npy", 200, seed=1, eot=7)
    train(tiny(tmp_path, **before, max_steps=2))
    given = {**now, "max_steps": 4}
    result = train(tiny(tmp_path), resume="auto", given=given, changes=list(now))
    assert (result.status, result.steps) == ("completed", 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["more", "native"])
def test_bit_identical_after_kill_with_every_part_that_has_a_memory(tmp_path: Path, kind: str) -> None:
    """Muon with NorMuon, experts balanced by a bias, packed documents, a growing batch, a tail of averaged weights; and
    what the Rust core computes, which needs a run without dropout."""
    driver = Path(__file__).with_name("kill_driver.py")
    ran = subprocess.run(
        [sys.executable, driver, tmp_path, "3", "9", kind],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **ONE_THREAD},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads(ran.stdout)["results"]
    assert len(results) == 9
    for result in results:
        assert result["killed"] == -signal.SIGKILL, result
        assert (result["ended"], result["different"]) == (0, []), result
