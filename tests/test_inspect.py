"""`bpe-inspect` on documents: which are drawn, what is counted in them, how sure it is, what the user reads."""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import Inputs
from bytekiln.cli_inspect import inspect
from bytekiln.errors import TextError
from bytekiln.inspect.compression import as_json, compress, difference, read_text, vocabulary_scripts
from bytekiln.inspect.documents import Documents, read_documents, separator_of
from bytekiln.inspect.ratio import ratio
from bytekiln.inspect.scripts import LABELS, ScriptTable
from bytekiln.inspection import _different, bare_token

EOT = "<|endoftext|>"
TEXTS = [
    "the kiln is warm and the clay is wet",
    "Ton und Öfen, heiß; 17 Töpfe",
    "глина тёплая, и печь горит",
    "粘土は温かい。かまど",
    "e\u0301te\u0301 \U0001f525\U0001f3fa!",
    "the kiln, the kiln, the kiln\n\nis wet 粘土",
]
TOKENIZER = bytekiln.train_bpe_from_iterator(TEXTS * 3, vocab_size=330, special_tokens=[EOT])
BYTES_ONLY = bytekiln.train_bpe_from_iterator([""], vocab_size=256)
TABLE = ScriptTable()


def documents(texts: list[bytes]) -> Documents:
    return Documents(texts, 1.0, "all", 0, EOT)


# --- what is counted: the slow version -----------------------------------------------------------------------


def characters(document: bytes) -> list[tuple[bytes, str]]:
    """Each character's bytes and script; stray bytes stand alone."""
    out: list[tuple[bytes, str]] = []
    for c in document.decode("utf-8", "surrogateescape"):
        script = "no UTF-8" if "\ud800" <= c <= "\udfff" else script_by_regex(c)
        if script == "Inherited":
            script = out[-1][1] if out else "Common"
        out.append((c.encode("utf-8", "surrogateescape"), script))
    return out


def script_by_regex(c: str) -> str:
    names = [n for n in LABELS[:-2] if regex.match(rf"\p{{Script={n.replace(' ', '_')}}}", c)]
    return names[0] if names else "Unknown"


def slowly(tokenizer: bytekiln.Tokenizer, texts: list[bytes]) -> dict:
    """Every count, token by token and character by character."""
    tokens = words = single = parts = 0
    of_tokens: Counter = Counter()
    of_single: Counter = Counter()
    of_bytes: Counter = Counter()
    of_characters: Counter = Counter()
    split: Counter = Counter()
    for document in texts:
        ids = tokenizer.encode_bytes(document, errors="bytes")
        tokens += len(ids)
        words += len(document.decode("utf-8", "surrogateescape").split())
        inside: list[tuple[int, str]] = []  # of each byte: the number of its character, its script
        for k, (c, script) in enumerate(characters(document)):
            inside += [(k, script)] * len(c)
            of_characters[script] += 1
            of_bytes[script] += len(c)
        broken = set()
        at = 0
        for id in ids:
            size = len(tokenizer.id_to_token(id))
            single += size == 1
            for k in range(at, at + size):
                of_tokens[inside[k][1]] += Fraction(1, size)
            of_single[inside[at][1]] += size == 1
            cut = {inside[b][0] for b in (at, at + size) if 0 < b < len(inside) and inside[b - 1][0] == inside[b][0]}
            parts += bool(cut)
            broken |= {(k, next(s for n, s in inside if n == k)) for k in cut}
            at += size
        for _, script in broken:
            split[script] += 1
    return {
        "tokens": tokens,
        "words": words,
        "single_byte_share": single / tokens,
        "part_of_character_share": parts / tokens,
        "scripts": {
            s: {
                "bytes": of_bytes[s],
                "characters": of_characters[s],
                "bytes_per_token": float(of_bytes[s] / of_tokens[s]),
                "single_byte_share": float(of_single[s] / of_tokens[s]),
                "whole_character_share": 1 - split[s] / of_characters[s],
            }
            for s in of_bytes
        },
    }


PIECES = st.sampled_from([t.encode() for t in TEXTS] + [b"\xff", b"\xe7\xb2", b"\xcc\x81", b" ", b"k", "粘".encode()])
DOCUMENTS = st.lists(st.lists(PIECES, min_size=1, max_size=6).map(b"".join), min_size=1, max_size=6)


