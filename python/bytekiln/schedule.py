"""The learning rate as a pure function of progress. Called by `loop` and `horizon`; `report` draws what it gave."""

from __future__ import annotations

import math
from typing import NamedTuple

from bytekiln.config import UNLIMITED_STEPS, RunConfig
from bytekiln.training_config import stages_of

SHORTEST_WARMUP = 0.01
"""Share of the run at which an inverse square root begins to count where there is no warm-up to begin at."""


class Progress(NamedTuple):
    """How far a run is, before the step in question."""

    step: int
    """Optimizer steps done, so 0 for the first."""
    max_steps: int
    tokens: int = 0
    token_budget: int = 0
    seconds: float = 0.0
    max_time: float = 0.0


def fraction(at: Progress, config: RunConfig) -> float:
    """The share of the run that is behind, in [0, 1], by what `progress` counts.

    With `auto` the run may have several limits and is over at the first: the greatest of their shares, which is 1 just
    there. `UNLIMITED_STEPS` are no limit.

    >>> fraction(Progress(step=3, max_steps=10), RunConfig())
    0.3
    """
    t, counted = config.training, config.optimizer.progress
    shares = []
    if counted == "tokens" or (counted == "auto" and t.token_budget):
        shares.append(at.tokens / at.token_budget)
    if counted == "seconds" or (counted == "auto" and t.max_time):
        shares.append(at.seconds / at.max_time)
    if counted == "steps" or (counted == "auto" and (at.max_steps < UNLIMITED_STEPS or not shares)):
        shares.append(at.step / at.max_steps)
    return min(max(0.0, *shares), 1.0)


def learning_rate(at: Progress, config: RunConfig) -> float:
    """Linear warm-up, then the schedule's fall to `floor_lr`, then `floor_lr`.

    Warm-up and decay are switches of their own: without `decay_lr` the rate stays at `lr` after the warm-up.

    Args:
        at: the state before this step.
        config: `lr`, `min_lr`, the warm-up, the schedule and what it counts.

    Returns:
        The rate of this step. The course's warm-up is lr·t/T, so that the very first step moves nothing; nanoGPT's
        is lr·(t+1)/(T+1); both count steps whatever the schedule counts. `fraction` is lr·f/F in the schedule's
        own progress.

    >>> c = RunConfig().with_(lr=1.0, warmup_steps=4, max_steps=10)
    >>> [round(learning_rate(Progress(t, 10), c), 3) for t in (0, 1, 4, 7, 10, 99)]
    [0.0, 0.25, 1.0, 0.55, 0.1, 0.1]
    """
    o = config.optimizer
    if o.warmup_rule == "fraction":
        behind = fraction(at, config)
        if behind < o.warmup_fraction:
            return o.lr * behind / o.warmup_fraction
    elif at.step < o.warmup_steps:
        nanogpt = o.warmup_rule == "nanogpt"
        return o.lr * ((at.step + 1) / (o.warmup_steps + 1) if nanogpt else at.step / o.warmup_steps)
    if not o.decay_lr or o.schedule == "constant":
        return o.lr
    position, share = _decay(at, config)
    if share >= 1:
        return o.floor_lr
    match o.schedule:
        case "cosine":  # Loshchilov and Hutter 2016
            height = 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            height = 1 - share
        case "trapezoid":  # Hu et al. 2024 (WSD); a warm-up that reaches into the fall shortens it
            height = 1 - min(share, max(0.0, (position - (1 - o.decay_fraction)) / o.decay_fraction))
        case "inverse_sqrt":
            height = _inverse_sqrt(share, _warmup_share(at, config))
    return min(o.lr, max(o.floor_lr, o.floor_lr + (o.lr - o.floor_lr) * height))


def batch_multiple(share: float, config: RunConfig) -> int:
    """By how much `batch_stages` multiplies the micro-steps once `share` of the run is behind.

    >>> c = RunConfig().with_(batch_stages="0.3:2 0.6:4")
    >>> [batch_multiple(x, c) for x in (0.0, 0.29, 0.3, 0.6, 1.0)]
    [1, 1, 2, 4, 4]
    """
    return [multiple for begin, multiple in stages_of(config.training.batch_stages) if begin <= share][-1]


def _end(at: Progress, config: RunConfig) -> int:
    return config.optimizer.decay_steps or at.max_steps


def _decay(at: Progress, config: RunConfig) -> tuple[float, float]:
    """(share of the way from the run's start to the decay's end, share of the way there from the warm-up's end).

    `decay_steps` moves the end only where steps are counted.

    A warm-up of W steps in a run that ends by tokens or seconds ends at a share that the run does not know later on.
    It is taken as W/t of the present share f, t being the present step: exactly right where every step counts the
    same, and else still continuous (0 at t = W, 1 at f = 1) and rising, because f·(1 - W/t) / (1 - f·W/t) rises in
    both f and t.
    """
    o = config.optimizer
    if config.progress == "steps":
        end = _end(at, config)
        start = o.warmup_fraction * at.max_steps if o.warmup_rule == "fraction" else o.warmup_steps
        if at.step >= end:
            return 1.0, 1.0
        return at.step / end, (at.step - start) / (end - start)
    f = fraction(at, config)
    if f >= 1:
        return 1.0, 1.0
    if o.warmup_rule == "fraction":
        return f, (f - o.warmup_fraction) / (1 - o.warmup_fraction)
    ratio = o.warmup_steps / max(at.step, 1)
    return f, f * (1 - ratio) / (1 - f * ratio)


def _warmup_share(at: Progress, config: RunConfig) -> float:
    o = config.optimizer
    if o.warmup_rule != "fraction":
        return o.warmup_steps / (_end(at, config) if config.progress == "steps" else at.max_steps)
    return o.warmup_fraction * at.max_steps / _end(at, config) if config.progress == "steps" else o.warmup_fraction


def _inverse_sqrt(share: float, warmup: float) -> float:
    """√(warm-up / progress) (Vaswani et al. 2017), stretched so that it ends at 0 instead of √(warm-up).

    A warm-up below `SHORTEST_WARMUP` counts as that: 1/√t from the first step on would spend the rate at once.
    """
    begin = min(max(warmup, SHORTEST_WARMUP), 0.99)
    last = math.sqrt(begin)
    return (math.sqrt(begin / (begin + (1 - begin) * share)) - last) / (1 - last)
