"""Masks: BERT's shares, the right targets, the same ones for the same window, and no special token touched."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bytekiln.corruption import Corruption
from bytekiln.loss import IGNORED

V, MASK, EOT = 50, 50, 7


def bert(share: float = 0.15, key: int = 1, special: tuple[int, ...] = (EOT,), mask: int = MASK) -> Corruption:
    return Corruption(share, mask, V, special, predict=True, key=key)


def windows(B: int, T: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, V, (B, T + 1))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def test_shares_of_bert() -> None:
    inputs, targets = windows(400, 256)
    out, wanted = bert().apply(inputs, targets, np.arange(400), None)
    chosen = wanted != IGNORED
    able = inputs != EOT
    n = able.sum()
    near(chosen.sum() / n, 0.15, n)
    c = chosen.sum()
    near((out[chosen] == MASK).mean(), 0.8, c)
    # A random id is the old one in 1 of 49 cases: 0.1 · 48/49 are seen as changed.
    near(((out != MASK) & (out != inputs))[chosen].mean(), 0.1 * 48 / 49, c)
    assert (out[~chosen] == inputs[~chosen]).all()
    assert (wanted[chosen] == inputs[chosen]).all(), "targets are not shifted"
    per_position = chosen.mean(axis=0)
    assert per_position.min() > 0.05
    assert per_position.max() < 0.25


def near(found: float, expected: float, n: int) -> None:
    """Within four standard deviations of a share."""
    assert abs(found - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def test_random_ids_are_even_and_never_special() -> None:
    inputs = np.full((4000, 64), 3)
    rule = Corruption(0.9, 10, V, (EOT, 20, 21, 49), predict=True, key=5)
    out, wanted = rule.apply(inputs, inputs, np.arange(4000), None)
    replaced = out[(wanted != IGNORED) & (out != 10) & (out != 3)]
    counts = np.bincount(replaced, minlength=V)
    never = [3, 7, 10, 20, 21, 49]
    assert counts[never].sum() == 0
    rest = np.delete(counts, never)
    assert len(rest) == 44
    expected = rest.mean()
    assert ((rest - expected) ** 2 / expected).sum() < 43 + 5 * (2 * 43) ** 0.5, "χ²"
    assert Corruption(0.9, 4, 5, (0, 1, 3), predict=True, key=5)._random_ids(
        np.arange(2**24, dtype=np.uint64)[::4097]
    ).tolist() == [2] * len(range(0, 2**24, 4097))


@given(
    B=st.integers(1, 6),
    T=st.integers(1, 20),
    seed=st.integers(0, 99),
    first=st.integers(0, 2**62),
    share=st.floats(0.01, 0.9),
    predict=st.booleans(),
)
def test_a_window_is_corrupted_alike_alone_and_in_a_batch(
    B: int, T: int, seed: int, first: int, share: float, predict: bool
) -> None:
    inputs, targets = windows(B, T, seed)
    rule = Corruption(share, MASK, V, (EOT,), predict=predict, key=3)
    number = np.arange(first, first + B)
    together = rule.apply(inputs, targets, number, None)
    for i in range(B):
        alone = rule.apply(inputs[i : i + 1], targets[i : i + 1], number[i : i + 1], None)
        assert [a[0].tolist() for a in alone] == [t[i].tolist() for t in together]


def test_other_windows_epochs_and_seeds_are_corrupted_otherwise() -> None:
    inputs, targets = windows(1, 200)
    seen = {
        bert(key=key).apply(inputs, targets, np.array([number]), None)[1].tobytes()
        for key, number in ((1, 0), (1, 1), (2, 0))
    }
    assert len(seen) == 3


@given(length=st.integers(0, 12), seed=st.integers(0, 50))
def test_something_is_predicted_but_neither_padding_nor_specials(length: int, seed: int) -> None:
    inputs, targets = windows(3, 12, seed)
    inputs[1] = EOT
    before = inputs.copy()
    out, wanted = bert(0.01).apply(inputs, targets, np.arange(3), np.full(3, length))
    assert (inputs == before).all(), "the caller's array stays"
    able = (inputs != EOT) & (np.arange(12) < length)
    chosen = wanted != IGNORED
    assert not (chosen & ~able).any()
    assert (out[~able] == inputs[~able]).all()
    assert (chosen.any(axis=1) == able.any(axis=1)).all(), "every window with a token to choose has a target"


def test_draws_are_part_of_the_format() -> None:
    """A run that is resumed by a later version relies on them."""
    inputs = np.arange(40).reshape(2, 20)
    rule = Corruption(0.3, MASK, V, (EOT,), predict=True, key=1)
    out, targets = rule.apply(inputs, inputs, np.array([0, 10**9]), None)
    chosen = [(row, place) for row, place in np.argwhere(targets != IGNORED).tolist()]
    assert chosen == [*((0, t) for t in (1, 2, 3, 4, 9, 12, 15, 17)), (1, 2), (1, 10), (1, 17)]
    masked = [(row, place) for row, place in np.argwhere(out == MASK).tolist()]
    assert masked == [c for c in chosen if c != (0, 3)]


def test_augmentation_masks_a_share_and_leaves_the_targets() -> None:
    inputs, targets = windows(200, 256)
    out, same = Corruption(0.3, MASK, V, (EOT,), predict=False, key=1).apply(inputs, targets, np.arange(200), None)
    changed = out != inputs
    assert same is targets
    assert (out[changed] == MASK).all()
    assert not changed[inputs == EOT].any()
    near(changed.sum() / (inputs != EOT).sum(), 0.3, int((inputs != EOT).sum()))
