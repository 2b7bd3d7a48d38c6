"""The shipped experiments as sweeps: the runs that they plan, and each of them really trained, scaled down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bytekiln
from bytekiln import cli, cli_sweep
from bytekiln.accounting import parameter_count
from bytekiln.errors import FileError
from bytekiln.schedule import Progress, learning_rate
from bytekiln.sweep.coordinate import run_sweep
from bytekiln.sweep.ready import checked_data
from bytekiln.sweep.spec import SweepSpec, Trial, changed, load_spec, read_spec, sweep_presets, trials_of
from lm_runs import ONE_THREAD, tokens

STORIES = ("lr-tuning", "batch-size", "ablations", "owt-tinystories")
SHAKESPEARE = (
    "exp1-parameters", "exp2-accumulation", "exp3-regularisation", "exp4-schedules", "exp5-scale",
)  # fmt: skip
SMALL = ("--scale", "cpu", "--seeds", 1, "--vocab-size", 61, "--context-length", 8, "--eval-interval", 8,
         "--num-eval-batches", 2, "--checkpoint-interval", 100, "--no-compile", "--precision", "fp32",
         "--device", "cpu", "--d-model", 16, "--max-steps", 24)  # fmt: skip
"""Appended to every experiment; what is an axis or a variant's own stays."""


def planned(name: str, scale: str = "", **given: object) -> dict[str, Trial]:
    return {t.name: t for t in trials_of(changed(load_spec(name), scale=scale, given=given))}


def flat(name: str, scale: str = "", **given: object) -> dict[str, dict[str, object]]:
    return {n: dict(t.config.flat()) for n, t in planned(name, scale, **given).items()}


@pytest.mark.parametrize("name", [*STORIES, *SHAKESPEARE])
def test_every_experiment_says_what_it_asks_and_has_a_small_form(name: str) -> None:
    full: SweepSpec = load_spec(name)
    small = changed(full, scale="cpu")
    assert name in sweep_presets() and full.question.endswith("?") and full.baseline
    assert str(small.folder) == f"{name}-cpu"
    whole, less = trials_of(full), trials_of(small)  # also: the baseline is one of the runs, in both
    assert {t.variant for t in whole} == {t.variant for t in less}
    work = [max(t.config.training.max_steps * t.config.training.batch_size * t.config.model.context_length
                * t.config.model.d_model**2 for t in runs) for runs in (whole, less)]  # fmt: skip
    assert work[1] < work[0] / 100
    assert all(q.count("?") == 1 and not q.endswith("?") for q in full.questions.values())


def test_learning_rates_that_work_and_that_cannot() -> None:
    rates = [t.config.optimizer.lr for t in planned("lr-tuning").values()]
    assert rates[-3:] == [10.0, 100.0, 1000.0] and 6e-4 in rates and len(rates) == 9
    assert [f["max_steps"] for f in flat("lr-tuning").values()] == [40_000] * 9


def test_batch_sizes_with_the_same_steps() -> None:
    runs = flat("batch-size").values()
    assert [r["batch_size"] for r in runs] == [32, 64, 128]
    assert len({(r["max_steps"], r["lr"], r["num_layers"], r["d_model"]) for r in runs}) == 1
    assert [r["batch_size"] for r in flat("batch-size", "cpu").values()][::2] == [32, 64, 128]


@pytest.mark.parametrize("scale", ["", "cpu"])
@pytest.mark.parametrize("name", [*STORIES, *SHAKESPEARE])
def test_all_runs_of_an_experiment_are_validated_on_as_many_windows(name: str, scale: str) -> None:
    runs = flat(name, scale).values()
    assert len({int(str(r["num_eval_batches"])) * int(str(r["batch_size"])) for r in runs}) == 1


