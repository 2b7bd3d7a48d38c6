"""When a run ends, what it starts from, what it leaves out, and what it tells on the way."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from bytekiln import loop, record, train_bpe_from_iterator
from bytekiln.checkpoint import load_checkpoint
from bytekiln.config import UNLIMITED_STEPS, load_config
from bytekiln.data import Batch, Prefetcher
from bytekiln.errors import ConfigError, DivergedError, FileError, FormatError, MismatchError
from bytekiln.evaluate import Scores
from bytekiln.learner import Learner
from bytekiln.metrics import Row, read_metrics
from bytekiln.model import TransformerLM
from bytekiln.objective import Objective
from bytekiln.result import Result
from bytekiln.run_state import State
from bytekiln.train import train
from bytekiln.validation import Validation
from lm_runs import ONE_THREAD, tiny, tokens
from test_learner import NoSync


def rows(folder: Path) -> list[Row]:
    return read_metrics(folder / "run/metrics.csv")


# --- when it ends ---


def test_early_stopping_keeps_the_best_model(tmp_path: Path) -> None:
    """A rate that ruins what was learnt: two evaluations without a better one end the run, the best one stays."""
    values = {"lr": 0.5, "decay_lr": False, "eval_interval": 1, "max_steps": 50, "warmup_steps": 0}
    result = train(tiny(tmp_path, **values, early_stopping_patience=2))
    assert result.status == "early_stopped"
    assert "2 evaluations in succession" in result.why
    losses = [r.val_loss for r in rows(tmp_path)[1:]]
    assert result.best_step == 1 + losses.index(min(losses))
    assert result.steps == result.best_step + 2 < 50
    best = load_checkpoint(tmp_path / "run/checkpoints/checkpoint_best")
    assert best.step == result.best_step
    assert load_checkpoint(tmp_path / "run/checkpoints/checkpoint_final").step == result.steps
    said: list[str] = []
    again = tiny(tmp_path, **values, early_stopping_patience=2)
    assert train(again, resume="auto", notice=said.append).status == "early_stopped"
    assert any("complete at step" in line for line in said)
    more = train(again, resume="auto", given={"early_stopping_patience": 4})
    assert more.steps > result.steps, "more patience goes on"


def test_a_gain_below_min_delta_does_not_count(tmp_path: Path) -> None:
    values = {"eval_interval": 1, "max_steps": 20, "early_stopping_patience": 3, "early_stopping_min_delta": 100.0}
    result = train(tiny(tmp_path, **values))
    assert (result.status, result.steps) == ("early_stopped", 4)
    assert result.best_step == 4, "the best one is still the lowest"


def test_small_gains_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation is a little better than the one before, by less than counts: together they count."""
    falling = iter(6.0 - 0.02 * i for i in range(40))
    real = Validation.of

    def of(self: Validation, row: Row, state: State, *, last: bool = False) -> Row:
        row = real(self, row, state, last=last)
        return dataclasses.replace(row, val_loss=next(falling))

    monkeypatch.setattr(Validation, "of", of)
    values = {"eval_interval": 1, "max_steps": 20, "early_stopping_patience": 3, "early_stopping_min_delta": 0.03}
    assert train(tiny(tmp_path, **values)).status == "completed", (
        "every second one lies 0.04 below the last that counted"
    )
    falling = iter([6.0, 5.99, 5.985, 5.98, 5.979, 5.978])
    result = train(tiny(tmp_path, **values), overwrite=True)
    assert (result.status, result.steps) == ("early_stopped", 4)


def test_a_limit_that_is_too_short_says_where_it_went(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, max_time=0.001, max_steps=UNLIMITED_STEPS))
    assert (result.status, result.steps) == ("completed", 0)
    assert "before the first step" in result.why
    assert "kept for the end" in result.why


