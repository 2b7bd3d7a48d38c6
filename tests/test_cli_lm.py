"""`lm-train`, `lm-sample`, `lm-report` as a user types them, and the published command lines."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bytekiln import Tokenizer, cli_lm, cli_report, encode_files, train_bpe
from bytekiln.config import FIELDS, load_config
from bytekiln.console import flag
from bytekiln.errors import BytekilnError, ConfigError
from bytekiln.run_flags import spell_switches
from conftest import Result
from lm_runs import tokens

SMALL = (
    "--num-layers 1 --num-heads 2 --d-model 16 --d-ff 16 --context-length 8 --max-seq-len 8 --batch-size 2 "
    "--max-steps 2 --num-eval-batches 1 --device cpu --precision fp32 --compile=false"
).split()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with token files where the commands of the documents look for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/processed").mkdir(parents=True)
    for name in ("data/processed/tinystories_train.npy", "data/processed/tinystories_valid.npy"):
        tokens(tmp_path / name)
    for name in ("train_data.npy", "val_data.npy"):
        tokens(tmp_path / name, vocab=61)
    return tmp_path


@pytest.fixture
def text(here: Path) -> Path:
    (here / "text.txt").write_text("the kiln is warm and the clay is wet\n" * 40 + "<|endoftext|>", encoding="utf-8")
    tokenizer = train_bpe(here / "text.txt", vocab_size=280, special_tokens=["<|endoftext|>"])
    tokenizer.save(here / "tokenizer.json")
    encode_files(tokenizer, here / "text.txt", here / "text.npy")
    return here / "text.npy"


def rows(folder: Path | str) -> list[dict[str, str]]:
    with (Path(folder) / "metrics.csv").open() as f:
        return list(csv.DictReader(f))


# --- published command lines, the program's name changed ---

PUBLISHED = [
    # the training script's guide
    "--train_data train_data.npy --val_data val_data.npy --vocab_size 10000 --d_model 768 --n_layers 12 --n_heads 12 "
    "--batch_size 32 --context_length 512 --learning_rate 3e-4 --max_iters 100000 --checkpoint_dir ./checkpoints",
    "--vocab_size 1000 --d_model 256 --n_layers 4 --n_heads 4 --batch_size 16 --max_iters 10000",
    "--vocab_size 10000 --d_model 768 --n_layers 12 --n_heads 12 --batch_size 32 --max_iters 100000",
    "--vocab_size 50000 --d_model 1024 --n_layers 24 --n_heads 16 --batch_size 64 --max_iters 500000",
    "--max_seq_len 1024 --rope_theta 10000.0 --d_ff 3072 --weight_decay 0.01 --beta1 0.9 --beta2 0.999 "
    "--max_grad_norm 1.0 --log_interval 100 --eval_interval 1000 --save_interval 5000 --num_eval_batches 100 "
    "--device auto",
    # the experiments of the assignment
    "--dataset tinystories --train-path data/processed/tinystories_train.npy "
    "--valid-path data/processed/tinystories_valid.npy --batch-size 64 --context-length 256 --max-steps 20000 "
    "--lr 3e-4 --warmup-iters 1000 --cosine-iters 20000 --save-dir artifacts/checkpoints --run-name base",
    "--dataset tinystories --lr 1e1",
    "--dataset tinystories --lr 1e2",
    "--dataset tinystories --lr 1e3",
    "--dataset tinystories --batch-size 32",
    "--dataset tinystories --batch-size 64",
    "--dataset tinystories --batch-size 128",
    "--dataset tinystories --no-rmsnorm",
    "--dataset tinystories --post-norm",
    "--dataset tinystories --no-rope",
    "--dataset tinystories --ffn-type silu",
    "--dataset tinystories --ffn-type swiglu",
    # nanoGPT's experiments
    *(
        f"config/train_shakespeare_char.py {rest}"
        for rest in (
            "--max_iters=1000 --out_dir=exp1_baseline",
            "--max_iters=1000 --learning_rate=5e-3 --out_dir=exp1_large_lr",
            "--max_iters=1000 --learning_rate=1e-4 --out_dir=exp1_small_lr",
            "--max_iters=1000 --batch_size=16 --out_dir=exp1_small_batch",
            "--batch_size=64 --gradient_accumulation_steps=1 --max_iters=500 --out_dir=exp2_large_batch",
            "--batch_size=16 --gradient_accumulation_steps=4 --max_iters=500 --out_dir=exp2_grad_accum",
            "--max_iters=5000 --dropout=0.0 --weight_decay=0.0 --out_dir=exp3_overfit",
            "--max_iters=5000 --dropout=0.2 --weight_decay=0.0 --out_dir=exp3_dropout",
            "--max_iters=5000 --dropout=0.0 --weight_decay=0.1 --out_dir=exp3_weight_decay",
            "--max_iters=5000 --dropout=0.2 --weight_decay=0.1 --out_dir=exp3_both",
            "--max_iters=2000 --warmup_iters=0 --decay_lr=False --out_dir=exp4_no_schedule",
            "--max_iters=2000 --warmup_iters=100 --decay_lr=False --out_dir=exp4_warmup_only",
            "--max_iters=2000 --warmup_iters=0 --decay_lr=True --lr_decay_iters=2000 --out_dir=exp4_decay_only",
            "--max_iters=2000 --warmup_iters=100 --decay_lr=True --lr_decay_iters=2000 --out_dir=exp4_full_schedule",
            "--n_layer=2 --n_head=2 --n_embd=128 --max_iters=3000 --out_dir=exp5_tiny",
            "--n_layer=4 --n_head=4 --n_embd=256 --max_iters=3000 --out_dir=exp5_small",
            "--n_layer=6 --n_head=6 --n_embd=384 --max_iters=3000 --out_dir=exp5_medium",
            "--n_layer=8 --n_head=8 --n_embd=512 --max_iters=3000 --out_dir=exp5_large",
        )
    ),
    "shakespeare-char --dropout=0 --dtype=fp32 --compile=False",
]


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_command_lines(here: Path, line: str) -> None:
    """Full width as far as the config goes; then scaled down by appended flags and really run."""
    given = shlex.split(line)
    files = [] if "--dataset" in line or "--train_data" in line else ["--train-data", "train_data.npy"]
    status = cli_lm.train([*given, *files, "--out-dir", "run", *SMALL])
    assert status in ((0, 3) if "--lr 1e" in line else (0,))
    stored = load_config(here / "run/config.toml").flat()
    options = vars(cli_lm._train_parser(everything=False).parse_args(spell_switches(given)))
    overridden = {flag(f).removeprefix("--").replace("-", "_").partition("=")[0] for f in SMALL if f.startswith("--")}
    paths = {"out_dir", "checkpoint_dir", "train_data", "val_data"}
    for name, value in options.items():
        if name in stored and value is not None and name not in overridden | paths:
            assert str(stored[name]) == str(value) or float(stored[name]) == float(value), name


def test_the_guide_with_its_vocabulary_and_merges(here: Path, text: Path) -> None:
    """The guide's first line and its resume, tokenizer files included."""
    model = json.loads(train_bpe(here / "text.txt", vocab_size=270).to_json())["model"]
    (here / "tokenizer.vocab").write_text(json.dumps(model["vocab"]))
    merges = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    (here / "tokenizer.merges").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = Tokenizer.from_vocab_and_merges(here / "tokenizer.vocab", here / "tokenizer.merges")
    encode_files(tokenizer, here / "text.txt", here / "guide.npy")
    files = "--vocab_path tokenizer.vocab --merges_path tokenizer.merges --train_data guide.npy"
    rest = "--vocab_size 10000 --d_model 768 --n_layers 12 --n_heads 12 --batch_size 32 --context_length 512"
    line = f"{files} --val_data guide.npy {rest} --learning_rate 3e-4 --max_iters 100000 --checkpoint_dir ./checkpoints"
    small = [*SMALL, "--save_interval", "1", "--out-dir", "guide"]
    assert cli_lm.train([*shlex.split(line), *small]) == 0
    resumed = f"{files} --load_checkpoint ./checkpoints/checkpoint_1.pt --max_iters 3"
    assert cli_lm.train(shlex.split(resumed)) == 0
    assert [r["step"] for r in rows("guide")] == ["0", "1", "2", "3"]
    with pytest.raises(BytekilnError, match="merges_path"):
        cli_lm.train(shlex.split("--vocab_path tokenizer.vocab --train_data guide.npy"))


