"""Text files to token files of characters: a vocabulary, a training and a validation part from one command.

In: UTF-8 text files. Out: `tokenizer.json`, token files and their manifests, laid out as `bpe-encode` writes them
(docs/formats.md). Texts are read in blocks, so memory stays bounded; numpy is loaded only here. Called by `cli_bpe`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from bytekiln import _core
from bytekiln.atomic import AtomicFile, in_our_words
from bytekiln.characters import CODE_POINTS, CharTokenizer
from bytekiln.errors import ConfigError, FileError, TextError
from bytekiln.tokens.files import NPY_HEADER, file_name, is_orphan, npy_header

BLOCK_BYTES = 1 << 20
"""Bytes of text that are in memory at a time."""
Progress = Callable[[str, int, int], object]
"""Called with the stage, the bytes done and the bytes in all."""


class Outputs(NamedTuple):
    """Where `prepare` writes."""

    tokenizer: Path
    train: Path
    val: Path | None
    """None where `val_share` is 0."""


def blocks(path: Path) -> Iterator[str]:
    """The text of a file, block by block, line ends as they are.

    Raises:
        FileError: missing, unreadable, empty, or no file.
        TextError: invalid UTF-8, with its byte offset.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise FileError(f"{path}: is a pipe or a device; expected a text file")
        with path.open("rb") as file:
            rest, offset, ended = b"", 0, False
            while not ended:
                read = file.read(BLOCK_BYTES)
                ended = not read
                if ended and not offset and not rest:
                    raise FileError(f"{path}: empty file (0 bytes); expected text")
                data = rest + read
                try:
                    text, used = codecs.utf_8_decode(data, "strict", ended)
                except UnicodeDecodeError as error:
                    raise TextError(
                        f"{path}: byte offset {offset + error.start}: invalid UTF-8 "
                        f"(byte 0x{data[error.start]:02x}); expected UTF-8 text"
                    ) from None
                rest, offset = data[used:], offset + used
                if text:
                    yield text
    except OSError as error:
        raise in_our_words(path, error) from None


