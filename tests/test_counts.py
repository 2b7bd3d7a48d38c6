"""Counts of words: added in any way they are those of the whole; files that are checked; the commands for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import Counts, train_bpe, train_bpe_from_iterator
from bytekiln.errors import ConfigError, FormatError, OutputExistsError, TextError

EOT = "<|endoftext|>"
documents = st.lists(
    st.lists(
        st.one_of(
            st.text("abcd ", max_size=12), st.just(EOT), st.text(max_size=4), st.just("\0\0 longer than fifteen")
        ),
        max_size=8,
    ).map("".join),
    max_size=12,
)


def by_hand(texts: list[str]) -> Counter[bytes]:
    """Python's own count of what the tokenizer's pattern cuts."""
    tokenizer = train_bpe_from_iterator([], vocab_size=256)
    parts = (part for text in texts for part in text.split(EOT))
    return Counter(word.encode() for part in parts for word in tokenizer.pretokenize(part))


def everything(counts: Counts) -> dict[bytes, int]:
    return dict(counts.most_common(1_000_000))


@settings(max_examples=60)
@given(documents, st.randoms(use_true_random=False))
def test_counts_of_parts_add_up_to_those_of_the_whole(texts: list[str], random: Any) -> None:
    parts: list[Counts] = []
    shuffled = random.sample(texts, len(texts))
    while shuffled:
        part = Counts(special_tokens=[EOT])
        taken, shuffled = shuffled[: (n := random.randint(1, 4))], shuffled[n:]
        if random.random() < 0.5:
            part.add_documents(t if random.random() < 0.5 else t.encode() for t in taken)
        else:
            for text in taken:
                part.add(text)
        parts.insert(random.randint(0, len(parts)), part)
    whole = Counts(special_tokens=[EOT])
    for part in parts:
        whole = whole + part if random.random() < 0.5 else part + whole
    expected = by_hand(texts)
    assert everything(whole) == expected and len(whole) == len(expected)
    assert whole.most_common(3) == sorted(expected.items(), key=lambda w: (-w[1], w[0]))[:3]
    assert whole.about["documents"] == len(texts) and whole.about["pretokens"] == expected.total()
    once = train_bpe_from_iterator(texts, vocab_size=300, special_tokens=[EOT])
    assert whole.train(300).to_json() == once.to_json()
    assert everything(whole) == expected  # training leaves them


def test_saved_and_loaded(tmp_path: Path) -> None:
    a, b = Counts(special_tokens=[EOT]), Counts(special_tokens=[EOT])
    a.add("the kiln is warm")
    b.add_documents(["the clay is wet", b"the bowl grows"])
    said = a.save(tmp_path / "a.counts")
    assert said == {**a.about, "distinct_pretokens": 4, "spilled_runs": 0}
    with pytest.raises(OutputExistsError):
        a.save(tmp_path / "a.counts")
    a.save(tmp_path / "a.counts", overwrite=True)
    b.save(tmp_path / "b.counts")
    both = Counts.load([tmp_path / "a.counts", tmp_path / "b.counts"])
    (tmp_path / "a.counts").unlink()  # it is open
    assert everything(both) == everything(a + b) and both.about == (a + b).about
    loaded = Counts.load(tmp_path / "b.counts")
    loaded.add("more")
    assert loaded.about["documents"] == 3 and dict(loaded.most_common(99))[b"more"] == 1
    assert everything(b + b)[b"the"] == 4 and everything(b)[b"the"] == 2


def test_refusals() -> None:
    counts = Counts()
    counts.add("good")
    with pytest.raises(TextError, match="byte offset 4"):
        counts.add(b"bad \xff")
    with pytest.raises(TextError, match=r"texts\[2\]: byte offset 0"):
        counts.add_documents(["a", b"b", b"\xff", "c"])
    assert everything(counts) == {b"good": 1, b"a": 1, b"b": 1}
    for wrong in ("one text", b"one text"):
        with pytest.raises(ConfigError, match="expected an iterable of texts"):
            counts.add_documents(wrong)
    with pytest.raises(TypeError):
        counts.add(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pattern cl100k; expected gpt2"):
        counts + Counts(pattern="cl100k")
    with pytest.raises(ConfigError, match=r"max_memory: found 1\.0 MB; expected 16\.8 MB"):
        Counts(max_memory=1_000_000)
    with pytest.raises(ConfigError, match="vocab_size"):
        counts.train(5)


def test_an_iterator_that_fails_is_heard_and_what_it_gave_before_counts() -> None:
    def texts() -> Iterator[str]:
        yield from ["a " * 400_000, "b"]  # the first is larger than a batch
        raise RuntimeError("the source broke")

    counts = Counts()
    with pytest.raises(RuntimeError, match="the source broke"):
        counts.add_documents(texts())
    assert dict(counts.most_common(1)) == {b" a": 399_999}


@pytest.mark.parametrize("kind", ["add", "add_documents", "train_bpe_from_iterator"])
def test_other_threads_run_while_counting(kind: str) -> None:
    text = " ".join(f"w{i % 50_000}" for i in range(3_000_000))
    jobs: dict[str, Callable[[], object]] = {
        "add": lambda: Counts().add(text),
        "add_documents": lambda: Counts().add_documents([text]),
        "train_bpe_from_iterator": lambda: train_bpe_from_iterator([text], vocab_size=256),
    }
    # Python takes the lock away from a thread that runs Python after 5 ms; one that held it in here would keep it.
    done = threading.Event()
    worker = threading.Thread(target=lambda: (jobs[kind](), done.set()))
    longest, last = 0.0, time.perf_counter()
    start = last
    worker.start()
    while not done.is_set():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        time.sleep(0.0005)
    worker.join()
    whole = time.perf_counter() - start
    assert longest < whole / 2, (longest, whole)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    counts = Counts()
    counts.add_documents(f"{i * 2654435761 % 2**32:x}" for i in range(2000))
    path = tmp_path / "a.counts"
    counts.save(path)
    whole = path.read_bytes()
    for damaged, said in [
        (whole[:-9], "it was cut off"),
        (whole[: len(whole) // 2], "it was cut off"),
        (whole[:900] + b"\0\0" + whole[902:], "block 0 at byte offset"),
        (b"{}" * 100, "is no counts file"),
        (whole[:16] + b"\x07" + whole[17:], "version 7 of counts files; expected 1"),
        (b"", "is no counts file"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=said) as info:
            len(Counts.load([path, path]))
        assert str(info.value).startswith(str(path))


# ----------------------------------------------------------------------------- the commands


@pytest.fixture
def parts(tmp_path: Path, corpus: Path) -> SimpleNamespace:
    """A text of documents, as one file and as four."""
    texts = corpus.read_text().split(EOT)
    files = []
    for i in range(4):
        files.append(tmp_path / f"part{i}.txt")
        files[-1].write_text(EOT.join(texts[i::4]) + " and more")
    return SimpleNamespace(files=files, special=("--special-token", EOT))


def test_counting_in_parts_is_counting_at_once(command: Any, parts: SimpleNamespace, tmp_path: Path) -> None:
    train = ("--vocab-size", 330)
    command("bpe-train", *parts.files, *parts.special, *train, "--out", "once.json")
    for i, file in enumerate(parts.files):
        said = json.loads(command("bpe-count", file, *parts.special, "--out", f"{i}.counts", "--json").stdout)
        assert said["counts"] == f"{i}.counts" and said["bytes"] == file.stat().st_size and said["documents"] == 1
    text = command("bpe-count", *parts.files, *parts.special, "--out", "all.counts", "--threads", 2).stdout
    assert text.startswith("wrote all.counts") and "in 4 texts" in text
    command("bpe-count", "--counts", "0.counts", "3.counts", "--out", "03.counts")
    command("bpe-count", "--counts", "1.counts", "03.counts", "2.counts", "--out", "sum.counts")
    assert (tmp_path / "sum.counts").read_bytes() == (tmp_path / "all.counts").read_bytes()
    ways = [["all.counts"], ["2.counts", "0.counts", "3.counts", "1.counts"], ["03.counts", "2.counts", "1.counts"]]
    for i, way in enumerate(ways):
        said = json.loads(command("bpe-train", "--counts", *way, *train, "--out", f"{i}.json", "--json").stdout)
        assert said["bytes"] == sum(f.stat().st_size for f in parts.files)
        assert (tmp_path / f"{i}.json").read_bytes() == (tmp_path / "once.json").read_bytes()


def test_bad_calls_are_one_line(command: Any, parts: SimpleNamespace, tmp_path: Path) -> None:
    a, b = parts.files[:2]
    command("bpe-count", a, *parts.special, "--out", "a.counts")
    command("bpe-count", b, "--out", "plain.counts")
    command("bpe-count", b, *parts.special, "--pattern", "o200k", "--out", "o200k.counts")
    for args, said in [
        (("bpe-count",), "found neither of INPUT and --counts"),
        (("bpe-count", a, "--counts", "a.counts"), "found both of INPUT and --counts"),
        (("bpe-count", a), "--out is missing"),
        (("bpe-count", a, "--out", "a.counts"), "exists already"),
        (("bpe-count", a, "--out", a, "--overwrite"), "is one of the inputs"),
        (("bpe-count", "none.txt", "--out", "x.counts"), "none.txt: no such file"),
        (("bpe-count", a, "--max-memory", "1MB", "--out", "x.counts"), "expected 16MiB or more"),
        (("bpe-count", a, "--max-memory", "much", "--out", "x.counts"), "expected a number of bytes"),
        (("bpe-count", "--counts", "a.counts", "--pattern", "gpt2", "--out", "x.counts"), "--pattern with --counts"),
        (("bpe-count", "--counts", "a.counts", a.name, "--out", "x.counts"), "part0.txt: is no counts file"),
        (("bpe-count", "--counts", "a.counts", "o200k.counts", "--out", "x.counts"), "as in a.counts"),
        (("bpe-train", "--counts", "a.counts", "plain.counts"), "plain.counts: found special tokens []; expected"),
        (("bpe-train", "--counts", "a.counts", "o200k.counts"), "o200k.counts: found pattern o200k; expected gpt2"),
        (("bpe-train", "--counts", "a.counts", "--special-token", EOT), "--special-token with --counts"),
        (("bpe-train", "--counts", "a.counts", "--errors", "error"), "--errors with --counts"),
        (("bpe-count", "--counts", "a.counts", "--threads", "2", "--out", "x.counts"), "--threads with --counts"),
        (("bpe-train", "--counts", "a.counts", "--seed", "0"), "--seed with --counts"),
        (("bpe-train", "--counts", "a.counts", "--pattern", ""), "--pattern with --counts"),
        (("bpe-train", a, "--counts", "a.counts"), "found text and --counts"),
    ]:
        more = ("--vocab-size", 300, "--out", "x.json") if args[0] == "bpe-train" else ()
        assert said in command(*args, *more, status=2).stderr, args
    assert not (tmp_path / "x.counts").exists() and not (tmp_path / "x.json").exists()


def test_help_has_an_example_that_works(command: Any, parts: SimpleNamespace, tmp_path: Path) -> None:
    said = command("bpe-count", "--help").stdout
    assert 'bpe-count part1.txt --special-token "<|endoftext|>" --out part1.counts' in said
    assert len(said.splitlines()) < 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whoever_is_stopped_leaves_nothing(tmp_path: Path, number: int) -> None:
    source, folder = tmp_path / "text.txt", tmp_path / "out"
    folder.mkdir()
    with source.open("w") as f:
        for i in range(60):
            f.write(" ".join(f"{(i * 40_000 + j) * 2654435761 % 2**32:x}" for j in range(40_000)) + "\n")
    args = ["bpe-count", str(source), "--max-memory", "16MiB", "--out", str(folder / "x.counts")]
    env = {k: v for k, v in os.environ.items() if k != "TMPDIR"}
    with subprocess.Popen([sys.executable, "-m", "bytekiln.cli", *args], stderr=subprocess.PIPE, env=env) as run:
        deadline = time.monotonic() + 60
        while not _holds_a_run(run.pid, folder) and run.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert run.poll() is None, "it ended before it was stopped"
        run.send_signal(number)
        assert run.wait(timeout=20) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert list(folder.iterdir()) == []


def _holds_a_run(pid: int, folder: Path) -> bool:
    """Whether a process has a file without a name open in a folder."""
    try:
        held = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(name.startswith(f"{folder}/") and name.endswith("(deleted)") for name in held)


def test_a_counts_object_is_what_the_package_shows() -> None:
    assert bytekiln.Counts is Counts and "Counts" in bytekiln.__all__


def test_files_of_any_number_are_counted(tmp_path: Path) -> None:
    files = []
    for i in range(150):
        files.append(tmp_path / f"{i}.counts")
        one = Counts(max_memory=16 << 20)
        one.add(f"word{i % 20} and")
        one.save(files[-1])
    both = Counts.load(files, max_memory=16 << 20)
    assert everything(both)[b" and"] == 150 and len(both) == 22
    assert (
        both.train(280).merges
        == train_bpe_from_iterator((f"word{i % 20} and" for i in range(150)), vocab_size=280).merges
    )


def test_files_and_texts_agree(corpus: Path) -> None:
    counted = Counts.from_files(corpus, special_tokens=[EOT], threads=2)
    assert counted.train(300).to_json() == train_bpe(corpus, vocab_size=300, special_tokens=[EOT]).to_json()


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bytekiln import cli

    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.run("bpe-count", [str(corpus), "--ray", "--out", str(tmp_path / "x.counts")]) == 2
    assert 'pip install "bytekiln[ray]"' in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == [corpus.name]


@pytest.mark.slow
def test_on_a_local_ray_cluster_of_two_processes(
    parts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = pytest.importorskip("ray")
    from bytekiln import cli

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir="/tmp/bytekiln-ray")
    try:
        files, once, spread = [str(f) for f in parts.files], tmp_path / "once.counts", tmp_path / "ray.counts"
        assert cli.run("bpe-count", [*files, *parts.special, "--out", str(once)]) == 0
        assert cli.run("bpe-count", [*files, *parts.special, "--ray", "--out", str(spread)]) == 0, capsys.readouterr()
        assert spread.read_bytes() == once.read_bytes()
        # A field is for those groups of files that have records.
        mixed = [*files, str(tmp_path / "records.jsonl")]
        (tmp_path / "records.jsonl").write_text('{"body": "a record, one of two"}\n{"body": "the other one"}\n')
        for more, out in (((), once), (("--ray",), spread)):
            flags = ["--field", "body", *parts.special, "--out", str(out), "--overwrite"]
            assert cli.run("bpe-count", [*mixed, *more, *flags]) == 0, capsys.readouterr()
        assert spread.read_bytes() == once.read_bytes()
        # A task's error is the command's; parts are cleaned away.
        bad = tmp_path / "bad.txt"
        bad.write_bytes(b"fine until here \xff")
        assert cli.run("bpe-count", [*files, str(bad), "--ray", "--out", str(tmp_path / "x.counts")]) == 2
        assert "bad.txt: byte offset 16: invalid UTF-8" in capsys.readouterr().err
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") or p.name == "x.counts"]
    finally:
        ray.shutdown()
