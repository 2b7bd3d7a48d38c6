"""Scripts of characters: the core's tables held against Python's `regex`, all of the first two planes."""

from __future__ import annotations

import sys

import numpy as np
import regex

from bytekiln.inspect.scripts import LABELS, NAMES, UNKNOWN, ScriptTable


def test_every_code_point_agrees_with_another_table() -> None:
    """`regex` may be of another Unicode: characters that only one of the two knows may differ, others not."""
    last = range(0x20000, sys.maxunicode + 1, 61)  # rare Han, plane 14, private use: long runs of the same
    letters = np.array([c for c in (*range(0x20000), *last) if not 0xD800 <= c < 0xE000])
    ours = ScriptTable().of(letters)
    text = "".join(map(chr, letters.tolist()))
    theirs = np.full(len(letters), UNKNOWN, dtype=np.uint8)
    for number, name in enumerate(NAMES):
        try:
            script = regex.compile(rf"\p{{Script={name}}}+")
        except regex.error:  # a script that its Unicode does not have yet
            continue
        for run in script.finditer(text):
            theirs[run.start() : run.end()] = number
    known = (ours != UNKNOWN) & (theirs != UNKNOWN)
    moved = [
        (f"U+{letters[i]:04X}", LABELS[ours[i]], LABELS[theirs[i]]) for i in np.flatnonzero(known & (ours != theirs))
    ]
    assert known.sum() > 80_000 and len(moved) <= 20, moved  # versions move a handful; ours and 17.0: none
    assert set(range(len(NAMES))) <= set(ours.tolist()), "a name that the core gives no character"


def test_lone_surrogates_stand_for_bytes() -> None:
    assert LABELS[ScriptTable().of(np.array([0xDCFF]))[0]] == "no UTF-8"
