"""What tests of `bpe-encode` share: a corpus of several kinds of files, and a run that is killed at a moment."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

EOT = "<|endoftext|>"
WORDS = ["the", " kiln", " is", " warm", "\n", "  ", "don't", " potter's", EOT, " 12", "日本", " clay", EOT[:5], "\n\n"]


def write_corpus(folder: Path, size: int, seed: int = 0, times: int = 1) -> list[Path]:
    """Texts with and without documents, records, packed text: `size` words each, the first two some times over."""
    dice = random.Random(seed)

    def words() -> str:
        return "".join(dice.choices(WORDS, k=size))

    made = [folder / name for name in ("a.txt", "b.txt", "c.jsonl", "d.txt.gz")]
    made[0].write_text(words() * times, encoding="utf-8")
    made[1].write_text(words().replace(EOT, "") * times, encoding="utf-8")
    with made[2].open("w", encoding="utf-8") as file:
        for _ in range(max(size // 50, 1)):
            text = "".join(dice.choices(WORDS, k=dice.choice([0, 10, 100])))
            file.write(json.dumps({"text": text}) + "\n")
    with gzip.open(made[3], "wt", encoding="utf-8", compresslevel=1) as file:
        file.write(words())
    return made


def write_texts(folder: Path, texts: list[str], records: bool) -> list[Path]:
    """A file a text; the last one as records, a line each, where that is asked for."""
    made = []
    for n, text in enumerate(texts):
        as_records = records and n == len(texts) - 1
        path = folder / (f"{n}.jsonl" if as_records else f"{n}.txt")
        lines = "".join(json.dumps({"text": line}) + "\n" for line in text.split("\n"))
        path.write_text(lines if as_records else text, encoding="utf-8")
        made.append(path)
    return made


def files_of(folder: Path, out: str) -> dict[str, bytes]:
    """All files that an output has, by name; states, locks and unfinished ones too."""
    stem = Path(out).stem
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.lstrip(".").startswith(stem)}


CODE = """
import sys, json
from bytekiln import Tokenizer, _core
def most():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
arguments = json.loads(sys.argv[1])
tokenizer = Tokenizer.from_file(arguments.pop("tokenizer"))
before = most()
made, resumed = _core.encode_files(tokenizer, arguments.pop("inputs"), arguments.pop("out"), **arguments)
print(resumed, most() - before)
"""
"""Says how many ids were there already, and by how many KiB the process has grown."""


def start(folder: Path, **arguments: object) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    line = [sys.executable, "-c", CODE, json.dumps(arguments)]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_and_go_on(folder: Path, moments: int, seconds: float, seed: int, **arguments: object) -> tuple[int, int]:
    """Kill a run at so many moments, each time further or at its end; then let it finish.

    Returns how many runs went on with what another one had left, and how many began anew.
    """
    dice = random.Random(seed)
    went_on = began = killed = 0
    while True:
        run = start(folder, **arguments)
        if killed < moments:
            # Behind the start of Python, which is no moment of the run.
            deadline = time.monotonic() + 20
            stem = Path(str(arguments["out"])).stem
            while run.poll() is None and not any(folder.glob(f".{stem}*")) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(dice.uniform(0, seconds))
            run.send_signal(signal.SIGKILL)
            killed += 1
        said, trouble = run.communicate(timeout=120)
        # Killed between its last rename and its end, a run has done everything.
        over = "OutputExistsError" in trouble
        if run.returncode == 0 or over:
            resumed = 0 if over else int(said.split()[0])
            went_on += resumed > 0
            began += resumed == 0
            if killed >= moments:
                return went_on, began
            for path in folder.iterdir():
                if path.name.lstrip(".").startswith(Path(str(arguments["out"])).stem):
                    path.unlink()
        else:
            assert run.returncode == -signal.SIGKILL, trouble
