"""What `bpe-train` does beyond one vocabulary: sizes, extension, limits, statistics, progress, texts without words."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bytekiln
from bytekiln import _core
from conftest import Result

EOT = "<|endoftext|>"


def read(path: Path) -> bytekiln.Tokenizer:
    return bytekiln.Tokenizer.from_file(path)


# --- several sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_break", ["lexicographic", "huggingface"])
def test_each_size_is_what_it_is_alone(command, corpus: Path, tmp_path: Path, tie_break: str) -> None:
    line = [corpus, "--special-token", EOT, "--tie-break", tie_break]
    said = command("bpe-train", *line, "--vocab-size", "300,270,0.28k", "--out", "t.json").stdout
    for spelt, size in (("300", 300), ("270", 270), ("0.28k", 280)):
        command("bpe-train", *line, "--vocab-size", size, "--out", "alone.json", "--overwrite")
        assert (tmp_path / f"t-{spelt}.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
        assert f"wrote t-{spelt}.json\n" in said


def test_sizes_beyond_what_the_text_gives(command, corpus: Path, tmp_path: Path) -> None:
    run = command("bpe-train", corpus, "--vocab-size", "300,1M,2M", "--out", "t.json", "--json")
    found = json.loads(run.stdout)
    most = found["vocab_size"]
    assert [t["vocab_size"] for t in found["tokenizers"]] == [300, most, most]
    assert [t["requested_vocab_size"] for t in found["tokenizers"]] == [300, 1_000_000, 2_000_000]
    assert run.stderr.count("\n") == 1 and f"stopped at {most} tokens" in run.stderr and "(2000000 were" in run.stderr
    assert (tmp_path / "t-1M.json").read_bytes() == (tmp_path / "t-2M.json").read_bytes()


def test_names_of_several_outputs(command, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    command("bpe-train", corpus, "--vocab-size", "0.3k,270", "--out", "x/kiln-{size}-tokens.json")
    command("bpe-train", corpus, "--vocab-size", "270", "--out", "x/{size}.json")
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"kiln-0.3k-tokens.json", "kiln-270-tokens.json", "270.json"}


def test_one_output_that_is_there_stops_all_of_them(command, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "t-300.json").write_text("mine")
    said = command("bpe-train", corpus, "--vocab-size", "0.27k,300", "--out", "t.json", status=2).stderr
    assert "t-300.json" in said and "--overwrite" in said
    assert {p.name for p in tmp_path.iterdir()} == {"corpus.txt", "t-300.json"}
    command("bpe-train", corpus, "--vocab-size", "0.27k,300", "--out", "t.json", "--overwrite")
    assert read(tmp_path / "t-300.json").n_vocab == 300


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("300,0.3k", ["same size twice"]),
        ("300,400", ["one size or several", "300400"]),
        ("300,", ["--vocab-size"]),
        ("100,8k", ["100", "at least 256"]),
    ],
)
def test_sizes_that_cannot_be(command, corpus: Path, sizes: str, words: list[str]) -> None:
    said = command("bpe-train", corpus, "--vocab-size", sizes, "--out", "t.json", status=2).stderr
    assert all(word in said for word in words), said


def test_thousands_are_still_one_size(command, corpus: Path, tmp_path: Path) -> None:
    command("bpe-train", corpus, "--vocab-size", "10,000", "--out", "t.json")
    assert (tmp_path / "t.json").exists()


def test_white_space_between_sizes_is_in_no_name(command, corpus: Path, tmp_path: Path) -> None:
    command("bpe-train", corpus, "--vocab-size", "270, 0.3k", "--out", "t.json")
    assert {p.name for p in tmp_path.glob("t*")} == {"t-270.json", "t-0.3k.json"}


def test_several_sizes_in_python(corpus: Path) -> None:
    small, large = bytekiln.train_bpe(corpus, vocab_size=[270, 300])
    assert large.hash == bytekiln.train_bpe(corpus, vocab_size=300).hash
    assert small.merges == large.merges[:14]


# --- going on from a tokenizer -----------------------------------------------------------------------------


def test_extended_on_its_own_text_it_is_trained_at_once(command, corpus: Path, tmp_path: Path) -> None:
    line = ["bpe-train", corpus, "--special-token", EOT, "--pattern", "cl100k", "--tie-break", "huggingface"]
    command(*line, "--vocab-size", "290", "--out", "small.json")
    command(*line, "--vocab-size", "320", "--out", "at_once.json")
    more = ["--extend", "small.json", "--tie-break", "huggingface", "--vocab-size", "290,0.3k,320"]
    found = json.loads(command("bpe-train", corpus, *more, "--out", "more.json", "--json").stdout)
    assert (found["prior_merges"], found["merges"], found["requested_merges"]) == (33, 30, 30)
    small, at_once, more = (read(tmp_path / name) for name in ("small.json", "at_once.json", "more-320.json"))
    assert more.merges == at_once.merges and more.n_vocab == 320 and more.pattern == "cl100k"
    # What was encoded stays readable: old ids are kept, the special token's too.
    assert small.vocab.items() <= more.vocab.items() and more.eot_id == small.eot_id == 289
    assert more.vocab[290] == at_once.vocab[289]
    assert read(tmp_path / "more-290.json").hash == small.hash
    text = corpus.read_text(encoding="utf-8")
    assert more.decode(more.encode(text, allowed_special="all")) == text


def test_extended_on_other_text(tmp_path: Path) -> None:
    """The words are the tokens that the tokenizer makes of them; ids that are not ours do not matter."""
    letters = {i: bytes([255 - i]) for i in range(256)}
    more = {256: b"<end>", 257: b"ab", 258: b"abc"}
    old = bytekiln.Tokenizer.from_vocab_and_merges({**letters, **more}, [(b"a", b"b"), (b"ab", b"c")])
    new = bytekiln.train_bpe_from_iterator(["abcabc abd abd abd"], vocab_size=261, extend=old)
    assert new.merges == [(b"a", b"b"), (b"ab", b"c"), (b"ab", b"d"), (b" ", b"abd")]
    assert new.vocab[259] == b"abd" and new.vocab[260] == b" abd" and new.special_tokens == {"<end>": 256}
    assert new.encode("abcabd") == [258, 259]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--special-token", "<x>"], ["<x>", EOT, "tokenizer to extend"]),
        (["--pattern", "o200k"], ["o200k", "gpt2", "tokenizer to extend"]),
        (["--vocab-size", "280"], ["280", "at least 290"]),
        (["--extend", "none.json"], ["none.json", "no such file"]),
        (["--extend", "odd.json"], ["odd.json", "never reached", "abc"]),
        (["--extend", "twice.json"], ["twice.json", "again", "abc"]),
        (["--out", "small.json", "--overwrite"], ["small.json", "one of the inputs"]),
    ],
)
def test_what_cannot_be_extended(command, corpus: Path, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    command("bpe-train", corpus, "--special-token", EOT, "--vocab-size", "290", "--out", "small.json")
    letters = {i: bytes([i]) for i in range(256)}
    more, merges = {256: b"ab", 257: b"bc", 258: b"abc"}, [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")]
    odd = bytekiln.Tokenizer.from_vocab_and_merges({**letters, **more}, merges)
    odd.save(tmp_path / "odd.json")
    twice = bytekiln.Tokenizer.from_vocab_and_merges({**letters, **more}, [*merges, (b"ab", b"c")])
    twice.save(tmp_path / "twice.json")
    line = [corpus, "--extend", "small.json", "--vocab-size", "300", "--out", "t.json", *flags]
    said = command("bpe-train", *line, status=2).stderr
    assert all(word in said for word in words), said
    assert not (tmp_path / "t.json").exists()


def test_the_same_special_tokens_and_pattern_may_be_said_again(command, corpus: Path, tmp_path: Path) -> None:
    command("bpe-train", corpus, "--special-token", EOT, "--vocab-size", "290", "--out", "small.json")
    line = [corpus, "--special-token", EOT, "--pattern", "gpt2", "--vocab-size", "300"]
    command("bpe-train", *line, "--extend", "small.json", "--out", "t.json")
    assert read(tmp_path / "t.json").n_vocab == 300


# --- limits ------------------------------------------------------------------------------------------------


def test_limits_of_frequency_and_length(command, tmp_path: Path) -> None:
    # "ef" occurs six times, but in words that are rarer than four.
    (tmp_path / "t.txt").write_text("abcd " * 9 + "xef yef " * 3)
    run = command("bpe-train", "t.txt", "--vocab-size", "300", "--min-frequency", "4", "--out", "f.json", "--json")
    assert [t for t in read(tmp_path / "f.json").vocab.values() if len(t) > 1] == [b"cd", b"bcd", b"abcd", b" abcd"]
    assert "that occurs 4 times or more" in run.stderr and run.stderr.count("\n") == 1
    found = json.loads(run.stdout)
    assert found["distinct_pretokens"] > found["kept_pretokens"] == 1
    assert found["top_merges"][0] == {"left": "c", "right": "d", "count": 8}
    run = command("bpe-train", "t.txt", "--vocab-size", "300", "--max-token-length", "3", "--out", "l.json")
    tokens = read(tmp_path / "l.json").vocab.values()
    assert max(map(len, tokens)) == 3 and b"bcd" in tokens
    assert "within 3 bytes a token" in run.stderr


@pytest.mark.parametrize("flag", ["--min-frequency", "--max-token-length"])
def test_limits_that_are_none(command, corpus: Path, flag: str) -> None:
    said = command("bpe-train", corpus, "--vocab-size", "300", "--out", "t.json", flag, "0", status=2).stderr
    assert flag in said and "1 or more" in said


# --- what is said ------------------------------------------------------------------------------------------


def test_statistics_are_printed_and_saved(command, corpus: Path, tmp_path: Path) -> None:
    """Seed 003: time, peak memory, longest token."""
    line = [corpus, "--vocab-size", "300", "--special-token", EOT, "--out", "t.json", "--stats", "s.json"]
    found = json.loads(command("bpe-train", *line, "--json").stdout)
    assert found == json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    phases = [found[key] for key in ("count_s", "layout_s", "merge_s", "save_s")]
    assert all(s > 0 for s in phases) and sum(phases) <= found["seconds"]
    assert found["peak_memory_bytes"] > 1_000_000
    tokens = read(tmp_path / "t.json").vocab.values()
    assert (
        found["longest_token_bytes"] == len(found["longest_token"]) == max(len(t) for t in tokens if t != EOT.encode())
    )
    assert len(found["top_merges"]) == 10 and 0 < found["ties"] <= found["merges"] == 43
    counts = [m["count"] for m in found["top_merges"]]
    assert counts == sorted(counts, reverse=True)
    first = read(tmp_path / "t.json").merges[0]
    assert (found["top_merges"][0]["left"], found["top_merges"][0]["right"]) == tuple(t.decode() for t in first)
    assert found["top_merges"][0]["count"] == corpus.read_text(encoding="utf-8").count(
        "".join(map(bytes.decode, first))
    )
    assert found["distinct_pretokens"] == found["kept_pretokens"] > 10
    assert (
        found["simd_level"] in ("scalar", "avx2", "avx512", "avx512-vbmi2", "neon")
        and found["unicode_version"].count(".") == 2
    )
    assert "s.json" in command("bpe-train", *line, "--out", "u.json", status=2).stderr
    out = command("bpe-train", *line, "--overwrite").stdout
    for row in ("tokens", "text", "time", "peak memory", "longest token", "first merges", "ties", "with"):
        assert re.search(rf"^  {row} +\S", out, re.M), out


def test_a_giant_token_is_cut_when_it_is_printed(command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 2**20)
    out = command("bpe-train", "a.txt", "--vocab-size", "276", "--out", "t.json").stdout
    assert len(out) < 2000 and "…' (1,048,576 bytes)" in out
    found = json.loads(command("bpe-train", "a.txt", "--vocab-size", "276", "--out", "u.json", "--json").stdout)
    assert found["longest_token_bytes"] == 2**20 and len(found["longest_token"]) == 1000
    assert len(command("bpe-inspect", "t.json", "--text", "a.txt").stdout) < 2000


def many_words(path: Path, count: int) -> Path:
    words = np.random.default_rng(0).integers(97, 123, size=(count, 8), dtype=np.uint8)
    words[:, 0] = 32
    path.write_bytes(words.tobytes())
    return path


ON_A_TERMINAL = """
import sys
from bytekiln import console
console.QUIET_S = 0  # nothing is shown of a job that ends sooner
from bytekiln.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    """Bytes, words, merges, the merge in work, time left: on a terminal, and not a word elsewhere."""
    many_words(tmp_path / "t.txt", 4_000_000)  # seconds, so that each stage is shown on the way
    line = [sys.executable, "-c", ON_A_TERMINAL, "bpe-train", "t.txt", "--vocab-size", "20k", "--out"]
    main, terminal = pty.openpty()
    env = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    p = subprocess.Popen([*line, "a.json"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=terminal, env=env)
    os.close(terminal)
    shown = b""
    while True:
        try:
            if select.select([main], [], [], 60)[0] and (block := os.read(main, 65536)):
                shown += block
                continue
        except OSError:  # the other end is closed
            pass
        break
    os.close(main)
    p.communicate(timeout=60)
    assert p.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"counting words.*MB/3\d\.\d MB.*words [\d,]+", text), text[:2000]
    assert re.search(r"merging pairs.*[\d,]+/19,744 merges +merging '.+' \+ '.+' × [\d,]+.*\d:\d\d:\d\d", text), text
    quiet = subprocess.run([*line, "b.json"], cwd=tmp_path, capture_output=True, check=True)
    assert quiet.stderr == b"" and quiet.stdout.count(b"\n") < 12


