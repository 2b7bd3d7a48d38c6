"""Ids on disk as memory maps: `.npy`, llm.c's files, and ids without any header.

In: a path, and what is known of its type. Out: the ids, checked as far as that goes without reading them all (only
signed ones are read, for negative ids). Called by `tokenfile`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytekiln.errors import FileError, FormatError
from bytekiln.tokens import llmc
from bytekiln.tokens.megatron import MAGIC as MEGATRON_MAGIC

if TYPE_CHECKING:
    from numpy.typing import NDArray

NPY_MAGIC = b"\x93NUMPY"
SCAN_IDS = 1 << 22
"""Ids looked at in one go while a file is scanned: 8 MB of uint16."""


def head_of(path: Path) -> bytes:
    """As many of the first bytes as any magic has, and what llm.c's header says behind its own."""
    try:
        # Before it is opened, which a pipe that nobody writes to would never be.
        if not path.is_file() and not path.is_dir() and path.exists():
            raise FileError(f"{path}: is a pipe or a device; expected a token file")
        with path.open("rb") as file:
            return file.read(12)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: {reason(error)}; expected a token file") from None


def looks_like(head: bytes) -> bool:
    """Whether a file that begins so has a magic that we know."""
    return head.startswith((NPY_MAGIC, MEGATRON_MAGIC)) or llmc.is_llmc(head)


def reason(error: OSError) -> str:
    """The operating system's words, as they stand in our messages."""
    return (error.strerror or str(error)).lower()


def map_npy(path: Path) -> NDArray[Any]:
    """A `.npy` of one dimension of integers, and nothing behind it."""
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
    offset: int = array.offset  # type: ignore[attr-defined]  # of np.memmap
    if extra := path.stat().st_size - offset - array.nbytes:
        raise FormatError(
            f"{path}: {extra} bytes behind the {len(array)} tokens of {array.dtype}; expected the file to end there"
        )
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


def map_llmc(path: Path, head: bytes) -> NDArray[Any]:
    """The ids behind llm.c's header, which begins with `head`."""
    import numpy as np

    dtype, tokens = llmc.read_header(path, head)
    kind = np.dtype(dtype).newbyteorder("<")
    return np.memmap(path, dtype=kind, mode="r", offset=llmc.HEADER_BYTES, shape=(tokens,))


def map_plain(path: Path, dtype: str) -> NDArray[Any]:
    """Ids that begin at the first byte and fill the file."""
    import numpy as np

    array = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    _check_not_negative(path, array)
    return array


def map_raw(path: Path, manifest: dict[str, Any] | None, dtype: str | None) -> tuple[NDArray[Any], str | None]:
    """Ids without a header, of the manifest's type, else `dtype`, else uint16; and a sentence where that is assumed."""
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
    for begin in range(0, len(array), SCAN_IDS):
        part = array[begin : begin + SCAN_IDS]
        if int(part.min()) < 0:
            place = int((part < 0).argmax())
            raise FormatError(f"{path}: token {begin + place} is id {int(part[place])}; expected ids from 0 on")
