"""The guard: what it takes, what it leaves out, and that it never asks the device."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bytekiln.errors import FormatError
from bytekiln.guard import FIRST_SCALE, SCALE_GROWTH_STEPS, SPIKE_WARMUP_STEPS, Guard

CPU = torch.device("cpu")


def decide(guard: Guard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.decide(torch.tensor(loss), torch.tensor(norm)))


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_a_step_that_is_not_finite_ends_all_later_ones(bad: tuple[float, float]) -> None:
    guard = Guard(CPU)
    assert decide(guard, 1.0)
    assert not decide(guard, *bad)
    assert not guard.alive
    assert not decide(guard, 1.0), "the host has not looked yet; the weights must stay"


def test_spikes_are_left_out_and_a_new_level_is_accepted_in_time() -> None:
    guard = Guard(CPU, spike_sigma=6.0)
    rng = torch.Generator().manual_seed(0)
    for _ in range(SPIKE_WARMUP_STEPS):
        assert decide(guard, 3.0 + 0.1 * float(torch.randn((), generator=rng)))
    assert decide(guard, 3.2)
    assert not decide(guard, 4.5)
    assert guard.alive
    assert decide(guard, 3.0)
    taken = [decide(guard, 4.5) for _ in range(200)]
    assert not taken[0]
    assert taken[-1], "a loss that stays there is no spike any more"


def test_mean_and_variance_are_the_exponential_ones() -> None:
    guard = Guard(CPU, spike_sigma=100.0)
    losses = [3.0, 2.0, 5.0, 1.0, 4.0]
    for x in losses:
        decide(guard, x)
    mean = sum(losses) / 5  # while fewer losses than the memory holds were seen, it is the plain mean
    assert float(guard.mean) == pytest.approx(mean)
    assert float(guard.variance) == pytest.approx(sum((x - mean) ** 2 for x in losses) / 5)


def test_early_losses_are_never_spikes() -> None:
    guard = Guard(CPU, spike_sigma=1.0)
    assert all(decide(guard, float(x)) for x in range(SPIKE_WARMUP_STEPS))


def test_loss_scale_follows_torchs_scaler() -> None:
    """The same overflows through torch.amp.GradScaler and through ours give the same scales."""
    guard = Guard(CPU, scaled=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=SCALE_GROWTH_STEPS)
    weight = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    overflows = {0, 1, 2100, 2101}
    for step in range(SCALE_GROWTH_STEPS * 2 + 200):
        norm = math.inf if step in overflows else 1.0
        scaler.scale(torch.zeros(()))  # makes its tensors
        weight.grad = torch.tensor(norm)
        scaler.step(optimizer)
        scaler.update()
        taken = decide(guard, 2.0, norm)
        assert taken == (step not in overflows)
        assert float(guard.scale) == scaler.get_scale(), step
    assert guard.alive


def test_an_overflow_at_the_smallest_scale_is_fatal() -> None:
    guard = Guard(CPU, scaled=True)
    for _ in range(16):
        assert not decide(guard, 2.0, math.inf)
        assert guard.alive
    assert not decide(guard, 2.0, math.nan)
    assert not guard.alive


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


def test_never_asks_the_device() -> None:
    guard = Guard(CPU, spike_sigma=6.0, scaled=True)
    loss, norm = torch.tensor(1.0), torch.tensor(1.0)
    with NoSync():
        for _ in range(3):
            guard.decide(loss, norm)
    with pytest.raises(AssertionError), NoSync():
        bool(guard.alive)


def test_state_goes_out_and_in() -> None:
    a, b = (Guard(CPU, spike_sigma=3.0, scaled=True) for _ in range(2))
    for x in range(80):
        decide(a, 3 + x % 7 * 0.1, math.inf if x == 5 else 1.0)
    b.load_state_tensors(a.state_tensors(), "here")
    for x in (3.1, 9.0, 3.2):
        assert decide(a, x) == decide(b, x)
    assert all(torch.equal(x, y) for x, y in zip(a.state_tensors().values(), b.state_tensors().values(), strict=True))
    with pytest.raises(FormatError, match="here: found nothing for guard/mean"):
        b.load_state_tensors({k: v for k, v in a.state_tensors().items() if "mean" not in k}, "here")
