"""Evaluation: the mean over its windows, the same every time, and without dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bytekiln.config import ModelConfig
from bytekiln.data import TokenData
from bytekiln.evaluate import bits_per_byte, evaluate
from bytekiln.loss import summed_cross_entropy
from bytekiln.model import TransformerLM
from bytekiln.tokenfile import TokenFile
from lm_runs import VOCAB, tokens


def build(dropout: float) -> TransformerLM:
    torch.manual_seed(3)
    return TransformerLM(
        ModelConfig(vocab_size=VOCAB, d_model=16, num_layers=2, num_heads=2, context_length=8, dropout=dropout)
    )


@pytest.fixture
def data(tmp_path: Path) -> TokenData:
    return TokenData(TokenFile.open(tokens(tmp_path / "d.npy", 100)), 8)


def loss_of(model: TransformerLM, data: TokenData, batch_size: int = 3, num_batches: int = 4) -> float:
    def summed(inputs: Tensor, targets: Tensor) -> Tensor:
        return summed_cross_entropy(model(inputs), targets)

    device = torch.device("cpu")
    return evaluate(model, summed, data, batch_size=batch_size, num_batches=num_batches, device=device)


def test_dropout_is_off_and_comes_back(data: TokenData) -> None:
    model = build(0.5).train()
    first = loss_of(model, data)
    assert loss_of(model, data) == first == loss_of(build(0.0), data)
    assert all(part.training for part in model.modules())
    loss_of(model.eval(), data)
    assert not any(part.training for part in model.modules())


def test_mode_comes_back_after_an_interruption(data: TokenData) -> None:
    model = build(0.5).train()

    def interrupted(inputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, interrupted, data, batch_size=2, num_batches=2, device=torch.device("cpu"))
    assert model.training


@pytest.mark.parametrize(("batch_size", "num_batches"), [(1, 5), (5, 1), (2, 3), (5, 100)])
def test_mean_over_every_token_of_the_windows(data: TokenData, batch_size: int, num_batches: int) -> None:
    """Also where the last batch is smaller than the others: 12 windows fit, in batches of 5."""
    model = build(0.0).eval()
    losses = []
    for start in data.spread_starts(batch_size * num_batches):
        ids = torch.from_numpy(data.file.array[start : start + 9].astype("int64"))
        with torch.no_grad():
            logs = model(ids[None, :-1])[0].double().log_softmax(-1)
        losses += [-float(logs[t, ids[t + 1]]) for t in range(8)]
    assert loss_of(model, data, batch_size, num_batches) == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert len(losses) == 8 * min(12, batch_size * num_batches)


def test_no_gradient_is_left(data: TokenData) -> None:
    model = build(0.0)
    loss_of(model, data)
    assert all(p.grad is None for p in model.parameters())


def test_bits_of_an_even_guess_over_bytes() -> None:
    assert bits_per_byte(5.545177444479562, 1.0) == pytest.approx(8)
    assert bits_per_byte(5.545177444479562, 4.0) == pytest.approx(2)
    assert bits_per_byte(1.0, None) is None