def test_resume_of_the_guide(here: Path) -> None:
    base = ["--train_data", "train_data.npy", *SMALL, "--vocab_size", "100"]
    assert cli_lm.train([*base, "--out-dir", "r", "--checkpoint_dir", "checkpoints", "--save_interval", "1"]) == 0
    line = "--train_data train_data.npy --load_checkpoint ./checkpoints/checkpoint_1.pt --max_iters 4"
    assert cli_lm.train(shlex.split(line)) == 0
    assert [r["step"] for r in rows("r")] == ["0", "1", "2", "3", "4"]


def test_a_change_of_mathematics_that_was_allowed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL]) == 0
    more = ["r", "--max-steps", "4", "--learning-rate", "1e-4", "--batch-size", "3"]
    with pytest.raises(BytekilnError, match=r"lr: found 0.0001; expected 0.004.*--allow-change lr"):
        cli_lm.train(more)
    with pytest.raises(BytekilnError, match="batch_size: found 3"):
        cli_lm.train([*more, "--allow-change", "max-lr"])
    assert cli_lm.train([*more, "--allow-change", "lr,batch_size"]) == 0
    assert "lr: changes from 0.004 to 0.0001 at step 2, as allowed" in capsys.readouterr().err
    assert [int(r["tokens"]) for r in rows("r")] == [0, 16, 32, 56, 80]


