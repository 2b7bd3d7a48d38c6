"""Orders are bijections, mixtures deal fair shares, packing equals its specification, targets are right."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekiln import packing
from bytekiln.errors import ConfigError
from bytekiln.loss import IGNORED
from bytekiln.packing import Pieces, Plan, best_fit, document_ends, packed_plan, padded_plan
from bytekiln.windows import (
    Mixture,
    key_of,
    permuted,
    random_starts,
    sequential_starts,
    shuffled,
    shuffled_starts,
    spread_starts,
    whole_shares,
)

EOT = 0


# --- orders ---------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    index = np.arange(size)
    out = permuted(index, np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(out.tolist()) == index.tolist()


@given(size=st.integers(1, 2**52), key=st.integers(0, 2**64 - 1), seed=st.integers(0, 99))
def test_permutation_of_a_huge_range_stays_inside_and_never_repeats(size: int, key: int, seed: int) -> None:
    index = np.unique(np.random.default_rng(seed).integers(0, size, 200))
    out = permuted(index, np.full(len(index), size), np.full(len(index), key, np.uint64))
    assert out.min() >= 0
    assert out.max() < size
    assert len(np.unique(out)) == len(index)


def test_each_place_of_a_permutation_does_not_depend_on_its_neighbours() -> None:
    index, sizes, keys = np.arange(60) % 7, np.arange(60) % 5 + 7, mixed_keys(60)
    together = permuted(index, sizes, keys)
    alone = [int(permuted(index[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0]) for i in range(60)]
    assert together.tolist() == alone


def mixed_keys(count: int) -> np.ndarray:
    return np.array([key_of(i) for i in range(count)], np.uint64)


def test_permutation_looks_random() -> None:
    """χ² of where each index goes, over keys: 9 × 9 degrees of freedom, mean 81, deviation 12.7."""
    n, keys = 10, 4000
    out = permuted(np.tile(np.arange(n), keys), np.full(n * keys, n), np.repeat(mixed_keys(keys), n))
    seen = np.zeros((n, n))
    np.add.at(seen, (np.tile(np.arange(n), keys), out), 1)
    assert ((seen - keys / n) ** 2 / (keys / n)).sum() < 81 + 5 * 12.7
    far = permuted(np.arange(100_000), np.full(100_000, 100_000), np.full(100_000, 5, np.uint64))
    assert abs(np.corrcoef(np.arange(100_000), far)[0, 1]) < 0.015
    assert abs(np.corrcoef(far[1:], far[:-1])[0, 1]) < 0.015


def test_shuffled_takes_each_once_an_epoch_in_another_order() -> None:
    out = shuffled(np.arange(3 * 50), 50, key_of(1)).reshape(3, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in out.tolist())
    assert out[0].tolist() != out[1].tolist() != list(range(50))


@given(context=st.integers(1, 12), more=st.integers(1, 80), key=st.integers(0, 2**64 - 1))
def test_shuffled_starts_tile_the_stream_and_then_shift(context: int, more: int, key: int) -> None:
    tokens = context + more
    starts = shuffled_starts(np.arange(2 * more), tokens, context, key)
    assert sorted(starts[:more].tolist()) == list(range(more)), "a round: every possible start exactly once"
    assert sorted(starts[more:].tolist()) == list(range(more))
    first = (tokens - 1) // context
    assert sorted(starts[:first].tolist()) == [i * context for i in range(first)], "the first epoch has phase 0"
    at, phases = 0, []
    while at < more:
        phases.append(int(starts[at]) % context)
        count = (tokens - 1 - phases[-1]) // context
        assert sorted(starts[at : at + count].tolist()) == [phases[-1] + i * context for i in range(count)]
        at += count
    assert len(set(phases)) == len(phases)


@given(begin=st.integers(0, 10**12), tokens=st.integers(40, 10**12))
@settings(max_examples=50)
def test_shuffled_starts_are_the_same_alone_and_in_any_company(begin: int, tokens: int) -> None:
    together = shuffled_starts(np.arange(begin, begin + 9), tokens, 16, 3)
    assert together.min() >= 0
    assert together.max() + 17 <= tokens
    assert [int(shuffled_starts(np.array([n]), tokens, 16, 3)[0]) for n in range(begin, begin + 9)] == together.tolist()


def test_other_seeds_give_other_orders() -> None:
    numbers = np.arange(60)
    assert (
        shuffled_starts(numbers, 10_000, 8, key_of(1)).tolist()
        != shuffled_starts(numbers, 10_000, 8, key_of(2)).tolist()
    )


def test_orders_are_part_of_the_format() -> None:
    """A run that is resumed by a later version relies on them."""
    key = key_of(42, 0)
    assert key == 8694572856528214687
    late = np.array([0, 1, 2, 73, 74, 75, 10**9])
    assert shuffled_starts(late, 600, 8, key).tolist() == [384, 392, 160, 376, 519, 463, 327]
    assert shuffled(np.array([0, 1, 2, 99, 100, 10**9]), 100, key).tolist() == [94, 77, 97, 46, 97, 5]
    assert Mixture([7, 3]).split(np.arange(10))[0].tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 1, 0]


def test_sequential_starts_read_on_and_begin_again() -> None:
    assert sequential_starts(np.arange(5), 25, 8).tolist() == [0, 8, 16, 0, 8]
    assert sequential_starts(np.arange(3), 24, 8).tolist() == [0, 8, 0], "the third window would lack its last target"


@given(place=st.integers(0, 40), count=st.integers(1, 30), step=st.integers(0, 2**40))
def test_random_starts_of_a_place_do_not_depend_on_how_the_step_is_cut(place: int, count: int, step: int) -> None:
    whole = np.random.Philox(key=9, counter=[0, 0, step, 0]).random_raw(place + count) % np.uint64(591)
    assert random_starts(9, step, place, count, 591).tolist() == whole[place:].tolist()


@given(count=st.integers(9, 400), wanted=st.integers(1, 60))
def test_spread_windows_never_overlap(count: int, wanted: int) -> None:
    starts = spread_starts(wanted, count, 8)
    assert 1 <= len(starts) == min(wanted, (count - 1) // 8)
    assert starts[0] == 0
    assert starts[-1] + 9 <= count
    assert (np.diff(starts) >= 8).all()


# --- mixtures -------------------------------------------------------------------------------------------------


@given(shares=st.lists(st.integers(1, 1000), min_size=1, max_size=6))
@settings(max_examples=60)
def test_every_prefix_has_its_shares(shares: list[int]) -> None:
    mixture, n = Mixture(shares), 400
    file_N, index_N = mixture.split(np.arange(n))
    counts = np.zeros(len(shares))
    bound = 1.0 if len(shares) <= 3 else 1.7
    for i, (file, index) in enumerate(zip(file_N.tolist(), index_N.tolist(), strict=True)):
        assert index == counts[file], "a file's windows are numbered without a gap"
        counts[file] += 1
        exact = (i + 1) * np.array(shares) / sum(shares)
        assert np.abs(counts - exact).max() < bound
        assert counts.tolist() == mixture.counts(i + 1)


@given(shares=st.lists(st.integers(1, 10**8), min_size=1, max_size=6))
def test_whole_turns_are_exact_however_late(shares: list[int]) -> None:
    total = sum(shares)
    assert Mixture(shares).counts(total) == shares
    file_N, index_N = Mixture(shares).split(np.arange(3 * total, 3 * total + 20))
    counts = Mixture(shares).counts(3 * total)
    assert counts == [3 * s for s in shares]
    for file, index in zip(file_N.tolist(), index_N.tolist(), strict=True):
        assert index == counts[file]
        counts[file] += 1


def test_shares_beyond_two_to_the_thirty_are_rounded_not_overflown() -> None:
    mixture = Mixture([2**40, 2**41, 7])
    n = 2**40
    counts = mixture.counts(n)
    assert sum(counts) == n
    assert counts[0] / n == pytest.approx(1 / 3, abs=1e-8)
    file_N, index_N = mixture.split(np.array([n]))
    assert index_N[0] == counts[file_N[0]]


def test_weights_are_read_exactly() -> None:
    assert whole_shares("0.7,0.3", 2) == [7, 3]
    assert whole_shares("1, 1 ,2", 3) == [1, 1, 2]
    for wrong, count in (("0.7", 2), ("0.7,0", 2), ("1,-1", 2), ("a,b", 2), ("", 1), ("nan,1", 2), ("1/0,1", 2)):
        with pytest.raises(ConfigError, match="data_weights"):
            whole_shares(wrong, count)


# --- documents ------------------------------------------------------------------------------------------------


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Piece by piece, as the docstring says it."""
    out, opened = [0] * len(lengths), 0
    waiting: dict[int, deque[int]] = {space: deque() for space in range(capacity + 1)}
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        space = next((s for s in range(lengths[piece], capacity + 1) if waiting[s]), None)
        if space is None:
            space, window, opened = capacity, opened, opened + 1
        else:
            window = waiting[space].popleft()
        out[piece] = window
        waiting[space - lengths[piece]].append(window)
    return out