def test_samples_that_cannot_be_written_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise FileError("samples: no space left on device")

    monkeypatch.setattr("bytekiln.record.write_samples_file", full)
    said: list[str] = []
    tokenizer = train_bpe_from_iterator(["the kiln is warm"], vocab_size=260)
    tokenizer.save(tmp_path / "tokenizer.json")
    config = tiny(tmp_path, vocab_size=260, tokenizer=str(tmp_path / "tokenizer.json"))
    for name in ("train.npy.json", "val.npy.json"):
        (tmp_path / name).unlink()
    result = train(config, notice=said.append)
    assert (result.status, result.steps) == ("completed", 6)
    told = json.loads((tmp_path / "run/result.json").read_text())
    assert told["status"] == "completed" and told["versions"]["torch"] == torch.__version__
    assert set(told["hardware"]) == {"device", "memory", "cores", "system"} and "thread" in told["hardware"]["device"]
    assert any("not written: samples: no space left" in line for line in said)


def test_a_first_loss_far_from_its_expectation_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    train(tiny(tmp_path), notice=said.append)
    assert not any("loss at the start" in line for line in said)
    monkeypatch.setattr("bytekiln.validation.expected_initial_loss", lambda _: 1.0)
    train(tiny(tmp_path), overwrite=True, notice=said.append)
    assert any("loss at the start: found" in line and "expected about 1.0000" in line for line in said)


def test_the_loop_waits_for_the_device_where_it_logs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that takes its device for one that must be waited for; packed documents, layers and schedule included."""
    steps: list[int] = []
    real_go, real_step = loop.Run.go, loop.Run._take_step

    def go(self: loop.Run) -> Result:
        self.device = torch.device("meta")  # the loop asks for its type only; tensors stay where they are
        return real_go(self)

    def take(self: loop.Run, batches: Prefetcher) -> None:
        steps.append(self.horizon.step + 1)
        if len(steps) == 1:  # what is made once may ask
            real_step(self, batches)
        else:
            with NoSync():
                real_step(self, batches)

    monkeypatch.setattr(loop.Run, "go", go)
    monkeypatch.setattr(loop.Run, "_take_step", take)
    values = {"windows": "packed", "document_mask": True, "log_interval": 4, "eval_interval": 8, "max_steps": 12}
    tokens(tmp_path / "train.npy", eot=7)
    tokens(tmp_path / "val.npy", 200, seed=1, eot=7)
    result = train(tiny(tmp_path, **values, checkpoint_interval=0, optimizer="muon", skip_spikes=True))
    assert (result.status, steps) == ("completed", list(range(1, 13)))
    assert [r.step for r in rows(tmp_path)] == list(range(13)), "every step has its row all the same"


def test_token_budget_ends_the_run_and_its_decay(tmp_path: Path) -> None:
    config = load_config(None, {**tiny(tmp_path).flat(), "token_budget": 10 * 24, "max_steps": UNLIMITED_STEPS})
    result = train(config)
    assert (result.status, result.steps, result.tokens) == ("completed", 10, 240)
    assert "240 tokens" in result.why
    rates = [r.lr for r in rows(tmp_path) if r.lr is not None]
    assert rates[-1] < 0.2 * max(rates)


def test_a_budget_frees_the_steps_that_a_preset_pins() -> None:
    assert load_config("demo", {"max_time": "90m"}).training.max_steps == UNLIMITED_STEPS
    assert load_config("demo", {"max_time": "90m"}).training.max_time == 5400
    assert load_config("demo", {"token_budget": 10**6}).training.max_steps == UNLIMITED_STEPS
    assert load_config("demo", {"max_time": 60, "max_steps": 7}).training.max_steps == 7
    assert load_config("demo").training.max_steps == 1000


@pytest.mark.alone
def test_max_time_leaves_room_for_slow_saves_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best, a numbered and the final checkpoint may follow the last step; samples are dropped at the limit.

    A machine that stands still for half a second after the last step makes any run late: three attempts.
    """
    save, write = record.save_checkpoint, record.write_samples_file

    def slow_save(*args: object) -> None:
        time.sleep(0.4)
        save(*args)

    def slow_samples(*args: object, stop: Callable[[], bool]) -> Path | None:
        end = time.perf_counter() + 30
        while time.perf_counter() < end:
            if stop():
                return None
            time.sleep(0.01)
        return write(*args, stop=stop)

    monkeypatch.setattr(record, "save_checkpoint", slow_save)
    monkeypatch.setattr(record, "write_samples_file", slow_samples)
    spent = []
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        spent.append(seconds_to_the_end_of_the_samples(folder, limit=5.0))
        if spent[-1] < 5.3:
            return
    pytest.fail(str(spent))