def test_show_batch_and_eval_only(here: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["demo", "--train-data", str(text), "--val-data", str(text), "--tokenizer", "tokenizer.json", *SMALL]
    assert cli_lm.train([*flags, "--show-batch"]) == 0
    shown = capsys.readouterr().out
    assert "clay" in shown or "kiln" in shown
    assert not (here / "runs").exists()
    assert cli_lm.train([*flags, "--out-dir", "r"]) == 0
    trained = json.loads((here / "r/result.json").read_text())
    capsys.readouterr()
    assert cli_lm.train(["r", "--eval-only"]) == 0
    assert f"validation loss {trained['final_val_loss']:.4f}" in capsys.readouterr().out
    assert len(rows("r")) == 3


def test_a_pause_that_cannot_be_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL]
    for other in ("--eval-only", "--show-batch"):
        with pytest.raises(ConfigError, match=f"--pause-at: found it with {other}, which trains nothing"):
            cli_lm.train([*flags, "--pause-at", "1", other])
    assert cli_lm.train([*flags, "--pause-at", "1"]) == 130
    assert [r["step"] for r in rows("r")] == ["0", "1"]
    assert cli_lm.train(["r", "--pause-at", "2"]) in (0, 130)
    assert cli_lm.train(["r", "--max-steps", "4", "--pause-at", "9"]) == 0
    assert "--pause-at 9: behind the end of the run, 4 steps; no pause" in capsys.readouterr().err
    assert [r["step"] for r in rows("r")] == ["0", "1", "2", "3", "4"]


def test_a_resumed_field_that_is_no_number_is_the_users_mistake(here: Path) -> None:
    flags = ["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL]
    assert cli_lm.train(flags) == 0
    with pytest.raises(ConfigError, match="min_lr"):
        cli_lm.train(["r", "--min-lr", "abc", "--max-steps", "6"])


def test_instructions_that_are_not_here_are_refused_before_anything_is_made(
    here: Path, command: Callable[..., Result]
) -> None:
    line = ["demo", "--train-data", here / "train_data.npy", "--out-dir", here / "r", *SMALL]
    told = command("lm-train", *line, status=2, env={"BYTEKILN_SIMD": "mmx"})
    assert "BYTEKILN_SIMD: found mmx" in told.stderr and not (here / "r").exists()


def test_width_that_heads_do_not_divide(here: Path) -> None:
    line = "config/train_shakespeare_char.py --max_iters=1000 --n_layer=8 --n_embd=512 --out_dir=exp1_large_model"
    with pytest.raises(ConfigError, match=r"found 6 for d_model 512.*4, 8, 16"):
        cli_lm.train([*shlex.split(line), "--train-data", "train_data.npy"])
    assert not (here / "exp1_large_model").exists()


def test_dataset_without_files_says_how_to_make_them(here: Path) -> None:
    with pytest.raises(BytekilnError, match=r"owt_train.npy: no such file.*bpe-encode --dataset owt"):
        cli_lm.train(["--dataset", "owt"])


def test_run_folder_goes_on_and_its_config_repeats(here: Path) -> None:
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "runs/a", *SMALL]) == 0
    assert cli_lm.train(["runs/a", "--max-steps", "4"]) == 0
    assert [r["step"] for r in rows("runs/a")] == ["0", "1", "2", "3", "4"]
    assert cli_lm.train(["runs/a/config.toml", "--seed", "7"]) == 0
    assert cli_lm.train(["runs/a/config.toml"]) == 0
    losses = [[r["loss"] for r in rows(f"runs/{n}")] for n in ("a", "a-2", "a-3")]
    assert losses[0] != losses[1]
    assert losses[2] == losses[0], "the stored config has the raised max_steps, and the warm-up hides the decay"


