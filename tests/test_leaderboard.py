"""The leaderboard's presets: what they say, what a plan says of them, and that a small twin keeps their clock.

Every part of a twin is the preset's but for sizes, device and compiler.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from bytekiln import cli_lm
from bytekiln.config import load_config
from bytekiln.learner import Learner
from bytekiln.metrics import Row, read_metrics
from bytekiln.model import TransformerLM
from bytekiln.muon import Muon
from bytekiln.plan import make_plan
from bytekiln.ranks import Ranks
from bytekiln.yardstick import load_yardstick
from fake_cuda import CUDA
from lm_runs import ONE_THREAD, tokens
from test_learner import born_on_cuda

PRESETS = ("leaderboard-h100", "leaderboard-b200")
SMALLER: dict[str, object] = {
    "vocab_size": 61, "context_length": 32, "eval_context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 2,
    "batch_size": 2, "grad_accum_steps": 1, "eval_interval": 20, "num_eval_batches": 2, "checkpoint_interval": 15,
    "log_interval": 20, "device": "cpu", "compile": "false",
}  # fmt: skip


def twin(folder: Path, seconds: int, preset: str = PRESETS[0], **more: object) -> list[str]:
    """The command line of a preset, scaled down to this machine."""
    for name, count in (("train", 20_000), ("val", 2_000)):
        if not (folder / f"{name}.npy").exists():
            tokens(folder / f"{name}.npy", count, eot=7)
    values = {
        **SMALLER, "train_data": folder / "train.npy", "val_data": folder / "val.npy", "max_time": f"{seconds}s", **more
    }  # fmt: skip
    return [preset, *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


def assert_ended_well(folder: Path, preset: str = PRESETS[0]) -> list[Row]:
    """At the floor of its rate, on the whole validation set, in a batch that has grown."""
    rows, told = read_metrics(folder / "metrics.csv"), json.loads((folder / "record.json").read_text("utf-8"))
    optimizer = load_config(preset).optimizer
    rates = [r.lr for r in rows if r.lr is not None]
    assert max(rates) <= optimizer.lr
    assert rates[-1] == pytest.approx(optimizer.floor_lr, rel=1e-9)
    assert rates[-1] == min(rates[len(rates) // 3 :])
    assert told["loss"] == rows[-1].val_loss is not None and told["whole_validation_set"]
    per_step = [b.tokens - a.tokens for a, b in itertools.pairwise(rows)]
    assert max(per_step) > 1.6 * min(per_step), "the batch grew"
    assert [r.step for r in rows] == list(range(len(rows)))
    return rows


@pytest.mark.alone
def test_a_twin_ends_at_the_floor_killed_and_resumed_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six seconds, unbroken; and with a SIGTERM in the twentieth step, which is taken again.

    How exactly the clock is kept is the slow test's: a machine that others use may stop for longer than a tolerance.
    """
    seconds = 6
    assert cli_lm.train([*twin(tmp_path, seconds), f"--out-dir={tmp_path}/whole"]) == 0
    whole = assert_ended_well(tmp_path / "whole")
    real, stops = Learner.gradients, [19]

    def gradients(self: Learner, batches: object, step: int, *rest: int) -> object:
        if step in stops:
            stops.remove(step)
            signal.raise_signal(signal.SIGTERM)
        return real(self, batches, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "gradients", gradients)
    argv = [*twin(tmp_path, seconds, PRESETS[1]), f"--out-dir={tmp_path}/broken"]
    assert cli_lm.train(argv) == 128 + signal.SIGTERM
    assert cli_lm.train([*argv, "--resume"]) == 0
    broken = assert_ended_well(tmp_path / "broken", PRESETS[1])
    assert len(whole) > 20 and len(broken) > 20


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("killed_after", [None, 25], ids=["unbroken", "killed"])
def test_a_twin_finishes_within_a_second_of_sixty(tmp_path: Path, killed_after: int | None) -> None:
    """By the clock of whoever waits: processes from start to end, SIGKILL and a second start included."""
    argv = [sys.executable, "-m", "bytekiln.cli", "lm-train", *twin(tmp_path, 60, checkpoint_interval=50)]
    argv.append(f"--out-dir={tmp_path}/run")
    spent = 0.0
    if killed_after is not None:
        began = time.perf_counter()
        process = subprocess.Popen(argv, env={**os.environ, **ONE_THREAD}, stdout=subprocess.DEVNULL)
        time.sleep(killed_after)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        spent = time.perf_counter() - began
        argv.append("--resume")
    began = time.perf_counter()
    subprocess.run(argv, env={**os.environ, **ONE_THREAD}, check=True, stdout=subprocess.DEVNULL)
    spent += time.perf_counter() - began
    assert_ended_well(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "record.json").read_text("utf-8"))["time_s"] <= 60.5
    assert spent == pytest.approx(60, abs=1)


# --- the plan ---


