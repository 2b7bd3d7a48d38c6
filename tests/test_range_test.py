"""The range test on planted losses, and on a real model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest

from bytekiln.errors import ConfigError, FormatError
from bytekiln.search.range_test import (
    SMOOTHING,
    TOO_HIGH,
    draw_range_test,
    judge,
    measure,
    rates,
    read_range_test,
    run_range_test,
    write_range_test,
)
from lm_runs import tiny


def model(falls_at: float, diverges_at: float):  # type: ignore[no-untyped-def]
    """A loss that falls from 4 to 3 round `falls_at` (in a decade) and runs away from `diverges_at` on."""

    def loss(lr: float) -> float:
        share = 1 / (1 + math.exp(-6 * (math.log10(lr) - math.log10(falls_at))))
        return 4.0 - share + 40 * max(math.log10(lr / diverges_at), 0.0) ** 2

    return loss


def test_rates_rise_exponentially() -> None:
    found = rates(1e-5, 1e-1, 41)
    assert found[0] == 1e-5 and found[-1] == pytest.approx(1e-1)
    steps = [math.log(b / a) for a, b in itertools.pairwise(found)]
    assert max(steps) == pytest.approx(min(steps))
    with pytest.raises(ConfigError, match=r"range: found 0\.1 to 0\.01"):
        rates(0.1, 0.01, 40)
    with pytest.raises(ConfigError, match="range_steps: found 3"):
        rates(1e-5, 1, 3)


def test_the_mean_is_corrected_for_its_beginning() -> None:
    rows = run_range_test(lambda _: 3.0, rates(1e-5, 1, 20))
    assert [r.smoothed for r in rows] == pytest.approx([3.0] * 20)
    values = iter([4.0, 2.0, *[3.0] * 18])
    rows = run_range_test(lambda _: next(values), rates(1e-5, 1, 20))
    a = SMOOTHING
    assert rows[1].smoothed == pytest.approx((a * (1 - a) * 4 + (1 - a) * 2) / (1 - a * a))


def test_it_stops_where_the_smoothed_loss_has_run_away() -> None:
    rows = run_range_test(model(1e-3, 1e-1), rates(1e-5, 10, 120))
    least = min(r.smoothed for r in rows[:-1] if r.smoothed)
    assert rows[-1].smoothed is not None and rows[-1].smoothed > TOO_HIGH * least
    assert all(r.smoothed is not None and r.smoothed <= TOO_HIGH * least for r in rows[:-1])
    assert len(rows) < 120


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_it_stops_at_a_loss_that_is_not_finite(bad: float) -> None:
    rows = run_range_test(lambda lr: bad if lr > 0.1 else model(1e-3, 1e2)(lr), rates(1e-5, 10, 60))
    assert rows[-1].loss is None and rows[-1].smoothed is None and rows[-1].lr > 0.1
    found = judge(rows)
    assert found.diverged_at == rows[-1].lr


@pytest.mark.parametrize("falls_at", [1e-4, 1e-3, 1e-2])
def test_the_suggestion_lies_between_the_steepest_place_and_a_tenth_of_the_end(falls_at: float) -> None:
    found = judge(run_range_test(model(falls_at, 1.0), rates(1e-6, 10, 140)))
    assert found.diverged_at is not None and 1.0 < found.diverged_at < 5.0
    assert found.steepest == pytest.approx(falls_at, rel=0.4)
    assert found.suggestion == pytest.approx(math.sqrt(found.steepest * found.diverged_at / 10))
    assert found.steepest < found.suggestion < found.diverged_at / 10
    assert "geometric mean" in found.why and "runs away at" in found.why


def test_a_bump_and_the_way_back_is_no_fall() -> None:
    def loss(lr: float) -> float:
        return model(1e-3, 1.0)(lr) + (3.0 if 0.05 < lr < 0.12 else 0.0)

    found = judge(run_range_test(loss, rates(1e-6, 10, 200)))
    assert found.steepest == pytest.approx(1e-3, rel=0.5)


def test_a_loss_that_never_runs_away_says_so() -> None:
    found = judge(run_range_test(model(1e-3, 1e9), rates(1e-5, 1.0, 60)))
    assert found.diverged_at is None and "never runs away up to 1" in found.why


def test_a_loss_that_runs_away_at_once_is_refused() -> None:
    losses = iter([3.0, 3.0, 9.0, 20.0, 40.0])
    with pytest.raises(ConfigError, match=r"ran away at .* expected a lower range"):
        judge(run_range_test(lambda _: next(losses), rates(1.0, 100, 20)))


def test_the_files_hold_the_test_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    found = judge(run_range_test(model(1e-3, 0.1), rates(1e-5, 10, 80)))
    folder = tmp_path / "range_test"
    assert read_range_test(folder) is None
    write_range_test(found, folder)
    assert read_range_test(folder) == found
    assert (folder / "range_test.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "range_test.csv").read_text().startswith("step,lr,loss,smoothed\n1,1e-05,")
    (folder / "range_test.csv").write_text("step,lr\n1,2\n")
    with pytest.raises(FormatError, match=r"range_test\.csv: columns step,lr; expected the rows"):
        read_range_test(folder)


def test_a_picture_of_a_test_that_ended_at_nan(tmp_path: Path) -> None:
    rows = run_range_test(lambda lr: math.nan if lr > 0.1 else model(1e-3, 1e2)(lr), rates(1e-5, 10, 60))
    draw_range_test(judge(rows), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_on_a_real_model_it_is_the_runs_own_steps(tmp_path: Path) -> None:
    config = tiny(tmp_path, averaging="ema")
    seen: list[int] = []
    one = measure(config, low=1e-4, high=1e3, steps=40, each=seen.append)
    assert seen == [r.step for r in one.rows] and one.rows[0].lr == 1e-4
    assert one == measure(config, low=1e-4, high=1e3, steps=40), "the same seed, the same test"
    assert one.rows[0].loss == pytest.approx(math.log(61), rel=0.2)
    assert 1e-4 < one.steepest < one.suggestion < 1e3
    other = measure(config.with_(seed=7), low=1e-4, high=1e3, steps=40)
    assert other.rows[0].loss != one.rows[0].loss


def test_a_bare_run_takes_the_steps_of_a_training_run(tmp_path: Path) -> None:
    from bytekiln.metrics import read_metrics
    from bytekiln.search.bare_run import BareRun
    from bytekiln.train import train

    config = tiny(tmp_path, dropout=0.1, batch_stages="0.5:2", schedule="cosine", grad_accum_steps=2)
    train(config)
    rows = read_metrics(config.output.metrics)
    with BareRun(config) as run:
        losses = [run.take_step() for _ in range(config.training.max_steps)]
        assert losses == [r.loss for r in rows[1:]]
        assert run.val_loss() == rows[-1].val_loss
    with pytest.raises(ConfigError, match="schedule in seconds"), BareRun(config.with_(max_time=60)) as run:
        run.take_step()


def test_summary_is_plain(tmp_path: Path) -> None:
    found = judge(run_range_test(model(1e-3, 0.1), rates(1e-5, 10, 80)))
    told = found.summary
    assert told["steps"] == len(found.rows) and "rows" not in told
    assert {f.name for f in dataclasses.fields(found)} - {"rows"} <= set(told)
