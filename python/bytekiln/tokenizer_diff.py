"""`bpe-inspect diff A B`: where two tokenizers part, what they share, and how both compress a text.

In: two tokenizer files, perhaps texts. Out: one dictionary of plain values, or a summary of it. Called by
`cli_inspect`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bytekiln.bpe_flags import StageProgress, add_text_flags, size
from bytekiln.console import Parser, table
from bytekiln.inputs import Inputs
from bytekiln.inspection import bare_token, measure
from bytekiln.known import open_tokenizer
from bytekiln.tokenizer import Tokenizer


def first_difference(a: Tokenizer, b: Tokenizer) -> dict[str, Any] | None:
    """The first merge, counted from 1, that differs: `number`, `a` and `b`, each two tokens or None at its end."""
    for number, (x, y) in enumerate(zip_longest(a.merges, b.merges), 1):
        if x != y:
            return {"number": number, "a": _pair(x), "b": _pair(y)}
    return None


def _pair(pair: tuple[bytes, bytes] | None) -> list[str] | None:
    return [bare_token(t) for t in pair] if pair else None


def _ordinary(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Tokens with their ids, special ones left out."""
    special = set(tokenizer.special_tokens.values())
    return {token: id for id, token in tokenizer.vocab.items() if id not in special}


def _only(own: dict[bytes, int], other: dict[bytes, int], shown: int) -> dict[str, Any]:
    left = own.keys() - other.keys()
    return {
        "count": len(left),
        "longest": [bare_token(t) for t in sorted(left, key=lambda t: (-len(t), t))[:shown]],
        "first": [bare_token(t) for t in sorted(left, key=own.__getitem__)[:shown]],
    }


def compare(a: Tokenizer, b: Tokenizer, *, shown: int = 10) -> dict[str, Any]:
    """What two tokenizers have in common and what not; `shown` tokens of each kind are listed.

    Shares are of ordinary tokens: `share_of_a` is 1 where every token of `a` is in `b` too.

    >>> from bytekiln import train_bpe_from_iterator
    >>> a, b = train_bpe_from_iterator(["abc abc ab"], vocab_size=[258, 257])
    >>> found = compare(a, b)
    >>> found["first_different_merge"], found["shared_tokens"], found["only_in_a"]["first"]
    ({'number': 2, 'a': ['ab', 'c'], 'b': None}, 257, ['abc'])
    """
    ours, theirs = _ordinary(a), _ordinary(b)
    shared = len(ours.keys() & theirs.keys())
    return {
        "same": a.hash == b.hash,
        "merges": {"a": len(a.merges), "b": len(b.merges)},
        "patterns": {"a": a.pattern, "b": b.pattern},
        "vocab_sizes": {"a": a.n_vocab, "b": b.n_vocab},
        "first_different_merge": first_difference(a, b),
        "shared_tokens": shared,
        "share_of_a": shared / len(ours),
        "share_of_b": shared / len(theirs),
        "only_in_a": _only(ours, theirs, shown),
        "only_in_b": _only(theirs, ours, shown),
        "special_tokens": {"a": a.special_tokens, "b": b.special_tokens},
    }


def diff(argv: Sequence[str]) -> int:
    """`bpe-inspect diff`."""
    parser = Parser(
        "bpe-inspect diff",
        usage="bpe-inspect diff A B [--text FILE] [flags]",
        description="Compare two tokenizers: the first merge that differs, shared and other tokens, compression.",
        examples=[
            "bpe-inspect diff own.json foreign.json",
            "bpe-inspect diff own.json foreign.json --text validation.txt --json",
        ],
    )
    add = parser.add_argument
    add("tokenizers", nargs="*", type=Path, metavar="A B", help="two tokenizer.json")
    add("--text", action="append", type=Path, default=[], metavar="FILE", help="compress this text with both")
    add("--shown", type=size, default=10, metavar="N", help="tokens listed of each kind (default: 10)")
    add_text_flags(parser)
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args(argv)
    if len(args.tokenizers) != 2:
        parser.error(f"found {len(args.tokenizers)} tokenizers; expected two")
    a, b = (open_tokenizer(path) for path in args.tokenizers)
    found: dict[str, Any] = {"tokenizers": {"a": str(args.tokenizers[0]), "b": str(args.tokenizers[1])}}
    found |= compare(a, b, shown=args.shown)
    if args.text:
        found["compression"] = {"text": [str(t) for t in args.text]}
        for name, path, tokenizer in zip("ab", args.tokenizers, (a, b), strict=True):
            with ExitStack() as bars:
                on_text = measure(
                    tokenizer,
                    Inputs(args.text),
                    name=str(path),
                    longest=0,
                    errors=args.errors,
                    threads=args.threads,
                    progress=StageProgress(bars),
                )
            found["compression"][name] = {k: on_text[k] for k in ("bytes", "tokens", "bytes_per_token", "tokens_used")}
    print(json.dumps(found) if args.json else _summary(found))
    return 0


def _summary(f: dict[str, Any]) -> str:
    rows = [(side.upper(), f"{f['tokenizers'][side]}: {_make_up(f, side)}") for side in "ab"]
    rows.append(("merges", _parting(f)))
    shares = f"{100 * f['share_of_a']:.1f} % of A, {100 * f['share_of_b']:.1f} % of B"
    rows.append(("shared tokens", f"{f['shared_tokens']:,} ({shares})"))
    for side in "ab":
        only = f[f"only_in_{side}"]
        rows.append((f"only in {side.upper()}", f"{only['count']:,}"))
        rows += [(f"  {kind}", "  ".join(f"'{t}'" for t in only[kind])) for kind in ("longest", "first") if only[kind]]
    if on_text := f.get("compression"):
        rows += [(f"text with {s.upper()}", f"{on_text[s]['bytes_per_token']:.3f} bytes a token") for s in "ab"]
        tokens, fewer = on_text["a"]["tokens"], on_text["a"]["tokens"] - on_text["b"]["tokens"]
        share = f" ({100 * abs(fewer) / tokens:.2f} % of A's)" if tokens else ""
        rows.append(("B makes", f"{abs(fewer):,} {'fewer' if fewer >= 0 else 'more'} tokens{share}"))
    return table(rows, indent="")


def _make_up(f: dict[str, Any], side: str) -> str:
    specials = ", ".join(f["special_tokens"][side]) or "none"
    return (
        f"{f['vocab_sizes'][side]:,} tokens, {f['merges'][side]:,} merges, {f['patterns'][side]}, special: {specials}"
    )


def _parting(f: dict[str, Any]) -> str:
    first = f["first_different_merge"]
    if first is None:
        return "the same" if f["same"] else "the same; ids, pattern or special tokens differ"
    if None in (first["a"], first["b"]):
        longer, shorter = ("B", "A") if first["a"] is None else ("A", "B")
        return f"{longer} begins with all {first['number'] - 1:,} of {shorter}, and goes on"
    sides = (f"{side.upper()} '{first[side][0]}' + '{first[side][1]}'" for side in "ab")
    return f"part at number {first['number']:,}: {', '.join(sides)}"
