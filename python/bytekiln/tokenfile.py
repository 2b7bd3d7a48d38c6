"""Token files on disk, opened as memory maps and checked before anything trusts them.

In: a path to `.npy`, raw ids, llm.c's or Megatron's files. Out: `TokenFile`. What has a magic is read by its magic,
never by its suffix; a raw file's type comes from its manifest, else from the caller, else it is uint16
(docs/formats.md). Called by users, `tokenizer.encode_files`, `data` and `tokens.convert`.

What reads a file is loaded where a file is read: to write one takes none of it, and it is a tenth of the time in which
64 MB of text become a token file.
"""

from __future__ import annotations

import os

from bytekiln import _core
from bytekiln.errors import FileError, FormatError, MismatchError

TYPE_CHECKING = False  # as in `tokenizer`
if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike
    from pathlib import Path
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from bytekiln.tokens import megatron


class TokenFile:
    """Token ids in a file: a read-only memory map and what its manifest says.

    Attributes:
        path: the file of the ids.
        array: the ids, 1-D, read-only, `np.memmap`.
        manifest: the manifest beside it (`<file>.json`), or None.
        notice: a sentence about a type that had to be assumed, or None.
        kind: "npy", "bin" (no header), "llmc" or "megatron".
        index: Megatron's index of the ids, or None.
    """

    def __init__(
        self,
        path: Path,
        array: NDArray[Any],
        manifest: dict[str, Any] | None,
        notice: str | None,
        offset: int,
        kind: str,
        index: megatron.Index | None,
    ) -> None:
        self.path = path
        self.array = array
        self.manifest = manifest
        self.notice = notice
        self.kind = kind
        self.index = index
        self.offset = offset

    @classmethod
    def later(cls, path: str | PathLike[str]) -> TokenFile:
        """What `open` gives, opened when it is first asked for: whoever only writes a file loads no numpy.

        Its path is absolute, for the process may be in another folder by then.
        """
        self = cls.__new__(cls)
        self.__dict__["_later"] = os.path.abspath(path)  # noqa: PTH100 - without pathlib
        return self

    def __getattr__(self, name: str) -> object:
        """Open a file that was to be opened later."""
        if name.startswith("_") or "_later" not in self.__dict__ or "array" in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name == "path":
            from pathlib import Path

            self.path = Path(self.__dict__["_later"])
        else:
            self.__dict__.update(TokenFile.open(self.path).__dict__)
        return getattr(self, name)

    @classmethod
    def open(cls, path: str | PathLike[str], dtype: str | None = None) -> TokenFile:
        """Open a token file and check everything that can be checked without reading it.

        Args:
            path: `.npy` or llm.c's (told by their magic), the `.bin` or `.idx` of a Megatron data set (told by the
                magic of its index), or raw little-endian ids.
            dtype: type of a raw file that has no manifest: uint16, uint32, int32 or int64; default uint16.

        Raises:
            FileError: missing, unreadable, empty, or a directory.
            FormatError: truncated, bytes behind the ids, not one-dimensional, not integers, an odd number of bytes,
                or int32 ids taken for uint16.
            MismatchError: the manifest describes another file.
        """
        from pathlib import Path

        from bytekiln.tokens import llmc, megatron
        from bytekiln.tokens.mapping import NPY_MAGIC, head_of, map_llmc, map_npy, map_plain, map_raw

        path = Path(path)
        if names := shards_of(path):
            raise FileError(
                f"{path}: is in {len(names)} shards, {Path(names[0]).name} and so on; expected one of them "
                "(lm-train --train-data takes all of them by this name)"
            )
        head = head_of(path)
        if head.startswith(megatron.MAGIC):
            path = path.with_suffix(".bin")
            head = head_of(path)
        if not head:
            raise FileError(f"{path}: empty file (0 bytes); expected token ids")
        manifest = _read_manifest(path)
        notice, kind, index = None, "npy", None
        if head.startswith(NPY_MAGIC):
            array = map_npy(path)
        elif llmc.is_llmc(head):
            array, kind = map_llmc(path, head), "llmc"
        elif side := megatron.index_of(path):
            index, kind = megatron.Index(side, path.stat().st_size), "megatron"
            array = map_plain(path, index.dtype)
        else:
            (array, notice), kind = map_raw(path, manifest, dtype), "bin"
        if manifest is not None:
            for field, found in (("tokens", len(array)), ("dtype", str(array.dtype))):
                if manifest.get(field, found) != found:
                    raise MismatchError(
                        f"{path}: holds {field} {found}; expected {manifest[field]}, "
                        f"as its manifest {path.name}.json says"
                    )
        file = cls(path, array, manifest, notice, path.stat().st_size - array.nbytes, kind, index)
        file._check_document_ends()
        return file

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

    @property
    def document_ends(self) -> NDArray[np.int64] | None:
        """One place past the end of each document, where the format or the manifest keeps them beside the ids.

        Megatron's index has them, and the file that the manifest names; None: at most `eot_id` tells.
        """
        import numpy as np

        blocks = self.document_blocks()
        return None if blocks is None else np.concatenate(list(blocks))

    def document_blocks(self) -> Iterator[NDArray[np.int64]] | None:
        """`document_ends` in blocks, for whoever must not hold them all."""
        from bytekiln.tokens.mapping import SCAN_IDS, map_npy

        if self.index is not None:
            return self.index.end_blocks()
        side = self._ends_path()
        if side is None:
            return None
        ends = map_npy(side)
        return (ends[begin : begin + SCAN_IDS] for begin in range(0, len(ends), SCAN_IDS))

    def _ends_path(self) -> Path | None:
        """Where the manifest says that the ends of documents are: a file beside the ids, or Megatron's index."""
        told = self._of_manifest("document_ends")
        if told is None:
            return None
        name = told.get("file") if isinstance(told, dict) else None
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise FormatError(f"{self.path}.json: document_ends {told!r}; expected the name of a file beside it")
        return self.path.with_name(name)

    def _check_document_ends(self) -> None:
        side = self._ends_path()
        if side is None:
            return
        if self.index is not None:
            found, last = self.index.documents, len(self)
        else:
            from bytekiln.tokens.mapping import map_npy

            if not side.is_file():
                raise FileError(f"{side}: no such file; expected the ends of documents, as {self.path.name}.json says")
            ends = map_npy(side)
            found, last = len(ends), int(ends[-1])
        if last != len(self):
            raise MismatchError(
                f"{side}: the last document ends at token {last}; expected {len(self)}, as in {self.path}"
            )
        documents = self._of_manifest("documents")
        if documents is not None and documents != found:
            raise MismatchError(f"{side}: {found} documents; expected {documents}, as {self.path.name}.json says")

    @property
    def max_id(self) -> int:
        """Greatest id, found by reading the whole file once."""
        found: int | None = self.__dict__.get("_max_id")
        if found is None:
            found = self.__dict__["_max_id"] = max(int(part.max()) for _, part in self._parts())
        return found

    def _parts(self) -> Iterator[tuple[int, NDArray[Any]]]:
        from bytekiln.tokens.mapping import SCAN_IDS

        for begin in range(0, len(self), SCAN_IDS):
            yield begin, self.array[begin : begin + SCAN_IDS]

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
        """Compare the ids' bytes, and the file of documents' ends where there is one, with the manifest's checksums.

        Raises:
            MismatchError: they differ.
            FormatError: there is no checksum to compare with.
        """
        expected = self._of_manifest("checksum")
        if expected is None:
            raise FormatError(f"{self.path}: no checksum; expected one in {self.path.name}.json")
        found = _core.payload_checksum(self.path, self.offset)
        if found != expected:
            raise MismatchError(f"{self.path}: checksum {found}; expected {expected}, as {self.path.name}.json says")
        side = self._ends_path()
        expected = self._of_manifest("document_ends").get("checksum") if side is not None else None
        if side is not None and expected is not None and (found := _core.payload_checksum(side)) != expected:
            raise MismatchError(f"{side}: checksum {found}; expected {expected}, as {self.path.name}.json says")


