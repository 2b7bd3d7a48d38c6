"""The learning-rate searches: presets as published, the schedule's formula, files, fields, pictures, who may win."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytekiln import cli_sweep
from bytekiln.accounting import flops_per_token
from bytekiln.config import load_config
from bytekiln.experiments import catalogue
from bytekiln.experiments.figures import Drawn, metrics_of, save, search_figure
from bytekiln.experiments.lr_search import drawn_of, model_name, recommendation, result_file, result_of, write_search
from bytekiln.report.groups import best_group, grouped
from bytekiln.report.runs import Run
from bytekiln.schedule import Progress, learning_rate
from bytekiln.sweep.coordinate import work
from bytekiln.sweep.results import TrialResult
from bytekiln.sweep.spec import changed, load_spec, trials_of
from experiment_runs import DATA, FLAGS, Trains, write_data
from sweep_driver import run_here

RULED = (
    "val_loss val_accuracy val_perplexity learning_rate model_name training_time_minutes parameter_count "
    "parameters_millions total_steps best_val_loss best_step early_stopped final_train_loss final_lr"
).split()
ADVICE = "best_learning_rate best_result all_results search_time_minutes recommendation".split()
PUBLISHED = {
    "d_model": 512, "num_heads": 8, "num_layers": 12, "context_length": 256, "batch_size": 128, "max_tokens": 100_000,
    "num_documents": 1000, "grad_accum_steps": 4, "weight_decay": 0.1, "dropout": 0.1, "grad_clip": 1.0,
    "tie_embeddings": True, "optimizer": "muon", "warmup_fraction": 0.05, "schedule": "cosine", "min_lr_ratio": 0.1,
    "max_steps": 10_000,
}  # fmt: skip
EXPERTS = {"ffn": "moe", "d_ff": 2048, "num_experts": 8, "expert_top_k": 2, "load_balancing": "loss",
           "load_balancing_weight": 0.01, "router_noise": 0.1}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A working directory with text that has been tokenized."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def search(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`search("lr-search-quick", …, status=0)`: the command, its runs trained here; (stdout, stderr)."""

    monkeypatch.setattr(cli_sweep, "analysed", lambda *_: nullcontext())  # has tests of its own

    def run(*argv: object, status: int = 0, begins: Trains | None = None) -> tuple[str, str]:
        return run_here(monkeypatch, capsys, cli_sweep, begins or Trains(), argv, status)

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


# --- what is asked ------------------------------------------------------------------------------------------------


def test_the_model_and_its_dense_twin_are_as_published() -> None:
    experts, dense = load_config("exp9"), load_config("exp9-dense")
    flat, twin = experts.flat(), dense.flat()
    assert {k: flat[k] for k in PUBLISHED | EXPERTS} == PUBLISHED | EXPERTS
    assert {k: twin[k] for k in PUBLISHED} == PUBLISHED
    assert twin["ffn"] == flat["expert_ffn"] and twin["d_ff"] == 2 * 2048
    assert {k for k in flat if flat[k] != twin[k]} <= {*EXPERTS, "expert_ffn", "preset"}
    shapes = [c.with_(vocab_size=10_000).model for c in (experts, dense)]
    work = [flops_per_token(shape) for shape in shapes]
    assert work[0] == pytest.approx(work[1], rel=1e-3), "but for the router, as much work a token"
    smaller = load_config("exp9-dense", {"d_ff": 64}).model
    assert smaller.d_ff == 128, "two experts' width, whatever theirs is"


