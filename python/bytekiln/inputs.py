"""What to read, in one value: files, folders, globs or standard input, and which part of their text.

In: what a user named. Out: `Inputs`, which the core takes wherever it takes files; docs/inputs.md says what each
kind of file means. Called by `tokenizer` and `bpe_flags`.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple


class Inputs(NamedTuple):
    """Inputs of training, counting and encoding.

    Attributes:
        paths: one or several: files (text, jsonl, parquet; also `.gz`, `.zst`, `.xz`, `.bz2`), folders, globs, `-` for
            standard input.
        field: the field or column of records that holds the text; None: `text`, and standard input is plain text.
        limit_bytes: stop after so many bytes of text, at the last certain border between words before them.
        sample: the share of documents to read, above 0 and at most 1.
        seed: which documents those are.
    """

    paths: str | PathLike[str] | Sequence[str | PathLike[str]]
    field: str | None = None
    limit_bytes: int | None = None
    sample: float | None = None
    seed: int = 0

    @property
    def listed(self) -> list[str | PathLike[str]]:
        """The paths as a list."""
        return [self.paths] if isinstance(self.paths, str | PathLike) else list(self.paths)