def shards_of(path: str | PathLike[str]) -> list[str]:
    """The shards that `bpe-encode --out PATH --shard-tokens N` has written, in order; of anything else none.

    Raises:
        FileError, FormatError: the manifest of all of them is broken.
    """
    from pathlib import Path

    path = Path(path)
    # Path.exists raises where a text is no possible name.
    manifest = _read_manifest(path) if path.name and not os.path.exists(path) else None  # noqa: PTH110
    names = [shard.get("file") for shard in (manifest or {}).get("shards") or [] if isinstance(shard, dict)]
    return [str(path.with_name(name)) for name in names if isinstance(name, str) and name and "/" not in name]


def _read_manifest(path: Path) -> dict[str, Any] | None:
    import json

    from bytekiln.tokens.mapping import reason

    side = path.with_name(path.name + ".json")
    try:
        manifest = json.loads(side.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{side}: {reason(error)}; expected a readable manifest") from None
    except ValueError as error:
        raise FormatError(f"{side}: {error}; expected a JSON manifest") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "bytekiln-tokens":
        raise FormatError(f'{side}: not a manifest of a token file; expected format "bytekiln-tokens"')
    if manifest.get("version") != 1:
        raise FormatError(f"{side}: manifest version {manifest.get('version')}; expected 1")
    return manifest


__all__ = ["TokenFile", "shards_of"]
