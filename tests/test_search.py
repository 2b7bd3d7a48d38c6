"""The search on planted losses: what it asks for, what wins, what is given up; its files; its command on real runs."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from bytekiln import cli_search
from bytekiln.checkpoint import load_checkpoint
from bytekiln.config import load_config
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, OutputExistsError
from bytekiln.metrics import read_metrics
from bytekiln.search import picture
from bytekiln.search import runs as search_runs
from bytekiln.search.files import check_same, read_state, recommendation, sentence, state_of, to_json, write_state
from bytekiln.search.picture import draw_search
from bytekiln.search.plan import Plan, Request, Seen, against, rungs_of, untried
from bytekiln.search.stages import Search
from bytekiln.sweep.results import TrialResult, read_results
from bytekiln.train import train
from lm_runs import tiny, tokens

STEPS = 240
Status = Callable[[float, int], str]


class Planted:
    """A runner whose losses are a parabola in ln(rate), reached from above as a run goes on."""

    def __init__(
        self,
        optimum: float = 1e-2,
        *,
        curvature: float = 0.05,
        noise: float = 0.0,
        early: float = 1.0,
        status: Status = lambda lr, seed: "completed",
    ) -> None:
        """`early`: by what the optimum of a run's beginning is greater; `status`: how a run at a rate ends."""
        self.optimum, self.curvature, self.noise, self.early, self.status = optimum, curvature, noise, early, status
        self.rng = np.random.default_rng(5)
        self.noises: dict[tuple[float, int], float] = {}
        self.asked: list[Request] = []
        self.runs: dict[tuple[float, int], Seen] = {}

    def loss(self, lr: float, seed: int, step: int) -> float:
        share = step / STEPS
        optimum = self.optimum * self.early ** (1 - share)
        noise = self.noises.setdefault((lr, seed), self.rng.normal(0, self.noise) if self.noise else 0.0)
        return 2.0 + 0.1 * seed % 0.3 + self.curvature * math.log(lr / optimum) ** 2 + 1.5 * (1 - share) + noise

    def __call__(self, wanted: Sequence[Request]) -> list[Seen]:
        for w in wanted:
            self.asked.append(w)
            end = self.status(w.lr, w.seed)
            steps = [s for s in range(20, STEPS + 1, 20) if s <= w.until]
            if end in ("diverged", "failed"):
                steps = steps[:1]
            curve = tuple((s, self.loss(w.lr, w.seed, s)) for s in steps)
            if end == "completed" and w.until < STEPS:
                end = "interrupted"
            self.runs[w.lr, w.seed] = Seen(
                w.stage, w.lr, w.seed, end, steps[-1], curve, name=f"lr={w.lr:g},seed={w.seed}"
            )
        return [self.runs[w.lr, w.seed] for w in wanted]


def plan(**values: Any) -> Plan:
    return Plan(**{"max_steps": STEPS, "seeds": (1, 2), "rungs": (20, 60), "centre": 1e-2, **values})


def searched(runner: Planted, **values: Any) -> Search:
    return Search(plan(**values), runner).run()


# --- what it finds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimum", [3e-3, 1.3e-2, 4e-2])
def test_the_planted_optimum_is_found_within_a_fifth_of_the_grid(optimum: float) -> None:
    found = searched(Planted(optimum))
    assert found.status == "confirmed" and found.recommended == pytest.approx(optimum, rel=0.01)
    assert found.last_fit is not None and found.last_fit.low <= optimum <= found.last_fit.high
    assert found.confirmed_loss == pytest.approx(found.predicted_loss, abs=1e-6)
    assert [lr < found.recommended for lr, _ in found.neighbours] == [True, False]
    assert found.steps <= found.plan.grid_steps / 5


def test_losses_with_noise_cost_little_regret() -> None:
    rng, regrets = np.random.default_rng(0), []
    for i in range(30):
        runner = Planted(1e-2 * math.exp(rng.uniform(-1.5, 1.5)), noise=0.01)
        runner.rng = np.random.default_rng(i)
        found = searched(runner)
        assert found.recommended is not None
        regrets.append(0.05 * math.log(found.recommended / runner.optimum) ** 2)
        assert found.steps <= found.plan.limit
    assert sum(r <= 0.02 for r in regrets) >= 27, "2 σ in 9 of 10"


@pytest.mark.parametrize(("optimum", "side"), [(2e-4, "lower"), (0.5, "higher")])
def test_an_optimum_beyond_the_grid_widens_it_and_says_so(optimum: float, side: str) -> None:
    found = searched(Planted(optimum))
    assert found.recommended == pytest.approx(optimum, rel=0.05)
    assert found.widened and all((lr < 1e-3) == (side == "lower") for lr in found.widened)
    assert any("widened to" in n for n in found.notes)


def test_widening_ends_and_says_why() -> None:
    found = searched(Planted(10.0), widenings=2)
    assert len(found.widened) == 2 and found.status == "unconfirmed"
    assert any("not widened: it was widened 2 times" in n for n in found.notes)
    found = searched(Planted(10.0), high=0.1)
    assert not found.widened and any("is outside" in n for n in found.notes)
    assert "highest at full length" in " ".join(found.notes)


def test_a_flat_optimum_has_a_wide_interval() -> None:
    found = searched(Planted(curvature=0.0, noise=0.01))
    assert found.last_fit is not None and not found.last_fit.bounded
    assert found.last_fit.high / found.last_fit.low >= 64 and "whole range" in sentence(found)


def test_every_rate_diverges() -> None:
    runner = Planted(status=lambda lr, seed: "diverged")
    found = searched(runner)
    assert found.status == "failed" and found.recommended is None
    assert "no run ended well (11 diverged" in found.notes[-1], "four lower rates were tried"
    about = recommendation(found, [], 60.0)
    assert about["best_learning_rate"] is None and about["best_result"] is None
    assert about["recommendation"].startswith("No learning rate can be recommended: no run ended well")
    assert len(about["not_ranked"]) == 11


