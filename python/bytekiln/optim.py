"""The optimizer: which rule moves which weights at which rate; clipping; its memory as named tensors.

In: a model and its config. Out: an `Optimizer`; the loop steps it, `checkpoint` stores its `state_tensors`.

| optimizer | matrices of the blocks | everything else |
|---|---|---|
| adamw, lion, sgd | the rule | the rule |
| muon | Muon | AdamW |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bytekiln.bundle import Bundle, Slot, cautious_decay, put, share, whole
from bytekiln.config import OptimizerConfig
from bytekiln.errors import FormatError
from bytekiln.muon import Muon

FUSED = ("cpu", "cuda")
"""Devices whose AdamW kernel leaves everything alone on demand (`found_inf`)."""


def kind_of(name: str, p: Tensor) -> str:
    """The group of a parameter, by its name: scalar, embedding, head, gate or matrix.

    Routers and gates are matrices of a few rows that choose rather than transform: no rule for matrices fits them,
    so they are never Muon's and go at the rate of the scalars.
    """
    if p.ndim < 2 or name.endswith("lambdas"):
        return "scalar"
    if name.endswith("embeddings.weight"):
        return "embedding"
    if name.startswith("lm_head."):
        return "head"
    return "gate" if name.endswith(("router.weight", "value_gate.weight")) else "matrix"


@dataclass(frozen=True)
class Group:
    """Parameters with the same rate and the same decay."""

    name: str
    bundle: Bundle
    lr_scale: float
    weight_decay: float


def groups_of(named: Sequence[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[Group]:
    """The parameters by kind. Decay pulls on matrices, on embeddings and head if `decay_embeddings` says so."""
    scales = {
        "matrix": 1.0,
        "embedding": config.embedding_lr_scale,
        "head": config.head_lr_scale,
        "gate": config.scalar_lr_scale,
        "scalar": config.scalar_lr_scale,
    }
    decays = {"matrix", "gate", *(("embedding", "head") if config.decay_embeddings else ())}
    found = []
    for kind, scale in scales.items():
        members = [(n, p) for n, p in named if kind_of(n, p) == kind]
        if members:
            found.append(Group(kind, Bundle(members), scale, config.weight_decay if kind in decays else 0.0))
    return found


SHARED_FROM = 150_000
"""Numbers of a tensor, on the average, from which on it is worth to share the work on it: waking a thread takes 50 µs.
Torch shares from 32,768 on."""


class Rule(Protocol):
    """An update rule with its memory."""

    def step(self, lr: float, take: Tensor | None) -> None:
        """Move its weights; `take` as in `Optimizer.step`."""

    def slots(self) -> list[Slot]:
        """Its memory."""


class AdamW:
    """AdamW (Loshchilov and Hutter 2019)."""

    def __init__(self, groups: Sequence[Group], config: OptimizerConfig, *, fused: bool) -> None:
        """Args:
        groups: what it moves.
        config: beta1, beta2, eps, cautious decay.
        fused: one kernel for a group (torch's own operator, which `torch.optim.AdamW` calls behind some
            bookkeeping); else plain tensors, for other devices and as the specification.
        """
        self.groups, self.config, self.fused = groups, config, fused
        self.first = [[torch.zeros_like(w) for w in g.bundle.weights()] for g in groups]
        self.second = [[torch.zeros_like(w) for w in g.bundle.weights()] for g in groups]
        self.steps = [torch.zeros((), device=g.bundle.parameters[0].device) for g in groups]

    def step(self, lr: float, take: Tensor | None) -> None:
        """See `Rule`."""
        with _threads_that_pay([p for g in self.groups for p in g.bundle.parameters]):
            self._step(lr, take)

    def _step(self, lr: float, take: Tensor | None) -> None:
        c = self.config
        left_out = None if take is None else take.logical_not().to(torch.float32)
        for g, first, second, steps in zip(self.groups, self.first, self.second, self.steps, strict=True):
            weights, gradients = g.bundle.weights(), g.bundle.gradients()
            rate = lr * g.lr_scale
            cautious = c.cautious_weight_decay and g.weight_decay > 0
            before = g.bundle.flat(weights) if cautious else None
            decay = 0.0 if cautious else g.weight_decay
            steps += 1 if take is None else take
            if self.fused:
                torch._fused_adamw_(
                    weights, gradients, first, second, [], [steps] * len(weights),
                    lr=rate, beta1=c.beta1, beta2=c.beta2, weight_decay=decay, eps=c.eps,
                    amsgrad=False, maximize=False, found_inf=left_out,
                )  # fmt: skip
            else:
                self._plain(weights, gradients, first, second, steps, rate, decay, take)
            if before is not None:
                # The update has the sign of the first moment; the weights of before the step decay, as in AdamW.
                pull = cautious_decay(g.bundle.flat(first), before, rate * g.weight_decay)
                pull = pull if take is None else torch.where(take, pull, 0.0)
                torch._foreach_sub_(weights, g.bundle.views(pull))

    def _plain(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        steps: Tensor,
        rate: float,
        decay: float,
        take: Tensor | None,
    ) -> None:
        c = self.config
        # 1 - beta^t by expm1: fp32 has no digits to lose in it, and some devices have no fp64
        unbias1 = -torch.expm1(steps * math.log(c.beta1)) if c.beta1 else torch.ones_like(steps)
        unbias2 = -torch.expm1(steps * math.log(c.beta2)) if c.beta2 else torch.ones_like(steps)
        for w, g, m, v in zip(weights, gradients, first, second, strict=True):
            mean = m.lerp(g, 1 - c.beta1)
            square = v * c.beta2 + (1 - c.beta2) * g * g
            update = mean / unbias1 / ((square / unbias2).sqrt() + c.eps)
            put(w, w * (1 - rate * decay) - rate * update, take)
            put(m, mean, take)
            put(v, square, take)

    def slots(self) -> list[Slot]:
        """`exp_avg/NAME`, `exp_avg_sq/NAME` and the updates taken, `step/GROUP`."""
        found = []
        for g, first, second, steps in zip(self.groups, self.first, self.second, self.steps, strict=True):
            for n, p, m, v in zip(g.bundle.names, g.bundle.parameters, first, second, strict=True):
                found += [Slot(f"exp_avg/{n}", m, p), Slot(f"exp_avg_sq/{n}", v, p)]
            found.append(Slot(f"step/{g.name}", steps, None))
        return found


class Lion:
    """Lion (Chen et al. 2023): the sign of a mean of gradients; the mean it keeps is a slower one."""

    def __init__(self, groups: Sequence[Group], config: OptimizerConfig) -> None:
        """Args:
        groups: what it moves.
        config: beta1 of the step, beta2 of the memory, cautious decay.
        """
        self.groups, self.config = groups, config
        self.means = [g.bundle.zeros() for g in groups]

    def step(self, lr: float, take: Tensor | None) -> None:
        """See `Rule`."""
        c = self.config
        for group, mean in zip(self.groups, self.means, strict=True):
            g = group.bundle.flat(group.bundle.gradients())
            update = mean.lerp(g, 1 - c.beta1).sign_()
            put(mean, mean.lerp(g, 1 - c.beta2), take)
            rate = lr * group.lr_scale
            decay = rate * group.weight_decay
            group.bundle.descend(update, rate, decay, cautious=c.cautious_weight_decay, take=take)

    def slots(self) -> list[Slot]:
        """`momentum/NAME`."""
        return [s for g, mean in zip(self.groups, self.means, strict=True) for s in g.bundle.slots("momentum", mean)]


class SGD:
    """Gradient descent with momentum as torch has it (v ← momentum · v + g), the decay decoupled."""

    def __init__(self, groups: Sequence[Group], config: OptimizerConfig) -> None:
        """Args:
        groups: what it moves.
        config: momentum, nesterov, cautious decay.
        """
        self.groups, self.config = groups, config
        self.velocities = [g.bundle.zeros() for g in groups]

    def step(self, lr: float, take: Tensor | None) -> None:
        """See `Rule`."""
        c = self.config
        for group, velocity in zip(self.groups, self.velocities, strict=True):
            g = group.bundle.flat(group.bundle.gradients())
            moved = velocity * c.momentum + g
            put(velocity, moved, take)
            update = g + c.momentum * moved if c.nesterov else moved
            rate = lr * group.lr_scale
            decay = rate * group.weight_decay
            group.bundle.descend(update, rate, decay, cautious=c.cautious_weight_decay, take=take)

    def slots(self) -> list[Slot]:
        """`momentum/NAME`."""
        return [s for g, v in zip(self.groups, self.velocities, strict=True) for s in g.bundle.slots("momentum", v)]


class Optimizer:
    """All rules of a model together."""

    def __init__(self, model: nn.Module, rules: Sequence[Rule]) -> None:
        """Args:
        model: whose weights they move.
        rules: no two with the same parameter.
        """
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        """All that is trained, listed once: a walk through the modules takes half a per cent of a small step."""
        self.rules = rules
        self._stepped = False

    @torch.no_grad()
    def step(self, lr: float, take: Tensor | None = None) -> None:
        """Move the weights by their gradients.

        Args:
            lr: rate of this step; each group goes at its own multiple of it.
            take: 0-D bool tensor on the weights' device; where it is False, weights and memory stay as they are to
                the bit, whatever the gradients are. The host does not learn which it was. None: moves.
        """
        for rule in self.rules:
            rule.step(lr, take)
        self._stepped = True

    @torch.no_grad()
    def try_out(self) -> None:
        """Take an update that is left out: what is compiled on the first one is compiled, and nothing has moved."""
        take = torch.zeros((), dtype=torch.bool, device=self.parameters[0].device)
        for rule in self.rules:
            rule.step(0.0, take)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The memory by name, as each rule's `slots` says; empty before the first step.

        The tensors are the live ones: write them out before the next step. Sharded ones are gathered, so all
        processes must call it.
        """
        if not self._stepped:
            return {}
        return {s.key: whole(s.live, s.like) for rule in self.rules for s in rule.slots()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Put back what `state_tensors` gave, other names beside it ignored; nothing at all: before the first step.

        Raises:
            FormatError: a tensor is missing or has another shape; the message begins with `where`.
        """
        if not tensors:
            assert not self._stepped
            return
        slots = [s for rule in self.rules for s in rule.slots()]
        for s in slots:  # all are checked before any is written
            expected = tuple(s.live.shape if s.like is None else s.like.shape)
            t = tensors.get(s.key)
            if t is None or tuple(t.shape) != expected:
                found = "nothing" if t is None else f"shape {tuple(t.shape)}"
                raise FormatError(f"{where}: found {found} for {s.key}; expected shape {expected}")
        for s in slots:
            s.live.copy_(share(tensors[s.key].to(s.live.device), s.like))
        self._stepped = True


def make_optimizer(model: nn.Module, config: OptimizerConfig, *, compiled: bool = False) -> Optimizer:
    """The optimizer of a run.

    Args:
        model: parameters that want no gradient are left alone.
        config: rule, rates, decay.
        compiled: compile Muon's step (CUDA).
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    fused = all(p.device.type in FUSED for _, p in named)
    if config.optimizer == "adamw":
        return Optimizer(model, [AdamW(groups_of(named, config), config, fused=fused)])
    if config.optimizer == "lion":
        return Optimizer(model, [Lion(groups_of(named, config), config)])
    if config.optimizer == "sgd":
        return Optimizer(model, [SGD(groups_of(named, config), config)])
    matrices = [(n, p) for n, p in named if kind_of(n, p) == "matrix"]
    rest = [(n, p) for n, p in named if kind_of(n, p) != "matrix"]
    rules: list[Rule] = [Muon(matrices, config, compiled=compiled)] if matrices else []
    if rest:
        rules.append(AdamW(groups_of(rest, config), config, fused=fused))
    return Optimizer(model, rules)


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients of `Optimizer.parameters` so that their norm is at most `largest` (0: leave them).

    Returns the norm before that.

    The norm is a 0-D tensor on the device; nothing waits for it.
    """
    with _threads_that_pay(parameters):
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if largest:
            nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


@contextmanager
def _threads_that_pay(parameters: Sequence[Tensor]) -> Iterator[None]:
    """In here torch has one thread where the tensors are small: an operation on each would wake the others in vain.

    For 4 layers × 128 AdamW takes 0.7 ms on one thread and 2.5 on two, clipping 0.6 and 1.1. Torch has one such number
    for the whole process: whoever first calls it from another thread of Python just then has one thread, too.
    """
    threads = torch.get_num_threads()
    numbers = sum(p.numel() for p in parameters)
    alone = threads > 1 and 0 < numbers < SHARED_FROM * len(parameters) and parameters[0].is_cpu
    if alone:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if alone:
            torch.set_num_threads(threads)
