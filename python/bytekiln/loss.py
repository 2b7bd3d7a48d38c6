"""The training objective. In: logits and targets. Out: a sum of losses and the number of real targets.

Sum and count stay apart so that micro-steps and evaluation batches are weighted by their tokens.
Called by `train` and `evaluate`.
"""

from __future__ import annotations

import math

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from bytekiln.config import ModelConfig

IGNORED = -100
"""A target with this value does not count."""


def summed_cross_entropy(logits_BxTxV: Tensor, targets_BxT: Tensor) -> Tensor:
    """Sum over all real targets of -ln p(target), in nats and in fp32 whatever the logits' type."""
    return F.cross_entropy(
        logits_BxTxV.flatten(0, 1).float(), targets_BxT.flatten(), reduction="sum", ignore_index=IGNORED
    )


def real_targets(targets_BxT: Tensor) -> int:
    """How many targets count."""
    return int((targets_BxT != IGNORED).sum())


def expected_initial_loss(config: ModelConfig) -> float:
    """The loss of a freshly initialised model, in nats.

    The last norm gives a vector x with |x|² = D. Rows of the head are independent of it with variance v a weight,
    so that each logit is normal with variance s² = D·v, and for a target that the model knows nothing about

        E[loss] = E[ln Σ exp z] - E[z_target] = ln V + s²/2    (V large: the sum is V times the mean of exp z).

    v is 0.02² for gpt2; for course 2/(D+V), times 0.9733 for the cut at three deviations:
    1 - 2·3·φ(3)/(2Φ(3)-1). So a wide model with a small vocabulary starts well above ln V: at D = V by 0.49.
    Without a norm before the head |x|² is another and the formula does not hold.

    >>> round(expected_initial_loss(ModelConfig(vocab_size=10_000, d_model=512, num_heads=16)) - math.log(10_000), 3)
    0.047
    """
    D, V = config.d_model, config.vocab_size
    phi_3 = math.exp(-4.5) / math.sqrt(2 * math.pi)
    cut = 1 - 6 * phi_3 / math.erf(3 / math.sqrt(2))
    variance = 0.02**2 if config.init == "gpt2" else cut * 2 / (D + V)
    return math.log(V) + D * variance / 2