@settings(max_examples=30)
@given(DOCUMENTS, st.sampled_from([TOKENIZER, BYTES_ONLY]), st.sampled_from([1, 100, 1 << 20]))
def test_every_count_is_that_of_the_slow_version(texts: list[bytes], tokenizer: bytekiln.Tokenizer, batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bytekiln.inspect.compression.BATCH_BYTES", batch)
        text = read_text(documents(texts), TABLE)
        found = as_json(text, compress(tokenizer, text))
    expected = slowly(tokenizer, texts)
    assert found["scripts"].keys() == expected["scripts"].keys()
    for script, values in expected["scripts"].items():
        assert {k: found["scripts"][script][k] for k in values} == pytest.approx(values), script
    for key in ("tokens", "words", "single_byte_share", "part_of_character_share"):
        assert found[key] == pytest.approx(expected[key])
    assert found["bytes"] == sum(map(len, texts))
    assert found["bytes_per_token"] == pytest.approx(found["bytes"] / found["tokens"])
    assert sum(s["share"] for s in found["scripts"].values()) == pytest.approx(1)


def test_numbers_that_can_be_told_by_hand() -> None:
    text = read_text(documents(["яя 粘".encode(), b"ab"]), TABLE)
    found = as_json(text, compress(BYTES_ONLY, text))
    assert (found["bytes"], found["tokens"], found["words"], found["tokens_per_word"]) == (10, 10, 3, 10 / 3)
    assert found["bytes_per_token"] == 1 and found["interval"] == (1, 1) and found["single_byte_share"] == 1
    assert found["part_of_character_share"] == 0.7  # all bytes of я, я and 粘
    cyrillic = {"bytes": 4, "share": 0.4, "characters": 2, "bytes_per_token": 1}
    assert found["scripts"]["Cyrillic"] == {**cyrillic, "single_byte_share": 1, "whole_character_share": 0}
    assert found["scripts"]["Latin"]["whole_character_share"] == 1
    assert list(found["scripts"]) == ["Cyrillic", "Han", "Latin", "Common"]


def test_a_combining_mark_belongs_to_the_letter_before_it_in_its_document() -> None:
    text = read_text(documents(["e\u0301я\u0301".encode(), "\u0301".encode(), b"e"]), TABLE)
    found = as_json(text, compress(BYTES_ONLY, text))["scripts"]
    assert {k: (v["bytes"], v["characters"]) for k, v in found.items()} == {
        "Latin": (4, 3), "Cyrillic": (4, 2), "Common": (2, 1),
    }  # fmt: skip


def test_special_tokens_are_text_here() -> None:
    """Otherwise a tokenizer that knows more of them would be praised for its markup."""
    text = read_text(documents([EOT.encode()]), TABLE)
    assert compress(TOKENIZER, text).tokens == len(TOKENIZER.encode(EOT)) > 1


def test_without_text_nothing_is_divided() -> None:
    text = read_text(documents([]), TABLE)
    found = compress(TOKENIZER, text)
    said = as_json(text, found)
    assert (said["count"], said["bytes"], said["tokens"], said["words"], said["scripts"]) == (0, 0, 0, 0, {})
    assert all(said[k] is None for k in ("bytes_per_token", "interval", "tokens_per_word", "single_byte_share"))
    assert set(difference(text, found, found).values()) == {None}


def test_white_space_has_no_words() -> None:
    text = read_text(documents([b"  \n"]), TABLE)
    said = as_json(text, compress(TOKENIZER, text))
    assert said["words"] == 0 and said["tokens_per_word"] is None and said["bytes_per_token"] >= 1


def test_the_vocabulary_by_script() -> None:
    found = vocabulary_scripts(TOKENIZER, TABLE)
    kinds: Counter = Counter()
    for id, token in TOKENIZER.vocab.items():
        if id == TOKENIZER.eot_id:
            continue
        try:
            kinds[next((s for c, s in characters(token.decode().encode()) if s != "Common"), "Common")] += 1
        except UnicodeDecodeError:
            continue
    assert found == kinds and found["Latin"] > 50 and unicodedata.name("я").startswith("CYRILLIC") and found["Cyrillic"]


# --- how sure ------------------------------------------------------------------------------------------------


def test_the_interval_holds_what_it_says() -> None:
    """Of 800 samples of 60 documents, long and short ones, about 95 % hold the ratio of the whole population."""
    rng = np.random.default_rng(1)
    size = np.maximum(rng.lognormal(6, 1, 20_000), 4).astype(np.int64)
    tokens_a = np.maximum((size / rng.normal(4, 0.5, 20_000).clip(1)).astype(np.int64), 1)
    tokens_b = np.maximum((tokens_a * rng.normal(1.1, 0.01, 20_000)).astype(np.int64), 1)
    true_a, true_b = size.sum() / tokens_a.sum(), size.sum() / tokens_b.sum()
    held, widths, linear = np.zeros(3), np.zeros(3), 0
    for _ in range(800):
        d = rng.integers(0, len(size), 60)
        a, b = ratio(size[d], tokens_a[d]), ratio(size[d], tokens_b[d])
        for k, (found, true) in enumerate([(a, true_a), (b, true_b), (b - a, true_b - true_a)]):
            low, high = found.interval
            held[k] += low <= true <= high
            widths[k] += high - low
        pulls = (size[d] - a.value * tokens_a[d]) * 60 / tokens_a[d].sum()
        linear += abs(a.value - true_a) <= 2.001 * np.sqrt((pulls**2).sum() / 59 / 60)
    assert (held / 800 > 0.93).all() and (held / 800 < 0.97).all(), held
    assert linear < held[0], "what the linearised variance promises, it does not hold"
    assert widths[2] < widths[0] / 3, "paired by document: what both tokenizers find hard cancels"


def test_it_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(2)
    size = rng.integers(50, 2000, 400)
    tokens = (size / rng.normal(4, 0.4, 400)).astype(np.int64)
    draws = rng.integers(0, 400, (4000, 400))
    drawn = size[draws].sum(1) / tokens[draws].sum(1)
    assert ratio(size, tokens).interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.01)


