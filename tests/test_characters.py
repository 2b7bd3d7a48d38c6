"""Tokenizers of characters: nanoGPT's numbers, Hugging Face's format, and a text made ready by one command."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bytekiln import TokenFile, Tokenizer, characters_file, cli
from bytekiln.atomic import AtomicFile, write_file
from bytekiln.characters import CharTokenizer, from_json_any, load_any
from bytekiln.errors import ConfigError, FileError, FormatError, OutputExistsError, TextError

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
ODD = "a\r\n\n\tb\0é e\u0301 \u2028 \u3000 漢字 \U0001f600\U0001f469\u200d\U0001f680 ﬁ \ufeff \U0010ffff"
"""Line ends of every kind, a combining accent, a joined emoji, both ends of Unicode."""
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def nanogpts(text: str) -> tuple[dict[str, int], list[int]]:
    """nanoGPT's data/shakespeare_char/prepare.py: the specification."""
    stoi = {ch: i for i, ch in enumerate(sorted(set(text)))}
    return stoi, [stoi[c] for c in text]


# --- ids ---------------------------------------------------------------------------------------------------


@given(texts.filter(bool))
@example(ODD)
def test_ids_are_nanogpts_and_hugging_faces(text: str) -> None:
    ours = CharTokenizer(text)
    stoi, ids = nanogpts(text)
    assert ours.encode(text) == ours.encode_ordinary(text) == ids
    assert ours.encode_to_numpy(text).tolist() == ids
    assert ours.encode_batch([text, text[:3]]) == [ids, ids[:3]]
    assert ours.decode(ids) == text and ours.decode_bytes(ids) == text.encode()
    assert {c: ours.token_to_id(c) for c in stoi} == {c: ours.token_to_id(c.encode()) for c in stoi} == stoi
    theirs = tokenizers.Tokenizer.from_str(ours.to_json())
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab() == stoi


@given(texts.filter(bool), texts)
def test_unknown_characters_are_named(known: str, text: str) -> None:
    ours = CharTokenizer(known)
    place = next((i for i, c in enumerate(text) if c not in known), None)
    if place is None:
        assert ours.decode(ours.encode(text)) == text
        return
    for encode in (ours.encode, ours.encode_to_numpy):
        with pytest.raises(TextError, match=f"byte offset {len(text[:place].encode())}: .*U.{ord(text[place]):04X}"):
            encode(text)
    with pytest.raises(Exception, match="UNK"):
        tokenizers.Tokenizer.from_str(ours.to_json()).encode(text)


def test_surface_of_a_tokenizer() -> None:
    ours = CharTokenizer(TEXT)
    assert ours.n_vocab == len(ours) == len(set(TEXT)) and ours.eot_id is None and ours.special_tokens == {}
    assert ours.encode("Be", allowed_special="all", disallowed_special=()) == ours.encode("Be")
    assert ours.encode_to_numpy("Be").dtype == np.uint16 and ours.encode_to_numpy("").tolist() == []
    assert [ours.id_to_token(i).decode() for i in ours.encode("Be")] == ["B", "e"]
    assert ours.vocab == {i: ours.id_to_token(i) for i in range(ours.n_vocab)}
    assert ours.decode(np.array(ours.encode("hear"), dtype=np.uint16), skip_special_tokens=True) == "hear"
    assert ours.token_to_id("hear") is ours.token_to_id("#") is ours.token_to_id(b"\xff") is None
    for ids in ([0, 99], [-1]):
        with pytest.raises(ConfigError, match=f"found {ids[-1]} at place {len(ids) - 1}; expected 0 to 2"):
            ours.decode(ids)
    with pytest.raises(ConfigError, match="99"):
        ours.id_to_token(99)
    with pytest.raises(ConfigError, match="errors"):
        ours.decode([0], errors="no")  # type: ignore[arg-type]
    with pytest.raises(TextError, match=r"U\+D800"):
        ours.encode("B\ud800")
    with pytest.raises(TextError, match="D800"):
        CharTokenizer("a\ud800")
    with pytest.raises(ConfigError):
        CharTokenizer("")
    for twin in (pickle.loads(pickle.dumps(ours)), copy.copy(ours), copy.deepcopy(ours)):
        assert twin == ours and hash(twin) == hash(ours) and twin.hash == ours.hash
    assert CharTokenizer(TEXT + "#") != ours and CharTokenizer(TEXT + "#").hash != ours.hash


