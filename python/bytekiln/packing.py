"""Whole documents as windows: where documents end, which go into a window together, and reading such windows.

In: the ids of a file and the id that ends documents. Out: a `Plan`, computed once at the start, and `Rows` read by it.
Called by `data`; no torch.

The end-of-text id belongs to the document that it ends. A document longer than a window is split: all pieces but the
last fill a window each. The target of a position is the token behind it in the same document; of an end-of-text id it
is the first token of the document that follows in the window, which is how texts begin, in whatever order they stand.
Nothing is predicted where padding or the last piece of a split document follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytekiln.loss import IGNORED

Numbers = NDArray[np.int64]
_SCAN_IDS = 1 << 22
POOL_DOCUMENTS = 1 << 20
"""Documents that are packed together. Planning holds about 80 bytes for each piece of one pool at a time, besides 8
bytes a document and the plan itself."""
ROUND_TO = 32
"""The width of a padded batch is a multiple of this: few shapes for a compiler, few wasted positions."""


class Rows(NamedTuple):
    """Windows as arrays. documents_BxT: number of the document in the window that a position belongs to, padding's is
    the last; None where nobody asked. lengths_B: positions that are not padding; None: all of them."""

    inputs_BxT: Numbers
    targets_BxT: Numbers
    documents_BxT: NDArray[np.int32] | None
    lengths_B: Numbers | None


class Plan(NamedTuple):
    """Pieces of documents, grouped into windows: 14 bytes a piece and 8 a window."""

    start_S: Numbers
    length_S: NDArray[np.int32]
    head_S: NDArray[np.bool_]
    """Whether the piece begins a document."""
    open_S: NDArray[np.bool_]
    """Whether the token behind the piece belongs to the same document."""
    first_W: Numbers
    """W+1 places: window w holds the pieces first_W[w] … first_W[w+1]-1."""

    @property
    def windows(self) -> int:
        """How many there are."""
        return len(self.first_W) - 1


def document_ends(tokens: NDArray[Any], eot: int, enough: int | None = None) -> Numbers:
    """One place past the end of each document; text behind the last end-of-text id is a document, too.

    Args:
        tokens: the ids; read in parts of 4 million.
        eot: the id that ends documents.
        enough: stop once so many are found.
    """
    parts, found = [], 0
    for begin in range(0, len(tokens), _SCAN_IDS):
        part = np.flatnonzero(tokens[begin : begin + _SCAN_IDS] == eot) + (begin + 1)
        parts.append(part)
        found += len(part)
        if enough is not None and found >= enough:
            return np.concatenate(parts)[:enough]
    ends = np.concatenate([*parts, np.empty(0, np.int64)])
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))


def padded_plan(tokens: NDArray[Any], eot: int, context: int, *, shifted: bool) -> Plan:
    """One document a window, longer ones in several; documents in which nothing can be predicted are left out.

    Args:
        tokens: the ids of the file.
        eot: the id that ends documents.
        context: the longest window.
        shifted: whether targets are one token later; then a document's last token is no input.
    """
    pools = list(_pools(document_ends(tokens, eot), context, shorter_by=1 if shifted else 0))
    return _one_plan([plan._replace(first_W=np.arange(len(plan.start_S))) for plan in pools])


def packed_plan(tokens: NDArray[Any], eot: int, context: int) -> Plan:
    """Documents aligned to the window's start, packed by best fit, a million documents at a time.

    Windows stand in the order of their first documents; a window's pieces stand in the file's order, whole documents
    before the last pieces of split ones.
    """
    return _one_plan([_packed(pool, context) for pool in _pools(document_ends(tokens, eot), context, shorter_by=0)])


def _packed(pool: Plan, context: int) -> Plan:
    window_S = best_fit(pool.length_S, context)
    piece_S = np.arange(len(window_S))
    earliest_W = np.full(int(window_S.max()) + 1, len(window_S))
    np.minimum.at(earliest_W, window_S, piece_S)
    rank_W = np.empty_like(earliest_W)
    rank_W[np.argsort(earliest_W)] = np.arange(len(rank_W))
    order_S = np.lexsort((piece_S, ~pool.head_S, rank_W[window_S]))
    first_W = np.searchsorted(rank_W[window_S][order_S], np.arange(len(rank_W)))
    return Plan(pool.start_S[order_S], pool.length_S[order_S], pool.head_S[order_S], pool.open_S[order_S], first_W)


def _pools(ends: Numbers, context: int, *, shorter_by: int) -> Iterator[Plan]:
    """Documents cut into pieces of at most `context` tokens, each document shortened by some at its end."""
    for at in range(0, len(ends), POOL_DOCUMENTS):
        end_D = ends[at : at + POOL_DOCUMENTS]
        start_D = np.concatenate([ends[at - 1 : at] if at else np.zeros(1, np.int64), end_D[:-1]])
        length_D = end_D - start_D - shorter_by
        start_D, length_D = start_D[length_D > 0], length_D[length_D > 0]
        if not len(start_D):
            continue
        counts_D = -(-length_D // context)
        document_S = np.repeat(np.arange(len(start_D)), counts_D)
        nth_S = np.arange(len(document_S)) - np.repeat(np.cumsum(counts_D) - counts_D, counts_D)
        length_S = np.minimum(context, length_D[document_S] - nth_S * context)
        open_S = (nth_S < counts_D[document_S] - 1) | bool(shorter_by)
        start_S = start_D[document_S] + nth_S * context
        yield Plan(start_S, length_S.astype(np.int32), nth_S == 0, open_S, np.empty(0, np.int64))


def _one_plan(pools: Sequence[Plan]) -> Plan:
    """The plans of all pools, one behind the other."""
    if not pools:
        none = np.empty(0, np.int64)
        return Plan(none, none.astype(np.int32), none == 0, none == 0, np.zeros(1, np.int64))
    before = np.cumsum([0, *(len(pool.start_S) for pool in pools)])
    first_W = np.concatenate([*(pool.first_W + b for pool, b in zip(pools, before, strict=False)), before[-1:]])
    start_S, length_S, head_S, open_S = (
        np.concatenate(columns) for columns in zip(*(p[:4] for p in pools), strict=True)
    )
    return Plan(start_S, length_S, head_S, open_S, first_W)


def best_fit(length_S: NDArray[np.integer[Any]], capacity: int) -> Numbers:
    """Best-fit decreasing: the number of the window that each piece goes into.

    Piece by piece, longest first (of equal ones the earlier first), into the fullest window that has room for it (of
    equal ones the one that has waited longest), else into a new one. Equal lengths are placed together, since a window
    that took one is the fullest with room for the next: work grows with lengths × spaces (at most capacity²/2), not
    with pieces. Uses at most 11/9 of the fewest possible windows, plus 6/9 (Dósa 2007).
    """
    order_S = np.argsort(-length_S.astype(np.int64), kind="stable")
    sorted_S = length_S[order_S]
    begins = [*np.flatnonzero(np.diff(sorted_S, prepend=-1)).tolist(), len(sorted_S)]
    window_S = np.empty(len(sorted_S), np.int64)
    waiting: list[deque[Numbers]] = [deque() for _ in range(capacity + 1)]
    spaces = 0  # bit r: a window with room for r waits
    opened = 0
    for at, end in pairwise(begins):
        length = int(sorted_S[at])
        while at < end:
            fitting = spaces >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = space // length
            wanted = -(-(end - at) // each)
            if fitting:
                bins = waiting[space].popleft()
                if len(bins) > wanted:
                    waiting[space].appendleft(bins[wanted:])
                    bins = bins[:wanted]
                if not waiting[space]:
                    spaces &= ~(1 << space)
            else:
                bins = np.arange(opened, opened + wanted)
                opened += wanted
            taken = min(end - at, each * len(bins))
            window_S[at : at + taken] = np.repeat(bins, each)[:taken]
            at += taken
            full, rest = divmod(taken, each)
            for part, used in ((bins[:full], each), (bins[full:], rest)):
                room = space - used * length
                if len(part) and room:
                    waiting[room].append(part)
                    spaces |= 1 << room
    out = np.empty_like(window_S)
    out[order_S] = window_S
    return out


class Pieces:
    """Windows read by a plan."""

    def __init__(self, tokens: NDArray[Any], plan: Plan, context: int, *, fill: int, dynamic: bool) -> None:
        """Take the ids and their plan.

        Args:
            tokens: the ids of the file.
            plan: of this file.
            context: positions in a window.
            fill: id that stands in padding.
            dynamic: make rows as wide as the longest needs, rounded up to 32; else all `context` wide.
        """
        self.tokens, self.plan, self.context, self.fill, self.dynamic = tokens, plan, context, fill, dynamic

    def read(self, window_B: Numbers) -> Rows:
        """Windows by their numbers in the plan."""
        plan = self.plan
        first_B = plan.first_W[window_B]
        pieces_B = plan.first_W[window_B + 1] - first_B
        piece_S = _ranges(first_B, pieces_B)
        row_S = np.repeat(np.arange(len(window_B)), pieces_B)
        length_S = plan.length_S[piece_S].astype(np.int64)
        end_S = np.cumsum(length_S)
        first_S = np.cumsum(pieces_B) - pieces_B
        lengths_B = np.add.reduceat(length_S, first_S)
        width = self.context
        if self.dynamic:
            width = min(width, -(-int(lengths_B.max()) // ROUND_TO) * ROUND_TO)
        source_N = _ranges(plan.start_S[piece_S], length_S)
        next_N = source_N + 1
        last_S = end_S - 1
        follows = np.zeros(len(piece_S), np.bool_)
        follows[:-1] = (row_S[1:] == row_S[:-1]) & plan.head_S[piece_S[1:]]
        start_of_next = np.append(plan.start_S[piece_S[1:]], 0)
        next_N[last_S] = np.where(plan.open_S[piece_S], next_N[last_S], np.where(follows, start_of_next, -1))
        into_N = _ranges(np.arange(len(window_B)) * width, lengths_B)
        inputs = np.full(len(window_B) * width, self.fill, np.int64)
        targets = np.full(len(window_B) * width, IGNORED, np.int64)
        documents = np.repeat(pieces_B.astype(np.int32), width)
        inputs[into_N] = self.tokens[source_N]
        targets[into_N] = np.where(next_N < 0, IGNORED, self.tokens[next_N].astype(np.int64))
        documents[into_N] = np.repeat(np.arange(len(piece_S)) - first_S[row_S], length_S)
        shape = (len(window_B), width)
        return Rows(inputs.reshape(shape), targets.reshape(shape), documents.reshape(shape), lengths_B)


def _ranges(first_S: Numbers, length_S: Numbers) -> Numbers:
    """first, first+1 … for each range, one behind the other."""
    end_S = np.cumsum(length_S)
    out: Numbers = np.arange(int(end_S[-1])) + np.repeat(first_S - (end_S - length_S), length_S)
    return out
