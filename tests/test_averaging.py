"""Averages of the weights against float64, steps that are left out, and the swap."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bytekiln import averaging as averaging_module
from bytekiln.averaging import Averaging, make_averaging
from bytekiln.config import OptimizerConfig
from bytekiln.errors import FormatError
from bytekiln.signals import Interrupted
from named_model import NoSync, bits, named_model

STEPS = 100


def config(**values: object) -> OptimizerConfig:
    return OptimizerConfig().model_copy(update=values)


def averaging(model: nn.Module, **values: object) -> Averaging:
    found = make_averaging(model, config(**values))
    assert found is not None
    return found


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def averaged(model: nn.Module, average: Averaging) -> dict[str, Tensor]:
    with average.swapped():
        return weights(model)


def follow(average: Averaging, model: nn.Module, left_out: frozenset[int] = frozenset()) -> list[dict[str, Tensor]]:
    """`STEPS` steps; returns the weights after each. What is left out does not move them."""
    seen = []
    for t in range(1, STEPS + 1):
        if t not in left_out:
            move(model, t)
        average.update(t / STEPS, torch.tensor(t not in left_out) if left_out else None)
        seen.append({n: p.double() for n, p in weights(model).items()})
    return seen


def test_none_is_none() -> None:
    assert make_averaging(named_model(), config()) is None


def test_ema_by_hand() -> None:
    m = named_model()
    average = averaging(m, averaging="ema", ema_decay=0.9)
    seen = follow(average, m)
    mean = seen[0]
    for now in seen[1:]:
        mean = {n: 0.9 * mean[n] + 0.1 * now[n] for n in mean}
    for n, p in averaged(m, average).items():
        torch.testing.assert_close(p.double(), mean[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.7, 1.0])
def test_tail_by_hand(share: float) -> None:
    m = named_model()
    average = averaging(m, averaging="tail", tail_fraction=share)
    seen = follow(average, m)
    tail = seen[max(0, round(STEPS * (1 - share)) - 1) :]
    for n, p in averaged(m, average).items():
        expected = torch.stack([now[n] for now in tail]).mean(dim=0)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=2e-6)


def test_before_the_tail_it_is_the_last_weights() -> None:
    m = named_model()
    average = averaging(m, averaging="tail", tail_fraction=0.5)
    for t in range(5):
        move(m, t)
        average.update(t / 10)
        assert bits(averaged(m, average)) == bits(weights(m))
    assert set(average.tensors()) == {"average_count"}
    move(m, 5)
    average.update(0.5)
    assert bits(averaged(m, average)) == bits(weights(m))
    move(m, 6)
    average.update(0.6)
    assert bits(averaged(m, average)) != bits(weights(m))


@pytest.mark.parametrize("stored", [False, True])
def test_a_tail_whose_run_became_longer_begins_anew(stored: bool) -> None:
    """A run of 10 steps, gone on with to 20: the mean of steps 18 … 20 alone, as in a run of 20 from the start."""
    m, unbroken = named_model(), named_model()
    average, expected = (averaging(x, averaging="tail", tail_fraction=0.15) for x in (m, unbroken))
    for t in range(1, 21):
        move(m, t)
        move(unbroken, t)
        expected.update(t / 20)
        average.update(t / (10 if t <= 10 else 20))
        if t == 10:
            assert average.tensors()["average_count"] == 2
            if stored:
                kept = {k: v.clone() for k, v in average.tensors().items()}
                average = averaging(m, averaging="tail", tail_fraction=0.15)
                average.load(kept, "here")
                assert bits(average.tensors()) == bits(kept)
        elif 10 < t < 17:
            assert average.tensors() == {"average_count": torch.tensor(0.0)}
            assert bits(averaged(m, average)) == bits(weights(m))
    assert average.tensors()["average_count"] == 4
    assert bits(averaged(m, average)) == bits(averaged(unbroken, expected))


@pytest.mark.parametrize("kind", ["ema", "tail"])
@pytest.mark.parametrize("left_out", [{1, 2, 50}, {80, 81, 95}, {100}], ids=["start", "tail", "end"])
def test_left_out_steps_do_not_count(kind: str, left_out: set[int]) -> None:
    m = named_model()
    average = averaging(m, averaging=kind, ema_decay=0.9)
    seen = follow(average, m, frozenset(left_out))
    counted = [t for t in range(1, STEPS + 1) if t not in left_out and (kind == "ema" or t >= 80)]
    mean = seen[counted[0] - 1]
    for k, t in enumerate(counted[1:], 2):
        weight = 0.1 if kind == "ema" else 1 / k
        mean = {n: p + (seen[t - 1][n] - p) * weight for n, p in mean.items()}
    for n, p in averaged(m, average).items():
        torch.testing.assert_close(p.double(), mean[n], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["ema", "tail"])
def test_a_left_out_step_leaves_every_bit(kind: str) -> None:
    m = named_model()
    average = averaging(m, averaging=kind)
    with torch.no_grad():
        for p in m.parameters():
            p.view(-1)[0] = -0.0
    average.update(0.95, torch.tensor(False))
    for n, p in averaged(m, average).items():  # nothing averaged yet: the weights as they are
        assert torch.equal(p, m.get_parameter(n))
    average.update(0.96, torch.tensor(True))
    before = bits(average.tensors())
    move(m, 1)
    average.update(0.97, torch.tensor(False))
    assert bits(average.tensors()) == before
    average.update(0.98, torch.tensor(True))
    assert bits(average.tensors()) != before


def test_the_swap_keeps_storage_and_survives_errors() -> None:
    m = named_model()
    average = averaging(m, averaging="ema", ema_decay=0.5)
    for t in range(3):
        move(m, t)
        average.update(t / 3)
    before, places = bits(weights(m)), [p.data_ptr() for p in m.parameters()]
    tensors = bits(average.tensors())
    with pytest.raises(KeyboardInterrupt), average.swapped():
        assert bits(weights(m)) != before
        assert [p.data_ptr() for p in m.parameters()] == places
        assert bits(average.tensors()) == tensors
        raise KeyboardInterrupt
    assert bits(weights(m)) == before
    assert bits(average.tensors()) == tensors


def test_a_signal_may_come_at_any_line_of_the_swap() -> None:
    """Raise before the n-th line that runs in `averaging`, for every n: the weights can be had back, and swapped."""
    m = nn.Linear(3, 2)
    average = averaging(m, averaging="ema", ema_decay=0.5)
    for t in range(3):
        move(m, t)
        average.update(t / 3)
    before, mean = bits(weights(m)), bits(averaged(m, average))
    assert before != mean
    broken_off_with_the_average_inside = 0

    def swap(interrupted_at: int) -> bool:
        """Whether the interruption came."""
        lines = 0

        def trace(frame: FrameType, event: str, _: object) -> object:
            nonlocal lines
            if frame.f_code.co_filename != averaging_module.__file__:
                return None
            lines += event == "line"
            if lines == interrupted_at and event == "line":
                raise Interrupted
            return trace

        outer = sys.gettrace()
        sys.settrace(trace)
        try:
            with average.swapped():
                pass
        except Interrupted:
            return True
        finally:
            sys.settrace(outer)
        return False

    for n in range(1, 1000):
        if not swap(n):
            break
        broken_off_with_the_average_inside += bits(weights(m)) != before
        if n % 2:
            average.restore()
            average.restore()
            assert bits(weights(m)) == before
        with average.swapped():
            assert bits(weights(m)) == mean
        assert bits(weights(m)) == before
        average.update(1.0, torch.tensor(False))
    assert n > 15 and broken_off_with_the_average_inside > 3
    move(m, 9)
    after = bits(weights(m))
    average.restore()
    assert bits(weights(m)) == after, "what was put back is forgotten"


@pytest.mark.parametrize("kind", ["ema", "tail"])
@pytest.mark.parametrize("at", [10, 90])
def test_state_goes_out_and_in(kind: str, at: int, tmp_path: Path) -> None:
    models = [named_model(), named_model(1)]
    averages = [averaging(m, averaging=kind) for m in models]
    for t in range(1, at + 1):
        move(models[0], t)
        averages[0].update(t / STEPS)
    models[1].load_state_dict(models[0].state_dict())
    safetensors.torch.save_file(averages[0].tensors(), tmp_path / "t.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "t.safetensors")
    averages[1].load({**stored, "step/head": torch.ones(())}, "here")
    for t in range(at + 1, STEPS + 1):
        for m, average in zip(models, averages, strict=True):
            move(m, t)
            average.update(t / STEPS, torch.tensor(t % 3 > 0))
    assert bits(averaged(models[0], averages[0])) == bits(averaged(models[1], averages[1]))
    with pytest.raises(FormatError, match=r"^here: found nothing for average_count; expected a number"):
        averages[1].load({k: v for k, v in stored.items() if k != "average_count"}, "here")
    full = averages[0].tensors()
    name = "average/lm_head.weight"
    with pytest.raises(FormatError, match=rf"^here: found nothing for {name}; expected shape"):
        averages[1].load({k: v for k, v in full.items() if k != name}, "here")
    with pytest.raises(FormatError, match=r"^here: found nothing for average/"):
        averages[1].load({"average_count": torch.tensor(3.0)}, "here")


@pytest.mark.parametrize("kind", ["ema", "tail"])
def test_nobody_waits_for_the_device(kind: str) -> None:
    m = named_model()
    average = averaging(m, averaging=kind)
    with NoSync():
        for take in (None, torch.tensor(True), torch.tensor(False)):
            average.update(0.9, take)
        with average.swapped():
            pass
