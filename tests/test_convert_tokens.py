"""`bpe-encode convert`: the same ids and documents from every format to every other, or a refusal."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import foreign_tokens as foreign
from bytekiln import TokenFile, Tokenizer, _core, encode_files, train_bpe_from_iterator
from bytekiln.atomic import AtomicFile
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, OutputExistsError
from bytekiln.tokens import convert as module
from bytekiln.tokens import llmc, megatron
from bytekiln.tokens.convert import convert
from conftest import NO_SHARED, SHARED

FIXTURE = SHARED / "megatron"
EOT = 7
DOCUMENTS = [[1, 2, 3, EOT], [EOT], [4, 5, EOT], [8, 9]]
IDS = [i for d in DOCUMENTS for i in d]
NAME = {"npy": "b.npy", "bin": "b.bin", "llmc": "b.bin", "megatron": "b.idx"}
SIZES = {t: struct.calcsize(letter) for t, letter in foreign.LETTER.items()}


def manifest_of(path: Path) -> dict[str, object]:
    found = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def opened(kind: str, folder: Path, documents: list[list[int]] = DOCUMENTS, dtype: str = "uint16") -> TokenFile:
    return TokenFile.open(foreign.written(kind, folder, "a", documents, dtype), dtype)


PAIRS = [(a, b) for a in foreign.KINDS for b in foreign.KINDS]


@pytest.mark.parametrize(("a", "b"), PAIRS)
@given(data=st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trips(a: str, b: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A to B and back to A's format: ids, documents, types; read by code that shares nothing with ours."""
    folder = tmp_path_factory.mktemp("pair")
    first = data.draw(st.sampled_from(foreign.HELD[a]))
    second = data.draw(st.sampled_from(foreign.HELD[b]))
    greatest = min(int(np.iinfo(first).max), int(np.iinfo(second).max))
    ids = st.integers(0, greatest) | st.integers(0, 3) | st.just(greatest)
    documents = data.draw(st.lists(st.lists(ids, max_size=9), min_size=1, max_size=9).filter(any))
    flat = [i for d in documents for i in d]
    eot = data.draw(st.none() | st.sampled_from(flat))
    block = data.draw(st.sampled_from([1, 2, 3, 1 << 20]))
    source = TokenFile.open(foreign.written(a, folder, "a", documents, first), first)

    before, module.BLOCK_IDS = module.BLOCK_IDS, block
    try:
        about, _ = convert(source, folder / NAME[b], to=b, dtype=second, eot_id=eot)
        there = TokenFile.open(folder / NAME[b])
        back, _ = convert(there, folder / f"c{NAME[a][1:]}", to=a, dtype=first)
    finally:
        module.BLOCK_IDS = before

    by_eot, cut = [], [0]
    for place, id in enumerate(flat, 1):
        if id == eot or (place == len(flat) and eot is not None):
            cut.append(place)
    by_eot = [flat[i:j] for i, j in pairwise(cut)]
    known = documents if a == "megatron" else by_eot if eot is not None else None
    path_b = folder / ("b.npy" if b == "npy" else "b.bin")
    assert foreign.read(b, path_b, second) == (flat, (known or [flat]) if b == "megatron" else None)
    path_c = folder / ("c.npy" if a == "npy" else "c.bin")
    known_c = known or ([flat] if b == "megatron" else None)
    assert foreign.read(a, path_c, first) == (flat, (known_c or [flat]) if a == "megatron" else None)
    for path, dtype, said in ((path_b, second, about), (path_c, first, back)):
        assert said == manifest_of(path)
        assert (said["dtype"], said["tokens"], said["max_id"]) == (dtype, len(flat), max(flat))
        again = TokenFile.open(path)
        again.verify()
        assert again.array.tolist() == flat
        assert again.notice is None
        assert said["documents"] == (None if again.document_ends is None and said["eot_id"] is None else
                                     len(known_c or known or [flat]))  # fmt: skip
    names = {p.name for p in folder.iterdir()}
    assert not {n for n in names if n.startswith(".")}, "no temporary file stays"


