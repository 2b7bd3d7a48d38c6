"""Linear maps y = f(x) Wᵀ + b (+ residual) on the CPU in float32, f being a norm or an activation, as one operation.

In: rows, the parameters of a norm and of one or several maps of its result. Out: each map's result. Called by `model`,
which asks `takes` and `are_plain` first and leaves everything else to torch, where each of the steps is an operation
of its own. The work is the Rust core's (`rust/kernels/src/linear.rs`), on torch's threads; for the backward x alone is
kept. `docs/performance.md` has what is gained. The gradient of a gradient is an error, as in `kernels`.

Shapes are suffixes of names: N rows in any number of dimensions, D their width, E the width of what a map makes; with
K runs stacked (`stack`) a weight is K×E×D, a bias or a norm's weight K×E and K×D, and the rows fall into K equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function

from bytekiln import _core, kernels

STEP = 32
"""Widths in and out are multiples of this."""
WIDEST = 384
"""The widest stream whose maps are the core's. With AVX2 a step of 4 × 128 takes two thirds of torch's time, a block of
384 takes 0.93; one of 768 would take 1.15, for torch's products are the better the larger they are."""
LEAST_ROWS = 8
"""Fewer rows are left to torch."""

_KINDS = (nn.Parameter, FakeTensor)
"""Parameters with numbers of their own, or, where a step is only simulated, without contents."""
_any_global_hook: Any = cast(Any, nn.modules.module)._has_any_global_hook
Parameters: TypeAlias = "tuple[Tensor, Tensor | None]"
"""(weight, bias)"""


class Before(NamedTuple):
    """f: what is done to each row first."""

    kind: str = "none"
    """none, rms or layer (a norm), one of `kernels.KINDS`, or swiglu: silu(x) · second."""
    weight: Tensor | None = None
    """A norm's, D numbers; with `bias` and `eps`."""
    bias: Tensor | None = None
    eps: float = 0.0


NOTHING = Before()


def takes(x_NxD: Tensor) -> bool:
    """Whether the core has what is mapped from, and back to, a stream of such rows.

    Float32 on the CPU, neither compiled nor transformed, not too wide.
    """
    D = x_NxD.shape[-1]
    return (
        D <= WIDEST
        and D % STEP == 0
        and x_NxD.numel() >= LEAST_ROWS * D
        and kernels.normalises(x_NxD)
        and not torch.is_autocast_enabled("cpu")
        and not kernels.is_left_to_torch()
    )


def are_plain(*modules: nn.Module) -> bool:
    """Whether these modules do nothing but what they stand for: norms, linear maps of widths that the core takes.

    Not where somebody listens to one of them (a hook), or another class or function took its place.
    """
    return not _any_global_hook() and all(_is_plain(m) for m in modules)


def is_untouched(m: nn.Module) -> bool:
    """Whether calling a module is calling its class's `forward`: no hook, no function put in its place."""
    return not (
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
    )


def _is_plain(m: nn.Module) -> bool:
    if not is_untouched(m):
        return False
    kind = type(m)  # what a module lacks is searched for long; its class is asked instead
    is_map = getattr(kind, "stands_for", kind) is nn.Linear
    if not is_map and "before" not in kind.__dict__:  # not inherited: whoever inherits may compute otherwise
        return False
    own = m._parameters
    weight = own.get("weight")
    if any(p is not None and (type(p) not in _KINDS or p.dtype != torch.float32) for p in own.values()):
        return False
    if not is_map:
        return weight is not None or kind.__dict__["before"] is NOTHING
    if weight is None:
        return False
    E, D = weight.shape[-2:]
    return E % STEP == 0 and D % STEP == 0


def parameters_of(m: nn.Module) -> Parameters:
    """Weight and bias of a plain module, without the search that its attributes are found by."""
    own = m._parameters
    return cast(Tensor, own["weight"]), own.get("bias")


def of_one(x_NxD: Tensor, *maps: nn.Linear) -> Sequence[Tensor]:
    """What several linear maps make of one x. Modules that stand in for linear maps may know how (`together`)."""
    together = getattr(maps[0], "together", None)
    if together is not None:
        return cast(Sequence[Tensor], together(x_NxD, maps))
    plain = all(type(m) is nn.Linear and is_untouched(m) and m.bias is None for m in maps)
    if plain and not _any_global_hook() and kernels.normalises(x_NxD) and not torch.is_autocast_enabled("cpu"):
        return kernels.products(x_NxD, [m.weight for m in maps])
    return [m(x_NxD) for m in maps]


def linear(
    x_NxD: Tensor, maps: Sequence[nn.Module], before: Before = NOTHING, second_NxD: Tensor | None = None
) -> Sequence[Tensor]:
    """f(x) Wᵀ + b of each map, where `takes` and `are_plain`."""
    return _apply(x_NxD, second_NxD, before, None, maps)


