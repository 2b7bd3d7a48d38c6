"""`lm-plan`: its memory against measured memory, its tables, its largest batch, its errors."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytekiln import cli_plan, hardware
from bytekiln.attention import sdpa_attention
from bytekiln.checkpoint import Checkpoint, save_checkpoint
from bytekiln.config import UNLIMITED_STEPS, RunConfig, from_flat, load_config
from bytekiln.errors import ConfigError
from bytekiln.footprint import GRANULE, Footprint, Simulation
from bytekiln.hardware import PEAKS, Peak, measure, mfu, peak_flops
from bytekiln.metrics import read_metrics
from bytekiln.model import TransformerLM
from bytekiln.optim import make_optimizer
from bytekiln.plan import (
    BATCHES_WITHOUT_VALIDATION,
    COMPILED,
    HELD,
    REHEARSED_PARAMETERS,
    RESERVE,
    largest_batch,
    length_of,
    make_plan,
    windows_to_rehearse,
)
from bytekiln.prepare import resolved
from bytekiln.rehearsal import Timed, rehearse
from conftest import Result
from lm_runs import ONE_THREAD, tiny, tokens

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 50, "context_length": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "batch_size": 3,
    "precision": "fp32", "compile": False, "device": "cpu",
}  # fmt: skip


def footprint(**values: object) -> Footprint:
    config = from_flat({**SMALL, **values})
    return Simulation(config, CPU).step(config.training.batch_size)


# --- simulated memory against measured memory ---------------------------------------------------------------

MEASURED_STEP = """
import gc, json, sys, torch
from bytekiln.config import from_flat
from bytekiln.model import TransformerLM
from bytekiln.objective import Objective
from bytekiln.optim import clip_gradients, make_optimizer

def resident(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))

def built(config):
    model = TransformerLM(config.model)
    return model, Objective(model, config), make_optimizer(model, config.optimizer)

def step(config, model, objective, optimizer):
    t = config.training
    for _ in range(t.grad_accum_steps):
        ids = torch.randint(0, config.model.vocab_size, (t.batch_size, config.model.context_length))
        (objective(ids, ids).total / ids.numel()).backward()
    clip_gradients(optimizer.parameters, 1.0)
    optimizer.step(1e-4, torch.ones((), dtype=torch.bool))
    optimizer.zero_grad()

values = json.loads(sys.argv[1])
config = from_flat(values)
tiny = from_flat({**values, "d_model": 32, "d_ff": 64, "num_heads": 2, "num_layers": 1, "vocab_size": 64})
parts = built(tiny)
step(tiny, *parts)  # kernels and their own buffers are there from here on
del parts
gc.collect()
before = resident("VmRSS")
parts = built(config)
step(config, *parts)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew (proc(5))
step(config, *parts)
print(resident("VmHWM") - before)
"""


def measured_bytes(values: dict[str, object]) -> int:
    """High-water mark of a step's resident memory over that of the process before it.

    Every block above 64 kB is mapped and unmapped by itself, so that what is freed is gone and what is resident is
    what tensors hold; with a heap that keeps freed blocks one would measure its holes as well.
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED_STEP, json.dumps(values)], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


