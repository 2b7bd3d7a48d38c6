"""The processes of one run: alone, or several that `torchrun` started.

In: torchrun's environment variables. Out: sums and agreements over all processes, and a model that is copied (DDP) or
sharded (FSDP2) among them. Called by `learner` and `loop`; with one process everything here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from bytekiln.errors import ConfigError

TIMEOUT = timedelta(minutes=30)
"""How long one process waits for another: longer than the first compilation of a large model."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: Any = None
    """A gloo group for words between hosts: it does not wait for the GPU."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def share_of(self, micro_steps: int) -> range:
        """This process's micro-steps among those of an optimizer step: which windows are read depends on no rank.

        Raises:
            ConfigError: they cannot be shared out evenly.
        """
        if micro_steps % self.world:
            fits = -(-micro_steps // self.world) * self.world
            raise ConfigError(
                f"grad_accum_steps: found {micro_steps} micro-steps for {self.world} processes; expected a multiple "
                f"of {self.world}, such as {fits}"
            )
        return range(self.rank, micro_steps, self.world)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place, on the tensor's device."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def total_count(self, count: int) -> int:
        """Sum of a host's number over all processes."""
        if self.world == 1:
            return count
        told = torch.tensor(count, dtype=torch.int64)
        torch.distributed.all_reduce(told, group=self.control)
        return int(told)

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says yes."""
        return bool(self.total_count(int(flag)))

    def firsts(self, value: float) -> float:
        """The first process's value, for all: clocks differ, decisions must not."""
        if self.world == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        torch.distributed.broadcast(told, 0, group=self.control)
        return float(told)

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            torch.distributed.barrier(group=self.control)


@contextmanager
def processes(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did; leave them at the end.

    Args:
        device: the config's; cuda takes NCCL, everything else gloo.

    Raises:
        ConfigError: torchrun's variables are incomplete.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        yield Ranks()
        return
    missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE: found {world} without {', '.join(missing)}; expected torchrun to set them all")
    rank, local = _number("RANK", 0), _number("LOCAL_RANK", 0)
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(rank, world, local, torch.distributed.new_group(backend="gloo", timeout=TIMEOUT))
    finally:
        torch.distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    found = os.environ.get(name, str(default))
    if not found.isdecimal():
        raise ConfigError(f"{name}: found {found!r} in the environment; expected a number, as torchrun sets it")
    return int(found)


def is_first() -> bool:
    """Whether this process speaks and writes, told by torchrun's variables alone."""
    return _number("WORLD_SIZE", 1) == 1 or _number("RANK", 0) == 0


def shared(objective: nn.Module, model: nn.Module, ranks: Ranks, kind: str) -> nn.Module:
    """The objective as all processes run it: each with a copy of the model (ddp), or with a shard of it (fsdp).

    Gradients come out averaged over the processes, so that the caller multiplies its loss by their number.
    """
    if ranks.world == 1:
        return objective
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for layer in model.get_submodule("layers").children():
            fully_shard(layer)
        fully_shard(objective)  # the rest: embeddings, last norm, head; its forward gathers them
        register_fsdp_forward_method(objective, "scores")
        return objective
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(objective, broadcast_buffers=False)


@contextmanager
def syncing(objective: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients behind the `last` micro-step only."""
    wrapped: Any = objective  # told apart by what they can: importing either class takes seconds
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(last)
    with nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
        yield


def reshard(objective: nn.Module) -> None:
    """Give back what a forward without a backward has gathered of a sharded model: what is trained is the shards.

    Left gathered, parameters have no gradients to clip, and the next forward would read the weights of before an update
    or, behind an evaluation of averaged weights, those. Nothing to do for a model in one piece.
    """
    for module in objective.modules():
        sharded: Any = module  # told apart by what it can, as in `syncing`
        if hasattr(sharded, "reshard"):
            sharded.reshard()


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors put together, on every process; whole ones as they are."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def like(whole_tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor sharded as `pattern` is; itself where that is whole."""
    if not hasattr(pattern, "full_tensor"):
        return whole_tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = pattern
    return distribute_tensor(whole_tensor, sharded.device_mesh, sharded.placements)
