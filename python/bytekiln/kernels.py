"""Attention, activations, RMSNorm and dropout on the CPU in float32: operators of torch whose work the Rust core does.

In: float32 tensors on the CPU; activations and dropout take bf16 ones, too, and round once. Out: the same function that
torch has, sooner: torch's own kernels take two to four times the time, dropout twenty (`docs/performance.md`). Called
by `attention` and `model`, which ask `attends`, `activates` and `normalises` first and leave everything else to torch.
They use as many threads as torch, and torch's own where it has GNU's OpenMP or one that can stand in for it; no result
depends on their number.

They are operators, so that a compiled model, a simulation without contents and a profile see each as one node, under
the names `bytekiln::…`. The gradient of a gradient is there for dropout alone; asking for another is an error.

Shapes are suffixes of names: B batch, T queries, S keys, H heads of queries, G heads of keys and values, K head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.autograd import Function

from bytekiln import _core

WIDEST_HEAD = 128
"""Heads up to here, in steps of 8, the core takes."""
KINDS = ("gelu", "gelu_tanh", "silu", "relu2")
"""Activations of one argument."""

_NUMBERS = (torch.float32, torch.bfloat16)
_left_to_torch = False
_SEEDS = 2**63 - 1
"""Seeds of dropout are below."""

_Strided: TypeAlias = tuple[int, tuple[int, int, int]]

SCRATCH: dict[str, Callable[..., int]] = {}
"""Numbers that the core works in, and keeps for the next call, by operator and its arguments; others need next to none.
Whoever counts a step's memory (`footprint`) must know: torch does not see them."""

