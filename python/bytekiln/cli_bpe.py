"""The tokenizer's commands: `bpe-train`, `bpe-encode`, `bpe-inspect`.

In: command-line arguments. Out: files, a short summary on stdout, an exit status. Called by `cli`, which
turns every error into one line. Nothing here imports torch.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

from bytekiln import _core, characters_file
from bytekiln.bpe_flags import (
    PATTERN_HELP,
    Dataset,
    StageProgress,
    add_memory_flag,
    add_text_flags,
    check_output,
    in_processed,
    refuse_settings_of_counts,
    share,
    size,
    text,
)
from bytekiln.characters import AnyTokenizer, CharTokenizer, load_any
from bytekiln.console import Parser, human_bytes, human_time, notice, table
from bytekiln.inspection import measure, show_token
from bytekiln.tokenizer import Tokenizer

EOT = "<|endoftext|>"
VOCAB_SIZES = {"tinystories": 10_000, "owt": 32_000}
"""The vocabularies that `--dataset` trains when `--vocab-size` does not say otherwise."""
SHORT_BYTES = 1_000_000
"""Below this the speed is mostly that of starting up."""


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
            "bpe-train --counts a.counts b.counts --vocab-size 32k --out tokenizer.json   # of bpe-count",
        ],
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help="UTF-8 text files; no word crosses a file's border")
    add("--counts", nargs="+", type=Path, default=[], metavar="F", help="counts files of bpe-count instead of text")
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
    parser.set_defaults(errors=None)
    add_memory_flag(parser)
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
        args.out = args.out or in_processed(dataset.tokenizer)
    if args.counts:
        if args.inputs:
            parser.error("found text and --counts; expected one of them")
        refuse_settings_of_counts(args, parser)
    elif not args.inputs:
        parser.error("no input; expected one text file or more, --counts F…, or --dataset X")
    if args.vocab_size is None:
        parser.error("--vocab-size is missing; expected 257 or more, such as --vocab-size 4096")
    if args.out is None:
        parser.error("--out is missing; expected the file to write, such as --out tokenizer.json")
    check_output(args.out, [*args.inputs, *args.counts], overwrite=args.overwrite)

    start = time.perf_counter()
    with ExitStack() as bars:
        options: dict[str, Any] = {
            "vocab_size": args.vocab_size,
            "tie_break": args.tie_break,
            "max_memory": args.max_memory,
            "beside": args.out,
            "progress": StageProgress(bars),
        }
        if args.counts:
            tokenizer, stats = _core.train_bpe_from_counts(args.counts, **options)
        else:
            tokenizer, stats = _core.train_bpe(
                args.inputs,
                special_tokens=args.special_token,
                pattern=args.pattern or "gpt2",
                errors=args.errors or "error",
                threads=args.threads,
                **options,
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
        "spilled_runs": stats["spilled_runs"],
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
            "bpe-encode input.txt --characters --dataset shakespeare-char   # all that lm-train needs of a text",
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
    add("--characters", action="store_true", help="every character is a token: make the tokenizer and both parts here")
    add("--val-share", type=share, metavar="S", help="characters: share of the text, at its end, to validate on (0.1)")
    add("--val-out", type=Path, metavar="F", help="characters: the validation file; --out is the training file")
    add("--tokenizer-out", type=Path, metavar="F", help="characters: the tokenizer.json to write")
    add("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_intermixed_args(argv)

    args.inputs += args.data_path
    if args.characters:
        return _encode_characters(args, parser)
    for name in ("--val-share", "--val-out", "--tokenizer-out"):
        if getattr(args, name[2:].replace("-", "_")) is not None:
            parser.error(f"{name} without --characters; expected both, or neither")
    jobs = [(args.inputs, args.out)]
    if args.dataset:
        dataset = Dataset(args.dataset)
        if not (args.tokenizer or args.vocab_path):
            args.tokenizer = dataset.require(dataset.tokenizer)
        if not args.inputs and args.out is None:
            jobs = [([dataset.require(dataset.text(s))], in_processed(dataset.tokens(s))) for s in ("train", "valid")]
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
            if isinstance(tokenizer, CharTokenizer):
                _refuse_words(args, parser, f"{args.tokenizer}, a tokenizer of characters")
                manifest = characters_file.encode(
                    tokenizer,
                    inputs,
                    out,
                    dtype=args.dtype,
                    overwrite=args.overwrite,
                    progress=StageProgress(bars),
                )
            else:
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


def _encode_characters(args: Namespace, parser: Parser) -> int:
    """`bpe-encode --characters`: a vocabulary, a training and a validation part."""
    _refuse_words(args, parser, "--characters")
    train, val, tokenizer_out = args.out, args.val_out, args.tokenizer_out
    if not args.inputs:
        parser.error("no input; expected one text file or more, such as: bpe-encode input.txt --characters --dataset X")
    if args.dataset:
        dataset = Dataset(args.dataset)
        train = train or in_processed(dataset.tokens("train"))
        val = val or in_processed(dataset.tokens("valid"))
        tokenizer_out = tokenizer_out or in_processed(dataset.tokenizer)
    val_share = Fraction(1, 10) if args.val_share is None else args.val_share
    if not val_share:
        if args.val_out:
            parser.error("--val-out with --val-share 0; expected a share above 0")
        val = None
    named = {"--out": train, "--tokenizer-out": tokenizer_out, **({"--val-out": val} if val_share else {})}
    for flag, path in named.items():
        if path is None:
            parser.error(f"{flag} is missing; expected the file to write, or --dataset X")
        check_output(path, args.inputs, overwrite=args.overwrite, flag=flag)
    written = [p.resolve() for p in named.values()]
    written += [p.with_name(p.name + ".json").resolve() for p in (train, val) if p]
    if len(set(written)) < len(written):
        parser.error(f"{' and '.join(named)} name the same file; expected different ones, manifests (.npy.json) too")
    start = time.perf_counter()
    with ExitStack() as bars:
        tokenizer, manifests = characters_file.prepare(
            args.inputs,
            characters_file.Outputs(tokenizer_out, train, val),
            val_share=val_share,
            dtype=args.dtype,
            overwrite=args.overwrite,
            progress=StageProgress(bars),
        )
    seconds, read = time.perf_counter() - start, sum(m["text_bytes"] for m in manifests)
    rows = [("characters", f"{tokenizer.n_vocab:,} different ones in {human_bytes(read)}")]
    rows += [(n, f"{m['tokens']:,} tokens {m['dtype']}") for n, m in zip(("train", "valid"), manifests, strict=False)]
    rows.append(("time", f"{human_time(seconds)}, {human_bytes(read / seconds)}/s"))
    print(f"wrote {', '.join(map(str, filter(None, (tokenizer_out, train, val))))}\n{table(rows)}")
    return 0


def _refuse_words(args: Namespace, parser: Parser, why: str) -> None:
    """Flags about words, special tokens and broken bytes mean nothing where every character is a token."""
    wordy: dict[str, object] = {
        "--vocab-path": args.vocab_path,
        "--merges-path": args.merges_path,
        "--special-token": args.special_token,
        "--pattern": args.pattern,
        "--append-eot": args.append_eot,
        "--tokenizer": args.tokenizer if args.characters else None,
        f"--errors {args.errors}": args.errors != "error",
    }
    for flag, given in wordy.items():
        if given:
            parser.error(f"{flag} with {why}; expected it without")


def _tokenizer_of(args: Namespace, parser: Parser) -> AnyTokenizer:
    if args.tokenizer and not (args.vocab_path or args.merges_path):
        return load_any(args.tokenizer, special_tokens=args.special_token, pattern=args.pattern)
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
