"""Token files: what `encode_files` writes, what `TokenFile` reads and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bytekiln
from bytekiln import TokenFile, Tokenizer, _core
from bytekiln.errors import ConfigError, FileError, FormatError, MismatchError, OutputExistsError, TextError

EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def kiln() -> Tokenizer:
    return bytekiln.train_bpe_from_iterator(
        ["the kiln is warm and the clay is wet " * 9], vocab_size=300, special_tokens=[EOT]
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the kiln {i} is warm{EOT}" for i in range(500)), encoding="utf-8")
    return path


def test_file_and_manifest_say_the_same(kiln: Tokenizer, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    tokens = bytekiln.encode_files(kiln, text, out)
    whole = text.read_text(encoding="utf-8")
    expected = kiln.encode(whole, allowed_special="all")
    assert tokens.array.tolist() == expected == np.load(out).tolist()
    assert tokens.dtype == np.uint16 and len(tokens) == len(expected) and not tokens.array.flags.writeable
    manifest = json.loads((tmp_path / "out.npy.json").read_text())
    assert manifest == tokens.manifest
    assert {k: manifest[k] for k in ("format", "version", "file", "dtype", "documents", "vocab_size", "eot_id")} == {
        "format": "bytekiln-tokens", "version": 1, "file": "out.npy", "dtype": "uint16", "documents": 500,
        "vocab_size": 279, "eot_id": kiln.eot_id,
    }  # fmt: skip
    assert tokens.text_bytes == len(whole.replace(EOT, "").encode()) and tokens.tokenizer_hash == kiln.hash
    assert manifest["max_id"] == tokens.max_id == kiln.eot_id
    assert manifest["sources"][0]["name"] == "text.txt" and manifest["sources"][0]["bytes"] == text.stat().st_size
    assert manifest["sources"][0]["checksum"] == _core.payload_checksum(text)
    tokens.verify()
    tokens.check(279)


def test_raw_files_hold_the_same_ids(kiln: Tokenizer, text: Path, tmp_path: Path) -> None:
    npy = bytekiln.encode_files(kiln, text, tmp_path / "out.npy")
    raw = bytekiln.encode_files(kiln, text, tmp_path / "out.bin", dtype="uint32")
    assert raw.array.tolist() == npy.array.tolist() and raw.dtype == np.uint32 and raw.notice is None
    raw.verify()
    assert (tmp_path / "out.bin").read_bytes() == npy.array.astype("<u4").tobytes()


def test_bytes_do_not_depend_on_threads_or_chunks(kiln: Tokenizer, text: Path, tmp_path: Path) -> None:
    found = set()
    for threads in (1, 2, 3, 8):
        for chunk in (1, 7, 1000, None):
            _core.encode_files(
                kiln, [text, text], tmp_path / "o.npy", threads=threads, chunk_bytes=chunk, overwrite=True
            )
            found.add((tmp_path / "o.npy").read_bytes())
    assert len(found) == 1


def test_ids_never_wrap(tmp_path: Path) -> None:
    """More than 65,536 tokens: uint32 by itself, uint16 refused."""
    specials = [f"<|{i}|>" for i in range(65_400)]
    big = bytekiln.train_bpe_from_iterator([], vocab_size=256 + len(specials), special_tokens=specials)
    text = tmp_path / "t.txt"
    text.write_text(specials[-1] + "a", encoding="utf-8")
    tokens = bytekiln.encode_files(big, text, tmp_path / "o.npy", append_eot=False)
    assert tokens.dtype == np.uint32 and tokens.array.tolist() == [65_655, 97]
    with pytest.raises(ConfigError, match="65656 tokens; expected uint32"):
        bytekiln.encode_files(big, text, tmp_path / "p.npy", dtype="uint16")
    assert big.encode_to_numpy("a").dtype == np.uint32
    assert not (tmp_path / "p.npy").exists()


def test_outputs_are_refused_replaced_and_never_half_written(kiln: Tokenizer, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    bytekiln.encode_files(kiln, text, out)
    before = out.read_bytes()
    with pytest.raises(OutputExistsError, match="--overwrite") as error:
        bytekiln.encode_files(kiln, text, out)
    assert isinstance(error.value, FileExistsError)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine \xff")
    with pytest.raises(TextError, match=r"bad\.txt: byte offset 5"):
        bytekiln.encode_files(kiln, [text, bad], out, overwrite=True)
    assert out.read_bytes() == before
    for inputs, message in (
        ([tmp_path / "none.txt"], "no such file"),
        ([], "found none"),
    ):
        with pytest.raises((FileError, ConfigError), match=message):
            bytekiln.encode_files(kiln, inputs, tmp_path / "new.npy")
    with pytest.raises(FileError, match="no such folder"):
        bytekiln.encode_files(kiln, text, tmp_path / "no" / "o.npy")
    with pytest.raises(ConfigError, match="no end-of-text token"):
        bytekiln.encode_files(
            bytekiln.train_bpe_from_iterator([], vocab_size=256), text, tmp_path / "new.npy", append_eot=True
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt", "out.npy", "out.npy.json", "text.txt"]


def test_a_full_disk_leaves_the_old_output(kiln: Tokenizer, text: Path, tmp_path: Path) -> None:
    """The limit on file sizes stands for the full disk: the same `write` fails in the middle of the output."""
    out = tmp_path / "out.npy"
    bytekiln.encode_files(kiln, text, out)
    before = out.read_bytes()
    kiln.save(tmp_path / "t.json")
    code = f"""