library: Any = cast(Any, torch.library.Library)("bytekiln", "DEF")  # torch leaves it untyped
_SIGHT = "bool causal, int window"
for _schema in (
    "activation(Tensor x, str kind) -> Tensor",
    "activation_backward(Tensor g, Tensor x, str kind) -> Tensor",
    "dropout(Tensor x, float rate, Tensor seed) -> Tensor",
    "swiglu(Tensor a, Tensor b) -> Tensor",
    "swiglu_backward(Tensor g, Tensor a, Tensor b) -> (Tensor, Tensor)",
    "rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward(Tensor g, Tensor x, Tensor scales, Tensor? weight) -> (Tensor, Tensor)",
    f"scaled_dot_product_attention(Tensor q, Tensor k, Tensor v, {_SIGHT}) -> (Tensor, Tensor)",
    "scaled_dot_product_attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, "
    f"{_SIGHT}) -> (Tensor, Tensor, Tensor)",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_ops: Any = torch.ops.bytekiln


def _gomp_parallel() -> int:
    """Address of the function that starts torch's own threads, or 0; a library's symbols are also its dependencies'."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):  # another OpenMP, as on macOS, or none
        return 0


_core.borrow_threads(_gomp_parallel())


# --- activations ---------------------------------------------------------------------------------------------------


def activates(x: Tensor) -> bool:
    """Whether the core computes activations of this tensor, and drops numbers of it: float32 or bf16 on the CPU.

    Not where anything is compiled or transformed. A compiler fuses activations with their neighbours, which is better
    still, and draws masks itself.
    """
    return not _left_to_torch and _takes(x)


def is_left_to_torch() -> bool:
    """Whether this is inside of `left_to_torch`."""
    return _left_to_torch


def _takes(x: Tensor) -> bool:
    usual = x.is_cpu and x.dtype in _NUMBERS and not torch.compiler.is_compiling()
    return usual and not _transformed() and torch._C._get_tracing_state() is None


@contextmanager
def left_to_torch() -> Iterator[None]:
    """In here nothing `activates`, no linear map is the core's, and dropout is CUDA's: what is kept is kept on a GPU.

    RMSNorm stays the core's: CUDA's keeps the same, torch's for the CPU more.
    """
    global _left_to_torch
    before, _left_to_torch = _left_to_torch, True
    try:
        yield
    finally:
        _left_to_torch = before


def normalises(x: Tensor) -> bool:
    """Whether the core has RMSNorm for this tensor: as `activates`, float32 alone."""
    return x.dtype == torch.float32 and _takes(x)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: they need what torch's own operators have."""
    # Not `peek_interpreter_stack() is not None`: a model that is being compiled takes that for true.
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def hold(name: str, *tensors: Tensor, bf16: bool = False) -> None:
    """The core is given addresses and one length: whatever differs would be read from foreign memory.

    Raises:
        ValueError: not all are float32 on the CPU, or with `bf16` all of that, and of one shape.
    """
    first = tensors[0]
    dtype = first.dtype if bf16 and first.dtype in _NUMBERS else torch.float32
    for x in tensors:
        if not x.is_cpu or x.dtype != dtype or x.shape != first.shape:
            kinds = "float32 or bf16" if bf16 else "float32"
            found = f"{tuple(x.shape)} of {x.dtype} on {x.device} beside {tuple(first.shape)} of {first.dtype}"
            raise ValueError(f"{name}: found {found}; expected {kinds} on the CPU, all of one shape")


def hold_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """As `hold`, for one float32 tensor that must be of this shape."""
    if not x.is_cpu or x.dtype != torch.float32 or tuple(x.shape) != tuple(shape):
        found = f"{tuple(x.shape)} of {x.dtype} on {x.device}"
        raise ValueError(f"{name}: found {found}; expected float32 on the CPU, {tuple(shape)}")


def _checked(name: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors as the core reads them, contiguous and aligned; raises as `hold`."""
    hold(name, *tensors, bf16=True)
    return [aligned(x.contiguous()) for x in tensors]


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def aligned(x: Tensor) -> Tensor:
    """A copy where numbers stand at odd addresses, as of a buffer that was cut anywhere."""
    return x.clone() if x.data_ptr() % x.element_size() else x


def address(x: Tensor | None, part: int = 0, parts: int = 1) -> int:
    """Where part number `part` of `parts` equal ones of a contiguous tensor begins; 0: there is no tensor."""
    return 0 if x is None else x.data_ptr() + x.numel() // parts * part * x.element_size()


def activation(x: Tensor, kind: str) -> Tensor:
    """The activation of the name `kind`, one of `KINDS`; keeps nothing but x for the backward."""
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Activation.apply(x, kind))
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, _ops.activation(x, kind))


def torch_dropout(x: Tensor, rate: float) -> Tensor:
    """torch's own, which on CUDA keeps a byte a number for the backward, and on a CPU a mask of x's type."""
    return torch.native_dropout(x, rate, True)[0] if _left_to_torch else F.dropout(x, rate)


def dropout(x: Tensor, rate: float) -> Tensor:
    """x / (1 - rate), each number 0 with probability `rate`, where `activates`; keeps nothing for the backward.

    Which ones is a function of a seed, drawn from torch's generator, and of their places: whoever sets the generator
    back gets the same ones again. A number that is dropped is 0 whatever it was, NaN too.
    """
    return dropout_of(x, rate, torch.randint(_SEEDS, (), device=x.device))


def dropout_of(x: Tensor, rate: float, seed: Tensor) -> Tensor:
    """`dropout` with its seed, int64 0-D: nothing waits for its number but the core."""
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Dropout.apply(x, rate, seed))
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, _ops.dropout(x, rate, seed))


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) · b of two tensors of one shape; keeps nothing but them for the backward."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return cast(Tensor, _SwiGLU.apply(a, b))
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, _ops.swiglu(a, b))


def rms_norm(x_xD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last axis where `activates`; keeps x and a number a row for the backward.

    What is stored as B×T×H×K and seen as B×H×T×K, as queries and keys are, is not copied.
    """
    if torch.is_grad_enabled() and (x_xD.requires_grad or (weight_D is not None and weight_D.requires_grad)):
        return cast("tuple[Tensor, Tensor]", _RMSNorm.apply(x_xD, weight_D, eps))[0]
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, _ops.rms_norm(x_xD, weight_D, eps)[0])


def products(x_xD: Tensor, weights_FxD: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x wᵀ of several w: torch's own products as one operation, whose gradients by x add up inside the products.

    As single operations they cost an addition of x's size and a dozen entries of autograd's for each w.
    """
    return cast("tuple[Tensor, ...]", _Products.apply(x_xD, *weights_FxD))


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.save_for_backward(x, *weights)
        return tuple(torch.nn.functional.linear(x, w) for w in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        refuse_a_graph()
        x, *weights = ctx.saved_tensors
        rows, wanted = x.reshape(-1, x.shape[-1]), ctx.needs_input_grad
        g_rows = [g.reshape(-1, g.shape[-1]) for g in gradients]
        dx = None
        if wanted[0]:
            dx = g_rows[0] @ weights[0]
            for g, w in zip(g_rows[1:], weights[1:], strict=True):
                dx = torch.addmm(dx, g, w)
            dx = dx.view(x.shape)
        return dx, *(g.t() @ rows if wants else None for g, wants in zip(g_rows, wanted[1:], strict=True))


class _Activation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:  # noqa: ANN401 - autograd's own object
        ctx.save_for_backward(x)
        ctx.kind = kind
        with torch._C._AutoDispatchBelowAutograd():
            return cast(Tensor, _ops.activation(x, kind))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        refuse_a_graph()
        return cast(Tensor, _ops.activation_backward(g, *ctx.saved_tensors, ctx.kind)), None


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seed: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(seed)
        ctx.rate = rate
        with torch._C._AutoDispatchBelowAutograd():
            return cast(Tensor, _ops.dropout(x, rate, seed))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        # A linear map and its own transpose: a graph of it is right, too.
        return dropout_of(g, ctx.rate, *ctx.saved_tensors), None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(a, b)
        with torch._C._AutoDispatchBelowAutograd():
            return cast(Tensor, _ops.swiglu(a, b))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        refuse_a_graph()
        return cast("tuple[Tensor, Tensor]", _ops.swiglu_backward(g, *ctx.saved_tensors))


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        with torch._C._AutoDispatchBelowAutograd():
            y, scales = _ops.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, scales, weight)
        ctx.mark_non_differentiable(scales)
        ctx.set_materialize_grads(False)
        return y, scales

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        refuse_a_graph()
        if g is None:
            return (None,) * 3
        dx, dweight = _ops.rms_norm_backward(g, *ctx.saved_tensors)
        return dx, dweight if ctx.needs_input_grad[1] else None, None


def _rms_norm_with_gradient(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", _RMSNorm.apply(x, weight, eps))


def refuse_a_graph() -> None:
    # Autograd would take the slope for a constant and give wrong numbers. Grad mode is on in a backward if and only if
    # it was called with create_graph.
    if torch.is_grad_enabled():
        raise RuntimeError("kernels: found a backward with create_graph; expected none, for there is no gradient of a "
                           "gradient here: torch's own functions have one, which float64 goes through")  # fmt: skip


def same(x: Tensor) -> Tensor:
    """A contiguous tensor of the same shape and type."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _activation(x: Tensor, kind: str) -> Tensor:
    (x,) = _checked("activation", x)
    y = torch.empty_like(x)
    _core.activation_forward(torch.get_num_threads(), kind, _is_bf16(x), x.numel(), x.data_ptr(), y.data_ptr())
    return y


def _activation_backward(g: Tensor, x: Tensor, kind: str) -> Tensor:
    g, x = _checked("activation_backward", g, x)
    dx = torch.empty_like(x)
    addresses = (g.data_ptr(), x.data_ptr(), dx.data_ptr())
    _core.activation_backward(torch.get_num_threads(), kind, _is_bf16(x), x.numel(), *addresses)
    return dx


def _dropout(x: Tensor, rate: float, seed: Tensor) -> Tensor:
    if not x.is_cpu or x.dtype not in _NUMBERS or not 0 <= rate < 1:
        raise ValueError(f"dropout: found rate {rate} for {x.dtype} on {x.device}; expected a rate from 0 below 1, and "
                         "float32 or bf16 on the CPU")  # fmt: skip
    if seed.dtype != torch.int64 or seed.dim() or not seed.is_cpu:
        raise ValueError(f"dropout: found seed {seed.dtype} {tuple(seed.shape)}; expected one int64 on the CPU")
    x, number = aligned(x.contiguous()), int(seed.item()) % 2**64
    y = torch.empty_like(x)
    _core.dropout(torch.get_num_threads(), number, rate, _is_bf16(x), x.numel(), x.data_ptr(), y.data_ptr())
    return y


def _swiglu(a: Tensor, b: Tensor) -> Tensor:
    a, b = _checked("swiglu", a, b)
    y = torch.empty_like(a)
    addresses = (a.data_ptr(), b.data_ptr(), y.data_ptr())
    _core.swiglu_forward(torch.get_num_threads(), _is_bf16(a), a.numel(), *addresses)
    return y


def _swiglu_backward(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    g, a, b = _checked("swiglu_backward", g, a, b)
    da, db = torch.empty_like(a), torch.empty_like(b)
    addresses = (g.data_ptr(), a.data_ptr(), b.data_ptr(), da.data_ptr(), db.data_ptr())
    _core.swiglu_backward(torch.get_num_threads(), _is_bf16(a), a.numel(), *addresses)
    return da, db


def _rows(x: Tensor) -> Tensor:
    """The tensor with its rows one behind the other in memory, in whatever order."""
    if x.is_contiguous() or (x.dim() == 4 and x.transpose(1, 2).is_contiguous()):
        return aligned(x)
    return x.contiguous()


def _checked_weight(x: Tensor, weight: Tensor | None) -> Tensor:
    """The weight, or an empty one; raises as `hold`."""
    if weight is None:
        return x.new_empty(0)
    hold("rms_norm", weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: found weight {tuple(weight.shape)} for {tuple(x.shape)}; expected {x.shape[-1:]}")
    return aligned(weight.contiguous())


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    hold("rms_norm", x)
    x, w = _rows(x), _checked_weight(x, weight)
    y, width = torch.empty_like(x), max(1, x.shape[-1])
    scales = x.new_empty(x.numel() // width)
    addresses = (x.data_ptr(), w.data_ptr(), y.data_ptr(), scales.data_ptr())
    if x.numel():
        _core.rms_norm_forward(torch.get_num_threads(), width, scales.numel(), eps, *addresses)
    return y, scales


def _rms_norm_backward(g: Tensor, x: Tensor, scales: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    hold("rms_norm_backward", g, x)
    x, w = _rows(x), _checked_weight(x, weight)
    width = max(1, x.shape[-1])
    hold("rms_norm_backward", scales, x.new_empty(x.numel() // width))
    if g.stride() != x.stride() or g.data_ptr() % g.element_size():
        g = torch.empty_like(x).copy_(g)
    dx, dw = torch.empty_like(x), torch.zeros_like(w)
    addresses = (g.data_ptr(), x.data_ptr(), scales.data_ptr(), w.data_ptr(), dx.data_ptr(), dw.data_ptr())
    if x.numel():
        _core.rms_norm_backward(torch.get_num_threads(), width, scales.numel(), *addresses)
    return dx, dw


# --- attention -----------------------------------------------------------------------------------------------------


def attends(q_BxHxTxK: Tensor) -> bool:
    """Whether the core's attention takes these queries: float32 on the CPU, heads of a width that it knows."""
    return _readable(q_BxHxTxK) and not _transformed()


def _readable(x_BxHxTxK: Tensor) -> bool:
    K = x_BxHxTxK.shape[-1]
    return x_BxHxTxK.is_cpu and x_BxHxTxK.dtype == torch.float32 and K % 8 == 0 and 0 < K <= WIDEST_HEAD


def attention(q_BxHxTxK: Tensor, k_BxGxSxK: Tensor, v_BxGxSxK: Tensor, causal: bool, window: int) -> Tensor:
    """softmax(q kᵀ / √K) v where `attends`; query t stands at key S-T+t.

    Args:
        q_BxHxTxK: any strides, the last best 1; T ≤ S.
        k_BxGxSxK: with `v_BxGxSxK`, G a divisor of H.
        causal: nothing behind a query's own place.
        window: at most so many places back, its own included; 0: any number.

    Returns:
        out_BxHxTxK, stored as B×T×H×K: the way to B×T×D copies nothing. So are the gradients.
    """
    if torch.compiler.is_compiling():
        return cast(Tensor, _ops.scaled_dot_product_attention(q_BxHxTxK, k_BxGxSxK, v_BxGxSxK, causal, window)[0])
    return _attention_with_gradient(q_BxHxTxK, k_BxGxSxK, v_BxGxSxK, causal, window)[0]


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, log_sums = _ops.scaled_dot_product_attention(q, k, v, causal, window)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.sight = causal, window
        ctx.mark_non_differentiable(log_sums)
        ctx.set_materialize_grads(False)
        return out, log_sums

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        refuse_a_graph()
        if g is None:
            return (None,) * 5
        return (*_ops.scaled_dot_product_attention_backward(g, *ctx.saved_tensors, *ctx.sight), None, None)


def _attention_with_gradient(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return cast("tuple[Tensor, Tensor]", _Attention.apply(q, k, v, causal, window))
    with torch._C._AutoDispatchBelowAutograd():
        return cast("tuple[Tensor, Tensor]", _ops.scaled_dot_product_attention(q, k, v, causal, window))


def _made(like_BxHxTxK: Tensor) -> Tensor:
    """A tensor of this shape, stored as B×T×H×K."""
    B, H, T, K = like_BxHxTxK.shape
    return like_BxHxTxK.new_empty(B, T, H, K).transpose(1, 2)


def _strided(x: Tensor) -> tuple[Tensor, _Strided]:
    """The tensor with its last stride 1, and where it is; whoever uses the latter must hold the former."""
    if x.stride(-1) != 1 or x.data_ptr() % x.element_size():
        x = x.clone(memory_format=torch.contiguous_format)
    batch, head, time, _ = x.stride()
    return x, (x.data_ptr(), (batch, head, time))


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int]:
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape != (B, G, S, K) or not G or H % G or T > S:
        raise ValueError(f"attention: found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected "
                         "B×H×T×K and twice B×G×S×K with H a multiple of G and T ≤ S")  # fmt: skip
    if not (_readable(q) and _readable(k) and _readable(v)):
        raise ValueError(f"attention: found {q.dtype} on {q.device}, heads {K} wide; expected float32 on the CPU, and "
                         f"a multiple of 8 up to {WIDEST_HEAD}")  # fmt: skip
    return B, H, G, T, S, K


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int) -> tuple[Tensor, Tensor]:
    sizes = _sizes(q, k, v)
    if window < 0:
        raise ValueError(f"attention: found window {window}; expected 0 or more")
    (q, q_at), (k, k_at), (v, v_at) = _strided(q), _strided(k), _strided(v)
    out = _made(q)
    log_sums = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    threads = torch.get_num_threads()
    _core.attention_forward(threads, sizes, causal, window, q_at, k_at, v_at, out.data_ptr(), log_sums.data_ptr())
    return out, log_sums


def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, causal: bool, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _sizes(q, k, v)
    hold("attention_backward", q, g, out)
    hold("attention_backward", log_sums, q[..., 0].transpose(1, 2))
    (g, g_at), (out, out_at) = _strided(g), _strided(out)
    (q, q_at), (k, k_at), (v, v_at) = _strided(q), _strided(k), _strided(v)
    log_sums = log_sums.contiguous()
    dq, dk, dv = _made(q), _made(k), _made(v)
    inputs = (g_at, q_at, k_at, v_at, out_at, log_sums.data_ptr())
    threads = torch.get_num_threads()
    _core.attention_backward(threads, sizes, causal, window, *inputs, dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
    return dq, dk, dv


# --- what the operators do with real tensors, with tensors that have no contents, and where a gradient is wanted -----

for _name, _do, _shapes in (
    ("activation", _activation, lambda x, kind: same(x)),
    ("activation_backward", _activation_backward, lambda g, x, kind: same(x)),
    ("dropout", _dropout, lambda x, rate, seed: same(x)),
    ("swiglu", _swiglu, lambda a, b: same(a)),
    ("swiglu_backward", _swiglu_backward, lambda g, a, b: (same(a), same(b))),
    (
        "rms_norm",
        _rms_norm,
        lambda x, weight, eps: (torch.empty_like(x), x.new_empty(x.numel() // max(1, x.shape[-1]))),
    ),
    (
        "rms_norm_backward",
        _rms_norm_backward,
        lambda g, x, scales, weight: (torch.empty_like(x), x.new_empty(0 if weight is None else weight.shape[0])),
    ),
    (
        "scaled_dot_product_attention",
        _forward,
        lambda q, k, v, *_: (_made(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])),
    ),
    (
        "scaled_dot_product_attention_backward",
        _backward,
        lambda g, q, k, v, *_: (_made(q), _made(k), _made(v)),
    ),
):
    library.impl(_name, _do, "CPU")
    torch.library.register_fake(f"bytekiln::{_name}", _shapes, lib=library)
library.impl("scaled_dot_product_attention", _attention_with_gradient, "Autograd")
library.impl("activation", activation, "Autograd")
library.impl("dropout", dropout_of, "Autograd")
library.impl("swiglu", swiglu, "Autograd")
library.impl("rms_norm", _rms_norm_with_gradient, "Autograd")