@pytest.mark.parametrize(
    ("name", "rates", "steps", "interval", "patience", "folder"),
    [
        ("lr-search-quick", [1e-4, 3e-4, 1e-3, 3e-3], 1000, 50, 3, "exp9_quick_lr_search"),
        ("lr-search-full", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2], 2000, 100, 5, "exp9_lr_search"),
    ],
)
def test_the_searches_are_as_published(
    name: str, rates: list[float], steps: int, interval: int, patience: int, folder: str
) -> None:
    spec = load_spec(name)
    configs = [t.config for t in trials_of(spec)]
    assert [c.optimizer.lr for c in configs] == rates and str(spec.folder) == folder
    for c in configs:
        t = c.training
        assert (t.max_steps, t.eval_interval, t.early_stopping_patience) == (steps, interval, patience)
        assert c.optimizer.floor_lr == pytest.approx(c.optimizer.lr / 10) and c.model.ffn == "moe"
        assert {k: v for k, v in c.flat().items() if k in PUBLISHED} == {**PUBLISHED, "max_steps": steps}
    small = changed(spec, scale="cpu")
    assert str(small.folder) == f"{folder}-cpu" and len(trials_of(small)) == len(rates)
    assert trials_of(small)[0].config.model.ffn == "moe" and catalogue.after(small) is not None


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("step", [100, 101, 500, 1050, 1999, 2000])
def test_the_schedule_is_the_published_formula(step: int, accumulation: int) -> None:
    """Warm-up over 5 % of the optimizer's steps, whatever the micro-steps, then the cosine to a tenth."""
    peak, total = 3e-3, 2000
    config = load_config("exp9", {"lr": peak, "max_steps": total, "grad_accum_steps": accumulation})
    progress = (step - 0.05 * total) / (total - 0.05 * total)
    expected = peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    assert learning_rate(Progress(step, total), config) == pytest.approx(expected, rel=1e-12)
    for early in (0, 1, 50, 99):
        assert learning_rate(Progress(early, total), config) == pytest.approx(peak * early / 100, rel=1e-12)


# --- what comes of it ---------------------------------------------------------------------------------------------


def test_a_search_leaves_the_tree_and_the_fields(search, here: Path) -> None:
    """Three rates, one of them far beyond what can be trained."""
    flags = [*DATA, *FLAGS, "--lrs", "1e-2 2.512e-4 1e30"]
    out, err = search("lr-search-quick", *flags)
    folder = here / "exp9_quick_lr_search"
    names = [f"lr_{lr}_result.json" for lr in ("1.00e+30", "1.00e-02", "2.512e-4")]
    assert sorted(p.name for p in (folder / "results").iterdir()) == names
    assert {"lr_search_results.json", "lr_recommendation.json", "lr_search_comparison.png"} <= {
        p.name for p in folder.iterdir()
    }
    summary, told = read(folder / "lr_search_results.json"), read(folder / "lr_recommendation.json")
    assert set(told) == set(ADVICE) and told["all_results"] == summary["results"]
    assert [read(folder / "results" / n) for n in (names[1], names[2], names[0])] == summary["results"]
    for entry in summary["results"]:
        assert set(RULED) <= set(entry)
    by_rate = {e["learning_rate"]: e for e in summary["results"]}
    assert by_rate[1e30]["status"] == "diverged" and by_rate[1e30]["total_steps"] < 6
    good = [e for e in summary["results"] if e["status"] == "completed"]
    assert len(good) == 2
    for e in good:
        assert e["model_name"] == "exp9" and e["total_steps"] == 6 and e["early_stopped"] is False
        assert e["val_perplexity"] == pytest.approx(math.exp(e["val_loss"])) and 0 <= e["val_accuracy"] <= 1
        assert e["parameters_millions"] == e["parameter_count"] / 1e6 and e["training_time_minutes"] > 0
        assert e["best_val_loss"] <= e["val_loss"] and e["final_train_loss"] > 0
        assert e["best_step"] in (2, 4, 6)
        last = (5 - 0.3) / (6 - 0.3)  # the rate of the sixth step
        assert e["final_lr"] == pytest.approx(
            e["learning_rate"] * (0.1 + 0.45 * (1 + math.cos(math.pi * last))), rel=1e-6
        )
    best = min(good, key=lambda e: e["best_val_loss"])
    assert told["best_result"] == best and told["best_learning_rate"] == best["learning_rate"] == 1e-2
    assert "learning rate of 1e-2" in told["recommendation"] and "1e30 (diverged)" in told["recommendation"]
    assert told["recommendation"] in err and "best: lr=1e-2" in out
    steps, rates = metrics_of(folder / "runs/lr=1e-2").of("lr")  # type: ignore[union-attr]
    config = load_config(folder / "runs/lr=1e-2/config.toml")
    assert rates == pytest.approx([learning_rate(Progress(int(s) - 1, 6), config) for s in steps])
    begun = Trains()
    search("lr-search-quick", *flags, begins=begun)
    assert begun.started == [], "what has ended stays"


