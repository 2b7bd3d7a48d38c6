"""Memory of a training step, simulated: the real model, objective and optimizer run on tensors without contents.

In: a run, complete. Out: bytes by part at their greatest, and the peak. Called by `plan`. Nothing is allocated and
nothing is computed: under torch's FakeTensorMode an operation yields shapes and types alone. Every storage that an
operation makes is followed from birth to death (a weak reference tells of its end), through forward, backward, clipping
and update, so that the peak comes out of the code that will run and not of a formula about it. What is not seen is
what kernels take and give back inside one operation (buffers of matrix products), and the process itself.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bytekiln import kernels
from bytekiln.attention import Attend
from bytekiln.averaging import make_averaging
from bytekiln.config import RunConfig
from bytekiln.loss import every_chunk
from bytekiln.model import Features, KVCache, TransformerLM
from bytekiln.objective import Objective, has_documents
from bytekiln.optim import clip_gradients, make_optimizer

GRANULE = {"cpu": 64, "cuda": 512}
"""Bytes to which torch's allocators round a block up."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "scaled_dot_product", "flex_attention", "bytekiln::linear",
            "bytekiln::block")  # fmt: skip
"""Operations whose time is that of their products; what they read and write is not counted as moved."""
FLOAT = 4
"""Bytes of a number that the core computes with."""
LOOKUPS = ("embedding", "index", "index_select", "gather")
"""Operations that read as much of their first argument as they give out."""
CHUNKS_TRACED = 4
"""Chunks of a loss that are traced where it has many: the first and the next, which tells what one moves, and the last
two, where the peak is: all gradients before them are there, and the last may be a smaller one."""


