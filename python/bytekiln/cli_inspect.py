"""`bpe-inspect`: tokenizers measured on the same text. `diff` is in `tokenizer_diff`, `show` in `inspect.show`.

In: command-line arguments. Out: one table or JSON on stdout, perhaps a page, an exit status. Called by `cli`. Two
passes: the whole text is encoded as `bpe-encode` does, for the speed; documents of it are drawn and measured one by
one, for everything that is compared. Nothing here imports torch; numpy is loaded only when something is measured.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytekiln.atomic import write_file
from bytekiln.bpe_flags import (
    PATTERN_HELP,
    Dataset,
    StageProgress,
    add_input_flags,
    add_text_flags,
    byte_size,
    check_output,
    files_of,
    output,
    size,
    text,
)
from bytekiln.console import Parser, notice
from bytekiln.inputs import Inputs
from bytekiln.inspect.show import show
from bytekiln.inspection import measure
from bytekiln.known import open_tokenizer
from bytekiln.tokenizer import Tokenizer
from bytekiln.tokenizer_diff import diff

if TYPE_CHECKING:
    from bytekiln.inspect.documents import Documents

DOCUMENT_BYTES = 8_000_000
"""Text of whole documents that is drawn: enough for intervals of a few thousandths, and for seconds of work."""


def inspect(argv: Sequence[str]) -> int:
    """`bpe-inspect`."""
    if argv and argv[0] == "diff":
        return diff(argv[1:])
    if argv and argv[0] == "show":
        return show(argv[1:])
    parser = Parser(
        "bpe-inspect",
        usage="bpe-inspect TOKENIZER… --text FILE [flags]\n       bpe-inspect diff A B\n       bpe-inspect show TEXT",
        description="Measure tokenizers on the same documents, side by side: compression with its interval, tokens a "
        "word, single bytes, scripts, vocabulary make-up, longest tokens, speed.",
        examples=[
            "bpe-inspect tokenizer.json --text validation.txt",
            "bpe-inspect own.json foreign.json --text validation.txt --json",
            "bpe-inspect own.json --vocab-path encoder.json --merges-path vocab.bpe --text validation.txt",
            "bpe-inspect diff own.json foreign.json --text validation.txt   # where they part",
            "bpe-inspect own.json foreign.json --text validation.txt --html tokens.html",
            'bpe-inspect show "To be, or not to be"   # its tokens, in colours',
            "bpe-inspect --dataset owt      # its tokenizer on data/owt_valid.txt",
        ],
    )
    add = parser.add_argument
    add(
        "tokenizers",
        nargs="*",
        type=Path,
        metavar="TOKENIZER",
        help="tokenizer.json, or a name such as gpt2; several are compared",
    )
    add("--vocab-path", type=Path, metavar="F", help="vocab.json of one more tokenizer, with --merges-path")
    add("--merges-path", type=Path, metavar="F", help="merges.txt")
    add("--pattern", type=text, metavar="P", help=PATTERN_HELP)
    add("--text", action="append", type=Path, default=[], metavar="FILE", help="what to measure on; repeat for several")
    add(
        "--documents",
        type=byte_size,
        default=DOCUMENT_BYTES,
        metavar="SIZE",
        help="text of the documents that are drawn to compare compression on (default: 8MB)",
    )
    add(
        "--separator",
        type=text,
        metavar="T",
        help="what ends a document in a text file (default: the first tokenizer's end-of-text token)",
    )
    add("--longest", type=size, default=10, metavar="N", help="how many of the longest tokens to show (default: 10)")
    add_input_flags(parser, seed_help="which documents are drawn (default: 0)")
    add_text_flags(parser)
    add("--dataset", metavar="X", help="the tokenizer and validation text of a dataset")
    add("--html", type=output, metavar="FILE", help="write a page too: the numbers, and documents with coloured tokens")
    add("--overwrite", action="store_true", help="replace an existing page")
    add("--json", action="store_true", help="print one JSON object (a list of them for several tokenizers)")
    args = parser.parse_intermixed_args(argv)
    if args.dataset:
        dataset = Dataset(args.dataset)
        args.tokenizers = args.tokenizers or [dataset.require(dataset.tokenizer)]
        args.text = args.text or [dataset.require(dataset.text("valid"))]
    if bool(args.vocab_path) != bool(args.merges_path):
        parser.error("--vocab-path or --merges-path alone; expected both, or neither")
    if not args.tokenizers and not args.vocab_path:
        parser.error("no tokenizer; expected a tokenizer.json, or --dataset X")
    if not args.text:
        parser.error("--text is missing; expected a text file to measure on")
    if Path("-") in args.text:
        parser.error("--text -: standard input can be read only once; expected a file, which is read several times")
    if args.separator == "":
        parser.error('--separator: found ""; expected what ends a document, such as <|endoftext|>')

    if args.html:
        read = [*args.tokenizers, *filter(None, (args.vocab_path, args.merges_path)), *files_of(args.text)]
        check_output(args.html, read, overwrite=args.overwrite, flag="--html")

    tokenizers = _tokenizers(args)
    found, documents = _measure(args, tokenizers)
    if args.html:
        from bytekiln.inspect.page import page

        write_file(args.html, page(found, documents, tokenizers).encode(), overwrite=args.overwrite)
        notice(f"wrote {args.html}")
    if args.json:
        print(json.dumps(found if len(found) > 1 else found[0]))
    else:
        from bytekiln.inspect.tables import summary

        print(summary(found))
    return 0


def _tokenizers(args: Namespace) -> dict[str, Tokenizer]:
    """By the names that they were given; one that is named twice is measured once."""
    found = {str(path): open_tokenizer(path, pattern=args.pattern) for path in args.tokenizers}
    if args.vocab_path:
        found[str(args.vocab_path)] = Tokenizer.from_vocab_and_merges(
            args.vocab_path, args.merges_path, pattern=args.pattern or "gpt2"
        )
    return found


def _measure(args: Namespace, tokenizers: dict[str, Tokenizer]) -> tuple[list[dict[str, Any]], Documents]:
    """What `--json` prints, one dictionary a tokenizer; and the documents that it holds of."""
    from bytekiln.inspect.compression import as_json, compress, difference, read_text, vocabulary_scripts
    from bytekiln.inspect.documents import read_documents, separator_of
    from bytekiln.inspect.scripts import ScriptTable

    texts = Inputs(args.text, args.field, args.limit_bytes, args.sample, args.seed or 0)
    found = []
    for name, tokenizer in tokenizers.items():
        with ExitStack() as bars:
            found.append(
                measure(
                    tokenizer,
                    texts,
                    name=name,
                    longest=args.longest,
                    errors=args.errors,
                    threads=args.threads,
                    progress=StageProgress(bars),
                )
            )
    with ExitStack() as bars:
        documents = read_documents(
            texts,
            text_bytes=found[0]["bytes"],
            size=args.documents,
            separator=args.separator or separator_of(list(tokenizers.values())),
            errors=args.errors,
            threads=args.threads,
            progress=StageProgress(bars),
        )
    table = ScriptTable()
    measured, first = read_text(documents, table), None
    for said, tokenizer in zip(found, tokenizers.values(), strict=True):
        with ExitStack() as bars:
            compression = compress(tokenizer, measured, StageProgress(bars))
        said["documents"] = as_json(measured, compression)
        said["vocabulary_scripts"] = vocabulary_scripts(tokenizer, table)
        if first is not None:
            said["against_first"] = difference(measured, first, compression)
        first = first or compression
    return found, documents