def added(
    x_NxD: Tensor,
    to_NxE: Tensor | None,
    last: nn.Module,
    before: Before = NOTHING,
    second_NxD: Tensor | None = None,
) -> Tensor:
    """f(x) Wᵀ + b, plus `to` unless it is None, where `takes` and `are_plain`."""
    return _apply(x_NxD, second_NxD, before, to_NxE, [last])[0]


def _apply(
    x: Tensor, second: Tensor | None, before: Before, residual: Tensor | None, maps: Sequence[nn.Module]
) -> Sequence[Tensor]:
    weights, biases = zip(*map(parameters_of, maps), strict=True)
    norm = before.weight, before.bias
    if torch.is_grad_enabled():
        return cast("Sequence[Tensor]", _Linear.apply(before.kind, before.eps, x, second, residual, *norm, *weights,
                                                      *biases))  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():
        return cast("Sequence[Tensor]", _ops.linear(x, second, before.kind, before.eps, *norm, weights, biases,
                                                    residual))  # fmt: skip


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's own object
        kind: str,
        eps: float,
        x: Tensor,
        second: Tensor | None,
        residual: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = (len(parameters) - 2) // 2
        ctx.save_for_backward(x, second, *parameters)
        ctx.before = kind, eps
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_ops.linear(x, second, kind, eps, *parameters[:2], parameters[2 : 2 + count],
                                     parameters[2 + count :], residual))  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        kernels.refuse_a_graph()
        x, second, *parameters = ctx.saved_tensors
        count = (len(parameters) - 2) // 2
        given = x, second, *ctx.before, *parameters[:2], parameters[2 : 2 + count], parameters[2 + count :]
        made = iter(_ops.linear_backward(g, *given))
        by = [None if p is None else next(made) for p in (x, second, *parameters)]
        return None, None, *by[:2], g[0] if ctx.needs_input_grad[4] else None, *by[2:]


# --- the operators -------------------------------------------------------------------------------------------------

_library: Any = kernels.library
_INPUTS = "Tensor x, Tensor? second, str before, float eps, Tensor? norm, Tensor? norm_bias, Tensor[] weights"
_library.define(f"linear({_INPUTS}, Tensor?[] biases, Tensor? residual) -> Tensor[]",
                tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip
_library.define(f"linear_backward(Tensor[] g, {_INPUTS}, Tensor?[] biases) -> Tensor[]",
                tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip
_ops: Any = torch.ops.bytekiln


def _results(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], w.shape[-2]) for w in weights]


def _gradients(*given: Tensor | None) -> list[Tensor]:
    """A tensor for each that is there."""
    return [kernels.same(p) for p in given if p is not None]


class _Given(NamedTuple):
    """What the core reads, contiguous and checked: it is given addresses, and what differs would be foreign memory."""

    x: Tensor
    second: Tensor | None
    norm: list[Tensor | None]
    weights: list[Tensor]
    biases: list[Tensor | None]
    runs: int
    rows: int

    def sizes(self) -> tuple[int, int]:
        return self.rows // self.runs, self.x.shape[-1]


def _given(
    x: Tensor, second: Tensor | None, before: str, norm: Sequence[Tensor | None], weights: Sequence[Tensor],
    biases: Sequence[Tensor | None]
) -> _Given:  # fmt: skip
    if not weights or (norm[0] is None and norm[1] is not None):
        raise ValueError("linear: found no weights, or a norm's bias alone; expected at least one, and a norm's weight")
    D, stacked = x.shape[-1], weights[0].shape[:-2]
    runs = stacked.numel()
    rows = x.numel() // max(1, D)
    wanted = [(x, x.shape), (second, x.shape), *((n, (*stacked, D)) for n in norm)]
    wanted += [(w, (*stacked, w.shape[-2], D)) for w in weights]
    wanted += [(b, (*stacked, w.shape[-2])) for b, w in zip(biases, weights, strict=True)]
    for tensor, shape in wanted:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_cpu):
            raise ValueError(f"linear: found {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device} for x "
                             f"{tuple(x.shape)}; expected float32 on the CPU, {tuple(shape)}")  # fmt: skip
    if len(stacked) > 1 or not runs or rows % runs:
        raise ValueError(f"linear: found weights {tuple(weights[0].shape)} for {rows} rows; expected runs × out × in, "
                         "or out × in, and as many rows for each run")  # fmt: skip
    if D % STEP or not D or any(w.shape[-2] % STEP or not w.shape[-2] for w in weights):
        widths = ", ".join(str(w.shape[-2]) for w in weights)
        raise ValueError(f"linear: found widths {D} in, {widths} out; expected multiples of {STEP}")
    if (before == "swiglu") != (second is not None) or (before in ("rms", "layer")) != (norm[0] is not None):
        raise ValueError(f"linear: found {before} before it; expected a second tensor with swiglu alone, a norm's "
                         "weight with rms and layer alone")  # fmt: skip
    ready = [None if t is None else kernels.aligned(t.contiguous()) for t, _ in wanted]
    ready_x = cast(Tensor, ready[0])
    count = len(weights)
    return _Given(ready_x, ready[1], ready[2:4], cast("list[Tensor]", ready[4 : 4 + count]), ready[4 + count :], runs,
                  rows)  # fmt: skip