def test_ablations_change_one_thing_each() -> None:
    runs = flat("ablations")
    base = runs.pop("base")
    said = {n: {k: v for k, v in r.items() if v != base[k] and k not in ("run_name", "d_ff")} for n, r in runs.items()}
    assert said == {
        "no-rmsnorm": {"norm": "none"}, "post-norm": {"norm_position": "post"}, "no-rope": {"position": "none"},
        "silu": {"ffn": "silu"},
    }  # fmt: skip
    assert (base["norm"], base["norm_position"], base["position"], base["ffn"]) == ("rms", "pre", "rope", "swiglu")
    for scale in ("", "cpu"):
        counts = {t.variant: parameter_count(t.config.model) for t in planned("ablations", scale).values()}
        assert abs(counts["silu"] / counts["base"] - 1) < 0.01  # SwiGLU and SiLU of the same size


def test_two_texts_and_the_same_model() -> None:
    runs = flat("owt-tinystories")
    assert {n: Path(str(r["train_data"])).name for n, r in runs.items()} == {
        "tinystories": "tinystories_train.npy", "owt": "owt_train.npy",
    }  # fmt: skip
    same = [
        {k: v for k, v in r.items() if k not in ("train_data", "val_data", "tokenizer", "run_name")}
        for r in runs.values()
    ]
    assert same[0] == same[1]


def test_experiment_1_as_the_document_has_it() -> None:
    runs = flat("exp1-parameters")
    fields = ("lr", "batch_size", "num_layers", "d_model", "num_heads", "max_steps", "decay_steps")
    assert {n: tuple(r[f] for f in fields) for n, r in runs.items()} == {
        "exp1_baseline": (1e-3, 64, 6, 384, 6, 1000, 5000),
        "exp1_large_lr": (5e-3, 64, 6, 384, 6, 1000, 5000),
        "exp1_small_lr": (1e-4, 64, 6, 384, 6, 1000, 5000),
        "exp1_small_batch": (1e-3, 16, 6, 384, 6, 1000, 5000),
        "exp1_large_model": (1e-3, 64, 8, 512, 8, 1000, 5000),  # 512 over the preset's 6 heads is refused
    }
    assert runs["exp1_small_lr"]["min_lr"] == pytest.approx(1e-5)


def test_experiment_2_has_one_effective_batch() -> None:
    for scale, size in (("", 64), ("cpu", 32)):
        runs = flat("exp2-accumulation", scale)
        assert [int(str(r["batch_size"])) * int(str(r["grad_accum_steps"])) for r in runs.values()] == [size] * 4
        assert [r["grad_accum_steps"] for r in runs.values()] == [1, 4, 1, 4]
        assert [r["dropout"] for r in runs.values()] == [0.2, 0.2, 0.0, 0.0]


def test_experiment_3_crosses_dropout_and_weight_decay() -> None:
    for scale in ("", "cpu"):
        runs = flat("exp3-regularisation", scale)
        assert {n: (r["dropout"], r["weight_decay"]) for n, r in runs.items()} == {
            "exp3_overfit": (0.0, 0.0), "exp3_dropout": (0.2, 0.0), "exp3_weight_decay": (0.0, 0.1),
            "exp3_both": (0.2, 0.1),
        }  # fmt: skip
    small = runs["exp3_overfit"]
    read = int(str(small["max_steps"])) * int(str(small["batch_size"])) * int(str(small["context_length"]))
    assert read >= 10 * int(str(small["max_tokens"]))  # often enough to learn it by heart


@pytest.mark.parametrize("scale", ["", "cpu"])
def test_experiment_4_has_four_different_curves(scale: str) -> None:
    """In the document two were the same: there `decay_lr=False` took the warm-up away too."""
    runs = {t.variant: t.config for t in planned("exp4-schedules", scale).values()}
    steps = runs["exp4_no_schedule"].training.max_steps
    curves = {n: [learning_rate(Progress(s, steps), c) for s in range(steps + 1)] for n, c in runs.items()}
    peak = max(curves["exp4_no_schedule"])
    assert len({tuple(c) for c in curves.values()}) == 4
    warm = {n: c[0] < peak / 10 for n, c in curves.items()}
    decayed = {n: c[-1] == pytest.approx(peak / 10) for n, c in curves.items()}
    assert warm == {n: n in ("exp4_warmup_only", "exp4_full_schedule") for n in curves}
    assert decayed == {n: n in ("exp4_decay_only", "exp4_full_schedule") for n in curves}
    assert max(curves["exp4_warmup_only"][-10:]) == peak == max(curves["exp4_full_schedule"])


