"""RMSNorm and LayerNorm of the model.

In: rows. Out: the same, normalised; or what `linear` must know to do it on the way into a map. Called by `model` and
`stack`. D is the width of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from bytekiln import kernels
from bytekiln.config import ModelConfig
from bytekiln.linear import NOTHING, Before


def rms_norm(x_xD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last axis, by the core where it can."""
    if kernels.normalises(x_xD) and (weight_D is None or weight_D.dtype == x_xD.dtype):
        return kernels.rms_norm(x_xD, weight_D, eps)
    return F.rms_norm(x_xD, x_xD.shape[-1:], None if weight_D is None else _as(x_xD, weight_D), eps)


class RMSNorm(nn.Module):
    """x / RMS(x) · weight (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        """Weight 1 in every place; `eps` is added to the mean square."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    @property
    def before(self) -> Before:
        """The same as the beginning of a linear map."""
        return Before("rms", self.weight, None, self.eps)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        """Normalise the last axis."""
        return rms_norm(x_BxTxD, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / deviation · weight + bias (Ba et al. 2016); without a bias it is nanoGPT's `bias=False`."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        """Weight 1 and bias 0 in every place; `eps` is added to the variance."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    @property
    def before(self) -> Before:
        """The same as the beginning of a linear map."""
        return Before("layer", self.weight, self.bias, self.eps)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        """Normalise the last axis."""
        bias = None if self.bias is None else _as(x_BxTxD, self.bias)
        return F.layer_norm(x_BxTxD, self.weight.shape, _as(x_BxTxD, self.weight), bias, self.eps)


def _as(x: Tensor, weight: Tensor) -> Tensor:
    """The weight in the type of a residual stream in bf16: torch's fused norms on a CPU take one type only."""
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


class NoNorm(nn.Identity):
    """What stands where a norm would."""

    before = NOTHING


def norm_of(config: ModelConfig) -> nn.Module:
    """The norm that a model has before its parts, or what stands in its place."""
    if config.norm == "none":
        return NoNorm()
    D, eps = config.d_model, config.norm_eps
    return RMSNorm(D, eps) if config.norm == "rms" else LayerNorm(D, eps, config.bias)
