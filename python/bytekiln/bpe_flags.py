"""What the tokenizer's commands share: kinds of arguments, where a dataset's files lie, outputs that are free.

In: command-line arguments. Out: checked values, or an error that says what to do. Called by `cli_bpe`, `cli_count`,
`cli_inspect` and `cli_train`.
"""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bytekiln import _core
from bytekiln.console import Parser, Progress
from bytekiln.errors import ConfigError, FileError, OutputExistsError
from bytekiln.inputs import Inputs

if TYPE_CHECKING:
    from fractions import Fraction  # loads decimal

DATA = Path("data")


class Dataset(NamedTuple):
    """Where the files of `--dataset NAME` lie, below the current folder."""

    name: str

    def text(self, split: str) -> Path:
        """The raw text of a split."""
        return DATA / f"{self.name}_{split}.txt"

    def tokens(self, split: str) -> Path:
        """The token file of a split."""
        return DATA / "processed" / f"{self.name}_{split}.npy"

    @property
    def tokenizer(self) -> Path:
        """The dataset's own tokenizer."""
        return DATA / "processed" / f"{self.name}_tokenizer.json"

    def require(self, path: Path) -> Path:
        """`path` if it exists; otherwise an error that says how to make it."""
        if path.exists():
            return path
        way = f"make it with: bpe-train --dataset {self.name}, or bpe-encode TEXT --characters --dataset {self.name}"
        if path.suffix == ".txt":
            way = "put the dataset's text there (README.md says where TinyStories and OpenWebText come from)"
        raise FileError(f"{path}: no such file; {way}")


def size(text: str) -> int:
    """A count such as 4096, 32k, 32_000 or 1M.

    >>> size("32k"), size("4_096"), size("1.5M")
    (32000, 4096, 1500000)
    """
    number, factor = text.replace("_", "").replace(",", ""), 1
    if number[-1:] in "kKmM" and number:
        factor = 1000 if number[-1] in "kK" else 1_000_000
        number = number[:-1]
    value = float(number) * factor
    if not value.is_integer() or not 0 <= value < 2**32:
        raise ArgumentTypeError(f"found {text}; expected a whole number below 2^32, such as 4096 or 32k")
    return int(value)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def byte_size(text: str) -> int:
    """A number of bytes such as 500MB, 2G or 1.5GiB; 1 or more.

    >>> byte_size("500MB"), byte_size("2k"), byte_size("1.5GiB"), byte_size("10_000")
    (500000000, 2000, 1610612736, 10000)
    """
    from fractions import Fraction

    found = re.fullmatch(
        r"(\d{1,3}(?:,\d{3})+|\d[\d_]{0,30}|)(\.\d{0,30})?(e\d{1,2})? *([kmgt]i?|)b?", text.strip().lower(), re.ASCII
    )
    value = Fraction(0)
    if found and any(c.isdigit() for c in found.group(1) + (found.group(2) or "")):
        whole, part, power, unit = found.groups()
        value = Fraction((re.sub("[_,]", "", whole) or "0") + (part or "").rstrip(".") + (power or "")) * _UNITS[unit]
    if not 1 <= value < 2**63:
        raise ArgumentTypeError(f"found {text}; expected a number of bytes, such as 500MB, 2G or 1.5GiB")
    return int(value)


def sample_share(text: str) -> float:
    """A share of documents such as 0.1: above 0, at most 1.

    >>> sample_share("0.1")
    0.1
    """
    value = float(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"found {text}; expected a share above 0 and at most 1, such as 0.1")
    return value


def seed(text: str) -> int:
    """A whole number from 0, below 2^64."""
    value = int(text)
    if not 0 <= value < 2**64:
        raise ArgumentTypeError(f"found {text}; expected a whole number from 0, below 2^64")
    return value


def text(argument: str) -> str:
    """Text from the command line, where bytes that are not UTF-8 arrive as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"found {argument!a}; expected UTF-8") from None
    return argument


def threads(text: str) -> int:
    """A number of threads: 1 or more."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"found {value}; expected 1 or more")
    return value


