"""What the contestants of `peers.py` do, each alone in a process of its own.

    contestants.py CONTEST CONTESTANT TEXT THREADS OUT CACHE

Imports stand inside of the functions: what a contestant does not need is not counted against it. A child prints one
line: seconds of the work, bytes of the greatest memory, and (with PEERS_CHECK set) what the results are compared by.
"""

from __future__ import annotations

# ruff: noqa: PTH123 - loading pathlib would be counted
import os
import sys
import time

TYPE_CHECKING = False  # loading `typing` would be counted
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Work = Callable[["Job"], Any]

EOT = "<|endoftext|>"
VOCAB_SIZE = int(os.environ.get("PEERS_VOCAB_SIZE", "32000"))


class Job:
    """What a contestant gets: paths of the text, of the output and of the folder with GPT-2's vocabulary."""

    def __init__(self, text: str, threads: int, out: str, cache: str) -> None:
        self.text, self.threads, self.out, self.cache = text, threads, out, cache

    def read(self) -> str:
        """The whole text."""
        with open(self.text, "rb") as f:
            return f.read().decode()


CONTESTS: dict[str, dict[str, tuple[str, Work]]] = {"train": {}, "encode": {}, "file": {}}
"""contest → contestant → (package, work)"""


def contestant(contest: str, name: str, package: str | None = None) -> Callable[[Work], Work]:
    """Enter a function; it returns what its result is compared by."""

    def enter(work: Work) -> Work:
        CONTESTS[contest][name] = (package or name, work)
        return work

    return enter


def digest(ids: Iterable[int] | Any) -> str:
    """Of token ids, whatever holds them. Repeated end-of-text ids count once (gigatoken drops empty documents)."""
    import hashlib

    import numpy as np

    a = np.asarray(ids).astype(np.uint16)
    repeated = np.zeros(len(a), dtype=bool)
    repeated[1:] = (a[1:] == 50256) & (a[:-1] == 50256)
    return f"{hashlib.blake2b(a[~repeated].tobytes(), digest_size=4).hexdigest()}"


def digest_merges(merges: Iterable[tuple[bytes, bytes]]) -> str:
    """Of a list of merges: in their order, and as a set."""
    import hashlib

    lines = [a.hex() + " " + b.hex() for a, b in merges]
    short = [hashlib.blake2b("\n".join(x).encode(), digest_size=4).hexdigest() for x in (lines, sorted(lines))]
    return f"{len(lines)} merges {short[0]}, as a set {short[1]}"


# --- training: file → vocabulary ---------------------------------------------------------------------------


@contestant("train", "bytekiln")
def _(job: Job) -> Any:
    import bytekiln

    imported()
    t = bytekiln.train_bpe(job.text, vocab_size=VOCAB_SIZE, special_tokens=[EOT], threads=job.threads)
    t.save(job.out, overwrite=True)
    return lambda: digest_merges(t.merges)


@contestant("train", "bytekiln, Hugging Face's ties", "bytekiln")
def _(job: Job) -> Any:
    import bytekiln

    imported()
    t = bytekiln.train_bpe(
        job.text, vocab_size=VOCAB_SIZE, special_tokens=[EOT], threads=job.threads, tie_break="huggingface"
    )
    t.save(job.out, overwrite=True)
    return lambda: digest_merges(t.merges)


@contestant("train", "gigatoken")
def _(job: Job) -> Any:
    import gigatoken

    imported()
    _, merges = gigatoken.train_bpe(job.text, VOCAB_SIZE, [EOT], separator=EOT.encode())  # has no way to save them
    return lambda: digest_merges(merges)


@contestant("train", "gigabpe")
def _(job: Job) -> Any:
    import gigabpe

    imported()
    gigabpe.train_tokenizer(
        [job.text], VOCAB_SIZE, job.out, special_tokens=[EOT], pretokenizer="bytelevel", threads=job.threads
    )
    return lambda: digest_merges(saved_merges(job.out))


@contestant("train", "rustbpe")
def _(job: Job) -> Any:
    import rustbpe

    imported()
    t = rustbpe.Tokenizer()
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    documents = (d for d in job.read().split(EOT) if d)
    t.train_from_iterator(documents, VOCAB_SIZE - 1, pattern=gpt2)
    return lambda: f"{t.vocab_size - 256} merges"


