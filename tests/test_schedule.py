"""The learning rate at chosen steps, as published."""

from __future__ import annotations

import math

import pytest

from bytekiln.config import load_config
from bytekiln.schedule import learning_rate


def rates(steps: list[int], **values: object) -> list[float]:
    config = load_config("shakespeare-char", values)
    return [learning_rate(t, config) for t in steps]


def test_nanogpts_table() -> None:
    # get_lr of nanoGPT with lr 1e-3, min_lr 1e-4, warmup 100, decay 5000
    assert rates([0, 99, 100, 2550, 5000, 9999]) == pytest.approx([1e-3 / 101, 1e-1 / 101, 1e-3, 5.5e-4, 1e-4, 1e-4])


def test_the_courses_table() -> None:
    # CS336's test case: max 1, min 0.1, warm-up 7, cosine to 21
    config = load_config(
        "tinystories", {"lr": 1, "min_lr": 0.1, "warmup_steps": 7, "cosine_iters": 21, "max_steps": 25}
    )
    expected = [0, *(t / 7 for t in range(1, 7)), 1.0, 0.9887, 0.9554, 0.9018, 0.8305, 0.7453, 0.6502, 0.55]
    expected += [0.4498, 0.3547, 0.2695, 0.1982, 0.1446, 0.1113, 0.1, 0.1, 0.1, 0.1]
    assert [learning_rate(t, config) for t in range(25)] == pytest.approx(expected, abs=1e-4)


def test_four_schedules_are_four_curves() -> None:
    steps = [0, 50, 99, 100, 500, 1500, 1999]
    none = rates(steps, max_iters=2000, warmup_iters=0, decay_lr="False")
    warm = rates(steps, max_iters=2000, warmup_iters=100, decay_lr="False")
    decay = rates(steps, max_iters=2000, warmup_iters=0, decay_lr="True", lr_decay_iters=2000)
    both = rates(steps, max_iters=2000, warmup_iters=100, decay_lr="True", lr_decay_iters=2000)
    assert none == [1e-3] * 7
    assert warm[0] < warm[1] < warm[2] < 1e-3
    assert warm[3:] == [1e-3] * 4
    assert decay[0] == 1e-3
    assert decay == sorted(decay, reverse=True)
    assert both[:3] == warm[:3]
    assert both[3:] < [1e-3] * 4
    assert len({tuple(x) for x in (none, warm, decay, both)}) == 4


def test_max_steps_leaves_a_pinned_decay_alone() -> None:
    assert rates([999], max_iters=1000)[0] > 9e-4
    assert load_config("tinystories", {"max_steps": 50}).decay_end == 50


def test_floor_is_a_tenth_unless_told() -> None:
    assert load_config("shakespeare-char").optimizer.floor_lr == 1e-4
    assert load_config("shakespeare-char", {"lr": 5e-3}).optimizer.floor_lr == pytest.approx(5e-4)
    assert load_config("shakespeare-char", {"lr": 5e-3, "min_lr": 0}).optimizer.floor_lr == 0
    assert math.isclose(load_config("tinystories").optimizer.floor_lr, 6e-5)
