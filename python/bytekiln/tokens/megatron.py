"""Megatron's indexed data sets: ids without a header in `NAME.bin`, and `NAME.idx`, which says what they are.

In: an index file, or where documents end. Out: type, places and documents of the ids, or a new index. Called by
`tokenfile` and `tokens.convert`. The format is that of `megatron/core/datasets/indexed_dataset.py` (`_IndexWriter`,
`_IndexReader`), little-endian: magic of 9 bytes, version as uint64, type as uint8, numbers of sequences and of
documents plus one as uint64; then lengths of sequences as int32, their first bytes in the `.bin` as int64, the first
sequence of every document and the number of sequences as int64, and for multimodal data a byte a sequence.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytekiln.errors import ConfigError, FileError, FormatError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAGIC = b"MMIDIDX\0\0"
_HEAD = struct.Struct("<9sQBQQ")
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
"""Megatron's codes. Ids are integers: of the two kinds of floats only the name is known here."""
CODES = {name: code for code, name in TYPES.items() if not name.startswith("float")}
LONGEST = 2**31 - 1
"""Tokens in a sequence: lengths are int32."""
_BLOCK = 1 << 18
"""Entries of the index looked at in one go: 2 MB."""


def index_of(path: Path) -> Path | None:
    """The index that makes `path` the ids of a Megatron data set, told by its magic; None where there is none.

    The format names both files, `NAME.bin` and `NAME.idx`; what else lies beside an index is not its ids.

    Raises:
        FileError: it is there and cannot be read.
    """
    if path.suffix != ".bin":
        return None
    side = path.with_suffix(".idx")
    try:
        with side.open("rb") as file:
            return side if file.read(len(MAGIC)) == MAGIC else None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except OSError as error:
        raise FileError(f"{side}: {(error.strerror or str(error)).lower()}; expected a readable index") from None