def memory(text: str) -> int:
    """An amount of memory in bytes, as `byte_size` reads it; 16 MiB or more.

    >>> memory("512MB")
    512000000
    """
    value = byte_size(text)
    if value < LEAST_MEMORY:
        raise ArgumentTypeError(f"found {text}; expected 16MiB or more")
    return value


LEAST_MEMORY = 16 << 20
"""Below, buffers would be most of it."""


def add_memory_flag(parser: Parser) -> None:
    """The cap on memory that counting has in every command."""
    parser.add_argument(
        "--max-memory",
        type=memory,
        metavar="SIZE",
        help="cap on memory, such as 4GB; counts beyond it go to disk (default: half of the machine's)",
    )


def refuse_settings_of_counts(args: Namespace, parser: Parser) -> None:
    """With `--counts`: how words are cut was settled when they were counted."""
    given = {"--pattern": args.pattern, "--special-token": args.special_token, "--errors": args.errors}
    given |= {f"--{name.replace('_', '-')}": getattr(args, name) for name in ("field", "limit_bytes", "sample", "seed")}
    for flag, value in given.items():
        if value is not None:
            parser.error(f"{flag} with --counts; expected it without: the counts files say how they were counted")


def share(text: str) -> Fraction:
    """A share such as 0.1, exact, so that no rounding moves a border; at least 0, below 1.

    >>> share("0.1")
    Fraction(1, 10)
    """
    from fractions import Fraction

    value = float(text)
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"found {text}; expected at least 0 and below 1, such as 0.1")
    return Fraction(repr(value))


PATTERN_HELP = "word pattern of a vocabulary that does not name its own: .tiktoken needs it, vocab.json means gpt2"
STAGES = {
    "count": "counting words",
    "layout": "laying out words",
    "merge": "merging pairs",
    "characters": "collecting characters",
    "encode": "encoding",
    "documents": "reading documents",
    "compress": "measuring compression",
    "save": "adding up counts",
}