import resource, signal, bytekiln
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
k = bytekiln.Tokenizer.from_file({str(tmp_path / "t.json")!r})
try:
    bytekiln.encode_files(k, {str(text)!r}, {str(out)!r}, overwrite=True)
except bytekiln.errors.FileError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "expected room for the output" in run.stdout and "out.npy" in run.stdout, run
    assert out.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_killed_writer_leaves_nothing_that_looks_whole(kiln: Tokenizer, tmp_path: Path) -> None:
    big = tmp_path / "big.txt"
    big.write_bytes(b"".join(b"the kiln %d is %d warm " % (i, i * i) for i in range(600_000)))
    kiln.save(tmp_path / "t.json")
    code = "import bytekiln,sys;t,i,o=sys.argv[1:];bytekiln.encode_files(bytekiln.Tokenizer.from_file(t),i,o,threads=1)"
    out = tmp_path / "out.npy"
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "t.json", big, out])
    partial = tmp_path / ".out.npy.partial"
    end = time.monotonic() + 30
    while time.monotonic() < end and not (partial.exists() and partial.stat().st_size > 4096):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not out.exists() and not (tmp_path / "out.npy.json").exists()
    tokens = bytekiln.encode_files(kiln, big, out)
    tokens.verify()
    assert not partial.exists()


