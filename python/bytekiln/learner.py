"""Everything of a run that is a tensor, and the step that moves it. Nothing in a step waits for the device.

In: a config, batches, the number of a step. Out: a `Taken`, whose numbers stay on the device until `read` fetches those
of several steps at once; and all tensors by name, for checkpoints. Called by `loop`.

Everything random is a pure function of (seed, step, micro-step): the windows, and the dropout masks, because torch's
generator is seeded anew for every micro-step. So neither the number of processes nor a resume changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bytekiln.averaging import make_averaging
from bytekiln.config import RunConfig
from bytekiln.data import Batch, Prefetcher, to_device
from bytekiln.errors import FormatError
from bytekiln.evaluate import Scores, evaluate
from bytekiln.guard import Guard
from bytekiln.objective import Objective
from bytekiln.optim import clip_gradients, make_optimizer
from bytekiln.prepare import Say, attention_of, compiled, graphs_compiled, make_model
from bytekiln.ranks import Ranks, like, reshard, shared, syncing, whole

RAW = "weights/"
"""Prefix of the weights that are trained, in checkpoints whose model is an average of them."""


@dataclass(frozen=True)
class Gradients:
    """What the micro-steps of a step gave; the gradient itself lies in the parameters."""

    loss: Tensor
    """0-D: mean over the real targets of all processes."""
    load_LxE: Tensor | None
    """Tokens that each expert worked on."""
    tokens: int
    """Real targets of all processes."""
    batches: list[Batch]
    """This process's micro-batches."""


@dataclass(frozen=True)
class Taken:
    """A step that was taken, or left out by the guard."""

    step: int
    """Number of the step, from 1."""
    lr: float
    windows: tuple[int, int]
    """First window of the step, and the one behind its last."""
    tokens: int
    """Real targets of this step."""
    told: Tensor
    """On the device: loss, gradient norm, 1 where the update was taken, 1 while the run is alive, load of experts."""


@dataclass(frozen=True)
class Numbers:
    """The same on the host."""

    loss: float
    grad_norm: float
    taken: bool
    alive: bool
    expert_load: float
    """Greatest load of an expert over the mean; 0 without experts."""


def read(steps: Sequence[Taken]) -> list[Numbers]:
    """Fetch what several steps tell, waiting for the device once."""
    if not steps:
        return []
    rows = torch.stack([t.told for t in steps]).tolist()
    return [Numbers(loss, norm, taken > 0, alive > 0, load) for loss, norm, taken, alive, load in rows]