SHAPES: dict[str, dict[str, object]] = {
    "llama": {"vocab_size": 4000, "d_model": 256, "num_layers": 6, "num_heads": 8, "context_length": 256,
              "batch_size": 4},
    "gpt2 with dropout": {"vocab_size": 10_000, "d_model": 256, "num_layers": 2, "num_heads": 8, "context_length": 128,
              "batch_size": 16, "norm": "layer", "position": "learned", "ffn": "gelu", "tie_embeddings": True,
              "dropout": 0.1},
    "muon, mostly weights": {"vocab_size": 1000, "d_model": 384, "num_layers": 8, "num_heads": 8,
              "context_length": 128, "batch_size": 2, "grad_accum_steps": 3, "optimizer": "muon"},
    "experts": {"vocab_size": 1000, "d_model": 256, "num_layers": 2, "num_heads": 8, "context_length": 128,
              "batch_size": 8, "ffn": "moe", "num_experts": 4},
    "all logits at once": {"vocab_size": 8000, "d_model": 192, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2,
              "context_length": 128, "batch_size": 12, "loss_chunk": 0, "qk_norm": True, "averaging": "none"},
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in SHAPES if n != "llama")])
def test_simulated_memory_is_what_is_measured(name: str) -> None:
    values = {**SHAPES[name], "precision": "fp32", "compile": False}
    config = from_flat(values)
    simulated = Simulation(config, CPU).step(config.training.batch_size).total
    assert 100e6 < simulated < 700e6  # enough for the noise to be small
    assert simulated == pytest.approx(measured_bytes(values), rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("batch_size", "more"),
    [
        (2, {}), (32, {}), (64, {}),
        # blocks of 34 MB: the scores of attention with dropout
        (2, {"context_length": 1024, "max_seq_len": 1024, "num_layers": 2, "dropout": 0.1}),
    ],
)  # fmt: skip
def test_memory_of_the_whole_process(tmp_path: Path, batch_size: int, more: dict[str, object]) -> None:
    """What `lm-plan` calls the process's is the greatest that `lm-train` ever holds: the largest batch rests on it."""
    shape = {"d_model": 128, "num_layers": 4, "num_heads": 4, "context_length": 256, "batch_size": batch_size}
    shape |= more
    tokens(tmp_path / "train.npy", 20_000)
    tokens(tmp_path / "val.npy", 10_000, seed=1)
    config = tiny(tmp_path, **shape, max_steps=4)
    (tmp_path / "c.toml").write_text(config.to_toml(), "utf-8")
    command = [sys.executable, "-m", "bytekiln.cli", "lm-train", str(tmp_path / "c.toml")]
    # A process begins with the high-water mark of the one that forked it, so a small one starts it.
    small = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], stdout=sys.stderr, check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    ran = subprocess.run([sys.executable, "-c", small, *command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert make_plan(config).process_bytes == pytest.approx(1024 * int(ran.stdout), rel=0.1)


# --- what the parts must be, by hand ------------------------------------------------------------------------


def numel(config: RunConfig) -> int:
    return sum(p.numel() for p in TransformerLM(config.model).parameters())


def test_nothing_is_allocated() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = footprint(d_model=4096, num_heads=32, d_ff=0, num_layers=4, vocab_size=30_000, context_length=1024)
    assert found.total > 15e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("values", "copies"),
    [
        ({"optimizer": "adamw"}, 2),
        ({"optimizer": "lion"}, 1),
        ({"optimizer": "sgd"}, 1),
        ({"optimizer": "adamw", "averaging": "ema"}, 3),
        ({"optimizer": "lion", "averaging": "tail"}, 2),
    ],
)
def test_weights_gradients_and_state_are_copies_of_the_parameters(values: dict[str, object], copies: int) -> None:
    # Widths of 16 floats, 64 bytes, so that nothing but counters is rounded up to the allocator's granule.
    config = from_flat({**SMALL, **values, "position": "none", "vocab_size": 64, "d_ff": 32})
    found, weights = footprint(**{**values, "position": "none", "vocab_size": 64, "d_ff": 32}), 4 * numel(config)
    assert found.weights == weights
    assert found.gradients == weights
    assert 0 <= found.optimizer - copies * weights <= 64 * 40  # counters


def test_muon_keeps_one_copy_for_matrices_and_two_for_the_rest() -> None:
    config = from_flat({**SMALL, "optimizer": "muon", "position": "none"})
    lm = TransformerLM(config.model)
    matrices = sum(p.numel() for n, p in lm.named_parameters() if n.startswith("layers.") and p.ndim == 2)
    expected = 4 * (matrices + 2 * (numel(config) - matrices))
    found = footprint(optimizer="muon", position="none").optimizer
    assert expected <= found <= expected + 64 * 60


def test_memory_grows_by_the_same_for_every_window_and_accumulation_keeps_it() -> None:
    simulation = Simulation(from_flat({**SMALL, "d_model": 64, "d_ff": 128}), CPU)
    a, b, c = (simulation.step(n) for n in (8, 16, 24))
    assert (a.weights, a.optimizer) == (b.weights, b.optimizer)
    assert b.activations - a.activations == pytest.approx(c.activations - b.activations, rel=0.01)
    assert simulation.step(8) == a  # nothing is left over from the steps before
    accumulating = footprint(d_model=64, d_ff=128, batch_size=8, grad_accum_steps=5)
    assert a.total < accumulating.total <= a.total + a.gradients  # gradients stand while the next forward runs


def test_chunked_loss_never_holds_the_logits() -> None:
    values = {"vocab_size": 5000, "context_length": 64, "batch_size": 16}
    logits = 4 * 5000 * 64 * 16
    assert footprint(**values, loss_chunk=0).loss >= 2 * logits
    assert footprint(**values, loss_chunk=64).loss < logits


@pytest.mark.parametrize(
    "values",
    [
        {"loss_chunk": 64},
        {"loss_chunk": 63},
        {"loss_chunk": 100, "precision": "bf16"},
        {"loss_chunk": 171, "tie_embeddings": True, "grad_accum_steps": 3},
        {"loss_chunk": 100, "z_loss": 1e-4, "logit_softcap": 15.0},
        {"vocab_size": 50_257},
    ],
)
def test_some_chunks_of_the_loss_tell_of_all(values: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, bytes moved and operations are to the last one those of a trace of every chunk (of whole granules)."""
    values = {"vocab_size": 5000, "context_length": 64, "batch_size": 16, "d_model": 32, **values}
    few = footprint(**values)
    monkeypatch.setattr("bytekiln.footprint.CHUNKS_TRACED", 10**9)
    assert footprint(**values) == few


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_trace_without_the_update_is_the_same(accumulated: int) -> None:
    """What clipping and update need is traced once and added to every further batch."""
    values = {**SMALL, "d_model": 96, "d_ff": 600, "optimizer": "muon", "grad_accum_steps": accumulated}
    first, then = (Simulation(from_flat(values), CPU) for _ in range(2))
    then.step(7)
    for batch in (1, 40):
        assert first.step(batch) == then.step(batch)
        first = Simulation(from_flat(values), CPU)


def test_half_precision_keeps_smaller_activations() -> None:
    # By torch's operators, as on a GPU: in float32 the core keeps less (block.py), which hides the difference.
    values = {"d_model": 64, "d_ff": 1024, "batch_size": 16, "num_layers": 4, "ffn": "gelu"}

    def kept(**more: object) -> int:
        return Simulation(from_flat({**SMALL, **values, **more}), CPU, foreign=True).step(16).activations

    assert kept(precision="bf16") < 0.8 * kept()


def test_blocks_of_the_core_keep_less_than_torch_does() -> None:
    values = {"d_model": 64, "d_ff": 256, "batch_size": 64, "num_layers": 6, "ffn": "gelu"}
    config = from_flat({**SMALL, **values})
    by_torch = Simulation(config, CPU, foreign=True).step(64).activations
    assert footprint(**values).activations < 0.8 * by_torch


@pytest.mark.parametrize(("windows", "held"), [("stream", 0), ("packed", 1), ("padded", 1)])
def test_masked_models_see_no_padding_and_that_takes_memory(windows: str, held: int) -> None:
    """Packed and padded windows come with documents: a mask of T² booleans for every window at the least."""
    values = {"context_length": 256, "batch_size": 4, "objective": "mlm"}
    plain, found = footprint(**values), footprint(**values, windows=windows)
    assert found.total - plain.total >= held * 4 * 256 * 256
    assert (found == plain) is not bool(held)
    assert (
        footprint(**{**values, "objective": "next_token"}, windows=windows).calls
        == footprint(**{**values, "objective": "next_token"}).calls
    )


# --- a plan -----------------------------------------------------------------------------------------------------


def test_the_whole_plan(tmp_path: Path) -> None:
    plan = make_plan(from_flat({**SMALL, "max_steps": 40, "checkpoint_interval": 10, "eval_interval": 20}))
    said = plan.as_json()
    memory = said["memory_bytes"]
    assert isinstance(memory, dict)
    assert said["parameters"] == numel(plan.config) == sum(plan.parameters_by_part.values())
    assert said["flops_per_token"] == sum(plan.flops_by_part.values())
    parts = memory["weights"] + memory["gradients"] + memory["optimizer"] + memory["activations"] + memory["loss"]
    assert max(memory["weights"] + memory["optimizer"], memory["activations"]) < memory["total"] <= parts
    assert said["steps"] == 40 and said["tokens"] == 40 * 3 * 8
    assert plan.time.run_s == pytest.approx(40 * plan.time.step_s + 3 * plan.time.evaluation_s)
    assert plan.checkpoints == 4 + 1

    lm = TransformerLM(plan.config.model)
    optimizer = make_optimizer(lm, plan.config.optimizer)
    lm(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizer.step(1e-3)
    save_checkpoint(tmp_path / "c", Checkpoint(1, plan.config, dict(lm.state_dict()), optimizer.state_tensors()))
    on_disk = sum(p.stat().st_size for p in (tmp_path / "c").glob("*.safetensors"))
    assert plan.checkpoint_bytes <= on_disk <= plan.checkpoint_bytes + 20_000  # headers with the names


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config = from_flat(SMALL)
    memory = RESERVE["cpu"] + 20_000_000
    plan = make_plan(config, memory=memory)
    simulation = Simulation(plan.config, CPU)
    last, next_one = (
        round(simulation.step(plan.largest_batch + extra).total * HELD["cpu"]) + RESERVE["cpu"] for extra in (0, 1)
    )
    assert last <= memory < next_one


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(0, 10**6), st.integers(0, 10**9), st.integers(1, 3000))
def test_the_search_finds_the_last_batch_below_the_budget(
    fixed: int, slope: int, floor: int, budget: int, start: int
) -> None:
    calls = []

    def total(batch: int) -> int:
        calls.append(batch)
        return max(floor, fixed + slope * batch)

    found = largest_batch(total, budget, {0: fixed, start: max(floor, fixed + slope * start)})
    assert found == 0 or max(floor, fixed + slope * found) <= budget
    assert found == 1 << 20 or max(floor, fixed + slope * (found + 1)) > budget
    assert len(calls) <= 45 and len(set(calls)) == len(calls)


def test_a_large_model_is_traced_no_oftener_than_it_must_be() -> None:
    """One more window needs no trace where the line already says that it is too much."""
    calls: list[int] = []

    def total(batch: int) -> int:
        calls.append(batch)
        return max(30, 20 + 4 * batch)

    assert largest_batch(total, 80, {0: 12, 1: total(1)}) == 15
    assert calls == [1, 3, 51, 15]
    calls.clear()
    assert largest_batch(total, 80, {0: 12, 1: total(1)}, 1000) == 15  # so uneven a line proves nothing
    assert calls == [1, 3, 51, 15, 16]


def test_length_of_a_run() -> None:
    base = from_flat({**SMALL, "max_steps": 100})
    assert length_of(base) == (100, 100 * 24, "max_steps")
    staged = base.with_(grad_accum_steps=2, batch_stages="0.25:2 0.5:4")
    assert length_of(staged)[:2] == (100, 48 * (25 + 25 * 2 + 50 * 4))
    assert length_of(base.with_(token_budget=240)) == (10, 240, "token_budget")
    assert length_of(base.with_(token_budget=250)) == (11, 250, "token_budget")
    assert length_of(base.with_(token_budget=480, batch_stages="0.5:2")) == (15, 480, "token_budget")
    assert length_of(base.with_(token_budget=4800, batch_stages="0.5:2")) == (100, 2400, "max_steps")
    by_steps = base.with_(token_budget=2400, batch_stages="0.5:2", progress="steps")
    assert length_of(by_steps) == (75, 2400, "token_budget")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (60, 60 * 24, "max_time")),
        ({"grad_accum_steps": 3}, (20, 60 * 24, "max_time")),
        ({"batch_stages": "0.5:3"}, (40, 60 * 24, "max_time")),  # 30 s of 1, 30 s of 3 micro-steps
        ({"batch_stages": "0.5:3", "progress": "steps"}, (60, 60 * 24, "max_time")),  # half of 10⁹ steps never comes
        ({"max_steps": 7}, (7, 7 * 24, "max_steps")),
        ({"token_budget": 48}, (2, 48, "token_budget")),
        ({"max_time": 0.5}, (1, 24, "max_time")),
        ({"evaluation_s": 5, "eval_interval": 0}, (50, 50 * 24, "max_time")),
        ({"evaluation_s": 5, "eval_interval": 4}, (22, 22 * 24, "max_time")),  # 9 s for every 4 steps
        ({"evaluation_s": 5, "eval_interval": 4, "max_time_counts": "steps"}, (60, 60 * 24, "max_time")),
        ({"evaluation_s": 50}, (1, 24, "max_time")),
    ],
)
def test_as_many_steps_as_fit_into_the_time(values: dict[str, object], expected: tuple[int, int, str]) -> None:
    evaluation_s = float(str(values.get("evaluation_s", 0)))
    given = {k: v for k, v in values.items() if k != "evaluation_s"}
    config = from_flat({**SMALL, "max_steps": UNLIMITED_STEPS, "max_time": 60, **given})
    assert length_of(config, 1.0, evaluation_s) == expected


@given(st.integers(1, 300), st.integers(0, 40), st.floats(0.01, 3), st.floats(0, 5), st.integers(1, 4), st.booleans())
def test_the_planned_run_is_what_a_clock_would_end(
    max_time: int, eval_interval: int, step_s: float, evaluation_s: float, accumulated: int, staged: bool
) -> None:
    """Against a loop that takes step after step, evaluates, and looks at the clock."""
    config = from_flat(
        {**SMALL, "max_steps": UNLIMITED_STEPS, "max_time": max_time, "eval_interval": eval_interval,
         "grad_accum_steps": accumulated, "batch_stages": "0.5:2" if staged else ""}
    )  # fmt: skip
    clock, steps, tokens, limit = evaluation_s, 0, 0, max_time - evaluation_s
    while True:
        micro_steps = accumulated * (2 if staged and clock >= limit / 2 else 1)
        if steps and clock + step_s * micro_steps > limit:
            break
        clock += step_s * micro_steps
        steps, tokens = steps + 1, tokens + 24 * micro_steps
        if eval_interval and steps % eval_interval == 0:
            clock += evaluation_s
    found = length_of(config, step_s, evaluation_s)
    # The plan spreads evaluations over the steps: it is off by what one of them, and the stage's edge, are worth.
    slack = 3 + evaluation_s / (step_s * accumulated)
    assert found.steps == pytest.approx(steps, abs=slack)
    assert found.tokens == pytest.approx(tokens, abs=slack * 48 * accumulated)


def test_the_time_of_a_run_is_steps_and_evaluations(tmp_path: Path) -> None:
    """On a GPU of known peak there is nothing to measure, so that every second can be worked out."""
    val = tokens(tmp_path / "val.npy", 8 * 3 * 20 + 2)  # 60 whole windows, 61 with the one that overlaps
    base = {**SMALL, "precision": "bf16", "grad_accum_steps": 2, "eval_interval": 10, "max_steps": 45}
    small = 1  # byte of memory, in which no largest batch is searched for
    forward_s = make_plan(from_flat(base), small, "H100").time.step_s / 6
    for values, batches, sets in (
        ({"num_eval_batches": 7}, 7, 1),
        ({"num_eval_batches": 0}, 100, 1),
        ({"num_eval_batches": 7, "val_data": str(val)}, 7, 2),
        ({"num_eval_batches": 70, "val_data": str(val)}, 20, 2),
        ({"num_eval_batches": 0, "val_data": str(val)}, 21, 2),
        ({"num_eval_batches": 70, "val_data": str(tmp_path / "none.npy")}, 70, 2),
    ):
        plan = make_plan(from_flat({**base, **values}), small, "H100")
        assert plan.evaluation_batches == batches
        assert plan.time.evaluation_s == pytest.approx(forward_s * batches * sets)
        # evaluations at 0, 10, 20, 30, 40 and 45
        assert plan.time.run_s == pytest.approx(45 * 6 * forward_s + 6 * plan.time.evaluation_s)
    lastly = {"num_eval_batches": 7, "val_data": str(val), "final_eval": "whole", "eval_train_data": False}
    plan = make_plan(from_flat({**base, **lastly}), small, "H100")
    assert plan.time.evaluation_s == pytest.approx(forward_s * 7)
    assert plan.time.last_evaluation_s == pytest.approx(forward_s * 21)
    assert plan.time.run_s == pytest.approx((45 * 6 + 5 * 7 + 21) * forward_s)
    half = make_plan(
        from_flat({**base, "eval_context_length": 4, "num_eval_batches": 7, "val_data": str(val)}), small, "H100"
    )
    assert half.time.evaluation_s == pytest.approx(2 * 7 * forward_s), "twice the windows in a batch, half as long"
    unknown = make_plan(from_flat({**base, "num_eval_batches": 0, "val_data": "none.npy"}), small, "H100")
    assert unknown.evaluation_batches is None and unknown.as_json()["evaluation_batches"] is None
    assert unknown.time.run_s == pytest.approx(45 * 6 * forward_s)
    assert "without evaluations, since val_data tells no size" in cli_plan.show(unknown)


def test_a_budget_of_time_ends_a_plan() -> None:
    values = {**SMALL, "precision": "bf16", "eval_interval": 0, "checkpoint_interval": 1000}
    step_s = make_plan(from_flat({**values, "max_steps": 1}), 1, "H100").time.step_s
    config = load_config(None, {**values, "max_time": (2500 + 0.5 + 200 / 3) * step_s})  # two evaluations of 100
    plan = make_plan(config, 1, "H100")
    said = plan.as_json()
    assert config.training.max_steps == UNLIMITED_STEPS
    assert (said["steps"], said["tokens"], said["ends_by"]) == (2500, 2500 * 24, "max_time")
    assert said["flops"] == plan.flops_per_token * 2500 * 24
    assert said["checkpoints"] == 2 + 1
    assert said["run_time_s"] == pytest.approx((2500 + 200 / 3) * step_s)
    assert "2,500 steps, 60.0k tokens, with evaluations; as many as fit into max_time" in cli_plan.show(plan)
    late = cli_plan.show(make_plan(config.with_(max_time=10 * step_s), 1, "H100"))
    assert "1 step, 24 tokens, with evaluations; more than max_time" in late


def test_all_of_no_validation_data_is_what_training_reads() -> None:
    from bytekiln.validation import WHOLE_WITHOUT_VALIDATION

    assert BATCHES_WITHOUT_VALIDATION == WHOLE_WITHOUT_VALIDATION


def test_a_plan_for_a_gpu_that_is_not_here() -> None:
    config = from_flat({**SMALL, "precision": "auto", "compile": "auto", "max_steps": 10})
    plan = make_plan(config, memory=80 * 10**9, gpu="NVIDIA H100 80GB HBM3")
    assert plan.config.training.precision == "bf16" and plan.device == "NVIDIA H100 80GB HBM3"
    assert plan.time.step_s == pytest.approx(plan.flops_per_token * 24 / (0.4 * 989.4e12))
    with pytest.raises(ConfigError, match="--gpu: found Voodoo 2; expected"):
        make_plan(config, memory=10, gpu="Voodoo 2")
    with pytest.raises(ConfigError, match="--memory: found nothing"):
        make_plan(config, gpu="A100")  # which comes with 40 and with 80 GB
    with pytest.raises(ConfigError, match="precision: found bf16; expected auto, fp16 or fp32"):
        make_plan(config.with_(precision="bf16"), memory=10**10, gpu="V100")


def test_a_gpu_keeps_the_masks_that_the_core_does_without() -> None:
    """A byte a number at the embedding and twice a layer, but the last, which the peak comes before."""
    same = {**SMALL, "ffn": "gelu", "attention_dropout": False}
    for rate, masks in ((0.0, 0), (0.5, 4)):
        config = from_flat({**same, "dropout": rate})
        here, there = (Simulation(config, CPU, sdpa_attention, foreign=foreign).step(3) for foreign in (False, True))
        assert there.activations - here.activations == masks * (3 * 8 * 16 - GRANULE["cpu"]), "here a seed each"


def test_the_time_is_that_of_steps_taken_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-steps by their windows, an update once a step, a forward a third of a micro-step."""
    asked = []

    def rehearse(config: RunConfig, device: torch.device, batch_size: int) -> Timed:
        asked.append((config.model.d_model, device.type, batch_size))
        return Timed(0.1, 1.0)

    monkeypatch.setattr("bytekiln.plan.rehearse", rehearse)
    config = from_flat({**SMALL, "grad_accum_steps": 4, "max_steps": 10, "eval_interval": 0, "num_eval_batches": 30})
    plan = make_plan(config, memory=10**10, largest=False)
    assert asked == [(SMALL["d_model"], "cpu", 3)]
    assert plan.time.step_s == pytest.approx(4 * 0.1 + 1.0)
    assert plan.time.evaluation_s == pytest.approx(30 * 0.1 / 3)
    assert plan.time.run_s == pytest.approx(10 * 1.4 + 2 * 1.0)
    assert plan.time.basis == "measured now: steps of 3 windows"
    limited = make_plan(config.with_(max_time=8.0, max_steps=10**9), memory=10**10, largest=False)
    assert (limited.length.steps, limited.length.ends_by) == (4, "max_time"), "8 s less two evaluations, 1.4 s a step"
    compiled = make_plan(config.with_(compile=True), memory=10**10, largest=False)
    assert compiled.time.basis.endswith("; compiled 80% of that")
    assert compiled.time.step_s == pytest.approx(COMPILED * 0.4 + 1.0)


def test_no_steps_are_taken_where_they_are_too_long_or_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_flat({**SMALL, "batch_size": 8})
    part = Footprint(*[0] * 9)
    parts = part._replace(weights=10**8, gradients=10**8, optimizer=2 * 10**8, activations=8 * 10**8, loss=0)
    fixed = RESERVE["cpu"] + 4 * 10**8
    assert windows_to_rehearse(config, 0.4, part, 10**12) == 8
    assert windows_to_rehearse(config, 4.0, part, 10**12) == 1
    assert windows_to_rehearse(config, 8 * 2.9, part, 10**12) == 1
    assert windows_to_rehearse(config, 8 * 3.1, part, 10**12) == 0, "a window takes more than three seconds"
    everything = fixed + round(HELD["cpu"] * 8 * 10**8)
    assert windows_to_rehearse(config, 0.4, parts, 2 * everything + 10) == 8
    assert windows_to_rehearse(config, 0.4, parts, 2 * everything - 10) == 0
    large = config.with_(d_model=1024, num_heads=4, num_layers=12)
    assert windows_to_rehearse(large, 0.4, part, 10**12) == 0, f"more than {REHEARSED_PARAMETERS:,} parameters"

    def no_room(*_: object) -> Timed:
        raise MemoryError

    monkeypatch.setattr("bytekiln.plan.rehearse", no_room)
    plan = make_plan(config, memory=10**10, largest=False)
    assert plan.time.step_s > 0 and "products" in plan.time.basis
    monkeypatch.setattr("bytekiln.plan.rehearse", lambda *_: pytest.fail("it was rehearsed"))
    make_plan(config, memory=1, largest=False)
    make_plan(config, gpu="H100", memory=80 * 10**9, largest=False)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"objective": "mlm", "windows": "packed", "document_mask": True, "attention": "sdpa"},
        {"ffn": "moe", "num_experts": 4, "router_noise": 0.1},
        {"precision": "fp16", "dropout": 0.2},
        {"precision": "bf16", "optimizer": "muon", "averaging": "ema"},
    ],
    ids=lambda v: ",".join(map(str, v)),
)
def test_whatever_is_planned_can_be_rehearsed(values: dict[str, object]) -> None:
    """And torch's generator is where it was."""
    config = resolved(from_flat({**SMALL, "max_steps": 5, **values}), SMALL["vocab_size"], CPU, lambda _: None)
    before = torch.get_rng_state()
    timed = rehearse(config, CPU, 2)
    assert 0 < timed.micro_step_s < 60 and 0 < timed.update_s < 60
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rehearsal_ends_with_the_first_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config, taken = from_flat({**SMALL, "max_steps": 5, "precision": "fp32", "compile": False}), []

    def step(*_: object) -> Timed:
        taken.append(1)
        clock[0] += 4.0
        return Timed(3.0, 1.0)

    clock = [0.0]
    monkeypatch.setattr("bytekiln.rehearsal._step", step)
    monkeypatch.setattr("bytekiln.rehearsal.time.perf_counter", lambda: clock[0])
    assert rehearse(config, CPU, 1) == Timed(3.0, 1.0) and len(taken) == 1

    def out_of_memory(*_: object) -> Timed:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("bytekiln.rehearsal._step", out_of_memory)
    with pytest.raises(MemoryError):
        rehearse(config, CPU, 1)