def test_rates_that_diverge_or_fail_never_win_whatever_they_have_seen() -> None:
    class Tempting(Planted):
        def loss(self, lr: float, seed: int, step: int) -> float:
            return 0.1 if self.status(lr, seed) != "completed" else super().loss(lr, seed, step)

    for end in ("diverged", "failed"):
        runner = Tempting(1e-2, status=lambda lr, seed, end=end: end if lr >= 3e-2 else "completed")
        found = searched(runner)
        assert found.recommended == pytest.approx(1e-2, rel=0.02) and found.status == "confirmed"
        assert all(r["status"] == end for r in recommendation(found, [], 0.0)["not_ranked"])


def test_the_lower_side_of_ruin_is_searched() -> None:
    found = searched(Planted(2e-4, status=lambda lr, seed: "diverged" if lr > 6e-4 else "completed"), budget=1e9)
    assert found.recommended == pytest.approx(2e-4, rel=0.1)


def test_a_confirmation_that_diverges_leaves_the_best_rate_that_ended_well() -> None:
    grid = {round(1e-2 * 2.0**i, 6) for i in range(-4, 5)}
    runner = Planted(1.4e-2, status=lambda lr, seed: "completed" if round(lr, 6) in grid else "diverged")
    found = searched(runner)
    assert found.status == "unconfirmed" and found.recommended in grid
    assert any("ended as diverged" in n for n in found.notes)


def test_a_neighbour_that_is_clearly_better_is_recommended_instead() -> None:
    class Kinked(Planted):
        def loss(self, lr: float, seed: int, step: int) -> float:
            on_grid = any(abs(math.log(lr / (1e-2 * 2.0**i))) < 0.02 for i in range(-6, 7))
            return super().loss(lr, seed, step) + (0.0 if on_grid else 0.5)

    for optimum, better in ((1.25e-2, 1e-2), (1.6e-2, 2e-2)):  # both neighbours beat it; the better one wins
        found = searched(Kinked(optimum, noise=0.001))
        assert found.status == "unconfirmed" and found.recommended == better
        assert sum("is recommended instead" in n for n in found.notes) == 1


def test_a_neighbour_that_chance_has_lowered_is_not_recommended() -> None:
    instead = 0
    for i in range(100):
        runner = Planted(1e-2 * math.exp(np.random.default_rng(i).uniform(-0.6, 0.6)), noise=0.02)
        runner.rng = np.random.default_rng(1000 + i)
        instead += any("instead" in n for n in searched(runner).notes)
    assert instead <= 5, "at most what a confidence of 95 % leaves"


def test_one_seed_cannot_tell_a_neighbour_from_chance() -> None:
    lower = 0
    for i in range(40):
        runner = Planted(1.2e-2, noise=0.01)
        runner.rng = np.random.default_rng(i)
        found = searched(runner, seeds=(1,))
        assert found.fit is not None and found.fit.sigma is None
        assert found.recommended == pytest.approx(found.fit.lr, rel=0.06), "the fit's rate stays"
        said = any("one seed cannot tell that from chance" in n for n in found.notes)
        assert said == (found.status == "unconfirmed")
        lower += said
    assert 5 <= lower <= 35


def test_an_early_order_that_turns_brings_a_rate_back() -> None:
    found = searched(Planted(1e-3, early=60.0), budget=1e9)
    assert found.recommended == pytest.approx(1e-3, rel=0.1)
    assert any("goes on after all" in n for n in found.notes)
    assert all(not r.given_up for r in found.runs.values() if r.status == "completed")


# --- seeds that are lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["diverged", "failed"])
@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_a_rate_that_one_seed_has_lost_is_not_recommended(end: str, budget: float) -> None:
    runner = Planted(6e-3, noise=0.002, status=lambda lr, seed: end if lr >= 4e-3 and seed == 2 else "completed")
    found = searched(runner, budget=budget)
    assert found.status == "unconfirmed" and found.recommended == 2.5e-3, "the best rate that stood both seeds"
    assert {p.seed for p in found.full() if p.lr == 2.5e-3} == {1, 2}
    assert found.confirmed_loss == pytest.approx(np.mean([p.loss for p in found.full() if p.lr == 2.5e-3]))
    assert f"5e-3 is not ranked: the run with seed 2 ended as {end}" in found.notes
    assert "5e-3 is not ranked" in sentence(found) and not any("widened to higher rates" in n for n in found.notes)
    about = recommendation(found, [], 0.0)
    assert about["best_learning_rate"] == about["best_result"]["learning_rate"] == 2.5e-3
    assert about["fit"]["best"] == 2.5e-3 and 5e-3 not in about["fit"]["used"]


def test_lower_rates_are_run_to_the_end_where_all_have_lost_a_seed() -> None:
    found = searched(Planted(6e-3, status=lambda lr, seed: "diverged" if lr > 1e-3 and seed == 2 else "completed"))
    assert found.status == "unconfirmed" and found.recommended == 6.25e-4 and found.steps <= found.plan.limit
    assert any("6.25e-4 is run to the end" in n for n in found.notes)


def test_where_no_rate_has_stood_every_seed_none_is_recommended() -> None:
    found = searched(Planted(6e-3, status=lambda lr, seed: "failed" if seed == 2 else "completed"))
    assert (found.status, found.recommended, found.confirmed_loss) == ("unconfirmed", None, None)
    said = "No learning rate can be recommended: no rate ended well with every seed: "
    assert sentence(found).startswith(said) and "5e-3 is not ranked: the run with seed 2 ended" in sentence(found)
    about = recommendation(found, [], 0.0)
    assert about["best_learning_rate"] is None and about["best_result"] is None and about["status"] == "unconfirmed"


def test_a_recommended_rate_that_loses_a_repeat_gives_way() -> None:
    grid = {round(1e-2 * 2.0**i, 6) for i in range(-4, 5)}
    runner = Planted(1.3e-2, status=lambda lr, s: "diverged" if s == 2 and round(lr, 6) not in grid else "completed")
    found = searched(runner, budget=1e9)
    assert found.status == "unconfirmed" and found.recommended in grid
    assert any("0.013 is not recommended: the run with seed 2 ended as diverged" in n for n in found.notes)
    assert 0.013 not in {lr for lr, _ in found.neighbours}


