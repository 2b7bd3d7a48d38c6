"""The page of `bpe-inspect --html`: the table, the scripts, and documents with their tokens coloured.

In: the dictionaries that `--json` prints, documents, tokenizers. Out: the text of one HTML file that needs nothing
else. It has no script at all: its policy (CSP) allows styles alone, and whatever comes from a text is escaped here.
Called by `cli_inspect`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from bytekiln._core import __version__
from bytekiln.inspect.documents import Documents
from bytekiln.inspect.pieces import Piece, pieces, visible
from bytekiln.inspect.tables import drawn, fewer, heads, interval, number, percent, rows_of
from bytekiln.tokenizer import Tokenizer

SHOWN = 5
"""Documents on a page."""
SHOWN_BYTES = 1200
"""Of a document, from its beginning."""
READ_BYTES = 1 << 16
"""Of a document that are encoded for it: a document may be megabytes."""
COLOURS = 6

Found = dict[str, Any]


def page(found: Sequence[Found], documents: Documents, tokenizers: Mapping[str, Tokenizer]) -> str:
    """The whole page; the order of `found` and `tokenizers` is the same."""
    style = (resources.files("bytekiln") / "inspect/page.css").read_text("utf-8")
    names = heads([f["tokenizer"] for f in found])
    title = f"{' and '.join(names) if len(names) < 3 else f'{len(names)} tokenizers'} on {', '.join(found[0]['text'])}"
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n",
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f'<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<div class="wrap">\n',
            f'<header>\n<h1>{escape(title)}</h1>\n<p class="faint">{escape(drawn(found))}</p>\n',
            f'<p class="answer">{escape(_answer(found, names))}</p>\n{_switches()}</header>\n<main>\n',
            _numbers(found, names),
            _scripts(found, names),
            _longest(found, names),
            _documents(documents, list(zip(names, tokenizers.values(), strict=True))),
            f'</main>\n<footer class="faint">Made by bpe-inspect of bytekiln {escape(__version__)}. Interval: '
            f"{escape(found[0]['documents']['interval_method'])}. A word is a run without white space. Scripts: "
            "Unicode’s property; a token in several is shared out by its bytes. A character is whole where no border "
            "between tokens runs through it.</footer>\n</div>\n</body>\n</html>\n",
        ]
    )


def _answer(found: Sequence[Found], names: Sequence[str]) -> str:
    first = found[0]["documents"]
    if first["bytes_per_token"] is None:
        return "There is no text to compress."
    said = f"{names[0]}: {number(first['bytes_per_token'])} bytes a token"
    if first["interval"]:
        said += f" (95 % interval {interval(first['interval'])})"
    for name, f in zip(names[1:], found[1:], strict=True):
        against = f["against_first"]
        said += f"; {name}: {fewer(against['tokens_ratio'], against['tokens_ratio_interval'], ' tokens')}"
    return said + "."


def _switches() -> str:
    themes = "".join(
        f'<label><input type="radio" name="theme" id="{id}"{" checked" if id == "auto" else ""}> {label}</label>'
        for id, label in (("auto", "theme of the system"), ("light", "light"), ("dark", "dark"))
    )
    ids = '<label><input type="checkbox" id="ids" checked> ids below the tokens</label>'
    return f'<fieldset class="switches">{themes}{ids}</fieldset>\n'


def _numbers(found: Sequence[Found], names: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in names)
    rows = "".join(
        f'<tr><th scope="row"{" class=sub" if name.startswith(" ") else ""}>{escape(name.strip())}</th>'
        + "".join(f"<td>{escape(cell(f))}</td>" for f in found)
        + "</tr>\n"
        for name, cell in rows_of(found)
    )
    return (
        f'<h2>Numbers</h2>\n<div class="scroll"><table>\n<thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
    )


def _scripts(found: Sequence[Found], names: Sequence[str]) -> str:
    scripts = found[0]["documents"]["scripts"]
    if not scripts:
        return ""
    over = "".join(f'<th scope="colgroup" colspan="4">{escape(n)}</th>' for n in names)
    kinds = ("bytes a token", "single-byte tokens", "whole characters", "in the vocabulary")
    under = "".join(f'<th scope="col" class="n">{k}</th>' for k in kinds) * len(found)
    rows = []
    for script, of_text in scripts.items():
        cells = [percent(of_text["share"], 2)]
        for f in found:
            s = f["documents"]["scripts"][script]
            cells += [number(s["bytes_per_token"], 2), percent(s["single_byte_share"])]
            cells += [percent(s["whole_character_share"]), f"{f['vocabulary_scripts'].get(script, 0):,}"]
        row = "".join(f'<td class="n">{escape(c)}</td>' for c in cells)
        rows.append(f'<tr><th scope="row">{escape(script)}</th>{row}</tr>\n')
    return (
        '<h2>Scripts</h2>\n<div class="scroll"><table>\n'
        f"<thead><tr><td></td><td></td>{over}</tr>\n"
        f'<tr><td></td><th scope="col" class="n">share of text</th>{under}</tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody></table></div>\n"
    )


def _longest(found: Sequence[Found], names: Sequence[str]) -> str:
    if not any(f["longest_tokens"] for f in found):
        return ""
    out = ["<h2>Longest tokens</h2>\n"]
    for name, f in zip(names, found, strict=True):
        tokens = "".join(f"<code>{escape(t)}</code>" for t in f["longest_tokens"])
        out.append(f'<h4>{escape(name)}</h4>\n<div class="longest">{tokens}</div>\n')
    return "".join(out)


def _documents(documents: Documents, tokenizers: Sequence[tuple[str, Tokenizer]]) -> str:
    count = len(documents.texts)
    if not count:
        return '<h2>Tokens</h2>\n<p class="faint">No document has any text.</p>\n'
    which = sorted(random.Random(documents.seed).sample(range(count), min(SHOWN, count)))
    parts = [
        '<h2>Tokens</h2>\n<p class="faint">',
        f"{len(which)} of the {count:,} documents, drawn with seed {documents.seed}, from their beginning. "
        if count > 1
        else "",
        "The pointer shows a token’s id and place; the id stands below it too. · is a space, ⏎ a newline, ⇥ a tab; "
        r"\u200d and the like are characters that cannot be seen, <b>\xe7\xb2</b> bytes that are no whole character.",
        "</p>\n",
    ]
    for k in which:
        text = documents.texts[k]
        beginning = f", the first {SHOWN_BYTES:,} shown" if len(text) > SHOWN_BYTES else ""
        parts.append(f'<h3>Document {k + 1:,} <span class="faint">{len(text):,} bytes{beginning}</span></h3>\n')
        for name, tokenizer in tokenizers:
            tokens = [p for p in pieces(tokenizer, text[:READ_BYTES], errors="bytes") if p.start < SHOWN_BYTES]
            parts += [
                f'<h4>{escape(name)} <span class="faint">{len(tokens):,} tokens</span></h4>\n<div class="tokens">',
                *(_token(p, n) for n, p in enumerate(tokens)),
                "</div>\n",
            ]
    return "".join(parts)


TAGS = {"text": ("", ""), "mark": ("<i>", "</i>"), "byte": ("<b>", "</b>")}


def _token(piece: Piece, place: int) -> str:
    shown = "".join(f"{TAGS[kind][0]}{escape(s)}{TAGS[kind][1]}" for kind, s in visible(piece.token))
    size = len(piece.token)
    title = f"id {piece.id}, {size} {'byte' if size == 1 else 'bytes'} from {piece.start}"
    line = "<br>" if piece.token.endswith(b"\n") else ""
    return f'<span class="t c{place % COLOURS}" title="{title}">{shown}<small>{piece.id}</small></span>{line}'
