"""Whether a step's update is taken, decided on the device: nothing here waits for it.

In: loss and gradient norm of a step as 0-D tensors. Out: a 0-D bool tensor that the optimizer obeys. Called by
`learner`.

A host that looked at every loss before it updates would stop the device at every step. So the decision is a tensor, and
the first fatal step switches all later ones off: whenever the host looks, it finds the weights from before that step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bytekiln.errors import FormatError

FIRST_SCALE, SCALE_GROWTH_STEPS = 2.0**16, 2000
"""Loss scaling of fp16 as in Micikevicius et al. 2018: halved after an overflow, doubled after so many good steps."""
SPIKE_MEMORY, SPIKE_WARMUP_STEPS = 0.98, 50
"""Decay of the running mean and variance of the loss, and losses seen before any counts as a spike."""


class Guard:
    """The state behind the decision, all of it 0-D tensors."""

    def __init__(self, device: torch.device, *, spike_sigma: float | None = None, scaled: bool = False) -> None:
        """Nothing seen yet.

        Args:
            device: where the losses are.
            spike_sigma: leave out updates whose loss lies so many standard deviations above its mean; None: none.
            scaled: multiply the loss by a scale that keeps fp16 gradients away from zero; an overflow then is no
                fault of the run while the scale can still fall.
        """
        self.spike_sigma, self.scaled = spike_sigma, scaled
        self.alive = torch.ones((), dtype=torch.bool, device=device)
        self.scale = torch.full((), FIRST_SCALE if scaled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.mean = torch.zeros((), device=device)
        self.variance = torch.zeros((), device=device)
        self.seen = torch.zeros((), device=device)

    def decide(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Take notice of a step; True: its update is taken.

        Args:
            loss: mean loss of the step, unscaled.
            norm: norm of its gradient, unscaled.
        """
        finite = loss.isfinite() & norm.isfinite()
        fatal = ~finite & (self.scale <= 1.0)
        self.alive = self.alive & ~fatal
        take = self.alive & finite
        if self.scaled:
            self._move_scale(finite)
        if self.spike_sigma is not None:
            take = take & ~self._spike(loss, finite)
        return take

    def _move_scale(self, finite: Tensor) -> None:
        good = torch.where(finite, self.good_steps + 1, torch.zeros_like(self.good_steps))
        grow = good >= SCALE_GROWTH_STEPS
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp(min=1.0)
        self.good_steps = torch.where(grow, torch.zeros_like(good), good)

    def _spike(self, loss: Tensor, finite: Tensor) -> Tensor:
        """Also moves the running mean. A spike enters it cut to the limit, so that a new level is accepted in time."""
        assert self.spike_sigma is not None
        started = self.seen >= SPIKE_WARMUP_STEPS
        limit = self.mean + self.spike_sigma * self.variance.sqrt()
        spike = finite & started & (loss > limit)
        known = torch.where(spike, limit, loss)
        keep = torch.where(self.seen < 1, 0.0, torch.clamp(self.seen / (self.seen + 1), max=SPIKE_MEMORY))
        away = known - self.mean
        mean = self.mean + (1 - keep) * away
        variance = keep * (self.variance + (1 - keep) * away * away)
        self.mean = torch.where(finite, mean, self.mean)
        self.variance = torch.where(finite, variance, self.variance)
        self.seen = torch.where(finite, self.seen + 1, self.seen)
        return spike

    _SPIKES, _SCALE = ("mean", "variance", "seen"), ("scale", "good_steps")

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, as `guard/NAME`; the scale only where there is one."""
        return {f"guard/{n}": getattr(self, n) for n in (*self._SPIKES, *(self._SCALE if self.scaled else ()))}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Put back what `state_tensors` gave. A run that changes to fp16 starts with the first scale.

        Raises:
            FormatError: a tensor is missing; the message begins with `where`.
        """
        stored = self.scaled and "guard/scale" in tensors
        for name in (*self._SPIKES, *(self._SCALE if stored else ())):
            found = tensors.get(f"guard/{name}")
            if found is None or found.ndim:
                raise FormatError(f"{where}: found nothing for guard/{name}; expected a number")
            setattr(self, name, found.to(self.alive.device).clone())
