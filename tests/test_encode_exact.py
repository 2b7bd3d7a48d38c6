"""Ids are those of the whole text, whatever the parts it arrives in, and those of tiktoken, whatever the text.

The crate's own tests hold merging to the naive specification; here are whole tokenizers, real vocabularies, and every
border. `test_peers` has the real texts.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import Tokenizer, _core

tiktoken = pytest.importorskip("tiktoken")

EOT = "<|endoftext|>"
NEAR = 32
BLOCK = 128
"""Bytes of a chunk: its borders are moved over everything that is near."""
ZONE = f"wet  clay \n\n\t12345 don't{EOT}{EOT} \u3000é日本🧑‍🚀 the kiln   {EOT}x  \r\n y!?"


@pytest.fixture(scope="module")
def gpt2(shared_bytes: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("encoder.json", "vocab.bpe"):
        (folder / name).write_bytes(shared_bytes(f"gpt2/{name}.xz"))
    return Tokenizer.from_vocab_and_merges(folder / "encoder.json", folder / "vocab.bpe", special_tokens=[EOT])


@pytest.fixture(scope="module")
def theirs(gpt2: Tokenizer) -> tiktoken.Encoding:
    """tiktoken with the same ranks and the pattern that it is published with."""
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    ranks = {token: id for id, token in gpt2.vocab.items() if id != gpt2.eot_id}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: gpt2.eot_id})


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return bytekiln.train_bpe_from_iterator([ZONE * 3, "the kiln is warm"], vocab_size=330, special_tokens=[EOT])


@pytest.mark.parametrize("threads", [1, 3])
def test_files_at_every_border(small: Tokenizer, tmp_path: Path, threads: int) -> None:
    """Each byte of a zone of special tokens, runs of white space and wide characters comes to lie at a border."""
    text = "warm " * 20 + ZONE + " potter" * 20 + ZONE + "\n" * 40 + ZONE
    path = tmp_path / "t.txt"
    path.write_text(text, encoding="utf-8", newline="")
    expected = small.encode(text, allowed_special="all")
    for chunk in range(BLOCK - NEAR, BLOCK + len(ZONE.encode()) + NEAR):
        _core.encode_files(
            small, path, tmp_path / "o.npy", chunk_bytes=chunk, threads=threads, append_eot=False, overwrite=True
        )
        assert np.load(tmp_path / "o.npy").tolist() == expected, chunk


def test_streams_at_every_border(small: Tokenizer) -> None:
    text = "warm " * 8 + ZONE + " potter" * 4 + ZONE
    for allowed in ("all", ()):
        expected = small.encode(text, allowed_special=allowed)
        for cut in range(len(text) + 1):
            assert list(small.encode_iter([text[:cut], text[cut:]], allowed_special=allowed)) == expected, cut
        for size in range(1, 80):
            parts = [text[i : i + size] for i in range(0, len(text), size)]
            assert list(small.encode_iter(parts, allowed_special=allowed)) == expected, size


PIECES = {
    "letters": lambda rng, n: rng.integers(97, 123, size=n, dtype=np.uint8).tobytes().decode(),
    "digits": lambda rng, n: rng.integers(48, 58, size=n, dtype=np.uint8).tobytes().decode(),
    "few letters": lambda rng, n: rng.choice(np.frombuffer(b"aaabth", dtype=np.uint8), size=n).tobytes().decode(),
    "a": lambda rng, n: "a" * n,
    "spaces": lambda rng, n: " " * n,
    "newlines": lambda rng, n: "\n" * n,
    "dashes": lambda rng, n: "-" * n,
    "base64": lambda rng, n: base64.b64encode(rng.bytes(n)).decode()[:n],
    "cjk": lambda rng, n: "".join(map(chr, rng.integers(0x4E00, 0x9FA6, size=n // 3))),
}


@pytest.mark.parametrize("kind", PIECES)
def test_one_long_piece(gpt2: Tokenizer, theirs: tiktoken.Encoding, kind: str) -> None:
    """Windows and their joints, against tiktoken's merging of the whole."""
    rng = np.random.default_rng(0)
    for n in [*range(1, 140), 1000, 5000]:
        text = PIECES[kind](rng, n)
        assert gpt2.encode(text) == theirs.encode_ordinary(text), (kind, n)