@given(data=st.data(), capacity=st.integers(1, 24))
def test_best_fit_equals_its_specification(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=120))
    assert best_fit(np.array(lengths, np.int32), capacity).tolist() == slow_best_fit(lengths, capacity)


def document_lists(largest: int = 30) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(1, 9), max_size=largest), min_size=1, max_size=25)


def stream_of(documents: list[list[int]], ended: bool) -> np.ndarray:
    ids = [id for document in documents for id in [*document, EOT]]
    return np.array(ids if ended else [*ids, 5, 6, 7], np.uint16)


@given(documents=document_lists(), ended=st.booleans(), part=st.integers(1, 9))
def test_document_ends(documents: list[list[int]], ended: bool, part: int) -> None:
    tokens, expected, at = stream_of(documents, ended), [], 0
    for document in documents:
        at += len(document) + 1
        expected.append(at)
    expected += [] if ended else [at + 3]
    before = packing._SCAN_IDS
    packing._SCAN_IDS = part
    try:
        assert document_ends(tokens, EOT).tolist() == expected
        assert document_ends(tokens, EOT, enough=1).tolist() == expected[:1]
    finally:
        packing._SCAN_IDS = before


def read_all(
    tokens: np.ndarray, plan: Plan, context: int, dynamic: bool
) -> list[tuple[list[int], list[int], list[int]]]:
    """(inputs, targets, documents) of every window, padding cut off after a look at it."""
    rows = Pieces(tokens, plan, context, fill=EOT, dynamic=dynamic).read(np.arange(plan.windows))
    assert rows.documents_BxT is not None
    assert rows.lengths_B is not None
    assert rows.inputs_BxT.dtype == rows.targets_BxT.dtype == np.int64
    assert rows.documents_BxT.dtype == np.int32
    out = []
    for inputs, targets, documents, length in zip(
        rows.inputs_BxT, rows.targets_BxT, rows.documents_BxT, rows.lengths_B, strict=True
    ):
        assert (targets[length:] == IGNORED).all()
        assert (documents[length:] == documents[length - 1] + 1).all(), "padding is a document of its own"
        out.append((inputs[:length].tolist(), targets[:length].tolist(), documents[:length].tolist()))
    return out


