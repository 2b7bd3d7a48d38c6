"""How well tokenizers compress the same documents: bytes a token with its interval, words, single bytes, scripts.

In: `Documents` and tokenizers. Out: `Compression`, one a tokenizer; plain values for JSON. All that depends on the text
alone is worked out once (`read_text`), so that every tokenizer is measured on the very same bytes. Special tokens are
text here: they are nobody's compression. Called by `cli_inspect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytekiln.inspect.documents import Documents
from bytekiln.inspect.ratio import METHOD, Ratio, ratio
from bytekiln.inspect.scripts import COMMON, INHERITED, LABELS, ScriptTable
from bytekiln.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
"""Text that is worked on at a time: some arrays have eight bytes and more for each of it."""


@dataclass(frozen=True)
class Text:
    """Documents, and what holds of them whatever the tokenizer.

    Attributes:
        documents: as they were read.
        bytes_D: their lengths.
        words: runs without white space.
        script_N: the script of the character that each byte belongs to, as a number in `LABELS`; combining marks have
            that of the character before.
        first_N: whether a byte begins a character.
    """

    documents: Documents
    bytes_D: NDArray[np.int64]
    words: int
    script_N: NDArray[np.uint8]
    first_N: NDArray[np.bool_]

    @property
    def bytes(self) -> int:
        """All of them."""
        return int(self.bytes_D.sum())

    def batches(self) -> Iterator[tuple[int, int, int, int]]:
        """Documents `i` to `j`, which are the bytes `a` to `b`; a document is never parted."""
        ends = np.cumsum(self.bytes_D)
        i = a = 0
        while i < len(ends):
            j = max(i + 1, int(np.searchsorted(ends, a + BATCH_BYTES, side="right")))
            yield i, j, a, int(ends[j - 1])
            i, a = j, int(ends[j - 1])


@dataclass(frozen=True)
class Compression:
    """One tokenizer on a `Text`; `_S` is a script.

    Attributes:
        tokens_D: of each document.
        single_bytes: tokens of one byte.
        parts: tokens that do not begin and end with a character.
        tokens_S: tokens of a script; one that lies in several is shared out by its bytes.
        single_S: tokens of one byte.
        split_S: characters that a border between tokens runs through.
    """

    tokens_D: NDArray[np.int64]
    single_bytes: int
    parts: int
    tokens_S: NDArray[np.float64]
    single_S: NDArray[np.int64]
    split_S: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """All of them."""
        return int(self.tokens_D.sum())


def read_text(documents: Documents, table: ScriptTable) -> Text:
    """What holds of the documents whatever the tokenizer."""
    sizes = np.array([len(d) for d in documents.texts], dtype=np.int64)
    script_N, first_N = np.empty(sizes.sum(), dtype=np.uint8), np.zeros(sizes.sum(), dtype=bool)
    text = Text(documents, sizes, 0, script_N, first_N)
    words = 0
    for i, j, a, b in text.batches():
        decoded = [d.decode("utf-8", "surrogateescape") for d in documents.texts[i:j]]
        words += sum(len(d.split()) for d in decoded)
        letters = np.frombuffer("".join(decoded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        # Python's surrogates stand for one stray byte each; well-formed text has none.
        width = np.where((letters >= 0xD800) & (letters < 0xE000), 1, 1 + (letters >= 0x80) + (letters >= 0x800))
        width = (width + (letters >= 0x10000)).astype(np.int64)
        starts = np.cumsum(width) - width
        first_N[a + starts] = True
        begins = np.cumsum([0, *(len(d) for d in decoded[:-1])])
        script_N[a:b] = np.repeat(_carried(table.of(letters), begins), width)
    return Text(documents, sizes, words, script_N, first_N)


def _carried(script: NDArray[np.uint8], begins: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Scripts in which a combining mark has that of the character before it, within its document."""
    script = script.copy()
    script[begins[script[begins] == INHERITED]] = COMMON
    own = np.where(script != INHERITED, np.arange(len(script)), 0)
    carried: NDArray[np.uint8] = script[np.maximum.accumulate(own)]
    return carried


