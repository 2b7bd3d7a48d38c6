"""`lm-sweep exp9`: search, long run, HellaSwag; taken up at every stage; what it refuses before the first step."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bytekiln.config import load_config
from bytekiln.errors import BytekilnError
from bytekiln.experiments import exp9 as module
from bytekiln.experiments import hellaswag
from bytekiln.experiments.figures import long_figure, metrics_of
from bytekiln.experiments.lr_search import drawn_of
from bytekiln.score.runs import score_benchmark
from bytekiln.score.scorer import open_scorer
from bytekiln.sweep.results import read_results
from experiment_runs import DATA, FLAGS, Trains, write_data
from sweep_driver import run_here
from test_experiments_lr_search import RULED

ANSWERED = (
    "model_name benchmark accuracy acc_norm stderr interval evaluation_time_seconds status total_questions "
    "correct_predictions"
).split()
RATES = ("--lrs", "1e-3 1e-2")
ASK = (*DATA, *FLAGS, "--hellaswag", "h.jsonl", "--long-steps", "8")
WHOLE = (*ASK, *RATES)
SEARCHED = {"lr=1e-3": 0, "lr=1e-2": 0}
"""Names of the search's runs."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A working directory with text that has been tokenized, and questions."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def exp9(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`exp9(…, status=0)`: the command, its runs trained here; (stdout, stderr)."""

    monkeypatch.setattr(module, "analysed", lambda *_: nullcontext())  # has tests of its own

    def run(*argv: object, status: int = 0, begins: Trains | None = None) -> tuple[str, str]:
        return run_here(monkeypatch, capsys, module, begins or Trains(), ["exp9", *argv], status)

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_all_of_it_and_nothing_twice(exp9, here: Path) -> None:
    begun = Trains()
    out, _ = exp9(*WHOLE, begins=begun)
    assert begun.started == [*SEARCHED, "base"]
    search, long = here / "exp9_lr_search", here / "exp9_results_best_lr"
    files = {"results", "lr_search_results.json", "lr_recommendation.json", "lr_search_comparison.png"}
    assert files <= {p.name for p in search.iterdir()}
    told = {"checkpoints", "hellaswag_benchmark", "exp9_long_term_results.json", "exp9_long_term_training_curves.png"}
    assert told <= {p.name for p in long.iterdir()}
    assert {"checkpoint_best", "checkpoint_final"} <= {p.name for p in (long / "checkpoints").iterdir()}
    best = read(search / "lr_recommendation.json")["best_learning_rate"]
    result = read(long / "exp9_long_term_results.json")
    assert set(RULED) <= set(result) and result["learning_rate"] == best and result["total_steps"] == 8
    config = load_config(long / "runs/base/config.toml")
    assert config.training.early_stopping_patience == 0 and config.training.eval_interval == 5 * 2
    assert config.optimizer.lr == best and config.optimizer.floor_lr == pytest.approx(best / 10)
    answers = read(long / "hellaswag_benchmark/hellaswag_results.json")
    assert set(ANSWERED) <= set(answers) and answers["total_questions"] == 12 and answers["model_name"] == "exp9"
    by_hand = score_benchmark(open_scorer(str(long / "checkpoints/checkpoint_best")), "hellaswag", "h.jsonl").result
    for name in ("accuracy", "acc_norm", "stderr", "interval", "correct_predictions", "model_checksum"):
        assert answers[name] == by_hand[name], "the model has answered"
    assert f"HellaSwag accuracy: {100 * answers['accuracy']:.2f} %" in out and "12 of 12 questions" in out
    written = [(p, p.stat().st_mtime_ns) for p in long.rglob("hellaswag_*")]
    again = Trains()
    assert exp9(*WHOLE, begins=again)[0] == out
    assert again.started == [] and [(p, p.stat().st_mtime_ns) for p in long.rglob("hellaswag_*")] == written


