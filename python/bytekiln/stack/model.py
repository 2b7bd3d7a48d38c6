"""Several models of one shape as one: their parameters stacked, their batches laid behind one another.

In: K objectives of the same config, and K micro-batches. Out: K losses, and the gradient of each model in its own
parameters. Called by `stack`.

The model stays the one of `model`: a copy of it runs on a batch of K·B windows, run k's in rows k·B … (k+1)·B-1.
Attention, activations, rotary positions and the residual stream treat every window by itself, so they know nothing of
runs and go through the same kernels as ever. Only what holds parameters is exchanged for a stacked counterpart, here:
a matrix product becomes a batched one. On the CPUs tried all of it is equal to single runs to the bit.

`torch.func.vmap` over the whole objective is the specification that the tests hold this to. It is not what trains:
neither torch's attention on a CPU nor a kernel of our own has a batching rule, so that they would run once a run, and
what it costs a call eats what it saves (4 times 3 layers × 96 on 12 × 64: 168 ms a step, in turn 155).

Shapes: K runs, B windows of each, T positions, D width in, E width out, V vocabulary, P positions of the model,
L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from bytekiln import kernels
from bytekiln.linear import Before
from bytekiln.loss import chunked_cross_entropy, positions_at_once
from bytekiln.norms import LayerNorm, RMSNorm, rms_norm
from bytekiln.objective import Objective


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b for each run, with the weights' gradient in the weights' own layout.

    autograd's gradient of a batched product by a transposed matrix is transposed too and would be copied once more,
    a sixth of a step of 3 × 96 on 64 positions. Every run's numbers are those of `nn.Linear` to the bit.
    """

    @staticmethod
    def forward(ctx: Any, x_KxNxD: Tensor, w_KxExD: Tensor, b_KxE: Tensor | None) -> Tensor:  # noqa: ANN401 - torch's
        """See the class."""
        ctx.save_for_backward(x_KxNxD, w_KxExD)
        ctx.biased = b_KxE is not None
        if b_KxE is None:
            return torch.bmm(x_KxNxD, w_KxExD.mT)
        return torch.baddbmm(b_KxE[:, None], x_KxNxD, w_KxExD.mT)

    @staticmethod
    def backward(ctx: Any, d_KxNxE: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """By x, W and b."""
        x_KxNxD, w_KxExD = ctx.saved_tensors
        by_x = torch.bmm(d_KxNxE, w_KxExD) if ctx.needs_input_grad[0] else None
        return by_x, torch.bmm(d_KxNxE.mT, x_KxNxD), d_KxNxE.sum(1) if ctx.biased else None


class _Products(torch.autograd.Function):
    """x Wᵀ of several W for each run, as `kernels.products`: gradients by x add up inside the products."""

    @staticmethod
    def forward(ctx: Any, x_KxNxD: Tensor, *w_KxExD: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401 - torch's
        """See the class."""
        ctx.save_for_backward(x_KxNxD, *w_KxExD)
        return tuple(torch.bmm(x_KxNxD, w.mT) for w in w_KxExD)

    @staticmethod
    def backward(ctx: Any, *d_KxNxE: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """By x and each W."""
        x_KxNxD, *w_KxExD = ctx.saved_tensors
        by_x = torch.bmm(d_KxNxE[0], w_KxExD[0])
        for d, w in zip(d_KxNxE[1:], w_KxExD[1:], strict=True):
            by_x = torch.baddbmm(by_x, d, w)
        return by_x, *(torch.bmm(d.mT, x_KxNxD) for d in d_KxNxE)


class StackedLinear(nn.Module):
    """`nn.Linear` of K runs."""

    stands_for = nn.Linear

    def __init__(self, weight_KxExD: nn.Parameter, bias_KxE: nn.Parameter | None) -> None:
        """The parameters of all runs."""
        super().__init__()
        self.weight, self.bias = weight_KxExD, bias_KxE

    def forward(self, x: Tensor) -> Tensor:
        """Rows of x (K·B × … × D) by the matrix of their run."""
        y_KxNxE: Tensor = _Product.apply(self._by_run(x), self.weight, self.bias)
        return y_KxNxE.view(*x.shape[:-1], -1)

    def together(self, x: Tensor, maps: Sequence[StackedLinear]) -> list[Tensor]:
        """Several of them, this one first, of one x: where a single run's maps go one way, so do these."""
        if not kernels.normalises(x) or any(m.bias is not None for m in maps):
            return [m(x) for m in maps]
        ys_KxNxE = _Products.apply(self._by_run(x), *(m.weight for m in maps))
        return [y.view(*x.shape[:-1], -1) for y in ys_KxNxE]

    def _by_run(self, x: Tensor) -> Tensor:
        return x.reshape(len(self.weight), -1, x.shape[-1])


class StackedEmbedding(nn.Module):
    """`nn.Embedding` of K runs: one table, run k's rows at k·V."""

    def __init__(self, weight_KxVxD: nn.Parameter) -> None:
        """The tables of all runs."""
        super().__init__()
        self.weight = weight_KxVxD
        K, V, _ = weight_KxVxD.shape
        self.register_buffer("starts_Kx1", torch.arange(0, K * V, V, device=weight_KxVxD.device)[:, None])

    starts_Kx1: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the run's own table for ids K·B × T."""
        rows = (ids.reshape(len(self.weight), -1) + self.starts_Kx1).view(ids.shape)
        return F.embedding(rows, self.weight.flatten(0, 1))


class StackedNorm(nn.Module):
    """`RMSNorm` or `LayerNorm` of K runs.

    Both have kernels of their own for the sums in the weights' gradient. They are called run by run: once for all, with
    the weights behind it, rounds otherwise, which a learning rate at the edge of divergence makes a thousandth of the
    loss in 30 steps.
    """

    def __init__(self, own: RMSNorm | LayerNorm, weight_KxD: nn.Parameter, bias_KxD: nn.Parameter | None) -> None:
        """`own` is one run's, for kind and epsilon."""
        super().__init__()
        self.rms, self.eps = isinstance(own, RMSNorm), own.eps
        self.weight, self.bias = weight_KxD, bias_KxD

    @property
    def before(self) -> Before:
        """As the norm's own."""
        return Before("rms" if self.rms else "layer", self.weight, self.bias, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        K, width = len(self.weight), x.shape[-1:]
        runs = zip(x.reshape(K, -1, *width).unbind(), self.weight.unbind(), self._biases(), strict=True)
        if self.rms:
            rows = [rms_norm(x_NxD, w, self.eps) for x_NxD, w, _ in runs]
        else:
            rows = [F.layer_norm(x_NxD, width, w, b, self.eps) for x_NxD, w, b in runs]
        return torch.stack(rows).view(x.shape)

    def _biases(self) -> Sequence[Tensor | None]:
        return [None] * len(self.weight) if self.bias is None else self.bias.unbind()


class StackedPositions(nn.Module):
    """Learned positions of K runs. The model reads `.weight[start:end]` and adds it to K·B × T × D."""

    def __init__(self, table_KxPxD: nn.Parameter) -> None:
        """The tables of all runs."""
        super().__init__()
        self.table = table_KxPxD
        self.windows = 0
        """B, set before each pass."""

    @property
    def weight(self) -> StackedPositions:
        """Stands for the table: what is cut out of it has a row a window."""
        return self

    def __getitem__(self, cut: slice) -> Tensor:
        """The rows `cut` of each window's run."""
        part = self.table[:, None, cut]
        return part.expand(-1, self.windows, -1, -1).flatten(0, 1)


class StackedScalars(nn.Module):
    """A number or a vector a row and run (`residual_lambdas`, `shift_lambdas`).

    The model reads row `[i]` and multiplies K·B × T × D by it.
    """

    def __init__(self, table: nn.Parameter) -> None:
        """The numbers of all runs, K × rows, or K × rows × D."""
        super().__init__()
        self.table = table
        self.windows = 0

    def __len__(self) -> int:
        """Rows."""
        return self.table.shape[1]

    def __getitem__(self, row: int) -> Tensor:
        """Row `row` of each window's run, K·B × 1 × 1 or K·B × 1 × D."""
        return self.table[:, row].repeat_interleave(self.windows, dim=0).view(len(self.table) * self.windows, 1, -1)


class StackedLoss(NamedTuple):
    """Sums over the real targets of a micro-batch, of each run."""

    total: Tensor
    """0-D, differentiable: Σ of the runs' totals, each times its weight."""
    nll_K: Tensor
    """Detached: Σ -ln p(target)."""


class StackedObjective(nn.Module):
    """`Objective` of K runs."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        """Stack the parameters of the runs' models; from here on theirs are views into the stack.

        Args:
            objectives: of the same config, without dropout and experts, in fp32.
        """
        super().__init__()
        self.runs = len(objectives)
        first = objectives[0]
        assert first.low is None and not first.balance_weight
        self.softcap, self.z_loss, self.loss_chunk = first.softcap, first.z_loss, first.loss_chunk
        self._own = [dict(o.model.named_parameters()) for o in objectives]
        self._stacked: dict[str, nn.Parameter] = {}
        for name in self._own[0]:
            stacked = nn.Parameter(torch.stack([own[name].detach() for own in self._own]))
            for own, part in zip(self._own, stacked.detach(), strict=True):
                own[name].data = part
            self._stacked[name] = stacked
        with torch.no_grad():
            self.model = copy.deepcopy(first.model)
        taken: set[str] = set()
        _exchange(self.model, "", self._stacked, taken)
        assert taken == set(self._stacked), f"not stacked: {sorted(set(self._stacked) - taken)}"
        self._per_window = [m for m in self.model.modules() if isinstance(m, StackedPositions | StackedScalars)]
        head = "token_embeddings.weight" if self.model.lm_head is None else "lm_head.weight"
        self._head_KxVxD = self._stacked[head]

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor | None, weights_K: Tensor) -> StackedLoss:
        """The losses of a micro-batch of each run.

        Args:
            inputs: K·B × T ids, run after run. targets, documents: the same way; else as `Objective`.
            weights_K: factor of each run's total in the sum that is differentiated.
        """
        windows = len(inputs) // self.runs
        for part in self._per_window:
            if part.windows != windows:
                part.windows = windows
        x = self.model.features(inputs, None, documents).x_BxTxD
        totals, nlls = [], []
        # The head run by run, as a single run does it: its logits in chunks, its gradient made on the way.
        for x_BxTxD, targets_BxT, head_VxD in zip(
            x.view(self.runs, -1, *x.shape[1:]).unbind(),
            targets.view(self.runs, -1, targets.shape[1]).unbind(),
            self._head_KxVxD.unbind(),
            strict=True,
        ):
            chunk = positions_at_once(self.loss_chunk, x_BxTxD, head_VxD.shape[0])
            total, nll = chunked_cross_entropy(
                x_BxTxD, head_VxD, targets_BxT, softcap=self.softcap, z_loss=self.z_loss, chunk=chunk
            )
            totals.append(total)
            nlls.append(nll)
        return StackedLoss((torch.stack(totals) * weights_K).sum(), torch.stack(nlls))

    def hand_out(self) -> None:
        """Give each run's parameters their part of the gradient."""
        for name, stacked in self._stacked.items():
            assert stacked.grad is not None, f"{name} has no gradient"
            for own, part in zip(self._own, stacked.grad.unbind(), strict=True):
                own[name].grad = part

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the stacked gradients."""
        for stacked in self._stacked.values():
            stacked.grad = None

    def let_go(self) -> None:
        """Give the runs parameters of their own again: the stack may be dropped, or made of fewer."""
        for own in self._own:
            for p in own.values():
                p.data = p.detach().clone()


def _exchange(module: nn.Module, path: str, stacked: dict[str, nn.Parameter], taken: set[str]) -> None:
    """Exchange everything below `module` that holds parameters for its stacked counterpart."""

    def take(name: str) -> nn.Parameter:
        taken.add(name)
        return stacked[name]

    for name in ("residual_lambdas", "x0_lambdas", "shift_lambdas"):
        if path + name in stacked:
            delattr(module, name)
            setattr(module, name, StackedScalars(take(path + name)))
    for name, child in list(module.named_children()):
        at = f"{path}{name}."
        bias = take(at + "bias") if at + "bias" in stacked else None
        if isinstance(child, nn.Linear):
            setattr(module, name, StackedLinear(take(at + "weight"), bias))
        elif name == "position_embeddings":
            setattr(module, name, StackedPositions(take(at + "weight")))
        elif isinstance(child, nn.Embedding):
            setattr(module, name, StackedEmbedding(take(at + "weight")))
        elif isinstance(child, RMSNorm | LayerNorm):
            setattr(module, name, StackedNorm(child, take(at + "weight"), bias))
        elif not isinstance(child, StackedScalars):
            _exchange(child, at, stacked, taken)