def seconds_to_the_end_of_the_samples(folder: Path, limit: float) -> float:
    """What a run took whose samples had to be cut short."""
    train_bpe_from_iterator(["the kiln is warm"], vocab_size=260).save(folder / "tokenizer.json")
    base = {**tiny(folder, vocab_size=260).flat(), "max_time": limit, "max_steps": UNLIMITED_STEPS}
    for name in ("train.npy.json", "val.npy.json"):
        (folder / name).unlink()
    config = load_config(None, {**base, "tokenizer": str(folder / "tokenizer.json"), "eval_interval": 200})
    said: list[str] = []
    began = time.perf_counter()
    result = train(config, began=began, notice=said.append)
    assert result.status == "completed"
    assert any("no time was left" in line for line in said)
    return time.perf_counter() - began


@pytest.mark.alone
@pytest.mark.parametrize("counts", ["all", "steps"])
def test_max_time_ends_inside_the_limit_with_its_decay_done(tmp_path: Path, counts: str) -> None:
    """A machine that stands still for a tenth of a second near the end moves the last rate: three attempts."""
    found = []
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        found.append(ended(folder, counts))
        if not found[-1]:
            return
    pytest.fail(str(found))


def ended(folder: Path, counts: str, limit: float = 4.0) -> dict[str, object]:
    """What of a run for `limit` seconds is not as it should be."""
    config = load_config(
        None,
        {
            **tiny(folder).flat(),
            "max_time": limit,
            "max_time_counts": counts,
            "max_steps": UNLIMITED_STEPS,
            "eval_interval": 50,
            "checkpoint_interval": 0,
        },
    )
    began = time.perf_counter()
    result = train(config, began=began)
    spent = time.perf_counter() - began
    assert result.status == "completed"
    assert "s are over" in result.why
    done = rows(folder)
    steps_s = sum(r.step_time_s for r in done if r.step_time_s is not None)
    rates = [r.lr for r in done if r.lr is not None]
    assert max(rates) == pytest.approx(1e-2, rel=0.02)
    holds = {
        # Half a second for a machine that has other work.
        "spent": (spent, 0.5 * limit < spent < limit + 0.5 if counts == "all" else True),
        "steps": (steps_s, steps_s < limit if counts == "all" else 0.9 * limit < steps_s < limit),
        "the last rate, whose floor is a tenth": (rates[-1], rates[-1] == pytest.approx(1e-3, rel=0.25)),
    }
    return {name: value for name, (value, is_so) in holds.items() if not is_so}


def test_batch_stages_grow_the_batch_and_read_on(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, batch_stages="0.5:3", max_steps=6))
    tokens = [r.tokens for r in rows(tmp_path)]
    assert [b - a for a, b in itertools.pairwise(tokens)] == [24, 24, 24, 72, 72, 72]
    assert result.tokens == 3 * 24 + 3 * 72
    stored = load_checkpoint(tmp_path / "run/checkpoints/checkpoint_final")
    assert stored.state["windows"] == 3 * 3 + 3 * 9


def test_stages_follow_the_budget_not_the_steps(tmp_path: Path) -> None:
    values = {"batch_stages": "0.5:2", "token_budget": 240, "max_steps": UNLIMITED_STEPS}
    train(load_config(None, {**tiny(tmp_path).flat(), **values}))
    tokens = [r.tokens for r in rows(tmp_path)]
    assert [b - a for a, b in itertools.pairwise(tokens)] == [24] * 5 + [48] * 3


def test_a_decay_that_ends_inside_the_warm_up_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    train(tiny(tmp_path, warmup_steps=4, decay_steps=3), notice=said.append)
    assert any("decay_steps: found 3; expected at least warmup_steps, 4" in line for line in said)


def test_patience_needs_validation_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="early_stopping_patience: found one without val_data"):
        train(tiny(tmp_path, val_data="", early_stopping_patience=2))


# --- what it starts from ---