class Index:
    """An index that was read and checked.

    Attributes:
        dtype: type of the ids.
        tokens: how many there are.
        sequences, documents: how many of each; a document is some sequences in succession, most often one.
    """

    def __init__(self, path: Path, bin_bytes: int) -> None:
        """Map an index and check it against the size of the ids.

        Raises:
            FormatError: truncated, trailing bytes, another version or type, sequences that do not lie one behind the
                other, documents out of order, or a `.bin` of another size.
        """
        import numpy as np

        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise FormatError(f"{path}: truncated: {size} bytes; expected a Megatron index of {_HEAD.size} or more")
        _, version, code, sequences, marks = _HEAD.unpack(head)
        if version != 1:
            raise FormatError(f"{path}: version {version} of a Megatron index; expected 1")
        if code not in TYPES or TYPES[code] not in CODES:
            raise FormatError(
                f"{path}: type {code} ({TYPES.get(code, 'unknown')}); expected integer ids ({', '.join(CODES)})"
            )
        wanted = _HEAD.size + 12 * sequences + 8 * marks
        if sequences and size == wanted + sequences:
            raise FormatError(f"{path}: a mode for every sequence, as multimodal data has it; expected text alone")
        if size != wanted:
            what = f"truncated: {size} bytes" if size < wanted else f"{size - wanted} bytes behind its end"
            raise FormatError(f"{path}: {what}; expected {wanted} for {sequences} sequences and {marks} document marks")
        if not sequences or marks < 2:
            raise FormatError(f"{path}: no documents; expected at least one")
        self.dtype, self.sequences, self.documents = TYPES[code], sequences, marks - 1
        self._itemsize = np.dtype(self.dtype).itemsize
        at = _HEAD.size
        self._lengths = _mapped(path, "<i4", at, sequences)
        self._pointers = _mapped(path, "<i8", at + 4 * sequences, sequences)
        self._marks = _mapped(path, "<i8", at + 12 * sequences, marks)
        self.tokens = self._check_sequences()
        self._check_marks()
        if bin_bytes != self.tokens * self._itemsize:
            wanted = self.tokens * self._itemsize
            what = f"truncated: {bin_bytes} bytes" if bin_bytes < wanted else f"{bin_bytes - wanted} bytes too many"
            raise FormatError(
                f"{path.with_suffix('.bin')}: {what}; expected {wanted} for {self.tokens} tokens of {self.dtype}, "
                f"as {path.name} says"
            )

    def _check_sequences(self) -> int:
        """Each sequence begins where the one before it ends; returns the tokens of all."""
        import numpy as np

        total = 0
        for begin in range(0, self.sequences, _BLOCK):
            lengths = self._lengths[begin : begin + _BLOCK].astype(np.int64)
            if int(lengths.min()) < 0:
                place = int((lengths < 0).argmax())
                raise FormatError(
                    f"{self.path}: sequence {begin + place} has length {lengths[place]}; expected 0 or more"
                )
            ends = total + np.cumsum(lengths)
            found, wanted = self._pointers[begin : begin + _BLOCK], (ends - lengths) * self._itemsize
            if not np.array_equal(found, wanted):
                place = int((found != wanted).argmax())
                raise FormatError(
                    f"{self.path}: sequence {begin + place} begins at byte {found[place]}; expected {wanted[place]}, "
                    "behind the one before it"
                )
            total = int(ends[-1])
        return total

    def _check_marks(self) -> None:
        before = 0
        for begin in range(0, self.documents + 1, _BLOCK):
            marks = self._marks[begin : begin + _BLOCK]
            if int(marks[0]) < before or (marks[1:] < marks[:-1]).any() or (begin == 0 and marks[0] != 0):
                raise FormatError(f"{self.path}: documents out of order; expected them to begin at 0 and to go on")
            before = int(marks[-1])
        if before != self.sequences:
            raise FormatError(f"{self.path}: documents of {before} sequences; expected all {self.sequences}")

    def end_blocks(self) -> Iterator[NDArray[np.int64]]:
        """One place past the end of each document, in tokens, in blocks."""
        import numpy as np

        for begin in range(1, self.documents + 1, _BLOCK):
            last = self._marks[begin : begin + _BLOCK]
            starts = self._pointers[np.minimum(last, self.sequences - 1)] // self._itemsize
            yield np.where(last < self.sequences, starts, self.tokens).astype(np.int64)


def write_index(write: Callable[[bytes], object], path: Path, dtype: str, ends: NDArray[np.int64]) -> None:
    """Write an index in which every document is one sequence.

    Args:
        write: takes the bytes in their order.
        path: for messages.
        dtype: type of the ids in the `.bin`.
        ends: one place past the end of each document; may be mapped, it is read in blocks.

    Raises:
        ConfigError: a document that is too long for it.
    """
    import numpy as np

    itemsize = np.dtype(dtype).itemsize
    write(_HEAD.pack(MAGIC, 1, CODES[dtype], len(ends), len(ends) + 1))
    for begin, starts, block in _documents(ends):
        lengths = block - starts
        if int(lengths.max()) > LONGEST:
            place = int(lengths.argmax())
            raise ConfigError(
                f"{path}: document {begin + place} has {lengths[place]} tokens; expected at most {LONGEST}, "
                "which a Megatron index can count"
            )
        write(lengths.astype("<i4").tobytes())
    for _, starts, _ in _documents(ends):
        write((starts * itemsize).astype("<i8").tobytes())
    for begin in range(0, len(ends) + 1, _BLOCK):
        write(np.arange(begin, min(begin + _BLOCK, len(ends) + 1), dtype="<i8").tobytes())


def _documents(ends: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Number of the first document, starts and ends, block by block."""
    import numpy as np

    before = 0
    for begin in range(0, len(ends), _BLOCK):
        block = np.asarray(ends[begin : begin + _BLOCK], np.int64)
        yield begin, np.concatenate([[before], block[:-1]]).astype(np.int64), block
        before = int(block[-1])


def _mapped(path: Path, dtype: str, offset: int, count: int) -> NDArray[Any]:
    import numpy as np

    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)
