"""The tokenizer's commands: `bpe-train`, `bpe-encode`, `bpe-inspect`.

In: command-line arguments. Out: files, a short summary on stdout, an exit status. Called by `cli`, which
turns every error into one line. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bytekiln import _core
from bytekiln.console import Parser, Progress, human_bytes, human_time, notice, table
from bytekiln.errors import FileError, OutputExistsError
from bytekiln.inspection import measure, show_token
from bytekiln.tokenizer import Tokenizer

EOT = "<|endoftext|>"
DATA = Path("data")
VOCAB_SIZES = {"tinystories": 10_000, "owt": 32_000}
"""The vocabularies that `--dataset` trains when `--vocab-size` does not say otherwise."""
SHORT_BYTES = 1_000_000
"""Below this the speed is mostly that of starting up."""


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
        way = f"make it with: bpe-train --dataset {self.name}"
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


PATTERN_HELP = "word pattern of a vocabulary that does not name its own: .tiktoken needs it, vocab.json means gpt2"
STAGES = {"count": "counting words", "merge": "merging pairs", "encode": "encoding"}


class StageProgress:
    """One bar after another for the core's `progress(stage, done, total)` calls."""

    def __init__(self, stack: ExitStack) -> None:
        """Bars end with `stack`."""
        self._stack = stack
        self._stage = ""
        self._bar: Progress | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show `done` of `total` of `stage`."""
        if stage != self._stage or self._bar is None:
            self._stack.close()
            unit = "merges" if stage == "merge" else "bytes"
            self._bar = self._stack.enter_context(Progress(STAGES.get(stage, stage), total or None, unit))
            self._stage = stage
        self._bar.update(done)


def check_output(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
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
        raise OutputExistsError(f"{out}: exists already; pass --overwrite to replace it, or another name with --out")
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


def train(argv: Sequence[str]) -> int:
    """`bpe-train`."""
    parser = Parser(
        "bpe-train",
        usage='bpe-train INPUT… --vocab-size N [--special-token "<|endoftext|>"] --out tokenizer.json [flags]',
        description="Train a byte-level BPE tokenizer on text files and write it as a Hugging Face tokenizer.json.",
        examples=[
            'bpe-train corpus.txt --vocab-size 4096 --special-token "<|endoftext|>" --out tokenizer.json',
            "bpe-train a.txt b.txt --vocab-size 32k --pattern cl100k --out tokenizer.json --overwrite --json",
            "bpe-train --dataset owt        # data/owt_train.txt, 32,000 tokens",
        ],
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help="UTF-8 text files; no word crosses a file's border")
    add("--vocab-size", type=size, metavar="N", help="tokens in all: 256 bytes + merges + special tokens; 32k is fine")
    add(
        "--special-token",
        "--special-tokens",
        action="append",
        type=text,
        default=[],
        metavar="T",
        help="a hard boundary in the text that becomes one token; repeat for several",
    )
    add("--out", "--output-path", type=Path, metavar="F", help="the tokenizer.json to write")
    add(
        "--pattern",
        type=text,
        default="gpt2",
        metavar="P",
        help="gpt2 (default), cl100k, o200k, or a regular expression",
    )
    add(
        "--tie-break",
        choices=("lexicographic", "huggingface"),
        default="lexicographic",
        help="which of equally frequent pairs merges first: the greatest pair of byte strings (default), or as "
        "Hugging Face's trainer does",
    )
    add_text_flags(parser)
    add("--dataset", metavar="X", help="train on data/X_train.txt into data/processed/X_tokenizer.json")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--json", action="store_true", help="print the statistics as one JSON object")
    args = parser.parse_intermixed_args(argv)

    if not argv:
        args.dataset = "tinystories"
        notice("bpe-train: nothing given; same as: bpe-train --dataset tinystories")
    if args.dataset:
        dataset = Dataset(args.dataset)
        args.inputs = args.inputs or [dataset.require(dataset.text("train"))]
        args.vocab_size = args.vocab_size or VOCAB_SIZES.get(dataset.name)
        args.special_token = args.special_token or [EOT]
        args.out = args.out or _in_processed(dataset.tokenizer)
    if not args.inputs:
        parser.error("no input; expected one text file or more, or --dataset X")
    if args.vocab_size is None:
        parser.error("--vocab-size is missing; expected 257 or more, such as --vocab-size 4096")
    if args.out is None:
        parser.error("--out is missing; expected the file to write, such as --out tokenizer.json")
    check_output(args.out, args.inputs, overwrite=args.overwrite)

    start = time.perf_counter()
    with ExitStack() as bars:
        tokenizer, stats = _core.train_bpe(
            args.inputs,
            vocab_size=args.vocab_size,
            special_tokens=args.special_token,
            pattern=args.pattern,
            tie_break=args.tie_break,
            errors=args.errors,
            threads=args.threads,
            progress=StageProgress(bars),
        )
    tokenizer.save(args.out, overwrite=args.overwrite)
    seconds = time.perf_counter() - start
    if stats["merges"] < stats["requested_merges"]:
        notice(
            f"bpe-train: stopped at {tokenizer.n_vocab} tokens: no pair of tokens is left to merge "
            f"({args.vocab_size} were asked for)"
        )
    if args.json:
        print(json.dumps(_training_json(args.out, tokenizer, stats, seconds)))
    else:
        print(_training_summary(args.out, tokenizer, stats, seconds))
    return 0


def _in_processed(path: Path) -> Path:
    """The dataset layout is ours, so its folder is made here; a folder that the user names never is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def peak_memory_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _training_json(out: Path, tokenizer: Tokenizer, stats: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        "tokenizer": str(out),
        "hash": tokenizer.hash,
        "vocab_size": tokenizer.n_vocab,
        "merges": stats["merges"],
        "requested_merges": stats["requested_merges"],
        "bytes": stats["bytes"],
        "pretokens": stats["pretokens"],
        "distinct_pretokens": stats["distinct_pretokens"],
        "longest_token": stats["longest_token"].decode("utf-8", "backslashreplace"),
        "count_s": stats["count_s"],
        "merge_s": stats["merge_s"],
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "threads": stats["threads"],
    }


