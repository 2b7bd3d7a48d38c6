"""How far a run is: a schedule in seconds never runs backwards, and ends inside the limit."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from bytekiln import cli_lm, record
from bytekiln import horizon as horizon_module
from bytekiln.batch import Batch
from bytekiln.config import UNLIMITED_STEPS, RunConfig
from bytekiln.evaluate import Scores
from bytekiln.horizon import SAVES_AT_THE_END, Horizon
from bytekiln.learner import Gradients, Learner
from bytekiln.metrics import read_metrics
from bytekiln.prefetch import Prefetcher
from bytekiln.ranks import Ranks
from bytekiln.run_state import State
from bytekiln.schedule import fraction, learning_rate
from lm_runs import tiny

CONFIG = RunConfig().with_(max_time=100.0, max_steps=UNLIMITED_STEPS, lr=1.0, min_lr=0.1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(horizon_module.time, "perf_counter", lambda: now[0])
    return now


def test_the_schedule_never_runs_backwards(clock: list[float]) -> None:
    """Evaluations of 20 s, then of 2: the limit rises from below 80 s to nearly 100, the rate does not."""
    horizon, state = Horizon(CONFIG, Ranks(), 0.0), State(evaluation_s=20.0, saving_s=0.5)
    rates, shares = [], []
    while horizon.over is None:
        clock[0] += 1.0
        if clock[0] == 50:
            state.evaluation_s = 2.0
        place = horizon.place(state)
        rates.append(learning_rate(place, CONFIG))
        shares.append(fraction(place, CONFIG))
        horizon.launched(1, 1)
        horizon.took(1.0)
        horizon.look_ahead(state)
    assert rates == sorted(rates, reverse=True)
    assert shares == sorted(shares)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert 90 < clock[0] < 100 - 1.1 * (2.0 + SAVES_AT_THE_END * 0.5)
    assert "100 s are over" in horizon.over[1]


@pytest.mark.parametrize(("spent_s", "before"), [(0.0, 60.0), (66.0, 66.0)])
def test_the_clock_goes_on_after_a_resume(clock: list[float], spent_s: float, before: float) -> None:
    """Ten seconds went to this process's start; rows behind the checkpoint tell of six more of the killed one's."""
    clock[0] = 5000.0
    horizon = Horizon(CONFIG, Ranks(), 4990.0)
    horizon.resume(State(step=7, windows=70, tokens=700, elapsed_s=60.0), spent_s)
    clock[0] += 3.0
    assert horizon.elapsed_s() == pytest.approx(before + 13.0)
    assert (horizon.step, horizon.windows, horizon.tokens) == (7, 70, 700)
    assert horizon.place(State()).seconds == pytest.approx(before + 13.0)
    assert not horizon.is_late()
    clock[0] += 40.0
    assert horizon.is_late()


def test_an_interrupted_run_ends_its_decay_inside_the_limit(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second, an evaluation four, a checkpoint 0.4 s; SIGTERM in the middle of a step, and a long night.

    What is lost is the abandoned half of a step and the checkpoint behind it; the rate ends where it ends unbroken.
    """
    gradients, evaluate, save = Learner.gradients, Learner.evaluate, record.save_checkpoint
    stops: list[int] = []

    def slow_step(self: Learner, batches: Prefetcher, step: int, first: int, micro_steps: int) -> Gradients:
        clock[0] += 0.5
        if step in stops:
            stops.remove(step)
            signal.raise_signal(signal.SIGTERM)
        clock[0] += 0.5
        return gradients(self, batches, step, first, micro_steps)

    def slow_evaluation(self: Learner, batches: Iterable[Batch]) -> Scores:
        clock[0] += 2.0  # of validation data, and again of training data
        return evaluate(self, batches)

    def slow_save(*args: Any) -> None:
        clock[0] += 0.4
        save(*args)

    monkeypatch.setattr(Learner, "gradients", slow_step)
    monkeypatch.setattr(Learner, "evaluate", slow_evaluation)
    monkeypatch.setattr(record, "save_checkpoint", slow_save)
    limits = {"max_time": 100, "max_steps": UNLIMITED_STEPS, "eval_interval": 20, "checkpoint_interval": 25}
    (tmp_path / "c.toml").write_text(tiny(tmp_path, **limits).to_toml(), "utf-8")

    def run(*argv: str) -> tuple[int, float]:
        began = clock[0]
        return cli_lm.train(list(argv)), clock[0] - began

    status, unbroken_s = run(str(tmp_path / "c.toml"), "--out-dir", str(tmp_path / "unbroken"))
    assert status == 0 and 90 < unbroken_s <= 100
    stops.append(37)
    status, first_s = run(str(tmp_path / "c.toml"))
    assert status == 128 + signal.SIGTERM and 37 < first_s < 60
    clock[0] += 30_000
    status, second_s = run(str(tmp_path / "c.toml"), "--resume", "auto")
    assert status == 0
    assert 90 < first_s + second_s <= 100
    broken, unbroken = (read_metrics(tmp_path / name / "metrics.csv") for name in ("run", "unbroken"))
    assert [r.step for r in broken] == list(range(len(broken)))
    assert len(unbroken) - 2 <= len(broken) <= len(unbroken)
    assert broken[-1].elapsed_s <= 100 and broken[-1].val_loss is not None
    rates = [r.lr for r in broken if r.lr is not None]
    assert rates[2:] == sorted(rates[2:], reverse=True), "behind the warm-up it never rises, nor at the resume"
    assert rates[-1] == pytest.approx(1e-3, rel=0.01), "the floor, a tenth"