def test_interrupted_it_leaves_what_there_is_and_goes_on(search, here: Path) -> None:
    flags = [*DATA, *FLAGS, "--lrs", "1e-3 1e-2 2e-2"]
    search("lr-search-quick", *flags, status=130, begins=Trains(stop="lr=1e-2"))
    folder = here / "exp9_quick_lr_search"
    told = read(folder / "lr_recommendation.json")
    assert [e["status"] for e in told["all_results"]] == ["completed", "interrupted", "pending"]
    assert told["best_learning_rate"] == 1e-3 and "Provisional: 2 of 3 runs" in told["recommendation"]
    assert sorted(p.name for p in (folder / "results").iterdir()) == [
        "lr_1.00e-02_result.json",
        "lr_1.00e-03_result.json",
    ]
    before = (folder / "lr_search_comparison.png").read_bytes()
    begun = Trains()
    search("lr-search-quick", *flags, begins=begun)
    assert begun.started == ["lr=1e-2", "lr=0.02"]
    told = read(folder / "lr_recommendation.json")
    assert {e["status"] for e in told["all_results"]} == {"completed"} and "Provisional" not in told["recommendation"]
    assert len(list((folder / "results").iterdir())) == 3
    assert (folder / "lr_search_comparison.png").read_bytes() != before
    search("lr-search-quick", *DATA, *FLAGS, "--lrs", "2e-3", "--overwrite")
    assert [p.name for p in (folder / "results").iterdir()] == ["lr_2.00e-03_result.json"], (
        "no file of what was replaced"
    )


@pytest.mark.parametrize("name", ["lr-search-quick", "lr-search-full", "exp9"])
def test_without_data_it_says_how_to_make_it(search, tmp_path: Path, name: str) -> None:
    _, err = search(name, status=2, begins=(begun := Trains()))
    assert "make it with: bpe-train --dataset tinystories && bpe-encode --dataset tinystories" in err
    assert err.count("\n") == 1 and begun.started == [] and not list(tmp_path.glob("exp9_*"))


def test_every_run_failed_is_one_and_no_recommendation(search, here: Path) -> None:
    codes = {"lr=1e-3": 1, "lr=1e-2": 1}
    search("lr-search-quick", *DATA, *FLAGS, "--lrs", "1e-3 1e-2", status=1, begins=Trains(codes))
    told = read(here / "exp9_quick_lr_search/lr_recommendation.json")
    assert told["best_learning_rate"] is None and told["best_result"] is None
    assert "No learning rate can be recommended" in told["recommendation"]
    assert [e["error"] for e in told["all_results"]] == ["oh dear", "oh dear"]


def test_a_search_without_a_rate_to_recommend_is_no_success(search, here: Path) -> None:
    lost = {"lr=1e-3": 3, "lr=1e-2": 3}
    search("lr-search-quick", *DATA, *FLAGS, "--lrs", "1e-3 1e-2", "--then", "touch ran", status=1, begins=Trains(lost))
    assert not (here / "ran").exists()
    lost = {"lr=1e-3,seed=2": 3, "lr=1e-2,seed=1": 3}
    rates = ("--lrs", "1e-3 1e-2", "--seeds", "2")
    search("lr-search-quick", *DATA, *FLAGS, *rates, "--overwrite", status=4, begins=Trains(lost))
    assert read(here / "exp9_quick_lr_search/lr_recommendation.json")["best_learning_rate"] is None


