"""`bpe-encode`: shards, parts, an index, a share of the work; stopped at any moment it goes on; its faults."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import TokenFile, Tokenizer, _core, train_bpe_from_iterator
from bytekiln.errors import ConfigError, FileError, FormatError, OutputExistsError, TextError
from encode_faults import EOT, WORDS, files_of, kill_and_go_on, start, write_corpus, write_texts

Result = Any
KILN = train_bpe_from_iterator(
    ["the kiln is warm and the potter's clay don't " * 5], vocab_size=300, special_tokens=[EOT]
)


@pytest.fixture
def kiln(tmp_path: Path) -> Tokenizer:
    KILN.save(tmp_path / "t.json")
    return KILN


def encode(inputs: Any, out: Path, **options: Any) -> tuple[list[tuple[Path, dict[str, Any]]], int]:
    made, before = _core.encode_files(KILN, inputs, out, **options)
    return [(Path(path), manifest) for path, manifest in made], before


def read(path: Path) -> np.ndarray:
    file = TokenFile.open(path)
    file.verify()
    return file.array


TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map("".join), min_size=1, max_size=3)
HOW = st.fixed_dictionaries(
    {"threads": st.sampled_from([1, 2, 3]), "chunk_bytes": st.sampled_from([1, 7, 50, 1 << 20])}
)
END = st.sampled_from([None, True, False])


@settings(max_examples=60)
@given(TEXTS, st.booleans(), END, HOW, HOW, st.sampled_from([1, 3, 10, 1000]))
def test_shards_are_the_file_cut_in_pieces(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    records: bool,
    end: bool | None,
    how: dict[str, int],
    other: dict[str, int],
    size: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    inputs = write_texts(folder, texts, records)
    ((_, whole),), _ = encode(inputs, folder / "a.npy", append_eot=end, **how)
    if not whole["tokens"]:
        return
    ids = read(folder / "a.npy")
    ((path, summary), *shards), _ = encode(
        inputs, folder / "s.npy", append_eot=end, shard_tokens=size, index=True, **other
    )
    assert path == folder / "s.npy" and not path.exists()
    assert [p.name for p, _ in shards] == [f"s_{n:05}.npy" for n in range(-(-len(ids) // size))]
    for field in ("tokens", "documents", "text_bytes", "max_id", "sources"):
        assert summary[field] == whole[field], field
    assert np.array_equal(np.concatenate([read(p) for p, _ in shards]), ids)
    assert all(len(TokenFile.open(p)) == size for p, _ in shards[:-1])
    assert sum(m["text_bytes"] for _, m in shards) == whole["text_bytes"]
    assert [s["file"] for s in summary["shards"]] == [p.name for p, _ in shards]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@settings(max_examples=60)
@given(TEXTS, st.booleans(), END, HOW, HOW, st.integers(0, 2**64 - 1))
def test_every_document_is_in_one_part(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    records: bool,
    end: bool | None,
    how: dict[str, int],
    other: dict[str, int],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("split")
    inputs = write_texts(folder, texts, records)
    options = {"append_eot": end, "seed": seed, "split": {"val": 0.4}}
    try:
        made, _ = encode(inputs, folder / "a.npy", index=True, **options, **how)
    except ConfigError as error:
        assert "split: no document fell to" in str(error)
        assert not [p for p in folder.iterdir() if p.name.startswith((".", "a"))]
        return
    again, _ = encode(inputs, folder / "b.npy", index=True, **options, **other)
    assert [p.name for p, _ in made] == ["a.npy", "a_val.npy"]
    for (one, _), (two, _) in zip(made, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
    ((_, whole),), _ = encode(inputs, folder / "c.npy", append_eot=end, index=True)
    for field in ("tokens", "documents", "text_bytes"):
        assert sum(m[field] for _, m in made) == whole[field], field

    def documents(path: Path) -> list[tuple[int, ...]]:
        file = TokenFile.open(path)
        ends = file.document_ends
        return [] if ends is None else [tuple(d) for d in np.split(file.array, ends[:-1])]

    # White space alone is no document and goes with the next one, which may fall elsewhere.
    plain = all(text.strip() for text in texts) and not records
    if KILN.eot_id in (read(folder / "c.npy")[-1],) and end is True and plain:
        assert sorted(documents(made[0][0]) + documents(made[1][0])) == sorted(documents(folder / "c.npy"))


def test_no_more_tokens_than_asked_for(kiln: Tokenizer, tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path, 2000)
    ids = bytekiln.encode_files(kiln, inputs, tmp_path / "a.npy").array
    for count in (1, 777, 5000, len(ids), len(ids) + 1):
        found = [
            encode(inputs, tmp_path / "m.npy", max_tokens=count, threads=t, chunk_bytes=c, overwrite=True)[0][0][1]
            for t, c in ((1, 1 << 20), (3, 50))
        ]
        assert found[0] == found[1] and found[0]["tokens"] == min(count, len(ids))
        assert np.array_equal(read(tmp_path / "m.npy"), ids[:count])
    encode(inputs, tmp_path / "m.npy", max_tokens=777, shard_tokens=100, overwrite=True)
    assert len(list(tmp_path.glob("m_*.npy"))) == 8 and not (tmp_path / "m.npy").exists()


def test_an_output_that_is_replaced_leaves_no_shards(kiln: Tokenizer, tmp_path: Path) -> None:
    (text,) = write_corpus(tmp_path, 500)[:1]
    out = tmp_path / "x.npy"
    for options in ({"shard_tokens": 50}, {"shard_tokens": 400}, {}, {"shard_tokens": 90, "index": True}, {}):
        with_old = files_of(tmp_path, "x.npy")
        if with_old:
            with pytest.raises(OutputExistsError, match="exists already"):
                encode(text, out, **options)
            assert files_of(tmp_path, "x.npy") == with_old
        made, _ = encode(text, out, overwrite=True, **options)
        names = {p.name + end for p, _ in made for end in ("", ".json")}
        names |= {p.name + ".documents.npy" for p, m in made if "document_ends" in m}
        assert set(files_of(tmp_path, "x.npy")) == names - ({"x.npy"} if options else set())


MORE = {"shard_tokens": 500_000, "index": True, "split": {"val": 0.2}}


def stop_once(inputs: Any, out: Path, share: float = 0.0, **options: Any) -> None:
    """A run that is interrupted when so much is done and a state is there."""
    state = out.with_name(f".{out.name}.state")

    def stop(stage: str, done: int, total: int) -> None:
        if done >= share * total and state.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(inputs, out, save_every=0.0, chunk_bytes=1 << 14, threads=1, progress=stop, **options)
    assert state.exists() and not out.with_name(out.name + ".json").exists()


@pytest.fixture
def large(tmp_path: Path) -> list[Path]:
    return write_corpus(tmp_path, 200_000, times=16)


@pytest.mark.parametrize("more", [{}, {**MORE, "append_eot": False}])
def test_interrupted_it_goes_on(kiln: Tokenizer, large: list[Path], tmp_path: Path, more: dict[str, Any]) -> None:
    encode(large, tmp_path / "x.npy", **more)
    whole = files_of(tmp_path, "x.npy")
    for path in whole:
        (tmp_path / path).unlink()
    stop_once(large, tmp_path / "x.npy", **more)
    stop_once(large, tmp_path / "x.npy", 0.4, **more)
    seen = []
    _, resumed = encode(
        large, tmp_path / "x.npy", chunk_bytes=1 << 14, progress=lambda *said: seen.append(said), **more
    )
    assert resumed > 0 and files_of(tmp_path, "x.npy") == whole
    assert seen[-1][1:] == (sum(p.stat().st_size for p in large),) * 2


@pytest.mark.parametrize("more", [{}, MORE])
def test_killed_at_some_moments(kiln: Tokenizer, large: list[Path], tmp_path: Path, more: dict[str, Any]) -> None:
    killed(large, tmp_path, 8, 11, more)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes on a shared machine
@pytest.mark.parametrize("more", [{}, MORE])
def test_killed_at_a_hundred_moments(kiln: Tokenizer, large: list[Path], tmp_path: Path, more: dict[str, Any]) -> None:
    assert killed(large, tmp_path, 100, 12, more) > 10


def killed(inputs: list[Path], folder: Path, moments: int, seed: int, more: dict[str, Any]) -> int:
    began = time.monotonic()
    encode(inputs, folder / "x.npy", threads=1, chunk_bytes=1 << 14, **more)
    seconds = time.monotonic() - began
    whole = files_of(folder, "x.npy")
    for path in whole:
        (folder / path).unlink()
    dice, went_on = random.Random(seed), 0
    while moments > 0:
        here = min(dice.choice([1, 1, 2, 3]), moments)
        moments -= here
        arguments = {"inputs": [str(p) for p in inputs], "out": "x.npy", "tokenizer": "t.json", "threads": 2, **more}
        on, _ = kill_and_go_on(folder, here, seconds, dice.random(), **arguments, save_every=0.0, chunk_bytes=1 << 14)
        went_on += on
        assert files_of(folder, "x.npy") == whole
        for path in whole:
            (folder / path).unlink()
    return went_on


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"append_eot": True}, "append_eot none; found append_eot true"),
        ({"dtype": "uint32"}, "dtype Uint16; found dtype Uint32"),
        ({"shard_tokens": 1_000_000}, "shard_tokens none"),
        ({"split": {"val": 0.5}}, "split"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"index": True}, "index false"),
        ({"errors": "replace"}, "errors error; found errors replace"),
        ({"tokenizer": 1}, "tokenizer sha256:"),
        ({"inputs": 1}, "input 2"),
        ({"touch": 1}, "input 3"),
        ({"grow": 1}, "input 1"),
    ],
)
def test_another_run_is_refused_by_name(
    kiln: Tokenizer, large: list[Path], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    out, tokenizer, inputs = tmp_path / "x.npy", kiln, large
    stop_once(inputs, out)
    before = files_of(tmp_path, "x.npy")
    if change.pop("tokenizer", None):
        tokenizer = train_bpe_from_iterator(["other"], vocab_size=260, special_tokens=[EOT])
    if change.pop("inputs", None):
        inputs = inputs[:1]
    if change.pop("touch", None):
        os.utime(inputs[2])
    if change.pop("grow", None):
        with inputs[0].open("a") as file:
            file.write("more")
    options = {**change, "chunk_bytes": 1 << 14}
    with pytest.raises(ConfigError) as refused:
        _core.encode_files(tokenizer, inputs, out, **options)
    said = str(refused.value)
    assert ".x.npy.state: is of an unfinished run with" in said and named in said and "--overwrite" in said, said
    assert files_of(tmp_path, "x.npy") == before
    _, resumed = _core.encode_files(tokenizer, inputs, out, overwrite=True, **options)
    assert resumed == 0 and not [n for n in files_of(tmp_path, "x.npy") if n.startswith(".")]


def test_what_an_unfinished_run_left_is_checked(kiln: Tokenizer, large: list[Path], tmp_path: Path) -> None:
    out, state, partial = tmp_path / "x.npy", tmp_path / ".x.npy.state", tmp_path / ".x.npy.partial"
    stop_once(large, out)
    told, ids = state.read_bytes(), partial.read_bytes()
    for path, bad in (
        (state, told[:-1]),
        (state, told[:60] + b"\0" + told[61:]),
        (state, b""),
        (partial, ids[:1000]),
        (partial, ids[:1000] + b"\1" + ids[1001:]),
    ):
        path.write_bytes(bad)
        with pytest.raises(FormatError, match=r"\.x\.npy\.(state|partial): .*--overwrite"):
            encode(large, out, chunk_bytes=1 << 14)
        assert path.read_bytes() == bad
        state.write_bytes(told)
        partial.write_bytes(ids)
    # The same size and time, and other text: its checksum tells.
    first, times = large[0].read_bytes(), large[0].stat()
    large[0].write_bytes(b"T" + first[1:])
    os.utime(large[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    stopped_in = json.loads(told[24:-8])["place"]["file"]
    if stopped_in == 0:
        with pytest.raises(FormatError, match=r"a\.txt: its first \d+ bytes of text are not those"):
            encode(large, out, chunk_bytes=1 << 14)
    _, resumed = encode(large, out, chunk_bytes=1 << 14, overwrite=True)
    assert len(read(out)) > 0 and (resumed == 0 or stopped_in > 0)


def test_an_input_that_changes_while_it_is_read(kiln: Tokenizer, large: list[Path], tmp_path: Path) -> None:
    for how in ("grow", "shrink"):
        done = []

        def change(stage: str, at: int, total: int, how: str = how, done: list[int] = done) -> None:
            if at and not done:
                done.append(at)
                size = large[0].stat().st_size
                os.truncate(large[0], size + 7 if how == "grow" else size - 5000)

        with pytest.raises(FormatError, match=r"a\.txt: changed while it was read: was .*; expected it to stay"):
            encode(large[:1] * 30, tmp_path / "x.npy", threads=1, chunk_bytes=1000, progress=change)
        assert not files_of(tmp_path, "x.npy")


def test_a_full_disk_in_the_middle(kiln: Tokenizer, large: list[Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for it. Once there is room, it goes on."""
    encode(large, tmp_path / "x.npy")
    whole = files_of(tmp_path, "x.npy")
    (tmp_path / "x.npy").write_bytes(b"the old one")
    arguments = {"inputs": [str(p) for p in large], "out": "x.npy", "tokenizer": "t.json", "overwrite": True}
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))\n"
        "import encode_faults\n"
        "exec(encode_faults.CODE)\n"
    )
    for every, stays in ((1e9, False), (0.0, True)):
        line = json.dumps({**arguments, "save_every": every, "chunk_bytes": 1 << 14, "threads": 1})
        run = subprocess.run(
            [sys.executable, "-c", code, line], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}, check=False,
        )  # fmt: skip
        assert "x.npy: the file grew past the limit of its size; expected room for the output" in run.stderr, run.stderr
        assert (tmp_path / "x.npy").read_bytes() == b"the old one"
        assert (tmp_path / ".x.npy.state").exists() == (tmp_path / ".x.npy.partial").exists() == stays
    _, resumed = encode(large, tmp_path / "x.npy", overwrite=True, chunk_bytes=1 << 14)
    assert resumed > 0 and files_of(tmp_path, "x.npy") == whole


