"""`bpe-encode`; the tokenizer's other commands are in `cli_train`, `cli_count` and `cli_inspect`.

In: command-line arguments. Out: token files, a short summary on stdout, an exit status. Called by `cli`, which
turns every error into one line. Nothing here imports torch.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bytekiln.bpe_flags import (
    INPUT_HELP,
    Dataset,
    StageProgress,
    add_input_flags,
    add_text_flags,
    check_output,
    files_of,
    in_processed,
    output,
    plain_files,
    share,
)
from bytekiln.characters import CharTokenizer
from bytekiln.console import Parser, human_bytes, human_time, table
from bytekiln.encode_flags import OUTPUT_FLAGS, add_output_flags, encode_words, words_summary
from bytekiln.tokenizer_flags import add_tokenizer_flags, tokenizer_of


def encode(argv: Sequence[str]) -> int:
    """`bpe-encode`."""
    if argv and argv[0] == "convert":
        from bytekiln.tokens.command import command  # numpy, which encoding does without

        return command(argv[1:])
    if argv and argv[0] == "join":
        from bytekiln.tokens.join_command import command as join

        return join(argv[1:])
    parser = Parser(
        "bpe-encode",
        usage="bpe-encode INPUT… --tokenizer tokenizer.json --out train.npy [flags]\n"
        "       bpe-encode convert IN OUT [flags]      (token files of other formats, see its --help)\n"
        "       bpe-encode join PART… --out train.npy  (what --part 1/N … N/N have written, see its --help)",
        description="Encode text files, in their order, into one token file (.npy, or raw .bin) with its manifest, or "
        "into shards and parts. Stopped by whatever, the same command goes on where it was (docs/bpe-encode.md).",
        examples=[
            "bpe-encode train.txt --tokenizer tokenizer.json --out train.npy",
            "bpe-encode a.txt b.txt --tokenizer tokenizer.json --out all.bin --dtype uint32 --append-eot",
            "bpe-encode --data_path raw.txt --vocab_path vocab.json --merges_path merges.txt \\",
            "    --output_path train.npy --method streaming",
            "bpe-encode data/ --tokenizer tokenizer.json --out train.npy --split val=0.01 --shard-tokens 100M",
            "bpe-encode big.txt --tokenizer tokenizer.json --out part3.bin --part 3/16   # one of 16 processes",
            "bpe-encode --dataset owt       # data/owt_{train,valid}.txt with the dataset's tokenizer",
            "bpe-encode input.txt --characters --dataset shakespeare-char   # all that lm-train needs of a text",
            "bpe-encode convert train.npy train.bin --to llmc   # also Megatron's files, and those of nanoGPT",
        ],
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help=INPUT_HELP)
    add("--data-path", action="append", type=Path, default=[], metavar="F", help="another way to name an input")
    add_tokenizer_flags(parser)
    add("--out", "--output-path", type=output, metavar="F", help="the token file to write; raw ids if it ends in .bin")
    add("--dtype", choices=("uint16", "uint32"), help="default: uint16 when every id fits")
    add(
        "--append-eot",
        action="store_true",
        default=None,
        help="end each file with the end-of-text token (default: files that contain one)",
    )
    add("--no-append-eot", dest="append_eot", action="store_false", help="add none")
    add("--method", choices=("streaming",), help="accepted; encoding always streams, in bounded memory")
    add_output_flags(parser)
    add_input_flags(parser, seed_help="which documents --sample and --split take (default: 0)")
    add_text_flags(parser)
    add("--dataset", metavar="X", help="encode data/X_{train,valid}.txt into data/processed/X_{train,valid}.npy")
    add("--characters", action="store_true", help="every character is a token: make the tokenizer and both parts here")
    add("--val-share", type=share, metavar="S", help="characters: share of the text, at its end, to validate on (0.1)")
    add("--val-out", type=output, metavar="F", help="characters: the validation file; --out is the training file")
    add("--tokenizer-out", type=output, metavar="F", help="characters: the tokenizer.json to write")
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
        read = [*files_of(inputs), *(p for p in (args.tokenizer, args.vocab_path, args.merges_path) if p)]
        # Whether it is this run's, the core knows, or `encode_ray`.
        unfinished = any(out.with_name(f".{out.name}.{what}").exists() for what in ("state", "parts"))
        check_output(out, read, overwrite=args.overwrite or unfinished)
    tokenizer = tokenizer_of(args, parser)
    for inputs, out in jobs:
        start = time.perf_counter()
        with ExitStack() as bars:
            if isinstance(tokenizer, CharTokenizer):
                from bytekiln import characters_file

                why = f"{args.tokenizer}, a tokenizer of characters"
                _refuse_words(args, parser, why)
                manifest = characters_file.encode(
                    tokenizer,
                    plain_files(args, inputs, why),
                    out,
                    dtype=args.dtype,
                    overwrite=args.overwrite,
                    progress=StageProgress(bars),
                )
            else:
                made, resumed = encode_words(args, tokenizer, inputs, out, StageProgress(bars))
                print(words_summary(made, resumed, time.perf_counter() - start))
                continue
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
    from fractions import Fraction

    from bytekiln import characters_file

    val_share = Fraction(1, 10) if args.val_share is None else args.val_share
    if not val_share:
        if args.val_out:
            parser.error("--val-out with --val-share 0; expected a share above 0")
        val = None
    files = plain_files(args, args.inputs, "--characters")
    named = {"--out": train, "--tokenizer-out": tokenizer_out, **({"--val-out": val} if val_share else {})}
    for flag, path in named.items():
        if path is None:
            parser.error(f"{flag} is missing; expected the file to write, or --dataset X")
        check_output(path, files, overwrite=args.overwrite, flag=flag)
    written = [p.resolve() for p in named.values()]
    written += [p.with_name(p.name + ".json").resolve() for p in (train, val) if p]
    if len(set(written)) < len(written):
        parser.error(f"{' and '.join(named)} name the same file; expected different ones, manifests (.npy.json) too")
    start = time.perf_counter()
    with ExitStack() as bars:
        tokenizer, manifests = characters_file.prepare(
            files,
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
        **{flag: getattr(args, flag[2:].replace("-", "_")) for flag in OUTPUT_FLAGS},
        "--tokenizer": args.tokenizer if args.characters else None,
        f"--errors {args.errors}": args.errors != "error",
    }
    for flag, given in wordy.items():
        if given:
            parser.error(f"{flag} with {why}; expected it without")


def _encoding_summary(out: Path, manifest: dict[str, Any], seconds: float) -> str:
    tokens, text_bytes = manifest["tokens"], manifest["text_bytes"]
    rows = [
        ("tokens", f"{tokens:,} {manifest['dtype']} in {manifest['documents']:,} documents"),
        ("text", f"{human_bytes(text_bytes)}, {text_bytes / max(tokens, 1):.3f} bytes a token"),
        ("time", f"{human_time(seconds)}, {human_bytes(text_bytes / seconds)}/s"),
    ]
    return f"wrote {out}\n{table(rows)}"
