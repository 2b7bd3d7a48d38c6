"""A tokenizer in other processes: pickled, copied, forked after use, in torch's and Hugging Face's workers."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import bytekiln
from bytekiln import Tokenizer

EOT = "<|endoftext|>"
TEXTS = [f"the kiln {i} isn't warm {EOT} naïve 日本 {'clay ' * (i % 7)}" for i in range(40)]


def plain() -> Tokenizer:
    return bytekiln.train_bpe_from_iterator(TEXTS, vocab_size=330, special_tokens=[EOT, "<|pad|>"])


def odd_ranks() -> Tokenizer:
    """A token that ends as three parts: no list of merges, so no tokenizer.json, says this."""
    ranks = {bytes([b]): b for b in range(256)}
    for token in (b"ab", b"bc", b"abc", b"cd", b"abcd", b"xyz"):
        ranks[token] = len(ranks)
    return Tokenizer.from_ranks(ranks, pattern=r"\S+|\s+", special_tokens={EOT: 300, "<|b|>": 264})


def free_ids() -> Tokenizer:
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257}
    return Tokenizer.from_ranks(ranks, pattern="o200k", special_tokens={EOT: 259, "<|b|>": 270})


def specials_first() -> Tokenizer:
    vocab = {0: EOT.encode()} | {i + 1: bytes([i]) for i in range(256)}
    return Tokenizer.from_vocab_and_merges(vocab | {257: b"th"}, [(b"t", b"h")], pattern=r"\w+|\W")


@pytest.mark.parametrize("make", [plain, odd_ranks, free_ids, specials_first])
def test_every_tokenizer_pickles_and_copies(make: object) -> None:
    ours = make()
    text = f"the abcd abc xyz naïve 日本 {EOT}<|b|>"
    ids = ours.encode(text, allowed_special="all")
    made = [pickle.loads(pickle.dumps(ours, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*made, copy.copy(ours), copy.deepcopy(ours)):
        assert other == ours and hash(other) == hash(ours) and other.hash == ours.hash
        assert other.encode(text, allowed_special="all") == ids
        assert (other.vocab, other.merges, other.special_tokens) == (ours.vocab, ours.merges, ours.special_tokens)
        assert (other.pattern, other.eot_id, other.n_vocab) == (ours.pattern, ours.eot_id, ours.n_vocab)
    # Hugging Face's caches tell functions apart by the pickle of what they hold.
    assert pickle.dumps(ours) == pickle.dumps(pickle.loads(pickle.dumps(ours)))


def test_spawned_workers(tmp_path: Path) -> None:
    ours = plain()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(ours.encode, TEXTS) == [ours.encode(text) for text in TEXTS]


def in_a_process(code: str, *arguments: object, timeout: float = 120) -> str:
    """Forks in a process of their own: pytest's has threads, of which Python warns."""
    env = {**os.environ, "PYTHONPATH": str(Path(bytekiln.__file__).parent.parent), "PYTHONWARNINGS": "ignore"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BEGIN = f"""
import json, os, sys
import bytekiln
EOT = {EOT!r}
TEXTS = {TEXTS!r}
k = bytekiln.train_bpe_from_iterator(TEXTS, vocab_size=330, special_tokens=[EOT, "<|pad|>"])
expected = [k.encode(text, allowed_special="all") for text in TEXTS]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use() -> None:
    """Used with threads, then forked, again and again; the children use the object of before the fork."""
    code = (
        BEGIN
        + """
assert k.encode_batch(TEXTS * 200, allowed_special="all", threads=2) == expected * 200
stream = k.encode_iter(TEXTS, allowed_special="all")
first = next(stream)
for _ in range(20):
    child = os.fork()
    if child == 0:
        good = [k.encode(text, allowed_special="all") for text in TEXTS] == expected
        good &= k.encode_batch(TEXTS * 200, allowed_special="all", threads=2) == expected * 200
        good &= k.decode(expected[3]) == TEXTS[3]
        good &= [first, *stream] == k.encode("".join(TEXTS), allowed_special="all")
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [k.encode(text, allowed_special="all") for text in TEXTS] == expected
print("good")
"""
    )
    assert in_a_process(code) == "good\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_other_threads_encode() -> None:
    """What a thread holds at the moment of a fork, nobody gives back in the child: no encoder may wait for it."""
    code = (
        BEGIN
        + """
import signal, threading
long = "".join(TEXTS) * 10
def work():
    while True:
        k.encode(long)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
for _ in range(1500):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if k.encode(TEXTS[0], allowed_special="all") == expected[0] else 1)
    assert os.waitpid(child, 0)[1] == 0
