"""A run in this process that writes nothing: steps at whatever learning rate, losses when asked.

In: a `RunConfig`. Out: the losses of its steps, which are those of `lm-train` to the bit, and validation losses. Called
by `range_test` and by benches, where hundreds of short runs would spend their time on starting processes.
"""

from __future__ import annotations

import itertools
from types import TracebackType
from typing import Self

from bytekiln.config import RunConfig
from bytekiln.data import Prefetcher, load_tokenizer, open_data
from bytekiln.errors import ConfigError
from bytekiln.learner import Learner, read
from bytekiln.prepare import Say, find_device, initial_weights, keep_freed_memory, resolved
from bytekiln.ranks import Ranks
from bytekiln.schedule import Progress, batch_multiple, fraction, learning_rate


class BareRun:
    """The learner and the data of a run; one process."""

    def __init__(self, config: RunConfig, *, compiled: bool = False, notice: Say = lambda _: None) -> None:
        """Build it; nothing is trained yet.

        Args:
            config: the run.
            compiled: compile where the config says so; else nothing is compiled.
            notice: told where the compiler fails.

        Raises:
            BytekilnError: config or data cannot be used.
        """
        device = find_device(config.training.device)
        if device.type == "cpu":
            keep_freed_memory()
        self.data = open_data(config, load_tokenizer(config.data))
        config = config if compiled else config.with_(compile=False)
        self.config = resolved(config, self.data.vocab_size, device, lambda _: None)
        self.learner = Learner(self.config, device, Ranks())
        if config.training.init_from:
            self.learner.load_weights(initial_weights(self.config, lambda _: None), config.training.init_from)
        self.batches = Prefetcher(self.data.train, self.config.data.prefetch, pin=device.type == "cuda")
        self.step = self.windows = self.tokens = 0
        if self.config.training.compile:
            self.learner.compile(self.data.train.batch(0, 0, 0, config.training.batch_size), notice)

    def take_step(self, lr: float | None = None) -> float:
        """One optimizer step; returns its training loss in nats a token, which is that before the update.

        Args:
            lr: its learning rate; None: what the run's schedule says, a schedule in seconds excepted.

        Raises:
            ConfigError: the schedule counts seconds.
        """
        t = self.config.training
        if lr is None and self.config.progress == "seconds":
            raise ConfigError("max_time: found a schedule in seconds; expected one in steps or tokens")
        place = Progress(self.step, t.max_steps, self.tokens, t.token_budget)
        share = fraction(place, self.config) if self.config.progress != "seconds" else 0.0
        rate = learning_rate(place, self.config) if lr is None else lr
        micro_steps = t.grad_accum_steps * batch_multiple(share, self.config)
        first, behind = self.windows, self.windows + micro_steps * t.batch_size
        found = self.learner.gradients(self.batches, self.step, first, micro_steps)
        norm = self.learner.clipped_norm()
        taken = self.learner.update(found, norm, step=self.step, windows=(first, behind), lr=rate, share=share)
        self.step, self.windows, self.tokens = self.step + 1, behind, self.tokens + found.tokens
        return read([taken])[0].loss

    def val_loss(self) -> float:
        """Validation loss in nats a token, of the windows that `lm-train` evaluates; of training data without any."""
        t = self.config.training
        if self.data.val is None:
            batches = self.data.train_eval.batches(self.config.eval_batch_size, t.num_eval_batches)
            return self.learner.evaluate(itertools.islice(batches, t.num_eval_batches or 100)).loss
        return self.learner.evaluate(self.data.val.batches(self.config.eval_batch_size, t.num_eval_batches)).loss

    def close(self) -> None:
        """End the thread that makes batches."""
        self.batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