@pytest.mark.alone
@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 2000, "d_model": 256, "num_heads": 4, "context_length": 128, "batch_size": 4, "max_steps": 24},
        {"vocab_size": 100, "d_model": 96, "num_layers": 6, "num_heads": 6, "context_length": 64, "batch_size": 8,
         "ffn": "gelu", "norm": "layer", "position": "learned", "max_steps": 48},
    ],
    ids=["wide", "deep"],
)  # fmt: skip
def test_a_step_takes_as_long_as_planned(
    tmp_path: Path, command: Callable[..., Result], values: dict[str, object]
) -> None:
    """Within a factor of 1.5 either way. Whatever else runs in the meantime slows one of the two: three attempts."""
    tokens(tmp_path / "train.npy", 20_000, manifest=False)
    tokens(tmp_path / "val.npy", 2000, seed=1, manifest=False)
    config = tiny(tmp_path, **values, eval_interval=0, num_eval_batches=1, checkpoint_interval=0)
    (tmp_path / "c.toml").write_text(config.to_toml(), "utf-8")
    found = []
    for _ in range(3):
        said = command("lm-plan", "c.toml", "--json", "--memory=4G", env=ONE_THREAD).stdout
        assert "steps of" in json.loads(said)["time_basis"]
        command("lm-train", "c.toml", "--overwrite", env=ONE_THREAD)
        taken = [r.step_time_s for r in read_metrics(tmp_path / "run/metrics.csv") if r.step > 2]
        found.append(json.loads(said)["step_time_s"] / statistics.median(taken))
        if 1 / 1.5 < found[-1] < 1.5:
            return
    pytest.fail(f"planned over measured: {found}")