# --- texts without words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens", "why"),
    [
        (EOT * 3, 257, "nothing but special tokens"),
        ("\n", 257, "no pair of tokens is left to merge"),
        ("    \n\n\t  ", 257 + 6, "no pair of tokens is left to merge"),
        ("x", 257, "no pair of tokens is left to merge"),
    ],
)
def test_texts_without_words(command, tmp_path: Path, text: str, tokens: int, why: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    run = command("bpe-train", "t.txt", "--special-token", EOT, "--vocab-size", "9k", "--out", "t.json")
    assert run.stderr.count("\n") == 1 and why in run.stderr, run.stderr
    made = read(tmp_path / "t.json")
    assert made.n_vocab == tokens, made.merges
    assert made.decode(made.encode(text + "kiln é", allowed_special="all")) == text + "kiln é"


@pytest.mark.parametrize(
    ("text", "flags", "why"),
    [
        ("\n\n", [], ": the input holds no text ("),
        ('{"text": ""}\n', [], ": the input holds no text ("),
        ('{"text": "one document"}\n', ["--sample", "1e-9"], ": what was to be read of the input holds no text ("),
    ],
)
def test_records_without_text(command, tmp_path: Path, text: str, flags: list[str], why: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    run = command("bpe-train", "t.jsonl", *flags, "--vocab-size", "9k", "--out", "t.json")
    assert run.stderr.count("\n") == 1 and why in run.stderr, run.stderr


def test_no_text_at_all(command: object, tmp_path: Path) -> None:
    (tokenizer,), stats = _core.train_bpe_from_iterator(iter([]), vocab_size=300, special_tokens=[EOT])
    assert tokenizer.n_vocab == 257 and tokenizer.eot_id == 256
    assert (stats["pretokens"], stats["merges"], stats["requested_merges"], stats["ties"]) == (0, 0, 43, 0)
    assert bytekiln.train_bpe_from_iterator(["", b""], vocab_size=256).n_vocab == 256


def test_a_vocabulary_of_bytes_and_special_tokens(command, corpus: Path, tmp_path: Path) -> None:
    run: Result = command("bpe-train", corpus, "--special-token", EOT, "--vocab-size", "257", "--out", "t.json")
    assert run.stderr == "" and read(tmp_path / "t.json").n_vocab == 257
    said = command("bpe-train", corpus, "--special-token", EOT, "--vocab-size", "256", "--out", "u.json", status=2)
    assert "found 256; expected at least 257" in said.stderr
