"""Runs that take their steps together: ordinary ones, whose passes through the model are made for several at once.

In: runs as `train` builds them. Out: gradients in each run's own parameters; rows, checkpoints and results as ever.
Called by `stack`, which drives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bytekiln.data import Batch, Prefetcher, to_device
from bytekiln.learner import Gradients, Learner
from bytekiln.loop import Run
from bytekiln.prepare import Say, graphs_compiled
from bytekiln.record import Record
from bytekiln.result import Result
from bytekiln.schedule import batch_multiple, fraction
from bytekiln.stack.model import StackedObjective


class StackedLearner(Learner):
    """A run's own learner, whose gradients come from the stack that it is part of."""

    def __init__(self, own: Learner) -> None:
        """Take over all that `own` is made of."""
        vars(self).update(vars(own))
        self.ready: Gradients | None = None
        """What the stack has made for the next call; the gradient itself lies in the parameters."""

    def gradients(self, batches: Prefetcher, step: int, first: int, micro_steps: int) -> Gradients:
        """As `Learner.gradients`; made here where nothing is ready, when a step is gone over again, say."""
        found, self.ready = self.ready, None
        return found if found is not None else super().gradients(batches, step, first, micro_steps)

    def make_ready(self, batches: Prefetcher, step: int, first: int, micro_steps: int) -> None:
        """What the next `gradients` returns, made without the others of the stack."""
        self.ready = super().gradients(batches, step, first, micro_steps)


class Stack:
    """Runs whose pass through the model is one."""

    def __init__(self, runs: Sequence[StackedRun], notice: Say) -> None:
        """Lay their parameters together; of a single run nothing is changed."""
        self.runs = list(runs)
        self.objective: StackedObjective | None = None
        self.loss: Callable[..., Any] | None = None
        self._notice = notice
        if len(self.runs) > 1:
            self.loss = self.objective = StackedObjective([r.learner.objective for r in self.runs])

    def compile(self) -> None:
        """Compile the pass, tried on the first micro-batch of the data: its shapes are the ones to come."""
        if self.objective is None:
            return
        loss = torch.compile(self.objective)
        batch = [r.data.train.batch(0, 0, 0, r.config.training.batch_size) for r in self.runs]
        try:
            loss(*_joined(batch, self.runs[0].device), self._weights([1] * len(batch))).total.backward()
        except Exception as exc:  # as `prepare.compiled`
            self._notice(f"torch.compile failed, going on without it: {type(exc).__name__}: {str(exc)[:200]}")
            loss = self.objective
        self.objective.zero_grad()
        self.loss = loss
        for run in self.runs:
            run.learner._graphs = graphs_compiled() if loss is not self.objective else None

    def gradients(self) -> None:
        """Make the next step's gradients of all runs, as `Learner.gradients` makes those of one; moves no weight."""
        wanted = [r.next_step() for r in self.runs]
        micro_steps = wanted[0][2]
        apart = any(w[2] != micro_steps for w in wanted)  # a stage of `batch_stages` begins by tokens, a step apart
        if self.objective is None or self.loss is None or apart:
            for run, wants in zip(self.runs, wanted, strict=True):
                assert run.batches is not None
                run.learner.make_ready(run.batches, *wants)
            return
        self.objective.zero_grad()
        read = [r.batches_of(*w) for r, w in zip(self.runs, wanted, strict=True)]
        counts = [sum(b.count for b in batches) for batches in read]
        weights_K = self._weights(counts)
        nll_K = torch.zeros_like(weights_K)
        for model in (*(r.learner.model for r in self.runs), self.objective):
            if not model.training:
                model.train()
        for m in range(micro_steps):
            parts = self.loss(*_joined([batches[m] for batches in read], self.runs[0].device), weights_K)
            parts.total.backward()
            nll_K += parts.nll_K
        self.objective.hand_out()
        for run, nll, count, batches in zip(self.runs, nll_K, counts, read, strict=True):
            run.learner.ready = Gradients(nll / max(count, 1), None, count, batches)

    def let_go(self) -> None:
        """Give the runs their parameters back."""
        if self.objective is not None:
            self.objective.let_go()

    def _weights(self, counts: Sequence[int]) -> Tensor:
        return torch.tensor([1.0 / max(n, 1) for n in counts], device=self.runs[0].device)


