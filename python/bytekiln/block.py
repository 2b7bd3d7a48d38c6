"""A whole pre-norm block of the model on the CPU in float32 as one operation of the core, forward and backward.

In: the residual stream, a block's parameters, and what its attention is like. Out: the stream behind the block. Called
by `model.Block`, which asks first; what the core does not take goes through `linear` and `kernels`, or torch. Threads
meet once a block instead of at every product (`docs/performance.md` has what that is worth). For the backward x and one
tensor are kept: queries, keys, values, the attention's output, the stream between attention and feed-forward, and what
the feed-forward's first matrices made. The gradient of a gradient is an error, as in `kernels`.

Shapes: B windows, T positions, D width of the stream, H heads, G heads of keys and values, K their width, F width of
the feed-forward; with R runs stacked (`stack`) every parameter has R in front, and the windows fall into R equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from bytekiln import _core, kernels
from bytekiln.config import ModelConfig
from bytekiln.linear import STEP, WIDEST

PARAMETERS = 18
"""Weight and bias of: the norm before the attention, that before the feed-forward, q, k, v, the attention's output, W1,
W3 (swiglu's), W2. None: there is no such thing."""


_apart = False


class Kind(NamedTuple):
    """What a block is like, beside its parameters."""

    heads: int
    kv_heads: int
    causal: bool
    window: int
    """Places that a position sees, its own included; 0: all before it, or all."""
    norm: str
    """none, rms or layer."""
    eps: float
    qk_norm: bool
    """Queries and keys are normalised (RMS, no weights) behind the positions, with the same eps."""
    activation: str
    """One of `kernels.KINDS`, or swiglu."""


def is_one_operation(c: ModelConfig) -> bool:
    """Whether the blocks of such a model are one operation each while it is trained: what its shape says about it.

    In float32 on a CPU, uncompiled, and with an attention that sees no documents.
    """
    return (
        c.head_width <= kernels.WIDEST_HEAD
        and c.d_model <= WIDEST
        and all(width % STEP == 0 for width in (c.d_model, c.kv_width, c.d_ff))
        and c.head_width % 8 == 0
        and c.norm_position == "pre"
        and not (c.ffn == "moe" or c.value_embeddings or c.dropout)
    )


def block(
    x_BxTxD: Tensor, kind: Kind, parameters: Sequence[Tensor | None], cos_sin_TxK2: tuple[Tensor, Tensor] | None
) -> Tensor:
    """x + attention(norm x), and to that its feed-forward(norm): where `linear.takes` x and the parameters `are_plain`.

    Args:
        x_BxTxD: the stream; T > 1.
        kind: see there; heads are a multiple of 8 up to `kernels.WIDEST_HEAD` wide.
        parameters: `PARAMETERS` of them.
        cos_sin_TxK2: tables of rotary positions; None: queries and keys are not turned.
    """
    tables = cos_sin_TxK2 or (None, None)
    if torch.is_grad_enabled():
        return cast("tuple[Tensor, Tensor]", _Block.apply(kind, *tables, x_BxTxD, *parameters))[0]
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, _ops.block(x_BxTxD, parameters, *tables, *kind)[0])


@contextmanager
def taken_apart() -> Iterator[None]:
    """In here no block is one operation: a profile can tell its products from its attention.

    With `qk_norm` and rotary positions numbers are rounded otherwise, else they are the same to the bit.
    """
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def is_taken_apart() -> bool:
    """Whether this is inside of `taken_apart`."""
    return _apart