def test_a_rate_above_one_that_diverged_has_to_stand_the_same_seed() -> None:
    seen = [Seen("coarse", lr, 1, "completed", STEPS, ((STEPS, 2.0),)) for lr in (1e-3, 2e-3, 4e-3)]
    seen.append(Seen("seeds", 2e-3, 2, "diverged", 5))
    assert [against(lr, seen) for lr in (1e-3, 2e-3, 4e-3)] == [
        "", "the run with seed 2 ended as diverged", "seed 2, with which 2e-3 diverged, is not run there",
    ]  # fmt: skip
    assert untried(1e-3, seen) == "1e-3 is not run with seed 2, with which 2e-3 ended as diverged"
    seen.append(Seen("seeds", 4e-3, 2, "completed", STEPS, ((STEPS, 2.0),)))
    assert not against(4e-3, seen) and not untried(1e-3, seen)


def test_notes_that_no_longer_hold_are_dropped() -> None:
    dropped = kept = 0
    for optimum in np.geomspace(5e-3, 2e-2, 8):
        for repeats in range(4):
            said: list[str] = []
            budget = (4.5 + repeats) * STEPS
            found = Search(plan(budget=budget), Planted(float(optimum)), say=said.append).run()
            ended = {(p.lr, p.seed) for p in found.full()}
            for note in found.notes:
                if note.startswith("seed 2 is not run at "):
                    kept += 1
                    rates = note.removeprefix("seed 2 is not run at ").partition(":")[0].split(", ")
                    assert all((float(lr), 2) not in ended for lr in rates)
            dropped += sum(n.startswith("seed 2 is not run at ") and n not in found.notes for n in said)
    assert dropped and kept


# --- what it asks for -------------------------------------------------------------------------------------------


def test_all_rates_share_the_first_seed_and_repeats_have_others() -> None:
    runner = Planted()
    found = searched(runner)
    stages = {stage: {r.seed for r in runner.asked if r.stage == stage} for stage in ("coarse", "seeds", "confirm")}
    assert stages["coarse"] == {1} and stages["seeds"] == {2} and stages["confirm"] <= {1, 2}
    assert len({r.lr for r in runner.asked if r.stage == "coarse" and r.until == 20}) == 7
    repeats = sorted(r.lr for r in runner.asked if r.stage == "seeds")
    assert len(repeats) == 3 and repeats[0] < found.recommended < repeats[-1]  # type: ignore[operator]


def test_rates_are_given_up_with_a_reason_but_never_the_best_ones_neighbours() -> None:
    runner = Planted(6e-3)
    found = searched(runner)
    given_up = {r.lr: r for r in found.runs.values() if r.given_up}
    assert len(given_up) == 4
    for r in given_up.values():
        assert f"step {r.steps}: loss" in r.given_up and "above that of" in r.given_up
        assert r.status == "interrupted" and r.steps in (20, 60)
    full = sorted(r.lr for r in found.runs.values() if r.status == "completed" and r.seed == 1 and r.stage == "coarse")
    assert full == [2.5e-3, 5e-3, 1e-2]


def test_a_run_is_asked_for_again_only_to_go_on() -> None:
    runner = Planted()
    searched(runner)
    seen: dict[tuple[float, int], int] = {}
    for w in runner.asked:
        assert w.until > seen.get((w.lr, w.seed), 0)
        seen[w.lr, w.seed] = w.until


def test_a_search_whose_steps_are_used_up_leaves_out_repeats_and_says_so() -> None:
    found = searched(Planted(), budget=5 * STEPS)
    assert found.steps <= 5 * STEPS and found.recommended == pytest.approx(1e-2, rel=0.05)
    assert any("seed 2 is not run at" in n for n in found.notes)


@pytest.mark.parametrize("rungs", [(20, 60), (), (60,)])
def test_a_search_never_takes_more_steps_than_its_budget(rungs: tuple[int, ...]) -> None:
    least = plan(rungs=rungs, range_steps=30, budget=1e9).least_steps
    for i in range(60):
        rng = np.random.default_rng(i)
        runner = Planted(1e-2 * math.exp(rng.uniform(-7, 7)), noise=float(rng.choice([0.0, 0.02])),
                         early=float(rng.choice([1.0, 30.0])))  # fmt: skip
        budget = least + float(rng.choice([0, 10, 50, 240, 700, 1000, 2000]))
        wanted = plan(rungs=rungs, range_steps=30, budget=budget, seeds=(1, 2, 3)[: i % 3 + 1])
        found = Search(wanted, runner, lambda: {"suggestion": 1e-2, "steps": 30, "why": ""}).run()
        trained = 30 + sum(r.steps for r in runner.runs.values())
        assert found.steps == trained <= budget and found.confirmed_loss is not None


def test_a_budget_below_what_the_plan_needs_is_refused() -> None:
    for wrong in (1, 2, 3, 4, 4.4):
        with pytest.raises(ConfigError, match=r"budget: found [\d.]+ full runs; expected at least 4\.5"):
            plan(budget=wrong * STEPS)
    assert Search(plan(budget=4.5 * STEPS), Planted()).run().confirmed_loss is not None
    with pytest.raises(ConfigError, match=r"budget: found 7\.8 full runs; expected at least 8"):
        plan(rungs=())


def test_a_search_that_is_made_again_decides_as_it_did() -> None:
    class Remembering(Planted):
        """Tells of a run all that it ever saw, as a runner of processes does."""

        def __call__(self, wanted: Sequence[Request]) -> list[Seen]:
            new = [w for w in wanted if (w.lr, w.seed) not in self.runs or self.runs[w.lr, w.seed].steps < w.until]
            super().__call__(new)
            return [self.runs[w.lr, w.seed] for w in wanted]

    for optimum, early in ((1e-3, 60.0), (1e-4, 1.0), (1.3e-2, 1.0), (0.3, 30.0)):
        runner = Remembering(optimum, early=early, noise=0.01)
        first = searched(runner, budget=7 * STEPS)
        asked = len(runner.asked)
        again = searched(runner, budget=7 * STEPS)
        assert len(runner.asked) == asked, "nothing is trained twice"
        assert state_of(first, {}, 0.0) == state_of(again, {}, 0.0)


def test_steps_that_are_left_repeat_the_recommended_rate_and_its_neighbours() -> None:
    runner = Planted(1.3e-2)
    found = searched(runner, budget=1e9, seeds=(1, 2, 3))
    lr = found.recommended
    for rate in (lr, *(o for o, _ in found.neighbours)):
        assert {p.seed for p in found.full() if p.lr == rate} == {1, 2, 3}
    assert found.last_fit is not None and found.last_fit.degrees > 3