def test_init_from_a_run_starts_a_fresh_schedule(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    first = load_checkpoint(tmp_path / "run/checkpoints/checkpoint_best")
    result = train(tiny(tmp_path, out_dir=str(tmp_path / "again"), init_from=str(tmp_path / "run"), max_steps=2))
    assert result.steps == 2
    done = read_metrics(tmp_path / "again/metrics.csv")
    assert done[0].val_loss == pytest.approx(first.state["best_val_loss"], rel=1e-6)
    assert done[1].lr == 0.0, "its own warm-up"
    with pytest.raises(MismatchError, match="d_model: found 32; expected 16"):
        train(tiny(tmp_path, out_dir=str(tmp_path / "other"), init_from=str(tmp_path / "run"), d_model=32))
    assert not (tmp_path / "other").exists()


def test_eval_only_reads_and_writes_nothing(tmp_path: Path) -> None:
    trained = train(tiny(tmp_path))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    said: list[str] = []
    result = train(tiny(tmp_path), resume="auto", eval_only=True, say=said.append)
    assert (result.status, result.final_val_loss) == ("evaluated", trained.final_val_loss)
    assert any("Val Loss" in line for line in said)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        train(tiny(tmp_path, out_dir=str(tmp_path / "none")), eval_only=True)
    assert not (tmp_path / "none").exists()
    first = train(tiny(tmp_path, out_dir=str(tmp_path / "none"), init_from=str(tmp_path / "run")), eval_only=True)
    assert first.final_val_loss == pytest.approx(trained.best_val_loss)


# --- what it leaves out ---


def poison(monkeypatch: pytest.MonkeyPatch, call: int, factor: float) -> None:
    """Multiply the loss of one training micro-step."""
    forward, calls = Objective.forward, [0]

    def poisoned(self: Objective, *args: torch.Tensor) -> object:
        parts = forward(self, *args)
        calls[0] += 1
        if calls[0] == call:
            parts = parts._replace(total=parts.total * factor, nll=parts.nll * factor)
        return parts

    monkeypatch.setattr(Objective, "forward", poisoned)


def test_a_nan_is_dumped_with_the_steps_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 15, math.nan)
    result = train(tiny(tmp_path, max_steps=20))
    assert (result.status, result.steps) == ("diverged", 14)
    told = json.loads((tmp_path / "run/diverged.json").read_text())
    assert told["step"] == 15
    assert told["loss"] == "nan"
    assert told["windows"] == [14 * 3, 15 * 3]
    assert [r["step"] for r in told["last_steps"]] == list(range(5, 15))
    assert load_checkpoint(tmp_path / "run/checkpoints/checkpoint_14").step == 14
    monkeypatch.undo()
    assert train(tiny(tmp_path), resume="auto", given={"max_steps": 16}).status == "completed"
    assert not (tmp_path / "run/diverged.json").exists()


def test_spikes_are_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"max_steps": 70, "skip_spikes": True, "checkpoint_interval": 0, "eval_interval": 0, "log_interval": 1}
    poison(monkeypatch, 60, 5.0)
    said: list[str] = []
    result = train(tiny(tmp_path, **values), say=said.append)
    assert (result.status, result.skipped_steps) == ("completed", 1)
    assert [r.step for r in rows(tmp_path) if r.skipped] == [60]
    assert sum("update left out" in line for line in said) == 1


def test_fp16_trains_with_a_scaler_and_resumes(tmp_path: Path) -> None:
    fp32 = train(tiny(tmp_path, out_dir=str(tmp_path / "fp32")))
    whole = train(tiny(tmp_path, precision="fp16"))
    assert whole.final_val_loss == pytest.approx(fp32.final_val_loss, rel=0.02)
    assert whole.final_val_loss != fp32.final_val_loss
    train(tiny(tmp_path, precision="fp16", out_dir=str(tmp_path / "cut"), max_steps=3, decay_steps=6))
    train(tiny(tmp_path, precision="fp16", out_dir=str(tmp_path / "cut")), resume="auto", given={"max_steps": 6})
    a, b = (load_checkpoint(tmp_path / n / "checkpoints/checkpoint_final") for n in ("run", "cut"))
    assert float(a.training["guard/scale"]) == 2.0**16
    for name in a.model:
        assert torch.equal(a.model[name], b.model[name])