def test_free_memory_is_what_is_left_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   3000 kB\n")
    monkeypatch.setattr(hardware, "CONTAINERS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),))
    assert hardware.available_bytes(meminfo) == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900000\n")
    assert hardware.available_bytes(meminfo) == 3000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert hardware.memory_bytes(CPU) == 1_000_000 and hardware.available_bytes(meminfo) == 100_000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50000\nactive_file 7\n")
    assert hardware.available_bytes(meminfo) == 150_000
    (tmp_path / "memory.current").write_text("2000000\n")
    assert hardware.available_bytes(tmp_path / "nothing") == 0


# --- hardware ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", Peak(989.4e12, 989.4e12, 494.7e12)),
        ("NVIDIA H100 PCIe", Peak(756.4e12, 756.4e12, 378.2e12)),
        ("NVIDIA A100-SXM4-80GB", Peak(312e12, 312e12, 156e12)),
        ("NVIDIA A100 80GB PCIe", Peak(312e12, 312e12, 156e12)),
        ("NVIDIA GeForce RTX 4090", Peak(165.2e12, 165.2e12, 82.6e12)),
        ("NVIDIA L40S", Peak(362.05e12, 362.05e12, 181.025e12)),
        ("NVIDIA B200", Peak(2250e12, 2250e12, 1125e12)),
        ("Tesla V100-SXM2-16GB", Peak(None, 125e12, 15.7e12)),
    ],
)
def test_peaks_by_name(name: str, peak: Peak) -> None:
    assert tuple(peak_flops(name, p) for p in ("bf16", "fp16", "fp32")) == peak


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A1000", "AMD EPYC", ""]
)
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_flops(name, "bf16") is None
    assert mfu(1e9, 1e3, peak_flops(name, "bf16")) is None


