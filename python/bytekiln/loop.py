"""The training loop: when to look at the numbers, evaluate, save, judge, and end.

In: a run that `train` has prepared. Out: its folder (docs/formats.md) and a `Result`. `learner` moves the weights and
`record` writes. A run that was killed anywhere ends where the unbroken one ends, bit for bit on a CPU.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from bytekiln.accounting import active_parameter_count, flops_per_token, parameter_count
from bytekiln.characters import AnyTokenizer
from bytekiln.checkpoint import Checkpoint, checkpoints_in
from bytekiln.config import RunConfig
from bytekiln.console import Progress
from bytekiln.data import Batch, Data, Prefetcher
from bytekiln.errors import DivergedError, MismatchError
from bytekiln.hardware import describe, mfu, peak_flops, versions
from bytekiln.horizon import Horizon, limits
from bytekiln.layer_stats import LayerStats, bars, gradient_norms
from bytekiln.learner import Learner, Numbers, Taken, read
from bytekiln.metrics import Row, read_metrics
from bytekiln.prepare import (
    Say,
)
from bytekiln.ranks import Ranks, reshard
from bytekiln.record import Record
from bytekiln.result import Result, lines_of
from bytekiln.run_state import State
from bytekiln.runfolder import lies_in, rows_to_keep
from bytekiln.schedule import batch_multiple, fraction, learning_rate
from bytekiln.signals import Interrupted, Signals
from bytekiln.validation import Validation

HIGH_ROWS, HIGH_FACTOR = 3, 2.0
"""A run has diverged when this many rows in succession lie above this multiple of the loss at the start."""
QUIET_STEPS = 10
"""After so many steps the garbage collector is told that what is alive stays alive."""
OTHERS_WAIT_S = 30.0
"""How long the other processes give the first one to save, when a step is too long to wait for."""


class Run:
    """A run in progress: what the loop's parts share."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        ranks: Ranks,
        signals: Signals,
        data: Data,
        tokenizer: AnyTokenizer | None,
        tokenizer_json: str | None,
        began: float,
        say: Say,
        notice: Say,
    ) -> None:
        self.config, self.device, self.ranks, self.signals = config, device, ranks, signals
        self.data, self.tokenizer, self.tokenizer_json = data, tokenizer, tokenizer_json
        self.say, self.notice = say, notice
        say("Creating model...")
        self.parameters, self.active = parameter_count(config.model), active_parameter_count(config.model)
        self.learner = Learner(config, device, ranks)
        working = "" if self.active == self.parameters else f", {self.active:,} of them work on a token"
        say(f"Model created with {self.parameters:,} total parameters ({self.parameters:,} trainable){working}")
        self.s = State()
        self.batches: Prefetcher | None = None
        self.record: Record | None = None
        """The run's files; None in all processes but the first."""
        taking_part = config.training.stats_interval and not ranks.first and config.training.parallel == "fsdp"
        self.layers_of_others = LayerStats(None) if taking_part else None
        self.earlier_rows: Path | None = None
        """The metrics file that a resumed run goes on with."""
        self.limits: tuple[float, ...] | None = None
        """What ended the run that is resumed."""
        self.pending: list[Taken] = []
        """Steps whose numbers are still on the device."""
        self.pending_began = 0.0
        self.horizon = Horizon(config, ranks, began)
        self.uniform_loss = math.log(config.model.padded_vocab_size)
        self.validation = Validation(config, self.learner, data, say, notice)

    # --- the loop -------------------------------------------------------------------------------------------

    def go(self) -> Result:
        """From the first step that is not done to the end, whatever end it takes."""
        t = self.config.training
        if self.ranks.first:
            with self.signals.hold():
                self.record = Record(
                    self.config,
                    self.s,
                    self.tokenizer,
                    self.tokenizer_json,
                    self.earlier_rows,
                    self.say,
                    self.notice,
                )
        self.signals.deferred, self.signals.at_once = self.ranks.world > 1, self.ranks.world == 1
        self.signals.late = self._late if t.parallel != "fsdp" else None
        self.batches = batches = Prefetcher(self.data.train, self.config.data.prefetch, pin=self.device.type == "cuda")
        collecting = gc.isenabled()
        try:
            self.say("Starting training...")
            with Progress("training", *self.horizon.job()) as bar:
                if t.compile:
                    self.say("Compiling the model...")
                    self.learner.compile(self.data.train.batch(0, 0, 0, t.batch_size), self.notice)
                self.horizon.look_ahead(self.s)
                self._finish_row()
                if not (self.config.output.checkpoints / f"checkpoint_{self.s.step}").exists():
                    self._save_numbered()  # this run was killed between checkpoint_best and this one
                quiet_from = self.s.step + QUIET_STEPS
                while self.horizon.over is None:
                    if self.horizon.paused:
                        return self._pause()
                    if self.ranks.world > 1 and self.ranks.any(self.signals.number is not None):
                        raise Interrupted  # all at the same step
                    self._take_step(batches)
                    if self._due():
                        self._look()
                        self._finish_row()
                        bar.update(self.horizon.done(self.s), **self._bar_fields())
                    if self.s.step == quiet_from:
                        gc.collect()
                        gc.freeze()
                        gc.disable()
            with self.signals.hold():
                self._save("checkpoint_final")
                if self.record is not None:
                    self.record.remove_old()
            self.signals.claim()
            self.signals.deferred = True  # the run is whole: a signal only cuts the samples short
            if self.record is not None:
                self.record.samples(
                    self.learner, self.s.step, lambda: self.signals.number is not None or self.horizon.is_late()
                )
            self.signals.number = None
            return self._finish(*self.horizon.over)
        except Interrupted:
            self.signals.claim()
            return self._interrupted()
        except DivergedError as exc:
            self.signals.claim()
            return self._finish("diverged", str(exc))
        except BaseException:
            self.signals.claim()  # waits where `late` is saving: another process's end may have broken this one's step
            raise
        finally:
            gc.unfreeze()
            if collecting:
                gc.enable()
            self.signals.late = None
            batches.close()
            if self.record is not None:
                self.record.close()

    def _take_step(self, batches: Prefetcher) -> None:
        """One optimizer step. Until the update, it can be abandoned."""
        t, learner = self.config.training, self.learner
        step, first = self.horizon.step, self.horizon.windows
        place = self.horizon.place(self.s)
        lr, share = learning_rate(place, self.config), fraction(place, self.config)
        if not self.pending:
            self.pending_began = time.perf_counter()
        micro_steps = t.grad_accum_steps * batch_multiple(share, self.config)
        found = learner.gradients(batches, step, first, micro_steps)
        self._watch_layers(step + 1, found.batches[0])
        norm = learner.clipped_norm()
        with self.signals.hold():
            windows = first, first + micro_steps * t.batch_size
            self.pending.append(learner.update(found, norm, step=step, windows=windows, lr=lr, share=share))
            self.horizon.launched(windows[1], found.tokens)
            if self.device.type == "cpu":
                self._look()  # the numbers are here already
            self.horizon.look_ahead(self.s)

    def _due(self) -> bool:
        """Whether the last step has to be looked at now; on a GPU looking means waiting for it."""
        t, step = self.config.training, self.horizon.step
        often = (t.log_interval, t.eval_interval, t.checkpoint_interval, t.sample_interval)
        return (
            self.device.type == "cpu"
            or any(n and step % n == 0 for n in often)
            or self.horizon.near(self.s)
            or self.horizon.paused
            or self.horizon.over is not None
        )

    def _look(self) -> None:
        """Fetch the numbers of the steps since the last time, and write all of their rows but the last."""
        taken, self.pending = self.pending, []
        s, numbers = self.s, read(taken)
        seconds = (time.perf_counter() - self.pending_began) / max(len(taken), 1)
        for step, told in zip(taken, numbers, strict=True):
            if s.owed is not None:
                self._write(s.owed)
            if not told.alive:
                self._not_finite(step, told)
            s.step, s.windows, s.tokens = step.step, step.windows[1], s.tokens + step.tokens
            s.training_s += seconds
            s.skipped += not told.taken
            self.horizon.took(seconds)
            s.owed = Row(
                s.step,
                s.tokens,
                round(self.horizon.elapsed_s(), 6),
                loss=told.loss if math.isfinite(told.loss) else None,
                lr=step.lr,
                grad_norm=told.grad_norm if math.isfinite(told.grad_norm) else None,
                step_time_s=round(seconds, 6),
                tokens_per_s=round(step.tokens / seconds, 1),
                skipped=int(not told.taken),
                expert_load=round(told.expert_load, 4) if told.expert_load else None,
            )

    def _finish_row(self) -> None:
        """Evaluate if it is time, write the step's row, save if it is time; in this order, so that what a
        checkpoint says has happened is on the disk before it."""
        if self.s.owed is None:
            return
        t, row = self.config.training, self.s.owed
        due = self._evaluation_due()
        if due:
            last = self.horizon.over is not None
            row = self.validation.of(row, self.s, last=last)
            if last and t.final_eval == "whole" and t.num_eval_batches:
                self.s.best_val_loss = None  # of a part of the validation set: it does not compare
        with self.signals.hold():
            self._write(row)
            if row.val_loss is not None and row.step > 0:
                self._judge(row.val_loss)
                self.horizon.look_ahead(self.s)
            self._save_numbered()
        if self.record is not None and t.sample_interval and row.step and row.step % t.sample_interval == 0:
            self.record.samples(self.learner, row.step, self.horizon.is_late)
        for line in lines_of(row, logged=due or row.step % t.log_interval == 0):
            self.say(line)

    def _write(self, row: Row) -> None:
        """Write a row, and see whether the run still learns."""
        s = self.s
        if self.record is not None:
            self.record.row(row, s.best_val_loss)
        s.owed, s.last_row = None, row
        if row.loss is None or s.initial_loss is None:
            return
        # Weights from elsewhere may begin far below what an untrained model gives: that is no measure of ruin.
        start = max(s.initial_loss, self.uniform_loss) if self.config.training.init_from else s.initial_loss
        s.high_rows = s.high_rows + 1 if row.loss > HIGH_FACTOR * start else 0
        if s.high_rows >= HIGH_ROWS:
            raise DivergedError(
                f"step {row.step}: found {HIGH_ROWS} losses in succession above {HIGH_FACTOR:g} times the loss at the "
                f"start, {start:.4f}, the last {row.loss:.4f}; expected them to fall"
            )

    def _judge(self, val_loss: float) -> None:
        """Keep the best weights; count the evaluations that brought none."""
        s, least = self.s, self.config.training.early_stopping_min_delta
        # Against the last improvement that counted, not against the best loss: small steps add up to a large one.
        counts = s.mark is None or val_loss < s.mark - least
        s.mark, s.waiting = (val_loss, 0) if counts else (s.mark, s.waiting + 1)
        if s.best_val_loss is None or val_loss < s.best_val_loss:
            s.best_val_loss, s.best_step = val_loss, s.step
            self._save("checkpoint_best")

    def _watch_layers(self, step: int, batch: Batch) -> None:
        """Statistics of every layer, on the steps that the config wants; they wait for the device."""
        t = self.config.training
        layers = self.record.layers if self.record is not None else self.layers_of_others
        if layers is not None and step % t.stats_interval == 0:
            for line in layers.record(step, self.learner.model, self.learner.objective, batch):
                self.notice(line)
            reshard(self.learner.objective)
        if t.show_gradients and step % t.log_interval == 0:
            self.say(bars(gradient_norms(self.learner.model)))

    # --- when it ends ---------------------------------------------------------------------------------------

    def _not_finite(self, step: Taken, told: Numbers) -> None:
        """Write down what led here. No weight has moved since, so that the step's gradient can be made once more."""
        assert self.batches is not None
        first, behind = step.windows
        micro_steps = (behind - first) // self.config.training.batch_size
        self.learner.gradients(self.batches, step.step - 1, first, micro_steps)
        norms = {name: float(x) for name, x in gradient_norms(self.learner.model).items()}
        if self.record is not None:
            self.record.diverged(step, told, norms)
        raise DivergedError(
            f"step {step.step}: found loss {told.loss} and gradient norm {told.grad_norm}; expected finite numbers"
        )

    def _pause(self) -> Result:
        """Save, and end in the middle: what comes is as if there had been no end."""
        with self.signals.hold():
            self._save(f"checkpoint_{self.s.step}")
        self.signals.claim()
        return self._finish("interrupted", f"paused at step {self.s.step}; --resume auto goes on from there")

    def _interrupted(self) -> Result:
        """Write what the abandoned step does not concern, then the checkpoint."""
        try:
            self._look()
            if self.s.owed is not None and not self._evaluation_due():
                self._write(self.s.owed)
        except DivergedError as exc:
            return self._finish("diverged", str(exc))
        self._save(f"checkpoint_{self.s.step}")
        name = signal.Signals(self.signals.number or signal.SIGINT).name
        return self._finish("interrupted", f"{name} arrived; --resume auto goes on from step {self.s.step}")

    def _late(self, number: int) -> None:
        """In a thread, while the main one is in a long call that moves no weight: save and end the process."""
        first, self.ranks, self.signals.number = self.ranks.first, Ranks(), number
        if first:
            self._interrupted()
        else:
            time.sleep(OTHERS_WAIT_S)  # an end here would break the first one's step before it has saved
        os._exit(128 + number)

    def how_it_ended(self) -> str | None:
        """The status of a run for which nothing is left to do or to write."""
        output = self.config.output
        final = any(p.name == "checkpoint_final" and n == self.s.step for n, p in checkpoints_in(output.checkpoints))
        if not final or self.s.owed is not None or self.limits != limits(self.config):
            return None
        try:
            told = json.loads((output.folder / "result.json").read_bytes())
        except (OSError, ValueError):
            return None
        ended = told.get("status") in ("completed", "early_stopped") and told.get("steps") == self.s.step
        return str(told["status"]) if ended else None

    # --- evaluation -----------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        t, step = self.config.training, self.s.step
        return step == 0 or (t.eval_interval > 0 and step % t.eval_interval == 0) or self.horizon.over is not None

    def evaluate_only(self) -> Result:
        """Evaluate the weights as they are; nothing is written."""
        row = self.validation.of(Row(self.s.step, self.s.tokens, 0.0), self.s, last=True)
        for line in lines_of(row, logged=False):
            self.say(line)
        whose = f"step {self.s.step}" if self.s.step else self.config.training.init_from or "step 0"
        return self.result("evaluated", f"the weights of {whose}")

    # --- what outlives the process --------------------------------------------------------------------------

    def _save(self, name: str) -> None:
        began = time.perf_counter()
        weights, training = self.learner.tensors()
        if self.record is not None:
            self.s.elapsed_s = self.horizon.elapsed_s()
            self.record.checkpoint(name, self.s, weights, training, self._data())
        self.ranks.wait()
        self.s.saving_s = time.perf_counter() - began

    def restore(self, checkpoint: Checkpoint, changed: Collection[str] = (), *, eval_only: bool = False) -> None:
        """Take over a checkpoint's place in the run; fields in `changed` may differ from its own.

        With `eval_only` nothing will be written, and only the weights and the step matter.

        Raises:
            MismatchError: it was trained on other data.
            FormatError: its tensors do not fit the model, its state is none, or the metrics are no metrics file.
        """
        where = f"checkpoint at step {checkpoint.step}"
        self.s = State.from_json(checkpoint.state, checkpoint.where)
        if eval_only:
            self.learner.load_weights(checkpoint.model, where)
            return
        for key, found in self._data().items():
            if key == "val":
                continue
            expected = checkpoint.state["data"].get(key)
            if expected and found and expected != found and "train_data" not in changed:
                what = "tokenizer hash" if key == "tokenizer" else "data"
                raise MismatchError(
                    f"{self.config.data.train_data}: found {what} {found}; expected {expected}, that of the {where}"
                )
        now, before = self.config.optimizer, checkpoint.config.optimizer
        anew = [n for n in ("optimizer", "averaging", "normuon") if getattr(now, n) != getattr(before, n)]
        for name in anew:
            self.notice(f"{name}: {getattr(now, name)} starts without a memory at step {checkpoint.step}")
        if self.config.model.load_balancing != checkpoint.config.model.load_balancing:
            anew.append("load_balancing")
        self.learner.load(checkpoint.model, checkpoint.training, where, anew)
        self.limits = limits(checkpoint.config)
        self.earlier_rows = rows_to_keep(checkpoint, self.config.output, self.s, self.notice)
        ours = lies_in(checkpoint, self.config.output)
        self.horizon.resume(self.s, self._spent_s() if ours else 0.0)
        other = self._other_measure(checkpoint)
        if other:
            self.notice(f"{other}; what was best and patience begin anew")
        if other or not ours:  # the new folder has no checkpoint_best yet
            self.s.best_val_loss = self.s.best_step = self.s.mark = None
            self.s.waiting = 0
        self.say(f"Resuming from step {self.s.step}")

    def _spent_s(self) -> float:
        """Time spent behind the checkpoint before the run was killed, as its rows tell: a budget of time is over once.

        The steps themselves are taken again."""
        if not self.config.training.max_time or self.earlier_rows is None or not self.earlier_rows.exists():
            return 0.0
        return max((r.elapsed_s for r in read_metrics(self.earlier_rows) if r.step > self.s.step), default=0.0)

    def _other_measure(self, checkpoint: Checkpoint) -> str:
        """Why the validation losses from here on do not compare with the earlier ones; empty: they do."""
        before, now = checkpoint.state["data"].get("val"), self._data()["val"]
        if before != now:
            return f"val_data: evaluated so far on {before or 'nothing'}, from here on on {now or 'nothing'}"
        for name in ("num_eval_batches", "eval_context_length"):
            was, now = (getattr(c.training, name) for c in (checkpoint.config, self.config))
            if was != now:
                return f"{name}: {was} so far, {now} from here on"
        return ""

    def _data(self) -> dict[str, Any]:
        train, val = self.data.train, self.data.val
        return {
            "train": train.fingerprint(),
            "ends": train.ends(),
            "val": val.fingerprint() if val is not None else None,
            "tokenizer": self.data.tokenizer_hash,
        }

    def _save_numbered(self) -> None:
        interval = self.config.training.checkpoint_interval
        if interval and self.s.step > 0 and self.s.step % interval == 0:
            self._save(f"checkpoint_{self.s.step}")
            if self.record is not None:
                self.record.remove_old()

    def _finish(self, status: str, why: str) -> Result:
        """Write `result.json` and return what it says."""
        result = self.result(status, why)
        if self.record is not None:
            self.record.finish(result, self._data())
        return result

    def result(self, status: str, why: str) -> Result:
        """How things stand."""
        s, row, c = self.s, self.s.last_row, self.config
        speed = s.tokens / s.training_s if s.training_s else None
        peak = None
        if self.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(self.device), c.training.precision)
        return Result(
            status=status,
            why=why,
            steps=s.step,
            max_steps=c.training.max_steps,
            tokens=s.tokens,
            parameters=self.parameters,
            active_parameters=self.active,
            initial_loss=s.initial_loss,
            uniform_loss=self.uniform_loss,
            final_train_loss=row.loss if row else None,
            final_val_loss=s.val_loss,
            final_val_accuracy=s.val_accuracy,
            final_bits_per_byte=self.validation.bits_per_byte(s.val_loss),
            final_train_eval_loss=s.train_eval_loss,
            best_val_loss=s.best_val_loss,
            best_step=s.best_step,
            skipped_steps=s.skipped,
            tokens_per_s=round(speed, 1) if speed else None,
            mfu=mfu(flops_per_token(c.model), speed / self.ranks.world, peak) if speed else None,
            wall_time_s=round(self.horizon.elapsed_s(), 3),
            device=str(self.device),
            precision=c.training.precision,
            compiled=self.learner.recompiles is not None,
            recompiles=self.learner.recompiles,
            processes=self.ranks.world,
            hardware=describe(self.device),
            versions=versions(),
            signal=self.signals.number,
        )

    # --- what is shown --------------------------------------------------------------------------------------

    def _bar_fields(self) -> dict[str, object]:
        fields: dict[str, object] = {}
        if self.s.last_row is not None and self.s.last_row.loss is not None:
            fields["loss"] = round(self.s.last_row.loss, 4)
        if self.s.val_loss is not None:
            fields["val_loss"] = round(self.s.val_loss, 4)
        if self.s.training_s:
            fields["tokens/s"] = f"{self.s.tokens / self.s.training_s:,.0f}"
        return fields
