"""The training loop, from a config to a run folder.

In: a `RunConfig`. Out: a folder with `config.toml`, `metrics.csv`, `result.json` and `checkpoints/`
(docs/formats.md), and a `Result`. Called by `cli_lm` and by users.

Everything random is a pure function of (seed, step): the windows, and the dropout masks, because torch's
generator is seeded anew for every step. So a checkpoint needs weights, moments and the step's number, and a
run that was killed anywhere ends where the unbroken one ends, bit for bit on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bytekiln.checkpoint import Checkpoint, checkpoints_in, remove_all, remove_old, save_checkpoint
from bytekiln.config import RunConfig
from bytekiln.console import Progress
from bytekiln.data import TokenData, load_tokenizer, open_data, to_device
from bytekiln.errors import ConfigError, DivergedError, MismatchError
from bytekiln.evaluate import bits_per_byte, evaluate
from bytekiln.loss import real_targets, summed_cross_entropy
from bytekiln.metrics import MetricsFile, Row, write_atomically
from bytekiln.model import parameter_count
from bytekiln.optim import clip_gradients, load_state_tensors, make_optimizer, set_learning_rate, state_tensors
from bytekiln.prepare import Say, compiled, find_checkpoint, find_device, keep_freed_memory, make_model, resolved
from bytekiln.result import Result, lines_of
from bytekiln.runfolder import check_folder, lies_in, locked, prepare_folder, rows_to_keep
from bytekiln.schedule import learning_rate
from bytekiln.signals import Interrupted, Signals
from bytekiln.tokenizer import Tokenizer

HIGH_ROWS, HIGH_FACTOR = 3, 2.0
"""A run has diverged when this many rows in succession lie above this multiple of the loss at the start."""


def train(
    config: RunConfig,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    given: Mapping[str, object] | None = None,
    say: Say = lambda _: None,
    notice: Say = lambda _: None,
) -> Result:
    """Train a model, or go on training one.

    Args:
        config: the run; `config.output` says where it goes.
        resume: "auto" for the newest whole checkpoint of the run folder (none: start), or a checkpoint's path.
        overwrite: replace an existing run.
        given: on a resume, the fields that the caller set on purpose; the others come from the checkpoint. Those
            that change the mathematics must equal the run's; `max_steps` may rise.
        say: told the lines of the console. `notice`: told what deserves attention.

    Returns:
        How it ended; the same is in `result.json`.

    Raises:
        BytekilnError: config, data, checkpoint or folder cannot be used; nothing was trained.
    """
    if resume is not None and overwrite:
        raise ConfigError("found both --resume (or a run's folder) and --overwrite; expected one of them")
    checkpoint = None
    if resume is not None:
        config, checkpoint = find_checkpoint(config, str(resume), given, notice)
    with Signals() as signals:
        device = find_device(config.training.device)
        if device.type == "cpu":
            keep_freed_memory()
        say(f"Using device: {device}")
        say("Loading tokenizer...")
        if checkpoint and checkpoint.tokenizer_json and not {"tokenizer", "vocab_path"} & set(given or {}):
            tokenizer: Tokenizer | None = Tokenizer.from_json(checkpoint.tokenizer_json)
        else:
            tokenizer = load_tokenizer(config.data)
        say("Tokenizer loaded." if tokenizer else "No tokenizer given: ids are taken as they are.")
        say("Loading training data..." + ("\nLoading validation data..." if config.data.val_data else ""))
        train_data, val_data, vocab_size = open_data(config, tokenizer)
        for data in (train_data, val_data):
            if data is not None and data.file.notice:
                notice(data.file.notice)
        if tokenizer is not None and tokenizer.n_vocab < vocab_size and checkpoint is None:
            notice(f"vocab_size: the model has {vocab_size} tokens, the tokenizer uses {tokenizer.n_vocab} of them")
        config = resolved(config, vocab_size, device, say)
        tokenizer_json = tokenizer.to_json() if tokenizer else checkpoint.tokenizer_json if checkpoint else None
        resuming = resume is not None and (checkpoint is None or lies_in(checkpoint, config.output))
        check_folder(config.output, overwrite, resuming=resuming)
        run = _Run(config, device, signals, train_data, val_data, tokenizer_json, say, notice)
        if checkpoint is not None:
            run.restore(checkpoint)
        with locked(config.output):
            if run.is_complete():
                notice(f"{config.output.folder}: complete at step {run.step}; a greater --max-steps continues it")
                return run.result("completed", "all steps done")
            with signals.hold():
                prepare_folder(config.output, overwrite, resuming=resuming)
            return run.go()


class _Run:
    """A run in progress: what the loop's parts share."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        signals: Signals,
        train_data: TokenData,
        val_data: TokenData | None,
        tokenizer_json: str | None,
        say: Say,
        notice: Say,
    ) -> None:
        self.config, self.device, self.signals, self.say, self.notice = config, device, signals, say, notice
        self.train_data, self.val_data, self.tokenizer_json = train_data, val_data, tokenizer_json
        say("Creating model...")
        torch.manual_seed(config.training.seed)
        self.parameters = parameter_count(config.model)
        self.model = make_model(config.model, device)
        say(f"Model created with {self.parameters:,} total parameters ({self.parameters:,} trainable)")
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.autocast = config.training.precision == "bf16"
        self.step = self.tokens = self.high_rows = 0
        self.owed: Row | None = Row(0, 0, 0.0)
        """The row of the last step, while its evaluation is still to come; row 0 waits for the first one."""
        self.last_row: Row | None = None
        self.initial_loss: float | None = None
        self.val_loss: float | None = None
        self.best_val_loss: float | None = None
        self.best_step: int | None = None
        self.elapsed_before, self.began = 0.0, time.perf_counter()
        self.training_s = 0.0
        self.metrics: MetricsFile | None = None
        self.earlier_rows: Path | None = None
        """The metrics file that a resumed run goes on with."""
        self.tokenizer_hash = next(
            (d.file.tokenizer_hash for d in (train_data, val_data) if d is not None and d.file.tokenizer_hash),
            Tokenizer.from_json(tokenizer_json).hash if tokenizer_json else None,
        )

    # --- the loop -------------------------------------------------------------------------------------------

    def go(self) -> Result:
        """From the first step that is not done to the end, whatever end it takes."""
        c = self.config.training
        folder = self.config.output.folder
        with self.signals.hold():
            (folder / "result.json").unlink(missing_ok=True)
            # Newer checkpoints go before the rows that they rely on: a kill in between leaves a run that is whole.
            remove_all(self.config.output.checkpoints, behind=self.step)
            write_atomically(folder / "config.toml", self.config.to_toml().encode())
            if self.tokenizer_json is not None:
                write_atomically(folder / "tokenizer.json", self.tokenizer_json.encode())
            self.metrics = MetricsFile(self.config.output.metrics, self._last_row_kept(), self.earlier_rows)
        self.say("Starting training...")
        self.began = time.perf_counter()
        try:
            with Progress("training", c.max_steps, "steps") as bar:
                training_loss = self._compiled_loss()
                self._finish_row()
                if not (self.config.output.checkpoints / f"checkpoint_{self.step}").exists():
                    self._save_numbered()  # this run was killed between checkpoint_best and this one
                while self.step < c.max_steps:
                    self._take_step(training_loss)
                    self._finish_row()
                    bar.update(self.step, **self._bar_fields())
            with self.signals.hold():
                self._save("checkpoint_final")
                remove_old(self.config.output.checkpoints, c.keep_checkpoints)
            return self.finish("completed", "all steps done")
        except Interrupted:
            return self._interrupted()
        except DivergedError as exc:
            return self.finish("diverged", str(exc))
        finally:
            self.metrics.close()

    def _take_step(self, training_loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """One optimizer step over `grad_accum_steps` micro-steps. Until the update, it can be abandoned."""
        c = self.config.training
        began = time.perf_counter()
        torch.manual_seed(_step_seed(c.seed, self.step))
        self.model.train()
        starts = self.train_data.random_starts(c.seed, self.step, c.batch_size * c.grad_accum_steps)
        batches = [self.train_data.batch(s) for s in np.split(starts, c.grad_accum_steps)]
        count = sum(real_targets(targets_BxT) for _, targets_BxT in batches)
        total = torch.zeros((), device=self.device)
        for inputs_BxT, targets_BxT in batches:
            loss = training_loss(to_device(inputs_BxT, self.device), to_device(targets_BxT, self.device)) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        norm = clip_gradients(self.model, self.config.optimizer.grad_clip)
        lr, loss_value, grad_norm = learning_rate(self.step, self.config), float(total), float(norm)
        if not (math.isfinite(loss_value) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"step {self.step + 1}: found loss {loss_value} and gradient norm {grad_norm}; expected finite numbers"
            )
        with self.signals.hold():
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - began
            self.step += 1
            self.tokens += count
            self.training_s += seconds
            self.owed = Row(
                self.step,
                self.tokens,
                round(self._elapsed(), 6),
                loss=loss_value,
                lr=lr,
                grad_norm=grad_norm,
                step_time_s=round(seconds, 6),
                tokens_per_s=round(count / seconds, 1),
            )

    def _finish_row(self) -> None:
        """Evaluate if it is time, write the step's row, save if it is time; in this order, so that what a
        checkpoint says has happened is on the disk before it."""
        if self.owed is None:
            return
        row = self.owed
        due = self._evaluation_due()
        if due:
            row = self._evaluated(row)
        with self.signals.hold():
            assert self.metrics is not None
            self.metrics.append(row)
            self.owed, self.last_row = None, row
            self._check_divergence(row)
            improved = row.val_loss is not None and (self.best_val_loss is None or row.val_loss < self.best_val_loss)
            if improved and self.step > 0:
                self.best_val_loss, self.best_step = row.val_loss, self.step
                self._save("checkpoint_best")
            self._save_numbered()
        for line in lines_of(row, logged=due or self.step % self.config.training.log_interval == 0):
            self.say(line)

    def _evaluation_due(self) -> bool:
        c = self.config.training
        return self.step in (0, c.max_steps) or (c.eval_interval > 0 and self.step % c.eval_interval == 0)

    def _evaluated(self, row: Row) -> Row:
        c = self.config.training
        train_loss, val_loss = (
            None
            if data is None
            else evaluate(
                self.model,
                self._summed_loss,
                data,
                batch_size=c.batch_size,
                num_batches=c.num_eval_batches,
                device=self.device,
            )
            for data in (self.train_data, self.val_data)
        )
        if not all(math.isfinite(x) for x in (train_loss, val_loss) if x is not None):
            raise DivergedError(
                f"step {self.step}: found validation loss {val_loss} and training loss {train_loss}; "
                "expected finite numbers"
            )
        if self.step == 0:
            self.initial_loss = train_loss
            uniform = math.log(self.config.model.vocab_size)
            self.say(f"Loss at the start: {train_loss:.4f} (ln {self.config.model.vocab_size:,} = {uniform:.4f})")
        self.val_loss = val_loss
        bits = None
        if val_loss is not None and self.val_data is not None:
            bits = bits_per_byte(val_loss, self.val_data.bytes_per_token)
        return dataclasses.replace(row, val_loss=val_loss, train_eval_loss=train_loss, bits_per_byte=bits)

    def _summed_loss(self, inputs_BxT: Tensor, targets_BxT: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits_BxTxV = self.model(inputs_BxT)
        return summed_cross_entropy(logits_BxTxV, targets_BxT)

    def _compiled_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss for training steps. Evaluation stays eager: other shapes and modes would be compiled anew."""
        if not self.config.training.compile:
            return self._summed_loss
        self.say("Compiling the model...")
        try:
            return compiled(self._summed_loss, self.config, self.device, self.notice)
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _check_divergence(self, row: Row) -> None:
        if row.loss is None or self.initial_loss is None:
            return
        self.high_rows = self.high_rows + 1 if row.loss > HIGH_FACTOR * self.initial_loss else 0
        if self.high_rows >= HIGH_ROWS:
            raise DivergedError(
                f"step {self.step}: found {HIGH_ROWS} losses in succession above {HIGH_FACTOR:g} times the loss at the "
                f"start, {self.initial_loss:.4f}, the last {row.loss:.4f}; expected them to fall"
            )

    def _interrupted(self) -> Result:
        """Write what the abandoned step does not concern, then the checkpoint."""
        if self.owed is not None and not self._evaluation_due():
            assert self.metrics is not None
            self.metrics.append(self.owed)
            self.owed, self.last_row = None, self.owed
        self._save(f"checkpoint_{self.step}")
        name = signal.Signals(self.signals.number or signal.SIGINT).name
        return self.finish("interrupted", f"{name} arrived; --resume auto goes on from step {self.step}")

    # --- what outlives the process ----------------------------------------------------------------------------

    def _save(self, name: str) -> None:
        assert self.metrics is not None
        path = self.config.output.checkpoints / name
        self.metrics.sync()
        self.say(f"Saving checkpoint to {path}")
        save_checkpoint(
            path,
            Checkpoint(
                step=self.step,
                config=self.config,
                model={k: v.detach() for k, v in self.model.state_dict().items()},
                training=state_tensors(self.model, self.optimizer),
                state={
                    "tokens": self.tokens,
                    "elapsed_s": round(self._elapsed(), 6),
                    "training_s": round(self.training_s, 6),
                    "owed": dataclasses.asdict(self.owed) if self.owed else None,
                    "last_row": dataclasses.asdict(self.last_row) if self.last_row else None,
                    "initial_loss": self.initial_loss,
                    "val_loss": self.val_loss,
                    "best_val_loss": self.best_val_loss,
                    "best_step": self.best_step,
                    "high_rows": self.high_rows,
                    "data": self._data(),
                },
                tokenizer_json=self.tokenizer_json,
            ),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's place in the run.

        Raises:
            MismatchError: it was trained on other data, or the metrics do not reach to it.
            FormatError: its tensors do not fit the model.
        """
        s = checkpoint.state
        where = f"checkpoint at step {checkpoint.step}"
        for key, found in self._data().items():
            expected = s["data"].get(key)
            if expected and found and expected != found:
                what = "tokenizer hash" if key == "tokenizer" else "data"
                raise MismatchError(
                    f"{self.train_data.file.path}: found {what} {found}; expected {expected}, that of the {where}"
                )
        self.model.load_state_dict(checkpoint.model)
        load_state_tensors(self.model, self.optimizer, checkpoint.training, checkpoint.step, where)
        self.step, self.tokens = checkpoint.step, s["tokens"]
        self.elapsed_before, self.training_s = s["elapsed_s"], s["training_s"]
        self.owed, self.last_row = (Row(**s[k]) if s[k] else None for k in ("owed", "last_row"))
        self.initial_loss, self.val_loss, self.high_rows = s["initial_loss"], s["val_loss"], s["high_rows"]
        self.best_val_loss, self.best_step = s["best_val_loss"], s["best_step"]
        self.earlier_rows = rows_to_keep(checkpoint, self.config.output, self._last_row_kept())
        if not lies_in(checkpoint, self.config.output):
            self.best_val_loss = self.best_step = None  # the new folder has no checkpoint_best yet
        self.say(f"Resuming from step {self.step}")

    def _data(self) -> dict[str, str | None]:
        train = self.train_data
        return {"train": train.fingerprint(), "ends": train.ends(), "tokenizer": self.tokenizer_hash}

    def _last_row_kept(self) -> int:
        return self.step - 1 if self.owed is not None else self.step

    def _save_numbered(self) -> None:
        c = self.config.training
        if c.checkpoint_interval and self.step > 0 and self.step % c.checkpoint_interval == 0:
            self._save(f"checkpoint_{self.step}")
            remove_old(self.config.output.checkpoints, c.keep_checkpoints)

    def is_complete(self) -> bool:
        """Whether nothing is left to do or to write."""
        saved = checkpoints_in(self.config.output.checkpoints)
        final = any(p.name == "checkpoint_final" and step == self.step for step, p in saved)
        written = (self.config.output.folder / "result.json").is_file()
        return self.step >= self.config.training.max_steps and self.owed is None and final and written

    def finish(self, status: str, why: str) -> Result:
        """Write `result.json` and return what it says."""
        result = self.result(status, why)
        result.write(self.config.output.folder / "result.json")
        return result

    def result(self, status: str, why: str) -> Result:
        """How things stand."""
        row, c = self.last_row, self.config
        bytes_per_token = self.val_data.bytes_per_token if self.val_data else None
        return Result(
            status=status,
            why=why,
            steps=self.step,
            max_steps=c.training.max_steps,
            tokens=self.tokens,
            parameters=self.parameters,
            initial_loss=self.initial_loss,
            uniform_loss=math.log(c.model.vocab_size),
            final_train_loss=row.loss if row else None,
            final_val_loss=self.val_loss,
            final_bits_per_byte=bits_per_byte(self.val_loss, bytes_per_token) if self.val_loss is not None else None,
            best_val_loss=self.best_val_loss,
            best_step=self.best_step,
            tokens_per_s=round(self.tokens / self.training_s, 1) if self.training_s else None,
            wall_time_s=round(self._elapsed(), 3),
            device=str(self.device),
            precision=c.training.precision,
            compiled=bool(c.training.compile),
            signal=self.signals.number,
        )

    def _elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.began

    def _bar_fields(self) -> dict[str, object]:
        fields: dict[str, object] = {}
        if self.last_row is not None and self.last_row.loss is not None:
            fields["loss"] = round(self.last_row.loss, 4)
        if self.val_loss is not None:
            fields["val_loss"] = round(self.val_loss, 4)
        if self.training_s:
            fields["tokens/s"] = f"{self.tokens / self.training_s:,.0f}"
        return fields


def _step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for the dropout of one step (the mixer of SplitMix64, Steele et al. 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1