def test_a_difference_is_that_of_the_ratios() -> None:
    text = read_text(documents([t.encode() for t in TEXTS]), TABLE)
    first, other = compress(TOKENIZER, text), compress(BYTES_ONLY, text)
    found = difference(text, first, other)
    assert found["bytes_per_token"] == pytest.approx(1 - text.bytes / first.tokens)
    assert found["tokens_ratio"] == other.tokens / first.tokens > 1
    for name, ends in (("bytes_per_token", "interval"), ("tokens_ratio", "tokens_ratio_interval")):
        assert found[ends][0] < found[name] < found[ends][1]
    same = difference(text, first, first)
    assert (same["bytes_per_token"], same["interval"], same["tokens_ratio"]) == (0, (0, 0), 1)


def test_one_document_has_no_interval() -> None:
    text = read_text(documents([b"the kiln"]), TABLE)
    said = as_json(text, compress(TOKENIZER, text))
    assert said["interval"] is None and said["bytes_per_token"] > 1


# --- which documents -----------------------------------------------------------------------------------------

LINES = [f"document {i}: {TEXTS[i % 6]} " * (1 + i % 3) for i in range(300)]


def of(path: Path, **options: object) -> Documents:
    size = sum(len(line.encode()) for line in LINES)
    reading = {k: options.pop(k) for k in ("field", "sample", "seed", "limit_bytes") if k in options}
    return read_documents(Inputs([path], **reading), **{"text_bytes": size, "size": size, **options})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(line + EOT for line in LINES), encoding="utf-8")
    return path


def test_the_same_documents_from_every_kind_of_file(text: Path, tmp_path: Path) -> None:
    expected = [line.encode() for line in LINES]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in [*LINES, ""]))
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(text.read_bytes()))
    pq.write_table(pa.table({"body": LINES}), tmp_path / "t.parquet")
    assert of(text).texts == of(text, threads=1).texts == expected
    assert of(tmp_path / "t.jsonl").texts == of(tmp_path / "t.txt.gz").texts == expected
    assert of(tmp_path / "t.parquet", field="body").texts == expected