def test_a_loss_beyond_all_numbers_is_a_divergence(tmp_path: Path) -> None:
    """A validation loss whose perplexity no float holds, with checkpoints and a report to write."""
    result = train(tiny(tmp_path, lr=1e3, warmup_steps=0, eval_interval=1, max_steps=20, grad_clip=0))
    assert result.status == "diverged"
    json.loads((tmp_path / "run/result.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert any(r.val_loss is not None and r.val_loss > 709 and r.val_perplexity is None for r in rows(tmp_path))


def test_precision_may_change_where_it_was_allowed(tmp_path: Path) -> None:
    """The scale of fp16 neither stays in fp32, nor is missing the other way round."""
    for before, after in (("fp16", "fp32"), ("fp32", "fp16")):
        folder = tmp_path / before
        train(tiny(folder, precision=before, max_steps=3))
        given = {"precision": after, "max_steps": 5}
        result = train(tiny(folder), resume="auto", given=given, changes=["dtype"])
        assert (result.status, result.skipped_steps) == ("completed", 0)
        norms = [r.grad_norm for r in rows(folder)[1:]]
        assert max(norms) < 5 * min(norms)


@pytest.mark.parametrize("given", [{"optimizer": "lion"}, {"averaging": "ema"}])
def test_a_change_starts_without_a_memory(tmp_path: Path, given: dict[str, object]) -> None:
    train(tiny(tmp_path, max_steps=3))
    said: list[str] = []
    more = {**given, "max_steps": 5}
    assert train(tiny(tmp_path), resume="auto", given=more, changes=list(given), notice=said.append).steps == 5
    assert any("starts without a memory at step 3" in line for line in said)
    with pytest.raises(FormatError, match=r"found \(64, 16\) for layers.0.ffn.w1.weight; expected \(48, 16\)"):
        wider = {"d_ff": 48, "max_steps": 6}
        train(tiny(tmp_path), resume="auto", given=wider, changes=["d_ff"])


def test_weights_from_elsewhere_may_begin_low(tmp_path: Path) -> None:
    """A loss that rises from next to nothing is no divergence; one far above an untrained model's is."""
    train(tiny(tmp_path, max_steps=2))
    run = object.__new__(loop.Run)
    run.config = tiny(tmp_path, init_from=str(tmp_path / "run"))
    run.s, run.record, run.uniform_loss = State(initial_loss=0.001), None, 4.0
    for loss in (0.1, 0.2, 0.3, 7.0, 8.1, 8.2):
        run._write(Row(1, 1, 0.0, loss=loss))
    with pytest.raises(DivergedError):
        run._write(Row(1, 1, 0.0, loss=8.3))


# --- what it tells ---


def test_training_is_evaluated_on_as_many_windows(tmp_path: Path) -> None:
    """The same file twice gives the same losses, whatever the number of batches."""
    tiny(tmp_path)
    same = str(tmp_path / "train.npy")
    for batches in (2, 0):
        train(tiny(tmp_path, val_data=same, num_eval_batches=batches, max_steps=2), overwrite=batches == 0)
        for r in rows(tmp_path):
            if r.val_loss is not None:
                # of a whole set validation reads the last tokens too, training only windows that do not overlap
                assert r.val_loss == pytest.approx(r.train_eval_loss, rel=5e-3 if batches == 0 else 1e-12)


def test_the_last_evaluation_reads_the_whole_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows on the way, all at the end; the training data is left alone; the last loss is the run's best."""
    counted: list[int] = []
    real = Learner.evaluate

    def evaluate(self: Learner, batches: Iterable[Batch]) -> Scores:
        scores = real(self, batches)
        counted.append(scores.tokens)
        return scores

    monkeypatch.setattr(Learner, "evaluate", evaluate)
    measured: list[float] = []
    monkeypatch.setattr(Validation, "_growth", growing(Validation._growth, measured))
    values = {"final_eval": "whole", "eval_train_data": False, "num_eval_batches": 1, "batch_size": 2}
    result = train(tiny(tmp_path, **values))
    assert counted == [16, 16, 199], "200 tokens have 199 targets"
    assert measured == [25 / 2 - 1, 25 / 2 - 1, 0.0], "what the last one takes longer than these"
    assert result.best_step == result.steps == 6
    assert result.best_val_loss == result.final_val_loss == rows(tmp_path)[-1].val_loss
    assert [r.train_eval_loss for r in rows(tmp_path)] == [None] * 7
    assert result.initial_loss == rows(tmp_path)[0].val_loss
    with pytest.raises(ConfigError, match="final_eval: found whole with early_stopping_patience"):
        tiny(tmp_path, final_eval="whole", early_stopping_patience=2)


def growing(real: Callable[..., float], measured: list[float]) -> Callable[..., float]:
    def growth(self: Validation, whole: bool) -> float:
        measured.append(real(self, whole))
        return measured[-1]

    return growth


def test_masked_tokens_have_no_bits_per_byte(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, objective="mlm", sampling="shuffled"))
    assert result.final_val_loss is not None
    assert result.final_bits_per_byte is None


def test_curves_and_samples_of_a_run(tmp_path: Path) -> None:
    """TensorBoard's files and samples, through the loop."""
    tokenizer = train_bpe_from_iterator(["the kiln is warm"], vocab_size=260)
    tokenizer.save(tmp_path / "tokenizer.json")
    config = tiny(tmp_path, vocab_size=260)
    for name in ("train.npy.json", "val.npy.json"):
        (tmp_path / name).unlink()
    values = {"tokenizer": str(tmp_path / "tokenizer.json"), "sample_tokens": 5, "sample_prompts": "the\nkiln"}
    train(config.with_(**values, tensorboard=True, sample_interval=4))
    names = sorted(p.name for p in (tmp_path / "run/samples").iterdir())
    assert names == ["step_4.json", "step_6.json"]
    told = json.loads((tmp_path / "run/samples/step_6.json").read_text())
    assert [x["prompt"] for x in told["samples"]] == ["the", "kiln"]
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_averaged_weights_are_evaluated_and_saved(tmp_path: Path) -> None:
    """The checkpoint's model gives the validation loss that was reported; the trained weights lie beside it."""
    train(tiny(tmp_path, averaging="ema", ema_decay=0.5))
    saved = load_checkpoint(tmp_path / "run/checkpoints/checkpoint_final")
    raw = {k.removeprefix("weights/"): v for k, v in saved.training.items() if k.startswith("weights/")}
    assert raw.keys() == saved.model.keys()
    assert any(not torch.equal(raw[k], saved.model[k]) for k in raw)
    result = train(tiny(tmp_path), resume="auto", eval_only=True)
    assert result.final_val_loss == pytest.approx(rows(tmp_path)[-1].val_loss, rel=1e-6)


def test_perplexity_accuracy_and_the_loads_of_experts(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, ffn="moe", num_experts=4, d_ff=16, num_eval_batches=0))
    done = rows(tmp_path)
    for r in done:
        if r.val_loss is not None:
            assert r.val_perplexity == pytest.approx(math.exp(r.val_loss))
            assert 0 <= r.val_accuracy <= 1
            assert r.eval_time_s > 0
        if r.step:
            assert 1.0 <= r.expert_load <= 4.0
    assert result.active_parameters < result.parameters


