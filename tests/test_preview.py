"""What `--show-batch` prints: text, ids, targets beside, ignored ones and borders visible, at most 100 columns."""

from __future__ import annotations

import torch

from bytekiln import train_bpe_from_iterator
from bytekiln.batch import Batch
from bytekiln.loss import IGNORED
from bytekiln.preview import WIDTH, show_batch

TOKENIZER = train_bpe_from_iterator(["the kiln is warm"], vocab_size=258, special_tokens=["<|endoftext|>"])


def batch(inputs: list[list[int]], targets: list[list[int]], documents: list[list[int]] | None = None) -> Batch:
    ids = torch.tensor(targets)
    of = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    return Batch(torch.tensor(inputs), ids, of, int((ids != IGNORED).sum()))


def row(text: str, place: int) -> str:
    return next(line for line in text.splitlines() if line.split()[:1] == [str(place)])


def test_everything_of_a_short_window_is_visible() -> None:
    a, b = TOKENIZER.encode("the\n"), TOKENIZER.encode("kiln")
    eot = TOKENIZER.eot_id
    assert eot is not None
    inputs = [*a, eot, *b, 300]
    targets = [*inputs[1:-1], IGNORED, IGNORED]
    numbers = [0] * (len(a) + 1) + [1] * (len(b) + 1)
    text = show_batch(batch([inputs], [targets], [numbers]), TOKENIZER)
    assert f"1 window of {len(inputs)} tokens, {len(inputs) - 2} targets" in text
    assert f"documents begin at 0, {len(a) + 1}" in text
    assert "the\\n<|endoftext|>" in text
    assert "kiln<300>" in text, "an added mask token has no text"
    first = row(text, 0)
    assert str(inputs[0]) in first.split()
    assert str(inputs[1]) in first.split()
    assert "'" in first
    assert row(text, len(inputs) - 1).endswith("ignored")
    assert "<300>" in row(text, len(inputs) - 1)
    assert text.count("ignored") == 3
    border = text.splitlines().index(row(text, len(a) + 1)) - 1
    assert "another document" in text.splitlines()[border]


def test_long_windows_are_shortened_but_borders_stay() -> None:
    ids = list(range(200))
    numbers = [0] * 100 + [1] * 100
    text = show_batch(batch([ids] * 9, [[*ids[1:], 0]] * 9, [numbers] * 9), None, limit=2)
    assert text.count("window ") == 2
    assert "… and 7 more windows" in text
    shown = [int(line.split()[0]) for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    once = [*range(12), 98, 99, 100, 101, *range(188, 200)]
    assert [n for n in shown if n != 9] == [n for n in once * 2 if n != 9]
    assert "86 more" in text
    assert text.count("another document") == 2


def test_lines_are_plain_and_fit(capsys: object) -> None:
    tricky = "the \x1b[31m red \u2028 kiln \t" + "x" * 400 + "ünïcode 窯 " * 30
    ids = TOKENIZER.encode(tricky)
    for decoder in (TOKENIZER, None):
        text = show_batch(batch([ids], [[*ids[1:], IGNORED]]), decoder)
        assert text.endswith("\n")
        for line in text.split("\n"):
            assert len(line) <= WIDTH
            assert line.isprintable() or not line


def test_padding_is_told_from_documents() -> None:
    eot = TOKENIZER.eot_id
    assert eot is not None
    a = TOKENIZER.encode("kiln")
    inputs = [*a, eot, *a, eot, *[eot] * 40]
    N = len(a)
    targets = [*a[1:], eot, a[0], *a[1:], eot, *[IGNORED] * 41]
    numbers = [0] * (N + 1) + [1] * (N + 1) + [2] * 40
    text = show_batch(batch([inputs], [targets], [numbers]), TOKENIZER)
    assert f"documents begin at 0, {N + 1}, padding from {2 * N + 2}" in " ".join(text.split())
    lines = text.splitlines()
    assert "padding" in lines[lines.index(row(text, 2 * N + 2)) - 1]
    assert "another document" in lines[lines.index(row(text, N + 1)) - 1]
    assert text.count("kiln<|endoftext|>") == 2
    assert "<|endoftext|><|endoftext|>" not in text
    blind = show_batch(batch([inputs], [targets]), TOKENIZER)
    assert f"padding from {2 * N + 1}" in blind
