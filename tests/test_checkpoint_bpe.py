"""`bpe-train --checkpoint`: whenever and however it is stopped, the tokenizer is the one of an undisturbed run."""

from __future__ import annotations

import fcntl
import gzip
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bytekiln
from bytekiln import _core, cli_train

LINE = [sys.executable, "-m", "bytekiln.cli", "bpe-train"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two files whose words come back, some of them long."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(1)
    words = [b" " + bytes(rng.integers(97, 107, size=n, dtype=np.uint8)) for n in rng.integers(2, 30, size=40_000)]
    ranks = (40_000 ** rng.random(500_000)).astype(int) - 1
    for n, part in enumerate(np.array_split(ranks, 2)):
        (folder / f"{n}.txt").write_bytes(b"".join(words[rank] for rank in part))
    yield folder


def flags(out: str) -> list[str]:
    return ["0.txt", "1.txt", "--vocab-size", "20k,25k", "--out", out, "--overwrite", "--min-frequency", "2"]


def start(texts: Path, out: str, *more: object) -> subprocess.Popen[str]:
    line = [*LINE, *flags(out), *map(str, more)]
    return subprocess.Popen(line, cwd=texts, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(p: subprocess.Popen[str]) -> str:
    _, said = p.communicate(timeout=120)
    assert "Traceback" not in said and "panicked" not in said, said
    return said


@pytest.fixture(scope="module")
def undisturbed(texts: Path) -> tuple[list[bytes], float]:
    """The tokenizers, and how long they took."""
    began = time.monotonic()
    p = start(texts, "whole.json")
    end(p)
    assert p.returncode == 0
    return [(texts / f"whole-{size}.json").read_bytes() for size in ("20k", "25k")], time.monotonic() - began


def answers(pid: int) -> bool:
    """Whether a command is so far that it answers signals: it has a handler for SIGTERM, which Python has not."""
    status = Path("/proc", str(pid), "status").read_text().splitlines()
    return bool(int(next(n for n in status if n.startswith("SigCgt")).split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_at_any_moment(texts: Path, undisturbed: tuple[list[bytes], float], how: signal.Signals) -> None:
    whole, seconds = undisturbed
    rng = random.Random(how)
    out, kept = f"{how.name}.json", texts / f"{how.name}.ck"
    stopped = finished = 0
    went_on: list[str] = []
    while stopped < 12 or not finished or not went_on:
        assert stopped < 60, "no run found what another one had left"
        p = start(texts, out, "--checkpoint", kept.name, "--checkpoint-every", 0.02)
        if how != signal.SIGKILL:  # before that it is Python which is interrupted, and says so
            while p.poll() is None and not answers(p.pid):
                time.sleep(0.01)
        try:
            # Long enough to get somewhere; at last to the end.
            p.wait(timeout=None if stopped >= 12 else seconds * rng.uniform(0.1, 0.8))
        except subprocess.TimeoutExpired:
            p.send_signal(how)
        said = end(p)
        went_on += [line for line in said.splitlines() if "went on" in line]
        # A signal to Python's own end, behind the last line of the command, is no interruption.
        over = p.returncode == 0 or (p.returncode == -how != -signal.SIGKILL and not kept.exists())
        if over:
            finished += 1
            assert [(texts / out.replace(".json", f"-{size}.json")).read_bytes() for size in ("20k", "25k")] == whole
            assert not list(texts.glob(f"*{kept.name}*"))
        else:
            assert p.returncode == (-9 if how == signal.SIGKILL else 128 + how), said
            stopped += 1


@pytest.mark.slow
def test_counting_goes_on_within_a_file_and_merging_within_the_list(texts: Path, tmp_path: Path) -> None:
    """Both kinds of checkpoint are met: a callback stops the run at a given place, again and again."""
    files, kept = [texts / "0.txt", texts / "1.txt"], tmp_path / "run.ck"
    options = {"vocab_size": 20_000, "chunk_bytes": 1 << 18, "threads": 2}
    (expected,), _ = _core.train_bpe(files, **options)
    places = [("count", 1e6), ("count", 3e6), ("count", 6e6), ("merge", 100), ("merge", 7000), ("merge", 1)]

    def train(place: tuple[str, float] | None) -> tuple[list[bytekiln.Tokenizer], dict[str, int]]:
        def stop(stage: str, done: int, total: int) -> None:
            if place and stage == place[0] and done >= place[1] and kept.exists():
                raise KeyboardInterrupt

        return _core.train_bpe(files, **options, checkpoint=kept, checkpoint_every=0, progress=stop)

    for place in places:
        try:
            (made,), stats = train(place)
        except KeyboardInterrupt:
            assert kept.exists()
            try:
                assert bytekiln.Counts.load(kept).about["bytes"] == sum(f.stat().st_size for f in files)
            except bytekiln.BytekilnError as error:  # not to be taken for the counts of all
                assert place[0] == "count" and "run.ck: holds the counts of a part of its text" in str(error)
            continue
        assert made.hash == expected.hash  # it was over before it was looked at
    (made,), stats = train(None)
    assert made.hash == expected.hash and made.merges == expected.merges
    assert stats["resumed_bytes"] == stats["bytes"] and stats["resumed_merges"] > 0
    assert len(stats["top_merges"]) == 10 and stats["merges"] == 19_744


@pytest.mark.parametrize("every", [0, 1e-6])
def test_a_checkpoint_that_is_always_due_has_something_new(texts: Path, tmp_path: Path, every: float) -> None:
    options = {"vocab_size": 300, "chunk_bytes": 1 << 18, "threads": 2}
    (expected,), _ = _core.train_bpe([texts / "0.txt"], **options)
    began = time.monotonic()

    def hurry(stage: str, done: int, total: int) -> None:
        assert time.monotonic() < began + 60, f"{stage} stands at {done} of {total}"

    kept = tmp_path / "run.ck"
    (made,), _ = _core.train_bpe([texts / "0.txt"], **options, checkpoint=kept, checkpoint_every=every, progress=hurry)
    assert made.hash == expected.hash


@pytest.mark.parametrize("part", [{}, {"sample": 0.5, "seed": 2}, {"limit_bytes": 7_000_000}])
def test_packed_files_and_records_go_on_within_their_size(texts: Path, tmp_path: Path, part: dict[str, float]) -> None:
    text = (texts / "0.txt").read_text()
    lines = [text[i : i + 500] for i in range(0, len(text), 500)]
    with gzip.open(tmp_path / "a.txt.gz", "wt", compresslevel=1) as file:
        file.write("<e>".join(lines))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    inputs = bytekiln.Inputs([tmp_path / "a.txt.gz", tmp_path / "b.jsonl.gz"], **part)
    options = {"vocab_size": 400, "special_tokens": ["<e>"], "chunk_bytes": 1 << 15, "threads": 2}
    (expected,), whole = _core.train_bpe(inputs, **options)
    kept, stopped = tmp_path / "run.ck", 0
    for share in (0.2, 0.6, 2):

        def stop(stage: str, done: int, total: int, share: float = share) -> None:
            assert done <= total or not total, f"{stage}: {done} of {total}"
            if stage == "count" and done > share * total and kept.exists():
                raise KeyboardInterrupt

        try:
            (made,), stats = _core.train_bpe(inputs, **options, checkpoint=kept, checkpoint_every=0, progress=stop)
        except KeyboardInterrupt:
            assert kept.exists()
            stopped += 1
    assert stopped and stats["resumed_bytes"] > 0
    assert made.hash == expected.hash
    assert all(stats[key] == whole[key] for key in ("bytes", "pretokens", "distinct_pretokens", "ties", "merges"))


@pytest.mark.parametrize("kind", ["txt.gz", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("part", [{}, {"sample": 0.5, "seed": 2}])
def test_what_was_counted_is_not_counted_anew(texts: Path, tmp_path: Path, kind: str, part: dict[str, float]) -> None:
    """Stopped while some thread reads, again and again, with nothing saved but then."""
    text = (texts / "0.txt").read_text() * 12
    documents = [text[i : i + 5000] for i in range(0, len(text), 5000)]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": documents}), path, row_group_size=1000, compression="zstd")
    else:
        lines = [json.dumps({"text": document}) + "\n" for document in documents]
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.write("<e>".join(documents) if kind == "txt.gz" else "".join(lines))
    inputs = bytekiln.Inputs([path], **part)
    options = {"vocab_size": 400, "special_tokens": ["<e>"], "chunk_bytes": 1 << 15, "threads": 2}
    (expected,), whole = _core.train_bpe(inputs, **options)
    kept, places = tmp_path / "run.ck", [0.1 * n for n in range(1, 9)]
    stops = found = counted = 0
    for place in [*places, 2]:
        seen = [0.0]

        def stop(stage: str, done: int, total: int, place: float = place, seen: list[float] = seen) -> None:
            if stage == "count" and done > place * total:
                seen[0] = done / total
                raise KeyboardInterrupt

        try:
            (made,), stats = _core.train_bpe(inputs, **options, checkpoint=kept, checkpoint_every=3600, progress=stop)
            break
        except KeyboardInterrupt:
            stops += 1
            head = kept.read_bytes()[:4096] if kept.exists() else b'"bytes":0'
            before, counted = counted, int(re.search(rb'"bytes":(\d+)', head)[1])
            assert counted >= before
            # What the bar had shown; on a busy machine there may have been no time to save it.
            found += counted >= (seen[0] - 0.03) * whole["bytes"]
    assert stops >= 4 and found >= 0.6 * stops, (stops, found)
    assert stats["resumed_bytes"] == counted > 0.3 * whole["bytes"]
    assert made.hash == expected.hash
    assert all(stats[key] == whole[key] for key in ("bytes", "pretokens", "distinct_pretokens", "ties", "merges"))


@pytest.fixture
def begun(corpus: Path, tmp_path: Path) -> Path:
    """What a run has left that ended before its tokenizer was saved."""
    kept = tmp_path / "run.ck"
    _core.train_bpe([corpus], vocab_size=[300], special_tokens=["<|endoftext|>"], checkpoint=kept)
    assert kept.exists() and (tmp_path / "run.ck.merges").exists()
    return kept


SAME = ["corpus.txt", "--special-token", "<|endoftext|>", "--vocab-size", "300", "--out", "t.json"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--vocab-size", "301"], "vocab_size"),
        (["--special-token", "<x>"], "special_tokens"),
        (["--pattern", "cl100k"], "pattern"),
        (["--tie-break", "huggingface"], "tie_break"),
        (["--errors", "replace"], "errors"),
        (["--min-frequency", "2"], "min_frequency"),
        (["--max-token-length", "5"], "max_token_length"),
        (["corpus2.txt"], "input 2"),
    ],
)
def test_another_setting_is_refused_by_name(
    command, begun: Path, corpus: Path, tmp_path: Path, more: list[str], named: str
) -> None:
    (tmp_path / "corpus2.txt").write_bytes(corpus.read_bytes())
    before = begun.read_bytes()
    said = command("bpe-train", *SAME, *more, "--checkpoint", "run.ck", status=2).stderr
    assert "run.ck" in said and named in said and "expected the same" in said, said
    assert begun.read_bytes() == before and not (tmp_path / "t.json").exists()
    said = command("bpe-train", *SAME, "--checkpoint", "run.ck").stderr
    assert "went on from run.ck" in said and not begun.exists()


def test_a_changed_input_is_refused(command, begun: Path, corpus: Path) -> None:
    corpus.write_bytes(corpus.read_bytes()[:-100])
    said = command("bpe-train", *SAME, "--checkpoint", "run.ck", status=2).stderr
    assert "input 1" in said and "corpus.txt" in said and "bytes" in said


@pytest.mark.parametrize("name", ["run.ck", "run.ck.merges"])
def test_a_broken_checkpoint_is_refused(command, begun: Path, corpus: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:40] + b"!" + whole[41:], b"", b"my own notes"):
        file.write_bytes(broken)
        said = command("bpe-train", *SAME, "--checkpoint", "run.ck", status=2).stderr
        assert f"{name}: " in said and "expected" in said and file.read_bytes() == broken, said
    file.write_bytes(whole)
    (tmp_path / "run.ck.merges").unlink()
    said = command("bpe-train", *SAME, "--checkpoint", "run.ck", status=2).stderr
    assert "run.ck.merges" in said and "expected both, or neither" in said


def test_a_second_run_is_refused(command, begun: Path, tmp_path: Path) -> None:
    before = begun.read_bytes()
    with (tmp_path / "run.ck.merges").open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        said = command("bpe-train", *SAME, "--checkpoint", "run.ck", status=2).stderr
        assert "run.ck: another process goes on with it" in said
        assert begun.read_bytes() == before and not (tmp_path / "t.json").exists()
    said = command("bpe-train", *SAME, "--checkpoint", "run.ck").stderr  # it is free again
    assert "went on from run.ck" in said


def test_a_run_that_meets_the_beginning_of_another_one_is_refused(command, corpus: Path, tmp_path: Path) -> None:
    """The second file is there only when it is whole, and locked before."""
    with (tmp_path / ".run.ck.merges.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        said = command("bpe-train", *SAME, "--checkpoint", "run.ck", status=2).stderr
        assert "run.ck: another process goes on with it" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == [".run.ck.merges.partial", "corpus.txt"]
    command("bpe-train", *SAME, "--checkpoint", "run.ck")  # whoever left it was killed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.txt", "t.json"]


def test_a_checkpoint_is_held_until_the_tokenizers_are_saved(
    command, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    save = cli_train.Tokenizer.save

    def meet(*args: object, **options: object) -> None:
        said.append(command("bpe-train", *SAME, "--overwrite", "--checkpoint", "run.ck", status=2).stderr)
        save(*args, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_train.Tokenizer, "save", meet)
    assert cli_train.train([*SAME, "--checkpoint", "run.ck"]) == 0
    assert len(said) == 1 and "run.ck: another process goes on with it" in said[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.txt", "t.json"]


def test_an_interval_without_a_checkpoint_is_refused(command, corpus: Path) -> None:
    said = command("bpe-train", *SAME, "--checkpoint-every", "5", status=2).stderr
    assert "--checkpoint-every without --checkpoint" in said


def test_a_checkpoint_is_no_input_and_no_output(command, corpus: Path) -> None:
    said = command("bpe-train", *SAME, "--checkpoint", "t.json", status=2).stderr
    assert "--checkpoint names t.json" in said
    here = corpus.parent
    (here / "link").symlink_to(here)
    for other in (here / "t.json", here / "link" / "t.json"):
        said = command("bpe-train", *SAME, "--checkpoint", other, "--overwrite", status=2).stderr
        assert f"--checkpoint names {other}" in said
        said = command("bpe-train", *SAME, "--stats", other, "--overwrite", status=2).stderr
        assert f"--stats names {other}" in said
    assert "is one of the inputs" in command("bpe-train", *SAME, "--checkpoint", "corpus.txt", status=2).stderr
    assert "no/such" in command("bpe-train", *SAME, "--checkpoint", "no/such/run.ck", status=2).stderr


@pytest.mark.alone
@pytest.mark.parametrize("letters", ["abcdefghijklmnopqrstuvwxyz", "a"])
@pytest.mark.parametrize("share", [0.15, 0.4, 0.7])
def test_ctrl_c_within_one_giant_word(tmp_path: Path, letters: str, share: float) -> None:
    """50 MB without a border: reading, laying out and long merges are left at once."""
    rng = np.random.default_rng(0)
    alphabet = np.frombuffer(letters.encode(), dtype=np.uint8)
    (tmp_path / "t.txt").write_bytes(alphabet[rng.integers(0, len(alphabet), size=50_000_000)].tobytes())
    line = [*LINE, "t.txt", "--vocab-size", "2000", "--out", "t.json"]
    wait = 0.3 + (2 if len(letters) > 1 else 1) * share  # one letter takes 26 merges only
    p = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(wait)
    while p.poll() is not None:  # a quick machine
        end(p)
        (tmp_path / "t.json").unlink()
        wait *= 0.7
        p = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        time.sleep(wait)
    began = time.monotonic()
    p.send_signal(signal.SIGINT)
    end(p)
    assert p.returncode == 130 and not (tmp_path / "t.json").exists()
    assert time.monotonic() - began < 1  # 0.2 s on a machine that has nothing else to do


@pytest.fixture(scope="module")
def many_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 million different words: tables of a gigabyte, whose sorting takes seconds."""
    words = np.random.default_rng(1).integers(97, 123, size=(13_600_000, 10), dtype=np.uint8)
    words[:, 0] = ord(" ")
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_bytes(words.tobytes())
    return path


KEPT = ["--checkpoint", "run.ck"]


@pytest.mark.alone
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(KEPT, marks=pytest.mark.slow),
        pytest.param([*KEPT, "--max-memory", "400MB"], marks=pytest.mark.slow),
        [],
    ],
)
def test_ctrl_c_among_many_words(many_words: Path, tmp_path: Path, more: list[str]) -> None:
    """While tables grow, and while a checkpoint is sorted and written, which is given up for the one before."""
    line = [*LINE, str(many_words), "--vocab-size", "1000", "--min-frequency", "2"]
    met = 0
    for wait in (0.4, 0.7, 1.2, 2.0, 3.0):
        p = subprocess.Popen([*line, "--out", "t.json", *more], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        time.sleep(wait)
        if p.poll() is not None:  # it was quick
            end(p)
            (tmp_path / "t.json").unlink()
            continue
        began = time.monotonic()
        p.send_signal(signal.SIGINT)
        end(p)
        assert time.monotonic() - began < 1  # at most 0.2 s on a machine that has nothing else to do
        assert p.returncode == 130 and not (tmp_path / "t.json").exists()
        assert not list(tmp_path.glob("*.partial"))
        met += 1
    assert met
    for out, flags in (("t.json", more), ("whole.json", [])):
        subprocess.run([*line, "--out", out, *flags], cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "t.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.json", "whole.json"]
