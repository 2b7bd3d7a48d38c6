"""`bpe-train`: text files in, tokenizers and the statistics of the run out.

In: command-line arguments. Out: a tokenizer.json for each size, a short summary on stdout, an exit status. Called by
`cli`, which turns every error into one line. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bytekiln import _core, atomic
from bytekiln.bpe_flags import (
    INPUT_HELP,
    Dataset,
    StageProgress,
    add_input_flags,
    add_memory_flag,
    add_text_flags,
    add_word_flags,
    check_output,
    files_of,
    in_processed,
    inputs_of,
    output,
    refuse_settings_of_counts,
    size,
)
from bytekiln.console import Parser, human_bytes, human_time, notice, table
from bytekiln.errors import ConfigError
from bytekiln.inspection import show_token
from bytekiln.known import open_tokenizer
from bytekiln.tokenizer import Tokenizer

EOT = "<|endoftext|>"
VOCAB_SIZES = {"tinystories": 10_000, "owt": 32_000}
"""The vocabularies that `--dataset` trains when `--vocab-size` does not say otherwise."""
SHOWN_TOKEN = 1000
"""Bytes of the longest token that the statistics hold; its length is there whole."""


class Size(NamedTuple):
    """A vocabulary size and how it was written, which names its file."""

    spelt: str
    tokens: int


def sizes(text: str) -> list[Size]:
    """One vocabulary size or several, between commas.

    >>> sizes("8k,16k")
    [Size(spelt='8k', tokens=8000), Size(spelt='16k', tokens=16000)]
    >>> sizes("10,000")
    [Size(spelt='10000', tokens=10000)]
    """
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        whole = text.replace(",", "")
        if not any(group.startswith("0") for group in text.split(",")[1:]):
            raise ArgumentTypeError(
                f"found {text}, one size or several; expected it without commas ({whole}), or 8k,16k"
            )
        text = whole
    found = [Size(part, size(part)) for part in map(str.strip, text.split(","))]
    tokens = [s.tokens for s in found]
    if len(set(tokens)) < len(tokens):
        raise ArgumentTypeError(f"found {text}, the same size twice; expected different ones")
    return found


def length(text: str) -> int:
    """A whole number from 1 on."""
    value = size(text)
    if value < 1:
        raise ArgumentTypeError(f"found {text}; expected 1 or more")
    return value


def seconds(text: str) -> float:
    """A time of 0 s or more."""
    value = float(text)
    if not 0 <= value < 1e9:
        raise ArgumentTypeError(f"found {text}; expected seconds, 0 or more")
    return value


def kept_in(checkpoint: Path | None) -> list[Path]:
    """The files of a checkpoint."""
    return [checkpoint, checkpoint.with_name(checkpoint.name + ".merges")] if checkpoint else []


def outputs(out: Path, sizes: Sequence[Size]) -> list[Path]:
    """The file of each size: `{size}` in the name becomes the size as it was written, else it comes behind the stem.

    >>> [str(p) for p in outputs(Path("t.json"), sizes("8k,16k"))], str(outputs(Path("t.json"), sizes("8k"))[0])
    (['t-8k.json', 't-16k.json'], 't.json')
    """
    if "{size}" in out.name:
        return [out.with_name(out.name.replace("{size}", s.spelt)) for s in sizes]
    if len(sizes) == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{s.spelt}{out.suffix}") for s in sizes]


def make_parser() -> Parser:
    """The flags."""
    parser = Parser(
        "bpe-train",
        usage='bpe-train INPUT… --vocab-size N [--special-token "<|endoftext|>"] --out tokenizer.json [flags]',
        description="Train a byte-level BPE tokenizer on text files and write it as a Hugging Face tokenizer.json.",
        examples=[
            'bpe-train corpus.txt --vocab-size 4096 --special-token "<|endoftext|>" --out tokenizer.json',
            "bpe-train a.txt b.txt --vocab-size 8k,16k,32k --pattern cl100k --out 'tokenizer-{size}.json' --json",
            "bpe-train --counts a.counts b.counts --vocab-size 32k --out tokenizer.json   # of bpe-count",
            "bpe-train code.txt --extend tokenizer.json --vocab-size 50k --out larger.json",
            "bpe-train big.txt --vocab-size 32k --out tokenizer.json --checkpoint run.ck   # twice: it goes on",
            "bpe-train --dataset owt        # data/owt_train.txt, 32,000 tokens",
        ],
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help=INPUT_HELP)
    add("--counts", nargs="+", type=Path, default=[], metavar="F", help="counts files of bpe-count instead of text")
    add(
        "--vocab-size",
        type=sizes,
        metavar="N",
        help="tokens in all: 256 bytes + merges + special tokens; 32k is fine, 8k,16k,32k writes a file for each",
    )
    add_word_flags(parser)
    add(
        "--out",
        "--output-path",
        type=output,
        metavar="F",
        help="the tokenizer.json to write; of several sizes tokenizer-8k.json, or where {size} stands in it",
    )
    add(
        "--tie-break",
        choices=("lexicographic", "huggingface", "raw-bytes"),
        default="lexicographic",
        help="which of equally frequent pairs merges first: the greatest pair of byte strings (default), as "
        "Hugging Face's trainer does, or the smallest pair of ids, as rustbpe and bpeasy do",
    )
    add("--min-frequency", type=length, default=1, metavar="N", help="leave out words, and merge no pair, rarer than N")
    add("--max-token-length", type=length, metavar="N", help="most bytes of a token (default: any number)")
    add(
        "--extend", type=Path, metavar="F", help="go on from this tokenizer: its tokens keep their ids, new ones follow"
    )
    add_input_flags(parser)
    add_text_flags(parser)
    parser.set_defaults(errors=None)
    add_memory_flag(parser)
    add(
        "--checkpoint",
        type=output,
        metavar="F",
        help="keep the run in F and F.merges, and go on from there after Ctrl-C or a crash; deleted at the end",
    )
    add(
        "--checkpoint-every",
        type=seconds,
        metavar="S",
        help="seconds between two of them (default: 20 times what one takes, at least 1 and at most 60)",
    )
    add("--dataset", metavar="X", help="train on data/X_train.txt into data/processed/X_tokenizer.json")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--json", action="store_true", help="print the statistics as one JSON object")
    add("--stats", type=output, metavar="F", help="write them into this file")
    return parser


def same_place(path: Path, others: Sequence[Path]) -> bool:
    """Whether one of the others is this file, however it is spelled, there already or not."""

    def place(path: Path) -> Path:
        return path.parent.resolve() / path.name

    return place(path) in map(place, others)


def train(argv: Sequence[str]) -> int:
    """`bpe-train`."""
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    if not argv:
        args.dataset = "tinystories"
        notice("bpe-train: nothing given; same as: bpe-train --dataset tinystories")
    if args.dataset:
        dataset = Dataset(args.dataset)
        args.inputs = args.inputs or [dataset.require(dataset.text("train"))]
        if args.vocab_size is None and dataset.name in VOCAB_SIZES:
            args.vocab_size = sizes(str(VOCAB_SIZES[dataset.name]))
        if args.extend is None:
            args.special_token = args.special_token or [EOT]
        args.out = args.out or in_processed(dataset.tokenizer)
    if args.counts:
        if args.inputs:
            parser.error("found text and --counts; expected one of them")
        if args.checkpoint:
            parser.error("--checkpoint with --counts; expected it without: counts are a checkpoint of their own")
        refuse_settings_of_counts(args, parser)
    elif not args.inputs:
        parser.error("no input; expected one text file or more, --counts F…, or --dataset X")
    if args.checkpoint_every is not None and args.checkpoint is None:
        parser.error("--checkpoint-every without --checkpoint; expected the file to keep the run in, too")
    if args.vocab_size is None:
        parser.error("--vocab-size is missing; expected 257 or more, such as --vocab-size 4096")
    if args.out is None:
        parser.error("--out is missing; expected the file to write, such as --out tokenizer.json")
    outs = outputs(args.out, args.vocab_size)
    read = [*files_of(args.inputs), *args.counts, *([args.extend] if args.extend else [])]
    for kept in kept_in(args.checkpoint):
        check_output(kept, [*read, *outs, *([args.stats] if args.stats else [])], overwrite=True, flag="--checkpoint")
        if same_place(kept, [*outs, *([args.stats] if args.stats else [])]):
            parser.error(f"--checkpoint names {kept}, an output; expected another file")
    for out in [*outs, *([args.stats] if args.stats else [])]:
        check_output(out, read, overwrite=args.overwrite, flag="--stats" if out == args.stats else "--out")
    if args.stats and same_place(args.stats, outs):
        parser.error(f"--stats names {args.stats}, a tokenizer; expected another file")

    start = time.perf_counter()
    tokenizers, stats = _learn(args)
    saving = time.perf_counter()
    for tokenizer, out in zip(tokenizers, outs, strict=True):
        tokenizer.save(out, overwrite=args.overwrite)
    # Not before: until here no other run gets at it.
    if stats["checkpoint"]:
        stats["checkpoint"].discard()
    now = time.perf_counter()
    found = statistics(args, outs, tokenizers, stats, save_s=now - saving, seconds=now - start)
    if args.stats:
        line = json.dumps(found, indent=2) + "\n"
        atomic.write_file(args.stats, line.encode(), overwrite=args.overwrite)
    if stats["resumed_bytes"]:
        notice(
            f"bpe-train: went on from {args.checkpoint}: {human_bytes(stats['resumed_bytes'])} counted, "
            f"{stats['resumed_merges']:,} merges done before"
        )
    if warning := _too_few(args, tokenizers, stats):
        notice(f"bpe-train: {warning}")
    print(json.dumps(found) if args.json else _summary(found, stats))
    return 0


def _learn(args: Namespace) -> tuple[list[Tokenizer], dict[str, Any]]:
    extend = open_tokenizer(args.extend) if args.extend else None
    with ExitStack() as bars:
        options: dict[str, Any] = {
            "vocab_size": [s.tokens for s in args.vocab_size],
            "tie_break": args.tie_break,
            "min_frequency": args.min_frequency,
            "max_token_length": args.max_token_length,
            "extend": extend,
            "threads": args.threads,
            "max_memory": args.max_memory,
            "beside": args.out,
            "progress": StageProgress(bars) if sys.stderr.isatty() else None,
        }
        try:
            if args.counts:
                return _core.train_bpe_from_counts(args.counts, **options)
            return _core.train_bpe(
                inputs_of(args, args.inputs),
                special_tokens=args.special_token,
                pattern=args.pattern,
                errors=args.errors or "error",
                checkpoint=args.checkpoint,
                checkpoint_every=args.checkpoint_every,
                **options,
            )
        except ConfigError as error:
            if "the tokenizer to extend" in str(error):
                raise ConfigError(f"--extend {args.extend}: {error}") from None
            raise


def peak_memory_bytes() -> int:
    """The most memory that this process has held."""
    # What Linux tells through `getrusage` is at least what the parent held when it started this process.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _text(token: bytes) -> str:
    return token.decode("utf-8", "backslashreplace")


def statistics(
    args: Namespace,
    outs: Sequence[Path],
    tokenizers: Sequence[Tokenizer],
    stats: dict[str, Any],
    *,
    save_s: float,
    seconds: float,
) -> dict[str, Any]:
    """What `--json` prints and `--stats` saves; of several sizes the numbers are those of the largest."""
    largest = max(range(len(outs)), key=lambda i: args.vocab_size[i].tokens)
    longest = stats["longest_token"]
    return {
        "tokenizer": str(outs[largest]),
        "hash": tokenizers[largest].hash,
        "vocab_size": tokenizers[largest].n_vocab,
        "special_tokens": list(tokenizers[largest].special_tokens),
        "tokenizers": [
            {"tokenizer": str(out), "hash": t.hash, "vocab_size": t.n_vocab, "requested_vocab_size": s.tokens}
            for out, t, s in zip(outs, tokenizers, args.vocab_size, strict=True)
        ],
        **{k: stats[k] for k in ("merges", "requested_merges", "prior_merges", "ties", "bytes", "pretokens")},
        **{k: stats[k] for k in ("resumed_bytes", "resumed_merges", "spilled_runs")},
        "distinct_pretokens": stats["distinct_pretokens"],
        "kept_pretokens": stats["kept_pretokens"],
        "longest_token": _text(longest[:SHOWN_TOKEN]),
        "longest_token_bytes": len(longest),
        "top_merges": [
            {"left": _text(a[:SHOWN_TOKEN]), "right": _text(b[:SHOWN_TOKEN]), "count": n}
            for a, b, n in stats["top_merges"]
        ],
        **{k: stats[k] for k in ("count_s", "layout_s", "merge_s")},
        "save_s": save_s,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "threads": stats["threads"],
        "simd_level": _core.simd_level(),
        "unicode_version": _core.UNICODE_VERSION,
    }


def _too_few(args: Namespace, tokenizers: Sequence[Tokenizer], stats: dict[str, Any]) -> str | None:
    """Why there are fewer tokens than were asked for, in one line."""
    if stats["merges"] >= stats["requested_merges"]:
        return None
    most, asked = max(t.n_vocab for t in tokenizers), max(s.tokens for s in args.vocab_size)
    if not stats["bytes"]:
        part = "what was to be read of the input" if args.sample or args.limit_bytes else "the input"
        why = f"{part} holds no text"
    elif not stats["distinct_pretokens"]:
        why = "the input holds nothing but special tokens"
    else:
        why = "no pair of tokens is left to merge"
        if args.min_frequency > 1:
            why += f" that occurs {args.min_frequency} times or more"
        if args.max_token_length:
            why += f", within {args.max_token_length} bytes a token"
    return f"stopped at {most} tokens: {why} ({asked} were asked for)"


def _summary(found: dict[str, Any], stats: dict[str, Any]) -> str:
    specials = ", ".join(found["special_tokens"]) or "none"
    prior = f"{found['prior_merges']:,} merges before + " if found["prior_merges"] else ""
    phases = ", ".join(
        f"{name} {human_time(found[key])}"
        for name, key in (("count", "count_s"), ("lay out", "layout_s"), ("merge", "merge_s"), ("save", "save_s"))
    )
    threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
    rows = [
        ("tokens", f"{found['vocab_size']:,} = 256 bytes + {prior}{found['merges']:,} merges + special: {specials}"),
        (
            "text",
            f"{human_bytes(found['bytes'])}, {found['pretokens']:,} words, {found['distinct_pretokens']:,} distinct",
        ),
        ("time", f"{human_time(found['seconds'])} ({phases})"),
        ("peak memory", human_bytes(found["peak_memory_bytes"])),
        ("longest token", show_token(stats["longest_token"])),
        ("first merges", "  ".join(f"{show_token(a)}+{show_token(b)} {n:,}" for a, b, n in stats["top_merges"][:3])),
        ("ties", f"{found['ties']:,} merges were chosen by the tie rule"),
        ("with", f"{threads}, {found['simd_level']}, Unicode {found['unicode_version']}"),
    ]
    wrote = "\n".join(f"wrote {t['tokenizer']}" for t in found["tokenizers"])
    return f"{wrote}\n{table(rows)}"
