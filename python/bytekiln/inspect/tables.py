"""What `bpe-inspect` prints: tokenizers as the columns of one table, scripts below it.

In: the dictionaries that `--json` prints. Out: text. Called by `cli_inspect`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bytekiln.console import human_bytes, table

SHORT_BYTES = 1_000_000
"""Below this the speed is mostly that of starting up."""
SCRIPTS = 12
"""Scripts that are listed; `--json` has all of them."""
NAME = 28
"""Characters of a tokenizer's name in a head."""
NONE = "–"
"""Where there is nothing to divide by."""

Found = dict[str, Any]
"""What was measured of a tokenizer; the keys are those of `--json`."""


def heads(names: Sequence[str]) -> list[str]:
    """Names as short as they can be told apart by, from their ends.

    >>> heads(["demo/tokenizer.json", "gpt2/tokenizer.json", "x/own.json"])
    ['demo/tokenizer.json', 'gpt2/tokenizer.json', 'own.json']
    """
    out = []
    for name in names:
        parts = Path(name).parts
        others = [Path(n).parts for n in names if n != name]
        length = next((k for k in range(1, len(parts)) if all(o[-k:] != parts[-k:] for o in others)), len(parts))
        short = str(Path(*parts[-length:]))
        out.append(short if len(short) <= NAME else "…" + short[1 - NAME :])
    return out


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A number, or a dash.

    >>> number(3.41159), number(None), number(-0.5, 2, sign=True)
    ('3.412', '–', '-0.50')
    """
    if value is None:
        return NONE
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent, or a dash.

    >>> percent(0.0213), percent(None)
    ('2.1 %', '–')
    """
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def interval(ends: Sequence[float] | None, digits: int = 3, *, sign: bool = False) -> str:
    """Both ends, or why there are none."""
    if ends is None:
        return "none: fewer than two documents"
    return " to ".join(number(e, digits, sign=sign) for e in ends)


def fewer(ratio: float | None, ends: Sequence[float] | None, what: str = "") -> str:
    """How many tokens more or fewer than the first makes.

    >>> fewer(0.9, (0.88, 0.92)), fewer(1.25, None)
    ('10.0 % fewer (12.0 to 8.0)', '25.0 % more')
    """
    if ratio is None:
        return NONE
    way = 1 if ratio >= 1 else -1
    both = f" ({' to '.join(number(100 * way * (e - 1), 1) for e in ends)})" if ends else ""
    return f"{abs(100 * (ratio - 1)):.1f} % {'more' if way > 0 else 'fewer'}{what}{both}"


Row = tuple[str, Callable[[Found], str]]


def rows_of(found: Sequence[Found]) -> list[Row]:
    """The table's rows: a name, and what stands in a tokenizer's column. The page has the same."""
    rows: list[Row] = [
        ("compression", lambda f: _per_token(f["documents"]["bytes_per_token"])),
        ("  95 % interval", lambda f: interval(f["documents"]["interval"])),
    ]
    if len(found) > 1:
        rows += [
            ("  against the first", lambda f: _gained(f.get("against_first"))),
            ("  tokens", lambda f: _fewer(f.get("against_first"))),
        ]
    kinds = [kind for kind in found[0]["vocabulary"] if any(f["vocabulary"][kind] for f in found)]
    return [
        *rows,
        ("tokens a word", lambda f: number(f["documents"]["tokens_per_word"], 2)),
        ("single-byte tokens", lambda f: percent(f["documents"]["single_byte_share"])),
        ("parts of characters", lambda f: percent(f["documents"]["part_of_character_share"])),
        ("vocabulary", lambda f: f"{f['vocab_size']:,} tokens"),
        *((f"  {kind.replace('_', ' ')}", _of_kind(kind)) for kind in kinds),
        ("pattern", lambda f: f["pattern"] if len(f["pattern"]) <= NAME else f["pattern"][: NAME - 1] + "…"),
        ("whole text", lambda f: f"{f['tokens']:,} tokens, {number(f['bytes_per_token'])} bytes each"),
        ("  used here", lambda f: f"{f['tokens_used']:,} different"),
        ("speed", lambda f: f"{human_bytes(f['bytes_per_second'])}/s"),
        ("the Pile (825 GB)", lambda f: NONE if f["pile_hours"] is None else f"{f['pile_hours']:.1f} h at this speed"),
    ]


def _per_token(value: float | None) -> str:
    return NONE if value is None else f"{number(value)} bytes a token"


def _of_kind(kind: str) -> Callable[[Found], str]:
    return lambda f: f"{f['vocabulary'][kind]:,}"


def _gained(against: Found | None) -> str:
    if against is None:
        return ""
    ends = against["interval"]
    return number(against["bytes_per_token"], sign=True) + (f" ({interval(ends, sign=True)})" if ends else "")


def _fewer(against: Found | None) -> str:
    return fewer(against["tokens_ratio"], against["tokens_ratio_interval"]) if against else ""


def drawn(found: Sequence[Found]) -> str:
    """Which documents were compared, in a sentence."""
    d = found[0]["documents"]
    much = f"{d['count']:,} {'document' if d['count'] == 1 else 'documents'} with {human_bytes(d['bytes'])} of text"
    if not d["count"]:
        return "no document has any text"
    if d["drawn"] == "beginning":
        return f"the text’s beginning, {much}: its documents are too long to draw some"
    every = "all" if d["share"] == 1 else f"a sample of {percent(d['share'], 2)}, seed {d['seed']}"
    return f"{much} ({every})"


def summary(found: Sequence[Found]) -> str:
    """What is printed without `--json`."""
    names = heads([f["tokenizer"] for f in found])
    out = [f"{', '.join(f['tokenizer'] for f in found)} on {', '.join(found[0]['text'])}", f"  {drawn(found)}"]
    head = [("", *names)] if len(found) > 1 else []
    out.append(table([*head, *((name, *map(cell, found)) for name, cell in rows_of(found))]))
    if found[0]["bytes"] < SHORT_BYTES:
        out.append(f"  (a short text: the speed is that of starting up; measure on {human_bytes(SHORT_BYTES)} or more)")
    width = max(map(len, names))
    for k, (name, f) in enumerate(zip(names, found, strict=True)):
        if f["longest_tokens"]:
            title = "longest tokens" if k == 0 else " " * 14
            which = f"{name.ljust(width)}  " if len(found) > 1 else ""
            out.append(f"  {title}  {which}" + "  ".join(f"'{t}'" for t in f["longest_tokens"]))
    return "\n".join(out + _scripts(found, names))


def _scripts(found: Sequence[Found], names: Sequence[str]) -> list[str]:
    scripts = list(found[0]["documents"]["scripts"])
    if not scripts:
        return []
    what = ("bytes a token", "single bytes", "whole characters")
    one = len(found) == 1
    rows = [("by script", "of text", *(what if one else names))]
    for script in scripts[:SCRIPTS]:
        cells: list[str] = []
        for f in found:
            s = f["documents"]["scripts"][script]
            three = (
                number(s["bytes_per_token"], 2),
                percent(s["single_byte_share"]),
                percent(s["whole_character_share"]),
            )
            cells += three if one else ["  ".join(three)]
        rows.append((f"  {script}", percent(found[0]["documents"]["scripts"][script]["share"], 2), *cells))
    out = [table(rows)]
    if not one:
        out.append(f"  each: {', '.join(what)}")
    if len(scripts) > SCRIPTS:
        out.append(f"  {len(scripts) - SCRIPTS} more scripts in --json")
    return out
