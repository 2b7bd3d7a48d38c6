"""`bpe-inspect diff`: two tokenizers side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bytekiln
from bytekiln.tokenizer_diff import compare

EOT = "<|endoftext|>"


@pytest.fixture
def two(corpus: Path, tmp_path: Path) -> tuple[bytekiln.Tokenizer, bytekiln.Tokenizer]:
    """Trained on the same text by different rules."""
    a = bytekiln.train_bpe(corpus, vocab_size=320, special_tokens=[EOT])
    b = bytekiln.train_bpe(corpus, vocab_size=300, tie_break="huggingface", pattern="cl100k")
    a.save(tmp_path / "a.json")
    b.save(tmp_path / "b.json")
    return a, b


def test_every_number_is_told_again_from_the_tokenizers(command, corpus: Path, two: tuple) -> None:
    a, b = two
    found = json.loads(command("bpe-inspect", "diff", "a.json", "b.json", "--text", corpus, "--json").stdout)
    number = found["first_different_merge"]["number"]
    assert a.merges[: number - 1] == b.merges[: number - 1] and a.merges[number - 1] != b.merges[number - 1]
    assert found["first_different_merge"]["a"] == [t.decode() for t in a.merges[number - 1]]
    assert found["first_different_merge"]["b"] == [t.decode() for t in b.merges[number - 1]]
    ours, theirs = {t for t in a.vocab.values() if t != EOT.encode()}, set(b.vocab.values())
    assert found["shared_tokens"] == len(ours & theirs)
    assert found["share_of_a"] == len(ours & theirs) / 319 and found["share_of_b"] == len(ours & theirs) / 300
    assert found["only_in_a"]["count"] == len(ours - theirs) > 0
    assert found["only_in_b"]["count"] == len(theirs - ours) > 0
    assert len(found["only_in_a"]["longest"][0]) == max(map(len, ours - theirs))
    assert found["only_in_a"]["first"][0] == next(t for t in a.vocab.values() if t in ours - theirs).decode()
    for name, t in (("a", a), ("b", b)):
        text = corpus.read_text(encoding="utf-8")
        ids = t.encode(text, allowed_special="all")
        assert found["compression"][name]["tokens"] == len(ids)
        assert found["compression"][name]["tokens_used"] == len(set(ids))
    assert found["same"] is False and found["special_tokens"] == {"a": {EOT: 319}, "b": {}}


def test_the_summary(command, corpus: Path, two: tuple) -> None:
    said = command("bpe-inspect", "diff", "a.json", "b.json", "--text", corpus).stdout
    for words in ("part at number", "shared tokens", "only in A", "only in B", "longest", "bytes a token", "B makes"):
        assert words in said, said
    assert "the same" in command("bpe-inspect", "diff", "a.json", "a.json").stdout
    command("bpe-train", corpus, "--vocab-size", "310", "--special-token", EOT, "--out", "small.json")
    said = command("bpe-inspect", "diff", "small.json", "a.json").stdout
    assert "B begins with all 53 of A, and goes on" in said


def test_equal_tokenizers_with_other_ids(two: tuple) -> None:
    a, _ = two
    letters = {255 - id: bytes([id]) for id in range(256)}
    merged = {id: token for id, token in a.vocab.items() if 255 < id < 319}
    other = bytekiln.Tokenizer.from_vocab_and_merges({**letters, **merged}, a.merges, special_tokens=[EOT])
    found = compare(a, other)
    assert found["first_different_merge"] is None and not found["same"]
    assert found["share_of_a"] == found["share_of_b"] == 1 and found["only_in_a"]["count"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.json"], ["found 1", "expected two"]),
        (["a.json", "b.json", "a.json"], ["found 3"]),
        (["a.json", "none.json"], ["none.json", "no such file"]),
        (["a.json", "b.json", "--text", "none.txt"], ["none.txt", "no such file"]),
        (["a.json", "corpus.txt"], ["corpus.txt"]),
    ],
)
def test_what_is_refused(command, two: tuple, arguments: list[str], words: list[str]) -> None:
    said = command("bpe-inspect", "diff", *arguments, status=2).stderr
    assert all(word in said for word in words), said