def test_stopped_in_every_stage_the_same_command_goes_on(exp9, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = here / "exp9_results_best_lr"
    exp9(*WHOLE, status=130, begins=Trains(stop="lr=1e-2"))
    assert not long.exists() and (here / "exp9_lr_search/runs/lr=1e-2/checkpoints/checkpoint_2").is_dir()
    begun = Trains(stop="base")
    exp9(*WHOLE, status=130, begins=begun)
    assert begun.started == ["lr=1e-2", "base"]
    assert read(long / "exp9_long_term_results.json")["status"] == "interrupted"
    assert read(long / "exp9_long_term_results.json")["total_steps"] == 2
    assert not (long / "hellaswag_benchmark").exists()

    def stopped(*args: Any, progress: Any, **how: Any) -> Any:
        def told(done: int, total: int) -> None:
            if done:
                raise KeyboardInterrupt

        return score_benchmark(*args, progress=told, **how)

    begun = Trains()
    with monkeypatch.context() as m:
        m.setattr(hellaswag, "score_benchmark", stopped)
        exp9(*WHOLE, status=130, begins=begun)
    assert begun.started == ["base"] and read(long / "exp9_long_term_results.json")["status"] == "completed"
    records = long / "hellaswag_benchmark/hellaswag_records.jsonl"
    kept = records.read_text("utf-8")
    assert kept.count("\n") > 1 and not (long / "hellaswag_benchmark/hellaswag_results.json").exists()
    begun = Trains()
    exp9(*WHOLE, begins=begun)
    assert begun.started == [] and records.read_text("utf-8").startswith(kept)
    assert read(long / "hellaswag_benchmark/hellaswag_results.json")["total_questions"] == 12


@pytest.mark.parametrize(("code", "how"), [(3, "diverged"), (1, "failed")])
def test_without_any_rate_there_is_no_long_run(exp9, here: Path, code: int, how: str) -> None:
    begun = Trains(dict.fromkeys(SEARCHED, code))
    _, err = exp9(*WHOLE, status=1, begins=begun)
    assert begun.started == list(SEARCHED) and not (here / "exp9_results_best_lr").exists()
    assert "error: exp9_lr_search: No learning rate can be recommended" in err and f"1e-2 {how}" in err
    assert read(here / "exp9_lr_search/lr_recommendation.json")["best_learning_rate"] is None


def test_a_run_killed_from_outside_is_taken_up_before_the_best_is_chosen(exp9, here: Path) -> None:
    _, err = exp9(*WHOLE, status=4, begins=Trains({"lr=1e-2": -9}))
    assert "lr=1e-2 was killed from outside; the same command goes on" in err
    assert not (here / "exp9_results_best_lr").exists()
    begun = Trains({"lr=1e-2": 1})
    exp9(*WHOLE, status=4, begins=begun)
    assert begun.started == ["lr=1e-2", "base"]


def test_some_failed_is_four_though_all_else_is_done(exp9, here: Path) -> None:
    exp9(*WHOLE, status=4, begins=Trains({"lr=1e-3": 0, "lr=1e-2": 1}))
    long = here / "exp9_results_best_lr"
    assert read(long / "exp9_long_term_results.json")["learning_rate"] == 1e-3
    assert read(long / "hellaswag_benchmark/hellaswag_results.json")["status"] == "completed"
    # The rate that failed before turns out to be the best: the long run that is there has another.
    _, err = exp9(*WHOLE, "--retry", "failed", status=2, begins=(begun := Trains()))
    assert begun.started == ["lr=1e-2"]
    assert "found a long run with learning rate 1e-3; expected 1e-2, which is the best of the search now" in err
    shutil.move(long, here / "before")
    exp9(*WHOLE, begins=(begun := Trains()))
    assert begun.started == ["base"]


@pytest.mark.parametrize(("code", "status"), [(3, 3), (1, 1)])
def test_a_long_run_that_ends_badly_answers_nothing(exp9, here: Path, code: int, status: int) -> None:
    _, err = exp9(*ASK, "--lrs", "1e-2", status=status, begins=Trains({"lr=1e-2": 0, "base": code}))
    assert "the long run " + ("diverged" if code == 3 else "failed") in err
    assert not (here / "exp9_results_best_lr/hellaswag_benchmark").exists()


def test_the_dense_twin_has_folders_of_its_own(exp9, here: Path) -> None:
    exp9("--dense", "--folder", "runs", *ASK, "--lrs", "1e-2")
    config = load_config(here / "runs/exp9_dense_results_best_lr/runs/base/config.toml")
    assert config.model.ffn == "silu" and config.model.d_ff == 32 and config.output.preset == "exp9-dense"
    answers = read(here / "runs/exp9_dense_results_best_lr/hellaswag_benchmark/hellaswag_results.json")
    assert answers["model_name"] == "exp9-dense"
    (only,) = read_results(here / "runs/exp9_dense_lr_search/results.json")
    assert only.status == "completed"
    _, err = exp9("--dense", "--folder", "runs", *ASK, "--lrs", "1e-2", "--dropout", "0", status=2)
    assert "base.dropout: found nothing; expected 0.0" in err
    exp9("--dense", "--folder", "runs", *ASK, "--lrs", "1e-2", "--dropout", "0", "--overwrite", begins=(b := Trains()))
    assert b.started == ["lr=1e-2", "base"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((*DATA, *FLAGS, "--hellaswag", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        ((*DATA, *FLAGS, "--hellaswag", "train.txt"), "train.txt: line 1: found"),
        ((*DATA[:4], *FLAGS, "--hellaswag", "h.jsonl"), "tokenizer: found none"),
        ((*DATA[:2], *DATA[4:], *FLAGS, "--hellaswag", "h.jsonl"), "val_data: found none"),
        ((*DATA[:2], "--val-data", "no.npy", *DATA[4:], *FLAGS, "--hellaswag", "h.jsonl"), "no.npy: no such file"),
        ((*ASK, "--context-length", "4000"), "expected at least 4001"),
        ((*ASK, "--device", "cuda:7"), "device"),
        ((*ASK, "--lr", "1e-3"), "expected --lrs"),
        ((*ASK, "--lrs", "fast"), "--lrs: found 'fast'"),
        ((*ASK, "--lrs", ""), "--lrs: found ''"),
        ((*ASK, "--scale", "gpu"), "expected one that lr-search-full has: cpu"),
        ((*ASK, "--jobs", "0"), "--jobs: found '0'"),
        ((*ASK, "--out-dirr", "x"), "unknown flag --out-dirr"),
    ],
)
def test_refused_before_the_first_step(exp9, here: Path, argv: tuple[str, ...], words: str) -> None:
    _, err = exp9(*argv, status=2, begins=(begun := Trains()))
    assert words in err and begun.started == [] and not list(here.glob("exp9_*"))


def test_a_folder_of_somebody_else_is_refused(exp9, here: Path) -> None:
    (here / "exp9_results_best_lr").mkdir()
    (here / "exp9_results_best_lr/thesis.tex").write_text("years of work")
    _, err = exp9(*WHOLE, status=2, begins=(begun := Trains()))
    assert "exp9_results_best_lr: found thesis.tex and no run of ours" in err and begun.started == []
    exp9(*WHOLE, "--overwrite", status=2, begins=begun)
    assert begun.started == []
    assert (here / "exp9_results_best_lr/thesis.tex").read_text() == "years of work"


def test_the_scale_asks_a_sample() -> None:
    small = module._plan(module._parser(everything=False).parse_args(["--scale", "cpu"]))
    assert small.limit == 500 and str(small.long_folder) == "exp9_results_best_lr-cpu"
    whole = module._plan(module._parser(everything=False).parse_args([]))
    assert whole.limit == 0 and [str(whole.search_folder), str(whole.long_folder)] == [
        "exp9_lr_search",
        "exp9_results_best_lr",
    ]
    long = whole.long(3e-3)
    assert (long.base["max_steps"], long.base["lr"], long.base["early_stopping_patience"]) == (10_000, 3e-3, 0)


def test_a_long_run_has_four_panels(exp9, here: Path) -> None:
    exp9(*ASK, "--lrs", "1e-2", "--eval-interval", "1")
    folder = here / "exp9_results_best_lr"
    (result,) = read_results(folder / "results.json")
    figure = long_figure(drawn_of(result, metrics_of(folder / "runs/base"), wins=False), "long")
    assert [a.get_title() for a in figure.axes] == [
        "Loss", "Validation accuracy", "Validation perplexity", "Learning rate, peak 1e-2",
    ]  # fmt: skip
    validation = next(line for line in figure.axes[0].lines if line.get_label() == "validation")
    assert len(validation.get_xdata()) == 3 and min(validation.get_ydata()) == pytest.approx(result.best_val_loss)
    assert (folder / "exp9_long_term_training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_answers_of_another_checkpoint_are_not_taken(here: Path, exp9) -> None:
    exp9(*ASK, "--lrs", "1e-2")
    long = here / "exp9_results_best_lr"
    how: dict[str, Any] = {"model": "exp9", "questions": "h.jsonl", "limit": 0, "device": "cpu"}
    places = (
        long / "runs/base",
        *(long / f"hellaswag_benchmark/hellaswag_{n}" for n in ("results.json", "records.jsonl")),
    )
    first = hellaswag.answer(*places, **how)
    shutil.rmtree(long / "checkpoints/checkpoint_best")
    shutil.copytree(long / "checkpoints/checkpoint_6", long / "checkpoints/checkpoint_best")
    second = hellaswag.answer(*places, **how)
    assert second["step"] == 6 != first["step"] and second["model_checksum"] != first["model_checksum"]
    fewer = hellaswag.answer(*places, **{**how, "limit": 5})
    assert fewer["total_questions"] == 5 and fewer["limit"] == 5
    (long / "hellaswag_benchmark/hellaswag_records.jsonl").write_text("not ours\n")
    with pytest.raises(BytekilnError):
        hellaswag.answer(*places, **how)