@pytest.mark.parametrize(("preset", "gpu", "memory"), [(PRESETS[0], "H100", 80e9), (PRESETS[1], "B200", 180e9)])
def test_a_plan_tells_tokens_memory_and_what_to_expect(preset: str, gpu: str, memory: float) -> None:
    config = load_config(preset)
    plan = make_plan(config, None, config.training.target_gpu, largest=False)
    assert (plan.device, plan.memory_limit) == (gpu, memory)
    parts = {
        name: getattr(plan.footprint, name) for name in ("weights", "gradients", "optimizer", "activations", "loss")
    }
    assert all(size > 0 for size in parts.values())
    assert plan.footprint.total <= sum(parts.values())
    assert plan.process_bytes < 80e9, "of either: the logits never exist whole, and the stream is bf16"
    assert parts["loss"] < 0.5 * 4 * config.training.batch_size * 512 * 32_000
    assert (
        plan.length.ends_by == "max_time"
        and 0.9 * config.training.max_time < plan.time.run_s <= config.training.max_time
    )
    assert plan.prospect is not None and plan.prospect.mfu == 0.4
    flops = plan.flops_per_token * plan.length.tokens
    assert plan.prospect.expected == load_yardstick("owt-32k").expected(flops)
    for b in plan.prospect.break_even:
        assert b.mfu is not None and 0.1 < b.mfu < 0.4, "below what is assumed: else the recipe is not worth its time"
    told = json.loads(json.dumps(plan.as_json()))["prospect"]
    assert told["assumed_mfu"] == 0.4 and len(told["published"]) == 3


def test_the_table_shows_what_is_expected(capsys: pytest.CaptureFixture[str]) -> None:
    """A small model for the preset's own GPU: its memory is known, and what was left out is said."""
    from bytekiln import cli_plan

    small = ["--vocab-size=64", "--context-length=32", "--d-model=16", "--num-layers=1", "--num-heads=1", "--d-ff=16"]
    assert cli_plan.plan([PRESETS[0], *small, "--eval-context-length=32", "--memory=1"]) == 0
    out = capsys.readouterr().out
    assert "leaderboard-h100 on H100, bf16, compiled" in out
    for line in ("tokens  ", "training FLOPs  ", "assumed MFU     40.0 %", "expected loss", "an estimate", "source  "):
        assert line in out, line
    assert "best entry: expected from MFU" in out
    assert "start, compiling, the whole validation set (--val-data)" in out
    assert cli_plan.plan([PRESETS[0], *small, "--eval-context-length=32", "--memory=1", "--device=cpu"]) == 0
    assert "on H100" not in capsys.readouterr().out


# --- its graphs, on a GPU that is not there ---


def captured(learner: Learner, ids_BxT: torch.Tensor) -> list[torch.fx.GraphModule]:
    """The graphs of forward and loss, and of the optimizer's matrices; a break would be an error."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compile(learner.parallel, backend=keep, fullgraph=True)(ids_BxT, ids_BxT, None)
    muon = learner.optimizer.rules[0]
    assert isinstance(muon, Muon)
    for p in learner.model.parameters():
        p.grad = torch.empty_like(p)
    gradients = [s.bundle.gradients() for s in muon.stacks]
    with torch.no_grad():
        take = torch.ones((), dtype=torch.bool, device=CUDA)
        torch.compile(muon._move_all, backend=keep, fullgraph=True)(gradients, torch.zeros(()), take)
    return graphs


def calls(graph: torch.fx.GraphModule, name: str) -> Counter[tuple[object, ...]]:
    """Shapes and type of what the operations with this name make."""
    made = [n.meta["example_value"] for n in graph.graph.nodes if n.op == "call_function" and name in str(n.target)]
    return Counter((*x.shape, x.dtype) for x in made)


def test_one_graph_for_the_loss_and_one_for_the_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of the preset at its own width, batch and type: the shapes of its kernels, and not a single break."""
    config = load_config(PRESETS[0], {"num_layers": 2})
    monkeypatch.setattr(TransformerLM, "initialise", lambda _: None)
    monkeypatch.setattr("bytekiln.learner.make_model", born_on_cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    torch._dynamo.reset()
    counters.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        learner = Learner(config, CUDA, Ranks())
        ids_BxT = torch.zeros(64, 512, dtype=torch.int64, device=CUDA)
        graphs = captured(learner, ids_BxT)
    assert (len(graphs), dict(counters["graph_break"]), counters["stats"]["unique_graphs"]) == (2, {}, 2)
    low = torch.bfloat16
    loss, matrices = graphs
    assert calls(loss, "scaled_dot_product_attention") == {(64, 8, 512, 128, low): 2}
    assert calls(loss, "linear")[(64, 512, 4096, low)] == 2, "the feed-forward's first product"
    assert not [k for k in calls(loss, "linear") if k[-2] == 32_000], "the logits never exist whole"
    made = calls(matrices, "bmm")
    # polynomials of five iterations, three products each, on stacks of one shape: rows² and the matrices themselves
    assert {k[-1] for k in made} == {low}
    assert made[(8, 1024, 1024, low)] == 15 and made[(2, 1024, 4096, low)] == 2 * 5
    assert made[(2, 1024, 1024, low)] == 2 * 2 * 5
    torch._dynamo.reset()
