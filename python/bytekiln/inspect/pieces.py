"""Tokens of a text so that they can be seen: white space as marks, parts of characters as bytes.

In: a tokenizer and a text. Out: `Piece`s, and what is shown of each. Called by `inspect.show` and `inspect.page`.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Literal, NamedTuple

from bytekiln.characters import AnyTokenizer, CharTokenizer
from bytekiln.errors import TextError

if TYPE_CHECKING:
    from bytekiln.tokenizer import TextPolicy

MARKS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
PLAIN_MARKS = {" ": " ", "\n": r"\n", "\t": r"\t", "\r": r"\r"}
"""For a terminal that has no other."""


class Piece(NamedTuple):
    """A token at its place."""

    id: int
    token: bytes
    start: int
    """Where it begins, in bytes of the text."""
    special: bool

    @property
    def text(self) -> str | None:
        """Its text; None where it is not whole characters."""
        try:
            return self.token.decode()
        except UnicodeDecodeError:
            return None


def pieces(
    tokenizer: AnyTokenizer, data: bytes, *, errors: TextPolicy = "error", allow_special: bool = False
) -> list[Piece]:
    """The tokens of a text, in order.

    Args:
        tokenizer: byte-level BPE, or one of characters.
        data: the text, UTF-8.
        errors: what becomes of bytes that are not.
        allow_special: whether special tokens are recognised; else they are text, as in `encode`.

    Raises:
        TextError: invalid UTF-8 that is not allowed, or a character that a tokenizer of characters does not have.
    """
    special: set[int] = set()
    if isinstance(tokenizer, CharTokenizer):
        try:
            ids = tokenizer.encode(data.decode())
        except UnicodeDecodeError as error:
            raise TextError(f"byte offset {error.start}: invalid UTF-8; expected text") from None
    else:
        special = set(tokenizer.special_tokens.values())
        ids = tokenizer.encode_bytes(data, errors=errors, allowed_special="all" if allow_special else ())
    out, start = [], 0
    for id in ids:
        token = tokenizer.id_to_token(id)
        out.append(Piece(id, token, start, id in special))
        start += len(token)
    return out


Kind = Literal["text", "mark", "byte"]


def visible(token: bytes, marks: dict[str, str] = MARKS) -> list[tuple[Kind, str]]:
    r"""What is shown of a token, in stretches of a kind.

    `text` is as it is, `mark` stands for white space and for characters that cannot be seen, `byte` for bytes that are
    no whole character. A combining mark at the beginning gets a circle to sit on: it would sit on the token before.

    >>> visible(b" kiln\n"), visible(b" \xe7\xb2"), visible("\u200d".encode())
    ([('mark', '·'), ('text', 'kiln'), ('mark', '⏎')], [('mark', '·'), ('byte', '\\xe7\\xb2')], [('mark', '\\u200d')])
    """
    out: list[tuple[Kind, str]] = []
    for place, c in enumerate(token.decode("utf-8", "surrogateescape")):
        kind, shown = _shown(c, marks)
        if place == 0 and unicodedata.combining(c):
            shown = "◌" + shown
        if out and out[-1][0] == kind:
            out[-1] = kind, out[-1][1] + shown
        else:
            out.append((kind, shown))
    return out


def _shown(c: str, marks: dict[str, str]) -> tuple[Kind, str]:
    if c in marks:
        return "mark", marks[c]
    if "\udc80" <= c <= "\udcff":
        return "byte", f"\\x{ord(c) - 0xDC00:02x}"
    if not c.isprintable():
        return "mark", ascii(c)[1:-1]
    return "text", c
