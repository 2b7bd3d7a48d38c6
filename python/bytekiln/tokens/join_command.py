"""`bpe-encode join PART… --out OUT`: what `--part i/n` has written as one file.

In: command-line arguments. Out: the file, its index and manifest, a summary on stdout. Called by `cli_bpe`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from bytekiln.atomic import AtomicFile
from bytekiln.bpe_flags import check_output, files_of, output
from bytekiln.console import Parser, Progress, human_bytes, human_time, table
from bytekiln.tokens.files import refuse_link
from bytekiln.tokens.join import BYTES, join, read_parts


def command(argv: Sequence[str]) -> int:
    """`bpe-encode join`."""
    parser = Parser(
        "bpe-encode join",
        usage="bpe-encode join PART… --out OUT [--input INPUT…] [--overwrite]",
        description="Join the token files that bpe-encode --part 1/N … N/N have written into the one that a single "
        "process writes. Parts are put in order and checked first: all there, once each, of the same inputs and "
        "tokenizer, unchanged since they were written.",
        examples=[
            "bpe-encode join part*.bin --out train.npy",
            "bpe-encode join part*.npy --out train.npy --input data/   # and checksums of the whole inputs",
            "bpe-encode join part*_val.npy --out val.npy               # parts made with --split val=0.01",
        ],
    )
    add = parser.add_argument
    add("parts", nargs="+", type=Path, metavar="PART", help="a token file made with --part I/N; any order")
    add(
        "--out",
        "--output-path",
        type=output,
        required=True,
        metavar="F",
        help="the file to write; raw if it ends in .bin",
    )
    add(
        "--input",
        action="append",
        type=Path,
        default=[],
        metavar="F",
        help="what the parts were made of, in the same order; read once more, so that the manifest has the checksums "
        "of files that were divided, not of their pieces",
    )
    add("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_intermixed_args(argv)

    inputs = files_of(args.input)
    read = [*inputs, *args.parts, *(path.with_name(path.name + ".json") for path in args.parts)]
    refuse_link(args.out)
    check_output(args.out, read, overwrite=args.overwrite)
    start = time.perf_counter()
    with AtomicFile(args.out, overwrite=args.overwrite) as ids:
        parts = read_parts(args.parts)
        size = sum(about["tokens"] * BYTES[about["dtype"]] for _, about in parts)
        with Progress("joining", size, "bytes") as bar:
            _, made = join(parts, inputs if args.input else None, ids, overwrite=args.overwrite, progress=bar.update)
    seconds = time.perf_counter() - start
    rows = [
        ("tokens", f"{made['tokens']:,} {made['dtype']} in {made['documents']:,} documents"),
        ("parts", f"{len(parts):,}, verified"),
        ("time", f"{human_time(seconds)}, {human_bytes(size / max(seconds, 1e-9))}/s"),
    ]
    print(f"wrote {args.out}\n{table(rows)}")
    return 0
