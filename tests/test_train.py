"""The loop: what it leaves behind, what it learns, and how it ends."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch

from bytekiln import loop
from bytekiln.checkpoint import load_checkpoint
from bytekiln.config import from_flat, load_config
from bytekiln.errors import ConfigError, DivergedError, FileError
from bytekiln.metrics import Row, read_metrics
from bytekiln.objective import Loss, Objective
from bytekiln.prepare import find_device
from bytekiln.run_state import State
from bytekiln.schedule import Progress, learning_rate
from bytekiln.train import Result, train
from lm_runs import TIMES, VOCAB, tiny, tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, list[str]]:
    folder = tmp_path_factory.mktemp("run")
    said: list[str] = []
    result = train(tiny(folder), say=said.append)
    return folder / "run", result, said


def test_run_folder(run: tuple[Path, Result, list[str]]) -> None:
    folder, result, _ = run
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "config.toml", "metrics.csv", "result.json"]
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert names == {"checkpoint_2", "checkpoint_4", "checkpoint_6", "checkpoint_best", "checkpoint_final"}
    told = json.loads((folder / "result.json").read_text())
    assert told["status"] == result.status == "completed"
    assert told["steps"] == told["max_steps"] == 6
    assert told["tokens"] == 6 * 3 * 8
    assert told["parameters"] == sum(
        t.numel() for t in load_checkpoint(folder / "checkpoints/checkpoint_final").model.values()
    )
    assert told["best_val_loss"] <= told["final_val_loss"]
    assert told["final_bits_per_byte"] == pytest.approx(told["final_val_loss"] / math.log(2) / 3)
    assert told["uniform_loss"] == pytest.approx(math.log(VOCAB))


def test_one_row_a_step(run: tuple[Path, Result, list[str]]) -> None:
    folder, result, _ = run
    rows = read_metrics(folder / "metrics.csv")
    assert [r.step for r in rows] == list(range(7))
    assert [r.step for r in rows if r.val_loss is not None] == [0, 4, 6]
    assert all((r.val_loss is None) == (r.train_eval_loss is None) == (r.bits_per_byte is None) for r in rows)
    config = load_config(folder / "config.toml")
    assert [r.lr for r in rows[1:]] == [learning_rate(Progress(t, 6, 0, 0, 0.0, 0.0), config) for t in range(6)]
    assert rows[-1].val_loss == result.final_val_loss
    assert all(r.grad_norm and r.tokens_per_s for r in rows[1:])


def test_console_shows_what_people_look_for(run: tuple[Path, Result, list[str]]) -> None:
    text = "\n".join(run[2])
    expected = (
        "Using device: cpu",
        "Loading training data...",
        "Loading validation data...",
        f"Model created with {run[1].parameters:,} total parameters",
        f"(ln {VOCAB} = {math.log(VOCAB):.4f})",
        "Iter      2 | Loss: ",
        " | Time: 0.",
        " | LR: 5.00e-03 | ",
        "tokens/s",
        "Iter      4 | Val Loss: ",
        "Saving checkpoint to ",
    )
    for words in expected:
        assert words in text, words


def test_resolved_config_repeats_the_run(run: tuple[Path, Result, list[str]], tmp_path: Path) -> None:
    folder, result, _ = run
    again = train(load_config(folder / "config.toml", {"out_dir": str(tmp_path / "again")}))
    assert again.final_val_loss == result.final_val_loss
    assert Path(load_config(folder / "config.toml").data.train_data).is_absolute()


def test_overfits_one_batch(tmp_path: Path) -> None:
    data = tokens(tmp_path / "train.npy", 9)  # one window of eight tokens, again and again
    config = tiny(tmp_path, train_data=str(data), val_data="", max_steps=60, d_model=32, eval_interval=0)
    result = train(config)
    assert result.final_train_loss is not None
    assert result.final_train_loss < 0.05
    assert result.final_val_loss is None


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    large = train(tiny(tmp_path, batch_size=12, out_dir=str(tmp_path / "large")))
    small = train(tiny(tmp_path, batch_size=3, grad_accum_steps=4, num_eval_batches=8, out_dir=str(tmp_path / "small")))
    a, b = (read_metrics(tmp_path / n / "metrics.csv") for n in ("large", "small"))
    for x, y in zip(a[1:], b[1:], strict=True):
        assert x.loss == pytest.approx(y.loss, rel=1e-5)
        assert x.grad_norm == pytest.approx(y.grad_norm, rel=1e-4)
    assert large.final_val_loss == pytest.approx(small.final_val_loss, rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        {"norm": "layer", "position": "learned", "ffn": "gelu", "tie_embeddings": True, "init": "gpt2"},
        {"norm": "none", "ffn": "silu", "position": "none"},
        {"norm_position": "post", "dropout": 0.1},
    ],
)
def test_every_shape_learns(tmp_path: Path, values: dict[str, object]) -> None:
    result = train(tiny(tmp_path, **values, max_steps=40, eval_interval=0, checkpoint_interval=0))
    assert result.initial_loss is not None
    assert result.final_val_loss is not None
    assert result.final_val_loss < result.initial_loss - 0.3


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    fp32 = train(tiny(tmp_path, out_dir=str(tmp_path / "fp32")))
    bf16 = train(tiny(tmp_path, precision="bf16", out_dir=str(tmp_path / "bf16")))
    assert bf16.precision == "bf16"
    assert bf16.final_val_loss != fp32.final_val_loss
    assert bf16.final_val_loss == pytest.approx(fp32.final_val_loss, rel=0.02)


def test_nonfinite_loss_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Objective.forward, []

    def poisoned(self: Objective, *args: torch.Tensor) -> Loss:
        parts = real(self, *args)
        calls.append(1)
        factor = math.nan if len(calls) == 4 else 1.0
        return parts._replace(total=parts.total * factor, nll=parts.nll * factor)

    monkeypatch.setattr(Objective, "forward", poisoned)
    result = train(tiny(tmp_path))
    assert (result.status, result.steps) == ("diverged", 3)
    assert "step 4: found loss nan" in result.why
    assert read_metrics(tmp_path / "run/metrics.csv")[-1].step == 3
    json.loads((tmp_path / "run/result.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    good = load_checkpoint(tmp_path / "run/checkpoints/checkpoint_2")
    assert all(t.isfinite().all() for t in good.model.values())
    assert not (tmp_path / "run/checkpoints/checkpoint_final").exists()
    monkeypatch.undo()
    assert train(tiny(tmp_path), resume="auto").status == "completed"


def test_high_loss_three_times_is_divergence(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, lr=1000.0, max_steps=60, warmup_steps=0, checkpoint_interval=0))
    assert result.status == "diverged"
    assert result.initial_loss is not None
    rows = read_metrics(tmp_path / "run/metrics.csv")
    high = [r.loss is not None and r.loss > 2 * result.initial_loss for r in rows]
    if "in succession" in result.why:
        assert high[-3:] == [True] * 3
    assert result.steps < 60


def test_high_rows_must_come_in_succession() -> None:
    run = object.__new__(loop.Run)
    run.s, run.record, run.config = State(initial_loss=1.0), None, from_flat({})
    for loss in (3.0, 3.0, 1.5, 3.0, 2.5):
        run._write(Row(1, 1, 0.0, loss=loss))
    with pytest.raises(DivergedError):
        run._write(Row(1, 1, 0.0, loss=9.0))


def test_devices() -> None:
    assert find_device("cpu").type == "cpu"
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    for bad in ("tpu", "cuda:99", "gpu"):
        with pytest.raises(ConfigError, match=f"device: found {bad}"):
            find_device(bad)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file"):
        train(tiny(tmp_path, out_dir=str(tmp_path / "file")))
    with pytest.raises(FileError, match="expected a writable folder"):
        train(tiny(tmp_path, out_dir=str(tmp_path / "file/below")))
    locked = tmp_path / "locked"
    locked.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    if not os.access(locked, os.W_OK):  # root may write anywhere
        with pytest.raises(FileError, match="locked"):
            train(tiny(tmp_path, out_dir=str(locked / "run")))


def test_full_disk_ends_the_run_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bytekiln import checkpoint

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync_file", full)
    with pytest.raises(FileError, match="checkpoint_2: cannot be written: no space left on device"):
        train(tiny(tmp_path))
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    monkeypatch.undo()
    assert train(tiny(tmp_path), resume="auto").status == "completed"


def test_paths_of_their_own(tmp_path: Path) -> None:
    config = tiny(tmp_path, checkpoint_dir=str(tmp_path / "saved"), metrics_path=str(tmp_path / "log/run.csv"))
    with pytest.raises(FileError, match="log: no such folder"):
        train(config)
    (tmp_path / "log").mkdir()
    train(config)
    assert (tmp_path / "saved/checkpoint_final/state.json").is_file()
    assert len(read_metrics(tmp_path / "log/run.csv")) == 7
    assert not (tmp_path / "run/metrics.csv").exists()


@pytest.mark.slow
def test_compiled_run_resumes_bit_identically(tmp_path: Path) -> None:
    """Everything that has a memory, compiled: weights, moments, averages, guard and all columns but times."""
    values = {"compile": True, "max_steps": 4, "dropout": 0.1, "checkpoint_interval": 2, "grad_accum_steps": 3}
    values |= {"averaging": "ema", "skip_spikes": True, "early_stopping_patience": 9}
    said: list[str] = []
    whole = train(tiny(tmp_path, **values, out_dir=str(tmp_path / "whole")), notice=said.append)
    assert said == [], "compiled, not fallen back"
    train(tiny(tmp_path, **values, out_dir=str(tmp_path / "cut")))
    train(from_flat({}), resume=tmp_path / "cut/checkpoints/checkpoint_2")
    for name in ("model", "training"):
        a, b = (
            (tmp_path / n / f"checkpoints/checkpoint_final/{name}.safetensors").read_bytes() for n in ("whole", "cut")
        )
        assert a == b, name
    a_rows, b_rows = (
        [{k: v for k, v in vars(r).items() if k not in TIMES} for r in read_metrics(tmp_path / n / "metrics.csv")]
        for n in ("whole", "cut")
    )
    assert a_rows == b_rows
    assert whole.compiled
    assert whole.recompiles == 0
