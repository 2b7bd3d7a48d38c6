"""bytekiln beside its peers: training, encoding, file to token file; a language model's step (`peers_lm`).

    peers.py train|encode|file|all [--quick] [--threads 1] [--rounds 5] [--only NAME…] [--text FILE]
    peers.py lm [--help]

Every run is a fresh process. The contestants take turns, so that a slow minute of the machine hits all of
them, and the order turns round each time. Reported are medians and minima over the rounds: of the whole
process (start, imports and loading included) and of the work alone as the process measures it; the peak
memory; the ratio to bytekiln's whole-process median. Digests of the results tell which contestants agree.

Text: the books of ../shared/data (64 MB) with GPT-2's vocabulary from there, or `--text`. A peer that is
not installed is a line, not a failure (`make bench` installs the extra [bench]).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import lzma
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bytekiln" / "bench"
EOT = "<|endoftext|>"
VOCAB_SIZE = 32_000
QUICK_BYTES = 8_000_000


@dataclass(frozen=True)
class Job:
    """What a contestant gets."""

    text: Path
    threads: int
    out: Path
    cache: Path


Work = Callable[[Job], Any]
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
    import numpy as np

    a = np.asarray(ids).astype(np.uint16)
    repeated = np.zeros(len(a), dtype=bool)
    repeated[1:] = (a[1:] == 50256) & (a[:-1] == 50256)
    return f"{hashlib.blake2b(a[~repeated].tobytes(), digest_size=4).hexdigest()}"


def digest_merges(merges: Iterable[tuple[bytes, bytes]]) -> str:
    """Of a list of merges: in their order, and as a set."""
    lines = [a.hex() + " " + b.hex() for a, b in merges]
    short = [hashlib.blake2b("\n".join(x).encode(), digest_size=4).hexdigest() for x in (lines, sorted(lines))]
    return f"{len(lines)} merges {short[0]}, as a set {short[1]}"


# --- training: file → vocabulary ---------------------------------------------------------------------------


@contestant("train", "bytekiln")
def _(job: Job) -> Any:
    import bytekiln

    t = bytekiln.train_bpe(job.text, vocab_size=VOCAB_SIZE, special_tokens=[EOT], threads=job.threads)
    return lambda: digest_merges(t.merges)


@contestant("train", "bytekiln, Hugging Face's ties", "bytekiln")
def _(job: Job) -> Any:
    import bytekiln

    t = bytekiln.train_bpe(
        job.text, vocab_size=VOCAB_SIZE, special_tokens=[EOT], threads=job.threads, tie_break="huggingface"
    )
    return lambda: digest_merges(t.merges)


@contestant("train", "gigatoken")
def _(job: Job) -> Any:
    import gigatoken

    _, merges = gigatoken.train_bpe(str(job.text), VOCAB_SIZE, [EOT], separator=EOT.encode())
    return lambda: digest_merges(merges)


@contestant("train", "gigabpe")
def _(job: Job) -> Any:
    import gigabpe

    _, merges = gigabpe.train_bpe(
        [str(job.text)], VOCAB_SIZE, special_tokens=[EOT], pretokenizer="bytelevel", threads=job.threads
    )
    return lambda: digest_merges(unicode_to_bytes(merges))


@contestant("train", "rustbpe")
def _(job: Job) -> Any:
    import rustbpe

    t = rustbpe.Tokenizer()
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    documents = (d for d in job.text.read_bytes().decode().split(EOT) if d)
    t.train_from_iterator(documents, VOCAB_SIZE - 1, pattern=gpt2)
    return lambda: f"{t.vocab_size - 256} merges"


@contestant("train", "Hugging Face", "tokenizers")
def _(job: Job) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    documents = (d for d in job.text.read_bytes().decode().split(EOT) if d)
    t.train_from_iterator(documents, trainer)
    return lambda: digest_merges(unicode_to_bytes(map(tuple, json.loads(t.to_str())["model"]["merges"])))


def unicode_to_bytes(merges: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """From GPT-2's printable characters for bytes back to bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in shown}
    table.update((chr(256 + i), b) for i, b in enumerate(b for b in range(256) if b not in shown))
    return [(bytes(table[c] for c in a), bytes(table[c] for c in b)) for a, b in merges]


# --- encoding: text in memory → ids in memory ----------------------------------------------------------------


@contestant("encode", "bytekiln")
def _(job: Job) -> Any:
    t = bytekiln_gpt2(job)
    text = job.text.read_bytes().decode()
    return timed(lambda: t.encode_to_numpy(text, allowed_special="all"))


@contestant("encode", "tiktoken")
def _(job: Job) -> Any:
    t = tiktoken_gpt2(job)
    text = job.text.read_bytes().decode()
    return timed(lambda: t.encode_to_numpy(text, allowed_special="all"))


