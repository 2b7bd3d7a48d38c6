"""The tokenizer commands as a user meets them: what they write, what they say, and every way to go wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import bytekiln
from bytekiln.bpe_flags import size
from conftest import Result

EOT = "<|endoftext|>"


@pytest.fixture
def tokenizer(command, corpus: Path, tmp_path: Path) -> Path:
    command("bpe-train", corpus, "--vocab-size", 300, "--special-token", EOT, "--out", "tokenizer.json")
    return tmp_path / "tokenizer.json"


def leftovers(folder: Path, *known: str) -> set[str]:
    """What a command has left behind besides the known files."""
    return {p.name for p in folder.iterdir()} - set(known)


# --- what they do ------------------------------------------------------------------------------------------


def test_train_says_what_it_made(command, corpus: Path) -> None:
    out = command("bpe-train", corpus, "--vocab-size", 300, "--special-token", EOT, "--out", "t.json").stdout
    assert out.startswith("wrote t.json\n")
    assert f"300 = 256 bytes + 43 merges + special: {EOT}" in out
    for row in ("text", "time", "peak memory", "longest token"):
        assert re.search(rf"^  {row} +\S", out, re.M), out


def test_train_json_is_one_object(command, corpus: Path) -> None:
    run = command("bpe-train", corpus, "--vocab-size", 300, "--special-token", EOT, "--out", "t.json", "--json")
    found = json.loads(run.stdout)
    assert found["vocab_size"] == 300 and found["merges"] == found["requested_merges"] == 43
    assert found["bytes"] == corpus.stat().st_size
    assert found["pretokens"] >= found["distinct_pretokens"] > 10
    assert found["peak_memory_bytes"] > 1_000_000 and found["seconds"] > 0
    assert found["hash"].startswith("sha256:")
    assert found["longest_token"] and found["threads"] >= 1 and found["count_s"] >= 0 and found["merge_s"] >= 0


def test_train_stops_early_and_says_so(command, corpus: Path) -> None:
    run = command("bpe-train", corpus, "--vocab-size", "32k", "--out", "t.json", "--json")
    found = json.loads(run.stdout)
    assert found["merges"] < found["requested_merges"]
    assert (
        f"stopped at {found['vocab_size']} tokens: no pair of tokens is left to merge (32000 were asked for)"
        in run.stderr
    )


@pytest.mark.parametrize(
    "flags",
    [[], ["--pattern", "cl100k"], ["--tie-break", "huggingface"], ["--tie-break", "raw-bytes"], ["--threads", "1"]],
)
def test_train_then_encode_then_decode(command, corpus: Path, tmp_path: Path, flags: list[str]) -> None:
    command("bpe-train", corpus, "--vocab-size", 320, "--special-token", EOT, "--out", "t.json", *flags)
    command("bpe-encode", corpus, "--tokenizer", "t.json", "--out", "t.npy")
    t = bytekiln.Tokenizer.from_file(tmp_path / "t.json")
    ids = np.load(tmp_path / "t.npy")
    assert t.decode(ids) == corpus.read_text(encoding="utf-8")
    assert list(ids).count(t.eot_id) == 60


def test_several_inputs_follow_each_other(command, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"one{EOT}")
    (tmp_path / "b.txt").write_text("two")
    command("bpe-encode", "a.txt", "b.txt", "--tokenizer", tokenizer, "--out", "ab.bin", "--dtype", "uint32")
    t = bytekiln.Tokenizer.from_file(tokenizer)
    ids = np.fromfile(tmp_path / "ab.bin", dtype="<u4")
    assert ids.tolist() == [*t.encode("one"), t.eot_id, *t.encode("two")]


@pytest.mark.parametrize(("flag", "ends"), [("--append-eot", 2), ("--no-append-eot", 1), (None, 2)])
def test_append_eot(command, tokenizer: Path, tmp_path: Path, flag: str | None, ends: int) -> None:
    (tmp_path / "a.txt").write_text(f"one{EOT}two")
    command("bpe-encode", "a.txt", "--tokenizer", tokenizer, "--out", "a.npy", *([flag] if flag else []))
    t = bytekiln.Tokenizer.from_file(tokenizer)
    assert np.load(tmp_path / "a.npy").tolist().count(t.eot_id) == ends


def test_seed_spellings(command, corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    """`--data_path --vocab_path --merges_path --output_path --method streaming`."""
    t = bytekiln.Tokenizer.from_file(tokenizer)
    model = json.loads(t.to_json())["model"]
    (tmp_path / "v.vocab").write_text(json.dumps(model["vocab"]))
    merges = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    (tmp_path / "v.merges").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    command(
        "bpe-encode", "--data_path", corpus, "--vocab_path", "v.vocab", "--merges_path", "v.merges",
        "--output_path", "train_data.npy", "--method", "streaming", "--special-token", EOT,
    )  # fmt: skip
    command("bpe-encode", corpus, "--tokenizer", tokenizer, "--out", "again.npy")
    assert (tmp_path / "train_data.npy").read_bytes() == (tmp_path / "again.npy").read_bytes()


def test_inspect(command, corpus: Path, tokenizer: Path) -> None:
    out = command("bpe-inspect", tokenizer, "--text", corpus).stdout
    for row in ("compression", "vocabulary", "longest tokens", "speed", "the Pile"):
        assert row in out
    found = json.loads(command("bpe-inspect", tokenizer, "--text", corpus, "--json").stdout)
    t = bytekiln.Tokenizer.from_file(tokenizer)
    ids = t.encode(corpus.read_text(encoding="utf-8"), allowed_special="all")
    assert found["tokens"] == len(ids) and found["tokens_used"] == len(set(ids))
    words = corpus.read_bytes().replace(EOT.encode(), b"")  # compression is of the text, not of special tokens
    assert found["bytes"] == len(words) and found["bytes_per_token"] == pytest.approx(len(words) / len(ids))
    assert sum(found["vocabulary"].values()) == found["vocab_size"] == 300
    assert found["vocabulary"]["bytes"] == 256 and found["vocabulary"]["special"] == 1
    assert found["pile_hours"] == pytest.approx(825e9 / found["bytes_per_second"] / 3600)
    assert max(map(len, found["longest_tokens"])) == len(found["longest_tokens"][0])


def test_inspect_compares_tokenizers(command, corpus: Path, tokenizer: Path) -> None:
    command("bpe-train", corpus, "--vocab-size", 260, "--out", "small.json")
    found = json.loads(command("bpe-inspect", tokenizer, "small.json", "--text", corpus, "--json").stdout)
    assert [f["vocab_size"] for f in found] == [300, 260]
    assert found[0]["bytes_per_token"] > found[1]["bytes_per_token"]


def test_dataset_layout(command, corpus: Path, tmp_path: Path) -> None:
    """`--dataset X` stands for data/X_{train,valid}.txt and data/processed/X_{train,valid}.npy."""
    said = command("bpe-train", "--dataset", "pots", "--vocab-size", 300, status=2).stderr
    assert "data/pots_train.txt" in said
    assert "data/tinystories_train.txt" in command("bpe-train", status=2).stderr
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "data" / f"pots_{split}.txt").write_bytes(corpus.read_bytes())
    said = command("bpe-encode", "--dataset", "pots", status=2).stderr
    assert "bpe-train --dataset pots" in said
    command("bpe-train", "--dataset", "pots", "--vocab-size", 300)
    command("bpe-encode", "--dataset", "pots")
    command("bpe-inspect", "--dataset", "pots")
    assert leftovers(tmp_path / "data" / "processed") == {
        "pots_tokenizer.json",
        *(f"pots_{split}.npy{more}" for split in ("train", "valid") for more in ("", ".json")),
    }


@pytest.mark.parametrize(("text", "value"), [("4096", 4096), ("32k", 32_000), ("0.5M", 500_000), ("10_000", 10_000)])
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


# --- how they refuse ---------------------------------------------------------------------------------------


def test_existing_output_is_refused_then_replaced(command, corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    before = tokenizer.read_bytes()
    said = command("bpe-train", corpus, "--vocab-size", 290, "--out", tokenizer, status=2).stderr
    assert "--overwrite" in said and "another name" in said and "tokenizer.json" in said
    assert tokenizer.read_bytes() == before
    command("bpe-train", corpus, "--vocab-size", 290, "--out", tokenizer, "--overwrite")
    assert bytekiln.Tokenizer.from_file(tokenizer).n_vocab == 290
    command("bpe-encode", corpus, "--tokenizer", tokenizer, "--out", "t.npy")
    before = (tmp_path / "t.npy").read_bytes()
    said = command("bpe-encode", corpus, "--tokenizer", tokenizer, "--out", "t.npy", status=2).stderr
    assert "--overwrite" in said and "another name" in said
    assert (tmp_path / "t.npy").read_bytes() == before


TRAIN = ["--vocab-size", "300", "--out", "x.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.txt", *TRAIN], ["missing.txt", "no such file"]),
        (["folder", *TRAIN], ["folder", "directory"]),
        (["empty.txt", *TRAIN], ["empty.txt", "empty"]),
        (["corpus.txt", "empty.txt", *TRAIN], ["empty.txt", "empty"]),
        (["bad.txt", *TRAIN], ["bad.txt", "UTF-8", "10"]),
        (["corpus.txt", "--vocab-size", "255", "--out", "x.json"], ["255", "256"]),
        (["corpus.txt", "--vocab-size", "256", "--special-token", "<a>", "--out", "x.json"], ["256", "257"]),
        (["corpus.txt", "--special-token", "<a>", "--special-token", "<a>", *TRAIN], ["<a>", "twice"]),
        (["corpus.txt", "--special-token", "", *TRAIN], ["special token", "empty"]),
        (["corpus.txt", "--pattern", "(", *TRAIN], ["pattern"]),
        (["corpus.txt", "--threads", "0", *TRAIN], ["threads", "0", "1"]),
        (["corpus.txt", "--vocab-size", "300", "--out", "no/such/x.json"], ["no/such", "mkdir"]),
        (["corpus.txt", "--vocab-size", "300", "--out", "folder"], ["folder", "directory"]),
        (["corpus.txt", "--vocab-size", "300", "--out", "new/"], ["--out", "new/", "folder's name"]),
        (["corpus.txt", "--vocab-size", "many", "--out", "x.json"], ["--vocab-size", "many"]),
        (["corpus.txt", "--vocab-sise", "300", "--out", "x.json"], ["--vocab-sise", "--vocab-size"]),
        (["corpus.txt", "--errors", "ignore", *TRAIN], ["--errors", "ignore", "replace"]),
        (["corpus.txt", "--vocab-size", "300"], ["--out"]),
        (["corpus.txt", "--out", "x.json"], ["--vocab-size"]),
        (TRAIN, ["input"]),
    ],
)
def test_train_refuses(command, corpus: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.txt").write_bytes(b"good text\n\xff\xfe more\n")
    said = command("bpe-train", *arguments, status=2).stderr
    for word in words:
        assert word in said, said
    assert not leftovers(tmp_path, "corpus.txt", "folder", "empty.txt", "bad.txt")
    assert not leftovers(tmp_path / "folder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.txt"], ["missing.txt", "no such file"]),
        (["folder"], ["folder", "directory"]),
        (["empty.txt"], ["empty.txt", "empty"]),
        (["bad.txt"], ["bad.txt", "UTF-8", "10"]),
        (["corpus.txt", "--out", "no/such/x.npy"], ["no/such", "mkdir"]),
        (["corpus.txt", "--out", "folder"], ["folder", "directory"]),
        (["corpus.txt", "--out", "new/"], ["--out", "new/", "folder's name"]),
        (["corpus.txt", "--tokenizer", "missing.json"], ["missing.json", "no such file"]),
        (["corpus.txt", "--tokenizer", "folder"], ["folder", "tokenizer.json"]),
        (["corpus.txt", "--tokenizer", "corpus.txt"], ["corpus.txt"]),
        (["corpus.txt", "--tokenizer", "half.json"], ["half.json"]),
        (["corpus.txt", "--dtype", "int8"], ["--dtype", "int8", "uint16"]),
        (["corpus.txt", "--method", "memory"], ["--method", "memory", "streaming"]),
        (["corpus.txt", "--vocab-path", "v.json"], ["--tokenizer", "--merges-path"]),
        (["corpus.txt", "--tokeniser", "tokenizer.json"], ["--tokeniser", "--tokenizer"]),
        ([], ["input"]),
    ],
)
def test_encode_refuses(command, tokenizer: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.txt").write_bytes(b"good text\n\xff\xfe more\n")
    (tmp_path / "half.json").write_bytes(tokenizer.read_bytes()[:1000])
    before = {p.name for p in tmp_path.iterdir()}
    if not {"--tokenizer", "--vocab-path", "--tokeniser"} & set(arguments):
        arguments = [*arguments, "--tokenizer", str(tokenizer)]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "x.npy"]
    said = command("bpe-encode", *arguments, status=2).stderr
    for word in words:
        assert word in said, said
    assert not leftovers(tmp_path, *before)


def test_uint16_never_wraps(command, tmp_path: Path) -> None:
    """A vocabulary above 65,536 in uint16 is refused; without a dtype it becomes uint32."""
    letters = [bytes([i]) for i in range(256)]
    merges = [(a, b) for a in letters for b in letters]
    vocab = dict(enumerate([*letters, *(a + b for a, b in merges)]))
    big = bytekiln.Tokenizer.from_vocab_and_merges(vocab, merges)
    big.save(tmp_path / "big.json")
    (tmp_path / "t.txt").write_text("zzz yyy")
    said = command("bpe-encode", "t.txt", "--tokenizer", "big.json", "--out", "t.npy", "--dtype", "uint16", status=2)
    assert "uint16" in said.stderr and "65" in said.stderr
    assert not (tmp_path / "t.npy").exists()
    command("bpe-encode", "t.txt", "--tokenizer", "big.json", "--out", "t.npy")
    assert np.load(tmp_path / "t.npy").dtype == np.uint32


@pytest.mark.parametrize(
    ("policy", "text"), [("replace", "good \ufffd\ufffd text".encode()), ("bytes", b"good \xff\xfe text")]
)
def test_policies_for_invalid_utf8(command, tokenizer: Path, tmp_path: Path, policy: str, text: bytes) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good \xff\xfe text")
    command("bpe-train", "bad.txt", "--vocab-size", 260, "--out", "b.json", "--errors", policy)
    command("bpe-encode", "bad.txt", "--tokenizer", tokenizer, "--out", "b.npy", "--errors", policy)
    command("bpe-inspect", tokenizer, "--text", "bad.txt", "--errors", policy)
    assert bytekiln.Tokenizer.from_file(tokenizer).decode_bytes(np.load(tmp_path / "b.npy")) == text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.json", "--text", "corpus.txt"], ["missing.json", "no such file"]),
        (["tokenizer.json", "--text", "missing.txt"], ["missing.txt", "no such file"]),
        (["tokenizer.json", "--text", "empty.txt"], ["empty.txt", "empty"]),
        (["tokenizer.json"], ["--text"]),
        (["--text", "corpus.txt"], ["tokenizer"]),
    ],
)
def test_inspect_refuses(command, tokenizer: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "empty.txt").touch()
    said = command("bpe-inspect", *arguments, status=2).stderr
    for word in words:
        assert word in said, said


UNPRIVILEGED = """
import os, sys
# all that is read before the privileges go:
import bytekiln.cli_bpe, bytekiln.cli_train, bytekiln.cli, gettext, json, locale, textwrap
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(bytekiln.cli.main(sys.argv[1:]))
"""
"""A command as a user without root's privileges: the environment's files may lie where only root can read."""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may use (pytest keeps `tmp_path` to its owner)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def unprivileged(folder: Path, *arguments: object) -> str:
    """What a command that must exit with 2 says on stderr."""
    run = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and run.stderr.startswith("error: "), run.stderr
    return run.stderr.lower()


def test_no_permission_to_read(corpus: Path, open_folder: Path) -> None:
    shutil.copy(corpus, open_folder / "closed.txt")
    (open_folder / "closed.txt").chmod(0)
    said = unprivileged(open_folder, "bpe-train", "closed.txt", *TRAIN)
    assert "closed.txt" in said and "permission" in said
    assert not leftovers(open_folder, "closed.txt")


def test_no_permission_to_write(corpus: Path, tokenizer: Path, open_folder: Path) -> None:
    shutil.copy(corpus, open_folder / "corpus.txt")
    shutil.copy(tokenizer, open_folder / "tokenizer.json")
    (open_folder / "closed").mkdir(mode=0o555)
    for line in (
        ["bpe-train", "corpus.txt", "--vocab-size", 300, "--out", "closed/x.json"],
        ["bpe-encode", "corpus.txt", "--tokenizer", "tokenizer.json", "--out", "closed/x.npy"],
    ):
        said = unprivileged(open_folder, *line)
        assert "closed/x" in said and "cannot be written" in said
        assert not leftovers(open_folder / "closed")


@pytest.mark.parametrize("command_line", [["bpe-train", *TRAIN[:2]], ["bpe-encode", "--tokenizer", "tokenizer.json"]])
def test_full_disk(command, tokenizer: Path, corpus: Path, tmp_path: Path, command_line: list[str]) -> None:
    """A limit on the size of files stands for a full disk: writing fails in the same place."""
    before = {p.name for p in tmp_path.iterdir()}

    def limit() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    said = command(command_line[0], corpus, *command_line[1:], "--out", "x.out", status=2, preexec_fn=limit).stderr
    assert "x.out" in said
    assert not leftovers(tmp_path, *before)


def test_a_really_full_disk(command, corpus: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        (small / "filler").write_bytes(bytes(2**20 - 4096))
        said = command("bpe-train", corpus, "--vocab-size", 300, "--out", "small/x.json", status=2).stderr
        assert "x.json" in said and "space" in said
        assert not leftovers(small, "filler")
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.alone
@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_within_a_moment(tmp_path: Path, sign: signal.Signals, status: int) -> None:
    """Ctrl-C in the middle of the core's work: no output, no traceback, the right status, at once."""
    rng = np.random.default_rng(0)
    words = rng.integers(97, 123, size=(800_000, 8), dtype=np.uint8)
    words[:, 0] = 32
    (tmp_path / "big.txt").write_bytes(words.tobytes())
    p = subprocess.Popen(
        [sys.executable, "-m", "bytekiln.cli", "bpe-train", "big.txt", "--vocab-size", "60k", "--out", "x.json"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(0.6)
    assert p.poll() is None, "too quick to be interrupted; give it more text"
    start = time.monotonic()
    p.send_signal(sign)
    _, err = p.communicate(timeout=20)
    assert p.returncode == status and "Traceback" not in err
    assert time.monotonic() - start < 2
    assert not leftovers(tmp_path, "big.txt")


def test_text_that_is_not_utf8_on_the_command_line(command: Callable[..., Result], corpus: Path) -> None:
    for flag in ("--special-token", "--pattern"):
        line = [corpus, "--vocab-size", "300", "--out", "x.json", flag, b"\xff".decode(errors="surrogateescape")]
        assert "expected UTF-8" in command("bpe-train", *line, status=2).stderr


@pytest.mark.parametrize("size", ["inf", "nan", "1e30", "9999999999999999999", "4.5"])
def test_sizes_that_are_none(size: str, command: Callable[..., Result], corpus: Path) -> None:
    found = command("bpe-train", corpus, "--vocab-size", size, "--out", "x.json", status=2)
    assert "--vocab-size" in found.stderr and size in found.stderr


def test_inputs_and_the_tokenizer_are_never_overwritten(
    command: Callable[..., Result], corpus: Path, tmp_path: Path
) -> None:
    before = corpus.read_bytes()
    line = [corpus, "--vocab-size", "300", "--special-token", "<|endoftext|>"]
    assert "is one of the inputs" in command("bpe-train", *line, "--out", corpus, "--overwrite", status=2).stderr
    command("bpe-train", *line, "--out", "tok.json")
    tokenizer = (tmp_path / "tok.json").read_bytes()
    encode = ["bpe-encode", corpus, "--tokenizer", "tok.json", "--overwrite", "--out"]
    for out in (corpus, "tok", "tok.json"):
        assert "is one of the inputs" in command(*encode, out, status=2).stderr
    assert corpus.read_bytes() == before and (tmp_path / "tok.json").read_bytes() == tokenizer


def test_a_terminal_that_lacks_characters_is_no_reason_to_fail(command: Callable[..., Result]) -> None:
    assert "bpe-train" in command("bpe-train", "--help", env={"PYTHONIOENCODING": "ascii"}).stdout


def test_inspecting_ranks_needs_their_pattern(command: Callable[..., Result], corpus: Path, tmp_path: Path) -> None:
    bytekiln.train_bpe(corpus, vocab_size=300).save(tmp_path / "t.tiktoken", format="tiktoken")
    assert "--pattern" in command("bpe-inspect", "--help").stdout
    command("bpe-inspect", "t.tiktoken", "--text", corpus, status=2)
    assert "bytes a token" in command("bpe-inspect", "t.tiktoken", "--pattern", "gpt2", "--text", corpus).stdout