def test_layers_samples_and_gradients(tmp_path: Path) -> None:
    said: list[str] = []
    train(tiny(tmp_path, stats_interval=2, show_gradients=True), say=said.append)
    lines = (tmp_path / "run/layers.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines[1:]} == {"2", "4", "6"}
    assert any("layers.1" in line and "█" in line for text in said for line in text.splitlines())


def test_the_collector_is_quiet_during_steps_and_back_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    forward = Objective.forward

    def watched(self: Objective, *args: torch.Tensor) -> object:
        seen.append((gc.isenabled(), gc.get_freeze_count()))
        return forward(self, *args)

    monkeypatch.setattr(Objective, "forward", watched)
    train(tiny(tmp_path, max_steps=14))
    assert seen[0][0]
    assert not seen[-1][0]
    assert seen[-1][1] > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_console_of_the_guide(tmp_path: Path) -> None:
    said: list[str] = []
    train(tiny(tmp_path), say=said.append)
    text = "\n".join(said)
    for line in (
        "Using device: cpu",
        "Loading tokenizer...",
        "Loading training data...",
        "Loading validation data...",
        "Creating model...",
        "Starting training...",
        "Iter      2 | Loss: ",
        "Iter      4 | Val Loss: ",
        "Saving checkpoint to ",
    ):
        assert line in text
    parameters = sum(p.numel() for p in TransformerLM(tiny(tmp_path).model).parameters())
    assert f"Model created with {parameters:,} total parameters ({parameters:,} trainable)" in text


def test_a_wrong_start_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_time"):
        train(tiny(tmp_path, progress="seconds"))
    with pytest.raises(ConfigError, match="flex"):
        train(tiny(tmp_path, attention="flex"))
    assert not (tmp_path / "run").exists()


LONG_STEP = """
import sys, torch
from bytekiln import cli, learner

real = learner.Learner.gradients
def slow(self, batches, step, first, micro_steps):
    if step == 3:
        print("in the long call", flush=True)
        a = torch.ones(3000, 3000)
        for _ in range(1):
            torch.linalg.matrix_power(a, 2**40 - 1)  # one call into C, some eighty products long
    return real(self, batches, step, first, micro_steps)
learner.Learner.gradients = slow
sys.exit(cli.main(["lm-train", sys.argv[1]]))
"""

LONG_SAVE = LONG_STEP.replace(
    "sys.exit",
    """
from bytekiln import record
save = record.save_checkpoint
def slow_save(folder, checkpoint):
    if checkpoint.step == 3:
        print("in the long save", flush=True)
        torch.linalg.matrix_power(torch.ones(3000, 3000), 2**40 - 1)
    save(folder, checkpoint)
record.save_checkpoint = slow_save
sys.exit""",
)


@pytest.mark.slow
def test_a_step_longer_than_five_seconds_is_abandoned_and_its_start_saved(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(tiny(tmp_path, checkpoint_interval=0, eval_interval=0).to_toml(), "utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_STEP, str(tmp_path / "c.toml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "in the long call" in line:
            break
    time.sleep(0.3)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert time.monotonic() - asked < 5
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["status"], result["signal"], result["steps"]) == ("interrupted", int(signal.SIGTERM), 3)
    assert load_checkpoint(tmp_path / "run/checkpoints/checkpoint_3").step == 3
    assert train(tiny(tmp_path), resume="auto").status == "completed"


@pytest.mark.alone
@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, moment: str) -> None:
    """In a step that answers to nothing; and while the first Ctrl-C's checkpoint is being written, which takes long."""
    values = {"checkpoint_interval": 2, "eval_interval": 0, "max_steps": 20}
    (tmp_path / "c.toml").write_text(tiny(tmp_path, **values).to_toml(), "utf-8")
    driver = LONG_STEP if moment == "step" else LONG_SAVE
    process = subprocess.Popen(
        [sys.executable, "-c", driver, str(tmp_path / "c.toml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    assert process.stdout is not None

    def wait_for(words: str) -> None:
        assert any(words in line for line in process.stdout), words

    wait_for("in the long call")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    if moment == "save":
        wait_for("in the long save")
    else:
        time.sleep(0.3)
    assert process.poll() is None
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - asked < 1
    assert process.returncode == 130, out
    saved = tmp_path / "run/checkpoints"
    last = max((p for p in saved.glob("checkpoint_[0-9]*")), key=lambda p: int(p.name.rpartition("_")[2]))
    assert last.name == "checkpoint_2" and load_checkpoint(last).step == 2
    assert train(tiny(tmp_path, **values), resume="auto").status == "completed"
    assert [r.step for r in rows(tmp_path)] == list(range(21))


def test_high_rows_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "HIGH_FACTOR", 0.0)
    result = train(tiny(tmp_path, max_steps=9))
    assert (result.status, result.steps) == ("diverged", 3)
