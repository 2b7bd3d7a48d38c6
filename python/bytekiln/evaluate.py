"""Loss and accuracy on data, deterministic: dropout off, each target counted once. Called by `learner`.

In: the objective and batches, of validation or of training data. Out: `Scores`, means over all real targets.
`HarnessLM`, by which lm-evaluation-harness drives a model, is found here too; `harness` has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from bytekiln.data import Batch, to_device
from bytekiln.errors import FormatError
from bytekiln.objective import Objective


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module has
    """`HarnessLM`, from higher up and only when it is asked for: nothing that trains needs it."""
    if name == "HarnessLM":
        return import_module("bytekiln.score.harness").HarnessLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Scores(NamedTuple):
    """What an evaluation found."""

    loss: float
    """Mean of -ln p(target) in nats a token."""
    accuracy: float
    """Share of the targets that the greatest logit hits."""
    tokens: int
    """Targets counted."""

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that is beyond a float.

        >>> Scores(loss=0.0, accuracy=1.0, tokens=2).perplexity, Scores(1e6, 0.0, 1).perplexity
        (1.0, inf)
        """
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluate(objective: Objective, batches: Iterable[Batch], device: torch.device) -> Scores:
    """Score the batches in evaluation mode.

    Waits for the device once, at the end: the sums of all batches stay there until then.

    Args:
        objective: the model and its precision; each of its modules gets its mode back, also after an exception.
        batches: what to score. How the targets are spread over batches decides rounding only.
        device: where the model is.

    Raises:
        FormatError: the batches hold no target at all.
    """
    nll, correct, tokens = [], [], 0
    with evaluation_mode(objective):
        for batch in batches:
            inputs_BxT, targets_BxT, documents_BxT, count = to_device(batch, device)
            nll_of_batch, correct_of_batch = objective.scores(inputs_BxT, targets_BxT, documents_BxT)
            nll.append(nll_of_batch)
            correct.append(correct_of_batch)
            tokens += count
    if not tokens:
        raise FormatError("evaluation: found no target in the data; expected at least one")
    # One transfer. A batch's count is exact in fp32, and the sums over batches are Python's.
    nll_N, correct_N = torch.stack([torch.stack(nll), torch.stack(correct).to(nll[0].dtype)]).tolist()
    return Scores(math.fsum(nll_N) / tokens, sum(correct_N) / tokens, tokens)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, every submodule is in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """Loss in nats a token as bits a byte of text; None where the bytes are unknown.

    >>> bits_per_byte(math.log(2) * 3, 1.5)
    2.0
    """
    return None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
