"""Well-known tokenizers from files that are at hand. Nothing is ever downloaded.

In: a name, and a path where the caller has one. Out: a `Tokenizer` with tiktoken's ids of that name. Called by users,
as `bytekiln.known_tokenizer`, and by the commands, which take such a name where no file has it.
"""

from __future__ import annotations

import os
from pathlib import Path

from bytekiln._core import Tokenizer
from bytekiln.errors import ConfigError, FileError, MismatchError

TYPE_CHECKING = False  # checkers take it for typing's own
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_EOT = "<|endoftext|>"
_FOLDER = "https://openaipublic.blob.core.windows.net"
_R50K = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


class _Known:
    """A published tokenizer: what its file of ranks does not say."""

    def __init__(self, file: str, sha256: str, pattern: str, special_tokens: dict[str, int]) -> None:
        self.file, self.sha256, self.pattern, self.special_tokens = f"{file}.tiktoken", sha256, pattern, special_tokens

    @property
    def names(self) -> set[str]:
        """Names under which the file lies about: its own, a shorter one, the one in tiktoken's cache."""
        import hashlib

        address = f"{_FOLDER}/encodings/{self.file}"
        names = {self.file, self.file.replace("_base", ""), hashlib.sha1(address.encode()).hexdigest()}
        return names | {"gpt2.tiktoken"} if self.file == "r50k_base.tiktoken" else names


# The digests, patterns and special tokens are those that tiktoken publishes (`tiktoken_ext/openai_public.py`).
KNOWN = {
    "gpt2": _Known("r50k_base", _R50K, "gpt2", {_EOT: 50256}),
    "r50k_base": _Known("r50k_base", _R50K, "gpt2", {_EOT: 50256}),
    "p50k_base": _Known(
        "p50k_base", "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", "gpt2", {_EOT: 50256}
    ),
    "cl100k_base": _Known(
        "cl100k_base",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        "cl100k",
        {
            _EOT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": _Known(
        "o200k_base",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        "o200k",
        {_EOT: 199999, "<|endofprompt|>": 200018},
    ),
}
"""By tiktoken's names."""

# GPT-2 was first published as a pair of files, which tiktoken still takes: digests of vocabulary and merges.
_GPT2_VOCAB = ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
_GPT2_MERGES = ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")


def known_tokenizer(name: str, path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """A well-known tokenizer by name, from a file that is at hand; it encodes as tiktoken's encoding of that name.

    Without a path the file is looked for where tiktoken keeps those that it has downloaded (`TIKTOKEN_CACHE_DIR`,
    `DATA_GYM_CACHE_DIR`, `data-gym-cache` in the folder for temporary files) and among the files of installed packages
    (`mbpe` has gpt2's, cl100k's and o200k's). Only a file with the published SHA-256 is taken.

    Args:
        name: `gpt2`, `r50k_base`, `p50k_base`, `cl100k_base` or `o200k_base`.
        path: the `.tiktoken` file, or a folder that has it; for `gpt2` also one with GPT-2's first two files.

    Raises:
        ConfigError: another name.
        FileError: no file is at hand.
        MismatchError: the file at `path` is not the published one.
    """
    known = KNOWN.get(name)
    if known is None:
        raise ConfigError(f"tokenizer {name!r}: found no such name; expected one of {', '.join(KNOWN)}")
    if path is not None and not Path(path).is_dir():
        found = _digest(Path(path))
        if found != known.sha256:
            raise MismatchError(f"{path}: SHA-256 {found}; expected {known.sha256}, {known.file} as it was published")
        return _of_ranks(Path(path), known)
    folders = _caches() if path is None else [Path(path)]
    for file in _candidates(folders, known.names, everywhere=path is None):
        if _digest(file) == known.sha256:
            return _of_ranks(file, known)
    if name in ("gpt2", "r50k_base") and (pair := _pair(folders)):
        # As ranks, so that the tokenizer and its hash are the same from whichever files it comes.
        both = Tokenizer.from_vocab_and_merges(*pair)
        ranks = {token: id for id, token in both.vocab.items() if id not in known.special_tokens.values()}
        return Tokenizer.from_ranks(ranks, pattern=known.pattern, special_tokens=known.special_tokens)
    if path is not None:
        raise FileError(f"{path}: no file of {name} in this folder; expected {known.file} as it was published")
    raise FileError(
        f"{name}: no file of it at hand, in tiktoken's cache or in an installed package; expected the path of "
        f"{known.file}, or TIKTOKEN_CACHE_DIR with it, as nothing is downloaded"
    )


def open_tokenizer(
    path: str | os.PathLike[str], *, special_tokens: Sequence[str] | None = None, pattern: str | None = None
) -> Tokenizer:
    """What a command's TOKENIZER means: a path, or where none is there, one of the well-known names.

    Raises:
        ConfigError: special tokens or a pattern for a well-known one, which has its own.
        FileError, FormatError, ConfigError: as `Tokenizer.from_file` and `known_tokenizer`.
    """
    name = os.fspath(path)
    if name not in KNOWN or Path(path).exists():
        if not Path(path).suffix and os.sep not in name and not Path(path).exists():
            raise FileError(
                f"{name}: no such file; expected a tokenizer.json, .tiktoken ranks, a folder, or a well-known name: "
                f"{', '.join(KNOWN)}"
            )
        return Tokenizer.from_file(path, special_tokens=special_tokens, pattern=pattern)
    for setting, given in (("special_tokens", special_tokens), ("pattern", pattern)):
        if given:
            raise ConfigError(f"{setting}: found {given!r} for {name}, which has its own; expected none")
    return known_tokenizer(name)


def _of_ranks(file: Path, known: _Known) -> Tokenizer:
    return Tokenizer.from_file(file, pattern=known.pattern, special_tokens=known.special_tokens)


def _digest(file: Path) -> str:
    import hashlib

    try:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{file}: {(error.strerror or str(error)).lower()}; expected a readable file") from None


def _caches() -> list[Path]:
    """Where tiktoken keeps its files; it takes the first of these that is set."""
    import tempfile

    places = [os.environ.get("TIKTOKEN_CACHE_DIR"), os.environ.get("DATA_GYM_CACHE_DIR")]
    return [*(Path(place) for place in places if place), Path(tempfile.gettempdir()) / "data-gym-cache"]


def _candidates(folders: list[Path], names: set[str], *, everywhere: bool) -> Iterator[Path]:
    """Files of these names in the folders and, `everywhere`, in installed packages."""
    for folder in folders:
        yield from (file for name in sorted(names) if (file := folder / name).is_file())
    if everywhere:
        from importlib.metadata import distributions

        for package in distributions():
            # As text: to parse every record of a large environment takes seconds.
            for line in (package.read_text("RECORD") or "").splitlines():
                place = line.split(",", 1)[0]
                if place.rsplit("/", 1)[-1] in names and (file := Path(str(package.locate_file(place)))).is_file():
                    yield file


def _pair(folders: list[Path]) -> tuple[Path, Path] | None:
    """GPT-2's first two files."""
    import hashlib

    found = []
    for name, sha256 in (_GPT2_VOCAB, _GPT2_MERGES):
        address = f"{_FOLDER}/gpt-2/encodings/main/{name}"
        names = {name, hashlib.sha1(address.encode()).hexdigest()}
        files = _candidates(folders, names, everywhere=False)
        found.append(next((file for file in files if _digest(file) == sha256), None))
    vocab, merges = found
    return (vocab, merges) if vocab and merges else None