@contestant("encode", "gigatoken")
def _(job: Job) -> Any:
    import gigatoken

    t = gigatoken.Tokenizer(job.cache / "gpt2.json")
    source = gigatoken.BytesSource([job.text.read_bytes()], separator=EOT)
    return timed(lambda: t.encode_batch(source, parallel=job.threads > 1), with_eot)


@contestant("encode", "tokie")
def _(job: Job) -> Any:
    import tokie

    t = tokie.Tokenizer.from_json(str(job.cache / "gpt2.json"))
    documents = [d for d in job.text.read_bytes().decode().split(EOT) if d]
    return timed(lambda: t.encode_batch_flat(documents, False), lambda r: insert_eot(r[0], r[1]))


@contestant("encode", "Hugging Face", "tokenizers")
def _(job: Job) -> Any:
    from tokenizers import Tokenizer

    t = Tokenizer.from_file(str(job.cache / "gpt2.json"))
    documents = [d + EOT for d in job.text.read_bytes().decode().split(EOT)[:-1]]
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
    ids = t.encode_to_numpy(job.text.read_bytes().decode(), allowed_special="all")
    ids.astype(np.uint16).tofile(job.out)


@contestant("file", "gigatoken + numpy", "gigatoken")
def _(job: Job) -> Any:
    import gigatoken
    import numpy as np

    t = gigatoken.Tokenizer(job.cache / "gpt2.json")
    source = gigatoken.TextFileSource([job.text], separator=EOT)
    with_eot(t.encode_files(source, parallel=job.threads > 1)).astype(np.uint16).tofile(job.out)


@contestant("file", "tokie + numpy", "tokie")
def _(job: Job) -> Any:
    import numpy as np
    import tokie

    t = tokie.Tokenizer.from_json(str(job.cache / "gpt2.json"))
    ids, offsets = t.encode_files([str(job.text)], separator=EOT.encode())
    insert_eot(ids, np.diff(offsets)).astype(np.uint16).tofile(job.out)


@contestant("file", "Hugging Face + numpy", "tokenizers")
def _(job: Job) -> Any:
    import numpy as np
    from tokenizers import Tokenizer

    t = Tokenizer.from_file(str(job.cache / "gpt2.json"))
    documents = [d + EOT for d in job.text.read_bytes().decode().split(EOT)[:-1]]
    np.concatenate([np.array(e.ids, dtype=np.uint16) for e in t.encode_batch_fast(documents)]).tofile(job.out)


# --- the tokenizers -------------------------------------------------------------------------------------------


def bytekiln_gpt2(job: Job) -> Any:
    """GPT-2's tokenizer in our native format."""
    import bytekiln

    return bytekiln.Tokenizer.from_file(job.cache / "gpt2.json")


def tiktoken_gpt2(job: Job) -> Any:
    """tiktoken's own `gpt2`, offline: its cache holds a file under the hash of its address."""
    import tiktoken
    import tiktoken_ext.openai_public as public

    os.environ["TIKTOKEN_CACHE_DIR"] = str(job.cache)
    for address in re.findall(r'"(http\S+)"', inspect.getsource(public.gpt2)):
        kept = job.cache / hashlib.sha1(address.encode()).hexdigest()
        if not kept.exists():
            kept.write_bytes((job.cache / address.rpartition("/")[2]).read_bytes())
    return tiktoken.get_encoding("gpt2")


def insert_eot(ids: Any, lengths: Any) -> Any:
    """Flat ids with an end-of-text id after each document."""
    import numpy as np

    return np.insert(ids, np.cumsum(np.asarray(lengths, dtype=np.int64)), 50256)


def with_eot(batch: Any) -> Any:
    """The same of gigatoken's ragged array."""
    import awkward as ak

    return insert_eot(ak.flatten(batch).to_numpy(), ak.num(batch).to_numpy())


@dataclass
class Timed:
    """A result and how long its making took, loading apart."""

    result: Any
    seconds: float


def timed(work: Callable[[], Any], after: Callable[[Any], Any] = lambda x: x) -> Timed:
    """Time `work`; `after` brings its result into a comparable form and is not counted."""
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return Timed(after(result), seconds)


# --- the contest ----------------------------------------------------------------------------------------------


def prepare(text: Path | None, limit: int | None) -> tuple[Path, Path] | None:
    """(text, folder with GPT-2's vocabulary), unpacked once; None where the shared data is absent."""
    if not SHARED.is_dir():
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in ("encoder.json", "vocab.bpe"):
        if not (CACHE / name).exists():
            (CACHE / name).write_bytes(lzma.decompress((SHARED / "gpt2" / f"{name}.xz").read_bytes()))
    if not (CACHE / "gpt2.json").exists():
        from tokenizers import AddedToken, ByteLevelBPETokenizer

        t = ByteLevelBPETokenizer(str(CACHE / "encoder.json"), str(CACHE / "vocab.bpe"))
        t.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
        t.save(str(CACHE / "gpt2.json"))
    if text is None:
        text = CACHE / f"books-{limit or 'all'}.txt"
        if not text.exists():
            with lzma.open(SHARED / "books" / "books_64mb.txt.xz") as f:
                data = f.read(limit or -1)
            text.write_bytes(data[: data.rfind(EOT.encode()) + len(EOT)])
    return text, CACHE


