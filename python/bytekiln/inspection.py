"""What a tokenizer is worth on a text: compression, vocabulary make-up, longest tokens, speed.

In: a tokenizer and text files. Out: one dictionary of plain values. Called by `cli_inspect` and `tokenizer_diff`; numpy
is imported only when something is measured. What documents are and how well each is compressed: `inspect.compression`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bytekiln import _core
from bytekiln.inputs import Inputs
from bytekiln.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PILE_BYTES = 825e9
"""The Pile (Gao et al. 2020), the usual yardstick for "how long would a large corpus take?"."""
MEASURE_S = 0.5
"""`bpe-inspect` repeats a short text until it has measured this long (five times at most)."""
COUNT_AT_ONCE = 1 << 20
"""Ids that are counted at a time: numpy widens them to eight bytes each."""


SHOWN = 60
"""Bytes of a token that are shown of a longer one."""


def show_token(token: bytes) -> str:
    r"""A token on one line, quoted, cut where it is long.

    >>> print(show_token(b" accomplishment"), show_token(b"\xff"), show_token(b"\n"), show_token(b"a" * 61)[-13:])
    ' accomplishment' '\xff' '\n' …' (61 bytes)
    """
    text = token[:SHOWN].decode("utf-8", "surrogateescape")
    shown = "".join(c if c.isprintable() else _escaped(c) for c in text)
    return f"'{shown}'" if len(token) <= SHOWN else f"'{shown}…' ({len(token):,} bytes)"


def bare_token(token: bytes) -> str:
    r"""`show_token` without quotes, for a place that sets its own.

    >>> print(bare_token(b" clay"), bare_token(b"a" * 61)[-13:])
     clay a… (61 bytes)
    """
    shown, size = show_token(token[:SHOWN])[1:-1], len(token)
    return shown if size <= SHOWN else f"{shown}… ({size:,} bytes)"


def _escaped(char: str) -> str:
    return repr(char.encode("utf-8", "surrogateescape"))[2:-1]


TOKEN_KINDS: dict[str, Callable[[str], bool]] = {
    "words": str.isalpha,
    "numbers": str.isnumeric,
    "white_space": lambda s: not s,
    "mixed": str.isalnum,
}


def vocabulary_kinds(tokenizer: Tokenizer) -> dict[str, int]:
    """How many tokens are single bytes, special, words (with or without a space before), numbers, and so on."""
    kinds = dict.fromkeys(["bytes", "special", *TOKEN_KINDS, "punctuation", "parts_of_characters"], 0)
    special = set(tokenizer.special_tokens.values())
    for id, token in tokenizer.vocab.items():
        kinds[_kind(token) if id not in special else "special"] += 1
    return kinds


def _kind(token: bytes) -> str:
    if len(token) == 1:
        return "bytes"
    try:
        text = token.decode().strip()
    except UnicodeDecodeError:
        return "parts_of_characters"
    return next((name for name, holds in TOKEN_KINDS.items() if holds(text)), "punctuation")


def measure(
    tokenizer: Tokenizer,
    texts: Inputs,
    *,
    name: str,
    longest: int,
    errors: Literal["error", "replace", "bytes"],
    threads: int | None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]:
    """Encode the texts as `bpe-encode` does, into a temporary folder, and look at what came out.

    Args:
        tokenizer: whose special tokens are recognised in text files, as `bpe-encode` does.
        texts: the whole of it is encoded, for the time it takes.
        name: how the user named the tokenizer.
        longest: how many of the longest tokens are listed.
        errors: invalid UTF-8.
        threads: default: one a core.
        progress: as the core calls it.

    Returns:
        What `bpe-inspect --json` prints of the whole text: names, counts, `bytes_per_token`, `bytes_per_second`,
        `pile_hours`. Without any text `bytes_per_token` is 0 and `pile_hours` None.
    """
    import tempfile

    import numpy as np

    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bpe-inspect-") as folder:
        out = Path(folder) / "tokens.npy"
        while not seconds or (sum(seconds) < MEASURE_S and len(seconds) < 5):
            start = time.perf_counter()
            ((_, manifest),), _ = _core.encode_files(
                tokenizer,
                texts,
                out,
                append_eot=False,
                errors=errors,
                overwrite=True,
                threads=threads,
                progress=progress,
            )
            seconds.append(time.perf_counter() - start)
        used = _different(np.load(out, mmap_mode="r"), tokenizer.n_vocab)
    special = set(tokenizer.special_tokens.values())
    ordinary = [t for id, t in tokenizer.vocab.items() if id not in special]
    speed = manifest["text_bytes"] / min(seconds)
    return {
        "tokenizer": name,
        "hash": tokenizer.hash,
        "pattern": tokenizer.pattern,
        "vocab_size": tokenizer.n_vocab,
        "vocabulary": vocabulary_kinds(tokenizer),
        "longest_tokens": [bare_token(t) for t in sorted(ordinary, key=lambda t: (-len(t), t))[:longest]],
        "text": [str(t) for t in texts.listed],
        "bytes": manifest["text_bytes"],
        "tokens": manifest["tokens"],
        "bytes_per_token": manifest["text_bytes"] / max(manifest["tokens"], 1),
        "tokens_used": used,
        "seconds": min(seconds),
        "bytes_per_second": speed,
        "pile_hours": PILE_BYTES / speed / 3600 if speed else None,
    }


def _different(ids: NDArray[np.unsignedinteger], n_vocab: int) -> int:
    import numpy as np

    seen = np.zeros(n_vocab, dtype=bool)
    for start in range(0, len(ids), COUNT_AT_ONCE):
        seen[ids[start : start + COUNT_AT_ONCE]] = True
    return int(seen.sum())