class _Block(Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's own object
        kind: Kind,
        cos: Tensor | None,
        sin: Tensor | None,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, kept = _ops.block(x, parameters, cos, sin, *kind)
        ctx.save_for_backward(x, kept, cos, sin, *parameters)
        ctx.kind = kind
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        return y, kept

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        kernels.refuse_a_graph()
        x, kept, cos, sin, *parameters = ctx.saved_tensors
        if g is None:
            return (None,) * (4 + len(parameters))
        made = iter(_ops.block_backward(g, x, kept, parameters, cos, sin, *ctx.kind))
        return None, None, None, *(None if p is None else next(made) for p in (x, *parameters))


# --- the operators -------------------------------------------------------------------------------------------------

_library: Any = kernels.library
_GIVEN = "Tensor?[] parameters, Tensor? cos, Tensor? sin"
_KIND = "int heads, int kv_heads, bool causal, int window, str norm, float eps, bool qk_norm, str activation"
_library.define(f"block(Tensor x, {_GIVEN}, {_KIND}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"block_backward(Tensor g, Tensor x, Tensor kept, {_GIVEN}, {_KIND}) -> Tensor[]",
                tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip
_ops: Any = torch.ops.bytekiln


def _shapes(x: Tensor, parameters: Sequence[Tensor | None], kind: Kind) -> tuple[int, int, int]:
    """K, F, and how many numbers are kept: `Block::kept` of the core."""
    B, T, _ = x.shape
    q, up, gate = parameters[4], parameters[12], parameters[14]
    assert q is not None and up is not None
    H, G, D = kind.heads, kind.kv_heads, x.shape[2]
    K, wide = q.shape[-2] // H, up.shape[-2]
    scales = H + G if kind.qk_norm else 0
    return K, wide, B * T * (2 * H * K + 2 * G * K + H + D + wide * (1 + (gate is not None)) + scales)


def _made(x: Tensor, parameters: Sequence[Tensor | None], cos: Tensor | None, sin: Tensor | None,
          *kind: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    return kernels.same(x), x.new_empty(_shapes(x, parameters, Kind(*kind))[2])


def _gradients(x: Tensor, parameters: Sequence[Tensor | None]) -> list[Tensor]:
    """A tensor for each that is there."""
    return [kernels.same(p) for p in (x, *parameters) if p is not None]


class _Given(NamedTuple):
    """What the core reads, contiguous and checked: it is given addresses, and what differs would be foreign memory."""

    x: Tensor
    parameters: list[Tensor | None]
    tables: list[Tensor | None]
    runs: int
    sizes: tuple[int, int, int, int, int, int, int]
    kept: int
    """Numbers, of all runs."""

    def at(self, run: int) -> tuple[list[int], tuple[int, int], int]:
        """Addresses of a run's parameters, of the tables, and of its x."""
        tables = [0 if t is None else t.data_ptr() for t in self.tables]
        own = [kernels.address(p, run, self.runs) for p in self.parameters]
        return own, (tables[0], tables[1]), kernels.address(self.x, run, self.runs)


def _given(
    x: Tensor, parameters: Sequence[Tensor | None], cos: Tensor | None, sin: Tensor | None, kind: Kind
) -> _Given:
    if x.dim() != 3 or len(parameters) != PARAMETERS or any(parameters[i] is None for i in (4, 6, 8, 10, 12, 16)):
        raise ValueError(f"block: found x {tuple(x.shape)} and {len(parameters)} parameters; expected B×T×D, and "
                         f"{PARAMETERS} of which none of q, k, v, out, w1, w2 is missing")  # fmt: skip
    biases_alone = any(parameters[i] is None and parameters[i + 1] is not None for i in range(0, PARAMETERS, 2))
    if biases_alone:
        raise ValueError("block: found a bias without its weight; expected both, or neither")
    if (kind.activation == "swiglu") != (parameters[14] is not None) or kind.window < 0:
        raise ValueError(f"block: found {kind.activation}, window {kind.window}; expected W3 with swiglu alone, and a "
                         "window of 0 or more")  # fmt: skip
    unnormed = parameters[0] is None and parameters[2] is None
    normed = parameters[0] is not None and parameters[2] is not None
    if not (unnormed if kind.norm == "none" else normed and kind.norm in ("rms", "layer")):
        raise ValueError(f"block: found norm {kind.norm}; expected none, or rms or layer and their weights")
    (B, T, D), (H, G) = x.shape, (kind.heads, kind.kv_heads)
    first = cast(Tensor, parameters[4])
    stacked, runs = first.shape[:-2], first.shape[:-2].numel()
    K, wide, kept = _shapes(x, parameters, kind)
    heads = G and H % G == 0 and K % 8 == 0 and 0 < K <= kernels.WIDEST_HEAD
    if not heads or len(stacked) > 1 or not runs or B % runs or T < 1:
        raise ValueError(f"block: found q {tuple(first.shape)} for {H} heads of queries, {G} of keys, {B} windows; "
                         "expected heads of a multiple of 8, and as many windows for each run")  # fmt: skip
    widths = {"D": D, "H·K": H * K, "G·K": G * K, "F": wide}
    if any(w % STEP or not w for w in widths.values()):
        raise ValueError(f"block: found widths {widths}; expected multiples of {STEP}")
    outs = ((H * K, D), (G * K, D), (G * K, D), (D, H * K), (wide, D), (wide, D), (D, wide))
    shapes = [(D,)] * 4 + [shape for o, i in outs for shape in ((o, i), (o,))]
    wanted = [(x, x.shape), (cos, (T, K // 2)), (sin, (T, K // 2))]
    wanted += [(p, (*stacked, *shape)) for p, shape in zip(parameters, shapes, strict=True)]
    for tensor, shape in wanted:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_cpu):
            raise ValueError(f"block: found {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device} for x "
                             f"{tuple(x.shape)}; expected float32 on the CPU, {tuple(shape)}")  # fmt: skip
    if (cos is None) != (sin is None):
        raise ValueError("block: found one table of rotary positions; expected both or none")
    ready = [None if t is None else kernels.aligned(t.contiguous()) for t, _ in wanted]
    sizes = (B // runs, T, D, H, G, K, wide)
    return _Given(cast(Tensor, ready[0]), ready[3:], ready[1:3], runs, sizes, kept)


def _forward(x: Tensor, parameters: Sequence[Tensor | None], cos: Tensor | None, sin: Tensor | None,
             *kind: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = _given(x, parameters, cos, sin, Kind(*kind))
    y, kept = kernels.same(given.x), x.new_empty(given.kept)
    for run in range(given.runs if x.numel() else 0):
        own, tables, x_at = given.at(run)
        kept_at = kernels.address(kept, run, given.runs), given.kept // given.runs
        _core.block_forward(torch.get_num_threads(), given.sizes, kind[2:], own, tables, x_at, kept_at,
                            kernels.address(y, run, given.runs))  # fmt: skip
    return y, kept


def _backward(g: Tensor, x: Tensor, kept: Tensor, parameters: Sequence[Tensor | None], cos: Tensor | None,
              sin: Tensor | None, *kind: Any) -> list[Tensor]:  # fmt: skip
    given = _given(x, parameters, cos, sin, Kind(*kind))
    kernels.hold("block_backward", x, g)
    kernels.hold_shape("block_backward", kept, (given.kept,))
    g, kept = kernels.aligned(g.contiguous()), kernels.aligned(kept.contiguous())
    made = _gradients(given.x, given.parameters)
    if not x.numel():
        return [t.zero_() for t in made]
    each = iter(made)
    dx, *dparameters = [None if t is None else next(each) for t in (given.x, *given.parameters)]
    for run in range(given.runs):
        own, tables, x_at = given.at(run)
        kept_at = kernels.address(kept, run, given.runs), given.kept // given.runs
        to = [kernels.address(t, run, given.runs) for t in (dx, *dparameters)]
        _core.block_backward(torch.get_num_threads(), given.sizes, kind[2:], own, tables, x_at, kept_at,
                             kernels.address(g, run, given.runs), to[0], to[1:])  # fmt: skip
    return made


def _scratch(x: Tensor, parameters: Sequence[Tensor | None], kept: int) -> int:
    matrices = [p for p in parameters[4::2] if p is not None]
    runs = matrices[0].shape[:-2].numel()
    return (sum(p.numel() for p in matrices) + kept) // runs


def _scratch_of_backward(g: Tensor, x: Tensor, kept: Tensor, parameters: Sequence[Tensor | None], *_: object) -> int:
    """The gradients of all that was kept, and what the matrices' are made of: f(x) of each."""
    (B, T, D), out, up = x.shape, parameters[10], parameters[12]
    assert out is not None and up is not None
    return _scratch(x, parameters, kept.numel() + B * T * (2 * D + out.shape[-1] + up.shape[-2]))


kernels.SCRATCH["bytekiln::block"] = lambda x, parameters, *_: _scratch(x, parameters, 0)
kernels.SCRATCH["bytekiln::block_backward"] = _scratch_of_backward
_library.impl("block", _forward, "CPU")
_library.impl("block_backward", _backward, "CPU")
torch.library.register_fake("bytekiln::block", _made, lib=_library)
torch.library.register_fake("bytekiln::block_backward", lambda g, x, kept, parameters, *_: _gradients(x, parameters),
                            lib=_library)  # fmt: skip
_library.impl("block", lambda x, parameters, cos, sin, *kind: _Block.apply(Kind(*kind), cos, sin, x, *parameters),
              "Autograd")  # fmt: skip
