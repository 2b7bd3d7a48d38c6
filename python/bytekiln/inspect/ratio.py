"""Ratios of sums over documents, such as bytes a token, with the interval that the choice of documents leaves.

In: two numbers a document. Out: their ratio and its 95 % interval; differences of two ratios on the same documents.
Documents of a text are long and short, so the mean of their ratios would be another number: the ratio of the sums is
estimated. Its variance is the jackknife's, one document left out at a time (Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 11). The linearised variance (Cochran, Sampling Techniques, 1977, theorem 2.5) is the same
for many documents, but for few of very different lengths it is too small, as tests/test_inspect.py shows. The factor
1 - f of a finite text is left out: what one wants to know is about more text of the kind. Called by
`inspect.compression`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bytekiln.student import t_quantile

METHOD = "ratio of sums over documents, jackknife variance (Efron and Tibshirani 1993, chapter 11), Student’s t"


@dataclass(frozen=True)
class Ratio:
    """An estimate.

    Attributes:
        value: the ratio, or a difference of ratios; None where there is nothing to divide by.
        influence_D: how far each document pulls it: n - 1 times what leaving it out changes.
    """

    value: float | None
    influence_D: NDArray[np.float64]

    def __sub__(self, other: Ratio) -> Ratio:
        """The difference, paired by document: what both owe to a document cancels."""
        if self.value is None or other.value is None:
            return Ratio(None, self.influence_D[:0])
        return Ratio(self.value - other.value, self.influence_D - other.influence_D)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval; None with fewer than two documents, whose spread cannot be seen."""
        n = len(self.influence_D)
        if self.value is None or n < 2:
            return None
        error = math.sqrt(float((self.influence_D**2).sum()) / (n - 1) / n)
        half = t_quantile(0.975, n - 1) * error
        return self.value - half, self.value + half


def ratio(above_D: NDArray[np.integer], below_D: NDArray[np.integer]) -> Ratio:
    """Σ above / Σ below.

    >>> r = ratio(np.array([40, 50, 36]), np.array([10, 11, 9]))
    >>> r.value, [round(x, 3) for x in r.interval]
    (4.2, [3.359, 5.041])
    """
    total = int(below_D.sum())
    if total == 0:
        return Ratio(None, np.empty(0))
    value = int(above_D.sum()) / total
    others_D = np.maximum(total - below_D, 1)  # a document alone is without others, and without an interval
    return Ratio(value, (above_D - value * below_D) * (len(below_D) - 1) / others_D)