def compress(
    tokenizer: Tokenizer, text: Text, progress: Callable[[str, int, int], object] | None = None
) -> Compression:
    """Encode every document on its own, special tokens as text."""
    length_V = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for id, token in tokenizer.vocab.items():
        length_V[id] = len(token)
    kinds = len(LABELS)
    tokens_D = np.zeros(len(text.bytes_D), dtype=np.int64)
    single_bytes = parts = 0
    tokens_S, single_S, split_S = np.zeros(kinds), np.zeros(kinds, dtype=np.int64), np.zeros(kinds, dtype=np.int64)
    for i, j, a, b in text.batches():
        ids = [np.array(tokenizer.encode_bytes(d, errors="bytes"), np.int64) for d in text.documents.texts[i:j]]
        tokens_D[i:j] = [len(d) for d in ids]
        length = length_V[np.concatenate(ids)]
        ends = np.cumsum(length)
        starts = ends - length
        assert ends[-1] == b - a, "tokens are the bytes of their text"
        script, first = text.script_N[a:b], np.append(text.first_N[a:b], True)
        inside = starts[~first[starts]]
        _, once = np.unique(np.cumsum(first)[inside], return_index=True)
        single_bytes += int((length == 1).sum())
        parts += int((~(first[starts] & first[ends])).sum())
        tokens_S += np.bincount(script, np.repeat(1 / length, length), kinds)
        single_S += np.bincount(script[starts[length == 1]], minlength=kinds)
        split_S += np.bincount(script[inside[once]], minlength=kinds)
        if progress:
            progress("compress", b, text.bytes)
    return Compression(tokens_D, single_bytes, parts, tokens_S, single_S, split_S)


def as_json(text: Text, found: Compression) -> dict[str, Any]:
    """What `bpe-inspect --json` says under `documents`. Where nothing can be divided it is None, never 0 or NaN."""
    documents, per_token = text.documents, ratio(text.bytes_D, found.tokens_D)
    return {
        "count": len(documents.texts),
        "drawn": documents.how,
        "share": documents.share,
        "seed": documents.seed,
        "separator": documents.separator,
        "bytes": text.bytes,
        "tokens": found.tokens,
        "words": text.words,
        "bytes_per_token": per_token.value,
        "interval": per_token.interval,
        "interval_method": METHOD,
        "tokens_per_word": _over(found.tokens, text.words),
        "single_byte_share": _over(found.single_bytes, found.tokens),
        "part_of_character_share": _over(found.parts, found.tokens),
        "scripts": _scripts(text, found),
    }


def _scripts(text: Text, found: Compression) -> dict[str, dict[str, Any]]:
    """By the share of the text, the largest first."""
    kinds = len(LABELS)
    bytes_S = np.bincount(text.script_N, minlength=kinds)
    letters_S = np.bincount(text.script_N[text.first_N], minlength=kinds)
    return {
        LABELS[s]: {
            "bytes": int(bytes_S[s]),
            "share": int(bytes_S[s]) / text.bytes,
            "characters": int(letters_S[s]),
            "bytes_per_token": float(bytes_S[s] / found.tokens_S[s]),
            "single_byte_share": float(found.single_S[s] / found.tokens_S[s]),
            "whole_character_share": float(1 - found.split_S[s] / letters_S[s]),
        }
        for s in sorted(np.flatnonzero(bytes_S).tolist(), key=lambda s: (-int(bytes_S[s]), LABELS[s]))
    }


def _over(above: int, below: int) -> float | None:
    return above / below if below else None


def difference(text: Text, first: Compression, other: Compression) -> dict[str, Any]:
    """`other` against `first` on the same documents, paired: bytes a token more, and its tokens over the first's."""

    def per_token(c: Compression) -> Ratio:
        return ratio(text.bytes_D, c.tokens_D)

    gained, tokens = per_token(other) - per_token(first), ratio(other.tokens_D, first.tokens_D)
    return {
        "bytes_per_token": gained.value,
        "interval": gained.interval,
        "tokens_ratio": tokens.value,
        "tokens_ratio_interval": tokens.interval,
    }


def vocabulary_scripts(tokenizer: Tokenizer, table: ScriptTable) -> dict[str, int]:
    """Ordinary tokens by the script of their first character that has one; `Common`: digits, signs and white space.

    Tokens that are no whole characters are left out, like single bytes beyond ASCII.
    """
    special = set(tokenizer.special_tokens.values())
    texts = []
    for id, token in tokenizer.vocab.items():
        try:
            texts.append(token.decode() if id not in special else "")
        except UnicodeDecodeError:
            continue
    letters = sorted({c for t in texts for c in t})
    script = dict(zip(letters, table.of(np.array([ord(c) for c in letters])).tolist(), strict=True))
    counts: dict[str, int] = {}
    for text in filter(None, texts):
        label = LABELS[next((s for c in text if (s := script[c]) not in (COMMON, INHERITED)), COMMON)]
        counts[label] = counts.get(label, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