print("good", flush=True)
os._exit(0)
"""
    )
    assert in_a_process(code) == "good\n"


@pytest.mark.skipif(sys.platform != "linux", reason="threads as Linux lists them")
def test_a_small_text_starts_no_thread() -> None:
    """None stays, and none comes and goes: the system's last number of a process or thread stays what it was."""
    code = (
        BEGIN
        + """
import threading
from pathlib import Path
def quiet(call):
    def last():
        return Path("/proc/loadavg").read_text().split()[-1]
    for _ in range(5000):  # others make processes meanwhile
        before = last()
        call()
        if last() == before:
            return True
def a_thread():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
import numpy  # has threads of its own
before = len(list(Path("/proc/self/task").iterdir()))
text = "".join(TEXTS)[:300] * 30
for name, call in {
    "encode": lambda: k.encode(text),
    "special": lambda: k.encode(text, allowed_special="all"),
    "numpy": lambda: k.encode_to_numpy(text),
    "batch": lambda: k.encode_batch([text[:300]] * 4),
    "offsets": lambda: k.encode_with_offsets(text),
    "iter": lambda: list(k.encode_iter([text, text])),
    "bytes": lambda: k.decode(k.encode_bytes(text.encode())),
}.items():
    assert quiet(call), name
assert len(list(Path("/proc/self/task").iterdir())) == before
assert not quiet(a_thread), "the check itself"
print("good")
"""
    )
    assert in_a_process(code) == "good\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_training_before_and_after_a_fork() -> None:
    code = (
        BEGIN
        + """
import multiprocessing, pathlib, tempfile
text = pathlib.Path(tempfile.mkdtemp()) / "t.txt"
text.write_text("".join(TEXTS) * 500, encoding="utf-8")
def train(threads):
    return bytekiln.train_bpe(text, vocab_size=330, threads=threads).hash
before = train(2)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(train, [1, 2, 2]) == [before] * 3
    assert pool.map(k.encode_ordinary, TEXTS) == [k.encode_ordinary(text) for text in TEXTS]
print("good")
"""
    )
    assert in_a_process(code) == "good\n"


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_torchs_data_loader(start: str, tmp_path: Path) -> None:
    """In the data set and in the function that makes batches, with two workers."""
    script = tmp_path / "load.py"
    script.write_text(
        BEGIN
        + """
from torch.utils.data import DataLoader, Dataset
class Encoded(Dataset):
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
    def __len__(self):
        return len(TEXTS)
    def __getitem__(self, index):
        return self.tokenizer.encode(TEXTS[index], allowed_special="all")
class Collate:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
    def __call__(self, batch):
        return batch, [self.tokenizer.decode(ids) for ids in batch]
if __name__ == "__main__":
    loader = DataLoader(
        Encoded(k), batch_size=8, num_workers=2, collate_fn=Collate(k), multiprocessing_context=sys.argv[1]
    )
    for _ in range(2):
        ids, texts = [], []
        for batch in loader:
            ids += batch[0]
            texts += batch[1]
        assert ids == expected and texts == TEXTS
    print("good")
""",
        encoding="utf-8",
    )
    env = {**os.environ, "PYTHONPATH": str(Path(bytekiln.__file__).parent.parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, script, start], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.endswith("good\n"), done.stderr


def test_hugging_faces_map_with_two_processes(tmp_path: Path) -> None:
    """And its cache finds what the same tokenizer, pickled and back, has made."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    code = (
        BEGIN
        + """
import pickle
import datasets
datasets.disable_progress_bars()
table = datasets.Dataset.from_dict({"text": TEXTS})
table.save_to_disk(sys.argv[1])
def encoded(tokenizer):
    def encode(row):
        return {"ids": tokenizer.encode(row["text"], allowed_special="all")}
    return datasets.load_from_disk(sys.argv[1]).map(encode, num_proc=2)
made = encoded(k)
assert made["ids"][:] == expected, made["ids"][:2]
again = encoded(pickle.loads(pickle.dumps(k)))
print(json.dumps([made._fingerprint == again._fingerprint, len(made)]))
"""
    )
    said = in_a_process(code, tmp_path / "table", timeout=200)
    assert json.loads(said.splitlines()[-1]) == [True, len(TEXTS)]