def test_memory_is_bounded_by_threads_and_chunks(kiln: Tokenizer, tmp_path: Path) -> None:
    """60 MB of text in a process that may grow by less than that."""
    big = tmp_path / "big.txt"
    with big.open("wb") as f:
        for i in range(60):
            f.write(b"".join(b"the kiln %d is warm " % (j * i) for j in range(45_000)))
    assert big.stat().st_size > 50_000_000
    kiln.save(tmp_path / "t.json")
    code = """
import bytekiln, resource, sys
k = bytekiln.Tokenizer.from_file(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bytekiln._core.encode_files(k, [sys.argv[2]], sys.argv[3], threads=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    args = [sys.executable, "-c", code, tmp_path / "t.json", big, tmp_path / "o.npy"]
    grown = int(subprocess.run(args, capture_output=True, text=True, check=True).stdout)
    assert grown < 48_000, f"{grown} KiB"


def test_npy_is_told_by_its_magic_whatever_its_name(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(50, dtype=np.int32))
    (tmp_path / "x.npy").rename(tmp_path / "x.bin")
    assert TokenFile.open(tmp_path / "x.bin").array.tolist() == list(range(50))


def test_raw_type_comes_from_the_caller_else_uint16_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "raw.bin"
    np.arange(1, 101, dtype=np.int32).tofile(path)
    assert TokenFile.open(path, "int32").array.tolist() == list(range(1, 101))
    with pytest.raises(FormatError, match=r"raw\.bin: every second value is 0.*--data-dtype"):
        TokenFile.open(path)
    np.arange(1, 101, dtype=np.uint16).tofile(path)
    tokens = TokenFile.open(path)
    assert tokens.array.tolist() == list(range(1, 101)) and "read as uint16" in (tokens.notice or "")
    with pytest.raises(FormatError, match="expected uint16, uint32, int32 or int64"):
        TokenFile.open(path, "float32")


def test_a_pipe_or_a_device_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    for path in (tmp_path / "pipe.bin", Path(os.devnull), Path("/dev/zero")):
        with pytest.raises(FileError, match=rf"{path}: is a pipe or a device; expected a token file"):
            TokenFile.open(path, dtype="uint16")


def test_what_is_no_token_file_is_refused_by_name(tmp_path: Path) -> None:
    def save(name: str, array: object) -> Path:
        np.save(tmp_path / name, array, allow_pickle=True)
        return tmp_path / name

    whole = save("cut.npy", np.arange(500, dtype=np.uint16)).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:700])
    (tmp_path / "head.npy").write_bytes(whole[:50])
    (tmp_path / "odd.bin").write_bytes(b"\1\0" * 20 + b"\1")
    (tmp_path / "empty.npy").write_bytes(b"")
    cases = [
        ("cut.npy", FormatError, "truncated: 572 bytes of ids; expected 1000"),
        ("head.npy", FormatError, "damaged .npy header"),
        ("odd.bin", FormatError, "41 bytes; expected a multiple of 2"),
        ("empty.npy", FileError, "empty file"),
        ("none.npy", FileError, "no such file"),
        (save("float.npy", np.zeros(9, dtype=np.float32)).name, FormatError, "array of type float32"),
        (save("object.npy", np.array([{}] * 9, dtype=object)).name, FormatError, "array of type object"),
        (save("two.npy", np.zeros((3, 3), dtype=np.uint16)).name, FormatError, r"array of shape \(3, 3\)"),
        (save("minus.npy", np.array([1, -1, 2])).name, FormatError, "token 1 is id -1"),
        (save("none_in_it.npy", np.zeros(0, dtype=np.uint16)).name, FormatError, "no tokens"),
    ]
    for name, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            TokenFile.open(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(FileError, match="directory"):
        TokenFile.open(tmp_path)


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "high.npy", np.array([1, 2, 60_000, 5], dtype=np.uint16))
    tokens = TokenFile.open(tmp_path / "high.npy")
    with pytest.raises(
        FormatError, match=r"high\.npy: token 2 is id 60000; expected ids below the vocabulary size 700"
    ):
        tokens.check(700)
    tokens.check(60_001)


def test_a_file_that_does_not_fit_its_manifest_is_refused(kiln: Tokenizer, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    bytekiln.encode_files(kiln, text, out)
    data = bytearray(out.read_bytes())
    data[-3] ^= 1
    out.write_bytes(data)
    with pytest.raises(MismatchError, match=r"out\.npy: checksum"):
        TokenFile.open(out).verify()
    np.save(out, np.zeros(7, dtype=np.uint16))
    with pytest.raises(MismatchError, match="holds tokens 7; expected"):
        TokenFile.open(out)
    side = tmp_path / "out.npy.json"
    for content, message in (
        ("{", "expected a JSON manifest"),
        ("[]", "not a manifest"),
        ('{"format": "bytekiln-tokens", "version": 9}', "version 9; expected 1"),
    ):
        side.write_text(content)
        with pytest.raises(FormatError, match=message):
            TokenFile.open(out)


def test_a_manifest_that_a_killed_writer_left_alone_is_replaced(kiln: Tokenizer, text: Path, tmp_path: Path) -> None:
    out, side = tmp_path / "out.npy", tmp_path / "out.npy.json"
    bytekiln.encode_files(kiln, text, out)
    out.unlink()
    bytekiln.encode_files(kiln, text, out).verify()
    out.unlink()
    side.write_text('{"mine": 1}')
    with pytest.raises(OutputExistsError, match=r"out\.npy\.json: exists already"):
        bytekiln.encode_files(kiln, text, out)
    assert side.read_text() == '{"mine": 1}'


def test_outputs_never_follow_links_nor_replace_devices_or_inputs(kiln: Tokenizer, text: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (tmp_path / ".out.npy.partial").symlink_to(precious)
    with pytest.raises(FileError, match="is no ordinary file"):
        bytekiln.encode_files(kiln, text, tmp_path / "out.npy")
    assert precious.read_text() == "keep"
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(FileError, match="is a pipe or a device"):
        bytekiln.encode_files(kiln, text, tmp_path / "pipe.npy", overwrite=True)
    with pytest.raises(FileError, match="is one of the inputs"):
        bytekiln.encode_files(kiln, text, text, overwrite=True)
    side = text.with_name("x.npy.json")
    text.rename(side)
    with pytest.raises(FileError, match="is one of the inputs"):
        bytekiln.encode_files(kiln, side, text.with_name("x.npy"), overwrite=True)


def test_a_written_file_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened when it is first asked for, which may be after the process has gone elsewhere."""
    (tmp_path / "text.txt").write_text("the kiln is warm")
    (tmp_path / "elsewhere").mkdir()
    tokenizer = bytekiln.train_bpe_from_iterator(["the kiln is warm"], vocab_size=260)
    monkeypatch.chdir(tmp_path)
    written = bytekiln.encode_files(tokenizer, "text.txt", "ids.npy")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert written.path == tmp_path / "ids.npy"
    written.verify()
    assert tokenizer.decode(written.array) == "the kiln is warm"
