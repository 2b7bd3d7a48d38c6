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

    def of(self, row: Row, state: State, *, last: bool = False) -> Row:
        """The row with its losses; `state` learns them too, and how long the next evaluation may take.

        The next one may be the last. Where that is to read the whole validation set and this one did not, its time is
        taken to grow with the windows.

        Args:
            row: of the step that was taken.
            state: of the run.
            last: whether the run is over.

        Raises:
            DivergedError: one of them is not finite.
        """
        began, t = time.perf_counter(), self.config.training
        self.say("Evaluating...")
        val, counted, size = None, itertools.count(), self.config.eval_batch_size
        whole = last and t.final_eval == "whole"
        if self.data.val is not None:
            batches = self.data.val.batches(size, 0 if whole else t.num_eval_batches)
            val = self.learner.evaluate(b for b, _ in zip(batches, counted, strict=False))
        of_validation_s = time.perf_counter() - began
        count = (whole and t.num_eval_batches) or next(counted) or t.num_eval_batches or WHOLE_WITHOUT_VALIDATION
        train = None
        if t.eval_train_data or val is None:
            train = self.learner.evaluate(itertools.islice(self.data.train_eval.batches(size, count), count))
        took_s = time.perf_counter() - began
        state.evaluation_s = took_s + of_validation_s * self._growth(whole)
        if not all(math.isfinite(x.loss) for x in (train, val) if x is not None):
            raise DivergedError(
                f"step {row.step}: found validation loss {val.loss if val else None} and training loss "
                f"{train.loss if train else None}; expected finite numbers"
            )
        if row.step == 0:
            found = train or val
            assert found is not None
            state.initial_loss = found.loss
            V = self.config.model.padded_vocab_size
            self.say(f"Loss at the start: {found.loss:.4f} (ln {V:,} = {math.log(V):.4f})")
            expected = None if self.config.training.init_from else expected_initial_loss(self.config.model)
            if expected is not None and abs(found.loss - expected) > FAR_FROM_EXPECTED:
                self.notice(
                    f"loss at the start: found {found.loss:.4f}; expected about {expected:.4f} of an untrained model "
                    "of this shape: are weights, data and vocabulary those that were meant?"
                )
        row = dataclasses.replace(row, eval_time_s=round(took_s, 6))
        if train is not None:
            state.train_eval_loss = train.loss
            row = dataclasses.replace(row, train_eval_loss=train.loss, train_eval_accuracy=train.accuracy)
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

    def _growth(self, whole: bool) -> float:
        """By how many times its own time on validation data the last evaluation takes longer than one like this."""
        t, size = self.config.training, self.config.eval_batch_size
        if whole or self.data.val is None or t.final_eval != "whole":
            return 0.0
        return self.data.val.windows(size, 0) / self.data.val.windows(size, t.num_eval_batches) - 1

    def bits_per_byte(self, loss: float | None) -> float | None:
        """Of validation text; None for masked tokens, whose loss is no code for the text."""
        if loss is None or self.data.val is None or self.config.training.objective == "mlm":
            return None
        return bits_per_byte(loss, self.data.val.bytes_per_token)
