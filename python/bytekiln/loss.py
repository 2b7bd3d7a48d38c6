"""The training objective. In: what stands before the head, the head, and targets. Out: sums of losses.

Sums, not means, so that micro-steps and evaluation batches are weighted by their real targets: the loop divides.
Called by `objective`. The logits of a whole batch never exist: `chunked_cross_entropy` makes those of some positions,
takes loss and gradient from them and drops them. `plain_cross_entropy` is the slow, readable specification, held
equal by tests.

Shapes are suffixes of names: N positions of the batch (B·T), n positions of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from bytekiln.config import ModelConfig

IGNORED = -100
"""A target with this value does not count."""
CHUNK_BYTES = 32 * 2**20
"""fp32 logits of a chunk where its size is chosen here: what a last-level cache holds."""
PLAIN_BELOW = 2**17
"""Fewer logits than this take the plain path: so few cost less than the further operations of a chunk (one thread,
AVX2: 12 × 64 with V = 65 0.9 ms against 1.2 ms, with V = 256 alike; from there on the chunked path is the faster)."""
Spans = Callable[[int, int], Iterator[tuple[int, int]]]
"""(positions, chunk) → from where to where each piece goes, in order and without a gap. A piece longer than a chunk
stands for many of them in a simulation of memory: it gets room for its gradient and is not computed."""


def summed_cross_entropy(logits_BxTxV: Tensor, targets_BxT: Tensor) -> Tensor:
    """Sum over all real targets of -ln p(target), in nats and in fp32 whatever the logits' type."""
    logits_NxV = logits_BxTxV.flatten(0, 1)
    return F.cross_entropy(
        logits_NxV.to(_exact(logits_NxV)), targets_BxT.flatten(), reduction="sum", ignore_index=IGNORED
    )


