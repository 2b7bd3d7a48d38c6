"""Muon: momentum made orthogonal (Jordan 2024), for the matrices of the blocks. Called by `optim`.

In: matrices of one shape at a time, stacked, so that an iteration is three batched products whatever the number of
layers. Out: moved weights. Shapes: N matrices in the stack, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bytekiln.bundle import Bundle, Rate, Slot, put, share, whole
from bytekiln.config import OptimizerConfig

Polynomial = tuple[float, float, float]
"""(a, b, c): a singular value s becomes a·s + b·s³ + c·s⁵."""

JORDAN: Polynomial = (3.4445, -4.7750, 2.0315)
"""Jordan 2024: steep at zero, and never converges: of values that began above 0.003 of the matrix's norm, five
iterations leave 0.68 to 1.203."""

_POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Algorithm 1 of Amsel, Persson, Musco and Gower 2025 (arXiv 2505.16932); the last one, Newton-Schulz's own, repeats.
Of values that began above 0.001 of the matrix's norm, four iterations leave 0.42 to 1.56, five 0.84 to 1.124, six 0.993
to 1.0012."""
_SAFETY = 1.01
"""Theirs: rounding in bf16 lifts values above 1, where the polynomials run away; all but the last are shrunk by it."""
_SMALLEST_NORM = 1e-18
"""Stands for the norm of a zero matrix; what is smaller has squares that fp32 cannot hold."""
_SMALLEST_ROW = 1e-10


def polynomials(kind: str, steps: int) -> list[Polynomial]:
    """The polynomials of `steps` iterations; `kind` is `ns_coefficients`."""
    if kind == "jordan":
        return [JORDAN] * steps
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    return [*safe, *[_POLAR_EXPRESS[-1]] * steps][:steps]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32: tensor cores, or a CPU with AMX.

    Other CPUs emulate, 44 to 500 times slower; with AVX-512-BF16 alone products take nearly twice as long (measured).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def orthogonalize(g_NxRxC: Tensor, steps: Sequence[Polynomial], dtype: torch.dtype) -> Tensor:
    """Replace the singular values of each matrix by about 1, keeping its singular vectors.

    Args:
        g_NxRxC: any size of entries; it is normalised here.
        steps: polynomials, one an iteration.
        dtype: of the products.

    Returns:
        A stack in the type of `g_NxRxC`. A zero matrix stays zero.
    """
    tall = g_NxRxC.shape[-2] > g_NxRxC.shape[-1]
    x = g_NxRxC.mT if tall else g_NxRxC  # the small Gram matrix: rows² instead of columns²
    safety = 1.0 if steps[0] == JORDAN else _SAFETY
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    x = (x / (norm * safety)).to(dtype)
    for a, b, c in steps:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    o_NxRxC: Tensor = (x.mT if tall else x).to(g_NxRxC.dtype)
    return o_NxRxC


