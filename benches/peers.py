"""bytekiln beside its peers: training, encoding, file to token file; a language model's step (`peers_lm`).

    peers.py train|encode|file|encode-cl100k|encode-own|piece|load|short|decode|decode-text|all
             [--quick] [--threads 1] [--rounds 5] [--only NAME…] [--text FILE] [--vocab-size N]
    peers.py lm [--help]

Every run is a fresh process. The contestants take turns, so that a slow minute of the machine hits all of
them, and the order turns round each time. Reported are medians and minima over the rounds: of the whole
process (start, imports and loading included; `contestants.py` imports nothing that its contestant does not ask
for) and of the work alone as the process measures it, imports excluded; the peak memory, and what of it lies above
that after the imports; the ratios to bytekiln of both medians. Digests of the results tell which contestants agree.
With `--threads 1` a process has one processor: some contestants start threads whatever they are told.

Text: the books of ../shared/data (64 MB) with GPT-2's vocabulary from there, or `--text`. A peer that is
not installed is a line, not a failure (`make bench` installs the extra [bench]).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import lzma
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from contestants import CONTESTS, EOT, VOCAB_SIZE, Job
from contestants_encode import OWN

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bytekiln" / "bench"
QUICK_BYTES = 8_000_000
PIECE_BYTES = 10_000_000
ALONE = ("piece", "load", "short")
"""Contests that have no use for threads."""


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


def texts_of(contest: str, text: Path, cache: Path, *, given: bool) -> list[Path]:
    """What a contest reads; made once."""
    if contest == "piece" and not given:
        return pieces(text, cache)
    if contest == "encode-own":
        if not given:
            text = cache / "tinystories.txt"
            if not text.exists():
                text.write_bytes(lzma.decompress((SHARED / "tinystories" / "tinystories_train.txt.xz").read_bytes()))
        import bytekiln

        own = bytekiln.train_bpe(text, vocab_size=10_000, special_tokens=[EOT])
        own.save(cache / OWN, overwrite=True)
    return [text]


def pieces(text: Path, cache: Path) -> list[Path]:
    """Texts of 10 MB without a border between words."""
    import base64

    import numpy as np

    rng, size, made = np.random.default_rng(0), PIECE_BYTES, []
    kinds: dict[str, Callable[[], bytes]] = {
        "words": lambda: _letters_of(text, size),
        "letters": lambda: rng.integers(97, 123, size=size, dtype=np.uint8).tobytes(),
        "digits": lambda: rng.integers(48, 58, size=size, dtype=np.uint8).tobytes(),
        "a": lambda: b"a" * size,
        "spaces": lambda: b" " * size,
        "newlines": lambda: b"\n" * size,
        "base64": lambda: base64.b64encode(rng.bytes(size))[:size],
        "cjk": lambda: "".join(map(chr, rng.integers(0x4E00, 0x9FA6, size=size // 3))).encode(),
    }
    for kind, make in kinds.items():
        made.append(cache / f"piece-{kind}.txt")
        if not made[-1].exists():
            made[-1].write_bytes(make())
    return made


def _letters_of(text: Path, size: int) -> bytes:
    """The letters of a text, one behind the other."""
    import re

    return re.sub(rb"[^A-Za-z]", b"", text.read_bytes()[: 2 * size])[:size]


@dataclass
class Runs:
    """What the rounds of one contestant gave."""

    whole_s: list[float] = field(default_factory=list)
    work_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    above_bytes: int = 0
    """Greatest memory less that after the imports."""
    check: str = ""


def one_run(contest: str, name: str, job: Job, *, check: bool) -> tuple[float, float, int, int, str] | str:
    """(whole process s, work s, peak bytes, the same after the imports, digest), or why there is none."""
    Path(job.out).unlink(missing_ok=True)
    env = {**os.environ, "RAYON_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": str(job.threads > 1).lower()}
    env |= {"PEERS_CHECK": "1"} if check else {}
    # As for whoever installs a package: modules are compiled once, in the round that does not count.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    program = Path(__file__).with_name("contestants.py")
    args = [contest, name, job.text, str(job.threads), job.out, job.cache]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, program, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as p:
        out, err = p.communicate()
    seconds = time.perf_counter() - start
    if p.returncode:
        return err.strip().splitlines()[-1][:100] if err.strip() else f"exit status {p.returncode}"
    work, peak, base, digest = (out.splitlines()[-1] + " ").split(" ", 3)
    return seconds, float(work), int(peak), int(float(base)), digest.strip()


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
                runs[name].check = found[4]
            else:
                runs[name].whole_s.append(found[0])
                runs[name].work_s.append(found[1])
                runs[name].peak_bytes = max(runs[name].peak_bytes, found[2])
                runs[name].above_bytes = max(runs[name].above_bytes, found[2] - found[3])
    return runs


def report(contest: str, job: Job, runs: dict[str, Runs]) -> None:
    """Print a Markdown table."""
    ours = runs.get("bytekiln")
    size = Path(job.text).stat().st_size / 1e6
    what = f", {VOCAB_SIZE:,} tokens" if contest == "train" else ""
    print(f"\n{contest}: {Path(job.text).name}, {size:.1f} MB{what}, threads: {job.threads}\n")
    print(
        "| contestant | process, s (median / min) | work, s (median / min) | MB/s | peak (above imports), MB ", end=""
    )
    print("| × bytekiln: process / work | result |")
    print("|---|---|---|---|---|---|---|")
    for name, r in sorted(runs.items(), key=lambda item: statistics.median(item[1].whole_s)):
        version = importlib.metadata.version(CONTESTS[contest][name][0])
        whole, work = statistics.median(r.whole_s), statistics.median(r.work_s)
        ratio = "–"
        if ours:
            ratio = f"{whole / statistics.median(ours.whole_s):.2f} / {work / statistics.median(ours.work_s):.2f}"
        print(
            f"| {name} {version} | {whole:.3f} / {min(r.whole_s):.3f} | {work:.3f} / {min(r.work_s):.3f} "
            f"| {size / work:.1f} | {r.peak_bytes / 1e6:.0f} ({r.above_bytes / 1e6:.0f}) | {ratio} | {r.check} |"
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
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, metavar="N", help="of training (default: 32000)")
    args = parser.parse_args()
    if args.vocab_size != VOCAB_SIZE:  # the contestants read it from there, in this process too
        os.environ["PEERS_VOCAB_SIZE"] = str(args.vocab_size)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    prepared = prepare(args.text, QUICK_BYTES if args.quick else None)
    if prepared is None:
        print("peers: ../shared/data is not beside the repository; nothing to measure on")
        return 0
    text, cache = prepared
    for contest in CONTESTS if args.contest == "all" else [args.contest]:
        for threads in dict.fromkeys([1] if contest in ALONE else args.threads):
            for file in texts_of(contest, text, cache, given=args.text is not None):
                job = Job(str(file), threads, str(cache / "out.bin"), str(cache))
                runs = hold(contest, job, args.rounds or (2 if args.quick else 5), args.only)
                if runs:
                    report(contest, job, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