def test_no_name_means_two_devices() -> None:
    import re

    names = [
        "H100",
        "H100 PCIe",
        "H100 NVL",
        "H200",
        "A100-PCIE-40GB",
        "A10",
        "A10G",
        "L4",
        "L40",
        "L40S",
        "T4",
        "V100",
    ]
    for name in names:
        assert sum(re.fullmatch(pattern, name) is not None for pattern in PEAKS) == 1, name


def test_utilisation() -> None:
    assert mfu(6e9, 50_000, 989.4e12) == pytest.approx(0.3032, abs=1e-4)


def test_the_measured_rate_is_a_rate_of_this_machine() -> None:
    speed = measure(CPU, torch.float32, 512, 256, seconds=0.15)
    assert 1e8 < speed.flops_per_s < 1e14 and 1e8 < speed.bytes_per_s < 1e13 and 1e-8 < speed.call_s < 1e-2


# --- the command -----------------------------------------------------------------------------------------------


def flags(**values: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, **values}.items()]


def test_json_has_the_names_that_are_promised(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_plan.plan(["debug", *flags(), "--json", "--memory", "1G"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert isinstance(said["parameters"], int) and isinstance(said["flops_per_token"], int)
    assert set(said["memory_bytes"]) >= {"weights", "gradients", "optimizer", "activations", "total"}
    assert said["memory_limit_bytes"] == 10**9 and said["largest_batch_size"] > 0
    assert set(said["memory_bytes"]) == {"weights", "gradients", "optimizer", "activations", "loss", "total"}
    assert said["ends_by"] == "max_steps" and said["evaluation_batches"] == 100
    for name in ("active_parameters", "parameters_by_part", "step_time_s", "run_time_s", "checkpoint_bytes", "device"):
        assert said[name]


def test_json_of_a_run_that_time_ends(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["debug", *flags(num_eval_batches=1, checkpoint_interval=10**6), "--memory=1", "--json"]
    assert cli_plan.plan([*argv, "--max-time=3"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ends_by"] == "max_time" and 1 < said["steps"] < 10**6
    assert said["tokens"] == said["steps"] * said["tokens_per_step"] and said["checkpoints"] == 1
    assert said["steps"] * said["step_time_s"] < said["run_time_s"] <= 3
    assert 3 - said["run_time_s"] < 2 * said["step_time_s"] + 2 * said["evaluation_time_s"]


def test_the_table_shows_the_parts_and_their_shares(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_plan.plan(["debug", *flags(ffn="moe", num_experts=4), "--memory", "1M"]) == 0
    said = capsys.readouterr().out
    for words in ("of them work on a token", "router", "feed forward", "activations", "IT DOES NOT FIT",
                  "not even one window fits into 1.0 MB", "time of the run", "checkpoints"):  # fmt: skip
        assert words in said
    assert max(map(len, said.splitlines())) <= 120


def test_a_run_folder_and_a_manifest_tell_the_vocabulary(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bytekiln

    tokenizer = bytekiln.train_bpe(corpus, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save(tmp_path / "t.json")
    bytekiln.encode_files(tokenizer, corpus, tmp_path / "train.npy")
    without = [f for f in flags() if not f.startswith("--vocab-size")]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(from_flat({**SMALL, "vocab_size": 300}).to_toml(), "utf-8")
    found = []
    # In one byte of memory nothing fits, so that no largest batch is searched for.
    small = ["--json", "--memory=1"]
    for source in (["tinystories", *flags(vocab_size=300)], [str(tmp_path / "run")],
                   ["shakespeare-char", *without, f"--tokenizer={tmp_path / 't.json'}"],
                   ["shakespeare-char", *without, f"--train-data={tmp_path / 'train.npy'}"]):  # fmt: skip
        assert cli_plan.plan([*source, *small]) == 0
        found.append(json.loads(capsys.readouterr().out)["parameters_by_part"]["embedding"])
    assert found == [300 * 16] * 4
    masked = ["shakespeare-char", *without, f"--tokenizer={tmp_path / 't.json'}", "--token-corruption=0.1"]
    assert cli_plan.plan([*masked, *small]) == 0
    assert json.loads(capsys.readouterr().out)["parameters_by_part"]["embedding"] == 301 * 16  # the mask token


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["shakespeare-char"], "vocab_size: unknown; expected --vocab-size N, --tokenizer FILE, or --train-data"),
        (["tinystories", "--memory", "much"], "--memory: found 'much'; expected a size"),
        (["tinystories", "--memory", "0"], "--memory: found '0'; expected a size"),
        (["a", "--config", "b"], "found two configurations"),
        (["tinystories", "--num-heads", "6"], "num_heads: found 6 for d_model 512"),
        (["tinystories", "--batchsize", "6"], "did you mean --batch-size?"),
    ],
)
def test_mistakes_are_told(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cli_plan.plan(argv)
    assert message in str(error.value)


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    lines: dict[str, list[str]] = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            cli_plan.plan([flag])
        lines[flag] = capsys.readouterr().out.splitlines()
    assert len(lines["--help"]) <= 60 and any("lm-plan tinystories" in line for line in lines["--help"])
    assert any("--muon-scale" in line for line in lines["--help-all"])
    assert not any("--muon-scale" in line for line in lines["--help"])
