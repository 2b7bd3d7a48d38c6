"""The bench of a training step runs: every contestant of both shapes takes steps, and its loss falls."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from lm_runs import ONE_THREAD


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_contestants_take_steps(shape: str) -> None:
    peers = {"gpt2": ["transformers GPT-2, eager", "plain PyTorch, eager"], "llama": ["transformers Llama, eager"]}
    peer = peers[shape]
    line = [sys.executable, str(ROOT / "benches/peers.py"), "lm", "--shape", shape, "--steps", "3", "--json"]
    ran = subprocess.run(
        [*line, "--once", "bytekiln, eager", *peer], capture_output=True, text=True, env={**os.environ, **ONE_THREAD},
        timeout=280, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert list(told) == ["bytekiln, eager", *peer]
    for run in told.values():
        assert len(run["step_s"]) == 3 and min(run["step_s"]) > 0
        assert run["first_loss"] == pytest.approx(told["bytekiln, eager"]["first_loss"], rel=0.02)
