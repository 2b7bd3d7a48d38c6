"""The tokenizer's public door: train one, and turn files into token files.

In: paths or texts. Out: a `Tokenizer` (the Rust class itself, so that a call on a short string
costs no Python frame) and `TokenFile`s. Called by users and by the `bpe-*` commands.
"""

from __future__ import annotations

# ruff: noqa: F811 - the overloads are told by a stand-in for typing's
from os import PathLike

from bytekiln import _core
from bytekiln._core import Counts, Tokenizer
from bytekiln.errors import ConfigError

TYPE_CHECKING = False  # typing's own is true for checkers too, but loading `typing` takes a fifth of the import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Literal, overload

    from bytekiln.inputs import Inputs
    from bytekiln.tokenfile import TokenFile

    Progress = Callable[[str, int, int], object]
    """Called with the stage, the units done and the units in all."""
    TieBreak = Literal["lexicographic", "huggingface", "raw-bytes"]
    TextPolicy = Literal["error", "replace", "bytes"]

else:

    def overload(function: object) -> object:
        """What `typing.overload` is to checkers."""
        return function


__all__ = ["Counts", "Tokenizer", "encode_files", "train_bpe", "train_bpe_from_iterator"]


@overload
def train_bpe(
    files: str | PathLike[str] | Sequence[str | PathLike[str]] | Inputs,
    *,
    vocab_size: int,
    special_tokens: Sequence[str] | None = None,
    pattern: str | None = None,
    tie_break: TieBreak = "lexicographic",
    errors: TextPolicy = "error",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    extend: Tokenizer | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Tokenizer: ...
@overload
def train_bpe(
    files: str | PathLike[str] | Sequence[str | PathLike[str]] | Inputs,
    *,
    vocab_size: Sequence[int],
    special_tokens: Sequence[str] | None = None,
    pattern: str | None = None,
    tie_break: TieBreak = "lexicographic",
    errors: TextPolicy = "error",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    extend: Tokenizer | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> list[Tokenizer]: ...
def train_bpe(
    files: str | PathLike[str] | Sequence[str | PathLike[str]] | Inputs,
    *,
    vocab_size: int | Sequence[int],
    special_tokens: Sequence[str] | None = None,
    pattern: str | None = None,
    tie_break: TieBreak = "lexicographic",
    errors: TextPolicy = "error",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    extend: Tokenizer | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Tokenizer | list[Tokenizer]:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016) on text files.

    Args:
        files: one path or several, or `Inputs`; no pre-token crosses the border of a file or a record.
        vocab_size: tokens in all: 256 bytes + merges + special tokens. Fewer come out where no pair is left. Several
            sizes give a list of tokenizers for the work of the largest: their merges are beginnings of the same list.
        special_tokens: hard boundaries in the text, never part of a merge; they get the highest ids. Default: none,
            or those of `extend`.
        pattern: `gpt2` (default), `cl100k`, `o200k`, or a regular expression of the fancy-regex dialect; text that it
            does not match becomes pre-tokens of its own, so that nothing is lost.
        tie_break: which of the equally frequent pairs merges first: `lexicographic` takes the greatest pair of
            byte strings, `huggingface` the smallest pair of ids as Hugging Face's trainer numbers them, `raw-bytes`
            the smallest pair of ids, bytes by value and then tokens in the order they were made (rustbpe, bpeasy).
        errors: what to do with invalid UTF-8: `error` (names file and byte offset), `replace` (U+FFFD),
            `bytes` (keep the bytes; pre-token borders fall as if each were U+FFFD).
        min_frequency: pre-tokens that occur less often are left out, and of the rest no pair is merged that occurs
            less often.
        max_token_length: in bytes; a pair whose token would be longer is never merged.
        extend: a tokenizer to go on from: its merges are done first and its tokens keep their ids, special ones too;
            new tokens follow. Special tokens and pattern are its own, others are refused. On the text that it was
            trained on, the merges are those of training at once.
        threads: default: one a core. The result never depends on it.
        max_memory: bytes that counting and merging may take, 16 MiB or more; default: half of the machine's. Counts
            that exceed it go to disk; merging that needs more is refused. The result never depends on it.
        progress: called as `progress(stage, done, total)` up to fifty times a second.

    Raises:
        FileError: a file is missing, unreadable, empty or a directory.
        TextError: invalid UTF-8 under `errors="error"`.
        FormatError: a packed file that is corrupt or truncated, a line that is no record.
        ConfigError: vocabulary too small, empty or duplicate special token, unknown pattern; `extend` with merges that
            training could not have found (one that makes a token again, or a token that is never reached).
    """
    tokenizers, _ = _core.train_bpe(
        files,
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        pattern=pattern,
        tie_break=tie_break,
        errors=errors,
        min_frequency=min_frequency,
        max_token_length=max_token_length,
        extend=extend,
        threads=threads,
        max_memory=max_memory,
        progress=progress,
    )
    return tokenizers[0] if isinstance(vocab_size, int) else tokenizers


@overload
def train_bpe_from_iterator(
    texts: Iterable[str | bytes],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] | None = None,
    pattern: str | None = None,
    tie_break: TieBreak = "lexicographic",
    errors: TextPolicy = "error",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    extend: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Tokenizer: ...
@overload
def train_bpe_from_iterator(
    texts: Iterable[str | bytes],
    *,
    vocab_size: Sequence[int],
    special_tokens: Sequence[str] | None = None,
    pattern: str | None = None,
    tie_break: TieBreak = "lexicographic",
    errors: TextPolicy = "error",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    extend: Tokenizer | None = None,
    progress: Progress | None = None,
) -> list[Tokenizer]: ...
def train_bpe_from_iterator(
    texts: Iterable[str | bytes],
    *,
    vocab_size: int | Sequence[int],
    special_tokens: Sequence[str] | None = None,
    pattern: str | None = None,
    tie_break: TieBreak = "lexicographic",
    errors: TextPolicy = "error",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    extend: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Tokenizer | list[Tokenizer]:
    """Train on documents from an iterator; arguments and errors as in `train_bpe`.

    Each item is one document: no pre-token crosses from one to the next. Documents are counted as they come, in
    constant memory, with the GIL released. Without any text the tokenizer has the bytes and the special tokens only.

    >>> train_bpe_from_iterator(["aaab", "aab"], vocab_size=257).merges
    [(b'a', b'a')]
    """
    if isinstance(texts, str | bytes):
        raise ConfigError("texts: found one text; expected an iterable of texts, such as [text]")
    tokenizers, _ = _core.train_bpe_from_iterator(
        texts,
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        pattern=pattern,
        tie_break=tie_break,
        errors=errors,
        min_frequency=min_frequency,
        max_token_length=max_token_length,
        extend=extend,
        progress=progress,
    )
    return tokenizers[0] if isinstance(vocab_size, int) else tokenizers


@overload
def encode_files(
    tokenizer: Tokenizer,
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]] | Inputs,
    out: str | PathLike[str],
    *,
    dtype: Literal["uint16", "uint32"] | None = None,
    append_eot: bool | None = None,
    errors: TextPolicy = "error",
    overwrite: bool = False,
    shard_tokens: None = None,
    split: None = None,
    seed: int = 0,
    index: bool = False,
    max_tokens: int | None = None,
    part: tuple[int, int] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> TokenFile: ...
@overload
def encode_files(
    tokenizer: Tokenizer,
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]] | Inputs,
    out: str | PathLike[str],
    *,
    dtype: Literal["uint16", "uint32"] | None = None,
    append_eot: bool | None = None,
    errors: TextPolicy = "error",
    overwrite: bool = False,
    shard_tokens: int | None = None,
    split: dict[str, float] | None = None,
    seed: int = 0,
    index: bool = False,
    max_tokens: int | None = None,
    part: tuple[int, int] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> TokenFile | list[TokenFile]: ...
def encode_files(
    tokenizer: Tokenizer,
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]] | Inputs,
    out: str | PathLike[str],
    *,
    dtype: Literal["uint16", "uint32"] | None = None,
    append_eot: bool | None = None,
    errors: TextPolicy = "error",
    overwrite: bool = False,
    shard_tokens: int | None = None,
    split: dict[str, float] | None = None,
    seed: int = 0,
    index: bool = False,
    max_tokens: int | None = None,
    part: tuple[int, int] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> TokenFile | list[TokenFile]:
    """Encode text files, in their order, into token files with manifests (docs/bpe-encode.md, docs/formats.md).

    Special tokens that stand in text files are recognised; each occurrence is one id. Inside records (jsonl,
    parquet) they are text, and each record is ended with the end-of-text token. A run that was stopped, by `kill -9`
    even, is gone on with by the next call with the same arguments; the files are those of an undisturbed run.

    Args:
        tokenizer: the tokenizer; its hash goes into the manifest.
        inputs: one path or several, or `Inputs`.
        out: `.bin` for raw little-endian ids, any other name for `.npy`. Written atomically.
        dtype: default: uint16 when every id fits, else uint32. uint16 for a larger vocabulary is refused.
        append_eot: end the text after a file's last end-of-text token with one more; None: only in files that
            contain one. Records are ended unless it is False.
        errors: invalid UTF-8, as in `train_bpe`.
        overwrite: replace an existing output, or one that is unfinished and of another run; refused otherwise.
        shard_tokens: write files of so many ids, the last one of what is left: `out` with `_00000` … behind its stem.
        split: parts by name and share of all documents, such as `{"val": 0.01}`, each written to `out` with its name
            behind the stem. Every document is in one part, or in `out`.
        seed: which documents those are.
        index: write where documents end, for `TokenFile.document_ends`.
        max_tokens: stop after so many ids, in all files together.
        part: encode part i of n only, i from 1: those of all parts, in order, are what one call gives.
        threads: default: one a core. The bytes written never depend on it.
        progress: called as `progress("encode", bytes_done, bytes_total)`.

    Returns:
        The token file. With `shard_tokens` or `split` a list: the shards of `out`, or `out`; then those of each part,
        in the order of their names.

    Raises:
        OutputExistsError, FileError, TextError, ConfigError.
        FormatError: an input that changed while it was read; an unfinished output that was changed.
    """
    from bytekiln.tokenfile import TokenFile

    made, _ = _core.encode_files(
        tokenizer,
        inputs,
        out,
        dtype=dtype,
        append_eot=append_eot,
        errors=errors,
        overwrite=overwrite,
        shard_tokens=shard_tokens,
        split=split,
        seed=seed,
        index=index,
        max_tokens=max_tokens,
        part=part,
        threads=threads,
        progress=progress,
    )
    files = [TokenFile.later(path) for path, manifest in made if "shards" not in manifest]
    return files if shard_tokens or split else files[0]
