"""How far a run is: a schedule in seconds never runs backwards, and ends inside the limit."""

from __future__ import annotations

import pytest

from bytekiln import horizon as horizon_module
from bytekiln.config import UNLIMITED_STEPS, RunConfig
from bytekiln.horizon import SAVES_AT_THE_END, Horizon
from bytekiln.ranks import Ranks
from bytekiln.run_state import State
from bytekiln.schedule import fraction, learning_rate

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


def test_the_clock_goes_on_after_a_resume(clock: list[float]) -> None:
    clock[0] = 5000.0
    horizon = Horizon(CONFIG, Ranks(), 4000.0)
    horizon.resume(State(step=7, windows=70, tokens=700, elapsed_s=60.0))
    clock[0] += 3.0
    assert horizon.elapsed_s() == pytest.approx(63.0)
    assert (horizon.step, horizon.windows, horizon.tokens) == (7, 70, 700)
    assert horizon.place(State()).seconds == pytest.approx(63.0)
    assert not horizon.is_late()
    clock[0] += 40.0
    assert horizon.is_late()