def _forward(
    x: Tensor, second: Tensor | None, before: str, eps: float, norm: Tensor | None, norm_bias: Tensor | None,
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None
) -> list[Tensor]:  # fmt: skip
    given = _given(x, second, before, (norm, norm_bias), weights, biases)
    made = _results(given.x, given.weights)
    if residual is not None:
        if len(made) > 1:
            raise ValueError(f"linear: found a residual for {len(made)} maps; expected one map")
        kernels.hold("linear", made[0], residual)
        residual = kernels.aligned(residual.contiguous())
    if not given.rows:
        return made
    for run in range(given.runs):
        x_at, second_at, residual_at, norm_at, bias_at = (
            kernels.address(t, run, given.runs) for t in (given.x, given.second, residual, *given.norm)
        )
        _core.linear_forward(
            torch.get_num_threads(), given.sizes(), (before, eps), (x_at, second_at), (norm_at, bias_at),
            _maps(given, run), residual_at, [kernels.address(y, run, given.runs) for y in made],
        )  # fmt: skip
    return made


def _maps(given: _Given, run: int) -> list[tuple[int, int, int]]:
    return [
        (kernels.address(w, run, given.runs), kernels.address(b, run, given.runs), w.shape[-2])
        for w, b in zip(given.weights, given.biases, strict=True)
    ]


def _backward(
    g: Sequence[Tensor], x: Tensor, second: Tensor | None, before: str, eps: float, norm: Tensor | None,
    norm_bias: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:  # fmt: skip
    given = _given(x, second, before, (norm, norm_bias), weights, biases)
    for w, got in zip(given.weights, g, strict=True):
        kernels.hold_shape("linear_backward", got, (*x.shape[:-1], w.shape[-2]))
    g = [kernels.aligned(y.contiguous()) for y in g]
    of = (given.x, given.second, *given.norm, *given.weights, *given.biases)
    made = _gradients(*of)
    if not given.rows:
        return [t.zero_() for t in made]
    each = iter(made)
    dx, dsecond, dnorm, dnorm_bias, *rest = [None if t is None else next(each) for t in of]
    count = len(weights)
    for run in range(given.runs):
        x_at, second_at, dx_at, dsecond_at, norm_at, bias_at, dnorm_at, dbias_at, *to = (
            kernels.address(t, run, given.runs)
            for t in (given.x, given.second, dx, dsecond, *given.norm, dnorm, dnorm_bias, *rest)
        )
        _core.linear_backward(
            torch.get_num_threads(), given.sizes(), (before, eps), (x_at, second_at), (norm_at, bias_at),
            _maps(given, run), [kernels.address(y, run, given.runs) for y in g], (dx_at, dsecond_at),
            list(zip(to[:count], to[count:], strict=True)), (dnorm_at, dbias_at),
        )  # fmt: skip
    return made


def _scratch(x: Tensor, weights: Sequence[Tensor], rows: int) -> int:
    runs = weights[0].shape[:-2].numel()
    return sum(w.numel() for w in weights) // runs + rows * x.numel() // runs


kernels.SCRATCH["bytekiln::linear"] = lambda x, *given: _scratch(x, given[5], 0)
kernels.SCRATCH["bytekiln::linear_backward"] = lambda g, x, *given: _scratch(x, given[5], 1)
_library.impl("linear", _forward, "CPU")
_library.impl("linear_backward", _backward, "CPU")
torch.library.register_fake("bytekiln::linear", lambda x, *given: _results(x, given[5]), lib=_library)
torch.library.register_fake(
    "bytekiln::linear_backward",
    lambda g, x, second, before, eps, norm, norm_bias, weights, biases: _gradients(
        x, second, norm, norm_bias, *weights, *biases
    ),
    lib=_library,
)
_library.impl(
    "linear",
    lambda x, second, kind, eps, norm, norm_bias, weights, biases, residual: list(
        _Linear.apply(kind, eps, x, second, residual, norm, norm_bias, *weights, *biases)
    ),
    "Autograd",
)
