"""A batch as text that people can read: what goes in, what is to be predicted, where documents end.

In: a `Batch`, and the tokenizer where there is one. Out: plain text of at most 100 columns. Called by `lm-train
--show-batch`.
"""

from __future__ import annotations

import textwrap
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bytekiln.batch import Batch
from bytekiln.loss import IGNORED

WIDTH = 100
_TEXT_WIDTH = 24
_EDGE, _ROUND_BORDER = 12, 2
"""Positions shown at either end of a window, and at either side of a border between documents."""


class Decoder(Protocol):
    """The part of a tokenizer that is used here."""

    @property
    def n_vocab(self) -> int:
        """Ids are below this."""

    def decode(self, ids: list[int], /) -> str:
        """Text of ids."""


def show_batch(batch: Batch, tokenizer: Decoder | None, limit: int = 4) -> str:
    """The windows of a batch: each one's text and a table of positions, long windows shortened in the middle.

    Args:
        batch: as the model gets it.
        tokenizer: None: ids only.
        limit: windows shown.
    """
    inputs_BxT, targets_BxT = batch.inputs_BxT.numpy(), batch.targets_BxT.numpy()
    documents_BxT = None if batch.documents_BxT is None else batch.documents_BxT.numpy()
    B, T = inputs_BxT.shape
    lines = [f"{B} {'window' if B == 1 else 'windows'} of {T} tokens, {batch.count} targets"]
    for i in range(min(B, limit)):
        documents_T = None if documents_BxT is None else documents_BxT[i]
        lines += ["", *_window(f"window {i + 1} of {B}", inputs_BxT[i], targets_BxT[i], documents_T, tokenizer)]
    if limit < B:
        lines += ["", f"… and {B - limit} more windows"]
    return "\n".join(lines) + "\n"


def _window(
    title: str,
    inputs_T: NDArray[np.int64],
    targets_T: NDArray[np.int64],
    documents_T: NDArray[np.int32] | None,
    tokenizer: Decoder | None,
) -> list[str]:
    T = len(inputs_T)
    real = int((targets_T != IGNORED).sum())
    borders = [] if documents_T is None else (np.flatnonzero(np.diff(documents_T)) + 1).tolist()
    about = f"{title}: {real} targets, {T - real} ignored"
    end = _padding_from(inputs_T, targets_T, borders)
    if documents_T is not None:
        about += f", documents begin at {', '.join(str(b) for b in [0, *borders] if b < end)}"
    if end < T:
        about += f", padding from {end}"
    lines = textwrap.wrap(about, WIDTH, subsequent_indent="  ")
    if tokenizer is not None:
        inside = [b for b in borders if b < end]
        for first, last in zip([0, *inside], [*inside, end], strict=True):
            text = _visible(_decoded(inputs_T[first:last].tolist(), tokenizer))
            lines += textwrap.wrap(text, WIDTH, initial_indent="  | ", subsequent_indent="  | ", drop_whitespace=False)
    lines.append(f"  {'place':>5}  {'input':>7} {'':{_TEXT_WIDTH}}  {'target':>7}")
    shown = {t for t in range(T) if t < _EDGE or end - _EDGE <= t < end or t == T - 1}
    shown |= {t for b in borders for t in range(b - _ROUND_BORDER, b + _ROUND_BORDER) if 0 <= t < T}
    before = -1
    for t in sorted(shown):
        if t > before + 1:
            lines.append(f"  {'…':>5}  {t - before - 1} more")
        if t in borders:
            lines.append(f"  {'-' * 5}  {'-' * 20} {'padding' if t == end else 'another document'}")
        target = int(targets_T[t])
        beside = f"{'ignored':>7}" if target == IGNORED else f"{target:>7} {_quoted(target, tokenizer)}"
        lines.append(
            f"  {t:>5}  {inputs_T[t]:>7} {_quoted(int(inputs_T[t]), tokenizer):{_TEXT_WIDTH}}  {beside}".rstrip()
        )
        before = t
    return lines


def _padding_from(inputs_T: NDArray[np.int64], targets_T: NDArray[np.int64], borders: list[int]) -> int:
    """Where padding begins: one id up to the window's end with nothing to predict, behind the last border if there is
    one, else four times or more; an end-of-text token before it then counts as padding, since it looks the same."""
    T = len(inputs_T)
    other = np.flatnonzero((inputs_T != inputs_T[-1]) | (targets_T != IGNORED))
    begin = int(other[-1]) + 1 if len(other) else 0
    if borders:
        return borders[-1] if begin <= borders[-1] else T
    return begin if T - begin >= 4 else T


def _decoded(ids: list[int], tokenizer: Decoder) -> str:
    """Text of ids; those behind the vocabulary, as an added mask token, in angle brackets."""
    out, run = "", list[int]()
    for id in [*ids, None]:
        if id is not None and id < tokenizer.n_vocab:
            run.append(id)
            continue
        out += tokenizer.decode(run) if run else ""
        out += "" if id is None else f"<{id}>"
        run = []
    return out


def _quoted(id: int, tokenizer: Decoder | None) -> str:
    if tokenizer is None:
        return ""
    text = _visible(_decoded([id], tokenizer))
    return f"'{text[: _TEXT_WIDTH - 3]}…" if len(text) > _TEXT_WIDTH - 2 else f"'{text}'"


def _visible(text: str) -> str:
    """Line breaks and other control characters as escapes, so that every line of the output is ours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