def prepare(
    inputs: Sequence[Path],
    outputs: Outputs,
    *,
    val_share: Fraction,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[CharTokenizer, list[dict[str, Any]]]:
    """Make the vocabulary of some texts, and token files of their first and their last part.

    The first ⌊(1 - val_share) · characters⌋ of the texts in their order are for training, the rest for validation:
    nanoGPT's split. All files are complete and on the disk before the first takes its name.

    Args:
        inputs: the texts.
        outputs: what to write; `.bin` is raw, any other name of a token file `.npy`.
        val_share: at least 0, below 1.
        dtype: as in `encode`.
        overwrite: replace existing outputs.
        progress: told the bytes read; the texts are read twice.

    Returns:
        The tokenizer, and the manifests of the token files.

    Raises:
        OutputExistsError, FileError, TextError: as `blocks` and `AtomicFile`.
        ConfigError: a part would be empty, or `dtype` is too small.
    """
    total = 2 * sum(_size(path) for path in inputs)
    with ExitStack() as stack:
        # Opened before anything is read: a second writer is refused at once.
        tokenizer_file = stack.enter_context(AtomicFile(outputs.tokenizer, overwrite=overwrite))
        paths = [p for p in (outputs.train, outputs.val) if p is not None]
        tokenizer, count, done = _survey(inputs, lambda n: progress("characters", n, total))
        ends = [int(count * (1 - val_share)), count] if outputs.val else [count]
        if len(ends) == 2 and not 0 < ends[0] < count:
            raise ConfigError(
                f"val_share: found {float(val_share):g} of {count} characters, which leaves a part empty; "
                "expected a share that gives each at least one, or 0 for no validation file"
            )
        files = [stack.enter_context(_TokenFile(p, tokenizer, dtype, overwrite)) for p in paths]
        _fill(files, inputs, ends, lambda n: progress("encode", done + n, total))
        manifests = [file.finish() for file in files]
        tokenizer_file.write(tokenizer.to_json().encode())
        tokenizer_file.sync()
        for file in files:
            file.commit()
        tokenizer_file.commit()
    return tokenizer, manifests


def encode(
    tokenizer: CharTokenizer,
    inputs: Sequence[Path],
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Encode texts, in their order, with a vocabulary that is there already.

    Args:
        tokenizer: it has every character of the texts.
        inputs: the texts.
        out: `.bin` for raw ids, any other name for `.npy`.
        dtype: uint16 or uint32; None: uint16 where every id fits.
        overwrite: replace an existing output.
        progress: told the bytes read.

    Returns:
        The manifest.

    Raises:
        OutputExistsError, FileError, ConfigError: as `prepare`.
        TextError: invalid UTF-8 or an unknown character, with file and byte offset.
    """
    total = sum(_size(path) for path in inputs)
    with _TokenFile(out, tokenizer, dtype, overwrite) as file:
        _fill([file], inputs, [None], lambda n: progress("encode", n, total))
        manifest = file.finish()
        file.commit()
    return manifest


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise in_our_words(path, error) from None


def _survey(inputs: Sequence[Path], progress: Callable[[int], object]) -> tuple[CharTokenizer, int, int]:
    """The vocabulary of the texts, their characters, and their bytes."""
    import numpy as np

    seen = np.zeros(CODE_POINTS, dtype=np.bool_)
    count = done = 0
    for path in inputs:
        for text in blocks(path):
            seen[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
            count += len(text)
            done += len(text.encode())
            progress(done)
    return CharTokenizer(map(chr, np.flatnonzero(seen))), count, done


def _fill(
    files: Sequence[_TokenFile], inputs: Sequence[Path], ends: Sequence[int | None], progress: Callable[[int], object]
) -> None:
    """Write the texts into `files`: up to the character `ends[0]` into the first, and so on; None: to the end."""
    current = count = done = 0
    for path in inputs:
        offset = 0
        for block in blocks(path):
            text = block
            while text:
                end = ends[current]
                part = text if end is None else text[: end - count]
                if not part:
                    raise _changed(path)
                offset += files[current].write(part, path, offset)
                count, text = count + len(part), text[len(part) :]
                if count == end and current + 1 < len(files):
                    current += 1
            done += len(block.encode())
            progress(done)
    if ends[current] not in (None, count):
        raise _changed(inputs[-1])


def _changed(path: Path) -> FileError:
    return FileError(f"{path}: changed while it was read; expected a text that stays as it is")


class _TokenFile:
    """A token file that is being written, and what its manifest will say."""

    def __init__(self, path: Path, tokenizer: CharTokenizer, dtype: str | None, overwrite: bool) -> None:
        fits = tokenizer.n_vocab <= 1 << 16
        if dtype == "uint16" and not fits:
            raise ConfigError(
                f"dtype: uint16 holds ids up to 65535, the vocabulary has {tokenizer.n_vocab} tokens; expected uint32"
            )
        self._path, self._tokenizer, self._dtype = path, tokenizer, dtype or ("uint16" if fits else "uint32")
        self._overwrite = overwrite
        self._header = 0 if path.suffix == ".bin" else NPY_HEADER
        self._tokens = self._text_bytes = self._documents = 0
        self._max_id = -1
        self._sources: list[dict[str, Any]] = []
        self._source: tuple[Path, Any, bool] | None = None
        with ExitStack() as stack:
            # The manifest's place is taken first, as in the core: refused before any work is done.
            self._side = stack.enter_context(
                AtomicFile(path.with_name(path.name + ".json"), overwrite=overwrite or is_orphan(path))
            )
            self._file = stack.enter_context(AtomicFile(path, overwrite=overwrite))
            self._file.write(bytes(self._header))
            self._stack = stack.pop_all()

    def __enter__(self) -> _TokenFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, exc, trace)

    def write(self, text: str, source: Path, offset: int) -> int:
        """Append the ids of text that begins at byte `offset` of `source`; returns its bytes."""
        try:
            ids = self._tokenizer.encode_to_numpy(text)
        except TextError as error:
            place, _, what = str(error).removeprefix("byte offset ").partition(":")
            raise TextError(f"{source}: byte offset {offset + int(place)}:{what}") from None
        self._file.write(ids.astype("<u2" if self._dtype == "uint16" else "<u4").tobytes())
        raw = text.encode()
        self._tokens += len(ids)
        self._text_bytes += len(raw)
        self._max_id = max(self._max_id, int(ids.max()))
        self._note(source, offset, raw)
        return len(raw)

    def _note(self, source: Path, offset: int, raw: bytes) -> None:
        """Count the text into its source: a file, or the part of one that is written here."""
        if self._source is None or self._source[0] is not source:
            self._finish_source()
            self._sources.append({"name": file_name(source), "bytes": 0, "offset": offset})
            self._source = (source, hashlib.sha256(), True)
        path, digest, blank = self._source
        digest.update(raw)
        self._sources[-1]["bytes"] += len(raw)
        self._source = (path, digest, blank and raw.isspace())

    def _finish_source(self) -> None:
        if self._source is not None:
            _, digest, blank = self._source
            self._sources[-1]["checksum"] = f"sha256:{digest.hexdigest()}"
            self._documents += not blank
            self._source = None

    def finish(self) -> dict[str, Any]:
        """Complete both files and bring them to the disk, still without their names; returns the manifest."""
        self._finish_source()
        if self._header:
            self._file.write_head(npy_header(self._dtype, self._tokens))
        self._file.sync()
        manifest: dict[str, Any] = {
            "format": "bytekiln-tokens",
            "version": 1,
            "file": file_name(self._path),
            "dtype": self._dtype,
            "tokens": self._tokens,
            "documents": self._documents,
            "text_bytes": self._text_bytes,
            "vocab_size": self._tokenizer.n_vocab,
            "eot_id": None,
            "max_id": self._max_id,
            "tokenizer_hash": self._tokenizer.hash,
            "checksum": _core.payload_checksum(self._file.partial, self._header),
            "sources": self._sources,
            "created_by": f"bytekiln {_core.__version__}",
        }
        self._side.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
        self._side.sync()
        return manifest

    def commit(self) -> None:
        """Give both their names, the manifest first: a token file without one never exists."""
        self._side.commit()
        try:
            self._file.commit()
        except OSError:
            if not self._overwrite:
                self._side.path.unlink(missing_ok=True)  # without the ids it describes nothing
            raise