def test_another_preset_cannot_resume_a_run(here: Path) -> None:
    flags = ["--train-data", "train_data.npy", "--out-dir", "a", *SMALL]
    assert cli_lm.train(["demo", *flags]) == 0
    with pytest.raises(BytekilnError, match="preset: found tinystories; expected demo"):
        cli_lm.train(["tinystories", "--train-data", "train_data.npy", "--out-dir", "a", "--resume", "auto"])
    assert cli_lm.train(["demo", *flags, "--resume"]) == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--compile"], ["--compile=true"]),
        (["--compile", "demo"], ["--compile=true", "demo"]),
        (["--no-compile", "x"], ["--compile=false", "x"]),
        (["--no_decay_lr"], ["--decay-lr=false"]),
        (["--no-decay-lr=false"], ["--decay-lr=true"]),
        (["--decay_lr", "False", "--lr", "1"], ["--decay-lr=False", "--lr", "1"]),
        (["--compile=auto"], ["--compile=auto"]),
        (["--no-rope"], ["--no-rope"]),
    ],
)
def test_switches(argv: list[str], expected: list[str]) -> None:
    assert spell_switches(argv) == expected


def test_sampling_commands(here: Path, text: Path, command: Callable[..., object]) -> None:
    flags = ["--train-data", text, "--tokenizer", "tokenizer.json", "--out-dir", "r", *SMALL]
    assert cli_lm.train(["demo", *map(str, flags)]) == 0
    assert Tokenizer.from_file(here / "r/tokenizer.json").hash == Tokenizer.from_file(here / "tokenizer.json").hash
    ask = ["--max-new-tokens", "12", "--seed", "3", "--temperature", "1"]
    first = command("lm-sample", "r", "--prompt", "the kiln", *ask)
    assert first.stdout.startswith("the kiln")
    assert command("lm-sample", "r", "--prompt", "the kiln", *ask).stdout == first.stdout
    assert "longer than the context" in first.stderr
    generated = command("lm-train", "demo", "--generate", "--out-dir", "r", "--start", "the kiln", *ask)
    assert generated.stdout == first.stdout
    (here / "p.txt").write_text("the clay")
    several = command("lm-sample", "r", "--start", "FILE:p.txt", "--num-samples", "2", *ask).stdout
    assert several.count("the clay") == 2
    assert "--- sample 2 ---" in several
    assert "num_samples: found 0" in command("lm-sample", "r", "--num-samples", "0", status=2).stderr
    assert "none" in command("lm-sample", "none", status=2).stderr


