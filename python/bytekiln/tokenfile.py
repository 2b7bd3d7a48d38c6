"""Token files on disk, opened as memory maps and checked before anything trusts them.

In: a path to `.npy` or raw ids. Out: `TokenFile`. What has a magic is read by its magic, never by its suffix;
a raw file's type comes from its manifest, else from the caller, else it is uint16 (docs/formats.md).
Called by users, `tokenizer.encode_files` and `data`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytekiln import _core
from bytekiln.errors import FileError, FormatError, MismatchError

if TYPE_CHECKING:
    from os import PathLike

    import numpy as np
    from numpy.typing import NDArray

_NPY_MAGIC = b"\x93NUMPY"
_SCAN_IDS = 1 << 22
"""Ids looked at in one go while a file is scanned: 8 MB of uint16."""


class TokenFile:
    """Token ids in a file: a read-only memory map and what its manifest says.

    Attributes:
        path: the file.
        array: the ids, 1-D, read-only, `np.memmap`.
        manifest: the manifest beside it (`<file>.json`), or None.
        notice: a sentence about a type that had to be assumed, or None.
    """

    def __init__(
        self, path: Path, array: NDArray[Any], manifest: dict[str, Any] | None, notice: str | None, offset: int
    ) -> None:
        self.path = path
        self.array = array
        self.manifest = manifest
        self.notice = notice
        self._offset = offset

    @classmethod
    def open(cls, path: str | PathLike[str], dtype: str | None = None) -> TokenFile:
        """Open a token file and check everything that can be checked without reading it.

        Args:
            path: `.npy` (told by its magic) or raw little-endian ids.
            dtype: type of a raw file that has no manifest: uint16, uint32, int32 or int64; default uint16.

        Raises:
            FileError: missing, unreadable, empty, or a directory.
            FormatError: truncated, not one-dimensional, not integers, an odd number of bytes, or int32 ids
                taken for uint16.
            MismatchError: the manifest describes another file.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                head = file.read(len(_NPY_MAGIC))
        except OSError as error:
            raise FileError(f"{path}: {_reason(error)}; expected a token file") from None
        if not head:
            raise FileError(f"{path}: empty file (0 bytes); expected token ids")
        manifest = _read_manifest(path)
        if head == _NPY_MAGIC:
            array, notice = _map_npy(path), None
        else:
            array, notice = _map_raw(path, manifest, dtype)
        if manifest is not None:
            for field, found in (("tokens", len(array)), ("dtype", str(array.dtype))):
                if manifest.get(field, found) != found:
                    raise MismatchError(
                        f"{path}: holds {field} {found}; expected {manifest[field]}, "
                        f"as its manifest {path.name}.json says"
                    )
        return cls(path, array, manifest, notice, path.stat().st_size - array.nbytes)

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.array)

    def __repr__(self) -> str:
        return f"<bytekiln.TokenFile {self.path} {len(self)} x {self.dtype}>"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an id."""
        return self.array.dtype

    @property
    def tokenizer_hash(self) -> str | None:
        """Hash of the tokenizer that made it, if the manifest names one."""
        found: str | None = self._of_manifest("tokenizer_hash")
        return found

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary that made it, if the manifest names one."""
        found: int | None = self._of_manifest("vocab_size")
        return found

    @property
    def text_bytes(self) -> int | None:
        """Bytes of text behind the ids, special tokens left out; bits per byte need it."""
        found: int | None = self._of_manifest("text_bytes")
        return found

    @property
    def eot_id(self) -> int | None:
        """Id that ends documents, if the manifest names one."""
        found: int | None = self._of_manifest("eot_id")
        return found

    def _of_manifest(self, field: str) -> Any:  # noqa: ANN401 - what JSON holds; `open` has checked the manifest
        return None if self.manifest is None else self.manifest.get(field)

    @cached_property
    def max_id(self) -> int:
        """Greatest id, found by reading the whole file once."""
        return max(int(part.max()) for _, part in self._parts())

    def _parts(self) -> Iterator[tuple[int, NDArray[Any]]]:
        for begin in range(0, len(self), _SCAN_IDS):
            yield begin, self.array[begin : begin + _SCAN_IDS]

    def check(self, vocab_size: int) -> None:
        """Make sure that every id is below `vocab_size`; reads the file, 2 GB/s or so.

        The manifest is not believed here: a flipped bit in the ids would crash an embedding or worse.

        Raises:
            FormatError: names the file, the first offending place and its id.
        """
        for begin, part in self._parts():
            if int(part.max()) < vocab_size and int(part.min()) >= 0:
                continue
            place = int(((part >= vocab_size) | (part < 0)).argmax())
            raise FormatError(
                f"{self.path}: token {begin + place} is id {int(part[place])}; "
                f"expected ids below the vocabulary size {vocab_size}"
            )

    def verify(self) -> None:
        """Compare the ids' bytes with the manifest's checksum.

        Raises:
            MismatchError: they differ.
            FormatError: there is no checksum to compare with.
        """
        expected = self._of_manifest("checksum")
        if expected is None:
            raise FormatError(f"{self.path}: no checksum; expected one in {self.path.name}.json")
        found = _core.payload_checksum(self.path, self._offset)
        if found != expected:
            raise MismatchError(f"{self.path}: checksum {found}; expected {expected}, as {self.path.name}.json says")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _read_manifest(path: Path) -> dict[str, Any] | None:
    side = path.with_name(path.name + ".json")
    try:
        manifest = json.loads(side.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{side}: {_reason(error)}; expected a readable manifest") from None
    except ValueError as error:
        raise FormatError(f"{side}: {error}; expected a JSON manifest") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "bytekiln-tokens":
        raise FormatError(f'{side}: not a manifest of a token file; expected format "bytekiln-tokens"')
    if manifest.get("version") != 1:
        raise FormatError(f"{side}: manifest version {manifest.get('version')}; expected 1")
    return manifest


def _map_npy(path: Path) -> NDArray[Any]:
    import numpy as np

    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FormatError(f"{path}: {_npy_fault(path, error)}") from None
    if array.ndim != 1:
        raise FormatError(f"{path}: array of shape {array.shape}; expected one dimension of token ids")
    if array.dtype.kind not in "ui":
        raise FormatError(f"{path}: array of type {array.dtype}; expected integers (uint16, uint32, int32 or int64)")
    if len(array) == 0:
        raise FormatError(f"{path}: no tokens; expected at least one")
    _check_not_negative(path, array)
    return array


def _npy_fault(path: Path, error: Exception) -> str:
    """What is wrong with a `.npy` that NumPy could not map."""
    import numpy as np

    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            found = path.stat().st_size - file.tell()
    except (ValueError, EOFError, OSError):
        return f"damaged .npy header ({str(error).splitlines()[0].lower()}); expected a whole array"
    if dtype.hasobject:
        return f"array of type {dtype}; expected integers (uint16, uint32, int32 or int64)"
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return f"truncated: {found} bytes of ids; expected {wanted} for shape {shape} of {dtype}"


def _map_raw(path: Path, manifest: dict[str, Any] | None, dtype: str | None) -> tuple[NDArray[Any], str | None]:
    import numpy as np

    notice = None
    if manifest is not None and "dtype" in manifest:
        name = str(manifest["dtype"])
    elif dtype is not None:
        name = dtype
    else:
        name = "uint16"
        notice = f"{path}: no manifest and no dtype given: read as uint16"
    if name not in ("uint16", "uint32", "int32", "int64"):
        raise FormatError(f"{path}: dtype {name!r}; expected uint16, uint32, int32 or int64")
    kind = np.dtype(name).newbyteorder("<")
    size = path.stat().st_size
    if size % kind.itemsize:
        raise FormatError(f"{path}: {size} bytes; expected a multiple of {kind.itemsize} for {name} ids")
    array = np.memmap(path, dtype=kind, mode="r")
    # Two zero bytes in every second place: what int32 ids look like when read as uint16.
    assumed_even = notice is not None and len(array) >= 4 and len(array) % 2 == 0
    if assumed_even and not array[1:8192:2].any() and not array[1::2].any() and array[::2].any():
        raise FormatError(
            f"{path}: every second value is 0, as in int32 ids; expected uint16, or the type by --data-dtype (dtype=)"
        )
    if name.startswith("int"):
        _check_not_negative(path, array)
    return array, notice


def _check_not_negative(path: Path, array: NDArray[Any]) -> None:
    if array.dtype.kind != "i":
        return
    for begin in range(0, len(array), _SCAN_IDS):
        part = array[begin : begin + _SCAN_IDS]
        if int(part.min()) < 0:
            place = int((part < 0).argmax())
            raise FormatError(f"{path}: token {begin + place} is id {int(part[place])}; expected ids from 0 on")


__all__ = ["TokenFile"]