@given(documents=document_lists(), ended=st.booleans(), context=st.integers(2, 12))
def test_packed_windows(documents: list[list[int]], ended: bool, context: int) -> None:
    tokens = stream_of(documents, ended)
    plan = packed_plan(tokens, EOT, context)
    windows = read_all(tokens, plan, context, dynamic=False)
    assert sorted(id for inputs, _, _ in windows for id in inputs) == sorted(tokens.tolist()), "every token once"
    ends = document_ends(tokens, EOT)
    begins = [0, *ends[:-1].tolist()]
    starts = np.sort(plan.start_S)
    assert set(begins) <= set(starts.tolist()), "every document begins a piece"
    for w, (inputs, targets, numbers) in enumerate(windows):
        pieces = range(int(plan.first_W[w]), int(plan.first_W[w + 1]))
        expected_inputs, expected_targets, expected_numbers = [], [], []
        for nth, piece in enumerate(pieces):
            start, length = int(plan.start_S[piece]), int(plan.length_S[piece])
            end = int(ends[np.searchsorted(ends, start, side="right")])
            whole = start in begins
            assert length == min(context, end - start), "whole documents, or a full window of one, or its rest"
            follower = None
            if nth + 1 < len(pieces) and int(plan.start_S[piece + 1]) in begins:
                follower = int(tokens[plan.start_S[piece + 1]])
            for t in range(start, start + length):
                inside = t + 1 < end
                expected_targets.append(int(tokens[t + 1]) if inside else IGNORED if follower is None else follower)
            expected_inputs += tokens[start : start + length].tolist()
            expected_numbers += [nth] * length
            later_heads = [int(plan.start_S[p]) in begins for p in pieces[nth:]]
            assert whole or not any(later_heads), "rests of split documents stand behind whole ones"
        assert (inputs, targets, numbers) == (expected_inputs, expected_targets, expected_numbers)
    firsts = [
        min(int(plan.start_S[p]) for p in range(plan.first_W[w], plan.first_W[w + 1])) for w in range(plan.windows)
    ]
    assert firsts == sorted(firsts), "windows stand in the order of their first documents"