@pytest.mark.parametrize(
    ("scale", "widths", "context"), [("", (128, 256, 384, 512), 256), ("cpu", (32, 64, 96, 128), 64)]
)
def test_experiment_5_counts_parameters_exactly(scale: str, widths: tuple[int, ...], context: int) -> None:
    """12 d² a layer, two norms a layer and one behind, an embedding that is also the head, learned positions."""
    runs = planned("exp5-scale", scale, vocab_size=65)
    for (name, trial), layers, d in zip(runs.items(), (2, 4, 6, 8), widths, strict=True):
        m = trial.config.model
        assert (m.num_layers, m.num_heads, m.d_model) == (layers, layers, d), name
        assert parameter_count(m) == (65 + context) * d + layers * (12 * d * d + 2 * d) + d


@pytest.mark.slow  # a plan looks for the largest batch, too
def test_dry_run_tells_those_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run("lm-sweep", ["exp5-scale", "--scale", "cpu", "--vocab-size", "65", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()[:3]) for line in lines[1:5]] == [
        "exp5_tiny 28,864 600", "exp5_small 205,440 600", "exp5_medium 677,184 600", "exp5_large 1,591,552 600",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("ablations", "bpe-train --dataset tinystories && bpe-encode --dataset tinystories"),
        ("owt-tinystories", "bpe-train --dataset tinystories && bpe-encode --dataset tinystories"),
        ("exp1-parameters", "bpe-encode TEXT --characters --dataset shakespeare-char"),
    ],
)
def test_missing_data_says_what_makes_it(name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = load_spec(name)
    with pytest.raises(FileError, match=f"no such file; make it with: {way}"):
        checked_data(trials_of(spec), str(spec.base.get("dataset", "")))


def test_shards_and_known_tokenizers_are_data_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards go by the name that `bpe-encode` was given; a well-known name stays one in every run."""
    monkeypatch.chdir(tmp_path)
    summary = {"format": "bytekiln-tokens", "version": 1, "file": "s.npy", "shards": [{"file": "s_00000.npy"}]}
    (tmp_path / "s.npy.json").write_text(json.dumps(summary))
    base = {"vocab_size": 61, "train_data": "s.npy", "tokenizer": "gpt2"}
    trials = trials_of(read_spec({"base": base, "axes": {"lr": [1e-3]}}, "a.toml", "a", tmp_path))
    assert [(t.config.data.train_data, t.config.data.tokenizer) for t in trials] == [(str(tmp_path / "s.npy"), "gpt2")]
    checked_data(trials)
    (tmp_path / "s.npy.json").unlink()
    with pytest.raises(FileError, match=r"s\.npy: no such file"):
        checked_data(trials)


# --- really trained -----------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the datasets of all experiments; two of made-up tokens, as their manifests say."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/processed").mkdir(parents=True)
    for i, name in enumerate(("tinystories", "shakespeare-char")):
        tokens(tmp_path / f"data/processed/{name}_train.npy", 2000, seed=2 * i)
        tokens(tmp_path / f"data/processed/{name}_valid.npy", 400, seed=2 * i + 1)
    return tmp_path


def two_texts(here: Path) -> None:
    """Two datasets with a tokenizer each, one of a larger vocabulary."""
    for name, size, word in (("tinystories", 280, "bowl"), ("owt", 300, "kiln")):
        folder = here / "data/processed"
        for i, split in enumerate(("train", "valid")):
            text = "".join(f"A {word} of clay, {k * 37 % 91} of them turn.<|endoftext|>" for k in range(i, 300, i + 1))
            (here / f"{name}_{split}.txt").write_text(text, "utf-8")
        made = bytekiln.train_bpe(here / f"{name}_train.txt", vocab_size=size, special_tokens=["<|endoftext|>"])
        made.save(folder / f"{name}_tokenizer.json", overwrite=True)
        for split in ("train", "valid"):
            bytekiln.encode_files(made, [here / f"{name}_{split}.txt"], folder / f"{name}_{split}.npy", overwrite=True)


class Here:
    """A run that is trained in this process, whole, when it is begun."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.status = cli.run("lm-train", [str(folder / "trial.toml"), "--out-dir", str(folder)])

    def poll(self) -> int | None:
        return self.status

    def send(self, number: int) -> None:
        raise AssertionError("it has ended")

    def kill(self) -> None:
        raise AssertionError("it has ended")


def test_divergent_rates_are_results(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_sweep, "run_sweep", lambda *a, **k: run_sweep(*a, **{**k, "start": Here}))
    argv = ["lr-tuning", *map(str, SMALL), "--lrs", "3e-3 1e1 1e2 1e3", "--warmup-steps", "2", "--d-ff", "64"]
    assert cli.run("lm-sweep", argv) == 0
    told = json.loads((here / "lr-tuning-cpu/lr_sweep_results.json").read_text())
    assert {e["name"].partition(",")[0]: e["status"] for e in told} == {
        "lr=3e-3": "completed", "lr=10": "diverged", "lr=100": "diverged", "lr=1e3": "diverged",
    }  # fmt: skip
    text = (here / "lr-tuning-cpu/analysis.md").read_text("utf-8")
    assert "3 of 4 variants diverged." in text and "Lowest loss: lr=3e-3" in text
    assert (here / "lr-tuning-cpu/comparison.png").exists()
    assert "analysis: lr-tuning-cpu/analysis.md" in capsys.readouterr().err


def trained(here: Path, name: str, *more: object) -> str:
    """The analysis of an experiment that the real command has run."""
    run = subprocess.run(
        [sys.executable, "-m", "bytekiln.cli", "lm-sweep", name, *map(str, (*SMALL, *more)), "--jobs", "2"],
        capture_output=True, text=True, cwd=here, timeout=600, env={**os.environ, **ONE_THREAD, "NO_COLOR": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert (here / f"{name}-cpu/comparison.png").exists()
    text = (here / f"{name}-cpu/analysis.md").read_text("utf-8")
    assert "Partial" not in text and ("## Each variant" in text or "## Each run" in text)
    return text


@pytest.mark.slow
def test_the_course_s_experiments_as_a_user_runs_them(here: Path) -> None:
    text = trained(here, "lr-tuning", "--warmup-steps", 2, "--lrs", "3e-3 1e1 1e3")
    assert "2 of 3 variants diverged." in text
    text = trained(here, "batch-size", "--warmup-steps", 2)
    assert "## Batch size and throughput" in text and "val at 6,144 tokens" in text
    text = trained(here, "ablations", "--warmup-steps", 2)
    for lead in ("Without RMSNorm", "With the norm behind the residual sum", "Without RoPE", "With SiLU alone"):
        assert text.count(lead) == 2, lead  # among the answers, and in its own part
    two_texts(here)
    text = trained(here, "owt-tinystories", "--warmup-steps", 2, "--vocab-size", 0)
    assert "## Different texts" in text and "On OpenWebText a byte of validation text costs" in text


@pytest.mark.slow
def test_the_nanogpt_experiments_as_a_user_runs_them(here: Path) -> None:
    text = trained(here, "exp1-parameters", "--warmup-steps", 2)
    for name in ("baseline", "large_lr", "small_lr", "small_batch", "large_model"):
        assert (here / f"exp1-parameters-cpu/runs/exp1_{name},seed=1/metrics.csv").exists()
    assert "1A: what does a learning rate five times as large do? With it" in text
    text = trained(here, "exp2-accumulation", "--warmup-steps", 2)
    assert text.count("both 32 sequences a step") == 2 and text.count("they coincide, but for rounding") == 1
    text = trained(here, "exp3-regularisation", "--max-tokens", 500, "--warmup-steps", 2, "--decay-steps", 24)
    assert "## Over-fitting" in text
    text = trained(here, "exp4-schedules", "--max-steps", 120, "--decay-steps", 120)
    assert "In the first 6 steps the loss falls most with" in text and "In the last 12" in text
    text = trained(here, "exp5-scale", "--decay-steps", 24, "--warmup-steps", 2)
    assert "A doubling of the parameters changes the best validation loss by" in text and "1,583,872" in text
