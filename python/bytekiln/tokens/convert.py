"""One token file to another format: the same ids, where documents end, and a manifest.

In: an open `TokenFile` and the name of the output. Out: the file, beside it the ends of documents where nothing else
tells them, and the manifest. Ids stream through memory a block at a time, ends of documents through a file without a
name; nothing grows with the input. Called by `tokens.command`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytekiln import _core
from bytekiln.atomic import AtomicFile, in_our_words
from bytekiln.characters import AnyTokenizer
from bytekiln.errors import ConfigError, FileError, FormatError, MismatchError
from bytekiln.tokenfile import TokenFile
from bytekiln.tokens import llmc, megatron
from bytekiln.tokens.files import file_name, is_orphan, npy_header, refuse_link
from bytekiln.tokens.mapping import looks_like
from bytekiln.tokens.targets import HEADER_BYTES, TYPES, default_type, kind_of, outputs

BLOCK_IDS = 1 << 20
"""Ids that are in memory at a time."""
Ends = NDArray[np.int64]


class Converted(NamedTuple):
    """What was written."""

    manifest: dict[str, Any]
    notices: list[str]
    """Sentences for the user: what was found out, and what could not be."""


def convert(
    source: TokenFile,
    out: Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    tokenizer: AnyTokenizer | None = None,
    eot_id: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Converted:
    """Write `source` in another format, or in another type.

    Args:
        source: what is read.
        out: what is written; of Megatron's two files either.
        to: "npy", "bin", "llmc" or "megatron"; by default what the suffix of `out` says.
        dtype: type of the ids that are written; default: see `default_type`.
        tokenizer: what made the ids; its size, hash and end-of-text token go into the manifest.
        eot_id: the id that ends documents, where no tokenizer tells.
        overwrite: replace what is there.
        progress: called with the bytes read and the bytes in all.

    Raises:
        ConfigError: a type or a name that does not go with the format, too many tokens for it.
        FormatError: an id that does not fit the type or the vocabulary, with its place.
        MismatchError: the source is not what its manifest says, or another tokenizer made it.
        FileError, OutputExistsError: as `AtomicFile`.
    """
    kind = kind_of(out, to)
    vocab_size = tokenizer.n_vocab if tokenizer is not None else source.vocab_size
    dtype = dtype or default_type(source.dtype.name, kind, vocab_size)
    if dtype not in TYPES[kind]:
        raise ConfigError(f"dtype: found {dtype}; expected {', '.join(TYPES[kind])}, which {kind} files can hold")
    if kind == "llmc" and len(source) > llmc.GREATEST_COUNT:
        raise ConfigError(
            f"{out}: {len(source)} tokens; expected at most {llmc.GREATEST_COUNT}, which an llm.c header can count"
        )
    if tokenizer is not None and source.tokenizer_hash not in (None, tokenizer.hash):
        raise MismatchError(
            f"{source.path}: found tokenizer hash {source.tokenizer_hash}; expected {tokenizer.hash}, the tokenizer's"
        )
    eot = _one_eot(source, tokenizer, eot_id)
    if (source.manifest or {}).get("checksum"):
        source.verify()  # damage would get a fresh checksum otherwise
    job = _Job(source, out, kind, dtype, eot, vocab_size, overwrite)
    try:
        with job:
            job.copy(progress)
            return job.finish(tokenizer)
    except OSError as error:
        raise in_our_words(out, error) from None


def _one_eot(source: TokenFile, tokenizer: AnyTokenizer | None, asked: int | None) -> int | None:
    """The id that ends documents, of those who name one; they must agree."""
    named = {
        "the tokenizer": None if tokenizer is None else tokenizer.eot_id,
        f"{source.path.name}.json": source.eot_id,
    }
    for who, known in named.items():
        if asked is not None and known is not None and known != asked:
            raise MismatchError(f"eot_id: found {asked}; expected {known}, as {who} has it")
        asked = known if asked is None else asked
    return asked


class _Job:
    """The files that are being written, and what is known of the documents so far."""

    def __init__(
        self, source: TokenFile, out: Path, kind: str, dtype: str, eot: int | None, vocab_size: int | None,
        overwrite: bool,
    ) -> None:  # fmt: skip
        self.source, self.kind, self.dtype = source, kind, np.dtype(dtype).newbyteorder("<")
        self.ids_path, self.ends_path = outputs(out, kind)
        self.overwrite, self.vocab_size, self.eot = overwrite, vocab_size, eot
        self.max_id, self.last_end = -1, 0
        refuse_link(self.ids_path)
        if kind == "megatron":
            refuse_link(self.ends_path)
        if kind == "bin" and megatron.index_of(self.ids_path) is not None:
            raise ConfigError(
                f"{self.ids_path.with_suffix('.idx')}: is a Megatron index and would be taken for that of "
                f"{self.ids_path.name}; expected another name, or --to megatron"
            )

    def __enter__(self) -> _Job:
        with ExitStack() as stack:
            ids, replace = self.ids_path, self.overwrite or is_orphan(self.ids_path)
            # The manifest's place is taken first, as in the core: refused before any work is done.
            self.side = stack.enter_context(AtomicFile(ids.with_name(ids.name + ".json"), overwrite=replace))
            self.ends_file = stack.enter_context(AtomicFile(self.ends_path, overwrite=replace))
            self.ids = stack.enter_context(AtomicFile(ids, overwrite=self.overwrite))
            self.ids.write(bytes(HEADER_BYTES[self.kind]))
            self.spool: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=ids.parent))
            blocks = self.source.document_blocks()
            self.kept = blocks is not None
            """Whether the source keeps the ends of documents beside the ids."""
            self.documents = sum(self._spool(block) for block in blocks or ())
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *of_error: Any) -> None:
        self.stack.__exit__(*of_error)

    def _spool(self, ends: Ends) -> int:
        if len(ends) and (ends[0] < self.last_end or (ends[1:] < ends[:-1]).any()):
            raise FormatError(
                f"{self.source.path}: ends of documents out of order; expected each behind the one before"
            )
        self.last_end = int(ends[-1]) if len(ends) else self.last_end
        self.spool.write(ends.astype("<i8").tobytes())
        return len(ends)

    def ends(self) -> Ends:
        """The ends of documents so far, mapped."""
        self.spool.flush()
        if not self.documents:
            return np.zeros(0, np.int64)
        return np.memmap(self.spool, "<i8", "r", shape=(self.documents,)).view(np.ndarray)

    def copy(self, progress: Callable[[int, int], object]) -> None:
        """Stream the ids, check them, and see where documents end."""
        path, count, size = self.source.path, len(self.source), self.source.dtype.itemsize
        kept = self.ends() if self.kept else None
        candidate = self.eot
        if kept is not None and candidate is None and kept[0] > 0:
            candidate = int(self.source.array[kept[0] - 1])
        self.tells, seen = candidate is not None, 0
        with path.open("rb") as file:
            file.seek(self.source.offset)
            for begin in range(0, count, BLOCK_IDS):
                ids: NDArray[Any] = np.fromfile(file, self.source.dtype, min(BLOCK_IDS, count - begin))
                if begin + len(ids) < min(begin + BLOCK_IDS, count):
                    raise FileError(f"{path}: changed while it was read; expected a file that stays as it is")
                self._check(ids, begin)
                if self.tells or kept is None:
                    ends = self._ends_in(ids, begin, candidate)
                    if kept is None:
                        self.documents += self._spool(ends)
                    else:
                        until = int(np.searchsorted(kept, begin + len(ids), side="right"))
                        self.tells = len(ends) == until - seen and np.array_equal(kept[seen:until], ends)
                        seen = until
                data = ids.astype(self.dtype).tobytes()
                if begin == 0 and not HEADER_BYTES[self.kind] and looks_like(data):
                    raise FormatError(
                        f"{path}: its first ids are what files of another format begin with; "
                        "expected --to npy or llmc, which have a header"
                    )
                self.ids.write(data)
                progress((begin + len(ids)) * size, count * size)
        self.found = candidate if self.tells else None
        told = (self.source.manifest or {}).get("documents")
        if kept is None and self.documents > 1 and told == self.documents - 1 and self.source.array[-1] != candidate:
            # As `bpe-encode` counts them: white space behind the last document is none.
            self.spool.seek(-16, os.SEEK_END)
            self.spool.write(np.array([count], "<i8").tobytes())
            self.spool.truncate()
            self.documents -= 1

    def _ends_in(self, ids: NDArray[Any], begin: int, eot: int | None) -> Ends:
        """What `eot` says of a block: a document ends behind each, and at the end of the file."""
        if eot is None:
            return np.zeros(0, np.int64)
        ends = np.flatnonzero(ids == eot) + (begin + 1)
        last = begin + len(ids)
        if last == len(self.source) and (not len(ends) or ends[-1] != last):
            ends = np.append(ends, last)
        return ends

    def _check(self, ids: NDArray[Any], begin: int) -> None:
        greatest, limit = int(ids.max()), int(np.iinfo(self.dtype).max)
        self.max_id = max(self.max_id, greatest)
        for bound, expected in (
            (limit, f"ids up to {limit}, which {self.dtype.name} holds"),
            ((self.vocab_size or limit + 1) - 1, f"ids below the vocabulary size {self.vocab_size}"),
        ):
            if greatest > bound:
                place = int((ids > bound).argmax())
                raise FormatError(
                    f"{self.source.path}: token {begin + place} is id {int(ids[place])}; expected {expected}"
                )

    def finish(self, tokenizer: AnyTokenizer | None) -> Converted:
        """Complete the files, bring them to the disk, and give them their names."""
        source, tokens, notices = self.source, len(self.source), self._notices()
        if self.kind == "npy":
            self.ids.write_head(npy_header(self.dtype.name, tokens))
        elif self.kind == "llmc":
            self.ids.write_head(llmc.header(self.dtype.name, tokens))
        self.ids.sync()
        ends = self.ends()
        beside = self.kind == "megatron" or (self.kept and not self.tells)
        if beside:
            ends = ends if len(ends) else np.array([tokens], np.int64)
            if self.kind == "megatron":
                megatron.write_index(self.ends_file.write, self.ends_path, self.dtype.name, ends)
            else:
                self.ends_file.write(npy_header("int64", len(ends)))
                for begin in range(0, len(ends), BLOCK_IDS):
                    self.ends_file.write(ends[begin : begin + BLOCK_IDS].astype("<i8").tobytes())
            self.ends_file.sync()
        theirs = source.manifest or {}
        checksum = _core.payload_checksum(self.ends_file.partial) if beside else None
        manifest: dict[str, Any] = {
            "format": "bytekiln-tokens",
            "version": 1,
            "file": file_name(self.ids_path),
            "dtype": self.dtype.name,
            "tokens": tokens,
            "documents": len(ends) or None,
            "text_bytes": source.text_bytes,
            "vocab_size": self.vocab_size,
            "eot_id": self.eot if self.eot is not None else self.found,
            "max_id": self.max_id,
            "tokenizer_hash": tokenizer.hash if tokenizer is not None else source.tokenizer_hash,
            "checksum": _core.payload_checksum(self.ids.partial, HEADER_BYTES[self.kind]),
            "sources": theirs.get("sources") or [_itself(source.path)],
            "created_by": f"bytekiln {_core.__version__}",
        }
        if beside:
            manifest["document_ends"] = {"file": file_name(self.ends_path), "checksum": checksum}
        elif "documents" in theirs and not manifest["documents"]:
            manifest["documents"] = theirs["documents"]  # `--characters`: counted by files, ended by nothing
        self.side.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
        self.side.sync()
        self._commit(beside)
        return Converted(manifest, notices)

    def _notices(self) -> list[str]:
        source, out = self.source, []
        if self.kept and self.eot is None and self.found is not None:
            out.append(
                f"{source.path}: every document ends with id {self.found}, which is nowhere else: "
                "taken for the end-of-text token (eot_id)"
            )
        if self.kept and not self.tells:
            which = f"id {self.eot} does not tell" if self.eot is not None else "no id tells"
            out.append(f"{source.path}: {which} where documents end; {self.ends_path.name} does")
        if not self.kept and self.documents == 1 and int(source.array[-1]) != self.eot:
            out.append(f"{source.path}: id {self.eot}, said to end documents, does not occur: one document")
        if self.kind == "megatron" and not self.documents:
            out.append(
                f"{self.ends_path}: one document, since nothing tells where documents end; "
                "expected --tokenizer T or --eot-id N"
            )
        if source.index is not None and source.index.sequences != source.index.documents:
            out.append(
                f"{source.index.path}: {source.index.sequences} sequences in {source.index.documents} documents; "
                "only documents are kept"
            )
        return out

    def _commit(self, beside: bool) -> None:
        """Names for all, the ids last: ids without a manifest never exist, nor those of Megatron without an index."""
        before = self._ends_of_old()
        self.side.commit()
        try:
            if beside:
                self.ends_file.commit()
            self.ids.commit()
        except OSError:
            if not self.overwrite:
                self.side.path.unlink(missing_ok=True)  # without the ids it describes nothing
                if beside:
                    self.ends_path.unlink(missing_ok=True)
            raise
        if before is not None and not (beside and before == self.ends_path):
            before.unlink(missing_ok=True)

    def _ends_of_old(self) -> Path | None:
        """What the manifest that is replaced names as its ends of documents, written here under its usual name."""
        with suppress(OSError, ValueError, AttributeError):
            told = json.loads(self.side.path.read_bytes()).get("document_ends")
            usual = self.ids_path.with_name(self.ids_path.name + ".documents.npy")
            return usual if told and told.get("file") == file_name(usual) else None
        return None


def _itself(path: Path) -> dict[str, Any]:
    """A file as a source: what its own manifest would have said of texts is not known."""
    return {"name": file_name(path), "bytes": path.stat().st_size, "checksum": _core.payload_checksum(path)}