@contestant("train", "Hugging Face", "tokenizers")
def _(job: Job) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    imported()
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    documents = (d for d in job.read().split(EOT) if d)
    t.train_from_iterator(documents, trainer)
    t.save(job.out)
    return lambda: digest_merges(saved_merges(job.out))


def saved_merges(path: str) -> list[tuple[bytes, bytes]]:
    """The merges of a Hugging Face file, each an array of two or a text with a blank between."""
    import json

    with open(path, encoding="utf-8") as f:
        merges = json.load(f)["model"]["merges"]
    pairs = (m.split(" ") if isinstance(m, str) else m for m in merges)
    return unicode_to_bytes((a, b) for a, b in pairs)


def unicode_to_bytes(merges: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """From GPT-2's printable characters for bytes back to bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in shown}
    table.update((chr(256 + i), b) for i, b in enumerate(b for b in range(256) if b not in shown))
    return [(bytes(table[c] for c in a), bytes(table[c] for c in b)) for a, b in merges]


# --- encoding: text in memory → ids in memory ----------------------------------------------------------------


@contestant("encode", "bytekiln")
def _(job: Job) -> Any:
    import numpy as np

    np.zeros(1)  # loaded as it is for the others
    t, text = bytekiln_gpt2(job), job.read().encode()
    return timed(lambda: t.encode_to_numpy(text, allowed_special="all", threads=job.threads))


@contestant("encode", "tiktoken")
def _(job: Job) -> Any:
    t = tiktoken_gpt2(job)
    text = job.read()
    return timed(lambda: t.encode_to_numpy(text, allowed_special="all"))


@contestant("encode", "gigatoken")
def _(job: Job) -> Any:
    import gigatoken

    t = gigatoken.Tokenizer(f"{job.cache}/gpt2.json")
    source = gigatoken.BytesSource([job.read().encode()], separator=EOT)
    return timed(lambda: t.encode_batch(source, parallel=job.threads > 1), with_eot)


@contestant("encode", "gigatoken, after a tiny call", "gigatoken")
def _(job: Job) -> Any:
    import gigatoken

    t = gigatoken.Tokenizer(f"{job.cache}/gpt2.json")
    source = gigatoken.BytesSource([job.read().encode()], separator=EOT)
    t.encode_batch(gigatoken.BytesSource([b"hello world"], separator=EOT), parallel=job.threads > 1)
    return timed(lambda: t.encode_batch(source, parallel=job.threads > 1), with_eot)


@contestant("encode", "tokie")
def _(job: Job) -> Any:
    import tokie

    t = tokie.Tokenizer.from_json(f"{job.cache}/gpt2.json")
    documents = [d for d in job.read().split(EOT) if d]
    return timed(lambda: t.encode_batch_flat(documents, False), lambda r: insert_eot(r[0], r[1]))


@contestant("encode", "Hugging Face", "tokenizers")
def _(job: Job) -> Any:
    from tokenizers import Tokenizer

    t = Tokenizer.from_file(f"{job.cache}/gpt2.json")
    documents = [d + EOT for d in job.read().split(EOT)[:-1]]
    return timed(lambda: t.encode_batch_fast(documents), lambda batch: [i for e in batch for i in e.ids])


# --- file → uint16 file --------------------------------------------------------------------------------------


@contestant("file", "bytekiln")
def _(job: Job) -> Any:
    import bytekiln

    bytekiln.encode_files(bytekiln_gpt2(job), job.text, job.out, threads=job.threads, overwrite=True)


@contestant("file", "tiktoken + numpy", "tiktoken")
def _(job: Job) -> Any:
    import numpy as np

    t = tiktoken_gpt2(job)
    ids = t.encode_to_numpy(job.read(), allowed_special="all")
    ids.astype(np.uint16).tofile(job.out)


@contestant("file", "gigatoken + numpy", "gigatoken")
def _(job: Job) -> Any:
    import gigatoken
    import numpy as np

    t = gigatoken.Tokenizer(f"{job.cache}/gpt2.json")
    source = gigatoken.TextFileSource([job.text], separator=EOT)
    with_eot(t.encode_files(source, parallel=job.threads > 1)).astype(np.uint16).tofile(job.out)


@contestant("file", "tokie + numpy", "tokie")
def _(job: Job) -> Any:
    import numpy as np
    import tokie

    t = tokie.Tokenizer.from_json(f"{job.cache}/gpt2.json")
    ids, offsets = t.encode_files([job.text], separator=EOT.encode())
    insert_eot(ids, np.diff(offsets)).astype(np.uint16).tofile(job.out)


@contestant("file", "Hugging Face + numpy", "tokenizers")
def _(job: Job) -> Any:
    import numpy as np
    from tokenizers import Tokenizer

    t = Tokenizer.from_file(f"{job.cache}/gpt2.json")
    documents = [d + EOT for d in job.read().split(EOT)[:-1]]
    np.concatenate([np.array(e.ids, dtype=np.uint16) for e in t.encode_batch_fast(documents)]).tofile(job.out)


# --- the tokenizers -------------------------------------------------------------------------------------------


def bytekiln_gpt2(job: Job) -> Any:
    """GPT-2's tokenizer in our native format."""
    import bytekiln

    return bytekiln.Tokenizer.from_file(f"{job.cache}/gpt2.json")


def tiktoken_gpt2(job: Job) -> Any:
    """tiktoken's own `gpt2`, offline: its cache holds a file under the hash of its address."""
    import hashlib
    import inspect
    import re
    from pathlib import Path

    import tiktoken
    import tiktoken_ext.openai_public as public

    os.environ["TIKTOKEN_CACHE_DIR"] = job.cache
    for address in re.findall(r'"(http\S+)"', inspect.getsource(public.gpt2)):
        kept = Path(job.cache, hashlib.sha1(address.encode()).hexdigest())
        if not kept.exists():
            kept.write_bytes(Path(job.cache, address.rpartition("/")[2]).read_bytes())
    return tiktoken.get_encoding("gpt2")


def insert_eot(ids: Any, lengths: Any) -> Any:
    """Flat ids with an end-of-text id after each document."""
    import numpy as np

    return np.insert(ids, np.cumsum(np.asarray(lengths, dtype=np.int64)), 50256)


def with_eot(batch: Any) -> Any:
    """The same of gigatoken's ragged array."""
    import awkward as ak

    return insert_eot(ak.flatten(batch).to_numpy(), ak.num(batch).to_numpy())


class Timed:
    """A result and how long its making took, loading apart."""

    def __init__(self, result: Any, seconds: float) -> None:
        self.result, self.seconds = result, seconds


def timed(work: Callable[[], Any], after: Callable[[Any], Any] = lambda x: x) -> Timed:
    """Time `work`; `after` brings its result into a comparable form and is not counted."""
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return Timed(after(result), seconds)


def peak_bytes() -> int:
    """The most memory that this process has held; on Linux of it alone, whatever its parent held before the start."""
    import resource

    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


MARK: dict[str, float] = {}


def imported() -> None:
    """A contestant calls this between its imports and its work: what came before is counted apart."""
    MARK["base"] = peak_bytes()
    MARK["start"] = time.perf_counter()


def main(contest: str, name: str, text: str, threads: str, out: str, cache: str) -> None:
    """In the fresh process: do the work, print what came of it."""
    job = Job(text, int(threads), out, cache)
    # One thread is one processor: some contestants read or count on a thread of their own whatever they are told.
    if job.threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    imported()
    result = CONTESTS[contest][name][1](job)
    seconds = time.perf_counter() - MARK["start"]
    peak = peak_bytes()
    check = ""
    if os.environ.get("PEERS_CHECK"):
        if contest == "file":
            import numpy as np

            result = np.fromfile(job.out, dtype=np.uint16)
        of = DIGESTS.get(contest, digest)
        check = result() if callable(result) else of(result.result if isinstance(result, Timed) else result)
    seconds = result.seconds if isinstance(result, Timed) else seconds
    print(seconds, peak, MARK["base"], check)


DIGESTS: dict[str, Callable[[Any], str]] = {}
OTHERS = ("encode-cl100k", "encode-own", "piece", "load", "short", "decode", "decode-text")
if __name__ != "__main__" or sys.argv[1] in OTHERS:
    import contestants_encode

    CONTESTS.update((contest, {}) for contest in OTHERS)
    contestants_encode.enter(contestant, timed, DIGESTS)

if __name__ == "__main__":
    main(*sys.argv[1:])
