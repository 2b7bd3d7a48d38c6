"""The optimizer against a plain float64 AdamW, and its state as tensors."""

from __future__ import annotations

import math

import pytest
import torch

from bytekiln.config import ModelConfig, OptimizerConfig
from bytekiln.errors import FormatError
from bytekiln.model import TransformerLM
from bytekiln.optim import clip_gradients, load_state_tensors, make_optimizer, set_learning_rate, state_tensors

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)


def model() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(vocab_size=20, d_model=8, num_layers=1, num_heads=2, context_length=4))


@pytest.mark.parametrize("eps", [1e-8, 1e-2, 1.0])
def test_adamw_by_hand_and_decay_on_matrices_only(eps: float) -> None:
    m = model()
    optimizer = make_optimizer(m, CONFIG.model_copy(update={"eps": eps}))
    plain = {n: p.detach().double().clone() for n, p in m.named_parameters()}
    first = {n: torch.zeros_like(p) for n, p in plain.items()}
    second = {n: torch.zeros_like(p) for n, p in plain.items()}
    for t in range(1, 101):
        torch.manual_seed(t)
        lr = 1e-2 / t
        set_learning_rate(optimizer, lr)
        for n, p in m.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.95 * second[n] + 0.05 * g * g
            if p.ndim >= 2:
                plain[n] -= lr * 0.1 * plain[n]
            denominator = (second[n] / (1 - 0.95**t)).sqrt() + eps
            plain[n] -= lr * (first[n] / (1 - 0.9**t)) / denominator
        optimizer.step()
    for n, p in m.named_parameters():
        torch.testing.assert_close(p.detach().double(), plain[n], rtol=1e-4, atol=1e-6)


def test_clipping_returns_the_norm_before_it() -> None:
    m = model()
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    norm = math.sqrt(sum(p.numel() for p in m.parameters()))
    assert float(clip_gradients(m, 0)) == pytest.approx(norm)
    assert float(clip_gradients(m, 1.0)) == pytest.approx(norm)
    assert float(clip_gradients(m, 1.0)) == pytest.approx(1.0, rel=1e-4)


def test_state_goes_out_and_in() -> None:
    runs = [model(), model()]
    optimizers = [make_optimizer(m, CONFIG) for m in runs]
    assert state_tensors(runs[0], optimizers[0]) == {}

    def step(i: int, seed: int) -> None:
        torch.manual_seed(seed)
        for p in runs[i].parameters():
            p.grad = torch.randn_like(p)
        optimizers[i].step()

    step(0, 1)
    runs[1].load_state_dict(runs[0].state_dict())
    tensors = state_tensors(runs[0], optimizers[0])
    load_state_tensors(runs[1], optimizers[1], tensors, 1, "here")
    step(0, 2)
    step(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True))
    del tensors["exp_avg/ln_final.weight"]
    with pytest.raises(FormatError, match=r"here: found nothing for exp_avg/ln_final\.weight"):
        load_state_tensors(runs[1], optimizers[1], tensors, 1, "here")
