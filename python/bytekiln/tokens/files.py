"""What every writer of token files shares: the `.npy` header, names in manifests, what a killed writer left.

In: paths, types, counts. Out: bytes and answers. Called by `characters_file`, `tokens.convert`, `tokens.join` and
`encode_ray`. numpy stays out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from bytekiln.errors import FileError

NPY_HEADER = 128
"""Bytes of the `.npy` header: fixed, so that the count can be filled in at the end."""
NPY_MAGIC = b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little")
"""Format 1.0 and the length of what follows."""


def npy_header(dtype: str, count: int) -> bytes:
    """The header of a `.npy` file of one dimension, little-endian.

    >>> npy_header("uint16", 5)[10:67]
    b"{'descr': '<u2', 'fortran_order': False, 'shape': (5,), }"
    """
    bits = int(dtype.lstrip("uint"))
    kind = f"{'|' if bits == 8 else '<'}{'u' if dtype.startswith('u') else 'i'}{bits // 8}"
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({count},), }}"
    return NPY_MAGIC + text.ljust(NPY_HEADER - len(NPY_MAGIC) - 1).encode() + b"\n"


def file_name(path: Path) -> str:
    """A file's name as text, whatever bytes it has on the disk."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def refuse_link(path: Path) -> None:
    """Refuse an output that is a symbolic link, as the core does: neither what it points to nor the link is replaced.

    Raises:
        FileError: it is one.
    """
    if path.is_symlink():
        raise FileError(
            f"{path}: is a symbolic link to {os.readlink(path)}; expected a file's own name to write"  # noqa: PTH115
        )


def is_orphan(path: Path) -> bool:
    """Whether `path` has a manifest and no token file: a writer was killed between two renames."""
    try:
        manifest = json.loads(path.with_name(path.name + ".json").read_bytes())
    except (OSError, ValueError):
        return False
    return (
        not path.exists()
        and isinstance(manifest, dict)
        and manifest.get("format") == "bytekiln-tokens"
        and manifest.get("file") == file_name(path)
        and "shards" not in manifest
    )