def test_where_documents_end_is_kept_by_an_id_or_beside(tmp_path: Path) -> None:
    """An id that ends every document and is nowhere else tells; else a file does that the manifest names."""
    ended = [[1, 2, EOT], [3, EOT], [4, EOT]]
    about, notices = convert(opened("megatron", tmp_path, ended), tmp_path / "told.npy")
    assert (about["eot_id"], about["documents"], "document_ends" in about) == (EOT, 3, False)
    assert len(notices) == 1
    assert "every document ends with id 7, which is nowhere else" in notices[0]
    assert not (tmp_path / "told.npy.documents.npy").exists()

    inside = [[1, EOT, 2, EOT], [3, EOT]]
    about, notices = convert(opened("megatron", tmp_path, inside), tmp_path / "beside.npy")
    assert (about["eot_id"], about["documents"]) == (None, 2)
    assert about["document_ends"] == {
        "file": "beside.npy.documents.npy",
        "checksum": _core.payload_checksum(tmp_path / "beside.npy.documents.npy"),
    }
    assert "no id tells where documents end; beside.npy.documents.npy does" in notices[0]
    assert np.load(tmp_path / "beside.npy.documents.npy").tolist() == [4, 6]
    beside = TokenFile.open(tmp_path / "beside.npy")
    assert beside.document_ends is not None
    assert beside.document_ends.tolist() == [4, 6]
    convert(beside, tmp_path / "again.idx")
    assert foreign.read("megatron", tmp_path / "again.bin", "uint16")[1] == inside

    about, notices = convert(opened("megatron", tmp_path, inside), tmp_path / "asked.npy", eot_id=EOT)
    assert (about["eot_id"], about["documents"], "document_ends" in about) == (EOT, 2, True)
    assert "id 7 does not tell" in notices[0]

    about, notices = convert(opened("llmc", tmp_path, ended), tmp_path / "one.idx")
    assert about["documents"] == 1
    assert "one document, since nothing tells" in notices[0]
    assert convert(opened("llmc", tmp_path, ended), tmp_path / "unknown.npy").manifest["documents"] is None


def test_white_space_behind_the_last_document_is_none(tmp_path: Path) -> None:
    """As `bpe-encode` counts: documents stay as many through any format and back."""
    eot = "<|endoftext|>"
    kiln = train_bpe_from_iterator(["the kiln is warm"], vocab_size=270, special_tokens=[eot])
    for name, text, documents in (("a", f"the kiln{eot} is{eot}\n \n", 2), ("b", f"the kiln{eot} is{eot} warm", 3)):
        (tmp_path / "t.txt").write_text(text)
        source = encode_files(kiln, tmp_path / "t.txt", tmp_path / f"{name}.npy", append_eot=False)
        assert source.manifest is not None and source.manifest["documents"] == documents
        for out in (f"{name}.idx", f"{name}2.bin"):
            kind = None if out.endswith("idx") else "llmc"
            assert convert(source, tmp_path / out, to=kind).manifest["documents"] == documents
        ends = TokenFile.open(tmp_path / f"{name}.idx").document_ends
        assert ends is not None and len(ends) == documents and ends[-1] == len(source)
        again = convert(TokenFile.open(tmp_path / f"{name}2.bin"), tmp_path / f"{name}2.npy").manifest
        assert again["documents"] == documents and again["eot_id"] == kiln.eot_id


def test_an_output_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there.npy").write_text("keep")
    source = opened("npy", tmp_path)
    for link, out in (("b.npy", "b.npy"), ("b.idx", "b.idx"), ("c.bin", "c.idx")):
        (tmp_path / link).symlink_to(tmp_path / "there.npy")
        with pytest.raises(FileError, match=rf"{link}: is a symbolic link to .*there\.npy; expected a file's own name"):
            convert(source, tmp_path / out, overwrite=True)
        assert (tmp_path / link).is_symlink() and (tmp_path / "there.npy").read_text() == "keep"
    assert not list(tmp_path.glob(".*"))


def test_an_end_that_does_not_occur_is_said(tmp_path: Path) -> None:
    about, notices = convert(opened("llmc", tmp_path), tmp_path / "b.npy", eot_id=50_256)
    assert about["documents"] == 1
    assert "id 50256, said to end documents, does not occur: one document" in notices[0]
    one = [[1, 2, EOT]]
    assert convert(opened("llmc", tmp_path, one), tmp_path / "c.npy", eot_id=EOT).notices == []
    assert convert(opened("llmc", tmp_path), tmp_path / "d.npy").notices == []


