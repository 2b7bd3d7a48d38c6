"""What stands on the command line is obeyed or refused with the reason, and never left out in silence."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

from bytekiln import cli_lm
from bytekiln.checkpoint import load_checkpoint
from bytekiln.config import FIELDS, RunConfig, alone, load_config, refuse_idle
from bytekiln.data import open_data
from bytekiln.errors import BytekilnError, ConfigError, MismatchError, OutputExistsError
from bytekiln.fields import NEEDS
from bytekiln.metrics import read_metrics
from bytekiln.preview import show_batch
from bytekiln.run_state import State
from lm_runs import tokens

SMALL = (
    "--train-data tr.npy --vocab-size 61 --num-layers 1 --num-heads 2 --d-model 16 --context-length 8 --max-seq-len 8 "
    "--batch-size 2 --num-eval-batches 1 --device cpu --precision fp32 --compile=false --out-dir r"
).split()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tokens(tmp_path / "tr.npy")
    tokens(tmp_path / "va.npy", 200, seed=1)
    return tmp_path


def rates(folder: str = "r") -> list[float]:
    with (Path(folder) / "metrics.csv").open() as f:
        return [float(r["lr"]) for r in csv.DictReader(f) if r["lr"]]


# --- a pinned `decay_lr` ---


@pytest.mark.parametrize("name", ["default", "debug", "medium", "large"])
@pytest.mark.parametrize(
    "given",
    [
        {"schedule": "linear"},
        {"schedule": "cosine"},
        {"min_lr": "1e-5"},
        {"min_lr_ratio": 0.1},
        {"lr_decay_iters": "15"},
        {"decay_fraction": "0.2"},
    ],
    ids=str,
)
def test_what_says_how_the_rate_falls_frees_a_pinned_decay_lr(name: str, given: dict[str, object]) -> None:
    assert not load_config(name).optimizer.decay_lr
    assert load_config(name, given).optimizer.decay_lr
    assert not load_config(name, {**given, "decay_lr": "false"}).optimizer.decay_lr


@pytest.mark.parametrize(
    "given", [{"schedule": "constant"}, {"lr": 1e-3}, {"warmup_steps": 5}, {"max_time": "90m"}, {"decay_steps": 0}]
)
def test_nothing_else_does(given: dict[str, object]) -> None:
    assert not load_config(None, given).optimizer.decay_lr


def test_a_schedule_of_the_command_line_is_that_of_the_run(here: Path) -> None:
    line = "--max-steps 20 --schedule linear --min-lr 1e-5 --lr 1e-3 --decay-steps 15"
    assert cli_lm.train([*SMALL, *line.split()]) == 0
    assert rates()[0] == 1e-3 and rates()[5] == pytest.approx(1e-3 - 5 / 15 * 99e-5) and rates()[15:] == [1e-5] * 5
    assert cli_lm.train([*SMALL, *line.split(), "--resume", "auto", "--max-steps", "21"]) == 0, "the same line resumes"


def test_max_time_ends_its_decay(here: Path) -> None:
    line = "--schedule trapezoid --max-time 2 --lr 1e-3 --decay-fraction 0.5 --eval-interval 0"
    assert cli_lm.train([*SMALL, *line.split()]) == 0
    assert rates()[0] == 1e-3 and rates()[-1] < 3e-4


def test_a_file_is_freed_the_same_way_where_a_resume_finds_nothing_yet(here: Path) -> None:
    """`c.toml … --resume` is a line that people repeat: it starts the run that it goes on with."""
    (here / "c.toml").write_text("decay_lr = false\nmin_lr = 1e-4\nmax_steps = 3\n")
    line = ["c.toml", *SMALL, "--schedule", "linear", "--lr", "1e-3", "--resume", "auto"]
    assert cli_lm.train(line) == 0
    assert rates() == pytest.approx([1e-3, 7e-4, 4e-4]), "lr frees min_lr, schedule decay_lr"
    assert cli_lm.train([*line, "--max-steps", "4"]) == 0
    assert len(rates()) == 4


# --- fields that nothing reads ---

IDLE = [
    ("--normuon", "normuon: found true with optimizer adamw; expected optimizer = muon"),
    ("--momentum 0.3", "momentum: found 0.3 with optimizer adamw; expected optimizer = muon or sgd"),
    ("--optimizer sgd --beta2 0.9", "beta2: found 0.9 with optimizer sgd; expected optimizer = adamw, lion or muon"),
    ("--optimizer muon --normuon-beta2 0.9", "normuon_beta2: found 0.9 with normuon false; expected normuon = true"),
    ("--ema-decay 0.9", "ema_decay: found 0.9 with averaging none; expected averaging = ema"),
    ("--averaging ema --tail-fraction 0.5", "tail_fraction: found 0.5 with averaging ema; expected averaging = tail"),
    ("--spike-sigma 4", "spike_sigma: found 4 with skip_spikes false; expected skip_spikes = true"),
    ("--mlm-share 0.3", "mlm_share: found 0.3 with objective next_token; expected objective = mlm"),
    (
        "--early-stopping-min-delta 0.1",
        "early_stopping_min_delta: found 0.1 with early_stopping_patience 0; expected early_stopping_patience above 0",
    ),
    ("--decay-fraction 0.5", "decay_fraction: found 0.5 with schedule cosine; expected schedule = trapezoid"),
    ("--schedule constant --min-lr 1e-5", "min_lr: found 1e-05 with schedule constant; expected schedule = linear, "),
    ("--decay-steps 9 --max-time 5", "decay_steps: found 9 with progress seconds; expected progress = steps"),
    ("--weight-decay 0 --cautious-weight-decay", "cautious_weight_decay: found true with weight_decay 0; expected "),
    ("--tie-embeddings --head-lr-scale 2", "head_lr_scale: found 2 with tie_embeddings true; expected "),
    ("--max-time-counts steps", "max_time_counts: found steps with max_time 0; expected max_time above 0"),
    ("--wandb-mode offline", "wandb_mode: found offline with wandb false; expected wandb = true"),
]


@pytest.mark.parametrize(("line", "words"), IDLE, ids=[line for line, _ in IDLE])
def test_a_field_that_nothing_reads_is_refused(here: Path, line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        cli_lm.train([*SMALL, "--max-steps", "1", *line.split()])
    assert not (here / "r").exists()


def test_the_table_names_fields_and_values_that_there_are() -> None:
    for name, needs in NEEDS.items():
        assert name in FIELDS
        for other, wanted in needs:
            assert [alone(other, value) for value in wanted] == list(wanted)


@pytest.mark.parametrize(
    "line",
    [
        "--optimizer adamw --muon-scale shape --momentum 0.95 --no-normuon --no-skip-spikes",
        "--schedule constant --no-decay-lr",
        "--no-decay-lr --min-lr 1e-5",
        "--no-decay-lr --decay-fraction 0.5",
        "--optimizer muon --momentum 0.9 --normuon --normuon-beta2 0.9",
        "--averaging tail --tail-fraction 0.5",
        "--schedule trapezoid --decay-fraction 0.5",
        "--progress steps --decay-steps 2 --max-time 60",
    ],
)
def test_what_asks_for_nothing_or_is_read_is_taken(here: Path, line: str) -> None:
    assert cli_lm.train([*SMALL, "--max-steps", "1", *line.split()]) == 0


def test_a_preset_and_a_file_may_say_what_the_command_line_switches_off(here: Path) -> None:
    (here / "c.toml").write_text(
        'optimizer = "muon"\nmomentum = 0.9\nnormuon = true\naveraging = "ema"\nema_decay = 0.9'
    )
    line = ["c.toml", *SMALL, "--max-steps", "1", "--optimizer", "adamw", "--averaging", "none"]
    assert cli_lm.train(line) == 0
    assert cli_lm.train([*line, "--resume", "auto", "--max-steps", "2"]) == 0
    load_config("exp9", {"optimizer": "adamw", "ema_decay": 0.5})  # as sweeps do by their axes


def test_on_a_resume_only_what_would_change_is_refused(here: Path) -> None:
    config = RunConfig().with_(ema_decay=0.5)
    refuse_idle(config, ["ema_decay"], before=config)
    assert cli_lm.train([*SMALL, "--val-data", "va.npy", "--max-steps", "1"]) == 0
    with pytest.raises(ConfigError, match=r"early_stopping_min_delta: found 0\.1 with early_stopping_patience 0"):
        cli_lm.train(["r", "--max-steps", "2", "--min-delta", "0.1"])
    with pytest.raises(ConfigError, match="schedule: found linear with decay_lr false; expected decay_lr = true"):
        cli_lm.train(["r", "--max-steps", "2", "--schedule", "linear", "--allow-change", "schedule"])
    assert cli_lm.train(["r", "--max-steps", "2", "--min-delta", "0.1", "--patience", "3"]) == 0


def test_a_line_of_nanogpts_is_taken(here: Path) -> None:
    given = {"max_iters": 5, "decay_lr": "False", "lr_decay_iters": 2000, "min_lr": "1e-4"}
    config = load_config("shakespeare-char", given)
    refuse_idle(config, ["max_steps", "decay_lr", "decay_steps", "min_lr"])
    assert not config.optimizer.decay_lr
    refuse_idle(load_config("shakespeare-char", {"schedule": "constant", "min_lr": 1e-4}), ["schedule", "min_lr"])
    with pytest.raises(ConfigError, match=r"min_lr: found 0\.0002 with schedule constant"):
        refuse_idle(load_config("shakespeare-char", {"schedule": "constant", "min_lr": 2e-4}), ["schedule", "min_lr"])


# --- a limit of zero is none ---


@pytest.mark.parametrize("name", ["max_time", "token_budget"])
@pytest.mark.parametrize("zero", ["0", "00", "0s", "0m", "0.00", 0])
def test_no_limit_frees_no_steps(name: str, zero: object) -> None:
    if name == "max_time" or zero not in ("0s", "0m"):
        assert load_config("debug", {name: zero}).training.max_steps == load_config("debug").training.max_steps


def test_a_limit_taken_away_leaves_the_steps(here: Path) -> None:
    line = [*SMALL, "--max-time", "60", "--max-steps", "4"]
    assert cli_lm.train([*line, "--pause-at", "2"]) == 130
    assert cli_lm.train(["r", "--max-time", "0s", "--allow-change", "progress", "--pause-at", "6"]) == 0
    assert len(rates()) == 4


# --- lines that resume ---


@pytest.mark.parametrize(
    "flags", ["--context-length 4", "--n_head 4", "--d-model 32", "--ffn gelu", "--ffn-multiple 2"], ids=str
)
def test_a_runs_config_with_a_change_is_a_line_that_resumes(here: Path, flags: str) -> None:
    assert cli_lm.train([*SMALL, "--max-steps", "3"]) == 0
    line = ["r/config.toml", *flags.split(), "--out-dir", "a"]
    assert cli_lm.train([*line, "--pause-at", "2"]) == 130
    assert cli_lm.train([*line, "--resume"]) == 0
    assert len(rates("a")) == 3


def test_a_min_lr_of_a_constant_rate_is_a_change(here: Path) -> None:
    assert cli_lm.train([*SMALL, "--max-steps", "2", "--no-decay-lr", "--lr", "3e-4"]) == 0
    with pytest.raises(MismatchError, match="min_lr: found 3e-05; expected None"):
        cli_lm.train(["r", "--max-steps", "3", "--min-lr", "3e-5"])


def test_min_lr_follows_an_lr_that_may_change(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_lm.train([*SMALL, "--max-steps", "4", "--lr", "1e-3", "--min-lr", "1e-4", "--pause-at", "2"]) == 130
    line = ["r", "--lr", "5e-5", "--allow-change", "lr"]
    assert cli_lm.train([*line, "--pause-at", "3"]) == 130
    assert "min_lr: changes from 0.0001 to 5e-06 at step 2" in capsys.readouterr().err
    assert cli_lm.train(line) == 0
    assert load_config("r").optimizer.min_lr == 5e-6


# --- a run whose metrics have another name ---


def test_a_new_metrics_path_takes_the_rows_along(here: Path) -> None:
    assert cli_lm.train([*SMALL, "--max-steps", "3"]) == 0
    line = ["r", "--metrics-path", "new.csv"]
    before = (here / "r/metrics.csv").read_text()
    assert cli_lm.train([*line, "--max-steps", "4"]) == 0
    assert (here / "new.csv").read_text().startswith(before)
    assert cli_lm.train([*line, "--max-steps", "5"]) == 0
    assert len(read_metrics(here / "new.csv")) == 6


def test_the_metrics_of_another_run_are_left_alone(here: Path) -> None:
    assert cli_lm.train([*SMALL, "--max-steps", "3"]) == 0
    assert cli_lm.train([*SMALL, "--max-steps", "2", "--seed", "5", "--out-dir", "s"]) == 0
    before = (here / "s/metrics.csv").read_bytes()
    line = ["r", "--max-steps", "4", "--metrics-path"]
    with pytest.raises(OutputExistsError, match=r"s/metrics\.csv: found a file that is not this run's"):
        cli_lm.train([*line, "s/metrics.csv"])
    assert (here / "s/metrics.csv").read_bytes() == before
    shutil.copy(here / "r/metrics.csv", here / "own.csv")  # as a resume leaves it that was killed before it saved
    assert cli_lm.train([*line, "own.csv"]) == 0
    assert len(read_metrics(here / "own.csv")) == 5


# --- a change that a run cannot take ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--d-model 64", "d_model: found 64; expected 16, with which the run in .* was started"),
        ("--d-model 33", "d_model: found 33; expected 16"),
        ("--n_head 5", "num_heads: found 5; expected 2"),
        ("--min-lr 1", "min_lr: found 1.0; expected None"),
    ],
)
def test_a_change_is_named_and_not_what_it_contradicts(here: Path, flags: str, words: str) -> None:
    assert cli_lm.train([*SMALL, "--max-steps", "1"]) == 0
    with pytest.raises(MismatchError, match=words):
        cli_lm.train(["r", *flags.split()])
    with pytest.raises(ConfigError, match="d_model: found 'wide'"):
        cli_lm.train(["r", "--d-model", "wide"])


def test_a_value_by_itself() -> None:
    assert alone("d_model", "65") == 65, "which no number of heads of the default divides"
    assert (alone("max_time", "90m"), alone("precision", "bfloat16")) == (5400.0, "bf16")
    with pytest.raises(ConfigError, match="d_model: found 0"):
        alone("d_model", 0)


# --- instead of training ---


@pytest.mark.parametrize("sampling", ["random", "shuffled"])
def test_show_batch_shows_the_batch_that_a_resume_goes_on_with(
    here: Path, capsys: pytest.CaptureFixture[str], sampling: str
) -> None:
    assert cli_lm.train([*SMALL, "--sampling", sampling, "--max-steps", "3", "--grad-accum-steps", "2"]) == 0
    capsys.readouterr()
    assert cli_lm.train(["r", "--show-batch"]) == 0
    told = capsys.readouterr()
    saved = load_checkpoint(here / "r/checkpoints/checkpoint_final")
    train = open_data(saved.config, None).train
    assert told.out.strip() == show_batch(train.batch(3, 12, 0, 2), None).strip()
    assert told.out.strip() != show_batch(train.batch(0, 0, 0, 2), None).strip()
    assert "checkpoint_final: step 3" in told.err
    assert State.from_json(saved.state, "x").windows == 12


@pytest.mark.parametrize("others", ["--generate --eval-only", "--eval-only --show-batch", "--show-batch --generate"])
def test_two_things_to_do_are_refused(here: Path, others: str) -> None:
    with pytest.raises(ConfigError, match=r"lm-train: found --[a-z-]+ and --[a-z-]+; expected one of them"):
        cli_lm.train([*SMALL, *others.split()])
    with pytest.raises(ConfigError, match="--pause-at: found it with --"):
        cli_lm.train([*SMALL, others.split()[0], "--pause-at", "1"])


def test_an_evaluation_says_of_which_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_lm.train([*SMALL, "--val-data", "va.npy", "--max-steps", "3", "--eval-interval", "2"]) == 0
    capsys.readouterr()
    assert cli_lm.train(["r", "--eval-only"]) == 0
    out = capsys.readouterr().out
    assert "Evaluating r/checkpoints/checkpoint_final, step 3" in out and "the weights of step 3" in out
    small = "--train-data tr.npy --num-eval-batches 1 --batch-size 2 --device cpu".split()
    assert cli_lm.train(["--init-from", "r", "--eval-only", *small]) == 0
    out = capsys.readouterr().out
    best = load_checkpoint(here / "r/checkpoints/checkpoint_best").step
    assert f"checkpoints/checkpoint_best, step {best}" in out and f"evaluated: the weights of {here / 'r'}" in out


# --- values of another kind ---


@pytest.mark.parametrize("name", ["lr", "max_steps", "d_model", "min_lr", "max_time", "dropout", "loss_chunk", "seed"])
@pytest.mark.parametrize("value", ["true", "false"])
def test_true_and_false_are_no_numbers(here: Path, name: str, value: str) -> None:
    (here / "c.toml").write_text(f"{name} = {value}\n")
    with pytest.raises(BytekilnError, match=f"^{name}: found {value.title()}; expected "):
        load_config("c.toml")


@pytest.mark.parametrize("text", ['{"training": [1, 2]}', "model = 5", "data = true"])
def test_a_section_is_a_table(here: Path, text: str) -> None:
    (here / "c.conf").write_text(text)
    with pytest.raises(
        ConfigError, match=r"^c\.conf: (training|model|data): found .*; expected a table, since it is a "
    ):
        load_config("c.conf")
    (here / "c.conf").write_text('optimizer = "muon"\n')
    assert load_config("c.conf").optimizer.optimizer == "muon"
