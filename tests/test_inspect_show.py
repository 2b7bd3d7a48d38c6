"""`bpe-inspect show`: tokens as a person sees them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bytekiln
from bytekiln.characters import CharTokenizer
from bytekiln.errors import TextError
from bytekiln.inspect.pieces import pieces, visible

EOT = "<|endoftext|>"
TEXT = "the kiln is warm"
TOKENIZER = bytekiln.train_bpe_from_iterator([TEXT] * 3, vocab_size=270, special_tokens=[EOT])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


@given(st.text() | st.binary())
def test_pieces_are_the_text(text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    found = pieces(TOKENIZER, data, errors="bytes")
    assert b"".join(p.token for p in found) == data
    assert all(data[p.start :].startswith(p.token) for p in found)
    assert all("\n" not in shown and "\x1b" not in shown for p in found for _, shown in visible(p.token))


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b" the", [("mark", "·"), ("text", "the")]),
        (b"\r\n\t", [("mark", "␍⏎⇥")]),
        ("粘".encode()[:2], [("byte", r"\xe7\xb2")]),
        ("é粘".encode()[:3], [("text", "é"), ("byte", r"\xe7")]),
        ("\u0301a".encode(), [("text", "◌\u0301a")]),
        (b"\x1b[31m", [("mark", r"\x1b"), ("text", "[31m")]),
        ("\u202eabc".encode(), [("mark", r"\u202e"), ("text", "abc")]),
        (b"", []),
    ],
)
def test_what_is_seen_of_a_token(token: bytes, shown: list) -> None:
    assert visible(token) == shown


def test_tokens_and_ids_stand_below_each_other(command, own: Path) -> None:
    """Through a pipe: bars instead of colours."""
    head, tokens, ids = (
        command("bpe-inspect", "show", "the kiln\nis wet").stdout.splitlines()[0:1]
        + command("bpe-inspect", "show", "the kiln is wet").stdout.splitlines()[1:]
    )
    expected = TOKENIZER.encode("the kiln is wet")
    assert ids == "ids  " + " ".join(map(str, expected))
    assert tokens.replace("·", " ").split("│") == [TOKENIZER.id_to_token(i).decode() for i in expected]
    assert f"{len(TOKENIZER.encode('the kiln' + chr(10) + 'is wet'))} tokens, 15 bytes" in head


def test_lines_stay_lines(command, own: Path) -> None:
    said = command("bpe-inspect", "show", "the\nkiln").stdout
    assert "⏎\n" in said and "\x1b" not in said


def test_json(command, own: Path) -> None:
    found = json.loads(command("bpe-inspect", "show", f"warm é粘{EOT}", "--json").stdout)
    data = f"warm é粘{EOT}".encode()
    assert found["ids"] == TOKENIZER.encode(data.decode()) and found["bytes"] == len(data)
    assert found["tokens"] == len(found["ids"]) == len(found["pieces"])
    assert found["bytes_per_token"] == found["bytes"] / found["tokens"]
    for piece in found["pieces"]:
        token = TOKENIZER.id_to_token(piece["id"])
        assert bytes.fromhex(piece["bytes"]) == token == data[piece["start"] :][: len(token)]
        assert piece["text"] == (token.decode() if token.isascii() else None) and not piece["special"]
    found = json.loads(command("bpe-inspect", "show", f"warm{EOT}", "--allow-special", "--json").stdout)
    assert found["pieces"][-1] == {
        "id": TOKENIZER.eot_id, "text": EOT, "bytes": EOT.encode().hex(), "start": 4, "special": True,
    }  # fmt: skip


def test_several_tokenizers(command, own: Path, tmp_path: Path) -> None:
    bytekiln.train_bpe_from_iterator([""], vocab_size=256).save(tmp_path / "bytes.json")
    CharTokenizer(TEXT).save(tmp_path / "letters.json")
    names = ["tokenizer.json", "bytes.json", "letters.json"]
    said = command("bpe-inspect", "show", *names, TEXT).stdout
    assert [block.split("  ")[0] for block in said.split("\n\n")] == names
    found = json.loads(command("bpe-inspect", "show", *names[:2], TEXT, "--tokenizer", names[2], "--json").stdout)
    assert sorted(f["tokenizer"] for f in found) == sorted(names) and {f["bytes"] for f in found} == {16}
    assert sorted(f["tokens"] for f in found)[1:] == [16, 16]


def test_empty_text(command, own: Path) -> None:
    assert command("bpe-inspect", "show", "").stdout == "0 tokens, 0 bytes\n"
    found = json.loads(command("bpe-inspect", "show", "", "--json").stdout)
    assert (found["tokens"], found["ids"], found["bytes_per_token"]) == (0, [], None)


def test_standard_input(command, own: Path) -> None:
    data = b"warm\xff"
    assert "byte offset 4" in command("bpe-inspect", "show", "-", stdin=_pipe(data), status=2).stderr
    for policy, shown in (("replace", "\\xef"), ("bytes", "\\xff")):
        assert shown in command("bpe-inspect", "show", "-", "--errors", policy, stdin=_pipe(data)).stdout


def _pipe(data: bytes) -> int:
    ours, theirs = os.pipe()
    os.write(theirs, data)
    os.close(theirs)
    return ours


def test_a_tokenizer_of_characters_says_what_it_lacks() -> None:
    with pytest.raises(TextError, match="byte offset 1"):
        pieces(CharTokenizer("ab"), b"a\xff")
    with pytest.raises(TextError, match=r"U\+0063"):
        pieces(CharTokenizer("ab"), b"abc")


def test_a_terminal_without_the_marks(command, own: Path) -> None:
    said = command("bpe-inspect", "show", "the kiln\nis", env={"PYTHONIOENCODING": "ascii"}).stdout
    assert "?" not in said and "|" in said and r"\n" in said


def on_a_terminal(folder: Path, **env: str) -> str:
    """What `show` writes to a terminal."""
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    subprocess.run(
        [sys.executable, "-m", "bytekiln.cli", "bpe-inspect", "show", "the kiln is warm"],
        cwd=folder, env={**clean, "TERM": "xterm-256color", **env}, stdout=theirs, check=True, timeout=60,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while more := os.read(ours, 65536):
            said += more
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    return said.decode()


def test_neighbours_have_different_colours(own: Path, tmp_path: Path) -> None:
    said = on_a_terminal(tmp_path).splitlines()
    expected = TOKENIZER.encode("the kiln is warm")
    for line in said[1:3]:
        colours = [part.split("m")[0] for part in line.split("\x1b[") if part.startswith("48;5;")]
        assert len(colours) == len(expected) and all(a != b for a, b in pairwise(colours))
    for quiet in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        said_plainly = on_a_terminal(tmp_path, **quiet)
        assert "\x1b" not in said_plainly and "│" in said_plainly


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no text", "bpe-inspect show"]),
        (["tokenizer.json"], ["tokenizer.json", "TEXT"]),
        (["none.json", "text"], ["none.json", "no such file"]),
        (["corpus.txt", "text"], ["corpus.txt"]),
        (["text", "--colour"], ["--colour"]),
        (["tokenizer.json", "\udcff"], ["UTF-8"]),
    ],
)
def test_what_is_refused(command, own: Path, corpus: Path, arguments: list[str], words: list[str]) -> None:
    said = command("bpe-inspect", "show", *arguments, status=2).stderr
    assert all(word in said for word in words), said


def test_without_a_tokenizer(command) -> None:
    said = command("bpe-inspect", "show", "the kiln", status=2).stderr
    assert "no tokenizer" in said and "./tokenizer.json" in said
