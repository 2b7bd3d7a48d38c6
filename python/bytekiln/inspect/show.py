"""`bpe-inspect show TEXT`: the tokens of a text, coloured in the terminal, with their ids.

In: command-line arguments. Out: lines or JSON on stdout, an exit status. Called by `cli_inspect`. Without colours
(NO_COLOR, a pipe, a file) a bar stands between tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytekiln.bpe_flags import PATTERN_HELP, Dataset, text
from bytekiln.characters import load_any
from bytekiln.console import Parser, colour
from bytekiln.inspect.pieces import MARKS, PLAIN_MARKS, Piece, pieces, visible

COLOURS = (153, 222, 157, 219, 229)
"""Light backgrounds of the 256-colour palette, under black text: readable whatever the terminal's own colours are."""
HERE = Path("tokenizer.json")
BAR, PLAIN_BAR = "│", "|"


def show(argv: Sequence[str]) -> int:
    """`bpe-inspect show`."""
    parser = Parser(
        "bpe-inspect show",
        usage="bpe-inspect show [TOKENIZER…] TEXT [flags]",
        description="Show the tokens of a text and their ids: white space as marks, parts of characters as bytes.",
        examples=[
            'bpe-inspect show "To be, or not to be"                   # by ./tokenizer.json',
            'bpe-inspect show own.json foreign.json "To be, or not"   # one below the other',
            'bpe-inspect show own.json "naïve <|endoftext|>" --allow-special --json',
            "bpe-inspect show own.json - < text.txt",
        ],
    )
    add = parser.add_argument
    add(
        "given",
        nargs="*",
        type=text,
        metavar="[TOKENIZER…] TEXT",
        help="tokenizers (default: ./tokenizer.json), then the text; -: stdin",
    )
    add("--tokenizer", action="append", type=Path, default=[], metavar="T", help="another way to name a tokenizer")
    add("--dataset", metavar="X", help="the tokenizer of a dataset")
    add("--pattern", type=text, metavar="P", help=PATTERN_HELP)
    add("--allow-special", action="store_true", help="recognise special tokens; else they are text, as in encode")
    add(
        "--errors",
        choices=("error", "replace", "bytes"),
        default="error",
        help="invalid UTF-8 on stdin: stop and name the byte (default), put U+FFFD in its place, or keep the bytes",
    )
    add("--json", action="store_true", help="print one JSON object (a list of them for several tokenizers)")
    args = parser.parse_intermixed_args(argv)
    if not args.given:
        parser.error('no text; expected one, such as: bpe-inspect show "To be, or not to be"')
    *named, what = args.given
    paths = [*args.tokenizer, *map(Path, named)]
    if not paths and not args.dataset and Path(what).is_file() and Path(what).suffix in (".json", ".tiktoken"):
        parser.error(f"{what}: a file alone; expected a text behind it: bpe-inspect show {what} TEXT")
    if args.dataset:
        paths.append((dataset := Dataset(args.dataset)).require(dataset.tokenizer))
    if not paths and not HERE.exists():
        parser.error(f"no tokenizer; expected bpe-inspect show TOKENIZER TEXT, --dataset X, or a file ./{HERE}")
    data = sys.stdin.buffer.read() if what == "-" else what.encode()
    found = {}
    for path in paths or [HERE]:
        tokenizer = load_any(path, pattern=args.pattern)
        found[str(path)] = pieces(tokenizer, data, errors=args.errors, allow_special=args.allow_special)
    if args.json:
        said = [_as_json(name, tokens) for name, tokens in found.items()]
        print(json.dumps(said if len(said) > 1 else said[0]))
    else:
        blocks = [_block(name if len(found) > 1 else "", tokens) for name, tokens in found.items()]
        print("\n\n".join(blocks))
    return 0


def _as_json(name: str, tokens: list[Piece]) -> dict[str, Any]:
    size = sum(len(p.token) for p in tokens)
    return {
        "tokenizer": name,
        "bytes": size,
        "tokens": len(tokens),
        "bytes_per_token": size / len(tokens) if tokens else None,
        "ids": [p.id for p in tokens],
        "pieces": [
            {"id": p.id, "text": p.text, "bytes": p.token.hex(), "start": p.start, "special": p.special} for p in tokens
        ],
    }


def _block(name: str, tokens: list[Piece]) -> str:
    size = sum(len(p.token) for p in tokens)
    each = f", {size / len(tokens):.2f} bytes each" if tokens else ""
    counts = f"{len(tokens):,} {'token' if len(tokens) == 1 else 'tokens'}, {size:,} bytes{each}"
    head = f"{name}  {counts}" if name else counts
    return "\n".join([head, *([_coloured(tokens), _ids(tokens)] if tokens else [])])


def _coloured(tokens: list[Piece]) -> str:
    rich = colour(sys.stdout)
    marks, bar = (MARKS, BAR) if _can(BAR + "".join(MARKS.values())) else (PLAIN_MARKS, PLAIN_BAR)
    out, fresh = [], True
    for k, piece in enumerate(tokens):
        shown = "".join(s for _, s in visible(piece.token, marks))
        out.append(_painted(shown, k) if rich else ("" if fresh else bar) + shown)
        # The text keeps its lines; a mark says that the newline is in the token.
        fresh = piece.token.endswith(b"\n") and k + 1 < len(tokens)
        out.append("\n" * fresh)
    return "".join(out)


def _ids(tokens: list[Piece]) -> str:
    rich = colour(sys.stdout)
    return "ids  " + " ".join(_painted(str(p.id), k) if rich else str(p.id) for k, p in enumerate(tokens))


def _painted(shown: str, place: int) -> str:
    return f"\x1b[48;5;{COLOURS[place % len(COLOURS)]};38;5;16m{shown}\x1b[0m"


def _can(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
