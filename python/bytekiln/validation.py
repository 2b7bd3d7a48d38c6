"""What an evaluation adds to a row: losses on validation data, and on as much of the training data.

In: a learner, data, a row. Out: the row with its losses. Called by `loop`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

from bytekiln.config import RunConfig
from bytekiln.data import Data
from bytekiln.errors import DivergedError
from bytekiln.evaluate import bits_per_byte
from bytekiln.learner import Learner
from bytekiln.loss import expected_initial_loss
from bytekiln.metrics import Row
from bytekiln.prepare import Say
from bytekiln.run_state import State

WHOLE_WITHOUT_VALIDATION = 100
"""Batches of training data to evaluate where num_eval_batches = 0 has no validation set to follow."""
FAR_FROM_EXPECTED = 0.5
"""Nats between a first loss and its expectation from which it is no chance: tests hold the latter to 0.06."""


class Validation:
    """Evaluates always the same windows."""

    def __init__(self, config: RunConfig, learner: Learner, data: Data, say: Say, notice: Say) -> None:
        """Of the run `config`; `say` is told when it begins, `notice` of a start that cannot be right."""
        self.config, self.learner, self.data, self.say, self.notice = config, learner, data, say, notice

    def of(self, row: Row, state: State) -> Row:
        """The row with its losses; `state` learns them too.

        Raises:
            DivergedError: one of them is not finite.
        """
        began, t = time.perf_counter(), self.config.training
        self.say("Evaluating...")
        val, counted = None, itertools.count()
        if self.data.val is not None:
            batches = self.data.val.batches(t.batch_size, t.num_eval_batches)
            val = self.learner.evaluate(b for b, _ in zip(batches, counted, strict=False))
        count = next(counted) or t.num_eval_batches or WHOLE_WITHOUT_VALIDATION
        train = self.learner.evaluate(itertools.islice(self.data.train_eval.batches(t.batch_size, count), count))
        state.evaluation_s = time.perf_counter() - began
        if not all(math.isfinite(x.loss) for x in (train, val) if x is not None):
            raise DivergedError(
                f"step {row.step}: found validation loss {val.loss if val else None} and training loss {train.loss}; "
                "expected finite numbers"
            )
        if row.step == 0:
            state.initial_loss = train.loss
            V = self.config.model.padded_vocab_size
            self.say(f"Loss at the start: {train.loss:.4f} (ln {V:,} = {math.log(V):.4f})")
            expected = None if self.config.training.init_from else expected_initial_loss(self.config.model)
            if expected is not None and abs(train.loss - expected) > FAR_FROM_EXPECTED:
                self.notice(
                    f"loss at the start: found {train.loss:.4f}; expected about {expected:.4f} of an untrained model "
                    "of this shape: are weights, data and vocabulary those that were meant?"
                )
        state.train_eval_loss = train.loss
        row = dataclasses.replace(
            row,
            train_eval_loss=train.loss,
            train_eval_accuracy=train.accuracy,
            eval_time_s=round(state.evaluation_s, 6),
        )
        if val is None:
            return row
        state.val_loss, state.val_accuracy = val.loss, val.accuracy
        return dataclasses.replace(
            row,
            val_loss=val.loss,
            val_perplexity=val.perplexity if math.isfinite(val.perplexity) else None,
            val_accuracy=val.accuracy,
            bits_per_byte=self.bits_per_byte(val.loss),
        )

    def bits_per_byte(self, loss: float | None) -> float | None:
        """Of validation text; None for masked tokens, whose loss is no code for the text."""
        if loss is None or self.data.val is None or self.config.training.objective == "mlm":
            return None
        return bits_per_byte(loss, self.data.val.bytes_per_token)