def test_two_writers_of_one_output(kiln: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("the kiln")
    os.mkfifo(tmp_path / "pipe")
    line = [sys.executable, "-m", "bytekiln.cli", "bpe-encode", "-", "--tokenizer", "t.json", "--out", "x.npy"]
    first = subprocess.Popen(line, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdin is not None
    first.stdin.write(b"the kiln")
    first.stdin.flush()
    while not (tmp_path / ".x.npy.partial").exists():
        time.sleep(0.01)
    time.sleep(0.05)
    for options in ({}, {"shard_tokens": 5}, {"overwrite": True}):
        with pytest.raises(FileError, match=rf"x\.npy: another process is writing it \(process {first.pid}, "):
            encode(tmp_path / "one.txt", tmp_path / "x.npy", **options)
    first.communicate(timeout=60)
    assert first.returncode == 0 and len(read(tmp_path / "x.npy")) > 0


def test_outputs_that_cannot_be(kiln: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("the kiln")
    (tmp_path / "there.npy").write_text("keep")
    (tmp_path / "x.npy").symlink_to(tmp_path / "there.npy")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(FileError, match=r"x\.npy: is a symbolic link to .*there\.npy; expected a file's own name"):
            encode(tmp_path / "one.txt", tmp_path / "x.npy", **options)
    assert (tmp_path / "there.npy").read_text() == "keep" and (tmp_path / "x.npy").is_symlink()
    (tmp_path / "s_00001.npy").write_text("keep")
    with pytest.raises(OutputExistsError, match=r"s_00001\.npy"):
        encode(tmp_path / "one.txt", tmp_path / "s.npy", shard_tokens=1)
    assert (tmp_path / "s_00001.npy").read_text() == "keep" and set(files_of(tmp_path, "s.npy")) == {"s_00001.npy"}
    with pytest.raises(TextError, match=r"bad\.txt: byte offset 8"):
        (tmp_path / "bad.txt").write_bytes(b"the kiln\xff")
        encode([tmp_path / "one.txt", tmp_path / "bad.txt"], tmp_path / "n.npy", shard_tokens=1, save_every=0.0)
    assert not files_of(tmp_path, "n.npy")
    specials = [f"<|{n}|>" for n in range(65_537 - 256)]
    big = train_bpe_from_iterator([], vocab_size=65_537, special_tokens=specials)
    with pytest.raises(ConfigError, match="uint16 holds ids up to 65535, the vocabulary has 65537 tokens"):
        _core.encode_files(big, [tmp_path / "one.txt"], tmp_path / "n.npy", dtype="uint16")
    for options, message in (
        ({"shard_tokens": 0}, "shard_tokens: found 0"),
        ({"max_tokens": -1}, "max_tokens: found 0"),
        ({"split": {"val": 1.0}}, "split: found val=1"),
        ({"split": {"../val": 0.1}}, "split: found the name"),
        ({"part": (3, 2)}, "part: found 3/2"),
        ({"part": (1, 2), "max_tokens": 3}, "part: found it with max_tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            encode(tmp_path / "one.txt", tmp_path / "n.npy", **options)


def test_a_folder_that_cannot_be_written_to(kiln: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("the kiln")
    closed = tmp_path / "closed"
    closed.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", closed]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        with pytest.raises(FileError, match=r"closed/x\.npy: read-only file system; expected a writable folder"):
            encode(tmp_path / "one.txt", closed / "x.npy")
    finally:
        subprocess.run(["umount", closed], check=True)


def test_the_command_has_it_all(command: Callable[..., Result], kiln: Tokenizer, tmp_path: Path) -> None:
    write_corpus(tmp_path, 20_000)
    line = ["a.txt", "c.jsonl", "--tokenizer", "t.json"]
    said = command("bpe-encode", *line, "--out", "x.npy", "--shard-tokens", "10k", "--split", "val=0.1", "--index")
    assert "wrote x_00000.npy … x_0000" in said.stdout and "x_val_00000.npy" in said.stdout and "shards" in said.stdout
    files = bytekiln.encode_files(
        kiln, [tmp_path / n for n in line[:2]], tmp_path / "y.npy", shard_tokens=10_000, split={"val": 0.1}, index=True
    )
    assert isinstance(files, list)
    for file in files:
        assert file.path.read_bytes() == (tmp_path / file.path.name.replace("y", "x", 1)).read_bytes()
        assert file.document_ends is not None and len(file.document_ends) == file.manifest["documents"]
    command("bpe-encode", *line, "--out", "m.bin", "--max-tokens", "5k")
    assert (tmp_path / "m.bin").stat().st_size == 10_000
    command("bpe-encode", "a.txt", "--tokenizer", "t.json", "--out", "p.bin", "--part", "2/2")
    for more, message in (
        (["--out", "x.npy", "--shard-tokens", "10k"], "exists already"),
        (["--out", "n.npy", "--split", "val"], "expected a name and a share"),
        (["--out", "n.npy", "--split", "a=.1", "--split", "a=.1"], "found a name twice"),
        (["--out", "n.npy", "--shard-tokens", "1.5"], "expected a number of tokens"),
        (["--out", "n.npy", "--part", "3/2"], "expected i/n"),
        (["--out", "n.npy", "--seed", "3"], "--seed without --sample or --split"),
    ):
        assert message in command("bpe-encode", *line, *more, status=2).stderr


def test_a_signal_leaves_what_the_same_command_goes_on_with(
    command: Callable[..., Result], kiln: Tokenizer, tmp_path: Path
) -> None:
    text = tmp_path / "big.txt"
    dice = random.Random(3)
    text.write_text("".join(dice.choices(WORDS, k=200_000)) * 300, encoding="utf-8")
    line = ["bpe-encode", "big.txt", "--tokenizer", "t.json", "--threads", "1", "--errors", "replace"]
    command(*line, "--out", "whole.npy")
    run = subprocess.Popen(
        [sys.executable, "-m", "bytekiln.cli", *line, "--out", "x.npy"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    state = tmp_path / ".x.npy.state"
    assert run.stderr
    while run.poll() is None and not state.exists():
        time.sleep(0.005)
    if run.poll() is None:
        run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)
    if run.returncode:
        assert run.returncode == 130 and state.exists() and not (tmp_path / "x.npy").exists()
        assert "went on" in command(*line, "--out", "x.npy").stdout
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def grown_by(folder: Path, **arguments: Any) -> int:
    """KiB by which a process grows at most while it encodes; what it has from its parent does not count."""
    run = start(folder, tokenizer="t.json", **arguments)
    said, trouble = run.communicate(timeout=1200)
    assert run.returncode == 0, trouble
    return int(said.split()[1])


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes on a shared machine
@pytest.mark.parametrize("more", [{}, {"shard_tokens": 10_000_000, "index": True, "split": {"val": 0.01}}])
def test_two_gigabytes_within_a_hundred_megabytes(kiln: Tokenizer, tmp_path: Path, more: dict[str, Any]) -> None:
    dice = random.Random(1)
    block = "".join(dice.choices(WORDS, k=2_000_000)).encode()
    with (tmp_path / "big.txt").open("wb") as file:
        while file.tell() < 2_000_000_000:
            file.write(block)
    grown = grown_by(tmp_path, inputs=["big.txt"], out="x.npy", threads=2, **more)
    print(grown, "KiB")
    assert grown < 100_000, f"{grown} KiB"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes on a shared machine
def test_a_single_line_of_a_gigabyte(kiln: Tokenizer, tmp_path: Path) -> None:
    """Text has borders inside of a line; a record is held as a whole: line, text and ids."""
    dice = random.Random(1)
    block = "".join(dice.choices([w for w in WORDS if "\n" not in w], k=2_000_000)).encode()
    for name, most in (("line.txt", 100_000), ("line.jsonl", 4_000_000)):
        with (tmp_path / name).open("wb") as file:
            file.write(b'{"text": "' if name.endswith("jsonl") else b"")
            while file.tell() < 1_000_000_000:
                file.write(block)
            file.write(b'"}\n' if name.endswith("jsonl") else b"")
        grown = grown_by(tmp_path, inputs=[name], out=f"{name}.npy", threads=2)
        print(name, grown, "KiB")
        assert grown < most, f"{name}: {grown} KiB"


def test_whoever_writes_a_file_loads_nothing_that_reads_one(tmp_path: Path, kiln: Tokenizer) -> None:
    (tmp_path / "one.txt").write_text("the warm kiln")
    work = "import bytekiln as b; f = b.encode_files(b.Tokenizer.from_file('t.json'), 'one.txt', 'o.npy')"

    def loaded(code: str) -> set[str]:
        line = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
        return set(subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split())

    more = loaded(work) - loaded("pass")
    assert "bytekiln.tokenfile" in more and not more & {"json", "numpy", "pathlib", "re", "typing"}
    assert TokenFile.open(tmp_path / "o.npy").array.tolist() == kiln.encode("the warm kiln")