class Learner:
    """Model, objective, optimizer, guard and average of a run, put together once."""

    def __init__(self, config: RunConfig, device: torch.device, ranks: Ranks) -> None:
        """Build and initialise; the config's seed decides the weights.

        Raises:
            ConfigError: parts of the config do not go together on this device.
            MemoryError: the model does not fit.
        """
        self.config, self.device, self.ranks = config, device, ranks
        t = config.training
        ranks.share_of(t.grad_accum_steps)
        torch.manual_seed(t.seed)
        self.model = make_model(config.model, device, attention_of(config, device))
        self.objective = Objective(self.model, config)
        self.parallel = shared(self.objective, self.model, ranks, t.parallel)
        self.loss: Callable[..., Any] = self.parallel
        self._on_gpu = t.compile is True and device.type == "cuda"
        self.optimizer = make_optimizer(self.model, config.optimizer, compiled=self._on_gpu)
        self.averaging = make_averaging(self.model, config.optimizer)
        self.guard = Guard(device, spike_sigma=t.spike_sigma if t.skip_spikes else None, scaled=t.precision == "fp16")
        self._graphs: int | None = None

    def compile(self, batch: Batch, notice: Say) -> None:
        """Compile the training loss, tried on a micro-batch of the run: its shapes and strides are the ones to come.

        `batch_stages` takes more micro-batches of the same shape, so that no stage compiles anything. On a GPU the
        optimizer's graph is made now, too, by an update that is left out: no step of the run is slower than another.

        Evaluation stays eager: its other shapes and modes would be compiled anew.
        """
        self.model.train()
        self.loss = compiled(self.parallel, to_device(batch, self.device), notice)
        if self.loss is not self.parallel and self._on_gpu:
            self.optimizer.try_out()
        self.optimizer.zero_grad()
        if self.loss is not self.parallel:
            self._graphs = graphs_compiled()

    @property
    def recompiles(self) -> int | None:
        """Graphs made since `compile`; None where nothing is compiled."""
        return None if self._graphs is None else graphs_compiled() - self._graphs

    # --- a step -----------------------------------------------------------------------------------------------

    def gradients(self, batches: Prefetcher, step: int, first: int, micro_steps: int) -> Gradients:
        """Add up the gradient of step `step` (from 0), which reads windows `first` and following.

        Until `update` this can be abandoned: no weight has moved.
        """
        t, ranks = self.config.training, self.ranks
        if not self.model.training:  # asked of the whole: to tell every module costs as much as a small layer
            self.model.train()
        mine = ranks.share_of(micro_steps)
        read = batches.get([(step, first, m * t.batch_size, t.batch_size) for m in mine])
        count = ranks.total_count(sum(b.count for b in read))
        total = torch.zeros((), device=self.device)
        load: Tensor | None = None
        for micro, batch in zip(mine, read, strict=True):
            _seed(self.device, micro_seed(t.seed, step, micro))
            inputs_BxT, targets_BxT, documents_BxT, _ = to_device(batch, self.device)
            with syncing(self.parallel, last=micro == mine[-1]):
                parts = self.loss(inputs_BxT, targets_BxT, documents_BxT)
                # Sums over this micro-step's targets, divided by the whole step's: the gradient of the large batch.
                (parts.total * (self.guard.scale * (ranks.world / max(count, 1)))).backward()
            total += parts.nll
            if parts.load_LxE.numel():
                load = parts.load_LxE if load is None else load + parts.load_LxE
        if load is not None:
            load = ranks.total(load)
        if self.guard.scaled:
            gradients = [p.grad for p in self.optimizer.parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / self.guard.scale)
        return Gradients(ranks.total(total) / max(count, 1), load, count, read)

    def clipped_norm(self) -> Tensor:
        """Clip the gradients; returns their norm before that."""
        norm = clip_gradients(self.optimizer.parameters, self.config.optimizer.grad_clip)
        return whole({"norm": norm})["norm"]

    def update(
        self, found: Gradients, norm: Tensor, *, step: int, windows: tuple[int, int], lr: float, share: float
    ) -> Taken:
        """Move the weights, if the guard agrees; from here on the step is done.

        Args:
            found: of `gradients`. norm: of `clipped_norm`.
            step: steps done before this one.
            windows: first window of the step, and the one behind its last.
            lr: learning rate of this step.
            share: share of the run that is behind, for the average.
        """
        take = self.guard.decide(found.loss, norm)
        self.optimizer.step(lr, take)
        self.optimizer.zero_grad()
        if self.averaging is not None:
            self.averaging.update(share, take)
        most = torch.zeros((), device=self.device)
        if found.load_LxE is not None:
            self.model.move_router_bias(found.load_LxE * take)
            most = (found.load_LxE.amax(dim=1) / found.load_LxE.mean(dim=1).clamp(min=1e-9)).amax()
        told = torch.stack([found.loss, norm.float(), take.float(), self.guard.alive.float(), most])
        return Taken(step + 1, lr, windows, found.tokens, told)

    # --- what is evaluated and saved --------------------------------------------------------------------------

    @contextmanager
    def shown_weights(self) -> Iterator[None]:
        """The weights that are evaluated, sampled and saved as the model: averaged, where the run averages.

        An interruption may come at any time in here: `restore_weights` before anything is saved.
        """
        with self.averaging.swapped() if self.averaging is not None else nullcontext():
            yield

    def restore_weights(self) -> None:
        """Make sure that the model has the weights that are trained."""
        if self.averaging is not None:
            self.averaging.restore()

    def evaluate(self, batches: Iterable[Batch]) -> Scores:
        """Loss and accuracy on batches."""
        with self.shown_weights():
            try:
                return evaluate(self.objective, batches, self.device)
            finally:
                reshard(self.objective)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights to use, and all else that a resumed run needs; whole, on every process."""
        self.restore_weights()
        weights = whole({k: v.detach() for k, v in self.model.state_dict().items()})
        rest = {**whole(self.optimizer.state_tensors()), **self.guard.state_tensors()}
        if self.averaging is not None:
            rest |= {RAW + k: v.clone() for k, v in weights.items()} | whole(self.averaging.tensors())
            with self.shown_weights():
                weights = whole({k: v.detach().clone() for k, v in self.model.state_dict().items()})
        return weights, rest

    def load(
        self, weights: Mapping[str, Tensor], rest: Mapping[str, Tensor], where: str, changed: Collection[str] = ()
    ) -> None:
        """Put back what `tensors` gave.

        Args:
            weights, rest: of a checkpoint.
            where: names it in errors.
            changed: fields that were allowed to change; another optimizer or average starts without a memory.

        Raises:
            FormatError: a tensor is missing or has another shape.
        """
        raw = {k.removeprefix(RAW): v for k, v in rest.items() if k.startswith(RAW)}
        self.load_weights(raw or weights, where, changed)
        others = (RAW, "guard/", "average")
        if not {"optimizer", "normuon"} & set(changed):
            self.optimizer.load_state_tensors({k: v for k, v in rest.items() if not k.startswith(others)}, where)
        self.guard.load_state_tensors(rest, where)
        if self.averaging is not None and "averaging" not in changed:
            self.averaging.load(dict(rest), where)

    def load_weights(self, weights: Mapping[str, Tensor], where: str, changed: Collection[str] = ()) -> None:
        """Take over weights, sharded as the model is; the balance of experts begins anew where it `changed`.

        Raises:
            FormatError: they are those of another model.
        """
        now = self.model.state_dict()
        if "load_balancing" in changed:
            is_bias = [n for n in {*now, *weights} if n.endswith("router_bias")]
            weights = {n: w for n, w in weights.items() if n not in is_bias} | {n: now[n] for n in is_bias if n in now}
        for name in dict.fromkeys([*now, *weights]):
            ours, theirs = (tuple(t[name].shape) if name in t else "nothing" for t in (now, weights))
            if ours != theirs:
                raise FormatError(f"{where}: found {theirs} for {name}; expected {ours}, as the model has it")
        self.model.load_state_dict({k: like(v, now[k]) for k, v in weights.items()})


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators that a pass on this device draws from.

    `torch.manual_seed` also seeds devices that are not there, and keeps a picture of the stack for each: 0.5 ms, a
    tenth of a small step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def micro_seed(seed: int, step: int, micro: int) -> int:
    """A 63-bit seed for the dropout of one micro-step (the mixer of SplitMix64, Steele et al. 2014)."""
    z = seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + micro * 0x2545F4914F6CDD1D + 0x632BE59BD9B4E019
    z &= 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1