def test_a_file_of_ends_that_no_longer_holds_goes(tmp_path: Path) -> None:
    out = tmp_path / "b.npy"
    convert(opened("megatron", tmp_path, [[1, EOT, 2, EOT], [3, EOT]]), out)
    side = tmp_path / "b.npy.documents.npy"
    assert side.exists()
    convert(opened("llmc", tmp_path), out, overwrite=True)
    assert not side.exists()
    assert TokenFile.open(out).document_ends is None
    side.write_text("mine")
    out.unlink()
    (tmp_path / "b.npy.json").unlink()
    with pytest.raises(OutputExistsError, match=r"b\.npy\.documents\.npy: exists already"):
        convert(opened("llmc", tmp_path), out)
    convert(opened("llmc", tmp_path), out, overwrite=True)
    assert side.read_text() == "mine", "only what a manifest of ours names is ours to remove"


def test_damage_beside_the_ids_is_found(tmp_path: Path) -> None:
    convert(opened("megatron", tmp_path, [[1, EOT, 2, EOT], [3, EOT]]), tmp_path / "b.npy")
    side = tmp_path / "b.npy.documents.npy"
    np.save(side, np.array([3, 6], np.int64))
    with pytest.raises(MismatchError, match=r"b\.npy\.documents\.npy: checksum"):
        convert(TokenFile.open(tmp_path / "b.npy"), tmp_path / "c.idx")
    np.save(tmp_path / "d.npy.documents.npy", np.array([5, 3, 6], np.int64))
    foreign.npy(tmp_path / "d.npy", range(6), "uint16")
    about = {"format": "bytekiln-tokens", "version": 1, "document_ends": {"file": "d.npy.documents.npy"}}
    (tmp_path / "d.npy.json").write_text(json.dumps(about))
    with pytest.raises(FormatError, match=r"d\.npy: ends of documents out of order"):
        convert(TokenFile.open(tmp_path / "d.npy"), tmp_path / "c.idx")


# --- types ----------------------------------------------------------------------------------------------------


def test_ids_that_do_not_fit_are_named_with_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_IDS", 4)
    source = opened("npy", tmp_path, [[1, 2, 3, 4, 5, 65_536, 70_000]], "uint32")
    for dtype, to, place, id, limit in (
        ("uint16", "npy", 5, 65_536, 65_535),
        ("uint16", "llmc", 5, 65_536, 65_535),
        ("int16", "megatron", 5, 65_536, 32_767),
        ("int8", "megatron", 5, 65_536, 127),
    ):
        with pytest.raises(FormatError) as found:
            convert(source, tmp_path / NAME[to], to=to, dtype=dtype)
        assert str(found.value) == (
            f"{source.path}: token {place} is id {id}; expected ids up to {limit}, which {dtype} holds"
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy"], "nothing is left behind"
    big = opened("npy", tmp_path, [[2**31]], "int64")
    for to in ("npy", "megatron"):
        with pytest.raises(FormatError, match="token 0 is id 2147483648"):
            convert(big, tmp_path / NAME[to], to=to, dtype="int32")
    assert convert(big, tmp_path / "b.npy", dtype="uint32").manifest["max_id"] == 2**31


def test_types_by_default(tmp_path: Path) -> None:
    """Those of the source, or the next that the format has; with a known vocabulary as `bpe-encode` chooses."""
    for a, dtype, b, expected in (
        ("npy", "int32", "npy", "int32"),
        ("npy", "uint32", "llmc", "uint32"),
        ("npy", "int32", "llmc", "uint32"),
        ("npy", "uint32", "megatron", "int32"),
        ("megatron", "uint8", "npy", "uint16"),
        ("megatron", "int8", "llmc", "uint16"),
        ("megatron", "int16", "bin", "uint16"),
        ("megatron", "int64", "bin", "int64"),
    ):
        out = tmp_path / NAME[b]
        assert convert(opened(a, tmp_path, dtype=dtype), out, to=b, overwrite=True).manifest["dtype"] == expected
        for stale in (out.with_suffix(".idx"), tmp_path / "a.idx"):
            stale.unlink(missing_ok=True)
    small = train_bpe_from_iterator([], vocab_size=257, special_tokens=["<|endoftext|>"])
    source = opened("npy", tmp_path, dtype="int32")
    about = convert(source, tmp_path / "small.npy", tokenizer=small).manifest
    assert (about["dtype"], about["vocab_size"], about["eot_id"], about["tokenizer_hash"]) == (
        "uint16", 257, 256, small.hash,
    )  # fmt: skip


def test_big_endian_ids_are_the_same_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(IDS, ">u2"))
    convert(TokenFile.open(tmp_path / "a.npy"), tmp_path / "b.npy")
    assert foreign.read("npy", tmp_path / "b.npy", "uint16")[0] == IDS


