"""The optimizer: AdamW with decay on matrices only, clipping, and its state as named tensors.

In: a model and its config. Out: a torch optimizer; `train` steps it, `checkpoint` stores what
`state_tensors` gives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bytekiln.config import OptimizerConfig
from bytekiln.errors import FormatError

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the model's parameters.

    Weight decay pulls on tensors of two and more axes, never on norm weights. The fused kernel is taken where
    torch has one for the device (CPU and CUDA); the others differ from it in rounding alone.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradients so that their norm is at most `largest` (0: leave them); returns the norm before that."""
    return nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory as `exp_avg/NAME` and `exp_avg_sq/NAME`; empty before the first step."""
    return {
        f"{moment}/{name}": optimizer.state[p][moment]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for moment in MOMENTS
    }


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], step: int, where: str
) -> None:
    """Put back what `state_tensors` gave after `step` steps.

    Raises:
        FormatError: a tensor is missing or has another shape; the message begins with `where`.
    """
    if step == 0:
        return
    for name, p in model.named_parameters():
        moments = {}
        for moment in MOMENTS:
            t = tensors.get(f"{moment}/{name}")
            if t is None or t.shape != p.shape:
                found = "nothing" if t is None else f"shape {tuple(t.shape)}"
                raise FormatError(f"{where}: found {found} for {moment}/{name}; expected shape {tuple(p.shape)}")
            moments[moment] = t.to(p.device).clone()
        optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
