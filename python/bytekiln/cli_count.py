"""`bpe-count`: words of text files into a counts file that can be added to others and trained on.

In: text files, or counts files. Out: one counts file, a short summary on stdout, an exit status. Called by `cli`, which
turns every error into one line. Nothing here imports torch.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bytekiln._core import Counts
from bytekiln.bpe_flags import (
    INPUT_HELP,
    StageProgress,
    add_input_flags,
    add_memory_flag,
    add_text_flags,
    add_word_flags,
    check_output,
    files_of,
    inputs_of,
    output,
    refuse_settings_of_counts,
)
from bytekiln.console import Parser, human_bytes, human_time, table


def count(argv: Sequence[str]) -> int:
    """`bpe-count`."""
    parser = Parser(
        "bpe-count",
        usage='bpe-count INPUT… [--special-token "<|endoftext|>"] --out part.counts [flags]\n'
        "       bpe-count --counts PART… --out all.counts",
        description="Count the words of text files into a counts file, for bpe-train --counts. Counts of parts of a "
        "corpus, made anywhere, add up to those of the whole: any split gives the same tokenizer.",
        examples=[
            'bpe-count part1.txt --special-token "<|endoftext|>" --out part1.counts',
            "bpe-count --counts part1.counts part2.counts --out both.counts",
            "bpe-train --counts part1.counts part2.counts --vocab-size 32k --out tokenizer.json",
            "bpe-count data/*.txt --ray --out all.counts      # files spread over a Ray cluster; docs/scale.md",
        ],
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help=INPUT_HELP)
    add("--counts", nargs="+", type=Path, default=[], metavar="PART", help="add up counts files instead")
    add("--out", type=output, metavar="F", help="the counts file to write")
    add_word_flags(parser)
    add_input_flags(parser)
    add_text_flags(parser)
    parser.set_defaults(errors=None)
    add_memory_flag(parser)
    add(
        "--ray",
        action="store_true",
        help="count the files on the Ray cluster that RAY_ADDRESS names, or this machine's",
    )
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--json", action="store_true", help="print what was counted as one JSON object")
    args = parser.parse_intermixed_args(argv)
    if bool(args.inputs) == bool(args.counts):
        found = "both" if args.inputs else "neither"
        parser.error(f"found {found} of INPUT and --counts; expected text files, or --counts PART…")
    if args.counts:
        refuse_settings_of_counts(args, parser)
        if args.threads:
            parser.error("--threads with --counts; expected it without: nothing is counted anew")
        if args.ray:
            parser.error("--ray with --counts; expected text files, whose counts a cluster makes")
    if args.ray and (args.limit_bytes or args.sample):
        parser.error("--limit-bytes or --sample with --ray; expected neither: each machine sees some files only")
    if args.out is None:
        parser.error("--out is missing; expected the file to write, such as --out part.counts")
    check_output(args.out, [*files_of(args.inputs), *args.counts], overwrite=args.overwrite)

    start = time.perf_counter()
    with ExitStack() as bars:
        progress = StageProgress(bars)
        counts = _counted(args, progress)
        saved = counts.save(args.out, overwrite=args.overwrite, progress=progress)
    seconds = time.perf_counter() - start
    if args.json:
        print(json.dumps({"counts": str(args.out), **saved, "seconds": seconds}))
    else:
        print(_summary(args.out, saved, seconds))
    return 0


def _counted(args: Namespace, progress: StageProgress) -> Counts:
    if args.counts:
        return Counts.load(args.counts, max_memory=args.max_memory, beside=args.out)
    settings: dict[str, Any] = {
        "special_tokens": args.special_token or [],
        "pattern": args.pattern or "gpt2",
        "errors": args.errors or "error",
        "threads": args.threads,
        "max_memory": args.max_memory,
    }
    if args.ray:
        from bytekiln.count_ray import count_on_cluster

        return count_on_cluster(files_of(args.inputs), args.field, args.out, settings, progress)
    return Counts.from_files(inputs_of(args, args.inputs), beside=args.out, progress=progress, **settings)


def _summary(out: Path, saved: dict[str, Any], seconds: float) -> str:
    specials = ", ".join(saved["special_tokens"]) or "none"
    texts = "text" if saved["documents"] == 1 else "texts"
    rows = [
        ("words", f"{saved['pretokens']:,}, {saved['distinct_pretokens']:,} distinct"),
        ("text", f"{human_bytes(saved['bytes'])} in {saved['documents']:,} {texts}"),
        ("pattern", f"{saved['pattern']}; special tokens: {specials}"),
        ("time", human_time(seconds)),
    ]
    if saved["spilled_runs"]:
        rows.append(("to disk", f"{saved['spilled_runs']:,} sorted runs that had no room in memory"))
    return f"wrote {out}, {human_bytes(out.stat().st_size)}\n{table(rows)}"