def _training_summary(out: Path, tokenizer: Tokenizer, stats: dict[str, Any], seconds: float) -> str:
    specials = ", ".join(tokenizer.special_tokens) or "none"
    rows = [
        ("tokens", f"{tokenizer.n_vocab:,} = 256 bytes + {stats['merges']:,} merges + special: {specials}"),
        (
            "text",
            f"{human_bytes(stats['bytes'])}, {stats['pretokens']:,} words, {stats['distinct_pretokens']:,} distinct",
        ),
        ("time", f"{human_time(seconds)} (count {human_time(stats['count_s'])}, merge {human_time(stats['merge_s'])})"),
        ("peak memory", human_bytes(peak_memory_bytes())),
        ("longest token", show_token(stats["longest_token"])),
    ]
    return f"wrote {out}\n{table(rows)}"


def encode(argv: Sequence[str]) -> int:
    """`bpe-encode`."""
    parser = Parser(
        "bpe-encode",
        usage="bpe-encode INPUT… --tokenizer tokenizer.json --out train.npy [flags]",
        description="Encode text files, in their order, into one token file (.npy, or raw .bin) with its manifest.",
        examples=[
            "bpe-encode train.txt --tokenizer tokenizer.json --out train.npy",
            "bpe-encode a.txt b.txt --tokenizer tokenizer.json --out all.bin --dtype uint32 --append-eot",
            "bpe-encode --data_path raw.txt --vocab_path vocab.json --merges_path merges.txt \\",
            "    --output_path train.npy --method streaming",
            "bpe-encode --dataset owt       # data/owt_{train,valid}.txt with the dataset's tokenizer",
        ],
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help="UTF-8 text files")
    add("--data-path", action="append", type=Path, default=[], metavar="F", help="another way to name an input")
    add("--tokenizer", type=Path, metavar="T", help="tokenizer.json, or .tiktoken ranks")
    add("--vocab-path", type=Path, metavar="F", help="vocab.json, instead of --tokenizer, with --merges-path")
    add("--merges-path", type=Path, metavar="F", help="merges.txt")
    add(
        "--special-token",
        "--special-tokens",
        action="append",
        type=text,
        metavar="T",
        help="special tokens of vocabularies that do not name theirs; repeat for several",
    )
    add("--pattern", type=text, metavar="P", help=PATTERN_HELP)
    add("--out", "--output-path", type=Path, metavar="F", help="the token file to write; raw ids if it ends in .bin")
    add("--dtype", choices=("uint16", "uint32"), help="default: uint16 when every id fits")
    add(
        "--append-eot",
        action="store_true",
        default=None,
        help="end each file with the end-of-text token (default: files that contain one)",
    )
    add("--no-append-eot", dest="append_eot", action="store_false", help="add none")
    add("--method", choices=("streaming",), help="accepted; encoding always streams, in bounded memory")
    add_text_flags(parser)
    add("--dataset", metavar="X", help="encode data/X_{train,valid}.txt into data/processed/X_{train,valid}.npy")
    add("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_intermixed_args(argv)

    args.inputs += args.data_path
    jobs = [(args.inputs, args.out)]
    if args.dataset:
        dataset = Dataset(args.dataset)
        if not (args.tokenizer or args.vocab_path):
            args.tokenizer = dataset.require(dataset.tokenizer)
        if not args.inputs and args.out is None:
            jobs = [([dataset.require(dataset.text(s))], _in_processed(dataset.tokens(s))) for s in ("train", "valid")]
    for inputs, out in jobs:
        if not inputs:
            parser.error("no input; expected one text file or more, or --dataset X")
        if out is None:
            parser.error("--out is missing; expected the file to write, such as --out train.npy")
        read = [*inputs, *(p for p in (args.tokenizer, args.vocab_path, args.merges_path) if p)]
        check_output(out, read, overwrite=args.overwrite)
    tokenizer = _tokenizer_of(args, parser)
    for inputs, out in jobs:
        start = time.perf_counter()
        with ExitStack() as bars:
            manifest = _core.encode_files(
                tokenizer,
                inputs,
                out,
                dtype=args.dtype,
                append_eot=args.append_eot,
                errors=args.errors,
                overwrite=args.overwrite,
                threads=args.threads,
                progress=StageProgress(bars),
            )
        print(_encoding_summary(out, manifest, time.perf_counter() - start))
    return 0


def _tokenizer_of(args: Namespace, parser: Parser) -> Tokenizer:
    if args.tokenizer and not (args.vocab_path or args.merges_path):
        return Tokenizer.from_file(args.tokenizer, special_tokens=args.special_token, pattern=args.pattern)
    if args.vocab_path and args.merges_path and not args.tokenizer:
        return Tokenizer.from_vocab_and_merges(
            args.vocab_path, args.merges_path, special_tokens=args.special_token, pattern=args.pattern or "gpt2"
        )
    return parser.error("expected either --tokenizer T, or --vocab-path F together with --merges-path F")


def _encoding_summary(out: Path, manifest: dict[str, Any], seconds: float) -> str:
    tokens, text_bytes = manifest["tokens"], manifest["text_bytes"]
    rows = [
        ("tokens", f"{tokens:,} {manifest['dtype']} in {manifest['documents']:,} documents"),
        ("text", f"{human_bytes(text_bytes)}, {text_bytes / max(tokens, 1):.3f} bytes a token"),
        ("time", f"{human_time(seconds)}, {human_bytes(text_bytes / seconds)}/s"),
    ]
    return f"wrote {out}\n{table(rows)}"


def inspect(argv: Sequence[str]) -> int:
    """`bpe-inspect`."""
    parser = Parser(
        "bpe-inspect",
        usage="bpe-inspect TOKENIZER… --text FILE [flags]",
        description="Measure tokenizers on a text: compression, vocabulary make-up, longest tokens, speed.",
        examples=[
            "bpe-inspect tokenizer.json --text validation.txt",
            "bpe-inspect own.json foreign.json --text validation.txt --json",
            "bpe-inspect --dataset owt      # its tokenizer on data/owt_valid.txt",
        ],
    )
    add = parser.add_argument
    add("tokenizers", nargs="*", type=Path, metavar="TOKENIZER", help="tokenizer.json; several are compared")
    add("--pattern", type=text, metavar="P", help=PATTERN_HELP)
    add("--text", action="append", type=Path, default=[], metavar="FILE", help="UTF-8 text; repeat for several")
    add("--longest", type=size, default=10, metavar="N", help="how many of the longest tokens to show (default: 10)")
    add_text_flags(parser)
    add("--dataset", metavar="X", help="the tokenizer and validation text of a dataset")
    add("--json", action="store_true", help="print one JSON object (a list of them for several tokenizers)")
    args = parser.parse_intermixed_args(argv)
    if args.dataset:
        dataset = Dataset(args.dataset)
        args.tokenizers = args.tokenizers or [dataset.require(dataset.tokenizer)]
        args.text = args.text or [dataset.require(dataset.text("valid"))]
    if not args.tokenizers:
        parser.error("no tokenizer; expected a tokenizer.json, or --dataset X")
    if not args.text:
        parser.error("--text is missing; expected a text file to measure on")

    found = []
    for path in args.tokenizers:
        with ExitStack() as bars:
            found.append(
                measure(
                    path,
                    args.text,
                    longest=args.longest,
                    errors=args.errors,
                    threads=args.threads,
                    pattern=args.pattern,
                    progress=StageProgress(bars),
                )
            )
    if args.json:
        print(json.dumps(found if len(found) > 1 else found[0]))
    else:
        print("\n\n".join(_inspection_summary(f) for f in found))
    return 0


def _inspection_summary(f: dict[str, Any]) -> str:
    kinds = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in f["vocabulary"].items() if n)
    caution = f" (a short text: start-up counts; measure on {human_bytes(SHORT_BYTES)} or more)"
    rows = [
        ("compression", f"{f['bytes_per_token']:.3f} bytes a token ({f['bytes']:,} bytes, {f['tokens']:,} tokens)"),
        ("vocabulary", f"{f['vocab_size']:,} tokens: {kinds}"),
        ("used here", f"{f['tokens_used']:,} different tokens"),
        ("pattern", f["pattern"]),
        ("longest tokens", "  ".join(f"'{t}'" for t in f["longest_tokens"])),
        ("speed", f"{human_bytes(f['bytes_per_second'])}/s, file to token file" + caution * (f["bytes"] < SHORT_BYTES)),
        ("the Pile (825 GB)", f"{f['pile_hours']:.1f} h at this speed"),
    ]
    return f"{f['tokenizer']} on {', '.join(f['text'])}\n{table(rows)}"
