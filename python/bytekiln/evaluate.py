"""Loss on data, deterministic: always the same windows, dropout off. Called by `train`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bytekiln.data import TokenData, to_device
from bytekiln.loss import real_targets


@torch.no_grad()
def evaluate(
    model: nn.Module,
    summed_loss: Callable[[Tensor, Tensor], Tensor],
    data: TokenData,
    *,
    batch_size: int,
    num_batches: int,
    device: torch.device,
) -> float:
    """Mean loss in nats a token over `num_batches` batches of windows spread evenly over the data.

    Args:
        model: put into evaluation mode meanwhile.
        summed_loss: (inputs_BxT, targets_BxT) -> sum of losses; holds precision and compilation.
        data: fewer windows than asked for are all read once.
        batch_size: windows at once; the result depends on it in rounding only.
        num_batches: how many of them.
        device: where the model is.
    """
    starts_N = data.spread_starts(batch_size * num_batches)
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device="cpu"), 0
    try:
        for i in range(0, len(starts_N), batch_size):
            inputs_BxT, targets_BxT = data.batch(starts_N[i : i + batch_size])
            count += real_targets(targets_BxT)
            total += summed_loss(to_device(inputs_BxT, device), to_device(targets_BxT, device)).cpu()
    finally:
        model.train(was_training)
    return float(total) / count


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """Loss in nats a token as bits a byte of text; None where the bytes are unknown.

    >>> bits_per_byte(math.log(2) * 3, 1.5)
    2.0
    """
    return None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