class Footprint(NamedTuple):
    """Bytes of a step. Each part at its own greatest; they do not all stand at the same moment."""

    weights: int
    gradients: int
    optimizer: int
    """State of the optimizer, and averaged weights."""
    activations: int
    """What the forward keeps for the backward, and what is passing through."""
    loss: int
    """Logits and what the loss makes of them."""
    total: int
    """Greatest sum at any moment of the step: at most the sum of the parts."""
    largest: int
    """The greatest single block."""
    moved: int
    """Bytes read and written by operations that are no matrix products, in a micro-step; for the time."""
    calls: int
    """Operations in a micro-step, for the time."""


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that is made while it is active, by kind."""

    def __init__(self, granule: int) -> None:
        """Storages are born as `kind`, which the caller sets as it goes."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = "weights"
        self.work = 0
        """Pieces of work that are spread over the experts of a layer: tokens × top_k."""
        self.now: dict[str, int] = dict.fromkeys(Footprint._fields, 0)
        self.most = dict(self.now)
        self.live = self.peak = self.moved = self.calls = self.largest = 0
        self.scratch = 0
        """Bytes that the core's operators keep to work in."""
        self._granule = granule
        self._known: dict[int, tuple[str, int, weakref.ref[torch.UntypedStorage]]] = {}

    def __torch_dispatch__(  # whatever torch hands over
        self,
        func: Any,  # noqa: ANN401
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run the operation and take note of what it made."""
        if func is torch.ops.prim.device.default:  # half of all that is asked; autograd wants to know at every turn
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._even_share(args[0])
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        fresh = [t for t in made if self._follow(t)]
        name = func._schema.name.removeprefix("aten::")
        if name in kernels.SCRATCH:
            self.scratch = max(self.scratch, FLOAT * kernels.SCRATCH[name](*args))
        if (fresh or func._schema.is_mutable) and not any(p in name for p in PRODUCTS):
            read = [] if name in LOOKUPS else [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in (*read, *fresh))
        return out

    def become(self, kind: str, tensor: Tensor | None = None) -> None:
        """Count a tensor's storage as `kind` from now on; without a tensor everything that is no weight."""
        for key in [*self._known] if tensor is None else [tensor.untyped_storage()._cdata]:
            was, size, alive = self._known[key]
            if tensor is not None or was != "weights":
                self._known[key] = kind, size, alive
                self.now[was] -= size
                self._add(kind, size)

    def forget_peaks(self) -> None:
        """Begin a measurement here."""
        self.most, self.peak = dict(self.now), self.live
        self.moved = self.calls = self.largest = 0

    def few_chunks(self, positions: int, chunk: int) -> Iterator[tuple[int, int]]:
        """The pieces of a loss (`loss.Spans`) at whose end this holds what it would hold after every chunk.

        A vocabulary of 50,000 makes a chunk of some 160 positions: a large batch has millions, all alike.
        """
        chunks = -(-positions // chunk)
        left_out = chunks - CHUNKS_TRACED
        if left_out < 2:  # a piece longer than a chunk is what is left out
            yield from every_chunk(positions, chunk)
            return
        yield 0, chunk
        moved, calls = self.moved, self.calls
        yield chunk, 2 * chunk
        moved += (self.moved - moved) * (1 + left_out)
        calls += (self.calls - calls) * (1 + left_out)
        rest = (2 + left_out) * chunk
        yield 2 * chunk, rest
        self.moved, self.calls = moved, calls
        yield rest, rest + chunk
        yield rest + chunk, positions

    def _even_share(self, element: Tensor) -> int:
        """What the host would read: only the experts' loads are ever read, and here every expert gets the same."""
        experts = element.untyped_storage().nbytes() // element.element_size()
        return self.work // experts + int(element.storage_offset() < self.work % experts)

    def _follow(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = -(-storage.nbytes() // self._granule) * self._granule

        def gone(_: weakref.ref[torch.UntypedStorage]) -> None:
            kind, size, _alive = self._known.pop(key)
            self.now[kind] -= size
            self.live -= size

        self._known[key] = self.kind, size, weakref.ref(storage, gone)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        self._add(self.kind, size)
        return True

    def _add(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self.most[kind] = max(self.most[kind], self.now[kind])


class _Hollow(TransformerLM):
    """The model with nothing drawn into its weights, which tells where the features end and the loss begins."""

    storages: Storages

    def initialise(self) -> None:
        """Leave the weights as they are: they have no contents."""

    def features(self, ids_BxT: Tensor, cache: KVCache | None = None, documents_BxT: Tensor | None = None) -> Features:
        """As the model's; what is made from here on until the gradient comes back is the loss's."""
        self.storages.kind = "activations"
        out = super().features(ids_BxT, cache, documents_BxT)
        self.storages.kind = "loss"
        if out.x_BxTxD.requires_grad:
            out.x_BxTxD.register_hook(self._back)  # type: ignore[no-untyped-call]
        return out

    def _back(self, _: Tensor) -> None:
        self.storages.kind = "activations"


class Simulation:
    """A run's model and optimizer without contents, whose step can be traced at any batch size."""

    def __init__(
        self, config: RunConfig, device: torch.device, attend: Attend | None = None, *, foreign: bool = False
    ) -> None:
        """Build them and take one empty update, so that the optimizer's state is there.

        Args:
            config: the run, complete (`prepare.resolved`).
            device: where it will run.
            attend: the attention kernel, None: the model's own choice.
            foreign: it stands for a device where the core's kernels are not, as a GPU that is not here.
        """
        self.config, self.device = config, device
        self._kernels = kernels.left_to_torch if foreign else nullcontext
        self._fake = FakeTensorMode()
        self._storages = Storages(GRANULE.get(device.type, 64))
        with self._fake, self._storages, torch.device(device):
            self._model = _Hollow(config.model, attend=attend)
            self._model.storages = self._storages
            self._of_update: dict[str, int] | None = None
            """What clipping and update add to what stands before them: the same for every batch."""
            self._objective = Objective(self._model, config, self._storages.few_chunks)
            self._storages.kind = "activations"
            self._optimizer = make_optimizer(self._model, config.optimizer)
            self._averaging = make_averaging(self._model, config.optimizer)
            for p in self._model.parameters():
                p.grad = torch.empty_like(p)
            self._update()
            gc.collect()
            self._storages.become("optimizer")
            for p in self._model.parameters():
                p.register_post_accumulate_grad_hook(self._is_gradient)  # type: ignore[no-untyped-call]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors in a checkpoint: weights and persistent buffers, optimizer, averages."""
        averages = self._averaging.tensors() if self._averaging is not None else {}
        tensors = [*self._model.state_dict().values(), *self._optimizer.state_tensors().values(), *averages.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def step(self, batch_size: int) -> Footprint:
        """Trace a step of micro-steps of `batch_size` windows.

        Of several micro-steps the last is traced: gradients stand from the first one on.
        """
        s, c = self._storages, self.config
        with self._kernels(), self._fake, s, torch.device(self.device):
            s.forget_peaks()
            s.scratch = 0
            self._model.train()
            s.work = batch_size * c.model.context_length * c.model.expert_top_k
            if c.training.grad_accum_steps > 1:
                s.kind = "gradients"
                for p in self._model.parameters():
                    p.grad = torch.empty_like(p)
                s.moved = s.calls = 0
            s.kind = "activations"
            ids_BxT = torch.zeros(batch_size, c.model.context_length, dtype=torch.int64)
            targets_BxT = torch.zeros_like(ids_BxT)
            documents_BxT = torch.zeros_like(ids_BxT, dtype=torch.int32) if has_documents(c) else None
            loss = self._objective(ids_BxT, targets_BxT, documents_BxT)
            (loss.total / ids_BxT.numel()).backward()
            del loss
            found = Footprint(**{**s.most, "total": s.peak, "largest": s.largest, "moved": s.moved, "calls": s.calls})
            now = {**s.now, "total": s.live}
            if self._of_update is None:
                s.forget_peaks()
                s.kind = "activations"
                clip_gradients(self._optimizer.parameters, c.optimizer.grad_clip)
                self._update()
                most = {**s.most, "total": s.peak, "largest": s.largest}
                self._of_update = {name: n - now.get(name, 0) for name, n in most.items()}
            self._optimizer.zero_grad()
        more = self._of_update
        most = {name: max(n, now.get(name, 0) + more.get(name, 0)) for name, n in found._asdict().items()}
        for name in ("activations", "total"):  # it stands through the update, too
            most[name] += s.scratch
        return Footprint(**most)

    def _update(self) -> None:
        take = torch.ones((), dtype=torch.bool)
        self._optimizer.step(self.config.optimizer.lr, take)
        self._optimizer.zero_grad()
        if self._averaging is not None:
            self._averaging.update(1.0, take)

    def _is_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self._storages.become("gradients", weight.grad)
