"""The learning rate at chosen steps, as published; and what holds for every schedule."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekiln.config import UNLIMITED_STEPS, RunConfig, load_config
from bytekiln.schedule import Progress, batch_multiple, fraction, learning_rate


def at(step: int, config: RunConfig) -> Progress:
    return Progress(step, config.training.max_steps)


def rate(step: int, config: RunConfig) -> float:
    return learning_rate(at(step, config), config)


def rates(steps: list[int], **values: object) -> list[float]:
    config = load_config("shakespeare-char", values)
    return [rate(t, config) for t in steps]


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
    assert [rate(t, config) for t in range(25)] == pytest.approx(expected, abs=1e-4)


def test_seed_002s_formula() -> None:
    # lr = peak·(0.1 + 0.9·0.5·(1 + cos(π·progress))) after a linear warm-up over 5 % of the optimizer steps
    peak, steps = 0.01, 1000
    config = RunConfig().with_(
        lr=peak, max_steps=steps, warmup_rule="fraction", warmup_fraction=0.05, schedule="cosine", min_lr_ratio=0.1
    )
    for t in range(steps + 1):
        progress = (t - 50) / (steps - 50)
        theirs = peak * t / 50 if t < 50 else peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        assert rate(t, config) == pytest.approx(theirs, rel=1e-12)


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


def shape(schedule: str, steps: list[int], **values: object) -> list[float]:
    config = RunConfig().with_(lr=1.0, max_steps=100, min_lr_ratio=0.1, schedule=schedule, **values)
    return [rate(t, config) for t in steps]


def test_shapes() -> None:
    steps = [0, 5, 10, 55, 80, 90, 100, 150]
    warm = {"warmup_steps": 10, "warmup_rule": "course"}
    assert shape("constant", steps, **warm) == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 1])
    assert shape("linear", steps, **warm) == pytest.approx([0, 0.5, 1, 0.55, 0.3, 0.2, 0.1, 0.1])
    assert shape("trapezoid", steps, **warm) == pytest.approx([0, 0.5, 1, 1, 1, 0.55, 0.1, 0.1])
    assert shape("trapezoid", steps, **warm, decay_fraction=0.9) == shape("linear", steps, **warm)
    assert shape("trapezoid", [30, 40, 45, 50], decay_steps=50) == pytest.approx([1, 1, 0.55, 0.1])
    # √(10/t), stretched so that √(10/100) is the floor
    stretched = [0.1 + 0.9 * (math.sqrt(10 / t) - math.sqrt(0.1)) / (1 - math.sqrt(0.1)) for t in (10, 55, 80, 90)]
    assert shape("inverse_sqrt", steps, **warm) == pytest.approx([0, 0.5, *stretched, 0.1, 0.1])
    assert shape("wsd", steps, **warm) == shape("trapezoid", steps, **warm)


def test_progress_is_what_is_counted() -> None:
    tokens = RunConfig().with_(token_budget=500, lr=1.0, schedule="linear", min_lr=0.0)
    where = Progress(step=1, max_steps=1000, tokens=250, token_budget=500, seconds=9, max_time=10)
    assert fraction(where, tokens) == 0.5
    assert learning_rate(where, tokens) == 0.5
    seconds = RunConfig().with_(max_time="10s", token_budget=500, lr=1.0, schedule="linear", min_lr=0.0)
    assert fraction(where, seconds) == 0.9
    assert learning_rate(where, seconds) == pytest.approx(0.1)
    assert learning_rate(where._replace(seconds=12.0), seconds) == 0.0
    steps = seconds.with_(progress="steps")
    assert fraction(where, steps) == 0.001
    assert learning_rate(where, steps) == pytest.approx(0.999)


@pytest.mark.parametrize("end", [{"max_steps": 40}, {"token_budget": 400}, {"max_time": 40.0}])
def test_the_decay_ends_with_whichever_limit_ends_first(end: dict[str, object]) -> None:
    """10 tokens and a second a step; the two other limits lie beyond."""
    limits = {"max_steps": 50, "token_budget": 700, "max_time": 60.0}
    c = RunConfig().with_(lr=1.0, schedule="linear", min_lr=0.0, **{**limits, **end})
    t = c.training

    def where(step: int) -> Progress:
        return Progress(step, t.max_steps, 10 * step, t.token_budget, float(step), t.max_time)

    for step in range(61):
        assert fraction(where(step), c) == pytest.approx(min(step / 40, 1.0))
        assert learning_rate(where(step), c) == pytest.approx(max(1 - step / 40, 0.0), abs=1e-12)
    for name, share in (("steps", 20 / t.max_steps), ("tokens", 200 / t.token_budget), ("seconds", 20 / t.max_time)):
        assert fraction(where(20), c.with_(progress=name)) == share


def test_a_run_without_a_limit_of_steps_does_not_count_them() -> None:
    c = load_config("debug", {"max_time": 10, "lr": 1.0, "schedule": "linear", "min_lr": 0.0, "warmup_steps": 0})
    assert c.training.max_steps == UNLIMITED_STEPS
    assert fraction(Progress(UNLIMITED_STEPS // 2, UNLIMITED_STEPS, seconds=1.0, max_time=10.0), c) == 0.1
    forever = RunConfig().with_(max_steps=UNLIMITED_STEPS)
    assert fraction(Progress(UNLIMITED_STEPS // 2, UNLIMITED_STEPS), forever) == 0.5


def test_a_warm_up_in_steps_beside_a_decay_in_seconds() -> None:
    c = RunConfig().with_(max_time=100, lr=1.0, warmup_steps=4, min_lr=0.0, schedule="linear")
    # the first step comes after 20 s of compiling; the decay begins when the warm-up has ended, at its full rate
    found = [learning_rate(Progress(t, 10**6, seconds=20.0 + t, max_time=100), c) for t in range(6)]
    assert found[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert 0.9 < found[5] < 1.0


def test_stages() -> None:
    c = RunConfig().with_(batch_stages="0.5:2 0.75:8")
    assert [batch_multiple(x / 8, c) for x in range(9)] == [1, 1, 1, 1, 2, 2, 8, 8, 8]
    assert batch_multiple(0.9, RunConfig()) == 1


choices = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(["constant", "linear", "cosine", "trapezoid", "inverse_sqrt"]),
        "lr": st.floats(1e-5, 1.0),
        "min_lr_ratio": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "decay_fraction": st.floats(0.01, 1.0),
        "decay_lr": st.booleans(),
        "max_steps": st.integers(20, 60),
    }
)
warmups = st.one_of(
    st.fixed_dictionaries({"warmup_rule": st.sampled_from(["course", "nanogpt"]), "warmup_steps": st.integers(0, 15)}),
    st.fixed_dictionaries({"warmup_rule": st.just("fraction"), "warmup_fraction": st.floats(0.0, 1.0)}),
)


@given(choices, warmups, st.sampled_from(["steps", "tokens", "seconds"]), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_what_holds_for_every_curve(
    values: dict[str, object], warmup: dict[str, object], progress: str, alone: bool, seed: int
) -> None:
    budgets = {"tokens": {"token_budget": 10_000}, "seconds": {"max_time": 100.0}, "steps": {}}[progress]
    c = RunConfig().with_(**values, **warmup, **budgets, progress=progress if alone else "auto")
    o, most = c.optimizer, c.training.max_steps
    # steps of uneven size, whose sizes add up to the budget
    draw = random.Random(seed)
    sizes = [1.0 if progress == "steps" else draw.uniform(0.1, 10) for _ in range(most)]
    total, done = sum(sizes), 0.0
    found = []
    for t in range(most + 1):
        share = min(done / total, 1.0) if t < most else 1.0
        where = Progress(t, most, round(share * 10_000), 10_000, share * 100, 100.0)
        found.append((where, learning_rate(where, c)))
        done += sizes[t] if t < most else 0.0
    warming = [
        fraction(w, c) < o.warmup_fraction if o.warmup_rule == "fraction" else w.step < o.warmup_steps for w, _ in found
    ]
    rises = [r for (_, r), hot in zip(found, warming, strict=True) if hot]
    falls = [r for (_, r), hot in zip(found, warming, strict=True) if not hot]
    assert rises == sorted(rises)
    assert all(0 <= r <= o.lr for r in rises)
    assert falls == sorted(falls, reverse=True)
    assert all(min(o.floor_lr, o.lr) <= r <= o.lr for r in falls)
    if falls:
        ends = o.decay_lr and o.schedule != "constant"
        assert falls[-1] == (o.floor_lr if ends else o.lr)
        if warmup["warmup_rule"] != "fraction" and len(falls) > 1:
            assert falls[0] == pytest.approx(o.lr), "the warm-up ends where the decay begins"


@given(choices, warmups, st.integers(1, 999), st.sampled_from(["tokens", "seconds"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tokens_and_seconds_in_proportion_give_the_curve_of_steps(
    values: dict[str, object], warmup: dict[str, object], each: int, progress: str, alone: bool
) -> None:
    by_steps = RunConfig().with_(**values, **warmup)
    most = by_steps.training.max_steps
    budget = {"token_budget": each * most} if progress == "tokens" else {"max_time": float(each * most)}
    other = by_steps.with_(**budget, progress=progress if alone else "auto")
    for t in range(most + 2):
        where = Progress(t, most, each * t, each * most, float(each * t), float(each * most))
        assert learning_rate(where, other) == pytest.approx(learning_rate(where, by_steps), rel=1e-9, abs=1e-15)


@given(choices, st.just(0.0) | st.floats(1e-6, 0.9), st.floats(0.0, 0.999))
@settings(max_examples=100, deadline=None)
def test_no_jumps(values: dict[str, object], warmup: float, place: float) -> None:
    """But for a warm-up that is shorter than the distance looked at here: that is one."""
    c = RunConfig().with_(**values, warmup_rule="fraction", warmup_fraction=warmup, max_time=1.0)
    near = [learning_rate(Progress(5, 100, seconds=min(place + d, 1.0), max_time=1.0), c) for d in (0.0, 1e-9)]
    rise = 1 / warmup if warmup else 0.0
    steepest = c.optimizer.lr * 1e-9 * max(rise, 60 / (1 - warmup) / values["decay_fraction"])
    assert abs(near[1] - near[0]) <= steepest + 1e-12
