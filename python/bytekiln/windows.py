"""Which window comes when: orders over a file, and how several files are mixed. Numbers in, places out; no torch.

In: the numbers of windows in a run (0, 1, 2 … over all steps and ranks). Out: the file, and the place in it. Called by
`data`. Everything is a pure function of its arguments that costs the same for window 0 and window 10⁹, and needs no
memory that grows with the file: a resumed run sees what the unbroken one saw, whatever made the batches.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from bytekiln.errors import ConfigError

Numbers = NDArray[np.int64]
_WORD = 2**64 - 1
_ROUNDS = 6
"""Rounds of the Feistel network; four make it indistinguishable from random for its length (Luby and Rackoff 1988)."""
_GREATEST_TOTAL = 1 << 30
"""Sum of integer shares in a mixture: products of two of them, doubled, stay inside 63 bits."""


def key_of(*parts: int) -> int:
    """A 64-bit key from integers, each of which changes it (SplitMix64, Steele et al. 2014)."""
    key = 0x243F6A8885A308D3
    for part in parts:
        key = (key ^ (part & _WORD)) + 0x9E3779B97F4A7C15 & _WORD
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _WORD
        key ^= key >> 31
    return key


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each word through SplitMix64's finaliser: the bits of its neighbours look independent."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return out


def permuted(index_N: Numbers, size_N: Numbers, key_N: NDArray[np.uint64]) -> Numbers:
    """Where each index goes in a keyed permutation of range(size): a bijection for every size and key.

    A Feistel network over the next power of two, both halves in turn, repeated for what falls outside (cycle walking,
    Black and Rogaway 2002): fewer than two passes on average, since more than half of the numbers lie inside.

    Args:
        index_N: indices, each in [0, size).
        size_N, key_N: size and key of each one's permutation.
    """
    size = size_N.astype(np.uint64)
    bits = np.maximum(np.frexp((size_N - 1).astype(np.float64))[1], 2).astype(np.uint64)
    low_bits = bits >> np.uint64(1)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low_bits)) - np.uint64(1)
    out = index_N.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        low, high = out[todo] & low_mask[todo], out[todo] >> low_bits[todo]
        for turn in range(_ROUNDS):
            key = key_N[todo] + np.uint64(turn << 40)
            if turn % 2:
                high ^= mixed(low ^ key) & high_mask[todo]
            else:
                low ^= mixed(high ^ key) & low_mask[todo]
        out[todo] = low | (high << low_bits[todo])
        todo = todo[out[todo] >= size[todo]]
    return out.astype(np.int64)


def shuffled(number_N: Numbers, count: int, key: int) -> Numbers:
    """Things 0 … count-1 in random order, every epoch in another one, each once an epoch."""
    epoch_N, index_N = np.divmod(number_N, count)
    return permuted(index_N, np.full_like(index_N, count), mixed(epoch_N.astype(np.uint64) ^ np.uint64(key)))


def shuffled_starts(number_N: Numbers, tokens: int, context: int, key: int) -> Numbers:
    """Starts of windows in a stream of tokens, in random order without replacement.

    The windows of an epoch tile the stream and do not overlap; each epoch begins at another phase in [0, context), the
    first at 0, and leaves out less than a window at either end. After `context` epochs every phase has been, so every
    possible start was used exactly once: Σ_φ ⌊(tokens-1-φ)/context⌋ = tokens - context (Hermite's identity).

    Args:
        number_N: numbers of windows.
        tokens: tokens in the stream, at least context + 1.
        context: tokens in a window; its last target is one further.
        key: of the shuffle.
    """
    round_N, within_N = np.divmod(number_N, tokens - context)
    out = np.empty_like(number_N)
    for round_ in np.unique(round_N):
        chosen = round_N == round_
        key_of_round = key_of(key, int(round_))
        phase_E = _phases(context, key_of_round)
        windows_E = (tokens - 1 - phase_E) // context
        end_E = np.cumsum(windows_E)
        epoch_N = np.searchsorted(end_E, within_N[chosen], side="right")
        index_N = within_N[chosen] - (end_E - windows_E)[epoch_N]
        key_N = mixed(epoch_N.astype(np.uint64) ^ np.uint64(key_of_round))
        out[chosen] = phase_E[epoch_N] + context * permuted(index_N, windows_E[epoch_N], key_N)
    return out


def _phases(context: int, key: int) -> Numbers:
    phase_E = permuted(np.arange(context), np.full(context, context), np.full(context, key_of(key, 1), dtype=np.uint64))
    return np.roll(phase_E, -int(phase_E.argmin()))


def sequential_starts(number_N: Numbers, tokens: int, context: int) -> Numbers:
    """Starts of windows as they stand in the stream, from its first token again in every epoch."""
    return number_N % ((tokens - 1) // context) * context


def random_starts(seed: int, step: int, place: int, count: int, starts: Numbers | int) -> Numbers:
    """Starts of windows place … place+count-1 of a step, drawn with replacement from range(starts).

    Philox is a counter-based generator (Salmon et al. 2011): step t reads its own stretch of the stream, and numpy
    keeps raw streams stable from version to version. The remainder's bias is below 1e-9. A counter gives four words.
    """
    raw_N = np.random.Philox(key=seed, counter=[place // 4, 0, step, 0]).random_raw(place % 4 + count)[place % 4 :]
    return (raw_N % np.asarray(starts, dtype=np.uint64)).astype(np.int64)


def spread_starts(count: int, tokens: int, context: int) -> Numbers:
    """Starts of at most `count` windows that do not overlap, spread evenly over the stream, always the same."""
    fitting = (tokens - 1) // context
    if count >= fitting:
        return np.arange(fitting, dtype=np.int64) * context
    return np.arange(count, dtype=np.int64) * (tokens - 1 - context) // max(count - 1, 1)


def whole_shares(text: str, count: int) -> list[int]:
    """`data_weights` as integers in the same proportion.

    >>> whole_shares("0.7, 0.3", 2)
    [7, 3]

    Raises:
        ConfigError: not `count` positive numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        weights = [Fraction(part) for part in parts]
    except (ValueError, ZeroDivisionError):
        weights = []
    if len(weights) != count or min(weights) <= 0:
        raise ConfigError(f"data_weights: found {text!r}; expected {count} positive numbers, one a file of train_data")
    common = math.lcm(*(w.denominator for w in weights))
    shares = [int(w * common) for w in weights]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


class Mixture:
    """Deals windows to files in fixed proportions, evenly: after any n windows each file has had its share, rounded.

    A binary tree over the files; a node that has dealt n windows has given ⌊n·a/s + ½⌋ of them to its left side, of
    weight a in s. The tree is Huffman's, so a file's error, ½·Σ of its weight over those of the nodes above it but the
    root, stays below 1 window for up to three files and below 1.7 for any number. After s windows of the root nothing
    is rounded. (Tijdeman 1980 has below 1 for all, but needs to count from the first window on.)
    """

    def __init__(self, shares: Sequence[int]) -> None:
        """Take positive integer shares; beyond 2³⁰ in all they are rounded to 2³⁰."""
        total = sum(shares)
        if total > _GREATEST_TOTAL:
            shares = [max(1, share * (_GREATEST_TOTAL - len(shares)) // total) for share in shares]
        self.shares = tuple(shares)
        self._left: list[int] = []
        self._right: list[int] = []
        self._weight: list[tuple[int, int]] = []
        heap = [(share, file) for file, share in enumerate(shares)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (a, left), (b, right) = heapq.heappop(heap), heapq.heappop(heap)
            self._left.append(left)
            self._right.append(right)
            self._weight.append((a, a + b))
            heapq.heappush(heap, (a + b, len(shares) + len(self._left) - 1))
        self._root = heap[0][1]

    def split(self, number_N: Numbers) -> tuple[NDArray[np.int64], Numbers]:
        """The file of each window, and its number among the windows of that file."""
        file_N, index_N = np.zeros_like(number_N), number_N.copy()
        if self._left:
            self._deal(self._root, number_N, np.arange(len(number_N)), file_N, index_N)
        return file_N, index_N

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` windows each file has."""
        counts, open_nodes = [0] * len(self.shares), [(self._root, number)]
        while open_nodes:
            node, n = open_nodes.pop()
            if node < len(counts):
                counts[node] = n
                continue
            inner = node - len(counts)
            a, s = self._weight[inner]
            left = (2 * n * a + s) // (2 * s)
            open_nodes += [(self._left[inner], left), (self._right[inner], n - left)]
        return counts

    def _deal(self, node: int, n: Numbers, place: Numbers, file_N: Numbers, index_N: Numbers) -> None:
        if not len(place):
            return
        if node < len(self.shares):
            file_N[place], index_N[place] = node, n
            return
        inner = node - len(self.shares)
        a, s = self._weight[inner]
        before = self._dealt_left(n, a, s)
        goes_left = self._dealt_left(n + 1, a, s) > before
        self._deal(self._left[inner], before[goes_left], place[goes_left], file_N, index_N)
        self._deal(self._right[inner], (n - before)[~goes_left], place[~goes_left], file_N, index_N)

    @staticmethod
    def _dealt_left(n: Numbers, a: int, s: int) -> Numbers:
        whole, rest = np.divmod(n, s)
        out: Numbers = whole * a + (2 * rest * a + s) // (2 * s)
        return out
