"""A batch of windows, and its way to the device. Made by `data`, moved by the loop and by evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Windows as the model takes them.

    Attributes:
        inputs_BxT: ids, int64.
        targets_BxT: ids to predict, int64; `loss.IGNORED` where nothing is to be predicted.
        documents_BxT: int32 number of the document that a position belongs to, rising from 0 in each window (padding
            is one more); None where attention need not know.
        count: targets that are not ignored, counted before anything goes to a device.
    """

    inputs_BxT: Tensor
    targets_BxT: Tensor
    documents_BxT: Tensor | None
    count: int  # type: ignore[assignment] # hides tuple.count, which nobody calls on a batch


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a GPU copies while the host goes on."""
    inputs_BxT, targets_BxT, documents_BxT, count = batch
    return Batch(
        inputs_BxT.pin_memory(),
        targets_BxT.pin_memory(),
        None if documents_BxT is None else documents_BxT.pin_memory(),
        count,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; on CUDA through pinned memory and without waiting for the copy."""
    if device.type == "cuda":
        if not batch.inputs_BxT.is_pinned():
            batch = pinned(batch)
        return _moved(batch, device, non_blocking=True)
    return _moved(batch, device, non_blocking=False)


def _moved(batch: Batch, device: torch.device, *, non_blocking: bool) -> Batch:
    inputs_BxT, targets_BxT, documents_BxT, count = batch
    return Batch(
        inputs_BxT.to(device, non_blocking=non_blocking),
        targets_BxT.to(device, non_blocking=non_blocking),
        None if documents_BxT is None else documents_BxT.to(device, non_blocking=non_blocking),
        count,
    )
