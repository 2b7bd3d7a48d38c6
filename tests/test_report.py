"""Reports: from the files alone, without torch; what is compared, what is said, what is written."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bytekiln.errors import ConfigError, FileError, OutputExistsError
from bytekiln.metrics import Row
from bytekiln.report.build import read_report, summary, write_csv, write_page, write_pictures
from bytekiln.report.groups import Group, compare
from bytekiln.report.html import page
from bytekiln.report.model import Report
from bytekiln.report.pictures import _draw_losses, draw_losses, pictures, write_picture
from bytekiln.report.runs import Run
from report_files import rows_to, write_config, write_large, write_result, write_run, write_sweep

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp; \u2028 \U0001f525 $x_{'


def data_of(text: str) -> dict:
    """The JSON that the page's charts are drawn from."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def the_run(folder: Path) -> Run:
    (run,) = read_report([folder]).runs
    return run


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three variants with three seeds: one like the base, one worse, one that fails."""
    base = {1: 3.000, 2: 3.020, 3: 2.990}
    runs: dict = {}
    for seed, loss in base.items():
        runs[f"base,seed={seed}"] = ("base", {"seed": seed}, loss)
        runs[f"same,seed={seed}"] = (
            "same",
            {"seed": seed, "qk_norm": True},
            loss + {1: 0.004, 2: -0.006, 3: 0.003}[seed],
        )
        runs[f"worse,seed={seed}"] = ("worse", {"seed": seed, "position": "none"}, loss + 0.1 + 0.001 * seed)
        runs[f"lost,seed={seed}"] = ("lost", {"seed": seed, "norm": "none"}, 2.5 if seed < 3 else -1)
    samples = {"ROMEO:": " what light", EVIL: EVIL}
    folder = tmp_path_factory.mktemp("sweeps") / "ablation"
    return write_sweep(folder, runs, question="What do positions buy?", baseline="base", samples=samples, layers=True)


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs: dict = {}
    for lr in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3):
        for seed in (1, 2):
            loss = 3 + 0.05 * float(np.log(lr / 9e-4)) ** 2 + 0.002 * seed + 0.001 * np.sin(1e5 * lr * seed)
            runs[f"lr={lr:g},seed={seed}"] = (None, {"lr": lr, "seed": seed}, loss)
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "rates", runs, question="Which rate?", baseline="lr=1e-3")
    place = folder / "runs/lr=1,seed=1"
    write_run(place, rows=rows_to(3.0)[:12], status="diverged", lr=1.0, seed=1)
    return folder


# --- what is said -------------------------------------------------------------------------------------------------


def test_differences_to_the_baseline(ablation: Path) -> None:
    report = read_report([ablation])
    assert [g.name for g in report.groups] == ["base", "same", "worse", "lost"]
    assert report.baseline is report.groups[0]
    verdicts = {c.group.name: c.verdict for c in report.comparisons}
    assert verdicts == {"same": "not distinguishable", "worse": "worse", "lost": "better"}
    worse = next(c for c in report.comparisons if c.group.name == "worse")
    assert worse.difference is not None and worse.difference.how == "paired"
    assert worse.difference.mean == pytest.approx(0.102, abs=0.002)
    assert worse.p is not None and worse.difference.p is not None and worse.p > worse.difference.p, "corrected"
    lost = next(c for c in report.comparisons if c.group.name == "lost")
    assert lost.difference is not None and lost.difference.how == "welch", "other seeds"


def test_the_answer_is_made_from_the_numbers(ablation: Path) -> None:
    report = read_report([ablation])
    assert report.question == "What do positions buy?"
    assert report.best is report.groups[0], "a variant with a failed run is never the best, whatever its others did"
    said = report.answer
    assert said.startswith("base has the lowest validation loss, 3.0")
    assert "σ over 3 seeds" in said and "is the baseline" in said
    assert "not distinguishable from same" in said
    assert "lower so far, but not all of its runs ended well: lost" in said
    assert "Not ranked: 1 failed (of 12 runs)." in said
    other = read_report([ablation], baseline="worse")
    assert "below the baseline worse (p = " in other.answer
    assert read_report([ablation], baseline="worse,seed=2").baseline is not None, "a run stands for its group"
    with pytest.raises(ConfigError, match="did you mean worse"):
        read_report([ablation], baseline="wors")


def test_one_seed_tells_nothing(tmp_path: Path) -> None:
    for name, position, end in (("a", "rope", 3.0), ("b", "none", 3.4)):
        write_run(tmp_path / name, end, position=position)
    report = read_report([tmp_path / "a", tmp_path / "b"], baseline="b")
    assert report.comparisons[0].verdict == "one seed: significance cannot be told"
    assert "a has the lowest validation loss" in report.answer
    assert "whether that is more than chance cannot be told" in report.answer
    assert report.question == "Which of 2 is better? They differ in position."
    assert "With one seed a variant, significance cannot be told." in page(report)


def test_the_best_of_many_equals_is_seldom_called_better() -> None:
    """It is chosen by the losses that are compared: of sets of equals, at most 5 in 100 may say so."""
    dice, wrong = random.Random(5), 0
    for _ in range(300):
        groups = [
            Group(str(i), [SimpleNamespace(counts=True, seed=s, result={"best_val_loss": dice.gauss(3.0, 0.01)})
                           for s in range(5)], {}) for i in range(10)
        ]  # fmt: skip
        best = min(groups, key=lambda g: sum(g.losses.values()))
        wrong += any(c.p is not None and c.p < 0.05 for c in compare(groups, best, chosen=True))
    assert wrong <= 15


def test_seeds_that_come_twice_count_twice(tmp_path: Path) -> None:
    runs = {f"x{i}": ("v", {"seed": 1}, loss) for i, loss in enumerate((2.0, 3.0))}
    group = read_report([write_sweep(tmp_path / "s", runs)]).groups[0]
    assert len(group.losses) == 2 and group.mean == pytest.approx(2.5, abs=0.1)


def test_two_seeds_are_few(rates: Path) -> None:
    report = read_report([rates])
    found = {c.group.name: c for c in report.comparisons}
    far = found["lr=2.5e-4"]
    assert far.difference is not None and far.difference.mean > 0.05
    assert far.verdict in ("worse", "two seeds: too few to tell"), "never: not distinguishable"


def test_runs_without_a_sweep_are_grouped_by_their_configs(tmp_path: Path) -> None:
    for i, (seed, position) in enumerate([(1, "rope"), (2, "rope"), (1, "none"), (2, "none")]):
        write_run(tmp_path / f"run{i}", 3.0 + 0.01 * i, seed=seed, position=position)
    report = read_report([tmp_path])
    assert [(g.name, len(g.runs)) for g in report.groups] == [("position=rope", 2), ("position=none", 2)]
    again = read_report([tmp_path / "run1", tmp_path / "run0", tmp_path / "run1"])
    assert [r.name for r in again.runs] == ["run1", "run0"], "once each, in the given order"


def test_loss_against_learning_rate(rates: Path) -> None:
    report = read_report([rates])
    (series,) = report.rates
    assert series.fit is not None and series.fit.kind == "fitted"
    assert series.fit.low < 9e-4 < series.fit.high
    assert series.lost == [1.0] and len(series.points) == 10
    assert "a parabola in ln(lr) has its minimum at 9" in report.answer and "95 % interval" in report.answer
    assert "1 diverged" in report.answer


def test_a_search_and_its_stages(rates: Path, tmp_path: Path) -> None:
    for stage in ("coarse", "confirm"):
        shutil.copytree(rates, tmp_path / "search" / stage)
    about = {"format": "bytekiln-lr-recommendation", "recommendation": "train at 9e-4 & no more"}
    (tmp_path / "search/lr_recommendation.json").write_text(json.dumps(about))
    entries = json.loads((rates / "results.json").read_text())
    entries[0]["pruned"] = "0.3 above the best at step 10"
    (tmp_path / "search/coarse/results.json").write_text(json.dumps(entries))
    report = read_report([tmp_path / "search"])
    assert len(report.runs) == 22 and len(report.rates) == 1 and report.title == "search"
    assert report.question == "Which learning rate is the best?" and report.answer.startswith(
        "train at 9e-4 & no more "
    )
    assert "given up by the search: 0.3 above the best at step 10" in report.runs[0].notes
    assert page(report).count("train at 9e-4 &amp; no more") == 1
    both = read_report([tmp_path / "search", rates])
    assert "The search: train at 9e-4 &amp; no more" in page(both)


def test_an_optimum_below_rates_that_diverged(tmp_path: Path) -> None:
    for lr, end in ((1e-3, 3.4), (2e-3, 3.2), (4e-3, 3.0)):
        write_run(tmp_path / f"{lr}", end, lr=lr)
    write_run(tmp_path / "1", rows=rows_to(3.0)[:9], status="diverged", lr=1.0)
    (series,) = read_report([tmp_path]).rates
    assert series.said == (
        "the best rate, 4e-3, is the highest that ended well; none between it and 1, which diverged, was run."
    )


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_the_mean_of_survivors_is_in_no_fit(rates: Path, tmp_path: Path, status: str) -> None:
    """Of a rate beyond the optimum one seed is lost; the other, by luck, has the lowest loss of all."""
    shutil.copytree(rates, folder := tmp_path / "rates")
    runs = {f"lr=8e-3,seed={seed}": (None, {"lr": 8e-3, "seed": seed}, 2.5) for seed in (1, 2)}
    write_sweep(tmp_path / "more", runs)
    entries = [json.loads((f / "results.json").read_text()) for f in (folder, tmp_path / "more")]
    for entry in entries[1]:
        shutil.copytree(tmp_path / "more/runs" / entry["name"], place := folder / "runs" / entry["name"])
        if entry["seed"] == 2:
            entry["status"] = status
            write_result(place, status)
    (folder / "results.json").write_text(json.dumps(entries[0] + entries[1]))
    (before,), (series,) = read_report([rates]).rates, (report := read_report([folder])).rates
    assert series.fit == before.fit and series.means == before.means and series.partial == [8e-3]
    assert len(series.points) == len(before.points) + 1, "what was measured is still shown"
    assert "Left out of the fit, since not every seed ended well: 8e-3." in page(report)


def test_no_rate_of_which_every_seed_ended_well(tmp_path: Path) -> None:
    runs = {
        f"lr={lr},seed={seed}": (None, {"lr": lr, "seed": seed}, 3.0 if seed == 1 else -1)
        for lr in (1e-3, 2e-3, 4e-3)
        for seed in (1, 2)
    }
    report = read_report([write_sweep(tmp_path / "s", runs)])
    (series,) = report.rates
    assert series.fit is None and series.means == [] and len(series.points) == 3
    assert series.said.startswith("fewer than three learning rates whose runs all ended well: no fit.")
    assert "rates" in page(report) and list(pictures(report))


@pytest.mark.parametrize("status", ["failed", "pending", "running"])
def test_a_result_of_an_earlier_attempt_is_not_the_run_s(tmp_path: Path, status: str) -> None:
    folder = write_sweep(tmp_path / "s", {"a": (None, {"seed": 1}, 3.0), "b": (None, {"seed": 2}, 2.0)})
    entries = json.loads((folder / "results.json").read_text())
    entries[1] |= {"status": status, "best_val_loss": None, "error": "out of memory" if status == "failed" else None}
    (folder / "results.json").write_text(json.dumps(entries))
    report = read_report([folder])
    assert [r.status for r in report.runs] == ["completed", status] and not report.runs[1].counts
    assert "result.json says completed, the sweep otherwise: left out" in report.runs[1].notes
    assert "b " not in report.answer.split(".")[0]


@pytest.mark.parametrize("told", [True, False])
def test_a_short_result_does_not_win_a_long_sweep(tmp_path: Path, told: bool) -> None:
    """Of 60 steps where 900 are asked for now: by the results file, or by the run's own plan alone."""
    folder = write_sweep(tmp_path / "s", {"a": (None, {"seed": 1}, 3.0), "b": (None, {"seed": 2}, 2.0)})
    for name, steps in (("a", 900), ("b", 60)):
        place = folder / "runs" / name
        write_result(place, steps=steps, max_steps=steps, best_val_loss=3.0 if name == "a" else 2.0)
        (place / "trial.toml").write_text("[training]\nmax_steps = 900\n")
    entries = json.loads((folder / "results.json").read_text())
    for entry in entries:
        entry |= {"max_steps": 900}
    entries[1]["status"] = "interrupted"
    (folder / "results.json").write_text(json.dumps(entries) if told else "nonsense")
    report = read_report([folder])
    runs = {r.name: r for r in report.runs}
    assert runs["a"].counts and runs["a"].status == "completed"
    assert runs["b"].status == ("interrupted" if told else "unfinished") and not runs["b"].counts