def plain_cross_entropy(
    x_BxTxD: Tensor, head_VxD: Tensor, targets_BxT: Tensor, *, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """`chunked_cross_entropy` with all logits at once, differentiated by torch: the specification."""
    logits_BxTxV = F.linear(x_BxTxD, head_VxD)
    logits_BxTxV = logits_BxTxV.to(_exact(logits_BxTxV))
    if softcap:
        logits_BxTxV = softcap * torch.tanh(logits_BxTxV / softcap)
    nll = summed_cross_entropy(logits_BxTxV, targets_BxT)
    if not z_loss:
        return nll, nll.detach()
    z_BxT = logits_BxTxV.logsumexp(-1)
    return nll + z_loss * torch.where(targets_BxT != IGNORED, z_BxT.square(), 0.0).sum(), nll.detach()


def chunked_cross_entropy(
    x_BxTxD: Tensor,
    head_VxD: Tensor,
    targets_BxT: Tensor,
    *,
    softcap: float,
    z_loss: float,
    chunk: int,
    simulated: Spans | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear head, soft-cap and cross-entropy in one, some positions at a time.

    For real targets y, logits a = head·x and z = c·tanh(a/c) (z = a without a cap):

        total = Σ [ln Σ exp z - z_y] + z_loss · Σ (ln Σ exp z)²       (the z-loss of PaLM, Chowdhery et al. 2022)

    The head's products run in autocast's type where that is on, else in x's; everything behind them in fp32
    (float64 for float64).

    Args:
        x_BxTxD: features behind the last norm.
        head_VxD: the output matrix, also where it is the embedding.
        targets_BxT: int64 ids, or `IGNORED`.
        softcap: c, 0 for none.
        z_loss: weight of the second sum.
        chunk: positions whose logits exist at once; 0: all, by the plain path.
        simulated: the pieces to trace where there is nothing to compute (`footprint`).

    Returns:
        total (0-D, differentiable), and the first sum alone (0-D, detached): what is reported.
    """
    if not chunk:
        return plain_cross_entropy(x_BxTxD, head_VxD, targets_BxT, softcap=softcap, z_loss=z_loss)
    low = _product_type(x_BxTxD)
    x_NxD, targets_N = x_BxTxD.flatten(0, 1), targets_BxT.flatten()
    if torch.is_grad_enabled():
        total, nll = _FusedCrossEntropy.apply(x_NxD, head_VxD, targets_N, softcap, z_loss, chunk, low, simulated)
        return total, nll
    total, nll, _, _ = _sums(x_NxD, head_VxD, targets_N, softcap, z_loss, chunk, low, (False, False))
    return total, nll


def chunked_scores(
    x_BxTxD: Tensor, head_VxD: Tensor, targets_BxT: Tensor, *, softcap: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """What an evaluation asks: the sum of -ln p(target), and how many real targets the greatest logit hits.

    Arguments as `chunked_cross_entropy`, `chunk` at least 1; no gradient.

    Returns:
        0-D: nll_sum in fp32, correct_count in int64.
    """
    low = _product_type(x_BxTxD)
    x_NxD, targets_N, head_low_VxD = x_BxTxD.detach().flatten(0, 1), targets_BxT.flatten(), head_VxD.detach().to(low)
    nll, correct = torch.zeros((), dtype=_exact(x_NxD), device=x_NxD.device), torch.zeros_like(targets_N[:1]).sum()
    for x_nxD, targets_n in _chunks(x_NxD, targets_N, chunk):
        logits_nxV = _logits(x_nxD.to(low), head_low_VxD, softcap)
        nll = nll + F.cross_entropy(logits_nxV, targets_n, reduction="sum", ignore_index=IGNORED)
        correct = correct + (logits_nxV.argmax(-1) == targets_n).sum()
    return nll, correct


def positions_at_once(loss_chunk: int | str, x_BxTxD: Tensor, vocab_size: int) -> int:
    """The `chunk` for a batch: the config's, or for "auto" one that fits.

    On a CPU as many positions as keep the fp32 logits at 32 MB, in even parts; 0, the plain path, for less than
    `PLAIN_BELOW` logits. On an accelerator at least 4·D positions: each chunk reads and writes the head's gradient,
    V·D numbers in fp32, which n = 4·D positions of logits outweigh (by count of bytes; not measured).

    Args:
        loss_chunk: the config's field.
        x_BxTxD: the batch; its shape and device matter.
        vocab_size: rows of the head.
    """
    if loss_chunk != "auto":
        return int(loss_chunk)
    positions = x_BxTxD.shape[0] * x_BxTxD.shape[1]
    if positions * vocab_size < PLAIN_BELOW:
        return 0
    most = max(1, CHUNK_BYTES // (4 * vocab_size))
    if x_BxTxD.device.type != "cpu":
        most = max(most, 4 * x_BxTxD.shape[2])
    parts = -(-positions // most)
    return -(-positions // parts)


def _exact(tensor: Tensor) -> torch.dtype:
    """The type of sums and of softmax."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _product_type(x_BxTxD: Tensor) -> torch.dtype:
    kind = x_BxTxD.device.type
    if torch.is_autocast_enabled(kind) and x_BxTxD.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x_BxTxD.dtype


def every_chunk(positions: int, chunk: int) -> Iterator[tuple[int, int]]:
    """The `Spans` of whatever is computed."""
    for start in range(0, positions, chunk):
        yield start, start + chunk


def _chunks(
    x_NxD: Tensor, targets_N: Tensor, chunk: int, spans: Spans = every_chunk
) -> Iterator[tuple[Tensor, Tensor]]:
    for start, end in spans(x_NxD.shape[0], chunk):
        yield x_NxD[start:end], targets_N[start:end]


def _logits(x_nxD: Tensor, head_VxD: Tensor, softcap: float) -> Tensor:
    """Capped logits in the exact type; a tensor of its own, which the caller may overwrite."""
    logits_nxV = x_nxD @ head_VxD.T
    logits_nxV = logits_nxV.to(_exact(logits_nxV))
    return logits_nxV.div_(softcap).tanh_().mul_(softcap) if softcap else logits_nxV


def _sums(
    x_NxD: Tensor,
    head_VxD: Tensor,
    targets_N: Tensor,
    softcap: float,
    z_loss: float,
    chunk: int,
    low: torch.dtype,
    wanted: tuple[bool, bool],
    simulated: Spans | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(total, nll, d total / d x, d total / d head), the gradients where `wanted`.

    With e = exp(z - max z) and s = Σ e the gradient by the logits is (e·(1 + 2·z_loss·ln Σ exp z) - s·[target]) / s,
    times 1 - (z/c)² with a cap. In fp32 the division by s is left to the rows of the two products, N·D numbers
    instead of N·V, as is leaving out ignored positions: one exponential and no further pass over the logits.
    In bf16 and fp16 it is done before rounding, since s may be as large as V. The size of the gradient in fp16 is
    then that of one target, as with a loss scale equal to the number of targets; the loss scale comes later, in fp32.
    """
    exact = _exact(x_NxD)
    head_low_VxD = head_VxD.to(low)
    nll = torch.zeros((), dtype=exact, device=x_NxD.device)
    total = nll
    by_x: list[Tensor] = []
    by_head_VxD = torch.zeros_like(head_VxD, dtype=exact) if wanted[1] else None
    for x_nxD, targets_n in _chunks(x_NxD, targets_N, chunk, simulated or every_chunk):
        if simulated is not None and len(targets_n) > chunk:
            by_x += [torch.empty_like(x_nxD, dtype=low)] * wanted[0]
            continue
        real_nx1 = (targets_n != IGNORED)[:, None]  # a mask, never indices: those would wait for the device
        hit_nx1 = targets_n.clamp(min=0)[:, None]
        x_low_nxD = x_nxD.to(low)
        logits_nxV = _logits(x_low_nxD, head_low_VxD, softcap)
        slope_nxV = 1 - (logits_nxV / softcap).square_() if softcap and any(wanted) else None
        target_nx1, most_nx1 = logits_nxV.gather(1, hit_nx1), logits_nxV.amax(1, keepdim=True)
        e_nxV = logits_nxV.sub_(most_nx1).exp_()
        s_nx1 = e_nxV.sum(1, keepdim=True)
        lse_nx1 = s_nx1.log() + most_nx1
        nll_of_chunk = torch.where(real_nx1, lse_nx1 - target_nx1, 0.0).sum()
        nll, total = nll + nll_of_chunk, total + nll_of_chunk
        if z_loss:
            total = total + z_loss * torch.where(real_nx1, lse_nx1.square(), 0.0).sum()
        if not any(wanted):
            continue
        d_nxV = e_nxV.mul_(1 + 2 * z_loss * lse_nx1) if z_loss else e_nxV
        d_nxV.scatter_add_(1, hit_nx1, -s_nx1)
        if slope_nxV is not None:
            d_nxV.mul_(slope_nxV)
        factor_nx1 = torch.where(real_nx1, 1 / s_nx1, 0.0)
        if low == exact:
            if wanted[0]:
                by_x.append((d_nxV @ head_low_VxD).mul_(factor_nx1))
            if by_head_VxD is not None:
                by_head_VxD.addmm_(d_nxV.T, x_low_nxD * factor_nx1)
        else:
            d_low_nxV = d_nxV.mul_(factor_nx1).to(low)
            if wanted[0]:
                by_x.append(d_low_nxV @ head_low_VxD)
            if by_head_VxD is not None:
                by_head_VxD.add_(d_low_nxV.T @ x_low_nxD)
    return total, nll, torch.cat(by_x) if by_x else None, by_head_VxD


class _FusedCrossEntropy(torch.autograd.Function):
    """Loss and gradient in the forward pass, where a chunk's logits exist; the backward pass only scales them.

    (total, nll) = apply(x_NxD, head_VxD, targets_N, softcap, z_loss, chunk, low, simulated). Costs N·D and V·D numbers
    kept between the passes, and spares the second product with the head that recomputing the logits would take.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own object, without a type
        x_NxD: Tensor,
        head_VxD: Tensor,
        targets_N: Tensor,
        softcap: float,
        z_loss: float,
        chunk: int,
        low: torch.dtype,
        simulated: Spans | None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments of `_sums`, but for what torch knows: which gradients are wanted."""
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total, nll, by_x_NxD, by_head_VxD = _sums(
            x_NxD, head_VxD, targets_N, softcap, z_loss, chunk, low, wanted, simulated
        )
        ctx.save_for_backward(by_x_NxD, by_head_VxD)
        ctx.types = x_NxD.dtype, head_VxD.dtype
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, _by_nll: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Out of place, so that a graph that is kept can be walked again; in fp32, so that a scale is not rounded."""
        scaled = (
            None if g is None else (g.to(by_total.dtype) * by_total).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        return (*scaled, None, None, None, None, None, None)


def expected_initial_loss(config: ModelConfig) -> float | None:
    """The loss of a freshly initialised model, in nats; None where no formula holds.

    The last norm gives a vector x with |x|² = D. Rows of the head are independent of it with variance v a weight,
    so that each logit is normal with variance s² = D·v, and for a target that the model knows nothing about

        E[loss] = E[ln Σ exp z] - E[z_target] = ln V + s²/2    (V large: the sum is V times the mean of exp z).

    v is 0.02² for gpt2, 0.001² for head_init small; for course 2/(D+V), times 0.9733 for the cut at three
    deviations: 1 - 2·3·φ(3)/(2Φ(3)-1). So a wide model with a small vocabulary starts well above ln V: at D = V by
    0.49. V counts the rows of the head, padding included. With a soft-cap c the s²/2 becomes ln E[exp(c·tanh(z/c))]
    over that normal distribution. A head of zeros starts at ln V exactly.

    No formula: without a norm before the head |x|² is another; and a tied head is not independent of x where the
    token's own embedding reaches the last norm at full size, which embedding_norm, zero_init_projections and
    residual_lambdas bring about.

    >>> round(expected_initial_loss(ModelConfig(vocab_size=10_000, d_model=512, num_heads=16)) - math.log(10_000), 3)
    0.047
    """
    D, V = config.d_model, config.padded_vocab_size
    if config.head_init == "zero":
        return math.log(V)
    own_token_returns = config.embedding_norm or config.zero_init_projections or config.residual_lambdas
    if config.norm == "none" or (config.tie_embeddings and own_token_returns):
        return None
    phi_3 = math.exp(-4.5) / math.sqrt(2 * math.pi)
    cut = 1 - 6 * phi_3 / math.erf(3 / math.sqrt(2))
    course = cut * 2 / (D + V)
    variance = 0.001**2 if config.head_init == "small" else 0.02**2 if config.init == "gpt2" else course
    return math.log(V) + _log_mean_exp(math.sqrt(D * variance), config.logit_softcap)


def _log_mean_exp(s: float, softcap: float) -> float:
    """ln E[exp(c·tanh(z/c))] for z ~ N(0, s²); s²/2 without a cap."""
    if not softcap:
        return s * s / 2
    step = 0.01  # the trapezoid rule is exact to rounding for so smooth an integrand that ends in zeros
    grid = [k * step for k in range(-1000, 1001)]
    terms = [softcap * math.tanh(s * u / softcap) - u * u / 2 for u in grid]
    return math.log(sum(map(math.exp, terms)) * step / math.sqrt(2 * math.pi))
