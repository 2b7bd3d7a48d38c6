"""Runs trained together against the same runs one by one: every loss, every weight, every file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bytekiln.attention import reference_attention
from bytekiln.checkpoint import checkpoints_in, load_checkpoint
from bytekiln.config import RunConfig
from bytekiln.errors import ConfigError, FileError, OutputExistsError
from bytekiln.metrics import Row, read_metrics
from bytekiln.model import TransformerLM
from bytekiln.objective import Objective
from bytekiln.result import Result
from bytekiln.signals import Signals
from bytekiln.stack.command import _prepared, stack, stackable, train_stacked
from bytekiln.stack.model import StackedObjective
from bytekiln.stack.run import Stack, StackedRun, Stacks, divided_threads
from bytekiln.train import train
from lm_runs import ONE_THREAD, tiny

LRS = (1e-3, 3e-3, 1e-2)
SHAKESPEARE_LIKE = {
    "norm": "layer",
    "ffn": "gelu",
    "d_ff": 64,
    "position": "learned",
    "tie_embeddings": True,
    "init": "gpt2",
    "max_seq_len": 12,
}
GQA_LIKE = {"d_model": 32, "num_heads": 4, "num_kv_heads": 2, "weight_decay": 0.1, "grad_accum_steps": 2}
ODD = {
    "bias": True,
    "norm": "layer",
    "embedding_norm": True,
    "residual_lambdas": True,
    "value_embeddings": True,
    "qk_norm": True,
    "logit_softcap": 15.0,
    "z_loss": 1e-4,
    "loss_chunk": 8,
    "sliding_window": 4,
}
CLOSE = 1e-5


def runs(folder: Path, lrs: tuple[float, ...] = LRS, **values: object) -> list[RunConfig]:
    """The same run at several rates, each in a folder of its own."""
    return [tiny(folder, out_dir=str(folder / f"lr{lr}"), lr=lr, **values) for lr in lrs]


def rows(config: RunConfig) -> list[Row]:
    return read_metrics(config.output.metrics)


def final(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_checkpoint(config.output.checkpoints / "checkpoint_final").model


def assert_same(stacked: RunConfig, single: RunConfig, *, exact: bool = False) -> None:
    """Every number of every step and every final weight, to 1e-5 of its size (weights: of the largest)."""
    ours, theirs = rows(stacked), rows(single)
    assert [r.step for r in ours] == [r.step for r in theirs]
    assert any(r.val_loss is not None for r in ours)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "val_loss", "train_eval_loss", "lr"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None), (a.step, name)
            assert x is None or x == pytest.approx(y, rel=0 if exact else CLOSE), (a.step, name)
        assert (a.tokens, a.skipped, a.val_accuracy is None) == (b.tokens, b.skipped, b.val_accuracy is None)
    weights, expected = final(stacked), final(single)
    assert weights.keys() == expected.keys()
    for name, w in weights.items():
        assert (w - expected[name]).abs().max() <= (0 if exact else CLOSE) * expected[name].abs().max(), name


@pytest.mark.parametrize(
    "values",
    [
        GQA_LIKE,
        SHAKESPEARE_LIKE,
        ODD,
        {"optimizer": "muon", "norm_position": "post", "averaging": "ema"},
        {"norm": "none", "ffn": "relu2", "position": "none", "sampling": "random", "token_corruption": 0.1},
        {"attention": "sdpa", "optimizer": "lion", "skip_spikes": True},
        # Gradients of the shift are added up in another order; AdamW would make steps of what is left of a small one.
        {"token_shift": 2, "optimizer": "sgd", "residual_lambdas": True},
    ],
    ids=["rope-swiglu-gqa", "shakespeare-like", "odd", "muon", "ablated", "lion", "shift"],
)
def test_stacked_runs_are_the_single_ones(tmp_path: Path, values: dict[str, object]) -> None:
    common = {"max_steps": 30, "eval_interval": 10, "checkpoint_interval": 0, "grad_clip": 0.5, **values}
    together, alone = runs(tmp_path / "a", **common), runs(tmp_path / "b", **common)
    results = train_stacked(together)
    for config, other, result in zip(together, alone, results, strict=True):
        expected = train(other)
        assert result.status == expected.status == "completed"
        assert_same(config, other)
        assert result.final_val_loss == pytest.approx(expected.final_val_loss, rel=CLOSE)
        assert any((r.grad_norm or 0) > 0.5 for r in rows(config)), "nothing was clipped"
    assert len({rows(c)[-1].loss for c in together}) == len(together)


@pytest.fixture
def threads_of_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Two threads for torch; how many passes each thread of the interpreter made, and for how many runs."""
    made: Counter[str] = Counter()
    ordinary = Stack.gradients

    def counted(stack: Stack) -> None:
        assert torch.get_num_threads() == 1
        made[f"{threading.current_thread().name.partition('_')[0]} of {len(stack.runs)}"] += 1
        ordinary(stack)

    monkeypatch.setattr(Stack, "gradients", counted)
    torch.set_num_threads(2)
    yield made
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert not [t for t in threading.enumerate() if t.name.startswith("bytekiln-stack")]


