"""Two processes on one machine (gloo): the same windows, the same losses, one run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bytekiln.checkpoint import load_checkpoint
from bytekiln.errors import ConfigError
from bytekiln.metrics import read_metrics
from bytekiln.ranks import Ranks
from bytekiln.train import train
from lm_runs import ONE_THREAD, tiny

SETTINGS = {"grad_accum_steps": 4, "dropout": 0.1, "grad_clip": 0.5}


def command(folder: Path, *flags: str, **values: object) -> list[str]:
    config = folder / "two.toml"
    config.write_text(tiny(folder, **{**SETTINGS, "out_dir": str(folder / "two"), **values}).to_toml(), "utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    return [*launcher, "-m", "bytekiln.cli", "lm-train", str(config), *flags]


def launch(folder: Path, *flags: str, **values: object) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        command(folder, *flags, **values),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **ONE_THREAD},
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran


def losses(run: Path) -> list[tuple[float | None, float | None, int]]:
    return [(r.loss, r.val_loss, r.tokens) for r in read_metrics(run / "metrics.csv")]


def same_to_rounding(a: Path, b: Path) -> None:
    ours, theirs = losses(a), losses(b)
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x[2] == y[2]
        for u, v in zip(x[:2], y[:2], strict=True):
            assert (u is None) == (v is None)
            if u is not None:
                assert u == pytest.approx(v, rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"dropout": 0.0, "attention": "native"}], ids=["dropout", "native"])
def test_two_processes_learn_what_one_learns(tmp_path: Path, more: dict[str, object]) -> None:
    """Same sample order and dropout masks (the windows and seeds know no rank), so the same losses to rounding."""
    train(tiny(tmp_path, **{**SETTINGS, **more}, out_dir=str(tmp_path / "one")))
    ran = launch(tmp_path, **more)
    assert ran.stdout.count("completed: all steps done") == 1, "only the first process speaks"
    assert "2 processes" in ran.stdout
    same_to_rounding(tmp_path / "two", tmp_path / "one")
    a, b = (load_checkpoint(tmp_path / n / "checkpoints/checkpoint_final").model for n in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_shards_learn_what_one_learns(tmp_path: Path) -> None:
    """FSDP2: weights, gradients and moments are spread over the processes; checkpoints are whole."""
    train(tiny(tmp_path, **SETTINGS, out_dir=str(tmp_path / "one")))
    launch(tmp_path, parallel="fsdp")
    same_to_rounding(tmp_path / "two", tmp_path / "one")
    a, b = (load_checkpoint(tmp_path / n / "checkpoints/checkpoint_final") for n in ("one", "two"))
    assert a.training.keys() == b.training.keys()
    for name in a.training:
        assert a.training[name].shape == b.training[name].shape
    # and one process goes on from the shards' checkpoint
    result = train(tiny(tmp_path), resume=tmp_path / "two/checkpoints/checkpoint_4", given={"parallel": "auto"})
    assert result.status == "completed"
    same_to_rounding(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"averaging": "ema", "ema_decay": 0.5, "stats_interval": 2, "tie_embeddings": True},
        {"optimizer": "muon", "normuon": True, "ffn": "moe", "num_experts": 4, "load_balancing": "bias"},
    ],
    ids=lambda v: ",".join(v),
)
def test_shards_do_what_one_process_does(tmp_path: Path, values: dict[str, object]) -> None:
    """Forwards beside the step (statistics, evaluation of averaged weights) leave nothing gathered behind."""
    train(tiny(tmp_path, **SETTINGS, **values, out_dir=str(tmp_path / "one")))
    launch(tmp_path, parallel="fsdp", **values)
    same_to_rounding(tmp_path / "two", tmp_path / "one")
    norms = [[r.grad_norm for r in read_metrics(tmp_path / n / "metrics.csv")][1:] for n in ("one", "two")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    a, b = (load_checkpoint(tmp_path / n / "checkpoints/checkpoint_final").model for n in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_sigterm_and_resume(tmp_path: Path, kind: str) -> None:
    """All processes stop at the same step; the run goes on."""
    values = {"parallel": kind, "max_steps": 100_000, "eval_interval": 50, "checkpoint_interval": 0, "decay_steps": 400}
    process = subprocess.Popen(
        command(tmp_path, **values),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    metrics = tmp_path / "two/metrics.csv"
    end = time.monotonic() + 100
    while time.monotonic() < end and not (metrics.exists() and metrics.stat().st_size > 900):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    saved = sorted((tmp_path / "two/checkpoints").glob("checkpoint_[0-9]*"))
    assert saved, out[-3000:]
    step = load_checkpoint(saved[-1]).step
    assert step > 0
    launch(tmp_path, "--resume", "auto", "--max-steps", str(step + 3), **values)
    assert read_metrics(metrics)[-1].step == step + 3


def test_micro_steps_are_shared_out_evenly_or_refused() -> None:
    assert [list(Ranks(r, 2).share_of(6)) for r in range(2)] == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(ConfigError, match=r"grad_accum_steps: found 3 micro-steps for 2 processes.*such as 4"):
        Ranks(0, 2).share_of(3)
