"""The largest batch that fits, in few peaks: each is a trace of a step, which takes a large model seconds.

In: the peak of memory as a function of the batch. Out: a batch. Called by `plan`; knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

STRAIGHT_GUESSES = 12
"""So many peaks the search knows before it goes by halves."""
FLAT = 16
"""The search goes on so many times as far where peaks do not grow, since the update's is the greatest still."""
BIGGEST_BATCH = 1 << 20
"""Where the search for the largest batch ends."""


def largest_batch(total: Callable[[int], int], budget: int, known: Mapping[int, int], uneven: int = 0) -> int:
    """The largest batch whose peak is within `budget`; 0 where one window is too much.

    Args:
        total: peak of a batch; it never falls as the batch grows, and is nearly the greatest of some straight lines.
        budget: bytes.
        known: peaks to begin with, at least that of no window (or a lower bound) and of one batch.
        uneven: by how much it may lie below these lines.

    >>> largest_batch(lambda b: max(700, 100 + 30 * b), 1000, {0: 100, 1: 700})
    30
    >>> largest_batch(lambda b: 100 + 30 * b, 120, {0: 100, 8: 340})
    0
    """
    seen = dict(known)
    if seen.get(0, 0) > budget:
        return 0
    low, high = 0, BIGGEST_BATCH + 1  # low fits, high does not
    guess = max(seen)
    while high - low > 1:
        if guess not in seen:
            seen[guess] = total(guess)
        before = low
        low, high = (guess, high) if seen[guess] <= budget else (low, guess)
        if _one_more_is_too_much(seen, low, budget + uneven):
            break
        # On along a line: through what fits and what does not or, before both are traced and where that line was of no
        # use, through the two peaks that are too much or nearest to the budget. Where that does not lead there soon,
        # because the peak has moved to another moment of the step, by halves.
        over = sorted(b for b in seen if seen[b] > budget)[:2]
        if low and over and not (0 < before < low and 2 * (budget - seen[low]) > budget - seen[before]):
            ends = [low, over[0]]
        else:
            ends = over if low and len(over) > 1 else sorted(seen, key=lambda b: abs(seen[b] - budget))[:2]
        (b0, m0), (b1, m1) = ((b, seen[b]) for b in ends)
        straight = m1 != m0 and len(seen) <= STRAIGHT_GUESSES
        by_halves = (low + high) // 2 if high in seen or low * FLAT > high else low * FLAT
        guess = math.floor(b0 + (budget - m0) * (b1 - b0) / (m1 - m0)) if straight else by_halves
        guess = min(guess if guess >= low else by_halves, high - 1)
        guess = max(guess, low + 1)
    return low


def _one_more_is_too_much(seen: Mapping[int, int], low: int, budget: int) -> bool:
    """Whether the line through the two peaks up to `low` says so: the greatest of straight lines never turns down.

    A large model's peak costs seconds; this spares one.
    """
    traced = sorted(batch for batch in seen if 0 < batch <= low)[-2:]
    if len(traced) < 2:
        return False
    (b0, m0), (b1, m1) = ((batch, seen[batch]) for batch in traced)
    return m1 + (m1 - m0) * (low + 1 - b1) // (b1 - b0) > budget
