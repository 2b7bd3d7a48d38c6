"""Token files of other people's formats, written and read here from their descriptions alone, without our code."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
LETTER = {"uint8": "B", "int8": "b", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I", "int64": "q"}
KINDS = ("npy", "bin", "llmc", "megatron")
HELD = {
    "npy": ("uint16", "uint32", "int32", "int64"),
    "bin": ("uint16", "uint32", "int32", "int64"),
    "llmc": ("uint16", "uint32"),
    "megatron": ("uint8", "int8", "int16", "uint16", "int32", "int64"),
}


def packed(ids: Sequence[int], dtype: str) -> bytes:
    return struct.pack(f"<{len(ids)}{LETTER[dtype]}", *ids)


def npy(path: Path, ids: Sequence[int], dtype: str) -> Path:
    with path.open("wb") as f:
        np.save(f, np.array(ids, dtype))
    return path


def raw(path: Path, ids: Sequence[int], dtype: str) -> Path:
    path.write_bytes(packed(ids, dtype))
    return path


def llmc(path: Path, ids: Sequence[int], dtype: str, *, version: int | None = None, count: int | None = None) -> Path:
    """llm.c's `write_datafile`: 256 int32, of which three say something."""
    magic, own = {"uint16": (20240520, 1), "uint32": (20240801, 7)}[dtype]
    count = len(ids) if count is None else count
    header = [magic, own if version is None else version, count] + [0] * 253
    path.write_bytes(struct.pack("<256i", *header) + packed(ids, dtype))
    return path


def index(lengths: Sequence[int], marks: Sequence[int], code: int, size: int, *, version: int = 1) -> bytes:
    pointers = [sum(lengths[:i]) * size for i in range(len(lengths))]
    return (
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", version, code, len(lengths), len(marks))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(marks)}q", *marks)
    )


def megatron(path: Path, documents: Sequence[Sequence[int]], dtype: str) -> Path:
    """One sequence a document, as `preprocess_data.py` writes text. `path` is the `.bin`."""
    size = struct.calcsize(LETTER[dtype])
    path.write_bytes(b"".join(packed(d, dtype) for d in documents))
    marks = range(len(documents) + 1)
    path.with_suffix(".idx").write_bytes(index([len(d) for d in documents], marks, CODES[dtype], size))
    return path


def written(kind: str, folder: Path, name: str, documents: Sequence[Sequence[int]], dtype: str) -> Path:
    """A file of any kind; only Megatron's keeps where documents end."""
    ids = [i for d in documents for i in d]
    path = folder / f"{name}.{'npy' if kind == 'npy' else 'bin'}"
    if kind == "megatron":
        return megatron(path, documents, dtype)
    return {"npy": npy, "bin": raw, "llmc": llmc}[kind](path, ids, dtype)


def read(kind: str, path: Path, dtype: str) -> tuple[list[int], list[list[int]] | None]:
    """The ids, and the documents where the format has them."""
    data = path.read_bytes()
    if kind == "npy":
        with path.open("rb") as f:
            array = np.load(f)
            assert f.read() == b""
        assert array.dtype == np.dtype(dtype)
        return array.tolist(), None
    if kind == "llmc":
        magic, version, count, *rest = struct.unpack_from("<256i", data)
        assert (magic, version) == {"uint16": (20240520, 1), "uint32": (20240801, 7)}[dtype]
        assert not any(rest)
        ids = list(struct.unpack(f"<{count}{LETTER[dtype]}", data[1024:]))
        return ids, None
    ids = list(struct.unpack(f"<{len(data) // struct.calcsize(LETTER[dtype])}{LETTER[dtype]}", data))
    if kind == "bin":
        return ids, None
    idx = path.with_suffix(".idx").read_bytes()
    assert idx[:9] == b"MMIDIDX\0\0"
    version, code, sequences, marks = struct.unpack_from("<QBQQ", idx, 9)
    assert (version, code) == (1, CODES[dtype])
    lengths = struct.unpack_from(f"<{sequences}i", idx, 34)
    pointers = struct.unpack_from(f"<{sequences}q", idx, 34 + 4 * sequences)
    ends = struct.unpack_from(f"<{marks}q", idx, 34 + 12 * sequences)
    assert len(idx) == 34 + 12 * sequences + 8 * marks
    assert list(ends) == list(range(sequences + 1)), "every document is one sequence"
    size = struct.calcsize(LETTER[dtype])
    assert list(pointers) == [sum(lengths[:i]) * size for i in range(sequences)]
    assert sum(lengths) == len(ids)
    return ids, [ids[p // size : p // size + n] for p, n in zip(pointers, lengths, strict=True)]
