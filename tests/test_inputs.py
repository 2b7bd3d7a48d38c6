"""Inputs as a user gives them: packed files, records, folders, globs, standard input, a part of the text.

The crate's own tests (`tests/rust/inputs.rs`) hold every combination to the plain reading of its documents; here the
files are made by other people's tools and read by the commands.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import _core, parquet
from bytekiln.bpe_flags import byte_size
from bytekiln.errors import ConfigError, FileError, FormatError, MissingExtraError, TextError
from bytekiln.inputs import Inputs

EOT = "<|endoftext|>"
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
WORDS = "the kiln is warm and the clay is wet so the potter turns the wheel and the bowl grows".split()
DOCUMENTS = [f"{' '.join(WORDS[i % 7 :])}, bowl {i}.\n" for i in range(200)]


def trained(inputs: Any, **options: Any) -> tuple[str, dict[str, Any]]:
    """The hash of a tokenizer made of some inputs, and the statistics."""
    settings = {"vocab_size": 300, "special_tokens": [EOT], **options}
    (tokenizer,), stats = _core.train_bpe(inputs, **settings)
    return tokenizer.hash, stats


def by_documents(documents: list[str]) -> str:
    return bytekiln.train_bpe_from_iterator(documents, vocab_size=300, special_tokens=[EOT]).hash


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "plain.txt"
    path.write_text(EOT.join(DOCUMENTS), encoding="utf-8")
    return path


def jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"n": i, field: d}) + "\n" for i, d in enumerate(documents)), encoding="utf-8")
    return path


def table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


# --- packed files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("members", [1, 2, 3])
def test_packed_text_is_the_text(text: Path, tmp_path: Path, packing: str, members: int) -> None:
    """Written by Python's and pyarrow's packers, as one member or several one behind the other."""
    whole = text.read_bytes()
    borders = [len(whole) * i // members for i in range(members + 1)]
    packed = b"".join(PACKERS[packing](whole[a:b]) for a, b in itertools.pairwise(borders))
    path = tmp_path / f"packed.txt.{packing}"
    path.write_bytes(packed)
    expected, stats = trained([text])
    found, packed_stats = trained([path])
    assert found == expected and packed_stats["bytes"] == stats["bytes"] == len(whole)
    for chunk_bytes, threads in ((1, 1), (1000, 3)):
        assert trained([path], chunk_bytes=chunk_bytes, threads=threads)[0] == expected


@pytest.mark.parametrize("tool", ["gzip", "xz", "bzip2", "zstd"])
def test_packed_by_the_usual_tools(command, text: Path, tmp_path: Path, tool: str) -> None:
    """As people pack: the tool itself, where it is installed (gzip, xz and bzip2 come with every Linux)."""
    packed = tmp_path / f"by_{tool}"
    try:
        packed.write_bytes(subprocess.run([tool, "-c", text], check=True, capture_output=True).stdout)
    except FileNotFoundError:
        packed.write_bytes(PACKERS[{"gzip": "gz", "bzip2": "bz2", "zstd": "zst"}.get(tool, tool)](text.read_bytes()))
    line = ["--vocab-size", 300, "--special-token", EOT, "--json", "--out"]
    plain = json.loads(command("bpe-train", text, *line, "plain.json").stdout)
    found = json.loads(command("bpe-train", packed, *line, "packed.json").stdout)
    assert (found["hash"], found["bytes"]) == (plain["hash"], plain["bytes"])


@pytest.mark.parametrize("packing", PACKERS)
def test_a_packed_file_that_ends_too_early(command, text: Path, tmp_path: Path, packing: str) -> None:
    """In its head, in its middle, in its last bytes: one line, with the file and the place, and nothing written."""
    whole = PACKERS[packing](text.read_bytes())
    path = tmp_path / f"short.txt.{packing}"
    for keep in (2, 11, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        error = command("bpe-train", path, "--vocab-size", 300, "--out", "x.json", status=2).stderr
        assert path.name in error and ("end in the middle" in error or "first bytes" in error), error
        assert not (tmp_path / "x.json").exists()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        FormatError, match=r"byte \d+ of the file: the \w+ data end in the middle, after \d+ bytes of text"
    ):
        trained([path])


@pytest.mark.parametrize("packing", PACKERS)
def test_corrupt_or_misnamed(text: Path, tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"bad.{packing}"
    path.write_bytes(PACKERS[packing](text.read_bytes()) + b"what is this?")
    with pytest.raises(FormatError, match=r"bad.*corrupt \w+ data after \d+ bytes"):
        trained([path])
    path.write_bytes(text.read_bytes())
    with pytest.raises(FormatError, match="its first bytes are not"):
        trained([path])
    unnamed = tmp_path / "no_ending"
    unnamed.write_bytes(PACKERS[packing](text.read_bytes()))
    assert trained([unnamed])[0] == trained([text])[0]


def peak_of(folder: Path, *arguments: object) -> tuple[int, str, int]:
    """Exit status, what was said and peak memory in bytes of `bpe-train` in a process of its own."""
    code = (
        "import sys; from bytekiln.cli import bpe_train; from bytekiln.cli_train import peak_memory_bytes\n"
        "sys.argv[0] = 'bpe-train'\n"
        "try: status = bpe_train()\n"
        "except SystemExit as end: status = end.code\n"
        "print(peak_memory_bytes()); sys.exit(status)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--vocab-size", "300", "--out", "x.json", "--overwrite"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr, int(run.stdout.splitlines()[-1])


def bomb(path: Path, unit: bytes, size: int) -> Path:
    """A gzip file that unpacks to `size` bytes: one member of 16 MiB, again and again."""
    block = unit * ((16 << 20) // len(unit))
    member = gzip.compress(block, 9)
    with path.open("wb") as file:
        for _ in range(-(-size // len(block))):
            file.write(member)
    return path


def test_a_bomb_stays_in_bounded_memory(tmp_path: Path) -> None:
    """A thousand times as much text as file: memory is that of the start and a few chunks."""
    small = bomb(tmp_path / "small.txt.gz", b"a few words, again and again\n", 1)
    large = bomb(tmp_path / "large.txt.gz", b"a few words, again and again\n", 600_000_000)
    assert large.stat().st_size < 4_000_000
    status, said, before = peak_of(tmp_path, small)
    assert status == 0, said
    status, said, peak = peak_of(tmp_path, large)
    assert status == 0, said
    assert peak < before + 16_000_000, f"{peak:,} bytes, a small file {before:,}"


@pytest.mark.slow
def test_ten_gigabytes_from_ten_megabytes(tmp_path: Path) -> None:
    large = bomb(tmp_path / "large.txt.gz", b"a few words, again and again\n", 10_000_000_000)
    line = bomb(tmp_path / "line.jsonl.gz", b'{"text": "a few words, again and again"}\n', 1_000_000_000)
    for path in (large, line):
        status, said, peak = peak_of(tmp_path, path)
        assert status == 0 and peak < 200_000_000, f"{said}\n{peak:,}"
    # The one exception: text without any border, up to 1 GiB of it; behind that it is refused.
    status, said, peak = peak_of(tmp_path, bomb(tmp_path / "word.txt.gz", b"a", 10_000_000_000))
    assert status == 2 and "no certain border" in said and peak < 1.3 * 2**30, f"{said}\n{peak:,}"


# --- records ----------------------------------------------------------------------------------------------------


def test_each_record_is_a_document(tmp_path: Path) -> None:
    """No pre-token crosses their borders, and special tokens inside are text."""
    documents = [*DOCUMENTS, "ends without space", "begins so", "", f"a{EOT}b", "\n", "é 日本 😀 \u2028 \x00"]
    path = jsonl(tmp_path / "x.jsonl", documents)
    # A tokenizer that knows no special token counts its text as what it is.
    plain = bytekiln.train_bpe_from_iterator(documents, vocab_size=301).merges
    for chunk_bytes, threads in ((1, 1), (500, 3), (1 << 20, 2)):
        found = _core.train_bpe([path], vocab_size=302, special_tokens=[EOT], chunk_bytes=chunk_bytes, threads=threads)
        assert found[0][0].merges == plain
        assert found[1]["bytes"] == sum(len(d.encode()) for d in documents)
    packed = tmp_path / "x.ndjson.zst"
    packed.write_bytes(PACKERS["zst"](path.read_bytes()))
    assert trained([packed])[0] == trained([path])[0]
    renamed = jsonl(tmp_path / "y.jsonl", documents, field="body")
    assert trained(Inputs([renamed], field="body"))[0] == trained([path])[0]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.text(max_size=30), min_size=1, max_size=8), ascii_only=st.booleans())
def test_any_text_comes_out_of_json_as_it_went_in(tmp_path: Path, documents: list[str], ascii_only: bool) -> None:
    """As Python writes JSON, with and without escapes; surrogates that hypothesis leaves out stand in other tests."""
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": d}, ensure_ascii=ascii_only) for d in documents), encoding="utf-8")
    tokenizer = bytekiln.train_bpe_from_iterator([""], vocab_size=257, special_tokens=[EOT])
    found = bytekiln.encode_files(tokenizer, path, tmp_path / "x.npy", overwrite=True)
    ids = np.asarray(found.array)
    assert tokenizer.decode_bytes(ids, skip_special_tokens=True) == "".join(documents).encode()
    assert np.count_nonzero(ids == tokenizer.eot_id) == len(documents)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "open', ["line 3", "JSON", "column"]),
        ("plain text", ["line 3", "JSON"]),
        ('["text"]', ["line 3", "object"]),
        ('{"body": "b"}', ["line 3", "no field", "text", "--field"]),
        ('{"text": 7}', ["line 3", "integer", "text"]),
        ('{"text": null}', ["line 3", "null"]),
        ('{"text": "half a pair \\ud83d"}', ["line 3", "byte 12", "UTF-8"]),
    ],
)
def test_a_bad_line_is_named(command, tmp_path: Path, line: str, words: list[str]) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n')
    error = command("bpe-train", "x.jsonl", "--vocab-size", 300, "--out", "x.json", status=2).stderr
    assert all(word in error for word in ["x.jsonl", *words]), error
    assert not (tmp_path / "x.json").exists()


def test_half_a_pair_goes_by_the_policy(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "ab \\ud83d"}\n')
    with pytest.raises(TextError, match=r"x\.jsonl: line 1"):
        trained([tmp_path / "x.jsonl"])
    assert trained([tmp_path / "x.jsonl"], errors="replace")[1]["pretokens"] > 1
    assert trained([tmp_path / "x.jsonl"], errors="bytes")[1]["bytes"] == 6


def test_records_are_encoded_and_ended(command, tmp_path: Path) -> None:
    """Also with a special token in their text, which is no token there; and `bpe-inspect` reads them too."""
    documents = ["the kiln", f"the {EOT} clay", "", "wet"]
    path = jsonl(tmp_path / "x.jsonl", documents)
    command("bpe-train", path, "--vocab-size", 260, "--special-token", EOT, "--out", "t.json")
    command("bpe-encode", path, "--tokenizer", "t.json", "--out", "x.npy")
    t = bytekiln.Tokenizer.from_file(tmp_path / "t.json")
    expected = [id for d in documents for id in (*t.encode(d), t.eot_id)]
    assert np.load(tmp_path / "x.npy").tolist() == expected
    manifest = json.loads((tmp_path / "x.npy.json").read_text())
    assert manifest["documents"] == 4 and manifest["text_bytes"] == sum(map(len, documents))
    found = json.loads(command("bpe-inspect", "t.json", "--text", path, "--json").stdout)
    assert found["bytes"] == sum(map(len, documents))


# --- parquet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_a_column_is_its_documents(tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [*DOCUMENTS, "", "é 日本", f"a{EOT}b"]
    path = tmp_path / "x.parquet"
    table(path, {"n": list(range(len(documents))), "text": pa.array(documents).cast(kind)}, row_group_size=70)
    expected = trained([jsonl(tmp_path / "x.jsonl", documents)])
    for chunk_bytes, threads, batch in ((1, 1, 1), (1000, 3, 500), (1 << 20, 2, 1 << 20)):
        monkeypatch.setattr(parquet, "BATCH_BYTES", batch)
        found = trained([path], chunk_bytes=chunk_bytes, threads=threads)
        assert found[0] == expected[0] and found[1]["bytes"] == expected[1]["bytes"]


def test_parquet_by_its_column(command, tmp_path: Path) -> None:
    table(tmp_path / "x.parquet", {"body": DOCUMENTS, "n": list(range(200))}, compression="zstd")
    line = ["bpe-train", "x.parquet", "--vocab-size", 300, "--special-token", EOT, "--json", "--out", "t.json"]
    error = command(*line, status=2).stderr
    assert all(word in error for word in ("x.parquet", "no column 'text'", "body, n", "--field")), error
    error = command(*line, "--field", "n", status=2).stderr
    assert "holds int64" in error and "expected text" in error
    found = json.loads(command(*line, "--field", "body").stdout)
    assert found["hash"] == by_documents(DOCUMENTS)
    command("bpe-encode", "x.parquet", "--field", "body", "--tokenizer", "t.json", "--out", "x.npy")
    t = bytekiln.Tokenizer.from_file(tmp_path / "t.json")
    assert np.load(tmp_path / "x.npy").tolist() == [id for d in DOCUMENTS for id in (*t.encode(d), t.eot_id)]


def test_a_group_of_rows_is_not_held_as_a_whole(tmp_path: Path) -> None:
    text = np.random.default_rng(1).integers(97, 123, size=80_000_000, dtype=np.uint8).tobytes().decode()
    rows = [text[i : i + 400] for i in range(0, len(text), 400)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "x.parquet", compression="none", use_dictionary=False)
    code = (
        "import resource, pyarrow.parquet; from bytekiln.parquet import Column\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "column, before, size = Column('x.parquet', 'text'), peak(), 0\n"
        "while batch := column.next(1 << 30): size += len(batch[1])\n"
        "print(size, peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    size, peak = map(int, run.stdout.split())
    assert size == len(text) and peak * (1 if sys.platform == "darwin" else 1024) < 60_000_000, run.stdout


def test_rows_that_repeat_a_text_are_not_written_out_together(tmp_path: Path) -> None:
    """4,000 rows of 100 kB in a file of some kilobytes: 400 MB of text passes, some megabytes at a time."""
    table(tmp_path / "x.parquet", {"text": ["kiln " * 20_000] * 4_000}, compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 20_000
    code = (
        "import resource, pyarrow.parquet; from bytekiln import Counts\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "counts = Counts.from_files('x.parquet', max_memory=32 << 20, threads=2)\n"
        "print(counts.about['bytes'], counts.about['documents'], peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    size, rows, peak = map(int, run.stdout.split())
    assert (size, rows) == (400_000_000, 4_000)
    assert peak * (1 if sys.platform == "darwin" else 1024) < 60_000_000, run.stdout


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_row_that_has_no_room_is_refused(tmp_path: Path, dictionary: bool) -> None:
    table(tmp_path / "x.parquet", {"text": ["a b", "c", "kiln " * 1_000_000, "d"]}, use_dictionary=dictionary)
    with pytest.raises(FormatError, match=r"x\.parquet: row 3: longer than \d+ bytes.* or a larger --max-memory"):
        bytekiln.Counts.from_files(tmp_path / "x.parquet", max_memory=16 << 20)
    assert bytekiln.Counts.from_files(tmp_path / "x.parquet").about["documents"] == 4
    table(tmp_path / "x.parquet", {"text": ["kiln " * 1_000_000] * 2}, use_dictionary=False)
    with pytest.raises(FormatError, match=r"x\.parquet: rows 1 to 2: 5,000,\d+ bytes of text on average"):
        bytekiln.Counts.from_files(tmp_path / "x.parquet", max_memory=16 << 20)


def test_a_group_of_rows_that_never_comes_is_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    short = pa.table({"text": [f"clay {n}" for n in range(1000)]})
    long = pa.table({"text": ["kiln " * 1_000_000, "glaze " * 1_000_000]})
    with pq.ParquetWriter(path, short.schema) as writer:
        writer.write_table(short)
        writer.write_table(long)
    assert 490 < bytekiln.Counts.from_files(Inputs([path], limit_bytes=500), max_memory=16 << 20).about["bytes"] <= 500
    with pytest.raises(FormatError, match=r"x\.parquet: rows 1,001 to 1,002: [\d,]+ bytes of text on average"):
        bytekiln.Counts.from_files(path, max_memory=16 << 20)


ENCODINGS = {
    "PLAIN": {"use_dictionary": False},
    "DELTA_BYTE_ARRAY": {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    "DELTA_LENGTH_BYTE_ARRAY": {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
    "PLAIN_DICTIONARY": {"version": "1.0"},
    "RLE_DICTIONARY": {"version": "2.6", "data_page_version": "2.0"},
}


def texts_of(path: Path) -> list[str]:
    column, found = parquet.Column(str(path), "text"), []
    while part := column.next(1 << 30):
        borders = np.frombuffer(part[0], dtype=np.int64)
        assert borders[-1] - borders[0] == len(part[1]) or len(borders) == 2 or len(part[1]) < 3 << 20
        found += [part[1][a:b].decode() for a, b in itertools.pairwise(borders)]
    return found


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("group", [700, 1 << 20])
def test_every_encoding_is_read(tmp_path: Path, encoding: str, group: int) -> None:
    """Texts that repeat, short and long ones, so that a dictionary is asked for wherever there is one."""
    path = tmp_path / "x.parquet"
    texts = [f"kiln {n % 7} " * (1 + n % 7 * 2000) for n in range(3000)] + [f"clay {n}" for n in range(3000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=group, **ENCODINGS[encoding])
    file = pq.ParquetFile(path)
    assert encoding in file.metadata.row_group(0).column(0).encodings
    column = parquet.Column(str(path), "text")
    assert column._repeats(column._groups[0]) == ("DICTIONARY" in encoding)
    assert texts_of(path) == texts


def test_dictionaries_are_asked_for_where_few_texts_repeat(tmp_path: Path) -> None:
    """Each group of rows decides for itself: what has few texts in many rows, and nothing else."""
    path = tmp_path / "x.parquet"
    letters = np.random.default_rng(1).integers(97, 123, size=8_000_000, dtype=np.uint8).tobytes().decode()
    plain = [letters[i : i + 80] for i in range(0, len(letters), 80)]
    groups = [
        plain,
        plain[:100],
        ["kiln " * 20_000, "clay"] * 2000,
        plain[:1000],
        [letters[i : i + 900] for i in range(1000)],
    ]
    tables = [pa.table({"text": group}) for group in groups]
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for group in tables:
            writer.write_table(group)
    column = parquet.Column(str(path), "text")
    assert [column._repeats(group) for group in column._groups] == [False, False, True, False, False]
    assert texts_of(path) == [text for group in groups for text in group]


@pytest.mark.parametrize("options", [{}, {"data_page_version": "2.0"}, {"write_page_checksum": True}], ids=str)
def test_a_dictionary_says_how_many_texts_it_has(tmp_path: Path, options: dict[str, Any]) -> None:
    """Else a row is read for it, with all the dictionary."""
    for texts, packing in itertools.product((1, 63, 64, 9000), ("none", "snappy", "zstd")):
        path = table(
            tmp_path / "x.parquet", {"text": [str(n % texts) for n in range(9000)]}, compression=packing, **options
        )
        at = pq.ParquetFile(path).metadata.row_group(0).column(0).dictionary_page_offset
        head = path.read_bytes()[at : at + parquet.HEAD_BYTES]
        assert parquet._texts_in(head) == texts
        assert all(parquet._texts_in(head[:n]) in (0, texts) for n in range(12))
    assert parquet._texts_in(b"") == parquet._texts_in(b"\x15\x00" + head[2:]) == parquet._texts_in(b"\xff" * 64) == 0


def test_no_dictionary_is_asked_for_of_an_encoding_that_has_none() -> None:
    """A writer may fall back from a dictionary to another encoding, of which pyarrow makes none."""

    def repeats(*encodings: str) -> bool:
        chunk = SimpleNamespace(
            path_in_schema="text",
            total_uncompressed_size=1 << 20,
            has_dictionary_page=True,
            dictionary_page_offset=4,
            encodings=encodings,
        )
        group = SimpleNamespace(num_rows=4000, num_columns=1, column=lambda _: chunk)
        metadata = SimpleNamespace(num_rows=4000, num_row_groups=1, row_group=lambda _: group)
        return next(parquet._groups(metadata, "text")).dictionary is not None

    assert repeats("PLAIN", "RLE", "RLE_DICTIONARY") and repeats("PLAIN_DICTIONARY", "BIT_PACKED")
    assert not repeats("PLAIN", "RLE", "RLE_DICTIONARY", "DELTA_BYTE_ARRAY")
    assert not repeats("RLE_DICTIONARY", "DELTA_LENGTH_BYTE_ARRAY")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"text": DOCUMENTS}, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"x\.parquet: corrupt or truncated parquet"):
        trained([path])
    path.write_bytes(b"no parquet")
    with pytest.raises(FormatError, match=r"x\.parquet: corrupt or truncated parquet"):
        trained([path])
    path.write_bytes(b"PAR1" + b"\xff" * (len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises((FormatError, TextError), match=r"x\.parquet"):
        trained([path])
    table(path, {"text": ["a", "b", None]})
    with pytest.raises(FormatError, match=r"x\.parquet: row 3: no text in column 'text' \(null\)"):
        trained([path])
    bad = pa.array([b"ab", b"a\xff"]).view(pa.string())
    table(path, {"text": bad})
    with pytest.raises(TextError, match=r"x\.parquet: row 2: byte 1 of the text: invalid UTF-8"):
        trained([path])


def test_parquet_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "x.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'pip install "bytekiln\[data\]"'):
        trained([path])


# --- folders, globs, standard input -----------------------------------------------------------------------------


def test_folders_and_globs(command, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    (shards / "deep").mkdir(parents=True)
    (shards / "b.txt.gz").write_bytes(gzip.compress("".join(DOCUMENTS[50:100]).encode()))
    (shards / "a.txt").write_text("".join(DOCUMENTS[:50]))
    jsonl(shards / "deep" / "c.jsonl", DOCUMENTS[100:])
    (shards / ".hidden.txt").write_text("hidden hidden hidden")
    (shards / "table.csv").write_text("not text")
    expected = by_documents(["".join(DOCUMENTS[:50]), "".join(DOCUMENTS[50:100]), *DOCUMENTS[100:]])
    line = ["--vocab-size", 300, "--special-token", EOT, "--json", "--overwrite", "--out", "t.json"]
    for inputs in (["shards"], ["shards/*.txt*", "shards/deep"], ["shards/**/*.*[tzl]", "--limit-bytes", "1GB"]):
        found = json.loads(command("bpe-train", *inputs, *line).stdout)
        assert found["hash"] == expected, inputs
    assert _core.find_inputs([shards]) == [shards / name for name in ("a.txt", "b.txt.gz", "deep/c.jsonl")]
    error = command("bpe-train", "shards/*.zst", *line, status=2).stderr
    assert "shards/*.zst: no file matches" in error
    (shards / "empty.txt").touch()
    assert (
        "empty.txt: found in a directory of the inputs: empty file (0 bytes)"
        in command("bpe-train", "shards", *line, status=2).stderr
    )


def test_an_output_is_never_one_of_the_files_found(command, text: Path, tmp_path: Path) -> None:
    before = text.read_bytes()
    for inputs in (".", "*.txt"):
        error = command("bpe-train", inputs, "--vocab-size", 300, "--out", text, "--overwrite", status=2).stderr
        assert "is one of the inputs" in error
    assert text.read_bytes() == before


@pytest.mark.parametrize("packing", [None, *PACKERS])
def test_standard_input(command, text: Path, tmp_path: Path, packing: str | None) -> None:
    data = text.read_bytes()
    (tmp_path / "piped").write_bytes(PACKERS[packing](data) if packing else data)
    line = ["--vocab-size", 300, "--special-token", EOT, "--json", "--out", "t.json"]
    with (tmp_path / "piped").open("rb") as piped:
        found = json.loads(command("bpe-train", "-", *line, stdin=piped).stdout)
    assert (found["hash"], found["bytes"]) == (trained([text])[0], len(data))


def test_standard_input_that_cannot_be(command, tmp_path: Path) -> None:
    line = ["--vocab-size", 300, "--out", "t.json"]
    assert "standard input: empty" in command("bpe-train", "-", *line, stdin=subprocess.DEVNULL, status=2).stderr
    assert "twice" in command("bpe-train", "-", "-", *line, stdin=subprocess.DEVNULL, status=2).stderr
    (tmp_path / "x.txt").write_text("the kiln is warm")
    command("bpe-train", "x.txt", "--vocab-size", 256, "--out", "t.json")
    error = command("bpe-inspect", "t.json", "--text", "-", stdin=subprocess.DEVNULL, status=2).stderr
    assert "only once" in error


def test_records_from_standard_input(command, tmp_path: Path) -> None:
    """A field that is named says that they are records."""
    data = jsonl(tmp_path / "x.jsonl", DOCUMENTS).read_text()
    line = ["--vocab-size", 300, "--special-token", EOT, "--json", "--out", "t.json"]
    found = json.loads(command("bpe-train", "-", "--field", "text", *line, input=data).stdout)
    assert found["hash"] == by_documents(DOCUMENTS)
    (tmp_path / "x.txt").write_text("text")
    line[-1] = "u.json"
    assert "text files only" in command("bpe-train", "x.txt", "--field", "text", *line, status=2).stderr


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_waiting_for_standard_input_can_be_stopped(tmp_path: Path, sign: signal.Signals, status: int) -> None:
    p = subprocess.Popen(
        [sys.executable, "-m", "bytekiln.cli", "bpe-train", "-", "--vocab-size", "300", "--out", "x.json"],
        cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert p.stdin is not None and p.stderr is not None
    p.stdin.write(b"some words ")
    p.stdin.flush()
    time.sleep(1)
    assert p.poll() is None
    p.send_signal(sign)
    assert p.wait(timeout=20) == status
    assert b"Traceback" not in p.stderr.read()
    p.stdin.close()
    p.stderr.close()


# --- a part of the text -----------------------------------------------------------------------------------------


def test_the_limit_cuts_between_words(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one two three", encoding="utf-8")
    for limit, words in ((100, 3), (13, 3), (12, 2), (9, 2), (8, 2), (7, 1), (4, 1)):
        stats = trained(Inputs([path], limit_bytes=limit), special_tokens=[])[1]
        assert stats["pretokens"] == words and stats["bytes"] <= limit, limit
    # Without a border the last whole character ends the text.
    path.write_text("日本語", encoding="utf-8")
    for limit, size in ((9, 9), (8, 6), (3, 3), (2, 0)):
        assert trained(Inputs([path], limit_bytes=limit))[1]["bytes"] == size


def test_links_to_nothing(command, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("wet clay")
    for name in (
        ".#a.txt",
        ".notes",
        "old.zip",
        "rows.parquet.gz",
        "a.html",
    ):  # an editor's lock, what would not be read
        (folder / name).symlink_to(tmp_path / "nothing")
    assert trained([folder])[1]["bytes"] == 8
    line = ["bpe-train", folder, "--vocab-size", 300, "--out", "t.json"]
    for name in ("b.txt", "b.gz", "more"):  # the last one may have been a folder
        (folder / name).symlink_to(tmp_path / "nothing")
        said = command(*line, status=2).stderr
        assert f"{name}: is a link to nothing in a directory of the inputs" in said
        (folder / name).unlink()
    for name in (".b", "b.zip"):  # what is there and cannot be reached
        (folder / name).symlink_to(folder / name)
        said = command(*line, status=2).stderr
        assert f"{name}: " in said and "symbolic links" in said
        (folder / name).unlink()
    (folder / "b.html").symlink_to(folder)
    assert "b.html: is a link to a folder that it lies in" in command(*line, status=2).stderr


def test_what_is_wrong_with_a_file_of_a_folder_says_so(command, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt.gz").write_text("wet clay")
    said = command("bpe-train", folder, "--vocab-size", 300, "--out", "t.json", status=2).stderr
    assert "a.txt.gz: found in a directory of the inputs: its first bytes are not gzip's" in said


@pytest.mark.alone
@pytest.mark.parametrize("what", ["sample", "packed", "records", "rows"])
def test_what_is_passed_over_is_left_at_once(tmp_path: Path, what: str) -> None:
    """A sample that takes next to nothing of a large file, or what a resumed run has read before."""
    text, inputs = "the kiln " * 2_000_000, Inputs([tmp_path / "x.txt"], sample=1e-9)
    if what == "rows":
        rows = [text[:9_000]] * 20_000
        table(tmp_path / "x.parquet", {"text": rows}, compression="zstd")
        inputs = Inputs([tmp_path / "x.parquet"], sample=1e-9)
    elif what == "records":
        (tmp_path / "x.jsonl").write_text((json.dumps({"text": text[:900]}) + "\n") * 200_000)
        inputs = Inputs([tmp_path / "x.jsonl"], sample=1e-9)
    elif what == "packed":
        with bz2.open(tmp_path / "x.txt.bz2", "wt", compresslevel=1) as packed:
            packed.write(EOT.join([text] * 3))
        inputs = Inputs([tmp_path / "x.txt.bz2"], sample=1e-9)
    else:
        (tmp_path / "x.txt").write_text(EOT.join([text] * 30))

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    trained(inputs)
    whole, began = time.monotonic() - began, time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trained(inputs, progress=stop)
    assert time.monotonic() - began < max(0.5 * whole, 0.2)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "flags", [{"limit_bytes": 3000}, {"sample": 0.3, "seed": 7}, {"sample": 0.5, "limit_bytes": 900}]
)
def test_a_part_is_the_same_for_all_threads_and_chunks(tmp_path: Path, kind: str, flags: dict[str, Any]) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "txt":
        path.write_text(EOT.join(DOCUMENTS), encoding="utf-8")
    elif kind == "jsonl":
        jsonl(path, DOCUMENTS)
    else:
        table(path, {"text": DOCUMENTS})
    first, stats = trained(Inputs([path], **flags))
    assert 0 < stats["bytes"] < sum(map(len, DOCUMENTS)) * 0.7 and stats["bytes"] <= flags.get("limit_bytes", 1e9)
    for chunk_bytes, threads in ((1, 1), (7, 3), (300, 8), (1 << 26, 2)):
        again, found = trained(Inputs([path], **flags), chunk_bytes=chunk_bytes, threads=threads)
        assert again == first and found["bytes"] == stats["bytes"]
    if flags.get("seed"):
        assert trained(Inputs([path], sample=0.3, seed=8))[1]["bytes"] != stats["bytes"]
        assert trained(Inputs([path], sample=1))[1]["bytes"] == trained([path])[1]["bytes"]


def test_a_sample_takes_whole_documents(tmp_path: Path) -> None:
    """Those of a text end at its end-of-text token; a text without one is one document, there or not."""
    documents = [f"document{'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]} {EOT}" for i in range(100)]
    (tmp_path / "x.txt").write_text("".join(documents))
    t = bytekiln.train_bpe_from_iterator([""], vocab_size=257, special_tokens=[EOT])
    taken: list[set[str]] = []
    for share in (0.2, 0.5):
        found = bytekiln.encode_files(t, Inputs([tmp_path / "x.txt"], sample=share), tmp_path / "x.npy", overwrite=True)
        text = t.decode(np.asarray(found.array))
        parts = text.split(EOT)
        assert parts[-1] == "" and all(f"{part}{EOT}" in documents for part in parts[:-1])
        taken.append(set(parts[:-1]))
    assert 8 < len(taken[0]) < 35 and taken[0] < taken[1]
    for i in range(40):
        (tmp_path / f"one{i}.txt").write_text(f"{i % 10} " * 100)
    sizes = trained(Inputs([str(tmp_path / "one*.txt")], sample=0.5))[1]["bytes"]
    assert sizes % 200 == 0 and 8 * 200 < sizes < 32 * 200


def test_a_bad_byte_in_a_sample_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"".join(b"0123456789%s" % EOT.encode() for _ in range(50)) + b"bad \xff")
    seen = set()
    for seed in range(20):
        try:
            trained(Inputs([path], sample=0.5, seed=seed), chunk_bytes=16)
        except TextError as error:
            seen.add(str(error))
    at = 50 * (10 + len(EOT)) + 4
    assert len(seen) == 1 and f"x.txt: byte offset {at}: invalid UTF-8 (byte 0xff)" in seen.pop()


def test_flags_of_a_part(command, text: Path) -> None:
    line = ["bpe-train", text, "--vocab-size", 300, "--special-token", EOT, "--json", "--overwrite", "--out", "t.json"]
    found = json.loads(command(*line, "--sample", "0.3", "--seed", 5, "--limit-bytes", "2kB").stdout)
    assert found["bytes"] == trained(Inputs([text], sample=0.3, seed=5, limit_bytes=2000))[1]["bytes"] <= 2000
    for flags, words in (
        (["--seed", 5], ["--seed", "--sample"]),
        (["--sample", "1.5"], ["--sample", "1.5", "at most 1"]),
        (["--sample", "0"], ["--sample", "above 0"]),
        (["--limit-bytes", "0"], ["--limit-bytes", "500MB"]),
        (["--limit-bytes", "lots"], ["--limit-bytes", "lots"]),
        (["--seed", "-1", "--sample", "0.5"], ["--seed", "-1"]),
    ):
        error = command(*line, *flags, status=2).stderr
        assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "0.5", "nan", "inf", "1e400", "1e19", "2x", "kk1", "1,5GB", "1/0", "1/2G", "1e99999999"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(Exception, match="expected a number of bytes"):
        byte_size(text)


def test_sizes() -> None:
    found = [byte_size(text) for text in ("1e9", ".5G", "5.", "1,500", "1_000k", "1.5 GiB", "7 B", "2Ti")]
    assert found == [10**9, 5 * 10**8, 5, 1500, 10**6, 3 * 2**29, 7, 2**41]


class Interrupted:
    """Ctrl-C comes while it is asked for its name."""

    def __fspath__(self) -> str:
        raise KeyboardInterrupt


def faulty() -> Iterator[str]:
    """Paths, and then a mistake of the caller's."""
    yield "x.txt"
    raise TypeError("my own fault")


