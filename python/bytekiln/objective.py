"""Model and loss as one module: what is compiled, what DDP wraps, what an evaluation asks.

In: a batch on the model's device. Out: sums over its real targets, on the device; nothing here waits for the host.
Called by `train` and `evaluate`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bytekiln.config import RunConfig
from bytekiln.loss import IGNORED, Spans, chunked_cross_entropy, chunked_scores, positions_at_once
from bytekiln.model import TransformerLM

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of the matrix products by `precision`."""


def has_documents(config: RunConfig) -> bool:
    """Whether batches number their documents: for the mask, or so that nothing sees the padding from both sides."""
    mlm = config.training.objective == "mlm"
    return config.data.document_mask or (mlm and config.data.windows != "stream")


class Loss(NamedTuple):
    """Sums over the real targets of a micro-batch."""

    total: Tensor
    """0-D, differentiable: nll + z_loss · Σ (ln Σ exp z)² + load_balancing_weight · balance · targets."""
    nll: Tensor
    """0-D, detached: Σ -ln p(target), the loss that is reported."""
    load_LxE: Tensor
    """Detached: tokens that each expert got in each layer; 0 × 0 without experts."""


class Objective(nn.Module):
    """The model together with all that the config says about its loss."""

    def __init__(self, model: TransformerLM, config: RunConfig, simulated: Spans | None = None) -> None:
        """Args:
        model: whose parameters this module shares.
        config: the run, its `precision` settled: fp32, bf16 or fp16.
        simulated: of the loss's chunks those to trace, where nothing is computed (`footprint`).
        """
        super().__init__()
        assert config.training.precision in AUTOCAST, "precision auto is settled before anything is built"
        self.model = model
        self.low = AUTOCAST[config.training.precision]
        self.softcap, self.z_loss = config.model.logit_softcap, config.training.z_loss
        self.loss_chunk = config.training.loss_chunk
        self.simulated = simulated
        balanced = config.model.ffn == "moe" and config.model.load_balancing == "loss"
        self.balance_weight = config.model.load_balancing_weight if balanced else 0.0

    def forward(self, inputs_BxT: Tensor, targets_BxT: Tensor, documents_BxT: Tensor | None = None) -> Loss:
        """The loss of a micro-batch.

        Args:
            inputs_BxT: int64 ids.
            targets_BxT: int64 ids, `IGNORED` where nothing is to be predicted.
            documents_BxT: int32 number of the document of each position, across which no attention goes.
        """
        with self._autocast(inputs_BxT):
            x_BxTxD, balance, load_LxE = self.model.features(inputs_BxT, None, documents_BxT)
            head_VxD = self.model.head_weight
            total, nll = chunked_cross_entropy(
                x_BxTxD,
                head_VxD,
                targets_BxT,
                softcap=self.softcap,
                z_loss=self.z_loss,
                chunk=positions_at_once(self.loss_chunk, x_BxTxD, head_VxD.shape[0]),
                simulated=self.simulated,
            )
        if self.balance_weight:
            # A mean over tokens already; times the targets, because the loop divides by them.
            total = total + self.balance_weight * balance * (targets_BxT != IGNORED).sum()
        return Loss(total, nll, load_LxE.detach())

    @torch.no_grad()
    def scores(
        self, inputs_BxT: Tensor, targets_BxT: Tensor, documents_BxT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same batch as an evaluation counts it; evaluation mode is the caller's.

        Returns:
            0-D: the sum of -ln p(target), and how many targets the greatest logit hits. Neither z-loss nor balance.
        """
        with self._autocast(inputs_BxT):
            x_BxTxD = self.model.features(inputs_BxT, None, documents_BxT).x_BxTxD
            head_VxD = self.model.head_weight
            chunk = self.loss_chunk or "auto"  # all logits at once is a wish for training's speed
            return chunked_scores(
                x_BxTxD,
                head_VxD,
                targets_BxT,
                softcap=self.softcap,
                chunk=positions_at_once(chunk, x_BxTxD, head_VxD.shape[0]) or targets_BxT.numel(),
            )

    def _autocast(self, inputs_BxT: Tensor) -> AbstractContextManager[object]:
        return torch.autocast(inputs_BxT.device.type, self.low, enabled=self.low is not None)
