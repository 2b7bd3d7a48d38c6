"""Token files of llm.c and modded-nanogpt: 256 int32 of header, then the ids.

In: the first bytes of a file. Out: type and count of its ids, or the header of a new file. Called by `tokenfile` and
`tokens.convert`. What is known of the format comes from llm.c's `dev/data/data_common.py` (`HEADERS_INFO`, the
writer of both kinds) and `llmc/dataloader.h` (the reader, which wants the file's size to the byte); modded-nanogpt's
`_load_data_shard` reads the first kind. The header's places behind the third are zeros that nobody reads.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from bytekiln.errors import FormatError

HEADER_BYTES = 1024
"""256 int32."""
KINDS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}
"""Magic and version by the type of the ids: GPT-2's, and those of Llama 3, whose version llm.c writes as 7."""
_BY_MAGIC = {magic: (dtype, version) for dtype, (magic, version) in KINDS.items()}
_QUESTIONS = 20240522
"""Magic of llm.c's multiple-choice files (`write_evalfile`), which have the same header and are no stream of ids."""
GREATEST_COUNT = 2**31 - 1
"""The count is an int32."""


class Header(NamedTuple):
    """What the header says."""

    dtype: str
    tokens: int


def is_llmc(head: bytes) -> bool:
    """Whether a file that begins with these four bytes or more is one of llm.c's."""
    return len(head) >= 4 and struct.unpack_from("<i", head)[0] in (*_BY_MAGIC, _QUESTIONS)


def read_header(path: Path, head: bytes) -> Header:
    """Type and count of the ids.

    Args:
        path: for messages, and the size.
        head: the first 12 bytes, of which `is_llmc` is true.

    Raises:
        FormatError: another version, multiple-choice questions, a size that the count contradicts.
    """
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise FormatError(f"{path}: truncated: {size} bytes; expected an llm.c header of {HEADER_BYTES} bytes")
    magic, version, count = struct.unpack_from("<3i", head)
    if magic == _QUESTIONS:
        raise FormatError(f"{path}: llm.c's multiple-choice questions (magic {magic}); expected a token file")
    dtype, known = _BY_MAGIC[magic]
    if version != known:
        raise FormatError(f"{path}: version {version} of an llm.c token file; expected {known} for magic {magic}")
    if count < 1:
        raise FormatError(f"{path}: {count} tokens, as its llm.c header says; expected at least one")
    wanted = count * (2 if dtype == "uint16" else 4)
    found = size - HEADER_BYTES
    if found < wanted:
        raise FormatError(f"{path}: truncated: {found} bytes of ids; expected {wanted} for {count} tokens of {dtype}")
    if found > wanted:
        raise FormatError(
            f"{path}: {found - wanted} bytes behind the {count} tokens of {dtype} that its llm.c header counts; "
            "expected the file to end there"
        )
    return Header(dtype, count)


def header(dtype: str, count: int) -> bytes:
    """The header of `count` ids of a type, at most `GREATEST_COUNT`."""
    return struct.pack("<3i", *KINDS[dtype], count).ljust(HEADER_BYTES, b"\0")