def test_without_pruning_every_rate_is_trained_to_the_end() -> None:
    runner = Planted()
    found = searched(runner, rungs=(), budget=1e9)
    assert {w.until for w in runner.asked} == {STEPS} and not any(r.given_up for r in found.runs.values())


def test_it_stops_behind_a_stage_and_goes_on() -> None:
    runner = Planted()
    for stage in ("range_test", "coarse", "seeds", "fit"):
        found = Search(plan(), runner).run(stage)
        assert (found.status, found.stage) == ("stopped", stage)
        assert (found.recommended is not None) == (stage == "fit")
    assert Search(plan(), runner).run().status == "confirmed"


def test_the_range_test_places_the_grid() -> None:
    told = {"suggestion": 2e-2, "steps": 30, "why": "because"}
    found = Search(plan(centre=0.0, range_steps=30), Planted(), lambda: told).run("coarse")
    assert {5e-3, 1e-2, 2e-2, 4e-2} <= set(found.rates())
    assert found.steps == 30 + sum(r.steps for r in found.runs.values())


def test_a_plan_that_cannot_be_is_refused() -> None:
    for wrong, message in [
        ({"points": 2}, "points: found 2"),
        ({"factor": 1.0}, "factor: found 1"),
        ({"seeds": (1, 1)}, "seeds: expected different ones"),
        ({"rungs": (60, 20)}, "rungs: found"),
        ({"rungs": (60, 240)}, "expected below max_steps"),
        ({"keep": (2,), "rungs": (20,)}, "a rate and its neighbours"),
        ({"centre": 0.0}, "centre: found neither"),
        ({"centre": 1000.0}, "centre: found 1000, round which no rates of the grid lie within"),
        ({"centre": 10.0, "points": 3}, "centre: found 10, round which 2 rates of the grid lie"),
        ({"range_steps": 3}, "range_steps: found 3; expected at least 10"),
        ({"low": 1.0, "high": 0.1}, "range: found 1 to 0.1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            plan(**wrong)
    assert rungs_of(40_000, 2000) == (4000, 10_000) and rungs_of(100, 0) == ()


# --- its files --------------------------------------------------------------------------------------------------


def test_the_files_hold_what_was_found_and_are_always_json(tmp_path: Path) -> None:
    found = searched(Planted(6e-3, status=lambda lr, seed: "diverged" if lr > 0.05 else "completed"))
    base = {"preset": "demo"}
    write_state(tmp_path / "search.json", state_of(found, base, 12.5))
    state = read_state(tmp_path)
    assert state is not None and state["status"] == "confirmed" and state["elapsed_s"] == 12.5
    check_same(state, base, found.plan, tmp_path)
    check_same(state, base, plan(budget=1e6), tmp_path)
    with pytest.raises(MismatchError, match=r"plan\.factor: found 2\.0; expected 3\.0"):
        check_same(state, base, plan(factor=3.0), tmp_path)
    with pytest.raises(MismatchError, match=r"base\.preset: found demo; expected debug"):
        check_same(state, {"preset": "debug"}, found.plan, tmp_path)

    def strict(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    about = json.loads(to_json(recommendation(found, [], 90.0)), parse_constant=strict)
    for name in ("best_learning_rate", "best_result", "all_results", "search_time_minutes", "recommendation"):
        assert about[name] is not None, "seed 002 has it"
    assert about["best_learning_rate"] == about["best_result"]["learning_rate"] == found.recommended
    assert about["interval"]["low"] < found.recommended < about["interval"]["high"]  # type: ignore[operator]
    assert about["cost"]["share_of_grid"] == pytest.approx(found.steps / (39 * STEPS))
    assert {p["why"][:5] for p in about["pruned"]} == {"step "} and about["search_time_minutes"] == 1.5
    assert about["predicted_loss"] == pytest.approx(about["confirmed_loss"])
    draw_search(found, tmp_path / "lr_search.png")
    assert (tmp_path / "lr_search.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_searches_that_found_little(tmp_path: Path) -> None:
    lost = Planted(status=lambda lr, seed: "failed" if seed == 2 else "completed")
    for runner in (Planted(status=lambda lr, seed: "diverged"), Planted(curvature=0.0), Planted(10.0), lost):
        draw_search(searched(runner, widenings=1), tmp_path / "lr_search.png")
    draw_search(Search(plan(), Planted()).run("coarse"), tmp_path / "lr_search.png")


@pytest.mark.parametrize(("points", "factor", "named"), [(13, 2.0, 7), (13, 1.5, 6), (5, 2.0, 5), (5, 1.02, 1)])
def test_labels_of_rates_do_not_overlap(points: int, factor: float, named: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = searched(Planted(1.1e-2), points=points, factor=factor, rungs=(), centre=1.01e-2, budget=STEPS * 90)
    figure = Figure(figsize=(10.4, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2)[1]
    picture._losses(axes, found)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    labels = [t for t in axes.get_xticklabels() if t.get_text()]
    boxes = sorted((t.get_window_extent().x0, t.get_window_extent().x1) for t in labels)
    assert all(right + 2 < left for (_, right), (left, _) in itertools.pairwise(boxes)), "at least two pixels apart"
    assert len(labels) >= named
    assert picture.short(found.recommended or 0.0) in {t.get_text() for t in labels}, "the one that matters is named"


def test_the_board_is_told_where_runs_pause(tmp_path: Path) -> None:
    told: list[TrialResult] = []

    class Board:
        def show(self, results: Sequence[TrialResult], folder: Path) -> None:
            told.extend(results)

    one = TrialResult("a", None, {}, 1e-3, "1e-3", 1e-4, 1, "running", max_steps=240)
    search_runs.UpTo(Board(), 20).show([one], tmp_path)
    search_runs.UpTo(Board(), 240).show([one], tmp_path)
    assert [r.max_steps for r in told] == [20, 240]


def test_a_damaged_state_is_refused_by_name(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    for text in ("{", "[]", '{"format": "x", "version": 1}', '{"format": "bytekiln-search", "version": 1}'):
        (tmp_path / "search.json").write_text(text)
        with pytest.raises(FormatError, match=r"search\.json: .*; expected the state of a search"):
            read_state(tmp_path)


# --- a run that pauses ------------------------------------------------------------------------------------------


def test_a_paused_run_goes_on_as_if_there_had_been_no_pause(tmp_path: Path) -> None:
    values = {"schedule": "cosine", "dropout": 0.1, "checkpoint_interval": 0, "eval_interval": 2}
    whole = train(tiny(tmp_path, out_dir=str(tmp_path / "whole"), **values))
    config = tiny(tmp_path, out_dir=str(tmp_path / "paused"), **values)
    for step in (2, 4):
        result = train(config, resume="auto", pause_at=step)
        assert (result.status, result.steps, result.signal) == ("interrupted", step, None)
        assert result.why == f"paused at step {step}; --resume auto goes on from there"
    again = train(config, resume="auto", pause_at=4)
    assert again.steps == 4 and again.best_val_loss == result.best_val_loss
    ended = train(config, resume="auto")
    assert (ended.status, ended.final_val_loss, ended.best_step) == ("completed", whole.final_val_loss, whole.best_step)
    one, other = (load_checkpoint(tmp_path / n / "checkpoints" / "checkpoint_final") for n in ("whole", "paused"))
    for name, tensor in one.model.items():
        assert torch.equal(tensor, other.model[name]), name
    for name, tensor in one.training.items():
        assert torch.equal(tensor, other.training[name]), name
    rows = [
        [(r.step, r.loss, r.lr, r.val_loss) for r in read_metrics(tmp_path / n / "metrics.csv")]
        for n in ("whole", "paused")
    ]
    assert rows[0] == rows[1]


def test_a_pause_behind_the_end_changes_nothing(tmp_path: Path) -> None:
    assert train(tiny(tmp_path), pause_at=100).status == "completed"


# --- the command ------------------------------------------------------------------------------------------------


class InProcess:
    """A run of a sweep in this process, in the place of a child."""

    started: ClassVar[list[tuple[str, int | None]]] = []
    dies_at: int | None = None
    stopped: ClassVar[dict[str, int]] = {}
    """Attempts, by run, that a SIGTERM ends before they have trained."""

    def __init__(self, folder: Path, threads: int, *, step: int | None = None) -> None:
        type(self).started.append((folder.name, step))
        if self.dies_at is not None and len(self.started) > self.dies_at:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C while it runs: the sweep waits for it, and ends
        if self.stopped.get(folder.name, 0) > 0:
            type(self).stopped[folder.name] -= 1
            self.code = 143
            return
        config = load_config(folder / "trial.toml").with_(out_dir=str(folder))
        try:
            result = train(config, resume="auto", pause_at=step or 0)
            self.code = {"interrupted": 130, "diverged": 3}.get(result.status, 0)
        except BytekilnError as exc:
            (folder / "log.txt").write_text(f"error: {exc}\n")
            self.code = 2

    def poll(self) -> int:
        return self.code

    def send(self, number: int) -> None:
        """Nothing runs any more."""

    def kill(self) -> None:
        """Nothing runs any more."""


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[InProcess]:
    """Runs of sweeps in this process; the working directory has token files and a config."""
    InProcess.started, InProcess.dies_at, InProcess.stopped = [], None, {}
    monkeypatch.setattr(search_runs, "Process", InProcess)
    monkeypatch.setattr(search_runs, "Paused", InProcess)
    monkeypatch.setattr("bytekiln.sweep.coordinate.POLL_S", 0.0)
    monkeypatch.chdir(tmp_path)
    tokens(tmp_path / "train.npy", 3000)
    tokens(tmp_path / "val.npy", 300, seed=1)
    config = {
        "train_data": "train.npy", "val_data": "val.npy", "vocab_size": 61, "d_model": 16, "num_layers": 1,
        "num_heads": 2, "context_length": 8, "batch_size": 4, "max_steps": 24, "lr": 1e-2, "min_lr": 1e-3,
        "schedule": "cosine", "eval_interval": 2, "num_eval_batches": 2, "checkpoint_interval": 0, "compile": False,
        "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    return InProcess


FLAGS = ["tiny.json", "--centre", "0.03", "--points", "5", "--budget", "20"]


def test_the_command_finds_a_rate_and_does_nothing_twice(
    in_process: type[InProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_search.search(FLAGS) == 0
    out = capsys.readouterr().out
    assert "Use learning rate" in out and "lr_recommendation.json" in out
    folder = tmp_path / "tiny-search"
    about = json.loads((folder / "lr_recommendation.json").read_text())
    state = read_state(folder)
    assert state is not None and state["status"] in ("confirmed", "unconfirmed")
    names = {"search.json", "lr_recommendation.json", "lr_search.png", "coarse", "seeds"}
    assert names <= {p.name for p in folder.iterdir()}
    paused = [r for r in read_results(folder / "coarse" / "results.json") if r.pruned]
    assert len(paused) == len(about["pruned"]) == 2 and all(r.status == "interrupted" for r in paused)
    assert all(r["parameter_count"] for r in about["all_results"])
    # min_lr follows each rate, and the data are the same for all: same seed, same first batch, same first loss.
    configs = [load_config(p / "trial.toml") for p in (folder / "coarse" / "runs").iterdir()]
    assert all(c.optimizer.floor_lr == pytest.approx(c.optimizer.lr / 10) for c in configs)
    firsts = {read_metrics(p / "metrics.csv")[1].loss for p in (folder / "coarse" / "runs").iterdir()}
    assert len(firsts) == 1

    before = len(in_process.started)
    for again in (FLAGS, ["tiny-search"]):
        assert cli_search.search(again) == 0
        assert "Use learning rate" in capsys.readouterr().out
    assert len(in_process.started) == before
    told = json.loads((folder / "lr_recommendation.json").read_text())
    assert {k: v for k, v in told.items() if k != "search_time_minutes"} == {
        k: v for k, v in about.items() if k != "search_time_minutes"
    }
    with pytest.raises(MismatchError, match=r"plan\.factor: found 2\.0; expected 3\.0"):
        cli_search.search([*FLAGS, "--factor", "3"])
    with pytest.raises(ConfigError, match="expected no field of a run"):
        cli_search.search(["tiny-search", "--batch-size", "8"])
    check_what_a_finished_search_is_told(folder)
    assert len(in_process.started) == before
    (folder / "coarse" / "results.json").write_text("[{")  # a view of the runs, made anew
    assert cli_search.search([*(f for f in FLAGS if f not in ("--budget", "20")), "--confidence", "0.95"]) == 0
    healthy = read_state(folder)
    assert healthy is not None and healthy["runs"] == state["runs"] and healthy["fit"] == state["fit"]
    assert healthy["plan"] == state["plan"], "the budget that is not given stays"
    healed = [r for r in read_results(folder / "coarse" / "results.json") if r.pruned]
    assert {r.name: r.pruned for r in healed} == {r.name: r.pruned for r in paused}


def check_what_a_finished_search_is_told(folder: Path) -> None:
    """Flags beside its folder: refused by name where they say something else, taken where they say the same."""
    finished = (folder / "search.json").read_bytes()
    for flags, message in [
        (["--points", "7"], "--points: found 7; expected 5"),
        (["--factor", "3"], r"--factor: found 3\.0; expected 2\.0"),
        (["--seeds", "3"], "--seeds: found 3; expected 2"),
        (["--centre", "0.02"], r"--centre: found 0\.02; expected 0\.03"),
        (["--range", "1e-4", "1"], "--range: found"),
        (["--range-steps", "40"], "--range-steps: found 40; expected 0"),
        (["--no-pruning"], "--no-pruning: found True; expected False"),
        (["--folder", "elsewhere"], "--folder: found"),
        (["--budget", "1"], "budget: found 1 full runs; expected at least"),
        (["--retry", "nonsense"], "--retry: found nonsense; expected failed, diverged, early_stopped or interrupted"),
        (["--retry", "failed", "--until", "coarse"], "--retry: found it with --until coarse"),
    ]:
        with pytest.raises(BytekilnError, match=message):
            cli_search.search([folder.name, *flags])
    assert cli_search.search([folder.name, "--until", "coarse"]) == 0
    assert (folder / "search.json").read_bytes() == finished, "it is left as it is"
    same = ["--points", "5", "--factor", "2", "--seeds", "2", "--centre", "0.03", "--folder", folder.name]
    same += ["--range", "1e-5", "10", "--retry", "failed,diverged"]
    assert cli_search.search([folder.name, *same, "--confidence", "0.9"]) == 0
    state = read_state(folder)
    assert state is not None and state["plan"]["confidence"] == state["last_fit"]["confidence"] == 0.9
    assert state["plan"]["budget"] == 20 * 24, "what is not given stays"


def test_a_run_that_is_stopped_from_outside_goes_on_before_it_is_judged(
    in_process: type[InProcess], tmp_path: Path
) -> None:
    flags = ["tiny.json", "--centre", "0.03", "--points", "3", "--until", "coarse"]
    assert cli_search.search([*flags, "--folder", "whole"]) == 0
    in_process.stopped = {"lr=0.03,seed=42": 1}
    assert cli_search.search([*flags, "--folder", "stopped"]) == 0
    one, other = (read_state(tmp_path / n) for n in ("whole", "stopped"))
    assert one is not None and other is not None and one["runs"] == other["runs"]
    in_process.stopped = {"lr=0.03,seed=42": 99}
    assert cli_search.search([*flags, "--folder", "again"]) == 4
    state = read_state(tmp_path / "again")
    assert state is not None
    lost = next(r for r in state["runs"] if r["lr"] == 0.03)
    assert lost["status"] == "failed" and "3 times: SIGTERM" in lost["why"]
    in_process.stopped = {}
    assert cli_search.search([*flags, "--folder", "again"]) == 0, "and it goes on once nobody stops it"


@pytest.fixture
def finished(in_process: type[InProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of a search that is over."""
    assert cli_search.search(FLAGS) == 0
    capsys.readouterr()
    return tmp_path / "tiny-search"


def told_by(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "lr_recommendation.json").read_text())
    about.pop("search_time_minutes")
    return about


@pytest.mark.parametrize("damage", ["gone", "cut", "no beginning", "torn"])
def test_damaged_metrics_never_change_the_recommendation_in_silence(
    finished: Path, in_process: type[InProcess], damage: str
) -> None:
    before, state, begun = told_by(finished), (finished / "search.json").read_bytes(), len(in_process.started)
    best = before["best_result"]
    runs = [p for stage in ("coarse", "seeds", "confirm") for p in (finished / stage).glob("runs/*/metrics.csv")]
    whole = {p: p.read_text().splitlines(keepends=True) for p in runs}

    def damaged(path: Path) -> None:
        if damage == "gone":
            path.unlink()
            return
        head, *rows = whole[path]
        kept = {"cut": rows[:1], "no beginning": rows[-3:], "torn": ["1,2,3\n", *rows]}[damage]
        path.write_text("".join([head, *kept]))

    for path in runs:  # what was repeated needs its best loss alone, and has it in its result
        if path.parents[2].name != "coarse":
            damaged(path)
    assert cli_search.search([finished.name]) == 0 and told_by(finished) == before
    for path in runs:
        path.write_text("".join(whole[path]))
    coarse = max((p for p in runs if p.parents[2].name == "coarse"), key=lambda p: len(whole[p]))
    state = (finished / "search.json").read_bytes()
    damaged(coarse)
    with pytest.raises(
        FormatError, match=r"metrics\.csv: .*without the loss at step 2; expected 24 steps, as the run's"
    ):
        cli_search.search([finished.name])
    assert (finished / "search.json").read_bytes() == state and told_by(finished) == before
    assert len(in_process.started) == begun and best
    shutil.rmtree(coarse.parent)  # the way out that the message names
    assert cli_search.search([finished.name, "--retry", "failed"]) == 0
    assert len(in_process.started) > begun and told_by(finished)["best_learning_rate"] == best["learning_rate"]


def test_a_lost_state_is_made_anew_and_keeps_the_runs(
    finished: Path, in_process: type[InProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    before, begun = told_by(finished), len(in_process.started)
    (finished / "search.json").unlink()
    with pytest.raises(
        FileError, match=r"no search\.json; expected a search \(lm-sweep search PRESET\|CONFIG --folder"
    ):
        cli_search.search([finished.name])
    for flags, message in [
        (["--centre", "0.02"], r"found runs with lr 7\.5e-3, .* and no search\.json; expected 5e-3"),
        (["--max-steps", "30"], "found runs with max_steps 24 and no"),
        (["--d-model", "32"], "found runs with d_model 16 and no"),
        (["--seed", "7"], "found runs with seed 42 and no"),
    ]:
        with pytest.raises(MismatchError, match=message):
            cli_search.search([*FLAGS, *flags])
    assert cli_search.search([*FLAGS, "--dry-run"]) == 0 and not (finished / "search.json").exists()
    assert cli_search.search(FLAGS) == 0
    assert "search.json was lost: it is made anew" in capsys.readouterr().err
    assert told_by(finished) == before and len(in_process.started) == begun, "nothing is trained twice"
    assert cli_search.search([finished.name]) == 0 and told_by(finished) == before


def test_a_lost_state_and_a_damaged_range_test_are_one_line(in_process: type[InProcess], tmp_path: Path) -> None:
    (place := tmp_path / "tiny-search" / "range_test").mkdir(parents=True)
    for text in ("{", "[]", '{"low": 1e-5, "steps": 30}'):
        (place / "range_test.json").write_text(text)
        with pytest.raises(FormatError, match=r"range_test\.json: .*; expected a range test"):
            cli_search.search(["tiny.json", "--until", "range_test"])
        assert not (tmp_path / "tiny-search" / "search.json").exists()


def test_a_lost_state_does_not_keep_overwrite_from_beginning_anew(finished: Path, in_process: type[InProcess]) -> None:
    for lost in (lambda p: p.unlink(), lambda p: p.write_text("{")):
        lost(finished / "search.json")
        (finished / "letter.txt").write_text("mine")
        begun = len(in_process.started)
        assert cli_search.search([*FLAGS, "--d-model", "8", "--until", "coarse", "--overwrite"]) == 0
        assert len(in_process.started) >= begun + 5 and (finished / "letter.txt").read_text() == "mine"
        state = read_state(finished)
        assert state is not None and state["stage"] == "coarse"


@pytest.mark.slow
def test_a_search_that_was_killed_anywhere_ends_the_same(
    in_process: type[InProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli_search.search([*FLAGS, "--folder", "whole"]) == 0
    total = len(in_process.started)
    for at in (0, 3, 6, total - 2):
        in_process.started, in_process.dies_at = [], at
        with pytest.raises(KeyboardInterrupt):
            cli_search.search([*FLAGS, "--folder", f"killed{at}"])
        read_state(tmp_path / f"killed{at}")
        in_process.dies_at, began = None, len(in_process.started)
        assert cli_search.search([*FLAGS, "--folder", f"killed{at}"]) == 0
        assert len(in_process.started) - began == total - at - 1, "what was done is not done again"
        one, other = (
            json.loads((tmp_path / n / "lr_recommendation.json").read_text()) for n in ("whole", f"killed{at}")
        )
        for told in (one, other):
            told.pop("search_time_minutes")
            for r in (told["best_result"], *told["all_results"]):
                r.pop("training_time_minutes")
        assert one == other


def test_every_rate_diverges_is_exit_status_1(
    in_process: type[InProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate without warm-up and clipping at 1e8 and above ruins any model of this size at once.
    flags = ["tiny.json", "--centre", "1e12", "--points", "3", "--range", "1e11", "1e13", "--grad-clip", "0"]
    assert cli_search.search([*flags, "--optimizer", "sgd"]) == 1
    captured = capsys.readouterr()
    assert "error: No learning rate can be recommended: no run ended well" in captured.err
    about = json.loads((tmp_path / "tiny-search" / "lr_recommendation.json").read_text())
    assert about["best_learning_rate"] is None and about["status"] == "failed"


def test_range_test_alone_then_the_rest(
    in_process: type[InProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["tiny.json", "--range-steps", "30", "--budget", "20"]
    assert cli_search.search([*flags, "--until", "range_test"]) == 0
    assert "geometric mean" in capsys.readouterr().out and not in_process.started
    folder = tmp_path / "tiny-search" / "range_test"
    stamp = (folder / "range_test.csv").stat().st_mtime_ns
    assert cli_search.search([*flags, "--until", "coarse"]) == 0
    assert (folder / "range_test.csv").stat().st_mtime_ns == stamp and in_process.started
    assert (tmp_path / "tiny-search" / "lr_search.png").exists()
    assert not (tmp_path / "tiny-search" / "lr_recommendation.json").exists()


def test_a_dry_run_prints_stages_and_cost_and_writes_nothing(
    in_process: type[InProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_search.search(["tiny.json", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("range test", "coarse", "seeds", "confirm", "full grid", "936", "% of the full grid's steps"):
        assert word in out
    assert "never more than 187 steps" in out, "a fifth of the grid's 936"
    assert cli_search.search(["tiny.json", "--dry-run", "--seeds", "3", "--transfer-to", "tiny.json"]) == 0
    here, there = capsys.readouterr().out.split("and in transfer/")
    assert "2 more seeds at the best rate and its neighbours, 2 of 6 runs fit in the budget" in here
    assert "3 rates to step 24, the end" in there and "never more than 240 steps" in there
    for told in (here, there):
        total = next(line for line in told.splitlines() if line.startswith("all"))
        assert int(total.split()[1]) <= (187 if told is here else 240)
    assert not (tmp_path / "tiny-search").exists() and not in_process.started


def test_what_cannot_be_searched_is_refused_before_anything_is_written(
    in_process: type[InProcess], tmp_path: Path
) -> None:
    for flags, message in [
        (["--val-data", ""], "val_data: found none"),
        (["--max-time", "60"], "expected one that ends by --max-steps"),
        (["--lr", "1e-3"], "expected --centre LR"),
        (["--set", "lr"], "--set: found 'lr'; expected FIELD=VALUE"),
        (["--set", "learning=3"], "unknown key learning"),
        (["--points", "2"], "points: found 2"),
        (["--centre", "1000"], "centre: found 1000"),
        (["--range-steps", "3"], "range_steps: found 3"),
        (["--budget", "3"], "budget: found 3 full runs; expected at least"),
        (["--retry", "nonsense"], "--retry: found nonsense"),
        (["--confidence", "2"], "expected a number between 0 and 1"),
        (["--train-data", "nowhere.npy"], "nowhere.npy: no such file"),
        (["--transfer-to", "tiny.json", "--transfer-set", "optimizer=muon"], "optimizer: found muon in the target"),
    ]:
        with pytest.raises(BytekilnError, match=message):
            cli_search.search(["tiny.json", *flags])
    assert not (tmp_path / "tiny-search").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"found letter\.txt and no search"):
        cli_search.search(["tiny.json", "--folder", "full", "--overwrite"])
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_overwrite_begins_anew(in_process: type[InProcess], tmp_path: Path) -> None:
    flags = [*FLAGS, "--points", "3", "--until", "coarse"]
    assert cli_search.search(flags) == 0
    (tmp_path / "tiny-search" / "notes.txt").write_text("mine")
    begun = len(in_process.started)
    assert cli_search.search([*flags, "--factor", "3", "--overwrite"]) == 0
    assert len(in_process.started) >= begun + 3
    assert (tmp_path / "tiny-search" / "notes.txt").read_text() == "mine"


def test_a_replaced_search_goes_on_by_its_folder_with_its_own_config(
    in_process: type[InProcess], tmp_path: Path
) -> None:
    flags = ["--centre", "0.03", "--points", "3", "--budget", "20", "--until", "coarse", "--folder", "s"]
    assert cli_search.search(["tiny.json", *flags]) == 0 and cli_search.search(["s", "--until", "coarse"]) == 0
    other = {**json.loads((tmp_path / "tiny.json").read_text()), "d_model": 8}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert cli_search.search(["other.json", *flags, "--overwrite"]) == 0
    (tmp_path / "s" / "base.toml").write_text("d_model = 16\n")  # as versions before this one have left it
    begun = len(in_process.started)
    for name in ("search.json", "lr_search.png"):
        (tmp_path / "s" / f".{name}.{2**22 + 1}.tmp").touch()
    assert cli_search.search(["s", "--until", "coarse"]) == 0 and len(in_process.started) == begun
    assert not [*(tmp_path / "s").glob(".*.tmp")], "of writers that were killed"
    assert load_config(tmp_path / "s" / "base.toml").model.d_model == 8


@pytest.mark.slow
def test_without_a_rate_that_stood_every_seed_the_exit_status_is_4(
    in_process: type[InProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverges(self: InProcess, folder: Path, threads: int, *, step: int | None = None) -> None:
        begin(self, folder, threads, step=step)
        if "seed=43" in folder.name:
            told = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps({**told, "status": "diverged"}))
            self.code = 3

    begin = in_process.__init__
    monkeypatch.setattr(in_process, "__init__", diverges)
    assert cli_search.search(FLAGS) == 4
    assert "No learning rate can be recommended: no rate ended well with every seed" in capsys.readouterr().out
    about = json.loads((tmp_path / "tiny-search" / "lr_recommendation.json").read_text())
    assert about["best_learning_rate"] is None


@pytest.mark.slow
def test_a_transfer_predicts_and_confirms_at_the_other_width(
    in_process: type[InProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = ["--transfer-to", "tiny.json", "--transfer-set", "d_model=32"]
    assert cli_search.search([*FLAGS, *wide]) == 0
    out = capsys.readouterr().out
    assert "transfer: predicted" in out and "steps of a factor 2" in out
    there = json.loads((tmp_path / "tiny-search" / "transfer" / "lr_recommendation.json").read_text())
    here = json.loads((tmp_path / "tiny-search" / "lr_recommendation.json").read_text())
    assert there["transfer"]["source_lr"] == here["best_learning_rate"]
    assert there["transfer"]["lr"] == pytest.approx(here["best_learning_rate"] / 2, rel=0.01)
    rates = {r["learning_rate"] for r in there["all_results"]}
    assert there["transfer"]["lr"] in rates and len(rates) >= 3
    assert there["best_learning_rate"] == there["transfer"]["found"]
    assert len({r["seed"] for r in there["all_results"]}) == 2, "without a second seed, noise has no measure"
    place, begun = tmp_path / "tiny-search" / "transfer", len(in_process.started)
    (place / "search.json").unlink()
    assert cli_search.search([*FLAGS, *wide]) == 0
    assert f"{place.relative_to(tmp_path) / 'search.json'} was lost: it is made anew" in capsys.readouterr().err
    assert len(in_process.started) == begun, "nothing is trained twice"
    again = json.loads((place / "lr_recommendation.json").read_text())
    assert again | {"search_time_minutes": 0} == there | {"search_time_minutes": 0}
    (place / "search.json").unlink()
    assert cli_search.search([*FLAGS, *wide, "--d-model", "8", "--overwrite"]) == 0
    again = json.loads((place / "lr_recommendation.json").read_text())
    assert again["transfer"]["width"] == 1 / 4 and len(in_process.started) >= begun + 8, "both are begun anew"


@pytest.mark.slow
def test_the_whole_command_with_real_processes(command: Any, tmp_path: Path) -> None:
    tokens(tmp_path / "train.npy", 3000)
    tokens(tmp_path / "val.npy", 300, seed=1)
    fields = {"train_data": "train.npy", "val_data": "val.npy", "vocab_size": 61, "d_model": 16, "num_layers": 1,
              "num_heads": 2, "context_length": 8, "batch_size": 4, "max_steps": 24, "eval_interval": 2,
              "num_eval_batches": 2, "checkpoint_interval": 0, "compile": False, "precision": "fp32"}  # fmt: skip
    (tmp_path / "tiny.json").write_text(json.dumps(fields))
    flags = ("tiny.json", "--points", "3", "--range-steps", "30", "--seeds", "1", "--budget", "20", "--jobs", "2")
    env = {"OMP_NUM_THREADS": "1"}
    done = command("lm-sweep", "search", *flags, env=env, timeout=900)
    assert "Use learning rate" in done.stdout and "paused" in done.output and "SIGINT" not in done.output
    again = command("lm-sweep", "search", *flags, env=env, timeout=300)
    assert "begins" not in again.output and "goes on" not in again.output