@dataclass
class Runs:
    """What the rounds of one contestant gave."""

    whole_s: list[float] = field(default_factory=list)
    work_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    check: str = ""


def child(contest: str, name: str, job: Job) -> None:
    """In the fresh process: do the work, print what came of it."""
    start = time.perf_counter()
    result = CONTESTS[contest][name][1](job)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if contest == "file" and os.environ.get("PEERS_CHECK"):
        import numpy as np

        result = np.fromfile(job.out, dtype=np.uint16)
    check = ""
    if os.environ.get("PEERS_CHECK"):
        check = result() if callable(result) else digest(result.result if isinstance(result, Timed) else result)
    seconds = result.seconds if isinstance(result, Timed) else seconds
    print(json.dumps({"seconds": seconds, "peak": peak, "check": check}))


def one_run(contest: str, name: str, job: Job, *, check: bool) -> tuple[float, float, int, str] | str:
    """(whole process s, work s, peak bytes, digest), or why there is none."""
    job.out.unlink(missing_ok=True)
    env = {**os.environ, "RAYON_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": str(job.threads > 1).lower()}
    env |= {"PEERS_CHECK": "1"} if check else {}
    args = json.dumps([contest, name, str(job.text), job.threads, str(job.out), str(job.cache)])
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, __file__, "--child", args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as p:
        out, err = p.communicate()
    seconds = time.perf_counter() - start
    if p.returncode:
        return err.strip().splitlines()[-1][:100] if err.strip() else f"exit status {p.returncode}"
    said = json.loads(out.splitlines()[-1])
    return seconds, said["seconds"], said["peak"], said["check"]


def hold(contest: str, job: Job, rounds: int, only: list[str]) -> dict[str, Runs]:
    """All rounds of a contest, contestants taking turns."""
    names, runs = [], {}
    for name, (package, _) in CONTESTS[contest].items():
        if only and not any(o in name for o in only):
            continue
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name}: {package} is not installed; left out")
            continue
        names.append(name)
        runs[name] = Runs()
    for i in range(-1, rounds):  # the round before the first warms the page cache and checks the results
        for name in names if i % 2 else names[::-1]:
            if name not in runs:
                continue
            found = one_run(contest, name, job, check=i < 0)
            if isinstance(found, str):
                print(f"  {name}: failed, left out: {found}")
                del runs[name]
            elif i < 0:
                runs[name].check = found[3]
            else:
                runs[name].whole_s.append(found[0])
                runs[name].work_s.append(found[1])
                runs[name].peak_bytes = max(runs[name].peak_bytes, found[2])
    return runs


def report(contest: str, job: Job, runs: dict[str, Runs]) -> None:
    """Print a Markdown table."""
    ours = statistics.median(runs["bytekiln"].whole_s) if "bytekiln" in runs else None
    megabytes = job.text.stat().st_size / 1e6
    print(f"\n{contest}: {job.text.name}, {megabytes:.1f} MB, threads: {job.threads}\n")
    print("| contestant | process, s (median / min) | work, s (median / min) | MB/s | peak MB | × bytekiln | result |")
    print("|---|---|---|---|---|---|---|")
    for name, r in sorted(runs.items(), key=lambda item: statistics.median(item[1].whole_s)):
        version = importlib.metadata.version(CONTESTS[contest][name][0])
        whole, work = statistics.median(r.whole_s), statistics.median(r.work_s)
        ratio = f"{whole / ours:.2f}" if ours else "–"
        print(
            f"| {name} {version} | {whole:.2f} / {min(r.whole_s):.2f} | {work:.2f} / {min(r.work_s):.2f} "
            f"| {megabytes / work:.1f} | {r.peak_bytes / 1e6:.0f} | {ratio} | {r.check} |"
        )


def main() -> int:
    """Command line."""
    if sys.argv[1:2] == ["lm"]:
        return int(importlib.import_module("peers_lm").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", nargs="?", default="all", choices=[*CONTESTS, "all", "lm"])
    parser.add_argument("--quick", action="store_true", help="8 MB and 2 rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        contest, name, text, threads, out, cache = json.loads(args.child)
        child(contest, name, Job(Path(text), threads, Path(out), Path(cache)))
        return 0
    prepared = prepare(args.text, QUICK_BYTES if args.quick else None)
    if prepared is None:
        print("peers: ../shared/data is not beside the repository; nothing to measure on")
        return 0
    text, cache = prepared
    for contest in CONTESTS if args.contest == "all" else [args.contest]:
        for threads in dict.fromkeys(args.threads):
            job = Job(text, threads, cache / "out.bin", cache)
            runs = hold(contest, job, args.rounds or (2 if args.quick else 5), args.only)
            if runs:
                report(contest, job, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
