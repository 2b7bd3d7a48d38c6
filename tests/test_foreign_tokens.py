"""Token files of llm.c and Megatron, and what is refused in them; training reads every format alike."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import foreign_tokens as foreign
from bytekiln import TokenFile
from bytekiln.data import Data, open_data
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError
from conftest import NO_SHARED, SHARED
from lm_runs import VOCAB, tiny

FIXTURE = SHARED / "megatron" / "meg-gpt2-openwebtext_text_document.bin"
DOCUMENTS = [[1, 2, 3, 60], [60], [4, 5, 60], [7, 8, 9]]
IDS = [i for d in DOCUMENTS for i in d]


def refused(path: Path, *words: str, dtype: str | None = None, kind: type[BytekilnError] = FormatError) -> None:
    with pytest.raises(kind) as found:
        TokenFile.open(path, dtype)
    for word in words:
        assert word in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_every_type_of_every_format_is_read(kind: str, tmp_path: Path) -> None:
    for dtype in foreign.HELD[kind]:
        path = foreign.written(kind, tmp_path, f"of_{dtype}", DOCUMENTS, dtype)
        file = TokenFile.open(path, dtype if kind == "bin" else None)
        assert (file.kind, str(file.dtype), file.array.tolist()) == (kind, dtype, IDS)
        assert file.notice is None
        assert not file.array.flags.writeable
        ends = file.document_ends
        assert (ends.tolist() if ends is not None else None) == ([4, 5, 8, 11] if kind == "megatron" else None)


def test_magic_decides_and_never_the_suffix(tmp_path: Path) -> None:
    """OLMo's files are called .npy and have no header; llm.c's may be called anything."""
    assert TokenFile.open(foreign.raw(tmp_path / "part-0.npy", IDS, "uint32"), "uint32").kind == "bin"
    assert TokenFile.open(foreign.llmc(tmp_path / "shard.npy", IDS, "uint16")).kind == "llmc"
    assert TokenFile.open(foreign.npy(tmp_path / "x.idx", IDS, "uint16")).kind == "npy"
    path = foreign.megatron(tmp_path / "m.bin", DOCUMENTS, "uint16")
    by_index = TokenFile.open(path.with_suffix(".idx"))
    assert (by_index.path, by_index.kind) == (path, "megatron")
    path.with_suffix(".idx").write_bytes(b"another program's index")
    assert TokenFile.open(path, "uint16").kind == "bin"


def test_documents_of_several_sequences_and_of_none(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(foreign.packed(range(6), "int32"))
    path.with_suffix(".idx").write_bytes(foreign.index([2, 0, 3, 1], [0, 2, 2, 4], 4, 4))
    file = TokenFile.open(path)
    assert file.document_ends is not None
    assert file.document_ends.tolist() == [2, 2, 6]
    assert file.index is not None
    assert (file.index.sequences, file.index.documents) == (4, 3)


def test_llmc_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    whole = foreign.llmc(path, IDS, "uint16").read_bytes()
    path.write_bytes(whole[:-3])
    refused(path, "t.bin: truncated: 19 bytes of ids; expected 22 for 11 tokens of uint16")
    path.write_bytes(whole[:1000])
    refused(path, "t.bin: truncated: 1000 bytes; expected an llm.c header of 1024")
    path.write_bytes(whole + b"\0\0")
    refused(path, "t.bin: 2 bytes behind the 11 tokens of uint16")
    refused(foreign.llmc(path, IDS, "uint16", version=2), "version 2", "expected 1 for magic 20240520")
    refused(foreign.llmc(path, IDS, "uint32", version=1), "version 1", "expected 7 for magic 20240801")
    refused(foreign.llmc(path, [], "uint16"), "0 tokens")
    refused(foreign.llmc(path, [], "uint16", count=-5), "-5 tokens")
    path.write_bytes(struct.pack("<256i", 20240522, 1, 4, 100, *[0] * 252) + b"\xff\xff")
    refused(path, "multiple-choice questions (magic 20240522)")


def test_npy_with_bytes_behind_it_is_refused(tmp_path: Path) -> None:
    path = foreign.npy(tmp_path / "t.npy", IDS, "uint16")
    path.write_bytes(path.read_bytes() + b"xyz")
    refused(path, "t.npy: 3 bytes behind the 11 tokens of uint16")


def test_megatron_files_that_are_refused(tmp_path: Path) -> None:
    path = foreign.megatron(tmp_path / "m.bin", DOCUMENTS, "uint16")
    idx = path.with_suffix(".idx")
    data, whole = path.read_bytes(), idx.read_bytes()
    lengths, marks = [4, 1, 3, 3], [0, 1, 2, 3, 4]
    wrong_pointer = bytearray(whole)
    struct.pack_into("<q", wrong_pointer, 34 + 4 * 4 + 8, 6)
    indices: list[tuple[bytes, str]] = [
        (whole[:20], "m.idx: truncated: 20 bytes; expected a Megatron index of 34"),
        (whole[:-1], f"m.idx: truncated: {len(whole) - 1} bytes; expected {len(whole)}"),
        (whole + b"12345", "m.idx: 5 bytes behind its end"),
        (whole + bytes(4), "m.idx: a mode for every sequence"),
        (bytes(wrong_pointer), "m.idx: sequence 1 begins at byte 6; expected 8"),
        (foreign.index(lengths, marks, 8, 2, version=2), "m.idx: version 2 of a Megatron index; expected 1"),
        (foreign.index(lengths, marks, 7, 4), "m.idx: type 7 (float32); expected integer ids"),
        (foreign.index(lengths, marks, 6, 8), "m.idx: type 6 (float64)"),
        (foreign.index(lengths, marks, 99, 2), "m.idx: type 99 (unknown)"),
        (foreign.index([4, -1, 5, 3], marks, 8, 2), "m.idx: sequence 1 has length -1"),
        (foreign.index(lengths, [0, 2, 1, 3, 4], 8, 2), "m.idx: documents out of order"),
        (foreign.index(lengths, [1, 2, 3, 4], 8, 2), "m.idx: documents out of order"),
        (foreign.index(lengths, [0, 2, 3], 8, 2), "m.idx: documents of 3 sequences; expected all 4"),
        (foreign.index([], [0], 8, 2), "m.idx: no documents"),
        (foreign.index(lengths, marks, 4, 4), "m.bin: truncated: 22 bytes; expected 44 for 11 tokens of int32"),
    ]
    for content, message in indices:
        idx.write_bytes(content)
        refused(path, message)
    idx.write_bytes(whole)
    path.write_bytes(data[:-2])
    refused(path, "m.bin: truncated: 20 bytes; expected 22")
    path.write_bytes(data + b"\0\0\0")
    refused(path, "m.bin: 3 bytes too many; expected 22")
    path.unlink()
    refused(idx, "m.bin: no such file", kind=FileError)
    path.write_bytes(foreign.packed([3, -2], "int8"))
    idx.write_bytes(foreign.index([2], [0, 1], 2, 1))
    refused(path, "m.bin: token 1 is id -2; expected ids from 0 on")


def test_where_a_manifest_says_that_documents_end(tmp_path: Path) -> None:
    path = foreign.npy(tmp_path / "t.npy", IDS, "uint16")
    side = tmp_path / "t.npy.documents.npy"
    about = {"format": "bytekiln-tokens", "version": 1, "dtype": "uint16", "documents": 3}

    def told(**more: object) -> None:
        (tmp_path / "t.npy.json").write_text(json.dumps({**about, **more}))

    told(document_ends={"file": side.name})
    refused(path, "t.npy.documents.npy: no such file", kind=FileError)
    np.save(side, np.array([4, 4, 11], np.int64))
    assert TokenFile.open(path).document_ends is not None
    assert TokenFile.open(path).document_ends.tolist() == [4, 4, 11]
    np.save(side, np.array([4, 11], np.int64))
    refused(path, "2 documents; expected 3", kind=MismatchError)
    np.save(side, np.array([4, 8, 10], np.int64))
    refused(path, "the last document ends at token 10; expected 11", kind=MismatchError)
    for name in ("../t.npy", "", "..", 7):
        told(document_ends={"file": name})
        refused(path, "document_ends", "expected the name of a file beside it")


def test_a_real_megatron_pair() -> None:
    if not FIXTURE.exists():
        pytest.skip(NO_SHARED)
    file = TokenFile.open(FIXTURE)
    assert (file.kind, str(file.dtype), len(file)) == ("megatron", "uint16", 1_361_845)
    ends = file.document_ends
    assert ends is not None
    assert len(ends) == 1000
    assert set(file.array[ends - 1].tolist()) == {4999}
    assert np.count_nonzero(file.array == 4999) == 1000


# --- training --------------------------------------------------------------------------------------------------


def batches(data: Data) -> list[list[object]]:
    found = [data.train.batch(0, 0, 0, 40), data.train.batch(3, 120, 0, 9), *data.train_eval.batches(4, 0)]
    assert data.val is not None
    found += data.val.batches(5, 2)
    return [[None if t is None else t.tolist() for t in b[:3]] + [b.count] for b in found]


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": "shuffled"},
        {"sampling": "random"},
        {"document_mask": True},
        {"windows": "packed"},
        {"objective": "mlm"},
    ],
    ids=str,
)
def test_windows_are_the_same_from_every_format(tmp_path: Path, settings: dict[str, object]) -> None:
    from bytekiln import train_bpe_from_iterator

    rng = np.random.default_rng(0)
    tokenizer = train_bpe_from_iterator([], vocab_size=257, special_tokens=["<|endoftext|>"])
    documents = [[*rng.integers(1, 60, n).tolist(), 256] for n in rng.integers(1, 30, 60)]
    found = []
    for kind in foreign.KINDS:
        for dtype in foreign.HELD[kind]:
            if dtype.endswith("int8"):
                continue
            train = foreign.written(kind, tmp_path, f"train_{kind}_{dtype}", documents, dtype)
            val = foreign.written(kind, tmp_path, f"val_{kind}_{dtype}", documents[:20], dtype)
            run = {"train_data": str(train), "val_data": str(val), "vocab_size": 0, "d_model": 16, **settings}
            config = tiny(tmp_path, **run, data_dtype=dtype if kind == "bin" else "")
            found.append(batches(open_data(config, tokenizer)))
    assert all(f == found[0] for f in found)
    assert found[0]


def test_narrow_types_of_megatron_are_trained_on(tmp_path: Path) -> None:
    wide = foreign.written("npy", tmp_path, "wide", [[i % VOCAB for i in range(300)]], "int64")
    narrow = foreign.written("megatron", tmp_path, "narrow", [[i % VOCAB for i in range(300)]], "int8")
    a, b = (batches(open_data(tiny(tmp_path, train_data=str(p), val_data=str(p)), None)) for p in (wide, narrow))
    assert a == b


@pytest.mark.slow
def test_lm_train_reads_them(tmp_path: Path, command: Callable[..., object]) -> None:
    documents = [[i % VOCAB for i in range(400)], [i * 7 % VOCAB for i in range(300)]]
    shape = ("--vocab-size", VOCAB, "--d-model", 16, "--num-layers", 1, "--num-heads", 2, "--context-length", 8)
    steps = ("--batch-size", 2, "--max-steps", 2, "--device", "cpu", "--compile", "false", "--decay-lr", "false")
    results = []
    for kind in ("npy", "llmc", "megatron"):
        path = foreign.written(kind, tmp_path, f"t_{kind}", documents, "uint16")
        path = path.with_suffix(".idx") if kind == "megatron" else path
        command("lm-train", "--train-data", path, "--out-dir", f"run_{kind}", *shape, *steps)
        rows = (tmp_path / f"run_{kind}" / "metrics.csv").read_text().splitlines()
        results.append([r.split(",")[3] for r in rows])
    assert results[0] == results[1] == results[2]


def test_who_names_the_tokenizer_is_told(tmp_path: Path) -> None:
    path = foreign.llmc(tmp_path / "t.bin", IDS * 9, "uint16")
    with pytest.raises(ConfigError, match=r"t\.bin has no manifest; expected --tokenizer FILE or --vocab-size N"):
        open_data(tiny(tmp_path, train_data=str(path), vocab_size=0, val_data=""), None)
    (tmp_path / "t.bin.json").write_text(json.dumps({"format": "bytekiln-tokens", "version": 1, "vocab_size": None}))
    with pytest.raises(ConfigError, match=r"manifest that does not name it; expected --tokenizer FILE"):
        open_data(tiny(tmp_path, train_data=str(path), vocab_size=0, val_data=""), None)


def test_lm_score_knows_them_from_texts(tmp_path: Path) -> None:
    from bytekiln.score.text import _is_token_file

    path = foreign.llmc(tmp_path / "shard", IDS, "uint16")
    assert _is_token_file(path, None)
    index = foreign.megatron(tmp_path / "m.bin", DOCUMENTS, "uint16").with_suffix(".idx")
    assert _is_token_file(index, None)
    (tmp_path / "m.txt").write_text("a text beside an index")
    assert not _is_token_file(tmp_path / "m.txt", None)