def normalise_rows(o_NxRxC: Tensor, square_NxRx1: Tensor, beta2: float, take: Tensor | None) -> Tensor:
    """NorMuon (Li et al. 2025): each row over its running root mean square; the update's norm stays what it was.

    No correction for the start of the running mean: it is one factor for all rows, which the last step takes out.

    Args:
        o_NxRxC: orthogonal updates.
        square_NxRx1: the running mean square of each row, moved by this call.
        beta2: its decay.
        take: False leaves `square_NxRx1` alone.
    """
    moved = square_NxRx1.lerp(o_NxRxC.square().mean(dim=-1, keepdim=True), 1 - beta2)
    put(square_NxRx1, moved, take)
    even = o_NxRxC / (moved.sqrt() + _SMALLEST_ROW)
    before = torch.linalg.vector_norm(o_NxRxC, dim=(-2, -1), keepdim=True)
    after = torch.linalg.vector_norm(even, dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    kept: Tensor = even * (before / after)
    return kept


class _Stack:
    """All matrices of one shape: 2-D parameters are one each, a 3-D one (experts) is as many as its first axis."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], normuon: bool) -> None:
        self.bundle = Bundle(named)
        self.R, self.C = named[0][1].shape[-2:]
        self.momentum = self.bundle.zeros()
        self.matrices = [p.numel() // (self.R * self.C) for _, p in named]
        self.square_NxRx1: Tensor | None = None
        if normuon:
            self.square_NxRx1 = self.momentum.new_zeros(sum(self.matrices), self.R, 1)

    def stacked(self, flat: Tensor) -> Tensor:
        """A flat vector as N×R×C; shards are gathered first, since an orthogonal matrix has no independent parts."""
        if self.bundle.sharded:
            parts = zip(self.bundle.views(flat), self.bundle.parameters, strict=True)
            flat = torch.cat([whole(part, p).reshape(-1) for part, p in parts])
        return flat.view(-1, self.R, self.C)

    def flattened(self, o_NxRxC: Tensor) -> Tensor:
        """The opposite: this process's shards as a flat vector."""
        if not self.bundle.sharded:
            return o_NxRxC.reshape(-1)
        parts = zip(torch.split_with_sizes(o_NxRxC, self.matrices), self.bundle.parameters, strict=True)
        return torch.cat([share(part.reshape(p.shape), p).reshape(-1) for part, p in parts])


class Muon:
    """The update rule over the matrices it is given."""

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        *,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        """Args:
        named: parameters of two or three axes.
        config: momentum, iterations, scale, decay.
        dtype: of the products; None: bf16 where it is fast, else fp32.
        compiled: one graph for all shapes. For CUDA, where it fuses what stands between the products; on a CPU it
            saves nothing that would pay for compiling.
        """
        shapes: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
        for name, p in named:
            shapes.setdefault(tuple(p.shape[-2:]), []).append((name, p))
        self.config = config
        self.stacks = [_Stack(same, config.normuon) for same in shapes.values()]
        fast = has_fast_bf16(named[0][1].device)
        self.dtype = dtype or (torch.bfloat16 if fast else torch.float32)
        self.steps = polynomials(config.ns_coefficients, config.ns_steps)
        self._move = torch.compile(self._move_all, dynamic=False) if compiled else self._move_all
        self._lr = torch.zeros(()) if compiled else None

    def step(self, lr: float, take: Tensor | None) -> None:
        """Move the weights at rate `lr`."""
        rate: Rate = lr if self._lr is None else self._lr.fill_(lr)
        self._move([s.bundle.gradients() for s in self.stacks], rate, take)

    def slots(self) -> list[Slot]:
        """`momentum/NAME` and, with NorMuon, `row_square/NAME` (the parameter's shape without its last axis)."""
        found = []
        for s in self.stacks:
            found += s.bundle.slots("momentum", s.momentum)
            if s.square_NxRx1 is not None:
                parts = torch.split_with_sizes(s.square_NxRx1, s.matrices)
                for name, p, part in zip(s.bundle.names, s.bundle.parameters, parts, strict=True):
                    found.append(Slot(f"row_square/{name}", part.view(p.shape[:-1]), None))
        return found

    def scale(self, rows: int, columns: int) -> float:
        """What `muon_scale` makes of a shape: Jordan's √max(1, R/C), or 0.2·√max(R, C) (Liu et al. 2025)."""
        if self.config.muon_scale == "rms":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))

    def _move_all(self, gradients: list[list[Tensor]], lr: Rate, take: Tensor | None) -> None:
        c = self.config
        for s, grads in zip(self.stacks, gradients, strict=True):
            g = s.bundle.flat(grads)
            momentum = s.momentum.lerp(g, 1 - c.momentum)
            put(s.momentum, momentum, take)
            ahead = g.lerp(momentum, c.momentum) if c.nesterov else momentum
            o_NxRxC = orthogonalize(s.stacked(ahead), self.steps, self.dtype)
            if s.square_NxRx1 is not None:
                o_NxRxC = normalise_rows(o_NxRxC, s.square_NxRx1, c.normuon_beta2, take)
            s.bundle.descend(
                s.flattened(o_NxRxC),
                lr * self.scale(s.R, s.C),
                lr * c.weight_decay if c.weight_decay else 0.0,
                cautious=c.cautious_weight_decay,
                take=take,
            )