def test_ids_beyond_the_tokenizer_are_refused(tmp_path: Path) -> None:
    tokenizer = train_bpe_from_iterator([], vocab_size=256)
    with pytest.raises(FormatError, match=r"a\.npy: token 1 is id 256; expected ids below the vocabulary size 256"):
        convert(opened("npy", tmp_path, [[0, 256]]), tmp_path / "b.npy", tokenizer=tokenizer)


def test_another_tokenizer_or_another_end_is_refused(tmp_path: Path) -> None:
    maker, other = (
        train_bpe_from_iterator([t], vocab_size=259, special_tokens=["<|endoftext|>"]) for t in ("ab", "cd")
    )
    (tmp_path / "t.txt").write_text("abc<|endoftext|>abd")
    source = encode_files(maker, tmp_path / "t.txt", tmp_path / "t.npy")
    with pytest.raises(MismatchError, match="found tokenizer hash"):
        convert(source, tmp_path / "b.npy", tokenizer=other)
    with pytest.raises(MismatchError, match=r"eot_id: found 5; expected 257, as t\.npy\.json has it"):
        convert(source, tmp_path / "b.npy", eot_id=5)
    with pytest.raises(MismatchError, match="expected 257, as the tokenizer has it"):
        convert(opened("npy", tmp_path), tmp_path / "b.npy", tokenizer=maker, eot_id=5)


def test_what_our_manifest_says_is_kept(tmp_path: Path) -> None:
    kiln = train_bpe_from_iterator(["the kiln is warm"], vocab_size=270, special_tokens=["<|endoftext|>"])
    (tmp_path / "t.txt").write_text("the kiln<|endoftext|>is warm<|endoftext|>")
    source = encode_files(kiln, tmp_path / "t.txt", tmp_path / "t.npy")
    convert(source, tmp_path / "m.idx")
    convert(TokenFile.open(tmp_path / "m.bin"), tmp_path / "l.bin", to="llmc")
    convert(TokenFile.open(tmp_path / "l.bin"), tmp_path / "t2.npy")
    assert (tmp_path / "t2.npy").read_bytes() == (tmp_path / "t.npy").read_bytes()
    again, first = manifest_of(tmp_path / "t2.npy"), manifest_of(tmp_path / "t.npy")
    assert {**again, "file": "t.npy"} == first


def test_a_damaged_source_gets_no_new_checksum(tmp_path: Path) -> None:
    convert(opened("npy", tmp_path), tmp_path / "b.npy")
    data = bytearray((tmp_path / "b.npy").read_bytes())
    data[-2] ^= 1
    (tmp_path / "b.npy").write_bytes(data)
    with pytest.raises(MismatchError, match=r"b\.npy: checksum"):
        convert(TokenFile.open(tmp_path / "b.npy"), tmp_path / "c.npy")
    assert not (tmp_path / "c.npy").exists()


# --- outputs --------------------------------------------------------------------------------------------------


def refused(kind: type[BytekilnError], message: str, source: TokenFile, out: Path, **options: object) -> None:
    with pytest.raises(kind, match=message):
        convert(source, out, **options)  # type: ignore[arg-type]


