"""A model that reads several sequences at once, and what they begin with in common only once.

In: groups of token sequences. Out: features of the asked positions. Called by `choices`.

All tokens of all groups stand in one row without padding: of each group the shared beginning, then the rest of every
sequence. So the matrix products, which are nearly all of the work, see each token once. For attention alone the
sequences are put together again, a row each, filled up on the right where a causal model never looks. The model's own
layers compute it: a twin that shares their weights is told another way to attend and other positions.

Shapes are suffixes of names: B sequences, S the longest one, T tokens of the row, H heads, K head width, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bytekiln.attention import Sight
from bytekiln.model import TransformerLM

UNBOUNDED = 1 << 40
"""Tokens in a row; the sequences themselves stay within the model's positions."""


class Layout(NamedTuple):
    """Where the tokens of several sequences stand in the row."""

    ids_T: Tensor
    positions_T: Tensor
    """Place of each token in its sequence."""
    path_BxS: Tensor
    """Place in the row of every token of every sequence; what fills up is 0."""
    home_T: Tensor
    """Of each token of the row a place in path_BxS, flattened."""


def lay_out(groups: Sequence[Sequence[Sequence[int]]]) -> tuple[Layout, list[list[list[int]]]]:
    """The row for groups of sequences.

    Returns:
        The layout, and for each sequence of each group the places of its tokens in the row.

    >>> layout, paths = lay_out([[[5, 6, 7], [5, 6, 8, 9]]])
    >>> layout.ids_T.tolist(), layout.positions_T.tolist(), paths
    ([5, 6, 7, 8, 9], [0, 1, 2, 2, 3], [[[0, 1, 2], [0, 1, 3, 4]]])
    """
    longest = max(len(s) for group in groups for s in group)
    ids: list[int] = []
    positions: list[int] = []
    home: list[int] = []
    paths: list[list[list[int]]] = []
    rows: list[list[int]] = []
    for group in groups:
        shared = _shared(group)
        base = len(ids)
        paths.append([])
        for i, sequence in enumerate(group):
            start = 0 if i == 0 else shared
            begin = len(ids)
            ids += sequence[start:]
            positions += range(start, len(sequence))
            row = len(rows) * longest
            home += range(row + start, row + len(sequence))
            path = [*range(base, base + start), *range(begin, len(ids))]
            paths[-1].append(path)
            rows.append(path + [0] * (longest - len(path)))
    return Layout(torch.tensor(ids), torch.tensor(positions), torch.tensor(rows), torch.tensor(home)), paths


def _shared(group: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences of a group begin with."""
    first, most = group[0], min(map(len, group))
    for other in group[1:]:
        if other[:most] != first[:most]:
            most = next(i for i in range(most) if other[i] != first[i])
    return most


class _Rows(nn.Module):
    """Stands for learned positions: those of the tokens in the row."""

    weight: Tensor


class SharedPrefixReader:
    """Reads layouts with the weights of a model, which must be causal and in evaluation mode."""

    def __init__(self, model: TransformerLM) -> None:
        """Make the twin; it costs no memory but for its modules."""
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._model = model
        self._twin = copy.deepcopy(model, shared)
        self._twin.config = model.config.model_copy(update={"max_seq_len": UNBOUNDED, "sliding_window": 0})
        self._twin.attend = self._attend
        for layer in self._twin.layers:
            layer.attn.attend = self._attend  # type: ignore[union-attr]
        self._own = Sight(True, model.config.sliding_window)
        self._layout: Layout | None = None

    @torch.no_grad()
    def features(self, layout: Layout) -> Tensor:
        """What the model knows before its head of every token in the row, T×D."""
        device = next(self._model.parameters()).device
        layout = Layout(*(t.to(device) for t in layout))
        twin, model, positions_T = self._twin, self._model, layout.positions_T
        if twin.rotary is not None and model.rotary is not None:
            twin.rotary.cos_PxK2 = model.rotary.cos_PxK2[positions_T]
            twin.rotary.sin_PxK2 = model.rotary.sin_PxK2[positions_T]
        if model.position_embeddings is not None:
            rows = _Rows()
            rows.weight = model.position_embeddings.weight[positions_T]
            twin.position_embeddings = rows  # type: ignore[assignment]
        self._layout = layout
        try:
            return twin.features(layout.ids_T[None]).x_BxTxD[0]
        finally:
            self._layout = None

    def _attend(self, q_1xHxTxK: Tensor, k_1xGxTxK: Tensor, v_1xGxTxK: Tensor, dropout: float, _: Sight) -> Tensor:
        """Attention of each sequence by itself; the shared beginning's is computed with each, and once kept."""
        layout = self._layout
        assert layout is not None and not dropout
        B, S = layout.path_BxS.shape
        path = layout.path_BxS.flatten()
        rows = (x[0].transpose(0, 1).index_select(0, path) for x in (q_1xHxTxK, k_1xGxTxK, v_1xGxTxK))
        q, k, v = (x.view(B, S, *x.shape[1:]).transpose(1, 2) for x in rows)
        out_BxHxSxK = self._model.attend(q, k, v, 0.0, self._own)
        out_TxHxK = out_BxHxSxK.transpose(1, 2).reshape(B * S, *q.shape[1::2]).index_select(0, layout.home_T)
        return out_TxHxK.transpose(0, 1)[None]
