"""What can be written: the formats, the types an id can have in each, and where the files lie.

In: names. Out: choices, or an error. Called by `tokens.convert` and `tokens.command`.
"""

from __future__ import annotations

from pathlib import Path

from bytekiln.errors import ConfigError
from bytekiln.tokens import llmc, megatron
from bytekiln.tokens.files import NPY_HEADER

TYPES = {
    "npy": ("uint16", "uint32", "int32", "int64"),
    "bin": ("uint16", "uint32", "int32", "int64"),
    "llmc": tuple(llmc.KINDS),
    "megatron": tuple(megatron.CODES),
}
"""What an id can be in each format; `bin` has no header."""
HEADER_BYTES = {"npy": NPY_HEADER, "bin": 0, "llmc": llmc.HEADER_BYTES, "megatron": 0}


def kind_of(out: Path, asked: str | None) -> str:
    """The format of an output: what is asked for, else by its suffix.

    >>> kind_of(Path("a.npy"), None), kind_of(Path("a.idx"), None), kind_of(Path("a.bin"), "llmc")
    ('npy', 'megatron', 'llmc')

    Raises:
        ConfigError: nothing tells, or the name does not go with the format.
    """
    kind = asked or {".npy": "npy", ".bin": "bin", ".idx": "megatron"}.get(out.suffix)
    if kind is None:
        raise ConfigError(f"{out}: no known suffix (.npy, .bin, .idx); expected --to {', '.join(TYPES)}")
    if kind == "megatron" and out.suffix not in (".bin", ".idx"):
        raise ConfigError(f"{out}: with --to megatron; expected NAME.bin or NAME.idx, which are written together")
    if kind != "megatron" and out.suffix == ".idx":
        raise ConfigError(f"{out}: with --to {kind}; expected another suffix, since .idx is a Megatron index")
    return kind


def outputs(out: Path, kind: str) -> tuple[Path, Path]:
    """The file of the ids and the one of documents' ends, which is not written where nothing asks for it."""
    if kind == "megatron":
        return out.with_suffix(".bin"), out.with_suffix(".idx")
    return out, out.with_name(out.name + ".documents.npy")


def default_type(source: str, kind: str, vocab_size: int | None) -> str:
    """By the vocabulary, as `bpe-encode` chooses, else the source's own; where the format lacks it, the next.

    An unsigned type of 32 bits is int32 to Megatron, int32 is uint32 to llm.c: ids are checked, so none changes.

    >>> default_type("int32", "npy", None), default_type("int32", "npy", 50257)
    ('int32', 'uint16')
    >>> default_type("uint32", "megatron", None)
    'int32'
    """
    wanted = source if vocab_size is None else "uint16" if vocab_size <= 1 << 16 else "uint32"
    if wanted in TYPES[kind]:
        return wanted
    if wanted in ("uint8", "int8", "int16"):
        return "uint16"
    return "int32" if kind == "megatron" else "uint32"