def contexts(char: str) -> list[str]:
    return [char, f"a{char}b", f" {char}", f"{char} ", f"1{char}2", f"  {char}{char}\n", f"'{char}s", f"!{char}?"]


def test_a_share_of_the_code_points_in_contexts(gpt2: Tokenizer, theirs: tiktoken.Encoding) -> None:
    every_code_point_in_contexts(gpt2, theirs, 61)


@pytest.mark.slow
def test_every_code_point_in_contexts(gpt2: Tokenizer, theirs: tiktoken.Encoding) -> None:
    every_code_point_in_contexts(gpt2, theirs, 1)


def every_code_point_in_contexts(gpt2: Tokenizer, theirs: tiktoken.Encoding, step: int) -> None:
    """Those that both Unicode versions know: where they differ, an unassigned one may have become a letter since."""
    import unicodedata

    points = [p for p in range(0, 0x110000, step) if not 0xD800 <= p < 0xE000]
    for first in range(0, len(points), 2000):
        known = [chr(p) for p in points[first : first + 2000] if unicodedata.category(chr(p)) != "Cn"]
        texts = [text for char in known for text in contexts(char)]
        assert gpt2.encode_batch(texts, threads=1) == [theirs.encode_ordinary(text) for text in texts]


strings = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # some minutes of one core, which may be shared
@settings(max_examples=100_000, deadline=None)
@given(strings)
def test_a_hundred_thousand_strings(gpt2: Tokenizer, theirs: tiktoken.Encoding, text: str) -> None:
    assert gpt2.encode(text) == theirs.encode_ordinary(text)


@settings(max_examples=300)
@given(st.binary(max_size=80))
def test_bytes_come_back(gpt2: Tokenizer, data: bytes) -> None:
    assert gpt2.decode_bytes(gpt2.encode_bytes(data, errors="bytes")) == data


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
@pytest.mark.parametrize("text", ['"the kiln " * 600_000', '"kiln" * 1_300_000'])
def test_no_memory_is_an_exception_and_no_end_of_the_process(text: str) -> None:
    """Under a limit of the address space as it is now and 1 MB, a text of 5 MB has no room."""
    code = """
import resource
import bytekiln
from pathlib import Path
t = bytekiln.train_bpe_from_iterator(["the kiln is warm"], vocab_size=270)
text = TEXT
t.encode("hello")
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
try:
    t.encode(text)
    print("it had room")
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(t.decode(t.encode("hello")))
"""
    run = subprocess.run([sys.executable, "-c", code.replace("TEXT", text)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "MemoryError\nhello\n"), run.stderr[-500:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["letters", "digits", "a", "cjk"])
def test_a_long_piece_takes_instructions_as_its_length(kind: str, gpt2: Tokenizer, tmp_path: Path) -> None:
    """Ten times the length is at most 10.5 times the instructions: counted, not timed."""
    if shutil.which("valgrind") is None:
        pytest.skip("no valgrind")
    gpt2.save(tmp_path / "gpt2.json")

    def instructions(n: int) -> int:
        (tmp_path / "t.txt").write_text(PIECES[kind](np.random.default_rng(0), n) if n else "", encoding="utf-8")
        text = "open('t.txt', 'rb').read()"
        code = f"import bytekiln; bytekiln.Tokenizer.from_file('gpt2.json').encode_to_numpy({text}, threads=1)"
        line = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        run = subprocess.run([*line, sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENV)
        return next(int(line.split()[-1]) for line in run.stderr.splitlines() if "Collected" in line)

    instructions(0)  # Python compiles modules that it finds changed, once
    base, one, ten = instructions(0), instructions(200_000), instructions(2_000_000)
    assert ten - base < 10.5 * (one - base), (base, one, ten)


ENV = {"BYTEKILN_SIMD": "avx2", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}