def test_more_than_65536_characters_are_uint32() -> None:
    many = "".join(chr(c) for c in range(0x10000, 0x20001))
    ours = CharTokenizer(many)
    ids = ours.encode_to_numpy(many)
    assert ids.dtype == np.uint32 and ids.tolist() == ours.encode(many) == list(range(65537))
    assert CharTokenizer(many[:-1]).encode_to_numpy(many[:3]).dtype == np.uint16


# --- files -------------------------------------------------------------------------------------------------


def test_files_go_round(tmp_path: Path) -> None:
    ours = CharTokenizer(ODD)
    path = tmp_path / "tokenizer.json"
    ours.save(path)
    assert CharTokenizer.from_file(path) == CharTokenizer.from_json(ours.to_json()) == load_any(path) == ours
    assert load_any(tmp_path) == load_any(str(path)) == from_json_any(ours.to_json()) == ours
    assert tokenizers.Tokenizer.from_file(str(path)).encode(ODD).ids == ours.encode(ODD)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        CharTokenizer("ab").save(path)
    assert load_any(path) == ours
    CharTokenizer("ab").save(path, overwrite=True)
    assert load_any(path) == CharTokenizer("ab")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(FileError, match="no such folder"):
        ours.save(tmp_path / "no" / "t.json")
    with pytest.raises(FileError, match="no such file"):
        CharTokenizer.from_file(tmp_path / "no.json")


def test_what_hugging_face_saves_again_reads_the_same() -> None:
    ours = CharTokenizer(ODD)
    assert from_json_any(tokenizers.Tokenizer.from_str(ours.to_json()).to_str()) == ours


def test_bpe_is_told_apart(tmp_path: Path) -> None:
    from bytekiln import train_bpe_from_iterator

    bpe = train_bpe_from_iterator(["WordLevel WordLevel"], vocab_size=270, special_tokens=["WordLevel"])
    bpe.save(tmp_path / "tokenizer.json")
    for found in (load_any(tmp_path / "tokenizer.json"), load_any(tmp_path), from_json_any(bpe.to_json())):
        assert isinstance(found, Tokenizer) and found == bpe
    with pytest.raises(FileError):
        load_any(tmp_path / "missing.json")
    with pytest.raises(FormatError):
        from_json_any("{")
    with pytest.raises(FormatError, match='"BPE"; expected "WordLevel"'):
        CharTokenizer.from_json(bpe.to_json())


def edited(**changes: object) -> str:
    said = json.loads(CharTokenizer("abc").to_json())
    model = {k[6:]: v for k, v in changes.items() if k.startswith("model_")}
    return json.dumps({**said, **{k: v for k, v in changes.items() if not k.startswith("model_")},
                       "model": {**said["model"], **model}})  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("WordLevel", ["JSON"]),
        ("[]", ["WordLevel"]),
        (edited(model_type="Unigram"), ["Unigram", "WordLevel"]),
        (edited(normalizer={"type": "Lowercase"}), ["normalizer", "Lowercase"]),
        (edited(pre_tokenizer={"type": "Whitespace"}), ["pre_tokenizer", "Whitespace", "Split"]),
        (edited(pre_tokenizer=None), ["pre_tokenizer"]),
        (edited(post_processor={"type": "ByteLevel"}), ["post_processor"]),
        (edited(added_tokens=[{"id": 3, "content": "<eos>"}]), ["added_tokens", "eos"]),
        (edited(model_vocab={}), ["vocabulary"]),
        (edited(model_vocab={"a": 0, "bc": 1}), ["'bc'", "single characters"]),
        (edited(model_vocab={"a": 0, "\ud800": 1}), ["ud800"]),
        (edited(model_vocab={"a": 0, "b": 2}), ["holes"]),
        (edited(model_vocab={"a": 0, "b": 0}), ["twice"]),
        (edited(model_vocab={"a": 0, "b": True}), ["True", "'b'"]),
        (edited(model_vocab={"a": 0, "b": "1"}), ["'1'", "'b'"]),
        (edited(model_unk_token="a"), ["unk_token", "'a'"]),
    ],
)
def test_refused_files(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "t.json"
    path.write_text(text, "utf-8", errors="surrogatepass")
    with pytest.raises(FormatError) as raised:
        CharTokenizer.from_file(path)
    assert str(path) in str(raised.value) and all(w in str(raised.value) for w in words), raised.value


def test_ids_need_not_follow_the_code_points() -> None:
    other = CharTokenizer.from_json(edited(model_vocab={"b": 0, "a": 1}))
    assert other.encode("ab") == [1, 0] and other.encode_to_numpy("ab").tolist() == [1, 0] and other.decode([0]) == "b"
    assert other.hash != CharTokenizer("ab").hash and other != CharTokenizer("ab")
    assert CharTokenizer.from_json(other.to_json()) == other


def test_an_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(ZeroDivisionError), AtomicFile(path, overwrite=False) as file:
        file.write(b"half")
        assert not path.exists()
        with pytest.raises(FileError, match="another process is writing it"):
            AtomicFile(path, overwrite=False)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / ".x.partial").write_bytes(b"left behind by a killed writer, longer than what comes")
    write_file(path, b"whole", overwrite=False)
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]
    (tmp_path / ".y.partial").symlink_to(path)
    with pytest.raises(FileError):
        write_file(tmp_path / "y", b"through the link", overwrite=True)
    assert path.read_bytes() == b"whole"


