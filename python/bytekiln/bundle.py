"""Parameters that one rule moves together, seen as one flat vector. The floor under `muon` and `optim`.

In: named parameters, plain or sharded by FSDP2. Out: their gradients and weights as one vector each, and the one
place where weights move. A dozen kernels an update instead of a dozen a parameter: at small sizes launching them is
what an optimizer costs. The copies cost one pass over the gradients.

`take` is everywhere the 0-D bool tensor of `Optimizer.step`. Where it is False nothing may change by a bit, even if
gradients are NaN, and nobody may wait to learn its value. Multiplying by it does neither (0 · NaN is NaN, and
-0.0 + 0.0 is 0.0), so what is kept is chosen by `torch.where`, and weights lose a chosen difference: w - 0.0 is w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Rate = float | Tensor
"""A learning rate: a number, or a 0-D tensor where a compiled step would be compiled again for every number."""


class Slot(NamedTuple):
    """A piece of an optimizer's memory that is stored by name."""

    key: str
    live: Tensor
    """The memory itself: this process's shard of it, if `like` is sharded."""
    like: Tensor | None
    """The parameter whose sharding it follows; None: every process holds all of it."""


def local(t: Tensor) -> Tensor:
    """This process's shard of a tensor; a plain tensor is its own."""
    shard: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return shard


def whole(shard: Tensor, like: Tensor | None) -> Tensor:
    """The tensor that `shard` belongs to, sharded as `like` is; all processes must call it."""
    if not hasattr(like, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    sharded = DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def share(full: Tensor, like: Tensor | None) -> Tensor:
    """The opposite of `whole`: cut out this process's shard; nothing is sent."""
    if not hasattr(like, "to_local"):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    everywhere = DTensor.from_local(full, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def put(old: Tensor, new: Tensor, take: Tensor | None) -> None:
    """`old` becomes `new`, where `take` says so."""
    if take is None:
        old.copy_(new)
    else:
        torch.where(take, new, old, out=old)


class Bundle:
    """Named parameters of one type and device."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Args:
        named: at least one parameter; all of one type on one device.
        """
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        assert len({(p.dtype, p.device) for p in self.parameters}) == 1
        self.sharded = any(hasattr(p, "to_local") for p in self.parameters)
        self._shapes = [local(p).shape for p in self.parameters]
        self._sizes = [shape.numel() for shape in self._shapes]

    def weights(self) -> list[Tensor]:
        """The parameters themselves, without the history of autograd."""
        return [local(p.detach()) for p in self.parameters]

    def gradients(self) -> list[Tensor]:
        """Their gradients; every one must have been computed."""
        found = []
        for name, p in zip(self.names, self.parameters, strict=True):
            assert p.grad is not None, f"{name} has no gradient"
            found.append(local(p.grad))
        return found

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of one tensor a parameter as one vector."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def views(self, flat: Tensor) -> list[Tensor]:
        """The vector's parts in the parameters' shapes, sharing its memory."""
        parts = torch.split_with_sizes(flat, self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def zeros(self) -> Tensor:
        """A vector of zeros."""
        return torch.zeros(sum(self._sizes), dtype=self.parameters[0].dtype, device=self.parameters[0].device)

    def slots(self, name: str, flat: Tensor) -> list[Slot]:
        """The vector as memory to store, `name/PARAMETER` each."""
        return [
            Slot(f"{name}/{n}", part, p)
            for n, part, p in zip(self.names, self.views(flat), self.parameters, strict=True)
        ]

    def descend(
        self,
        update: Tensor,
        rate: Rate,
        decay: Rate,
        *,
        cautious: bool,
        take: Tensor | None,
    ) -> None:
        """weights ← weights - decay · weights - rate · update (decoupled decay, Loshchilov and Hutter 2019).

        Args:
            update: flat.
            rate: of the update.
            decay: share that each weight loses; 0.0: none.
            cautious: decay only where update · weight ≥ 0 (Chen et al. 2025, Cautious Weight Decay).
            take: see the module.
        """
        weights = self.weights()
        decays = not (isinstance(decay, float) and decay == 0.0)
        if decays and not cautious:
            kept = 1 - decay
            torch._foreach_mul_(weights, kept if take is None else torch.where(take, kept, 1.0))
        difference = update * rate
        if decays and cautious:
            difference += cautious_decay(update, self.flat(weights), decay)
        if take is not None:
            difference = torch.where(take, difference, 0.0)
        torch._foreach_sub_(weights, self.views(difference))


def cautious_decay(update: Tensor, weights: Tensor, decay: Rate) -> Tensor:
    """What cautious decay takes from the weights: their share `decay` where update · weight ≥ 0."""
    return torch.where(update * weights >= 0, weights * decay, 0.0)