class Stacks:
    """All runs that are trained together now, in stacks whose passes are made side by side.

    The operations of a small model are too short to share out among threads. But stacks need nothing of each other, and
    torch holds no lock of the interpreter while it computes: each has a thread of its own. No result depends on how
    many there are. Nothing in a pass is random (`rules`), and all that it writes is its own runs'.
    """

    def __init__(self, runs: Sequence[StackedRun], most: int, notice: Say) -> None:
        """Lay their parameters together, in at most so many stacks."""
        self.runs = list(runs)
        many = min(most, len(runs))
        bounds = [len(runs) * i // many for i in range(many + 1)] if runs else []
        self.stacks = [Stack(runs[start:end], notice) for start, end in pairwise(bounds)]
        self._pool: ThreadPoolExecutor | None = None
        if many > 1:  # what is set of torch's threads is set for a thread
            self._pool = ThreadPoolExecutor(many, "bytekiln-stack", torch.set_num_threads, (torch.get_num_threads(),))

    def compile(self) -> None:
        """See `Stack.compile`."""
        for stack in self.stacks:
            stack.compile()

    def gradients(self) -> list[tuple[Stack, Exception]]:
        """Make the next step's gradients of all runs.

        An interruption of the wait leaves passes that go on until `close`; they move no weight.

        Returns:
            The stacks whose pass failed, and why.
        """
        if self._pool is None:
            ends = [stack.gradients for stack in self.stacks]
        else:
            ends = [self._pool.submit(stack.gradients).result for stack in self.stacks]
        failed = []
        for stack, end in zip(self.stacks, ends, strict=True):
            try:
                end()
            except Exception as exc:  # whatever it is, it is no more the others' than it would be in another process
                failed.append((stack, exc))
        return failed

    def close(self) -> None:
        """Wait for what is under way; end the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def let_go(self) -> None:
        """Give the runs their parameters back, and end."""
        self.close()
        for stack in self.stacks:
            stack.let_go()


@contextmanager
def divided_threads(runs: Sequence[StackedRun]) -> Iterator[int]:
    """Give each run its part of torch's threads, at least one, as `lm-sweep --jobs` does; says how many stacks to make.

    It stays for as long as the runs are trained, whoever leaves or is behind: sums on another number of threads round
    otherwise, and no resumed run may differ. A compiled pass has its threads built in, and a GPU is one device: there
    all runs are one stack, on all threads.
    """
    threads = torch.get_num_threads()
    divided = all(r.device.type == "cpu" and r.config.training.compile is not True for r in runs)
    torch.set_num_threads(max(threads // len(runs), 1) if divided else threads)
    try:
        yield threads if divided else 1
    finally:
        torch.set_num_threads(threads)


def _joined(batches: Sequence[Batch], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """A micro-batch of each run as one batch, run after run."""
    documents = [b.documents_BxT for b in batches if b.documents_BxT is not None]
    whole = Batch(
        torch.cat([b.inputs_BxT for b in batches]),
        torch.cat([b.targets_BxT for b in batches]),
        torch.cat(documents) if documents else None,
        sum(b.count for b in batches),
    )
    inputs, targets, documents_BxT, _ = to_device(whole, device)
    return inputs, targets, documents_BxT


class StackedRun(Run):
    """A run whose loop is driven from outside, a step at a time: `Run.go` taken apart."""

    learner: StackedLearner

    def __init__(self, *everything: Any) -> None:
        """As `Run`."""
        super().__init__(*everything)
        self.learner = StackedLearner(self.learner)
        self.validation.learner = self.learner
        self.began = 0.0
        """When the step began that is made for all runs."""

    def begin(self) -> None:
        """Open the files, evaluate the start."""
        with self.signals.hold():
            self.record = Record(
                self.config, self.s, self.tokenizer, self.tokenizer_json, self.earlier_rows, self.say, self.notice
            )
        self.batches = Prefetcher(self.data.train, self.config.data.prefetch, pin=self.device.type == "cuda")
        self.horizon.look_ahead(self.s)
        self._finish_row()
        if not (self.config.output.checkpoints / f"checkpoint_{self.s.step}").exists():
            self._save_numbered()

    def next_step(self) -> tuple[int, int, int]:
        """(step, first window, micro-steps) of the step to come, as `_take_step` asks for it."""
        multiple = batch_multiple(fraction(self.horizon.place(self.s), self.config), self.config)
        return self.horizon.step, self.horizon.windows, self.config.training.grad_accum_steps * multiple

    def batches_of(self, step: int, first: int, micro_steps: int) -> list[Batch]:
        """The micro-batches of a step."""
        assert self.batches is not None
        size = self.config.training.batch_size
        return self.batches.get([(step, first, m * size, size) for m in range(micro_steps)])

    def step(self) -> None:
        """Take the step whose gradients are made; evaluate, save, judge."""
        assert self.batches is not None
        self._take_step(self.batches)
        if self._due():
            self._look()
            self._finish_row()

    def _look(self) -> None:
        if self.pending:
            self.pending_began = min(self.pending_began, self.began)  # the shared pass is part of the step
        super()._look()

    def end(self) -> None:
        """The weights of a run that is over, whole on the disk."""
        with self.signals.hold():
            self._save("checkpoint_final")
            assert self.record is not None
            self.record.remove_old()

    def results(self) -> Result:
        """Samples and result of a run whose weights are saved; a signal cuts the samples short."""
        assert self.record is not None and self.horizon.over is not None
        self.record.samples(self.learner, self.s.step, lambda: self.signals.number is not None)
        number, self.signals.number = self.signals.number, None
        result = self._finish(*self.horizon.over)
        self.signals.number = number
        return result

    def interrupted(self) -> Result:
        """See `Run._interrupted`."""
        return self._interrupted()

    def diverged(self, why: str) -> Result:
        """Write that the run diverged."""
        return self._finish("diverged", why)

    def close(self) -> None:
        """Close files and thread."""
        if self.batches is not None:
            self.batches.close()
        if self.record is not None:
            self.record.close()
