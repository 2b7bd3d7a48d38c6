"""What a mask token does to windows: BERT's objective, and random masks as augmentation. Arrays in and out; no torch.

In: the inputs of windows and the windows' numbers. Out: changed inputs, and the targets of BERT's objective. Called by
`data`. Every draw is a hash of (key, number of the window, position), so a window is corrupted alike whatever batch it
comes in, and differently when it comes again in a later epoch under another number.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from bytekiln.loss import IGNORED
from bytekiln.windows import Numbers, mixed

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token and a random one; the others stay (Devlin et al. 2019)."""
_CHOICE_BITS, _FATE_BITS, _ID_BITS = 24, 16, 24
"""How a 64-bit draw is divided: whether a token is chosen, what becomes of it, which id replaces it."""


class Corruption:
    """One rule of corruption for all windows of a source."""

    def __init__(
        self, share: float, mask_id: int, real_ids: int, special_ids: Collection[int], *, predict: bool, key: int
    ) -> None:
        """Settle the rule.

        Args:
            share: probability that a token is chosen; special tokens and padding never are.
            mask_id: id of the mask token.
            real_ids: ids below this belong to the vocabulary; random ids are drawn from them, specials left out.
            special_ids: end of text and the like.
            predict: BERT's objective: the chosen tokens become the targets, at least one in each window that has a
                token to choose, all others are ignored. False: the chosen become the mask, targets stay.
            key: another one, other draws.
        """
        self.share, self.mask_id, self.predict, self._key = share, mask_id, predict, np.uint64(key)
        self._never = np.array(sorted({*special_ids, mask_id}), dtype=np.int64)
        inside = self._never[self._never < real_ids]
        self._drawable = real_ids - len(inside)
        # The i-th of the ids left is i plus the number of excluded ids at or below it.
        self._steps = inside - np.arange(len(inside))

    def apply(
        self, inputs_BxT: Numbers, targets_BxT: Numbers, number_B: Numbers, lengths_B: Numbers | None
    ) -> tuple[Numbers, Numbers]:
        """Corrupted inputs and their targets; the arguments stay as they are.

        Args:
            inputs_BxT: ids.
            targets_BxT: targets as they are without corruption.
            number_B: a number for each window; equal ones are corrupted alike.
            lengths_B: positions of each window that are not padding; None: all.
        """
        B, T = inputs_BxT.shape
        key_B = mixed(number_B.astype(np.uint64) ^ self._key)
        draw_BxT = mixed(key_B[:, None] + (np.arange(T, dtype=np.uint64) << np.uint64(32)))
        able_BxT = np.ones((B, T), np.bool_)
        for id in self._never.tolist():
            able_BxT &= inputs_BxT != id
        if lengths_B is not None:
            able_BxT &= np.arange(T) < lengths_B[:, None]
        choice_BxT = draw_BxT >> np.uint64(64 - _CHOICE_BITS)
        below = np.uint64(round(self.share * 2**_CHOICE_BITS))
        if not self.predict:
            return np.where(able_BxT & (choice_BxT < below), self.mask_id, inputs_BxT), targets_BxT
        choice_BxT = np.where(able_BxT, choice_BxT, np.uint64(2**_CHOICE_BITS))
        first_B = np.minimum(choice_BxT.min(axis=1), np.uint64(2**_CHOICE_BITS - 1))
        chosen_BxT = choice_BxT < np.maximum(below, first_B + np.uint64(1))[:, None]
        where = np.nonzero(chosen_BxT)
        draw_N, inputs = draw_BxT[where], inputs_BxT.copy()
        fate_N = (draw_N >> np.uint64(_ID_BITS)) & np.uint64(2**_FATE_BITS - 1)
        masked_N = fate_N < np.uint64(round(MASKED * 2**_FATE_BITS))
        random_N = ~masked_N & (fate_N < np.uint64(round((MASKED + RANDOM) * 2**_FATE_BITS)))
        inputs[where] = np.where(
            masked_N, self.mask_id, np.where(random_N, self._random_ids(draw_N), inputs_BxT[where])
        )
        return inputs, np.where(chosen_BxT, inputs_BxT, IGNORED)

    def _random_ids(self, draw_N: NDArray[np.uint64]) -> Numbers:
        """Ids of the vocabulary that are not special, evenly: the bias of 24 bits is below 2^-24 · vocabulary."""
        low_N = (draw_N & np.uint64(2**_ID_BITS - 1)).astype(np.int64)
        index_N = low_N * self._drawable >> _ID_BITS
        return index_N + np.searchsorted(self._steps, index_N, side="right")