def test_a_worker_that_outlives_its_search_writes_its_files(
    search, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = here / "exp9_quick_lr_search"
    search("lr-search-quick", *DATA, *FLAGS, "--lrs", "1e-3 1e-2", status=130, begins=Trains(stop="lr=1e-3"))
    assert read(folder / "lr_recommendation.json")["best_learning_rate"] is None
    monkeypatch.setattr(cli_sweep, "work", functools.partial(work, start=Trains()))
    search("worker", folder)
    told = read(folder / "lr_recommendation.json")
    assert told["best_learning_rate"] in (1e-3, 1e-2) and "Provisional" not in told["recommendation"]


def test_what_killed_writers_left_goes(search, here: Path) -> None:
    folder = here / "exp9_quick_lr_search"
    search("lr-search-quick", *DATA, *FLAGS, "--lrs", "1e-3")
    for name in ("lr_recommendation.json", "results/lr_1.00e-03_result.json"):
        (path := folder / name).with_name(f".{path.name}.{2**22 + 1}.tmp").touch()
    search("lr-search-quick")
    assert not [*folder.rglob(".*.tmp")]


# --- who wins -----------------------------------------------------------------------------------------------------


def trial(lr: float, status: str = "completed", **values: Any) -> TrialResult:
    told = {"best_val_loss": 2.0, "final_val_loss": 2.0, "best_step": 4, "steps": 6, "elapsed_time": 60.0}
    changes: dict[str, Any] = {"lr": lr}
    return TrialResult(f"lr={lr}", None, changes, lr, f"{lr:g}", lr / 10, 42, status, **{**told, **values})


def advised(*results: TrialResult) -> dict[str, Any]:
    return recommendation(results, [result_of(r, None, "exp9") for r in results])


def test_the_best_loss_decides_not_the_last() -> None:
    told = advised(
        trial(1e-4, best_val_loss=2.2, final_val_loss=2.2),
        trial(1e-3, "early_stopped", best_val_loss=2.1, final_val_loss=5.0),
        trial(1e-2, best_val_loss=2.3, final_val_loss=2.3),
    )
    assert told["best_learning_rate"] == 1e-3 and told["best_result"]["early_stopped"] is True
    assert told["best_result"]["val_loss"] == 5.0 and told["search_time_minutes"] == 3.0
    assert "Early stopping ended 1e-3; their best loss counts" in told["recommendation"]
    assert "rate tried" not in told["recommendation"]


@pytest.mark.parametrize("status", ["diverged", "failed", "interrupted", "running", "pending"])
def test_a_run_that_did_not_end_well_never_wins(status: str) -> None:
    lost = trial(1e-2, status, best_val_loss=0.5)
    told = advised(trial(1e-3, best_val_loss=2.5), lost)
    assert told["best_learning_rate"] == 1e-3 and "lowest rate tried; a lower one" in told["recommendation"]
    assert ("Provisional" in told["recommendation"]) == (status in ("interrupted", "running", "pending"))
    alone = advised(lost)
    assert alone["best_learning_rate"] is None and alone["best_result"] is None
    assert "1e-2 " + status in alone["recommendation"]


def seeded(lr: float, *losses: float | None) -> list[TrialResult]:
    """A rate with seeds 42, 43 …; None: that one diverged after it had seen 0.5."""
    return [
        dataclasses.replace(
            trial(lr, "diverged" if loss is None else "completed", best_val_loss=0.5 if loss is None else loss),
            name=f"lr={lr:g},seed={seed}", seed=seed, changes={"lr": lr, "seed": seed},
        )
        for seed, loss in enumerate(losses, start=42)
    ]  # fmt: skip


def test_a_rate_with_a_seed_that_diverged_is_not_recommended() -> None:
    told = advised(*seeded(3e-4, 2.55, 2.55), *seeded(1e-3, 2.50, None), *seeded(1e-4, 2.7, 2.7))
    assert told["best_learning_rate"] == told["best_result"]["learning_rate"] == 3e-4
    assert "2.5500 in the mean of 2 seeds (2.5500 and 2.5500)" in told["recommendation"]
    assert "Out of the running: 1e-3 with seed 43 (diverged)." in told["recommendation"]
    assert "rate tried" not in told["recommendation"]
    none = advised(*seeded(1e-3, 2.50, None), *seeded(3e-4, None, 2.6))
    assert none["best_learning_rate"] is None and none["best_result"] is None
    assert "no rate has ended with one for every seed (1e-3 completed, 1e-3 diverged" in none["recommendation"]


def test_the_mean_over_seeds_decides_not_the_luckiest_run() -> None:
    told = advised(*seeded(3e-4, 2.60, 2.62), *seeded(1e-3, 2.50, 2.95))
    assert told["best_learning_rate"] == 3e-4 and "is the lowest" in told["recommendation"]
    edge = advised(*seeded(3e-4, 2.80, 2.82), *seeded(1e-3, 2.50, 2.95))
    assert edge["best_learning_rate"] == 1e-3 and edge["best_result"]["best_val_loss"] == 2.5
    assert "It is the highest rate tried; a higher one may be better." in edge["recommendation"]


def test_the_best_line_of_a_sweep_ranks_as_the_report_does() -> None:
    runs = [*seeded(3e-4, 2.60, 2.62), *seeded(1e-3, 2.50, 2.95), *seeded(3e-3, 2.1, None)]
    assert "\nbest: lr=0.0003, validation loss 2.6100, the mean of 2 seeds" in cli_sweep.summary(runs)
    nothing: dict[str, Any] = {f.name: None for f in dataclasses.fields(Run)}
    known = [{"name": r.name, "status": r.status, "result": vars(r), "config": r.changes, "changes": {}} for r in runs]
    best = best_group(grouped([Run(**{**nothing, "resolved": True, **told}) for told in known]))
    assert best is not None and best.mean == pytest.approx(2.61)
    assert "best: none; of no setting has every seed" in cli_sweep.summary(seeded(3e-3, 2.1, None))
    assert "best: lr=3e-4, validation loss 2.6000 at step 4" in cli_sweep.summary(
        [dataclasses.replace(seeded(3e-4, 2.60)[0], name="lr=3e-4")]
    )


def test_names_of_files_are_exact() -> None:
    assert result_file(trial(1e-4)) == "lr_1.00e-04_result.json"
    assert result_file(trial(1.2e-3)) == "lr_1.20e-03_result.json"
    assert result_file(trial(2.512e-4)) == "lr_2.512e-4_result.json", "two digits would be another rate"
    twice = dataclasses.replace(trial(1e-3), changes={"lr": 1e-3, "seed": 2})
    assert result_file(twice) == "lr_1.00e-03_seed2_result.json"
    assert result_file(dataclasses.replace(twice, variant="no-rope")) == "lr_1.00e-03_no-rope_seed2_result.json"


def test_results_name_the_model() -> None:
    spec = load_spec("lr-search-quick")
    assert model_name(spec) == "exp9" and model_name(changed(spec, given={"dense_twin": True})) == "exp9-dense"
    assert model_name(spec.model_copy(update={"base": {"preset": "exp9-dense", "dense_twin": True}})) == "exp9-dense"


def test_what_is_not_finite_is_null() -> None:
    entry = result_of(trial(1.0, "diverged", final_val_loss=9e9, best_val_loss=float("nan")), None, "exp9")
    assert entry["val_perplexity"] is None and entry["best_val_loss"] is None and entry["final_lr"] is None
    json.dumps(entry, allow_nan=False)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_the_comparison_has_four_panels(search, here: Path) -> None:
    search("lr-search-quick", *DATA, *FLAGS, "--lrs", "1e-3 1e-2 1e30")
    folder = here / "exp9_quick_lr_search"
    results = [trial(1e-3, best_val_loss=2.4), trial(1e-2), trial(1e30, "diverged")]
    names = ("lr=1e-3", "lr=1e-2", "lr=1e30")
    drawn = [
        drawn_of(r, metrics_of(folder / "runs" / n), wins=n == "lr=1e-2") for r, n in zip(results, names, strict=True)
    ]
    figure = search_figure(drawn, "a search")
    assert len(figure.axes) == 4
    validation, losses, training, schedules = figure.axes
    assert [a.get_xlabel() for a in figure.axes] == ["step", "learning rate", "step", "step"]
    assert losses.get_xscale() == "log" and schedules.get_yscale() == "log"
    assert [t.get_text() for t in validation.get_legend().get_texts()] == ["1e-3", "1e-2 (best)", "1e30, diverged"]
    assert len(training.lines) == len(schedules.lines) == 3
    best = losses.lines[0]
    assert list(best.get_xdata()) == [1e-3, 1e-2] and list(best.get_ydata()) == [2.4, 2.0], (
        "a diverged run has no point"
    )
    assert "diverged" in [line.get_label() for line in losses.lines]
    rates = np.asarray(schedules.lines[1].get_ydata())
    assert rates.max() == pytest.approx(metrics_of(folder / "runs/lr=1e-2").of("lr")[1].max())  # type: ignore[union-attr]
    empty = search_figure([], "nothing yet")
    assert len(empty.axes) == 4
    png = (folder / "lr_search_comparison.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000


@pytest.mark.parametrize("statuses", [("interrupted", "pending"), ("pending", "pending"), ("diverged",), ()])
def test_a_picture_of_runs_without_a_loss_warns_of_nothing(tmp_path: Path, statuses: tuple[str, ...]) -> None:
    rates = [1e-3 * 10**i for i in range(len(statuses))]
    runs = [Drawn(f"{lr:g}", lr, s, None, None, None, False, None) for lr, s in zip(rates, statuses, strict=True)]
    save(search_figure(runs, "t"), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_files_are_written_of_runs_without_metrics(tmp_path: Path) -> None:
    said: list[str] = []
    spec = load_spec("lr-search-quick")
    results = [trial(1e-3), trial(1e-2, "pending", best_val_loss=None, final_val_loss=None)]
    write_search(spec, tmp_path, results, said.append)
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["lr_1.00e-03_result.json"]
    assert read(tmp_path / "lr_search_results.json")["best_learning_rate"] == 1e-3
    assert len(said) == 2 and "lr_recommendation.json" in said[1]
