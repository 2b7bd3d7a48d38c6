"""The learning rate as a pure function of the step. Called by `train`; `report` draws what it gave."""

from __future__ import annotations

import math

from bytekiln.config import RunConfig


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up, then cosine to `min_lr` (Loshchilov and Hutter 2016), then `min_lr`.

    Args:
        step: optimizer steps done before this one, so 0 for the first.
        config: `lr`, `min_lr`, `warmup_steps`, `warmup_rule`, `decay_lr` and the end of the decay.

    Returns:
        The rate of this step. The course's warm-up is lr·t/T, so that the very first step moves nothing;
        nanoGPT's is lr·(t+1)/(T+1). Without decay the rate stays at `lr` after the warm-up.

    >>> c = RunConfig().with_(lr=1.0, warmup_steps=4, max_steps=10)
    >>> [round(learning_rate(t, c), 3) for t in (0, 1, 4, 7, 10, 99)]
    [0.0, 0.25, 1.0, 0.55, 0.1, 0.1]
    """
    o = config.optimizer
    if step < o.warmup_steps:
        nanogpt = o.warmup_rule == "nanogpt"
        return o.lr * ((step + 1) / (o.warmup_steps + 1) if nanogpt else step / o.warmup_steps)
    if not o.decay_lr:
        return o.lr
    end = config.decay_end
    if step >= end:
        return o.floor_lr
    progress = (step - o.warmup_steps) / (end - o.warmup_steps)
    return o.floor_lr + (o.lr - o.floor_lr) * 0.5 * (1 + math.cos(math.pi * progress))
