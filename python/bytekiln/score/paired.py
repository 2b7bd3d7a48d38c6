"""Statistics of scores: intervals, and two models compared on the same questions or the same stretches of text.

In: which questions each got right, or what each unit of a text cost each. Out: the difference, its 95 % interval and a
p-value, with the names of the methods. Called by `cli_score`; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytekiln.errors import MismatchError

Z = 1.959964
"""Of a 95 % interval under a normal distribution."""
RESAMPLES = 10_000
MOST_DRAWS = 200_000_000
"""Units times resamples: beyond it fewer resamples are drawn, at least 1,000."""
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Comparison:
    """A minus B."""

    difference: float
    low: float
    """With `high` the 95 % interval of the difference."""
    high: float
    p_value: float
    """Of the hypothesis that the models do not differ, two-sided."""
    n: int
    """Questions or units compared."""
    test: str
    interval_method: str
    only_a: int | None = None
    """Questions that A alone got right."""
    only_b: int | None = None

    @property
    def distinguishable(self) -> bool:
        """Whether p is below 0.05."""
        return self.p_value < 0.05

    def as_json(self) -> dict[str, Any]:
        """Fields that are known."""
        said = {k: v for k, v in asdict(self).items() if k not in ("low", "high") and v is not None}
        return {**said, "interval": [self.low, self.high]}


def standard_error(correct: int, n: int) -> float | None:
    """Of an accuracy, as lm-evaluation-harness has it: the sample deviation over √n; None for a single question.

    >>> round(standard_error(25, 100), 5)
    0.04352
    """
    p = correct / n
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def accuracy_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (1927), which holds for small n and near 0 and 1 too.

    >>> [round(x, 4) for x in accuracy_interval(25, 100)]
    [0.1755, 0.343]
    """
    p, z = correct / n, Z * Z / n
    half = Z * math.sqrt(p * (1 - p) / n + z / (4 * n))
    return max(0.0, (p + z / 2 - half) / (1 + z)), min(1.0, (p + z / 2 + half) / (1 + z))


def compare_answers(a: Sequence[bool], b: Sequence[bool]) -> Comparison:
    """Two models' right answers to the same questions.

    p is McNemar's exact test: of the questions that one alone got right each model's share is binomial with 1/2. The
    interval is Wald's with one question added to either kind (Bonett and Price 2012).

    >>> c = compare_answers([True] * 9 + [False], [False] * 9 + [True])
    >>> c.difference, c.only_a, c.only_b, round(c.p_value, 4)
    (0.8, 9, 1, 0.0215)

    Raises:
        MismatchError: not the same number of questions, or none.
    """
    if len(a) != len(b) or not a:
        raise MismatchError(f"comparison: found {len(a)} and {len(b)} answers; expected those to the same questions")
    n = len(a)
    only_a, only_b = (
        sum(x and not y for x, y in zip(a, b, strict=True)),
        sum(y and not x for x, y in zip(a, b, strict=True)),
    )
    p_a, p_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = Z * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / (n + 2))
    return Comparison(
        difference=(only_a - only_b) / n,
        low=max(-1.0, p_a - p_b - half),
        high=min(1.0, p_a - p_b + half),
        p_value=_binomial_p(only_a, only_a + only_b),
        n=n,
        test="McNemar, exact",
        interval_method="Wald, adjusted by Bonett and Price",
        only_a=only_a,
        only_b=only_b,
    )


def _binomial_p(k: int, n: int) -> float:
    """Two-sided p of k in n with probability 1/2, by logarithms: n may be thousands."""
    least = min(k, n - k)
    log_half = n * math.log(2)
    terms = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - log_half for i in range(least + 1))
    return min(1.0, 2 * math.fsum(math.exp(t) for t in terms))


def compare_losses(
    a_U: NDArray[np.float64], b_U: NDArray[np.float64], weight_U: NDArray[np.float64], *, seed: int = 0
) -> Comparison:
    """Two models' losses on the same text, Σ a / Σ weight - Σ b / Σ weight.

    p is a permutation test: under the hypothesis every unit's difference has either sign with probability 1/2. The
    interval is a percentile bootstrap of the units, in which the weights are drawn with them. Both are seeded.

    Args:
        a_U: cost of every unit for model A, in bits or nats.
        b_U: for B.
        weight_U: bytes or tokens of every unit; units without any are left out.
        seed: of the draws.

    Raises:
        MismatchError: other shapes, or fewer than two units.
    """
    if not a_U.shape == b_U.shape == weight_U.shape:
        raise MismatchError(f"comparison: found {len(a_U)} and {len(b_U)} units; expected the same text for both")
    used = weight_U > 0
    d_U, w_U = (a_U - b_U)[used], weight_U[used]
    n = len(d_U)
    if n < 2:
        raise MismatchError(f"comparison: found {n} unit of text; expected at least two (more text)")
    draws = int(min(RESAMPLES, max(1000, MOST_DRAWS // n)))
    rng = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // n)
    found, above = [], 0
    least = abs(float(d_U.sum())) * (1 - 1e-12)
    for start in range(0, draws, size):
        count = min(size, draws - start)
        index_RxU = rng.integers(0, n, (count, n))
        found.append(d_U[index_RxU].sum(1) / w_U[index_RxU].sum(1))
        sign_RxU = rng.integers(0, 2, (count, n), dtype=np.int8) * 2 - 1
        above += int((np.abs(sign_RxU @ d_U) >= least).sum())
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975)).tolist()
    return Comparison(
        difference=float(d_U.sum() / w_U.sum()),
        low=low,
        high=high,
        p_value=(above + 1) / (draws + 1),
        n=n,
        test=f"permutation of signs, {draws:,} draws",
        interval_method=f"bootstrap, {draws:,} draws",
    )