def test_generate_makes_256_tokens_by_default(here: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as the assignment asks for at least: here the end of the text is a token that the model never chooses."""
    flags = ["--train-data", text, "--tokenizer", "tokenizer.json", "--out-dir", "r", *SMALL]
    assert cli_lm.train(["demo", *map(str, flags)]) == 0
    capsys.readouterr()
    seen: list[int] = []
    tokenizer = Tokenizer.from_file(here / "tokenizer.json")
    assert cli_lm.train(["--generate", "--resume", "r", "--temperature", "0", "--prompt", "the"]) == 0
    seen = tokenizer.encode(capsys.readouterr().out)
    assert len(seen) >= 256 * 0.9, "encoding the text again may join a few tokens"


def test_sampling_flags_need_generate(here: Path) -> None:
    with pytest.raises(ConfigError, match="--top-p: found it without --generate"):
        cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", "--top-p", "0.9", *SMALL])
    assert not (here / "r").exists()


def test_experts_say_how_many_parameters_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = ["--ffn", "moe", "--num-experts", "4", "--expert-top-k", "1", "--out-dir", "r"]
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", *experts, *SMALL]) == 0
    out = capsys.readouterr().out
    result = json.loads((here / "r/result.json").read_text())
    idle = 3 * 3 * 16 * 16  # three of four experts, three matrices each
    assert result["parameters"] - result["active_parameters"] == idle
    assert f"{result['parameters']:,} total parameters" in out
    assert f"{result['active_parameters']:,} of them work on a token" in out


def test_report_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL]) == 0
    assert cli_report.report(["r", "--png"]) == 0
    assert cli_report.report(["r", "--png"]) == 0, "the run's own picture is drawn anew"
    assert (here / "r/loss.png").stat().st_size > 10_000
    assert "status" in capsys.readouterr().out
    assert cli_report.report(["r", "r", "--png", "--out", "both.png"]) == 0
    with pytest.raises(BytekilnError, match="--overwrite"):
        cli_report.report(["r", "--png", "--out", "both.png"])
    with pytest.raises(BytekilnError, match="no such folder"):
        cli_report.report(["r", "--png", "--out", "none/x.png"])


def test_errors_are_one_line(here: Path, command: Callable[..., object]) -> None:
    np.save(here / "high.npy", np.array([1, 2, 60_000] * 200, dtype=np.uint16))
    (here / "odd.bin").write_bytes(b"\x01\x00" * 200 + b"\x01")
    (here / "cut.npy").write_bytes((here / "train_data.npy").read_bytes()[:300])
    np.save(here / "float.npy", np.zeros(600, dtype=np.float32))
    for name in ("high.npy", "odd.bin", "cut.npy", "float.npy", "none.npy"):
        ended = command(
            "lm-train", "demo", "--train-data", name, "--vocab-size", 700, "--out-dir", "x", *SMALL, status=2
        )
        assert name in ended.stderr
    for flags, words in (
        (["--warmup-step=3"], "--warmup-steps"),
        (["--lr", "fast"], "lr: found 'fast'"),
        (["--config", "a.toml"], "two configurations"),
        (["--device", "tpu", "--train-data", "train_data.npy"], "device: found tpu"),
    ):
        assert words in command("lm-train", "demo", *flags, status=2).stderr
    assert not (here / "x").exists()


def test_divergence_is_exit_status_3(here: Path) -> None:
    flags = [*SMALL, "--max-steps", "60", "--lr", "1e3", "--warmup-steps", "0", "--norm", "none", "--grad-clip", "0"]
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *flags]) == 3
    assert json.loads((here / "r/result.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("name", ["lm-train", "lm-sample", "lm-report"])
def test_help_is_short_shows_an_example_and_needs_no_torch(name: str) -> None:
    code = (
        "import sys\nfrom bytekiln import cli\n"
        f"try:\n    cli.main([{name!r}, '--help'])\n"
        "finally:\n    assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules), 'heavy'\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(ran.stdout.splitlines()) <= 110
    assert "examples:" in ran.stdout
    assert name in ran.stdout


def test_help_all_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli_lm.train(["--help-all"])
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, field in FIELDS.items():
        if name != "preset":
            assert f"--{name.replace('_', '-')} " in out, name
            assert field.description in out, name


def test_a_checkpoint_as_the_argument_is_resumed(here: Path, command: Callable[..., object]) -> None:
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL]) == 0
    two = "r/checkpoints/checkpoint_final"
    assert cli_lm.train([two, "--max-steps", "4"]) == 0
    assert len(rows("r")) == 5
    assert "r/checkpoints" not in [str(p) for p in here.rglob("metrics.csv")]
    assert "d_model: found 32; expected 16" in command("lm-train", "--resume", two, "--d-model", 32, status=2).stderr
    assert "found both" in command("lm-train", "r", "--overwrite", status=2).stderr


def test_a_file_states_its_values_on_a_resume_too(here: Path) -> None:
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL]) == 0
    (here / "c.toml").write_text('max_steps = 3\nout_dir = "r"\n')
    assert cli_lm.train(["c.toml", "--resume", "auto"]) == 0
    assert len(rows("r")) == 4
    (here / "c.toml").write_text('max_steps = 4\nlr = 0.5\nout_dir = "r"\n')
    with pytest.raises(BytekilnError, match="lr: found"):
        cli_lm.train(["c.toml", "--resume", "auto"])


@pytest.mark.slow
def test_checkpoints_of_their_own_folder_are_found(here: Path, text: Path, command: Callable[..., object]) -> None:
    own = ["--tokenizer", "tokenizer.json", "--checkpoint_dir", "checkpoints", "--out-dir", "r"]
    assert cli_lm.train(["demo", "--train-data", str(text), *own, *SMALL]) == 0
    (here / "tokenizer.json").unlink()
    ask = ["--prompt", "the", "--max-new-tokens", 3]
    first = command("lm-sample", "r", *ask).stdout
    for argv in (["r"], ["r/config.toml"], ["demo", "--out-dir", "r"], ["r", "--resume", "auto"]):
        assert command("lm-train", *argv, "--generate", *ask).stdout == first
    assert "expected cpu or auto" in command("lm-sample", "r", *ask, "--device", "cuda:7", status=2).stderr
    assert "device: found tpu" in command("lm-sample", "r", *ask, "--device", "tpu", status=2).stderr
    assert "seed: found" in command("lm-sample", "r", *ask, "--seed", 10**30, status=2).stderr
    assert cli_lm.train(["r", "--max-steps", "3"]) == 0, "with the run's own tokenizer"
    assert cli_lm.train(["r/config.toml", "--tokenizer", "r/tokenizer.json"]) == 0
    assert (here / "r-2/metrics.csv").is_file()


def test_spellings_of_types_and_switches(here: Path) -> None:
    for spelled, meant in (("bfloat16", "bf16"), ("float32", "fp32"), ("float16", "fp16")):
        assert load_config("demo", {"dtype": spelled}).training.precision == meant
    for argv, expected in (
        (["--decay_lr", "0", "x"], ["--decay-lr=0", "x"]),
        (["--tie-embeddings", "yes"], ["--tie-embeddings=yes"]),
        (["--no-rope=true"], ["--position=none"]),
        (["--no-rope=off"], ["--position=rope"]),
    ):
        assert spell_switches(argv) == expected
    for off in ("0", "no", "off", "False"):
        assert not load_config("demo", {"decay_lr": off, "compile": off}).optimizer.decay_lr
    with pytest.raises(ConfigError, match="seed"):
        load_config("demo", {"seed": 10**30})


def test_explicit_values_free_pinned_ones(here: Path) -> None:
    (here / "c.json").write_text('\ufeff{"out_dir": "pinned", "min_lr": 1e-5}', encoding="utf-8")
    assert load_config("c.json").output.folder == Path("pinned")
    assert load_config("c.json", {"run_name": "foo", "save_dir": "bar"}).output.folder == Path("bar/foo")
    assert load_config("c.json", {"min_lr_ratio": 0.5}).optimizer.min_lr is None


def flat(folder: str) -> dict[str, object]:
    return load_config(Path(folder) / "config.toml").flat()


def test_weights_of_a_run_bring_their_shape(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a preset the model is that of the weights; the same line resumes; a preset's other shape is refused."""
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL, "--num-kv-heads=1"]) == 0
    rest = "--batch-size 2 --max-steps 2 --num-eval-batches 1 --device cpu --precision fp32 --compile=false".split()
    line = ["--init-from", "r", "--train-data", "train_data.npy", "--out-dir", "again", *rest]
    assert cli_lm.train([*line, "--resume", "auto"]) == 0, "nothing there: it starts"
    assert [flat("again")[n] for n in ("d_model", "num_kv_heads", "context_length", "d_ff")] == [16, 1, 8, 16]
    assert cli_lm.train([*line, "--resume", "auto", "--max-steps", "3"]) == 0, "a relative path is the same path"
    assert [r["step"] for r in rows("again")] == ["0", "1", "2", "3"]
    with pytest.raises(BytekilnError, match="d_model: found 128; expected 16"):
        cli_lm.train(["demo", *line, "--out-dir", "other"])
    assert cli_lm.train(["--init-from", "r", "--eval-only", "--train-data", "train_data.npy", *rest]) == 0
    assert "in evaluation mode" in capsys.readouterr().out