@pytest.mark.parametrize("values", [{**GQA_LIKE, "optimizer": "muon"}, SHAKESPEARE_LIKE, ODD])
def test_stacks_side_by_side_are_the_single_runs(
    tmp_path: Path, values: dict[str, object], threads_of_passes: Counter[str]
) -> None:
    common = {"max_steps": 20, "eval_interval": 10, "checkpoint_interval": 0, "grad_clip": 0.5, **values}
    together, alone = runs(tmp_path / "a", **common), runs(tmp_path / "b", **common)
    assert [r.status for r in train_stacked(together)] == ["completed"] * 3
    assert threads_of_passes == {"bytekiln-stack of 1": 20, "bytekiln-stack of 2": 20}
    for config, other in zip(together, alone, strict=True):
        train(other)
        assert_same(config, other)


def test_other_seeds_and_optimizers_in_one_stack(tmp_path: Path) -> None:
    differing = [
        {"seed": 1, "weight_decay": 0.3, "optimizer": "adamw"},
        {"seed": 2, "optimizer": "muon", "lr": 2e-2},
        {"seed": 3, "averaging": "tail", "grad_clip": 0.0, "min_lr": 0.0},
    ]
    configs = [[tiny(tmp_path, out_dir=str(tmp_path / f"{way}{i}"), **d) for i, d in enumerate(differing)]
               for way in ("together", "alone")]  # fmt: skip
    train_stacked(configs[0])
    for config, other in zip(*configs, strict=True):
        train(other)
        assert_same(config, other)


def test_a_stack_of_one_is_a_single_run_to_the_bit(tmp_path: Path) -> None:
    (together,), (alone,) = runs(tmp_path / "a", LRS[:1]), runs(tmp_path / "b", LRS[:1])
    train_stacked([together])
    train(alone)
    assert_same(together, alone, exact=True)


def test_the_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    together, alone = runs(tmp_path / "a"), runs(tmp_path / "b")
    train_stacked(together)
    for config, other in zip(together, alone, strict=True):
        train(other)
        ours, theirs = (
            sorted(p.relative_to(c.output.folder) for p in c.output.folder.rglob("*")) for c in (config, other)
        )
        assert ours == theirs
        told = json.loads((config.output.folder / "result.json").read_bytes())
        expected = json.loads((other.output.folder / "result.json").read_bytes())
        assert told.keys() == expected.keys() and told["status"] == "completed"
        assert told["best_step"] == expected["best_step"]
        a, b = ((c.output.folder / "config.toml").read_text("utf-8") for c in (config, other))
        assert a.replace(str(tmp_path / "a"), "") == b.replace(str(tmp_path / "b"), "")


def test_one_diverges_the_others_go_on(tmp_path: Path) -> None:
    common = {"max_steps": 30, "checkpoint_interval": 0}
    together = runs(tmp_path / "a", (3e-3, 1e6, 1e-2), **common)
    alone = runs(tmp_path / "b", (3e-3, 1e6, 1e-2), **common)
    results, expected = train_stacked(together), [train(c) for c in alone]
    assert [r.status for r in results] == [r.status for r in expected] == ["completed", "diverged", "completed"]
    assert results[1].steps == expected[1].steps
    assert_same(together[0], alone[0])
    assert_same(together[2], alone[2])


