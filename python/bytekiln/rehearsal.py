"""How long a run's steps take here: a few are taken, on random tokens, by the run's own learner.

In: a complete config whose step fits into this machine. Out: seconds. Called by `plan`. No file of the run is read, and
none is written; torch's generator for the CPU is where it was afterwards.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import NamedTuple

import torch

from bytekiln import _core
from bytekiln.batch import Batch
from bytekiln.config import RunConfig
from bytekiln.learner import Learner, read
from bytekiln.objective import has_documents
from bytekiln.prefetch import Prefetcher
from bytekiln.prepare import keep_freed_memory
from bytekiln.ranks import Ranks

FEWEST, SECONDS, MOST_SECONDS = 3, 0.5, 3.0
"""Steps that are timed, and the time after which no more are begun; after the last one also if they are fewer."""


class Timed(NamedTuple):
    """Medians over the steps that were taken."""

    micro_step_s: float
    """Batch, forward and backward of one micro-step."""
    update_s: float
    """Clipping, optimizer and average."""


class RandomTokens:
    """A source of batches (`prefetch.Source`) of random ids, each window one document."""

    def __init__(self, config: RunConfig) -> None:
        """Ids of the config's vocabulary, windows of its length."""
        self._vocab_size, self._length = config.model.vocab_size, config.model.context_length
        self._documents = has_documents(config)

    def batch(self, step: int, first: int, place: int, count: int) -> Batch:
        """The same for the same step; where in the run it stands changes nothing."""
        draw = torch.Generator().manual_seed(step)
        ids_BxT1 = torch.randint(self._vocab_size, (count, self._length + 1), generator=draw)
        documents_BxT = torch.zeros(count, self._length, dtype=torch.int32) if self._documents else None
        inputs_BxT, targets_BxT = (t.contiguous() for t in (ids_BxT1[:, :-1], ids_BxT1[:, 1:]))
        return Batch(inputs_BxT, targets_BxT, documents_BxT, targets_BxT.numel())


def rehearse(config: RunConfig, device: torch.device, batch_size: int) -> Timed:
    """Take steps of one micro-step of `batch_size` windows, never compiled, and time them.

    The first one is not timed, unless it is so long that there is no other.

    Raises:
        ConfigError: parts of the config do not go together on this device.
        MemoryError: the step does not fit.
    """
    _core.simd_level()  # said now if the environment asks for one that is not here
    if device.type == "cpu":
        keep_freed_memory()  # as in the run
    config = config.with_(batch_size=batch_size, grad_accum_steps=1, compile=False)
    timed: list[Timed] = []
    with torch.random.fork_rng(devices=[]), Prefetcher(RandomTokens(config), 0) as batches:
        try:
            learner = Learner(config, device, Ranks())
            began = time.perf_counter()
            for step in itertools.count():
                timed.append(_step(learner, batches, step))
                passed = time.perf_counter() - began
                if passed > MOST_SECONDS or (step >= FEWEST and passed > SECONDS):
                    break
        except RuntimeError as exc:
            if not isinstance(exc, torch.OutOfMemoryError) and "allocate memory" not in str(exc):
                raise
            raise MemoryError(str(exc)) from None
    counted = timed[1:] or timed
    return Timed(*(statistics.median(times) for times in zip(*counted, strict=True)))


def _step(learner: Learner, batches: Prefetcher, step: int) -> Timed:
    began = time.perf_counter()
    found = learner.gradients(batches, step, 0, 1)
    between = time.perf_counter()
    windows = (0, learner.config.training.batch_size)
    read([learner.update(found, learner.clipped_norm(), step=step, windows=windows, lr=0.0, share=0.0)])
    return Timed(between - began, time.perf_counter() - between)