# --- a text made ready by one command ----------------------------------------------------------------------


def outputs(folder: Path, name: str) -> dict[str, Path]:
    kinds = {"train": "train.npy", "valid": "valid.npy", "tokenizer": "tokenizer.json"}
    return {k: folder / "data" / "processed" / f"{name}_{v}" for k, v in kinds.items()}


def test_tiny_shakespeare(command, tmp_path: Path, shared_bytes) -> None:
    raw = shared_bytes("shakespeare/tinyshakespeare.txt.xz")
    (tmp_path / "input.txt").write_bytes(raw)
    said = command("bpe-encode", "input.txt", "--characters", "--dataset", "shakespeare-char").stdout
    assert "65 different" in said and "1,003,854 tokens uint16" in said and "111,540 tokens uint16" in said
    made = outputs(tmp_path, "shakespeare-char")
    assert {p.name for p in made["train"].parent.iterdir()} == {
        "shakespeare-char_tokenizer.json",
        *(f"shakespeare-char_{split}.npy{more}" for split in ("train", "valid") for more in ("", ".json")),
    }
    stoi, ids = nanogpts(raw.decode())
    tokenizer = load_any(made["tokenizer"])
    assert isinstance(tokenizer, CharTokenizer) and tokenizer.characters == "".join(stoi) and tokenizer.n_vocab == 65
    # nanoGPT's own words for it: "all the unique characters"
    assert tokenizer.characters == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    n = len(ids)
    for split, part in (("train", ids[: int(n * 0.9)]), ("valid", ids[int(n * 0.9) :])):
        file = TokenFile.open(made[split])
        assert np.array_equal(file.array, np.array(part, dtype=np.uint16)) and file.dtype == np.uint16
        file.verify()
        assert file.vocab_size == 65 and file.eot_id is None and file.tokenizer_hash == tokenizer.hash
        assert file.text_bytes == len(file) == {"train": 1_003_854, "valid": 111_540}[split]
    theirs = tokenizers.Tokenizer.from_file(str(made["tokenizer"]))
    assert theirs.encode(raw[:20_000].decode()).ids == ids[:20_000]


def test_manifests_are_bpe_encodes(command, corpus: Path, tmp_path: Path) -> None:
    """The same keys in the same order, except that a part of a file says where it begins."""
    command("bpe-train", corpus, "--vocab-size", 300, "--out", "t.json")
    command("bpe-encode", corpus, "--tokenizer", "t.json", "--out", "words.npy")
    command("bpe-encode", corpus, "--characters", "--out", "a.npy", "--val-out", "b.bin", "--tokenizer-out", "c.json",
            "--val-share", 0.25, "--dtype", "uint32")  # fmt: skip
    words, a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("words.npy", "a.npy", "b.bin"))
    assert list(a) == list(b) == list(words)
    for name in ("format", "version", "created_by"):
        assert a[name] == b[name] == words[name]
    text = corpus.read_text()
    at = len(text) * 3 // 4
    assert (a["file"], a["tokens"], a["documents"], a["dtype"]) == ("a.npy", at, 1, "uint32")
    assert a["tokenizer_hash"] == b["tokenizer_hash"] == load_any(tmp_path / "c.json").hash
    for manifest, offset, part in ((a, 0, text[:at]), (b, at, text[at:])):
        assert manifest["sources"] == [
            {"name": "corpus.txt", "bytes": len(part), "offset": offset,
             "checksum": f"sha256:{hashlib.sha256(part.encode()).hexdigest()}"}
        ]  # fmt: skip
    file = TokenFile.open(tmp_path / "b.bin")
    file.verify()
    assert file.array.tobytes() == (tmp_path / "b.bin").read_bytes() and file.dtype == np.uint32
    assert a["max_id"] == TokenFile.open(tmp_path / "a.npy").max_id
    assert (tmp_path / "a.npy").stat().st_size == 128 + 4 * at
    header = (tmp_path / "words.npy").read_bytes()[:128]
    command("bpe-encode", corpus, "--tokenizer", "c.json", "--out", "all.npy")
    assert (tmp_path / "all.npy").read_bytes()[:60] == header[:60]  # magic, length, type