class StageProgress:
    """One bar after another for the core's `progress(stage, done, total)` calls."""

    def __init__(self, stack: ExitStack) -> None:
        """Bars end with `stack`."""
        self._stack = stack
        self._stage = ""
        self._bar: Progress | None = None
        self._pretokens = 0
        self._merge = ""

    def detail(self, pretokens: int, merge: tuple[bytes, bytes, int] | None) -> None:
        """What training tells besides: words counted so far, and a late merge."""
        self._pretokens = pretokens
        if merge:
            left, right, count = merge
            self._merge = f"{_shown(left)} + {_shown(right)} × {count:,}"

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show `done` of `total` of `stage`."""
        if stage != self._stage or self._bar is None:
            self._stack.close()
            unit = {"merge": "merges", "save": "words"}.get(stage, "bytes")
            self._bar = self._stack.enter_context(Progress(STAGES.get(stage, stage), total or None, unit))
            self._stage = stage
        more: dict[str, str] = {}
        if stage == "count" and self._pretokens:
            more = {"words": f"{self._pretokens:,}"}
        elif stage == "merge" and self._merge:
            more = {"merging": self._merge}
        self._bar.update(done, **more)


def _shown(token: bytes) -> str:
    """The beginning of a token as it can stand in a line."""
    text = token.decode("utf-8", "backslashreplace")
    return "'" + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:16]) + "'"


def output(text: str) -> Path:
    """The name of a file to write.

    >>> output("a/b.json") == Path("a/b.json")
    True
    """
    if text.replace(os.sep, "/").rpartition("/")[2] in ("", ".", ".."):
        raise ArgumentTypeError(f"found {text}, a folder's name; expected the name of a file to write")
    return Path(text)


def check_output(out: Path, inputs: Sequence[Path], *, overwrite: bool, flag: str = "--out") -> None:
    """Refuse an output that cannot or must not be written, before hours of work go into it.

    Neither the output nor the manifest that may come beside it is one of the files read.
    """
    parent = out.parent
    for written in (out, out.with_name(out.name + ".json")):
        if written.exists() and any(p.exists() and written.samefile(p) for p in inputs):
            raise FileError(f"{written}: is one of the inputs; expected another output")
    if not parent.is_dir():
        raise FileError(f"{out}: its folder {parent} does not exist; create it first: mkdir -p {parent}")
    if out.is_dir():
        raise FileError(f"{out}: is a directory; expected the name of a file to write")
    if out.exists() and not out.is_file():
        raise FileError(f"{out}: is a pipe or a device; expected the name of a file to write")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise OutputExistsError(f"{out}: exists already; pass --overwrite to replace it, or another name with {flag}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FileError(f"{out}: the folder {parent} cannot be written to")


def add_text_flags(parser: Parser) -> None:
    """The flags that reading text has in every command."""
    parser.add_argument(
        "--errors",
        choices=("error", "replace", "bytes"),
        default="error",
        help="invalid UTF-8: stop and name the byte (default), put U+FFFD in its place, or keep the bytes",
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="default: one a core; results never depend on it")


def add_word_flags(parser: Parser) -> None:
    """The flags that say how text is cut into words, before anything is learnt of it."""
    parser.add_argument(
        "--special-token",
        "--special-tokens",
        action="append",
        type=text,
        metavar="T",
        help="a hard boundary in the text that becomes one token; repeat for several",
    )
    parser.add_argument(
        "--pattern", type=text, metavar="P", help="gpt2 (default), cl100k, o200k, or a regular expression"
    )


INPUT_HELP = "text, .jsonl or .parquet, also .gz .zst .xz .bz2; folders; globs; - for standard input (docs/inputs.md)"


def add_input_flags(parser: Parser, *, seed_help: str = "which documents --sample takes (default: 0)") -> None:
    """The flags that say which part of the inputs is read; `inputs_of` takes them up."""
    add = parser.add_argument
    add("--field", type=text, metavar="NAME", help="field of jsonl, column of parquet (default: text)")
    add(
        "--limit-bytes",
        type=byte_size,
        metavar="SIZE",
        help="stop after so much text, such as 500MB, between two words",
    )
    add("--sample", type=sample_share, metavar="SHARE", help="read only this share of the documents, such as 0.1")
    add("--seed", type=seed, metavar="N", help=seed_help)


def inputs_of(args: Namespace, paths: Sequence[str | os.PathLike[str]], *, seed_for: str = "--sample") -> Inputs:
    """What the core reads: some paths, and the part of them that the flags name.

    Args:
        args: what `add_input_flags` has read.
        paths: what to read.
        seed_for: the flags that a seed is for, of which one is expected beside it.

    Raises:
        ConfigError: a seed without a sample.
    """
    if args.seed is not None and args.sample is None and not getattr(args, "split", None):
        raise ConfigError(f"--seed without {seed_for}; expected both, or neither")
    return Inputs(list(paths), args.field, args.limit_bytes, args.sample, args.seed or 0)


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files of folders, globs and files, in the order of their text; `-` stays."""
    return _core.find_inputs(list(paths)) if paths else []


def plain_files(args: Namespace, paths: Sequence[Path], why: str) -> list[Path]:
    """The files of some paths, for what reads plain text files only.

    Raises:
        ConfigError: packed files, records, standard input, or flags that choose a part.
    """
    for flag in ("field", "limit_bytes", "sample", "seed"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} with {why}; expected it without")
    found = files_of(paths)
    for path in found:
        if str(path) == "-" or path.suffix.lower() in (".gz", ".zst", ".xz", ".bz2", ".jsonl", ".ndjson", ".parquet"):
            raise ConfigError(f"{path} with {why}; expected plain text files")
    return found


def in_processed(path: Path) -> Path:
    """The dataset layout is ours, so its folder is made here; a folder that the user names never is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
