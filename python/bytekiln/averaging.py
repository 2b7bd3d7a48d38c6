"""Averages of the weights over training: exponential, or the plain mean of the run's tail. Called by the loop.

In: a model after each step. Out: other weights to evaluate and sample with. `take` as in `optim`: everything is
decided on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bytekiln.bundle import local, put, share, whole
from bytekiln.config import OptimizerConfig
from bytekiln.errors import FormatError

_ROUNDING = 1e-9
"""Progress is a quotient: 0.7 of a run may be a hair below 1 - 0.3."""


class Averaging:
    """A second set of weights. Buffers are not averaged; a tied parameter counts once."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        """Nothing averaged yet.

        Args:
            model: whose weights are followed.
            config: `averaging` (ema or tail), `ema_decay`, `tail_fraction`.
        """
        self._named = list(model.named_parameters())
        self._config = config
        self._means = [local(p.detach()).clone() for _, p in self._named]
        self._count = torch.zeros((), device=self._named[0][1].device)
        self._begun = False
        self._kept: list[Tensor] | None = None
        """The trained weights, while the average is in their place."""

    @torch.no_grad()
    def update(self, progress: float, take: Tensor | None = None) -> None:
        """Take in the weights after a step.

        The first weights are taken whole; then mean ← mean + (weights - mean)·(1 - ema_decay), or ·1/n in the tail.

        Args:
            progress: share of the run that is behind. The tail begins at 1 - tail_fraction. Where a resume moves the
                end away, the share falls back before it: what was averaged is no tail any more, and is forgotten.
            take: whether the step moved the weights; if not, the average stays as it is to the bit.
        """
        c = self._config
        assert self._kept is None
        if c.averaging == "tail" and progress + _ROUNDING < 1 - c.tail_fraction:
            if self._begun:
                self._begun = False
                self._count.zero_()
            return
        first = self._count == 0
        self._count += 1 if take is None else take
        weight = 1 / self._count.clamp(min=1)
        if c.averaging == "ema":
            weight = torch.where(self._count <= 1, 1.0, 1 - c.ema_decay)
        # A left-out step at the tail's start: there is no mean yet to keep, so it is the weights as they are.
        moves = None if take is None else take | first
        for mean, (_, p) in zip(self._means, self._named, strict=True):
            put(mean, mean.lerp(local(p.detach()), weight), moves)
        self._begun = True

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The average is in the model inside the `with`, the weights again after it, whatever happens in it.

        Before anything was averaged (a tail that has not begun) the weights are their own average. Costs a copy of
        the weights for as long as it lasts. If a signal's exception breaks off the copying itself, `restore` finishes
        it; so one inside another is not told from one that was broken off, and gets the weights back too early.
        """
        self.restore()
        if not self._begun:
            yield
            return
        kept = [local(p.detach()).clone() for _, p in self._named]
        try:
            self._kept = kept
            self._copy_in(self._means)
            yield
        finally:
            if self._kept is kept:  # else a `restore` came first, and by now these may be old weights
                self.restore()

    def restore(self) -> None:
        """Put the trained weights back where a `swapped` that was broken off left others; else do nothing.

        May itself be broken off and called again. Called before an interrupted run is saved.
        """
        if self._kept is not None:
            self._copy_in(self._kept)
            self._kept = None

    @torch.no_grad()
    def _copy_in(self, tensors: list[Tensor]) -> None:
        for (_, p), tensor in zip(self._named, tensors, strict=True):
            local(p.detach()).copy_(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """`average_count`, and `average/NAME` once there is an average; live, so write them before the next step."""
        found = {"average_count": self._count}
        if self._begun:
            found |= {f"average/{n}": whole(mean, p) for mean, (n, p) in zip(self._means, self._named, strict=True)}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Put back what `tensors` gave; other names beside it are ignored.

        Raises:
            FormatError: a tensor is missing or has another shape; the message begins with `where`.
        """
        count = tensors.get("average_count")
        if count is None or count.ndim:
            raise FormatError(f"{where}: found nothing for average_count; expected a number")
        begun = float(count) > 0 or any(name.startswith("average/") for name in tensors)
        for n, p in self._named if begun else ():
            t = tensors.get(f"average/{n}")
            if t is None or t.shape != p.shape:
                found = "nothing" if t is None else f"shape {tuple(t.shape)}"
                raise FormatError(f"{where}: found {found} for average/{n}; expected shape {tuple(p.shape)}")
        if begun:
            for mean, (n, p) in zip(self._means, self._named, strict=True):
                mean.copy_(share(tensors[f"average/{n}"].to(mean.device), p))
        self._count.copy_(count)
        self._begun = begun


def make_averaging(model: nn.Module, config: OptimizerConfig) -> Averaging | None:
    """The average that `averaging` asks for, if any."""
    return None if config.averaging == "none" else Averaging(model, config)
