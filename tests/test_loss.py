"""The loss: weighted by real targets, and at the start what theory says."""

from __future__ import annotations

import math

import pytest
import torch

from bytekiln.config import ModelConfig, load_config
from bytekiln.loss import IGNORED, expected_initial_loss, real_targets, summed_cross_entropy
from bytekiln.model import TransformerLM


def test_sum_over_real_targets() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 7), torch.tensor([[1, IGNORED, 3], [IGNORED, IGNORED, 6]])
    by_hand = -sum(
        logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(3) if targets[b, t] != IGNORED
    )
    torch.testing.assert_close(summed_cross_entropy(logits, targets), by_hand)
    assert real_targets(targets) == 3
    assert summed_cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def measured(config: ModelConfig) -> float:
    torch.manual_seed(3)
    model = TransformerLM(config).eval()
    tokens = torch.randint(0, config.vocab_size, (32, config.context_length + 1))
    with torch.no_grad():
        return float(summed_cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])) / (32 * config.context_length)


def test_nanogpt_preset_starts_within_five_percent_of_ln_v() -> None:
    config = load_config("shakespeare-char", {"vocab_size": 65}).model
    assert measured(config) == pytest.approx(math.log(65), rel=0.05)


@pytest.mark.parametrize(
    ("vocab", "d_model", "init", "tied"),
    [
        (256, 256, "course", False),
        (1000, 64, "course", False),
        (128, 512, "course", False),
        (256, 256, "course", True),
        (512, 256, "gpt2", True),
    ],
)
def test_start_meets_its_own_formula(vocab: int, d_model: int, init: str, tied: bool) -> None:
    config = ModelConfig(
        vocab_size=vocab,
        d_model=d_model,
        num_layers=2,
        num_heads=4,
        context_length=64,
        init=init,
        tie_embeddings=tied,
    )
    # 2,048 targets whose loss has deviation s ≤ 1.25: the mean is good to 0.03.
    assert measured(config) == pytest.approx(expected_initial_loss(config), abs=0.06)


def test_the_formula_says_more_than_ln_v() -> None:
    assert expected_initial_loss(ModelConfig(vocab_size=128, d_model=512, num_heads=4)) - math.log(128) > 0.7