@given(documents=document_lists(), context=st.integers(2, 12), pool=st.integers(1, 9))
def test_packing_in_pools_loses_nothing(documents: list[list[int]], context: int, pool: int) -> None:
    tokens = stream_of(documents, ended=True)
    before = packing.POOL_DOCUMENTS
    packing.POOL_DOCUMENTS = pool
    try:
        plan = packed_plan(tokens, EOT, context)
        padded = padded_plan(tokens, EOT, context, shifted=False)
    finally:
        packing.POOL_DOCUMENTS = before
    windows = read_all(tokens, plan, context, dynamic=False)
    assert sorted(id for inputs, _, _ in windows for id in inputs) == sorted(tokens.tolist())
    assert (np.diff(plan.first_W) >= 1).all()
    for found, expected in zip(padded, padded_plan(tokens, EOT, context, shifted=False), strict=True):
        assert found.tolist() == expected.tolist()


@given(documents=document_lists(), ended=st.booleans(), context=st.integers(1, 12), shifted=st.booleans())
def test_padded_windows(documents: list[list[int]], ended: bool, context: int, shifted: bool) -> None:
    tokens = stream_of(documents, ended)
    plan = padded_plan(tokens, EOT, context, shifted=shifted)
    expected = []
    begin = 0
    for end in document_ends(tokens, EOT).tolist():
        document = tokens[begin:end].tolist()
        inputs = document[:-1] if shifted else document
        targets = document[1:] if shifted else [*document[1:], IGNORED]
        expected += [(inputs[at : at + context], targets[at : at + context]) for at in range(0, len(inputs), context)]
        begin = end
    if not expected:
        assert plan.windows == 0
        return
    found = read_all(tokens, plan, context, dynamic=True)
    assert [w[0] for w in found] == [e[0] for e in expected]
    if shifted:
        assert [w[1] for w in found] == [e[1] for e in expected], "every token of a document but its first is a target"
    assert all(set(numbers) == {0} for _, _, numbers in found)


def test_padded_width_is_the_longest_rounded_up_and_at_most_the_window() -> None:
    tokens = np.concatenate([[*range(1, 9), EOT] * 3, np.r_[np.ones(70), EOT], np.r_[np.ones(300), EOT]]).astype(
        np.uint16
    )
    plan = padded_plan(tokens, EOT, 100, shifted=True)
    reader = Pieces(tokens, plan, 100, fill=EOT, dynamic=True)
    assert reader.read(np.array([0, 1])).inputs_BxT.shape == (2, 32)
    assert reader.read(np.array([0, 3])).inputs_BxT.shape == (2, 96)
    assert reader.read(np.array([4])).inputs_BxT.shape == (1, 100)


def test_packing_wastes_little() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(256, rng.lognormal(5, 0.8, 20_000).astype(np.int32) + 1)
    windows = int(best_fit(lengths, 256).max()) + 1
    assert windows >= lengths.sum() / 256
    assert lengths.sum() / (windows * 256) > 0.99, "the share of positions that are tokens"