def test_wrong_inputs_from_python(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        bytekiln.train_bpe([], vocab_size=300)
    with pytest.raises(ConfigError, match="sample"):
        bytekiln.train_bpe(Inputs([tmp_path / "x"], sample=2.0), vocab_size=300)
    for read in (lambda x: bytekiln.train_bpe(x, vocab_size=300), bytekiln.Counts.from_files, bytekiln.Counts.load):
        for wrong, kind in ((3, "int"), ([3], "list"), (None, "NoneType")):
            with pytest.raises(TypeError, match=f"found {kind}; expected a path"):
                read(wrong)
        with pytest.raises(KeyboardInterrupt):  # what a path raises is not taken for a wrong type
            read([Interrupted()])
        with pytest.raises(KeyboardInterrupt):
            read(Interrupted())
    for read in (lambda x: bytekiln.train_bpe(x, vocab_size=300), bytekiln.Counts.from_files):
        for paths in ([Interrupted()], Interrupted()):
            with pytest.raises(KeyboardInterrupt):
                read(Inputs(paths))
        with pytest.raises(TypeError, match="found int; expected a path"):
            read(Inputs(3))
        with pytest.raises(TypeError, match="limit_bytes: found -1; expected a number of bytes"):
            read(Inputs("x", limit_bytes=-1))
        with pytest.raises(TypeError, match=r"sample: found '0\.1'; expected a share"):
            read(Inputs("x", sample="0.1"))
        with pytest.raises(TypeError, match="my own fault"):
            read(faulty())
    (tmp_path / "x.txt").write_text("one path")
    assert bytekiln.train_bpe(Inputs(tmp_path / "x.txt", limit_bytes=5), vocab_size=300).merges
    with pytest.raises(FileError, match="no such file"):
        bytekiln.train_bpe(tmp_path / "missing.txt.gz", vocab_size=300)


def test_characters_read_plain_text_only(command, text: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(text.read_bytes()))
    line = ["bpe-encode", "--characters", "--dataset", "x"]
    for inputs in (["x.txt.gz"], ["-"], ["plain.txt", "--limit-bytes", "1k"], ["plain.txt", "--sample", "0.5"]):
        error = command(*line, *inputs, status=2, stdin=subprocess.DEVNULL).stderr
        assert "with --characters" in error, error


def test_a_named_pipe_is_refused_at_once(command, tmp_path: Path) -> None:
    """Opening one waits for a writer, for ever and deaf to every signal."""
    os.mkfifo(tmp_path / "pipe.txt")
    for line in (
        ["bpe-count", "pipe.txt", "--out", "c.counts"],
        ["bpe-train", "pipe.txt", "--vocab-size", 300, "--out", "t.json"],
    ):
        assert "pipe.txt: is a pipe or a device" in command(*line, status=2).stderr