def test_a_huggingface_folder_starts_a_run(here: Path) -> None:
    from safetensors.torch import save_file

    from bytekiln.config import ModelConfig
    from bytekiln.convert import export
    from bytekiln.model import TransformerLM

    config = ModelConfig(vocab_size=61, context_length=8, d_model=16, num_layers=1, num_heads=2, d_ff=32, norm_eps=1e-6)
    tensors, described = export(TransformerLM(config).state_dict(), config)
    (here / "theirs").mkdir()
    save_file(tensors, here / "theirs/model.safetensors")
    (here / "theirs/config.json").write_text(json.dumps(described))
    line = (
        "--init-from theirs --train-data train_data.npy --out-dir r --batch-size 2 --max-steps 2 --num-eval-batches 1"
    )
    assert cli_lm.train([*line.split(), "--device", "cpu", "--compile=false"]) == 0
    assert [flat("r")[n] for n in ("norm_eps", "d_ff", "ffn")] == [1e-6, 32, "swiglu"]


def test_the_twin_of_experts_resumes_by_its_own_line(here: Path) -> None:
    line = ["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL, "--ffn", "moe", "--dense-twin"]
    assert cli_lm.train(line) == 0
    assert [flat("r")[n] for n in ("ffn", "d_ff")] == ["swiglu", 32]
    assert cli_lm.train([*line, "--resume", "auto", "--max-steps", "3"]) == 0
    assert len(rows("r")) == 4


def test_a_stored_config_derives_anew(here: Path) -> None:
    """More heads are no grouped heads, and a longer window brings its positions."""
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL]) == 0
    assert cli_lm.train(["r/config.toml", "--num-heads", "4", "--context-length", "16", "--tensorboard-dir", "tb"]) == 0
    assert [flat("r-2")[n] for n in ("num_kv_heads", "max_seq_len")] == [4, 16]
    assert cli_lm.train(["r-2/config.toml"]) == 0
    assert flat("r-2-2")["tensorboard_dir"] == ""


