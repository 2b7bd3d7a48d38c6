"""Whether validation text occurs in the training data, looked up in bounded time. Called by `data` before a run.

In: ids. Out: how many sampled windows of validation occur verbatim, at any place, in the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SAMPLES, LENGTH = 256, 64
"""Windows of validation that are looked up, and tokens of each."""
LARGEST_SCAN = 100_000_000
"""Training tokens that are read; of more, parts spread evenly over them. 0.5 s (measured, one core of 2.4 GHz)."""
_PART, _STRETCH = 1 << 16, 1 << 20
_TAPS = ((0, 3), (7, 40503), (13, 9377), (22, 30011), (31, 25717), (50, 255))
"""Places in a window and odd factors: their sum mod 2^16 is the first, cheap sieve. It lets 0.4 % through."""

_TOO_COMMON = 64
"""A sampled window is given up when more places than this in one part of 65,536 tokens look like it to the sieve."""


class Overlap(NamedTuple):
    """What was found: of `sampled` windows `found` occur in the training data, of which `scanned` was read."""

    found: int
    sampled: int
    scanned: float


def overlap(training: Sequence[NDArray[Any]], validation: NDArray[Any]) -> Overlap:
    """Look sampled windows of validation up in training data, token for token, at every offset.

    Misses what is shorter than 64 tokens or differs in one of them, what lies between the samples, what is as
    repetitive as a run of one token or has two or three different ones only (behind the first 65,536), and what lies in
    the parts of a training set beyond 100 M tokens that are not read.

    Args:
        training: ids of each file.
        validation: ids; of at least one window, else nothing is sampled.
    """
    count = min(SAMPLES, len(validation) // LENGTH)
    if not count:
        return Overlap(0, 0, 0.0)
    start_S = np.arange(count) * (len(validation) - LENGTH) // max(count - 1, 1)
    window_SxL = np.lib.stride_tricks.sliding_window_view(validation, LENGTH)[start_S].astype(np.int64)
    sieve_S, digest_S = _sieve(window_SxL), _digest(window_SxL)
    missing = np.ones(count, np.bool_)
    wanted = np.zeros(1 << 16, np.bool_)
    wanted[sieve_S] = True
    hopeless = np.zeros_like(wanted)
    total = sum(map(len, training))
    read = 0
    for tokens in training:
        share = len(tokens) * LARGEST_SCAN // total if total > LARGEST_SCAN else len(tokens)
        for begin, end in _parts(len(tokens), share):
            part = tokens[begin : min(end + LENGTH - 1, len(tokens))]
            read += end - begin
            if len(part) < LENGTH:
                continue
            sum_N = _sieve(part)
            place_N = np.flatnonzero(wanted[sum_N])
            if not len(place_N):
                continue
            window_NxL = np.lib.stride_tricks.sliding_window_view(part, LENGTH)[place_N].astype(np.int64)
            digest_U, first_U = np.unique(_digest(window_NxL), return_index=True)
            for window_L in window_NxL[first_U[np.isin(digest_U, digest_S[missing])]]:
                missing &= (window_SxL != window_L).any(axis=1)
            passed = np.bincount(sum_N[place_N], minlength=len(wanted))
            hopeless |= passed > _TOO_COMMON
            wanted[:] = False
            wanted[sieve_S[missing]] = True
            wanted &= ~hopeless
    return Overlap(int(count - missing.sum()), count, read / max(total, 1))


def _parts(length: int, share: int) -> list[tuple[int, int]]:
    """Places in a file of `length` tokens, about `share` of them, in stretches spread evenly, cut to fit the cache."""
    stretches = [(0, length)]
    if share < length:
        count = max(1, share // _STRETCH)
        stretches = [(i * (length - _STRETCH) // max(count - 1, 1),) * 2 for i in range(count)]
        stretches = [(begin, begin + _STRETCH) for begin, _ in stretches]
    return [(at, min(at + _PART, end)) for begin, end in stretches for at in range(begin, end, _PART)]


def _sieve(ids: NDArray[Any]) -> NDArray[np.uint16]:
    """16 bits of each window: rows of a matrix, or every stretch of 64 in a vector."""
    low = ids.astype(np.uint16, copy=False)
    count = ids.shape[-1] - LENGTH + 1
    out = np.zeros((*ids.shape[:-1], count), np.uint16)
    term = np.empty_like(out)
    for place, factor in _TAPS:
        out += np.multiply(low[..., place : place + count], np.uint16(factor), out=term)
    return out[..., 0] if ids.ndim == 2 else out


def _digest(window_NxL: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 bits of each window: a polynomial modulo 2^64."""
    powers = np.cumprod(np.full(LENGTH, 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)
    out: NDArray[np.uint64] = (window_NxL.astype(np.uint64) + np.uint64(1)) @ powers
    return out