def test_names_and_types_that_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened("npy", tmp_path)
    refused(
        ConfigError, r"b\.tok: no known suffix .*expected --to npy, bin, llmc, megatron", source, tmp_path / "b.tok"
    )
    refused(ConfigError, r"expected NAME\.bin or NAME\.idx", source, tmp_path / "b.npy", to="megatron")
    refused(ConfigError, r"b\.idx: with --to llmc", source, tmp_path / "b.idx", to="llmc")
    refused(ConfigError, "found uint32; expected uint8, int8", source, tmp_path / "b.idx", dtype="uint32")
    refused(ConfigError, "found int32; expected uint16, uint32", source, tmp_path / "b.bin", to="llmc", dtype="int32")
    refused(FileError, "no such folder", source, tmp_path / "none" / "b.npy")
    monkeypatch.setattr(llmc, "GREATEST_COUNT", 9)
    refused(ConfigError, r"b\.bin: 10 tokens; expected at most 9", source, tmp_path / "b.bin", to="llmc")
    monkeypatch.setattr(megatron, "LONGEST", 3)
    refused(ConfigError, r"b\.idx: document 0 has 4 tokens; expected at most 3", source, tmp_path / "b.idx", eot_id=EOT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy"]


def test_ids_without_a_header_never_look_like_another_format(tmp_path: Path) -> None:
    """The rest of the file decides nothing: what begins with a magic would be read by it."""
    for head in (b"\x93NUMPY", b"MMIDIDX\0\0\0", struct.pack("<2i", 20240520, 1)):
        source = opened("npy", tmp_path, [[*struct.unpack(f"<{len(head) // 2}H", head), 1, 2, 3]])
        for to in ("bin", "megatron"):
            refused(FormatError, "begin with; expected --to npy or llmc", source, tmp_path / "b.bin", to=to)
        convert(source, tmp_path / "b.npy", overwrite=True)


def test_an_index_that_would_be_taken_for_ours_is_in_the_way(tmp_path: Path) -> None:
    source = opened("npy", tmp_path)
    convert(source, tmp_path / "b.idx")
    refused(ConfigError, r"b\.idx: is a Megatron index and would", source, tmp_path / "b.bin", overwrite=True)
    convert(source, tmp_path / "b.bin", to="llmc", overwrite=True)
    assert TokenFile.open(tmp_path / "b.bin").kind == "llmc"


@pytest.mark.parametrize("to", foreign.KINDS)
def test_outputs_are_refused_and_replaced(to: str, tmp_path: Path) -> None:
    source, out = opened("npy", tmp_path), tmp_path / NAME[to]
    convert(source, out, to=to)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    refused(OutputExistsError, "exists already", source, out, to=to)
    bad = TokenFile.open(foreign.npy(tmp_path / "bad.npy", [1, 70_000], "uint32"))
    refused(FormatError, "token 1 is id 70000", bad, out, to=to, dtype="uint16", overwrite=True)
    (tmp_path / "bad.npy").unlink()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    other = opened("llmc", tmp_path, [[5, 4], [3]])
    convert(other, out, to=to, overwrite=True)
    assert TokenFile.open(out, "uint16").array.tolist() == [5, 4, 3]


@pytest.mark.parametrize("to", foreign.KINDS)
def test_two_writers_are_refused(to: str, tmp_path: Path) -> None:
    ids = tmp_path / ("b.npy" if to == "npy" else "b.bin")
    for path in (ids, ids.with_name(ids.name + ".json")):
        with AtomicFile(path, overwrite=False):
            refused(FileError, "another process is writing it", opened("npy", tmp_path), tmp_path / NAME[to], to=to)


def test_a_manifest_that_a_killed_writer_left_alone_is_replaced(tmp_path: Path) -> None:
    source, out = opened("megatron", tmp_path, [[1, 2], [3]]), tmp_path / "b.idx"
    convert(source, out)
    (tmp_path / "b.bin").unlink()
    convert(source, out)
    TokenFile.open(out).verify()


def test_killed_between_two_names_the_files_do_not_pass_for_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are given one after the other, the ids' last; what a power cut leaves between two of them is refused."""
    out = tmp_path / "b.idx"
    convert(opened("npy", tmp_path), out, eot_id=EOT)
    commit, left = AtomicFile.commit, [1]

    def cut(self: AtomicFile) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        commit(self)

    monkeypatch.setattr(AtomicFile, "commit", cut)
    with pytest.raises(KeyboardInterrupt):
        convert(opened("npy", tmp_path, [[1, 2], [3]]), out, eot_id=2, overwrite=True)
    with pytest.raises(MismatchError, match=r"b\.bin: holds tokens 10; expected 3"):
        TokenFile.open(out)
    left.append(2)
    with pytest.raises(KeyboardInterrupt):  # as many ids of the same type: only their checksum can tell
        convert(opened("npy", tmp_path, [DOCUMENTS[0], [5] * 6]), out, eot_id=EOT, overwrite=True)
    with pytest.raises(MismatchError, match=r"documents; expected|checksum"):
        TokenFile.open(out).verify()


KILLED = """
import sys
import time
from pathlib import Path
from bytekiln import TokenFile
from bytekiln.tokens import convert
convert.BLOCK_IDS = 1000
def wait(done, total):
    if done > total // 2:
        print("half", flush=True)
        while True:  # a signal just before one long call would be seen behind it only
            time.sleep(0.01)
convert.convert(TokenFile.open(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[3], eot_id=7, overwrite=True, progress=wait)
"""


@pytest.mark.parametrize("to", foreign.KINDS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_the_old_output_stays(to: str, how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / NAME[to]
    convert(opened("npy", tmp_path), out, to=to, eot_id=EOT)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    big = foreign.npy(tmp_path / "big.npy", [i % 50 for i in range(9000)], "uint16")
    args = [sys.executable, "-c", KILLED, str(big), str(out), to]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        refused(FileError, "another process is writing it", TokenFile.open(big), out, to=to, overwrite=True)
        child.send_signal(how)
        assert child.wait() != 0
    for name, data in before.items():
        assert (tmp_path / name).read_bytes() == data
    if how == signal.SIGINT:
        assert not list(tmp_path.glob(".*"))
    convert(TokenFile.open(big), out, to=to, eot_id=EOT, overwrite=True)
    again = TokenFile.open(out)
    again.verify()
    assert len(again) == 9000
    assert not list(tmp_path.glob(".*")), "the next writer takes over what was left"


def test_a_full_disk_leaves_the_old_output(tmp_path: Path) -> None:
    out = tmp_path / "b.npy"
    convert(opened("npy", tmp_path), out)
    before = out.read_bytes()
    big = foreign.npy(tmp_path / "big.npy", [1] * 9000, "uint16")
    code = f"""
import resource, signal
from pathlib import Path
from bytekiln import TokenFile
from bytekiln.errors import FileError
from bytekiln.tokens.convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
try:
    convert(TokenFile.open({str(big)!r}), Path({str(out)!r}), overwrite=True)
except FileError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "expected room for the output" in run.stdout, run
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """160 MB of ids and 4 million documents in a process that may grow by a fraction of that."""
    big = tmp_path / "big.npy"
    np.save(big, np.tile(np.arange(10, dtype=np.uint32), 4_000_000))
    code = """
import resource, sys
from pathlib import Path
from bytekiln import TokenFile
from bytekiln.tokens.convert import convert
warm = TokenFile.open(sys.argv[1])
convert(warm, Path(sys.argv[2]), to="megatron", dtype="uint16", eot_id=9)
def anonymous():
    return int([l for l in open("/proc/self/status") if l.startswith("RssAnon")][0].split()[1])
seen = []
convert(warm, Path(sys.argv[3]), to="megatron", dtype="uint16", eot_id=9, progress=lambda *_: seen.append(anonymous()))
print(max(seen))
"""
    small = tmp_path / "small.npy"
    np.save(small, np.arange(10, dtype=np.uint32))
    found = []
    for source in (small, big):
        args = [sys.executable, "-c", code, source, tmp_path / f"{source.stem}1.idx", tmp_path / f"{source.stem}2.idx"]
        found.append(int(subprocess.run(args, capture_output=True, text=True, check=True).stdout))
    assert found[1] - found[0] < 40_000, f"{found} KiB"
    assert TokenFile.open(tmp_path / "big1.idx").index.documents == 4_000_000  # type: ignore[union-attr]


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, command: Callable[..., object]) -> None:
    foreign.llmc(tmp_path / "a.bin", IDS, "uint16")
    said = command("bpe-encode", "convert", "a.bin", "b.npy", "--eot-id", EOT)
    assert "10 in 4 documents, greatest id 9" in said.stdout  # type: ignore[attr-defined]
    assert "llm.c uint16 to .npy uint16" in said.stdout  # type: ignore[attr-defined]
    assert "unknown; name it with --tokenizer" in said.stdout  # type: ignore[attr-defined]
    said = command("bpe-encode", "convert", "b.npy", "c.bin", "--to", "megatron")
    assert "wrote c.bin and c.idx" in said.stdout  # type: ignore[attr-defined]
    assert foreign.read("megatron", tmp_path / "c.bin", "uint16") == (IDS, DOCUMENTS)
    said = command("bpe-encode", "convert", "c.idx", "d.bin", "--to", "llmc", "--dtype", "uint32")
    assert foreign.read("llmc", tmp_path / "d.bin", "uint32")[0] == IDS
    kiln = train_bpe_from_iterator([], vocab_size=258, special_tokens=["<|endoftext|>"])
    kiln.save(tmp_path / "t.json")
    said = command("bpe-encode", "convert", "a.bin", "e.npy", "--tokenizer", "t.json")
    assert kiln.hash in said.stdout  # type: ignore[attr-defined]
    said = command("bpe-encode", "convert", "--help")
    assert "--data-dtype" in said.stdout  # type: ignore[attr-defined]
    assert "examples:" in said.stdout  # type: ignore[attr-defined]
    assert "bpe-encode convert IN OUT" in command("bpe-encode", "--help").stdout  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_ids_without_a_header_need_a_type(dtype: str, tmp_path: Path, command: Callable[..., object]) -> None:
    foreign.raw(tmp_path / "a.bin", IDS, dtype)
    said = command("bpe-encode", "convert", "a.bin", "b.npy", status=2)
    assert re.search(r"a\.bin: .*--data-dtype", said.stderr)  # type: ignore[attr-defined]
    said = command("bpe-encode", "convert", "a.bin", "b.npy", "--dtype", "uint16", status=2)
    assert re.search(r"a\.bin: .*--data-dtype", said.stderr)  # type: ignore[attr-defined]
    assert not (tmp_path / "b.npy").exists()
    command("bpe-encode", "convert", "a.bin", "b.npy", "--data-dtype", dtype)
    assert foreign.read("npy", tmp_path / "b.npy", dtype)[0] == IDS
    command("bpe-encode", "convert", "b.npy", "c.bin")
    command("bpe-encode", "convert", "c.bin", "d.npy")  # its manifest tells
    said = command("bpe-encode", "convert", "c.bin", "e.npy", "--data-dtype", "int64", status=2)
    assert f"holds {dtype}; expected it without --data-dtype int64" in said.stderr  # type: ignore[attr-defined]


def test_the_command_refuses(tmp_path: Path, command: Callable[..., object]) -> None:
    foreign.npy(tmp_path / "a.npy", IDS, "uint16")
    for arguments, words in (
        (["a.npy", "a.npy", "--overwrite"], "is one of the inputs"),
        (["a.npy"], "OUT"),
        (["none.npy", "b.npy"], "none.npy: no such file"),
        (["a.npy", "b.tok"], "expected --to"),
        (["a.npy", "b.npy", "--eot-id", "-3"], "--eot-id"),
        (["a.npy", "b.npy", "--pattern", "gpt2"], "without --tokenizer"),
        (["a.npy", "none/b.npy"], "mkdir -p none"),
        (["a.npy", "b.npy", "--dtyp", "uint16"], "did you mean --dtype?"),
    ):
        assert words in command("bpe-encode", "convert", *arguments, status=2).stderr  # type: ignore[attr-defined]
    command("bpe-encode", "convert", "a.npy", "m.idx")
    said = command("bpe-encode", "convert", "m.bin", "m.idx", "--overwrite", status=2).stderr  # type: ignore[attr-defined]
    assert "is one of the inputs" in said
    assert "--overwrite" in command("bpe-encode", "convert", "a.npy", "m.bin", "--to", "megatron", status=2).stderr  # type: ignore[attr-defined]


def test_a_real_megatron_pair_comes_back_byte_for_byte(tmp_path: Path, command: Callable[..., object]) -> None:
    if not FIXTURE.exists():
        pytest.skip(NO_SHARED)
    name = "meg-gpt2-openwebtext_text_document"
    tokenizer = ["--vocab-path", FIXTURE / "gpt2-tiny-vocab.json", "--merges-path", FIXTURE / "gpt2-tiny-merges.txt"]
    said = command("bpe-encode", "convert", FIXTURE / f"{name}.idx", "a.npy", *tokenizer)
    assert "1,361,845 in 1,000 documents" in said.stdout  # type: ignore[attr-defined]
    command("bpe-encode", "convert", "a.npy", "b.bin", "--to", "llmc")
    command("bpe-encode", "convert", "b.bin", "c.idx")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"c{suffix}").read_bytes() == (FIXTURE / f"{name}{suffix}").read_bytes()
    about = manifest_of(tmp_path / "c.bin")
    assert (about["vocab_size"], about["eot_id"], about["documents"]) == (5000, 4999, 1000)
    kiln = Tokenizer.from_vocab_and_merges(tokenizer[1], tokenizer[3])
    ids = TokenFile.open(tmp_path / "a.npy").array[:200].tolist()
    assert kiln.encode(kiln.decode(ids)) == ids