def test_a_sample_is_seeded_bounded_and_whole(text: Path) -> None:
    every = {line.encode() for line in LINES}
    whole = of(text)
    assert (whole.how, whole.share, len(whole.texts)) == ("all", 1.0, 300)
    some = of(text, size=6000)
    assert some.how == "sample" and set(some.texts) < every and 3000 < sum(map(len, some.texts)) <= 12_000
    assert some.texts == of(text, size=6000, threads=1).texts != of(text, size=6000, seed=1).texts
    assert set(some.texts) <= set(of(text, size=12_000).texts), "a larger size takes the same ones and more"
    assert some.share == pytest.approx(6000 / sum(map(len, every)))


def test_a_sample_of_a_sample_and_of_a_limit(text: Path) -> None:
    half = of(text, sample=0.5)
    assert half.share == 0.5 and 100 < len(half.texts) < 200
    size = sum(map(len, half.texts))
    less = of(text, sample=0.5, text_bytes=size, size=size // 3)
    assert set(less.texts) < set(half.texts) and less.share == pytest.approx(0.5 / 3, rel=0.01)
    early = of(text, limit_bytes=size, text_bytes=size, size=size // 4)
    assert early.texts and set(early.texts[:-1]) < set(of(text, limit_bytes=2 * size).texts), "the last one may be cut"


def test_one_long_document_is_read_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("the kiln " * 100_000)
    found = of(tmp_path / "long.txt", text_bytes=900_000, size=5000)
    assert found.how == "beginning" and len(found.texts) == 1 and 4000 < len(found.texts[0]) <= 5000


def test_empty_documents_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(f"{EOT}a{EOT}{EOT}b")
    assert of(tmp_path / "x.txt").texts == [b"a", b"b"]
    (tmp_path / "x.txt").write_text(f"a{EOT} \n{EOT}b{EOT}\n")
    assert of(tmp_path / "x.txt").texts == [b"a", b"b"]
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    assert of(tmp_path / "x.jsonl", text_bytes=0).texts == []


def test_invalid_bytes_go_by_the_policy(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\xffb")
    with pytest.raises(TextError, match="byte offset 1"):
        of(tmp_path / "x.txt")
    assert of(tmp_path / "x.txt", errors="replace").texts == ["a\ufffdb".encode()]
    assert of(tmp_path / "x.txt", errors="bytes").texts == [b"a\xffb"]


def test_what_ends_a_document(tmp_path: Path) -> None:
    plain = bytekiln.train_bpe_from_iterator(["a"], vocab_size=256)
    other = bytekiln.train_bpe_from_iterator(["a"], vocab_size=257, special_tokens=["<|end|>"])
    assert separator_of([plain]) == separator_of([TOKENIZER, other]) == EOT
    assert separator_of([plain, other]) == "<|end|>"
    (tmp_path / "x.txt").write_text(f"a<|end|>b{EOT}c")
    assert of(tmp_path / "x.txt", separator="<|end|>").texts == [b"a", f"b{EOT}c".encode()]


# --- the command ---------------------------------------------------------------------------------------------

OLD_FIELDS = (
    "tokenizer hash pattern vocab_size vocabulary longest_tokens text bytes tokens bytes_per_token tokens_used seconds "
    "bytes_per_second pile_hours"
).split()
"""Of `--json` before there were documents; scripts of others read them."""


@pytest.fixture
def two(tmp_path: Path, text: Path) -> None:
    TOKENIZER.save(tmp_path / "own.json")
    BYTES_ONLY.save(tmp_path / "bytes.json")


def test_tokenizers_stand_side_by_side_in_one_table(command, two: None, tmp_path: Path) -> None:
    said = command("bpe-inspect", "own.json", "bytes.json", "--text", "text.txt").stdout
    found = json.loads(command("bpe-inspect", "own.json", "bytes.json", "--text", "text.txt", "--json").stdout)
    head = next(line for line in said.splitlines() if line.split() == ["own.json", "bytes.json"])
    row = next(line for line in said.splitlines() if line.strip().startswith("compression"))
    value = f"{found[0]['documents']['bytes_per_token']:.3f}"
    assert row.index(value) == head.index("own.json") and row.index("1.000") == head.index("bytes.json")
    for words in ("300 documents", "95 % interval", "against the first", "tokens a word", "single-byte tokens", "Han"):
        assert words in said, said
    assert said.count("the Pile") == 1
    texts = [d["documents"] for d in found]
    assert texts[0]["count"] == texts[1]["count"] == 300 and texts[0]["bytes"] == texts[1]["bytes"]
    assert texts[1]["bytes_per_token"] == 1 and texts[1]["interval"] == [1, 1]
    assert found[1]["against_first"]["tokens_ratio"] > 1 and "against_first" not in found[0]
    assert all(field in f for f in found for field in OLD_FIELDS)
    more = re.search(r"([\d.]+) % more", said)
    assert more and float(more[1]) == pytest.approx(100 * (found[1]["against_first"]["tokens_ratio"] - 1), abs=0.06)


def test_the_sample_is_stated(command, two: None) -> None:
    line = ["bpe-inspect", "own.json", "--text", "text.txt", "--documents", "6kB"]
    assert "seed 7" in command(*line, "--seed", "7").stdout
    first, again, other = (
        json.loads(command(*line, "--json", "--seed", s).stdout)["documents"] for s in ("7", "7", "8")
    )
    assert first == again and first["seed"] == 7 and first["drawn"] == "sample"
    assert first["bytes_per_token"] != other["bytes_per_token"]


def test_vocab_and_merges_are_a_tokenizer_too(command, two: None, tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    TOKENIZER.save(tmp_path / "gpt2", format="vocab+merges")
    line = ["--vocab-path", "gpt2/vocab.json", "--merges-path", "gpt2/merges.txt", "--text", "text.txt"]
    found = json.loads(command("bpe-inspect", "own.json", *line, "--json").stdout)
    assert found[1]["against_first"]["bytes_per_token"] == 0


def test_empty_records(command, two: None, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    assert "no document has any text" in command("bpe-inspect", "own.json", "--text", "x.jsonl").stdout
    found = json.loads(command("bpe-inspect", "own.json", "bytes.json", "--text", "x.jsonl", "--json").stdout)
    assert found[0]["documents"]["bytes_per_token"] is None and found[0]["pile_hours"] is None
    assert found[0]["bytes_per_token"] == 0 and found[1]["against_first"]["interval"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["own.json", "--text", "text.txt", "--documents", "much"], ["--documents", "much", "500MB"]),
        (["own.json", "--text", "text.txt", "--separator", ""], ["--separator"]),
        (["own.json", "--text", "text.txt", "--vocab-path", "v.json"], ["--merges-path", "both"]),
        (["own.json", "text.txt", "--text", "text.txt"], ["text.txt"]),
        (["own.json", "--text", "bad.jsonl"], ["bad.jsonl", "line 2"]),
        (["own.json", "--text", "bad.txt"], ["bad.txt", "byte offset 2"]),
    ],
)
def test_what_is_refused(command, two: None, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    said = command("bpe-inspect", *arguments, status=2).stderr
    assert all(word in said for word in words), said


def test_ids_are_counted_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([3, 5, 5, 9, 0, 3], dtype=np.uint16)
    monkeypatch.setattr("bytekiln.inspection.COUNT_AT_ONCE", 2)
    assert _different(ids, 10) == 4 and _different(ids[:0], 10) == 0


def test_long_tokens_are_cut_between_their_quotes() -> None:
    assert bare_token(b"*" * 70) == "*" * 60 + "… (70 bytes)"
    assert bare_token(b"\n") == "\\n"


def test_long_work_says_what_it_does() -> None:
    said: list[tuple[str, int, int]] = []
    text = read_text(documents([b"the kiln"] * 3), TABLE)
    compress(TOKENIZER, text, lambda *told: said.append(told))
    assert said == [("compress", 24, 24)]


def test_every_stage_has_a_bar(
    two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After two seconds; here at once, and as lines, since nobody looks at a terminal."""
    monkeypatch.setattr("bytekiln.console.QUIET_S", 0.0)
    monkeypatch.setattr("bytekiln.console.PLAIN_INTERVAL_S", 0.0)
    assert inspect([str(tmp_path / "own.json"), "--text", str(tmp_path / "text.txt")]) == 0
    said = capsys.readouterr().err
    assert all(words in said for words in ("encoding", "reading documents", "measuring compression")), said