def test_no_fit_where_rates_are_few(tmp_path: Path) -> None:
    for lr in (1e-3, 2e-3):
        write_run(tmp_path / f"{lr}", 3.0, lr=lr)
    (series,) = read_report([tmp_path]).rates
    assert series.fit is None and "no fit" in series.said


# --- runs as they are ---------------------------------------------------------------------------------------------


def test_old_unfinished_and_broken_runs_are_shown_as_what_they_are(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    write_run(tmp_path / "going", result=False)
    write_run(tmp_path / "torn", result=False)
    with (tmp_path / "torn/metrics.csv").open("a") as f:
        f.write("41,1,2\n42,oops\n43,1376,4.3,2.9")
    write_config(tmp_path / "begun")
    write_config(tmp_path / "bare")
    (tmp_path / "bare/metrics.csv").write_text((tmp_path / "whole/metrics.csv").read_text().splitlines()[0] + "\n")
    old = write_run(tmp_path / "old")
    (old / "config.toml").write_text('no_longer_a_field = 3\nlr = 1e-3\nseed = 0\n[gone]\nmore = "x"\n')
    (old / "metrics.csv").write_text("step,loss,val_loss\n0,,4.2\n1,4.0,\n2,3.5,3.6\n")
    (old / "result.json").unlink()
    write_run(tmp_path / "bad_result")
    (tmp_path / "bad_result/result.json").write_text('{"status": "compl')
    write_run(tmp_path / "bad_metrics")
    (tmp_path / "bad_metrics/metrics.csv").write_bytes(b"\xff\xfe\x00garbage")
    write_run(tmp_path / "bad_config")
    (tmp_path / "bad_config/config.toml").write_bytes(b"\xff[[[")
    write_run(tmp_path / "bad_layers", layers=True, samples={"a": "b"})
    (tmp_path / "bad_layers/layers.csv").write_text("nothing\n")
    (tmp_path / "bad_layers/samples/step_40.json").write_text('{"samples": [{}]}')
    write_run(tmp_path / "odd")
    write_result(tmp_path / "odd", "exploded", best_val_loss="low", steps=None, tokens=[1])
    (tmp_path / "empty_folder").mkdir()
    report = read_report([tmp_path])
    runs = {r.name: r for r in report.runs}
    statuses = {n: r.status for n, r in runs.items()}
    assert statuses == {
        "whole": "completed", "going": "unfinished", "torn": "unfinished", "begun": "unfinished", "bare": "unfinished",
        "old": "unfinished", "bad_result": "unfinished", "bad_metrics": "completed", "bad_config": "completed",
        "bad_layers": "completed", "odd": "exploded",
    }  # fmt: skip
    notes = {n: " | ".join(r.notes) for n, r in runs.items()}
    assert notes["whole"] == notes["going"] == notes["old"] == ""
    assert notes["torn"] == "metrics.csv: 2 damaged lines left out"
    assert notes["begun"] == "no metrics.csv"
    assert notes["bad_result"] == "result.json cannot be read"
    assert "expected the columns of a run's metrics" in notes["bad_metrics"]
    assert notes["bad_config"] == "config.toml cannot be read"
    assert "layers.csv: line 1" in notes["bad_layers"] and "step_40.json cannot be read" in notes["bad_layers"]
    assert notes["odd"] == "status 'exploded' is unknown"
    assert runs["old"].result["best_val_loss"] == 3.6 and runs["going"].result["best_step"] == 40
    assert not runs["going"].counts, "an unfinished run is not ranked"
    text = page(report)
    assert "metrics.csv: 2 damaged lines left out" in text and "exploded" in text
    write_pictures(report, tmp_path, overwrite=False)
    write_csv(report, tmp_path, overwrite=False)


def test_a_sweep_whose_files_are_damaged(ablation: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ablation, broken)
    (broken / "results.json").write_text("[{")
    (broken / "sweep.toml").write_text("question = ")
    report = read_report([broken])
    assert len(report.runs) == 12 and not any(r.asked and r.asked.question for r in report.runs)
    (broken / "results.json").write_text(
        json.dumps([{"name": "gone", "status": "completed", "run_dir": 3}, 7, {"x": 1}])
    )
    (broken / "trials.json").write_text(json.dumps({"trials": [{"name": "to come", "changes": {"seed": 9}}]}))
    runs = {r.name: r for r in read_report([broken]).runs}
    assert runs["gone"].notes == ["has not begun"] and runs["to come"].status == "unreadable"


def test_runs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder; expected a run or a sweep"):
        read_report([tmp_path / "none"])
    with pytest.raises(FileError, match="found no run"):
        read_report([tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="found a file"):
        read_report([tmp_path / "file"])


def step(number: int, loss: float | None, val_loss: float | None = None) -> Row:
    return Row(number, number, 1.0, loss=loss, lr=1e-3, val_loss=val_loss)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        # fp16: the first and the last update overflowed, and there is no validation
        ([Row(0, 0, 0.0), step(1, None), step(2, 4.0), step(3, 3.5), step(4, None)],
         {"step": "4 of 4", "training loss": "3.5000 at step 3: later ones are not finite"}),
        ([Row(0, 0, 0.0), step(1, float("inf")), step(2, None)],
         {"step": "2 of 4", "training loss": "none that is finite"}),
        ([Row(0, 0, 0.0), step(1, 3.0)], {"step": "1 of 4", "training loss": "3.0000"}),  # one point: no height
        ([step(0, None, 800.0), step(1, 790.0), step(2, 5.0, 4.0)],
         {"validation loss": "4.0000", "best": "4.0000 at step 2"}),
        # a perfect loss is the best one, and of equal ones the first
        ([step(0, None, 4.0), step(1, 1.0, 0.0), step(2, 0.5, 0.0), step(3, 0.5, 0.2)],
         {"validation loss": "0.2000", "best": "0.0000 at step 1"}),
        # the first losses are not there to say how high the picture goes, and the run has diverged
        ([Row(0, 0, 0.0), step(1, None), step(2, None), step(3, 4.0), step(4, 900.0)], {"training loss": "900.0000"}),
        ([Row(0, 0, 0.0)], {"step": "0 of 4", "training loss": "none that is finite"}),
    ],
)  # fmt: skip
def test_runs_whose_numbers_are_not_all_there(tmp_path: Path, rows: list[Row], told: dict[str, str]) -> None:
    write_run(tmp_path / "run", rows=rows, max_steps=4)
    write_run(tmp_path / "other")
    said = dict(summary(the_run(tmp_path / "run")))
    assert {k: said[k] for k in told} == told
    assert ("best" in said) is any(r.val_loss is not None for r in rows)
    for paths in ([tmp_path / "run"], [tmp_path]):
        report = read_report(paths)
        page(report)
        if "loss" in pictures(report):
            write_picture(lambda f, r=report: draw_losses(f, r), tmp_path / "x.png", overwrite=True)
            assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_a_number_beyond_all_floats_is_none(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run")
    told = json.loads((place / "result.json").read_text())
    (place / "result.json").write_text(json.dumps({**told, "tokens": 10**400}))
    page(report := read_report([tmp_path]))
    assert report.runs[0].number("tokens") is None and report.runs[0].number("steps") is not None


@pytest.mark.parametrize("status", ["early_stopped", "diverged", "interrupted"])
def test_runs_that_ended_early_are_drawn_with_their_evaluations(tmp_path: Path, status: str) -> None:
    rows = [step(0, None, 4.1), step(1, 4.0), step(2, 3.5, 3.6), step(3, 3.4), step(4, 3.3, 3.9), step(5, 9.0)]
    run = the_run(write_run(tmp_path / "run", rows=rows, status=status, max_steps=1000))
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    _draw_losses(axes, run, "#000000", alone=True)
    (curve,) = [line for line in axes.get_lines() if str(line.get_label()).startswith("validation")]
    assert [*map(float, curve.get_xdata())] == [0, 2, 4] and [*map(float, curve.get_ydata())] == [4.1, 3.6, 3.9]
    assert curve.get_label() == "validation, best 3.600"
    said = dict(summary(run))
    assert (said["status"], said["step"], said["best"]) == (status, "5 of 1,000", "3.6000 at step 2")


def test_a_run_that_ends_by_time_has_no_last_step(tmp_path: Path) -> None:
    rows = [step(0, None, 4.0), step(1, 3.9), step(2, 3.8, 3.7)]
    run = the_run(write_run(tmp_path / "run", rows=rows, result=False, max_time=60, max_steps=10**9))
    assert dict(summary(run))["step"] == "2"


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_has_everything(ablation: Path, rates: Path) -> None:
    text = page(read_report([ablation]))
    for words in ("What do positions buy?", "Runs", "Differences", "Stability", "Layers", "Samples", "Set-up",
                  "Validation loss", "Training loss", "Over-fitting", "Learning rate", "Gradient norm", "Throughput",
                  "Difference to the baseline", "not distinguishable", "Configuration that all runs share",
                  "out of memory: tried to allocate", "still falling", "cpu, fp32"):  # fmt: skip
        assert words in text, words
    assert "Loss against learning rate" not in text and "Loss against learning rate" in page(read_report([rates]))
    data = data_of(text)
    assert len(data["runs"]) == 12 and len(data["layers"]) == 11 and len(data["deltas"]) == 3
    assert {len(r["curves"]["loss"][0]) for r in data["runs"] if r["curves"]} == {40}


def test_only_differing_fields_have_columns(ablation: Path) -> None:
    head = page(read_report([ablation])).partition("<thead>")[2].partition("</thead>")[0]
    shown = re.findall(r">([^<>]+)</button>", head)
    assert shown[:6] == ["run", "seed", "qk_norm", "position", "norm", "status"]
    assert "d_model" not in shown and "out_dir" not in shown


def test_the_page_loads_nothing_and_runs_nothing_but_its_own(ablation: Path) -> None:
    text = page(read_report([ablation]))
    assert "default-src 'none'" in text
    without_svg = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|url\((?!#)|@import|<link|<iframe|\bimport\(|fetch\(|XMLHttp", without_svg)


@pytest.mark.parametrize("name", ["a<b>&c", "ünïcödé 火", "\"quoted\" 'name'", "x_{$", "</script><script>alert(1)"])
def test_text_of_runs_is_never_markup(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.replace("/", "\u2215")
    write_run(folder, samples={EVIL: EVIL}, seed=1)
    write_result(folder, "completed", why=EVIL, device=EVIL, best_val_loss=3.0)
    write_run(tmp_path / "other", seed=2)
    report = read_report([folder, tmp_path / "other"], title=f"{name} {EVIL}")
    text = page(report)
    assert text.count("<script") == 2 and text.count("</script>") == 2, "the data and the code"
    assert "<img" not in text and "onerror=alert(1)>" not in text
    assert data_of(text)["runs"][0]["name"] == folder.name
    write_page(report, tmp_path / "x.html", overwrite=False)
    write_picture(pictures(report)["loss"], tmp_path / "x.png", overwrite=False)


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    folder = tmp_path / "a\udcff"
    write_run(tmp_path / "a")
    try:
        (tmp_path / "a").rename(folder)
    except OSError:
        return  # a file system that takes Unicode names only
    write_page(read_report([folder]), tmp_path / "x.html", overwrite=False)
    assert "a?" in (tmp_path / "x.html").read_text("utf-8")


def test_writing(ablation: Path, tmp_path: Path) -> None:
    report = read_report([ablation])
    write_page(report, tmp_path / "a.html", overwrite=False)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_page(report, tmp_path / "a.html", overwrite=False)
    with pytest.raises(FileError, match="no such folder"):
        write_page(report, tmp_path / "no/a.html", overwrite=False)
    with pytest.raises(ConfigError, match=r"expected \.png"):
        write_picture(lambda f: draw_losses(f, report), tmp_path / "x.jpg", overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_every_picture(ablation: Path, rates: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "r").mkdir()
    drawn = {p.stem for p in write_pictures(read_report([ablation]), tmp_path / "a", overwrite=False)}
    assert drawn == {
        "loss",
        "differences",
        "overfitting",
        "schedule",
        "gradient_norm",
        "throughput",
        "layers",
        "gradient_sizes",
        "validation_accuracy",
    }
    drawn = {p.stem for p in write_pictures(read_report([rates]), tmp_path / "r", overwrite=False)}
    assert "loss_against_lr" in drawn and "layers" not in drawn
    assert all(p.read_bytes().startswith(PNG) for p in tmp_path.glob("*/*.png"))


def test_tables(ablation: Path, tmp_path: Path) -> None:
    write_csv(read_report([ablation]), tmp_path, overwrite=False)
    with (tmp_path / "report_runs.csv").open(newline="") as f:
        runs = list(csv.DictReader(f))
    assert len(runs) == 12 and runs[3]["run"] == "same,seed=1" and runs[3]["qk_norm"] == "True"
    assert float(runs[0]["best_val_loss"]) == pytest.approx(3.0, abs=0.05)
    assert runs[-1]["status"] == "failed" and "out of memory" in runs[-1]["note"]
    with (tmp_path / "report_differences.csv").open(newline="") as f:
        verdicts = {r["variant"]: (r["verdict"], r["test"]) for r in csv.DictReader(f)}
    assert verdicts["same"] == ("not distinguishable", "paired") and verdicts["base"] == ("", "")
    with (tmp_path / "report_curves.csv").open(newline="") as f:
        curves = list(csv.DictReader(f))
    seen = [r for r in curves if r["run"] == "base,seed=1" and r["curve"] == "val_loss"]
    assert [int(r["step"]) for r in seen] == [0, 10, 20, 30, 40]
    with pytest.raises(OutputExistsError):
        write_csv(read_report([ablation]), tmp_path, overwrite=False)


def test_several_sweeps(ablation: Path, rates: Path) -> None:
    report = read_report([ablation, rates])
    assert {g.name.split(":")[0] for g in report.groups} == {"ablation", "rates"} | {
        g.name for g in report.groups if ":" not in g.name
    }
    assert report.question == "What do positions buy? Which rate?"
    page(report)


def test_a_report_of_nothing_but_failures(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", {"a": (None, {"lr": 1.0}, -1), "b": (None, {"lr": 2.0}, -1)})
    report = read_report([folder])
    said = "No run has a validation loss, so none can be called best. Not ranked: 2 failed (of 2 runs)."
    assert report.answer == said
    assert "No run has a step yet." in page(report)
    with pytest.raises(FileError, match="found no step"):
        write_pictures(report, tmp_path, overwrite=False)
    assert isinstance(report, Report)


@pytest.mark.alone
@pytest.mark.slow
def test_200_runs_of_40_000_steps(tmp_path: Path) -> None:
    """Under 20 s and below 10 MB, and the planted spike is on the page."""
    folder = write_large(tmp_path / "large", 200, 40_000)
    began = time.perf_counter()
    report = read_report([folder])
    write_page(report, tmp_path / "x.html", overwrite=False)
    took, size = time.perf_counter() - began, (tmp_path / "x.html").stat().st_size
    print(f"200 runs x 40,000 steps: {took:.1f} s, {size / 1e6:.2f} MB, {report.points} points a curve")
    assert len(report.runs) == 200 and all(r.steps == 40_000 for r in report.runs)
    assert all(12_345 in r.curves["loss"].x for r in report.runs)
    assert size < 10e6
    assert took < 20