def test_early_stopping_takes_a_run_out(tmp_path: Path) -> None:
    common = {"max_steps": 40, "eval_interval": 2, "early_stopping_patience": 2, "checkpoint_interval": 0}
    lrs = (1e-2, 1e-6, 3e-3)
    together, alone = runs(tmp_path / "a", lrs, **common), runs(tmp_path / "b", lrs, **common)
    together[1], alone[1] = (c.with_(early_stopping_min_delta=1.0) for c in (together[1], alone[1]))
    results, expected = train_stacked(together), [train(c) for c in alone]
    assert [(r.status, r.steps) for r in results] == [(r.status, r.steps) for r in expected]
    assert "early_stopped" in [r.status for r in results]
    assert_same(together[0], alone[0])


def test_resumes_together_and_alone(tmp_path: Path) -> None:
    common = {"max_steps": 12, "checkpoint_interval": 4}
    whole = runs(tmp_path / "a", **common)
    train_stacked(whole)
    broken = runs(tmp_path / "b", **common)
    # One stands at step 4, one at 8, one is complete: none of it may show.
    train_stacked(broken)
    for config, left in zip(broken, ({4}, {4, 8}, None), strict=True):
        if left is not None:
            (config.output.folder / "result.json").unlink()
            for _, path in list(checkpoints_in(config.output.checkpoints)):
                if path.name not in {f"checkpoint_{n}" for n in left}:
                    for file in path.iterdir():
                        file.unlink()
                    path.rmdir()
    results = train_stacked(broken, resume="auto")
    assert [r.status for r in results] == ["completed"] * 3 and results[2].why == "nothing was left to do"
    for config, other in zip(broken, whole, strict=True):
        assert_same(config, other)
    with pytest.raises(OutputExistsError):
        train_stacked(broken)