def test_a_run_goes_on_in_another_folder(here: Path) -> None:
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL]) == 0
    assert cli_lm.train(["r", "--out-dir", "elsewhere", "--max-steps", "4"]) == 0
    assert [r["step"] for r in rows("elsewhere")] == ["0", "1", "2", "3", "4"]
    assert len(rows("r")) == 3


def test_another_measure_of_progress_is_refused_unless_allowed(here: Path) -> None:
    assert cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL]) == 0
    with pytest.raises(BytekilnError, match=r"progress: found tokens; expected steps.*--allow-change progress"):
        cli_lm.train(["r", "--token-budget", "64"])
    assert cli_lm.train(["r", "--token-budget", "64", "--allow-change", "progress"]) == 0
    assert [int(r["tokens"]) for r in rows("r")] == [0, 16, 32, 48, 64]


def test_several_files_with_spaces_between(here: Path) -> None:
    tokens(here / "b.npy", vocab=61, seed=3)
    line = ["demo", "--train-data", "train_data.npy, b.npy", "--data-weights", "0.7, 0.3", "--out-dir", "r", *SMALL]
    assert cli_lm.train(line) == 0
    again = [w.replace("0.7, 0.3", "0.7,0.3").replace("npy, b", "npy,b") for w in line]
    assert cli_lm.train([*again, "--resume", "auto", "--max-steps", "3"]) == 0


def test_windows_free_the_sampling_of_a_preset() -> None:
    assert load_config("tinystories").data.sampling == "random"
    assert load_config("tinystories", {"windows": "packed"}).data.sampling == "shuffled"


@pytest.mark.parametrize("name", ["debug", "medium", "large"])
def test_presets_of_the_guide_run(here: Path, name: str) -> None:
    assert cli_lm.train([name, "--train-data", "train_data.npy", "--out-dir", "r", *SMALL, "--vocab-size", "61"]) == 0
    assert flat("r")["preset"] == name


def test_rates_that_ruin_a_run_are_a_recorded_result(here: Path) -> None:
    """The assignment's 1e1, 1e2 and 1e3, with evaluations on the way."""
    for rate in ("1e1", "1e2", "1e3"):
        more = ["--max-steps", "30", "--eval-interval", "1", "--warmup-steps", "0", "--out-dir", f"lr{rate}"]
        status = cli_lm.train(["--dataset", "tinystories", "--lr", rate, *SMALL, *more])
        told = json.loads((here / f"lr{rate}/result.json").read_text())
        assert (status, told["status"]) in ((3, "diverged"), (0, "completed"))
        assert cli_report.report([f"lr{rate}", "--png"]) == 0


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "expected torchrun to set them all"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: found 'abc'"),
        (
            {"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK: found 'x'",
        ),
    ],
)
def test_half_a_torchrun(here: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        cli_lm.train(["demo", "--train-data", "train_data.npy", "--out-dir", "r", *SMALL])
    assert not (here / "r").exists()
