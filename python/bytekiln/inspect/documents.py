"""A sample of whole documents of some inputs, as bytes, of bounded size.

In: `Inputs`. Out: `Documents`. The core reads them: encoded by a tokenizer of single bytes they are their own bytes,
with an id of its own where one ends, so that every kind of file, packing, policy and sample that it knows is known
here, and no second reader can disagree with it. Called by `cli_inspect`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bytekiln import _core
from bytekiln.inputs import Inputs
from bytekiln.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bytekiln.tokenizer import TextPolicy

EOT = "<|endoftext|>"
END = 256
"""Id of a document's end."""
SLACK = 2
"""Where long documents make a sample come out that much larger than asked it is cut, and that much smaller it is none:
the text's beginning is taken."""


@dataclass(frozen=True)
class Documents:
    """Whole documents, in the order of the text.

    Attributes:
        texts: the documents that have more than white space; UTF-8 unless the policy was `bytes`.
        share: the share of the documents that was drawn; 1: every one of them.
        how: `all`, `sample`, or `beginning` where documents are so long that too little was drawn.
        seed: which documents were drawn.
        separator: what ends a document in a text file.
    """

    texts: list[bytes]
    share: float
    how: str
    seed: int
    separator: str


def separator_of(tokenizers: Sequence[Tokenizer]) -> str:
    """What ends documents in text files: the end-of-text token of the first tokenizer that has one, else the usual."""
    for tokenizer in tokenizers:
        if tokenizer.eot_id is not None:
            return tokenizer.id_to_token(tokenizer.eot_id).decode()
    return EOT


def read_documents(
    texts: Inputs,
    *,
    text_bytes: int,
    size: int,
    separator: str = EOT,
    errors: TextPolicy = "error",
    threads: int | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> Documents:
    """Draw documents until they have about `size` bytes.

    Each document is drawn with the same probability, `size / text_bytes`, by the rule of `Inputs.sample`: a larger
    size takes the same ones and more. Memory holds 3 bytes for each of the sample's.

    Args:
        texts: what to read; a sample or a limit of its own holds here too.
        text_bytes: how much text that is, from a pass before: the sizes of packed files would not tell.
        size: bytes of text that are asked for.
        separator: what ends a document in a text file.
        errors: invalid UTF-8, as everywhere.
        threads: as everywhere; the documents never depend on it.
        progress: called as `progress("documents", done, total)`.

    Raises:
        FileError, FormatError, TextError: as reading has them.
    """
    told = (lambda _stage, done, total: progress("documents", done, total)) if progress else None

    def read(share: float | None, limit: int | None) -> list[bytes]:
        inputs = texts._replace(sample=share, limit_bytes=limit)
        with tempfile.TemporaryDirectory(prefix="bpe-inspect-") as folder:
            out = Path(folder) / "bytes.npy"
            _core.encode_files(
                _single_bytes(separator), inputs, out, append_eot=True, errors=errors, threads=threads, progress=told
            )
            return _split(out)

    part = size / max(text_bytes, 1)
    if part >= 1:
        share = texts.sample or 1.0
        return Documents(read(texts.sample, texts.limit_bytes), share, "all", texts.seed, separator)
    # A limit counts the text that a sample takes: a part of the sample has a part of the limit.
    limit = math.ceil(part * texts.limit_bytes) if texts.limit_bytes else SLACK * size
    share = part * (texts.sample or 1.0)
    found = read(share, min(limit, SLACK * size))
    if sum(map(len, found)) >= size / SLACK:
        return Documents(found, share, "sample", texts.seed, separator)
    return Documents(read(texts.sample, size), texts.sample or 1.0, "beginning", texts.seed, separator)


def _single_bytes(separator: str) -> Tokenizer:
    return Tokenizer.from_vocab_and_merges({i: bytes([i]) for i in range(END)}, [], special_tokens=[separator])


def _split(path: Path) -> list[bytes]:
    import numpy as np

    ids = np.load(path)
    ends = np.flatnonzero(ids == END).tolist()
    data = ids.astype(np.uint8).tobytes()
    parts = (data[a:b] for a, b in zip([0, *(e + 1 for e in ends)], [*ends, len(data)], strict=True))
    return [part for part in parts if part and not part.isspace()]