class _Stop:
    """Sends a signal once a run has said a line with a certain word in it."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, line: str) -> None:
        if self.word in line:
            signal.raise_signal(signal.SIGTERM)


def test_sigterm_saves_every_run_and_the_stack_goes_on_from_there(tmp_path: Path) -> None:
    common = {"max_steps": 20, "checkpoint_interval": 0, "log_interval": 1}
    whole, broken = runs(tmp_path / "a", **common), runs(tmp_path / "b", **common)
    train_stacked(whole)
    results = train_stacked(broken, say=_Stop(f"lr{LRS[1]}: Iter      7"))
    assert [r.status for r in results] == ["interrupted"] * 3
    assert {r.signal for r in results} == {signal.SIGTERM}
    assert {r.steps for r in results} <= {6, 7}
    results = train_stacked(broken, resume="auto")
    assert [r.status for r in results] == ["completed"] * 3
    for config, other in zip(broken, whole, strict=True):
        assert_same(config, other)
    single = broken[0].with_(max_steps=22)
    assert train(single, resume="auto", given={"max_steps": 22}).steps == 22  # a stacked run goes on alone


@pytest.mark.parametrize(
    ("threads", "number", "compiled", "share", "stacks"),
    [(2, 4, False, 1, [2, 2]), (8, 3, False, 2, [1, 1, 1]), (2, 5, False, 1, [2, 3]), (1, 3, False, 1, [3]),
     (2, 4, True, 2, [4])],
)  # fmt: skip
def test_threads_are_divided_among_runs_and_stacks(
    tmp_path: Path, threads: int, number: int, compiled: bool, share: int, stacks: list[int]
) -> None:
    configs = runs(tmp_path, tuple(1e-3 * (i + 1) for i in range(number)), compile=compiled)
    with Signals() as signals:
        made = [_prepared(c, None, False, None, signals, 0.0, lambda _: None, lambda _: None) for c in configs]
    torch.set_num_threads(threads)
    try:
        with divided_threads(made) as most:
            assert torch.get_num_threads() == share
            together = Stacks(made, most, print)
            assert [len(s.runs) for s in together.stacks] == stacks
            together.let_go()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_side_by_side_some_leave_and_a_signal_loses_nothing(tmp_path: Path, threads_of_passes: Counter[str]) -> None:
    """Five runs in two stacks, one diverges, one ends early, SIGTERM comes, another is behind: none of it may show."""
    common = {"max_steps": 40, "eval_interval": 2, "checkpoint_interval": 8, "log_interval": 1}
    lrs = (3e-3, 1e6, 1e-2, 1e-6, 1e-3)
    patient = {"early_stopping_patience": 2, "early_stopping_min_delta": 1.0}
    together, alone = (runs(tmp_path / name, lrs, **common) for name in "ab")
    together[3], alone[3] = (configs[3].with_(**patient) for configs in (together, alone))
    first = train_stacked(together, say=_Stop(f"lr{lrs[2]}: Iter     27"))
    expected = [train(c) for c in alone]
    assert [r.status for r in expected] == ["completed", "diverged", "completed", "early_stopped", "completed"]
    assert [r.status for r in first] == ["interrupted", "diverged", "interrupted", "early_stopped", "interrupted"]
    assert {r.steps for r in first if r.status == "interrupted"} <= {26, 27}
    for path in (p for n, p in checkpoints_in(together[4].output.checkpoints) if n > 16):
        shutil.rmtree(path)  # as if its last ones had never come to the disk
    kept = [together[i] for i in (0, 2, 4)]
    assert [r.status for r in train_stacked(kept, resume="auto")] == ["completed"] * 3
    for i in (0, 2, 4):
        assert_same(together[i], alone[i])
    for i in (1, 3):
        assert [r.loss for r in rows(together[i])] == [r.loss for r in rows(alone[i])]
        assert (first[i].steps, first[i].why) == (expected[i].steps, expected[i].why)
    assert {"bytekiln-stack of 2", "bytekiln-stack of 3"} <= set(threads_of_passes)


def test_a_signal_in_the_middle_of_the_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads_of_passes: Counter[str]
) -> None:
    """The step is abandoned, though one stack has its gradients and the other is at work on them."""
    common = {"max_steps": 8, "checkpoint_interval": 0}
    together, alone = runs(tmp_path / "a", **common), runs(tmp_path / "b", **common)
    ordinary, over = Stack.gradients, threading.Event()

    def late(stack: Stack) -> None:
        ordinary(stack)
        if stack.runs[0].s.step == 5 and len(stack.runs) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            over.wait(0.2)
            ordinary(stack)
            over.set()

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "gradients", late)
        results = train_stacked(together)
    assert over.is_set(), "the pass was left behind"
    assert [(r.status, r.steps, r.signal) for r in results] == [("interrupted", 5, signal.SIGTERM)] * 3
    assert [r.status for r in train_stacked(together, resume="auto")] == ["completed"] * 3
    for config, other in zip(together, alone, strict=True):
        train(other)
        assert_same(config, other)


@pytest.mark.parametrize("where", ["pass", "step"])
def test_one_fails_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, threads_of_passes: Counter[str]
) -> None:
    """The failure is told when the others are whole; alone or with them the failed one goes on from its checkpoint."""
    common = {"max_steps": 12, "checkpoint_interval": 4}
    together, alone = runs(tmp_path / "a", (*LRS, 3e-2), **common), runs(tmp_path / "b", (*LRS, 3e-2), **common)
    bad = {"pass": (0, 1), "step": (1,)}[where]  # two runs share the pass that fails
    name = "batches_of" if where == "pass" else "step"
    ordinary = getattr(StackedRun, name)

    def failing(run: StackedRun, *arguments: int) -> object:
        if run.s.step == 6 and run.config.output == together[1].output:
            raise FileError("train.npy: found no bytes; expected more")
        return ordinary(run, *arguments)

    said: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(FileError, match="found no bytes"):
        patch.setattr(StackedRun, name, failing)
        train_stacked(together, notice=said.append)
    assert sum("failed: train.npy: found no bytes" in line for line in said) == len(bad)
    whole = [(c.output.folder / "result.json").exists() for c in together]
    assert whole == [i not in bad for i in range(4)]
    results = train_stacked(together, resume="auto")
    assert [r.status for r in results] == ["completed"] * 4
    assert [r.why == "nothing was left to do" for r in results] == whole
    for config, other in zip(together, alone, strict=True):
        train(other)
        assert_same(config, other)


def test_what_fails_before_the_first_step_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = runs(tmp_path, max_steps=4)
    ordinary = StackedRun.begin

    def failing(run: StackedRun) -> None:
        if run.config.output == configs[1].output:
            raise FileError(f"{run.config.output.folder}: found a full disk; expected room")
        ordinary(run)

    monkeypatch.setattr(StackedRun, "begin", failing)
    with pytest.raises(FileError, match="full disk"):
        train_stacked(configs)
    assert not list(tmp_path.glob("*/checkpoints/*"))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"ffn": "moe", "num_experts": 4}, "ffn"),
        ({"precision": "bf16"}, "precision"),
        ({"max_time": "1h"}, "max_time"),
        ({"parallel": "fsdp"}, "parallel"),
    ],
)
def test_what_cannot_be_stacked_says_why(tmp_path: Path, values: dict[str, object], word: str) -> None:
    configs = runs(tmp_path, **values)
    assert stackable(configs).startswith(f"{word}: found ")
    with pytest.raises(ConfigError, match=f"stack: {word}: found "):
        train_stacked(configs)
    assert not list(tmp_path.glob("lr*")), "something was made before the refusal"


def test_other_shapes_and_the_same_folder_are_refused(tmp_path: Path) -> None:
    a, b = runs(tmp_path, LRS[:2])
    assert stackable([a, b]) == ""
    assert stackable([a, b.with_(batch_size=5)]).startswith("batch_size: found 3 and 5")
    assert stackable([a, b.with_(num_layers=1)]).startswith("num_layers: ")
    assert stackable([a, b.with_(max_steps=99)]).startswith("max_steps: ")
    assert "found twice" in stackable([a, a])
    assert stackable([]).startswith("runs: found none")
    padded = [c.with_(windows="padded", sampling="shuffled", seed=i) for i, c in enumerate((a, b))]
    assert stackable(padded).startswith("windows: found padded")


def test_the_fold_is_vmap(tmp_path: Path) -> None:
    """The specification: the ordinary objective under torch.func, mapped over stacked parameters."""
    config = tiny(tmp_path, **{**SHAKESPEARE_LIKE, "ffn": "relu2"}).with_(vocab_size=61)
    torch.manual_seed(0)
    objectives = []
    for _ in range(3):
        model = TransformerLM(config.model, attend=reference_attention)
        objectives.append(Objective(model, config))
    inputs_KxBxT, targets_KxBxT = torch.randint(0, 61, (2, 3, 2, 8))
    named = [dict(o.named_parameters()) for o in objectives]
    stacked = {n: torch.stack([p[n].detach() for p in named]).requires_grad_() for n in named[0]}

    def total(parameters: dict[str, torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = torch.func.functional_call(objectives[0], parameters, (inputs, targets)).total
        return loss

    with pytest.MonkeyPatch.context() as patch:  # no kernel of the core passes through vmap
        patch.setattr("bytekiln.kernels.activates", lambda _: False)
        by_vmap_K = torch.func.vmap(total)(stacked, inputs_KxBxT, targets_KxBxT)
    by_vmap_K.sum().backward()
    together = StackedObjective(objectives)
    parts = together(inputs_KxBxT.flatten(0, 1), targets_KxBxT.flatten(0, 1), None, torch.ones(3))
    parts.total.backward()
    together.hand_out()
    torch.testing.assert_close(parts.nll_K, by_vmap_K.detach(), rtol=CLOSE, atol=0)
    for name, s in stacked.items():
        assert s.grad is not None
        for k, own in enumerate(named):
            torch.testing.assert_close(own[name].grad, s.grad[k], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_it_is_the_same(tmp_path: Path) -> None:
    together = runs(tmp_path / "a", LRS[:2], compile=True, sample_tokens=0)
    alone = runs(tmp_path / "b", LRS[:2], compile=False, sample_tokens=0)
    results = train_stacked(together)
    assert [(r.status, r.compiled, r.recompiles) for r in results] == [("completed", True, 0)] * 2
    for config, other in zip(together, alone, strict=True):
        train(other)
        assert_same(config, other)


def test_as_a_process(tmp_path: Path) -> None:
    configs = runs(tmp_path, max_steps=2, sample_tokens=0)
    files = []
    for c in configs:
        file = tmp_path / f"{c.output.folder.name}.toml"
        file.write_text(c.to_toml(), "utf-8")
        files.append(str(file))
    command = [sys.executable, "-m", "bytekiln.cli", "lm-stack", *files]
    environment = {**os.environ, **ONE_THREAD}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": completed: all steps done") == 3
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1


def test_exit_statuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path)
    file = tmp_path / "a.toml"
    file.write_text(config.to_toml(), "utf-8")
    some = dataclasses.replace(train(config), status="diverged")

    def ends(*statuses: str) -> int:
        results: list[Result] = [dataclasses.replace(some, status=s, signal=15) for s in statuses]
        monkeypatch.setattr("bytekiln.stack.command.train_stacked", lambda *_, **__: results)
        return stack([str(file)] * len(statuses))

    assert ends("diverged", "diverged") == 3
    assert ends("completed", "diverged") == 0
    assert ends("completed", "interrupted") == 143
    assert "validation loss" in capsys.readouterr().out