@settings(max_examples=40)
@given(
    st.lists(texts.filter(bool), min_size=1, max_size=3),
    st.fractions(0, 1, max_denominator=20).filter(lambda s: s < 1),
    st.integers(1, 9),
)
@example(["aé漢\U0001f600" * 5, "b"], Fraction(1, 3), 1)
def test_blocks_never_change_the_result(tmp_path_factory, parts: list[str], share, block: int) -> None:
    """Whatever the size of a block, the files hold nanoGPT's split of the texts joined."""
    folder = tmp_path_factory.mktemp("blocks")
    inputs = []
    for i, part in enumerate(parts):
        inputs.append(folder / f"{i}.txt")
        inputs[-1].write_bytes(part.encode())
    text = "".join(parts)
    stoi, _ = nanogpts(text)
    at = int(len(text) * (1 - share)) if share else len(text)
    places = characters_file.Outputs(folder / "t.json", folder / "a.npy", folder / "b.npy" if share else None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(characters_file, "BLOCK_BYTES", block)
        if share and not 0 < at < len(text):
            with pytest.raises(ConfigError, match="val_share"):
                characters_file.prepare(inputs, places, val_share=share)
            assert sorted(folder.iterdir()) == inputs
            return
        tokenizer, manifests = characters_file.prepare(inputs, places, val_share=share)
    assert tokenizer.characters == "".join(stoi)
    halves = [text[:at], text[at:]] if share else [text]
    for path, manifest, part in zip((folder / "a.npy", folder / "b.npy"), manifests, halves, strict=False):
        file = TokenFile.open(path)
        file.verify()
        assert file.array.tolist() == [stoi[c] for c in part]
        assert manifest == file.manifest and manifest["text_bytes"] == len(part.encode())
        assert manifest["max_id"] == max(file.array.tolist())
        assert sum(s["bytes"] for s in manifest["sources"]) == manifest["text_bytes"]
    begin = {p.name: 0 for p in inputs}
    for source in (s for m in manifests for s in m["sources"]):
        raw = (folder / source["name"]).read_bytes()
        assert source["offset"] == begin[source["name"]]
        begin[source["name"]] += source["bytes"]
        piece = raw[source["offset"] : begin[source["name"]]]
        assert source["checksum"] == f"sha256:{hashlib.sha256(piece).hexdigest()}"
    assert begin == {p.name: p.stat().st_size for p in inputs}


def test_another_text_with_the_same_characters(command, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(TEXT)
    command("bpe-encode", "input.txt", "--characters", "--dataset", "play")
    (tmp_path / "more.txt").write_text("feed me\n")
    command("bpe-encode", "more.txt", "--tokenizer", "data/processed/play_tokenizer.json", "--out", "more.npy")
    tokenizer = load_any(outputs(tmp_path, "play")["tokenizer"])
    assert tokenizer.decode(TokenFile.open(tmp_path / "more.npy").array) == "feed me\n"
    (tmp_path / "more.txt").write_text("feed mé\n")
    said = command("bpe-encode", "more.txt", "--dataset", "play", "--out", "x.npy", status=2).stderr
    assert "more.txt: byte offset 6:" in said and "U+00E9" in said
    said = command("bpe-encode", "more.txt", "--dataset", "play", "--out", "x.npy", "--append-eot", status=2).stderr
    assert "--append-eot" in said
    said = command("bpe-encode", "more.txt", "--dataset", "play", "--out", "x.npy", "--pattern", "gpt2", status=2)
    assert "pattern" in said.stderr and "characters" in said.stderr
    assert not (tmp_path / "x.npy").exists() and not (tmp_path / ".x.npy.partial").exists()


PREPARE = ["--characters", "--out", "a.npy", "--val-out", "b.npy", "--tokenizer-out", "t.json"]


def test_existing_outputs_are_refused_then_replaced(command, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(TEXT)
    command("bpe-encode", "input.txt", *PREPARE)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for gone, named, flag in [
        ((), "a.npy", "--out"),
        (("a.npy", "a.npy.json"), "t.json", "--tokenizer-out"),
        (("t.json",), "b.npy", "--val-out"),
    ]:
        for name in gone:
            (tmp_path / name).unlink()
        said = command("bpe-encode", "input.txt", *PREPARE, status=2).stderr
        assert f"{named}: exists already" in said and "--overwrite" in said and f"another name with {flag}" in said
    (tmp_path / "input.txt").write_text(TEXT + TEXT)
    command("bpe-encode", "input.txt", *PREPARE, "--overwrite")
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after["t.json"] == before["t.json"] and len(TokenFile.open(tmp_path / "b.npy")) == 13
    assert set(after) == set(before)
    # A manifest of someone else's is not ours to replace; one that a killed writer left is.
    for name in ("a.npy", "b.npy", "b.npy.json", "t.json"):
        (tmp_path / name).unlink()
    command("bpe-encode", "input.txt", *PREPARE)
    for name in ("a.npy", "b.npy", "b.npy.json", "t.json"):
        (tmp_path / name).unlink()
    (tmp_path / "a.npy.json").write_text("{}")
    said = command("bpe-encode", "input.txt", *PREPARE, status=2).stderr
    assert "a.npy.json: exists already" in said
    assert {p.name for p in tmp_path.iterdir()} == {"input.txt", "a.npy.json"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.txt", *PREPARE], ["missing.txt", "no such file"]),
        (["folder", *PREPARE], ["folder", "directory"]),
        (["empty.txt", *PREPARE], ["empty.txt", "empty file (0 bytes)"]),
        (["input.txt", "empty.txt", *PREPARE], ["empty.txt", "empty file"]),
        (["bad.txt", *PREPARE], ["bad.txt", "byte offset 10", "0xff", "UTF-8"]),
        (["cut.txt", *PREPARE], ["cut.txt", "byte offset 3", "0xe5"]),
        (["one.txt", *PREPARE], ["val_share", "0.1 of 1 characters"]),
        (["input.txt", *PREPARE, "--val-share", "1"], ["--val-share", "below 1"]),
        (["input.txt", *PREPARE, "--val-share", "nan"], ["--val-share", "nan"]),
        (["input.txt", *PREPARE, "--val-share", "1/0"], ["--val-share", "1/0"]),
        (["input.txt", *PREPARE, "--val-share", "much"], ["--val-share", "much"]),
        (["input.txt", *PREPARE, "--val-share", "0"], ["--val-out", "--val-share 0"]),
        (["input.txt", "--characters"], ["--out", "--dataset"]),
        (["input.txt", *PREPARE[:-2]], ["--tokenizer-out", "--dataset"]),
        (["input.txt", *PREPARE[:3]], ["--tokenizer-out"]),
        (["--characters", "--dataset", "x"], ["no input"]),
        (["input.txt", *PREPARE, "--out", "b.npy"], ["same file"]),
        (["input.txt", *PREPARE, "--tokenizer-out", "a.npy.json"], ["same file", "manifests"]),
        (["input.txt", *PREPARE, "--out", "input.txt", "--overwrite"], ["input.txt", "one of the inputs"]),
        (["input.txt", *PREPARE, "--val-out", "no/such/b.npy"], ["no/such", "mkdir"]),
        (["input.txt", *PREPARE, "--tokenizer-out", "folder"], ["folder", "directory"]),
        (["input.txt", *PREPARE, "--tokenizer", "t.json"], ["--tokenizer", "--characters"]),
        (["input.txt", *PREPARE, "--errors", "replace"], ["--errors replace", "--characters"]),
        (["input.txt", *PREPARE, "--special-token", "<a>"], ["--special-token"]),
        (["input.txt", "--val-share", "0.1", "--dataset", "x"], ["--val-share", "--characters"]),
    ],
)
def test_prepare_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "input.txt").write_text(TEXT)
    (tmp_path / "bad.txt").write_bytes(b"good text\n\xff\xfe more\n")
    (tmp_path / "cut.txt").write_bytes("漢字".encode()[:-1])
    before = {p.name for p in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bpe-encode", *arguments]) == 2  # in this process: a fresh one each takes ten seconds in all
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(w in said for w in words), said
    assert {p.name for p in tmp_path.iterdir()} == before and not any((tmp_path / "folder").iterdir())


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.txt")
    (tmp_path / name).write_text(TEXT)
    out = tmp_path / os.fsdecode(b"\xfe.npy")
    manifest = characters_file.encode(CharTokenizer(TEXT), [tmp_path / name], out)
    assert (manifest["file"], manifest["sources"][0]["name"]) == ("\ufffd.npy", "\ufffd.txt")
    assert TokenFile.open(out).manifest == manifest


def test_training_starts_from_it(command, tmp_path: Path) -> None:
    """`lm-train PRESET --dataset NAME` finds what `--dataset NAME` wrote, and takes the tokenizer of characters."""
    (tmp_path / "input.txt").write_text(TEXT * 20)
    command("bpe-encode", "input.txt", "--characters", "--dataset", "shakespeare-char")
    command("lm-train", "shakespeare-char", "--dataset", "shakespeare-char", "--max-steps", 2, "--batch-size", 2,
            "--d-model", 24, "--num-layers", 1, "--context-length", 32, "--num-eval-batches", 1, "--device", "cpu",
            "--out-dir", "run")  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "completed" and result["final_bits_per_byte"] > 0
    assert load_any(tmp_path / "run") == CharTokenizer(TEXT)


def test_too_many_characters_for_uint16(command, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("".join(chr(c) for c in range(0x10000, 0x20001)))
    said = command("bpe-encode", "many.txt", *PREPARE, "--dtype", "uint16", status=2).stderr
    assert "uint16" in said and "65537" in said
    assert {p.name for p in tmp_path.iterdir()} == {"many.txt"}
    command("bpe-encode", "many.txt", *PREPARE)
    assert TokenFile.open(tmp_path / "b.npy").dtype == np.uint32


@pytest.mark.parametrize("later", [TEXT + "e", TEXT[:-1], TEXT + "#"])
def test_a_text_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str) -> None:
    text = tmp_path / "input.txt"
    text.write_text(TEXT)
    survey = characters_file._survey

    def surveyed(*args):
        found = survey(*args)
        text.write_text(later)
        return found

    monkeypatch.setattr(characters_file, "_survey", surveyed)
    places = characters_file.Outputs(tmp_path / "t.json", tmp_path / "a.npy", tmp_path / "b.npy")
    with pytest.raises(FileError, match=r"input\.txt: changed while it was read"):
        characters_file.prepare([text], places, val_share=Fraction(1, 10))
    assert [p.name for p in tmp_path.iterdir()] == ["input.txt"]


def test_a_killed_writer_leaves_nothing_that_counts(command, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(TEXT)
    code = """
import os, signal
from bytekiln import characters_file, cli
def stop(self): os.kill(os.getpid(), signal.SIGKILL)
characters_file._TokenFile.commit = stop
cli.main(["bpe-encode", "input.txt", "--characters", "--dataset", "play"])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert all(p.name.endswith(".partial") for p in outputs(tmp_path, "play")["train"].parent.iterdir())
    command("bpe-encode", "input.txt", "--characters", "--dataset", "play")
    assert len(list(outputs(tmp_path, "play")["train"].parent.iterdir())) == 5


@pytest.mark.parametrize(("share", "named"), [(0.1, "play_train.npy"), (0.9, "play_valid.npy")])
def test_a_full_disk_is_told_by_the_right_name(tmp_path: Path, share: float, named: str) -> None:
    """The limit on a file's size stands for a full disk."""
    (tmp_path / "input.txt").write_text("ab" * 500)
    code = f"""
import resource, sys
from bytekiln import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.exit(cli.main("bpe-encode input.txt --characters --dataset play --val-share {share}".split()))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert f"{named}: the file grew past the limit of its size" in run.stderr
    assert not list((tmp_path / "data" / "processed").iterdir())


def test_no_heavy_package_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(TEXT)
    code = """
import sys
from bytekiln import cli
import bytekiln.characters, bytekiln.characters_file, bytekiln.cli_bpe
print([n for n in ("numpy", "torch", "pydantic", "matplotlib", "tokenizers") if n in sys.modules])
cli.main(["bpe-encode", "input.txt", "--characters", "--dataset", "play"])
print([n for n in ("torch", "pydantic", "matplotlib", "tokenizers") if n in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines()[0] == run.stdout.splitlines()[-1] == "[]", run.stderr
