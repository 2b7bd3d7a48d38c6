"""Counting and merging keep to `--max-memory`, measured in a process of their own; the merging formula is true."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHILD = """
import json, sys
from pathlib import Path
from bytekiln import Counts, _core

def held(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(what))

before = held("VmRSS")
result = {}
exec(sys.argv[1])
print(json.dumps({**result, "peak": held("VmHWM") - before}))
"""


def measured(work: str, folder: Path) -> dict[str, Any]:
    """Runs `work`, which may fill `result`, and adds the peak memory above that after the imports."""
    run = subprocess.run([sys.executable, "-c", CHILD, work], capture_output=True, text=True, cwd=folder, timeout=250)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


WORDS = 2_000_000
CAP = 32 << 20


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of two million words that occur once, some of them long, and of 5,000 that occur a few times."""
    folder = tmp_path_factory.mktemp("rare")
    with (folder / "text.txt").open("w") as f:
        for i in range(0, WORDS, 10_000):
            once = (
                f"{j * 2654435761 % 2**32:08x}".translate(LETTERS) * (2 + (j % 16 == 0)) for j in range(i, i + 10_000)
            )
            often = (f"often{(i // 10_000 * 77 + j) % 5000}" for j in range(100))
            f.write(" ".join(once) + " " + " ".join(often) + "\n")
    return folder


LETTERS = str.maketrans("0123456789", "ghijklmnop")
TABLE = 32 * (1 << 22)
"""Bytes of a table of two million words: slots of 32 bytes, at most five eighths of a power of two are full."""


@pytest.mark.parametrize("threads", [1, 2])
def test_counting_keeps_to_the_cap_where_the_table_is_four_times_it(rare: Path, threads: int) -> None:
    assert TABLE >= 4 * CAP
    options = f"threads={threads}, max_memory={CAP}"
    found = measured(
        f"""
counts = Counts.from_files("text.txt", {options}, beside="x")
result = counts.save("{threads}.counts")
result["merges"] = [[m.hex() for m in pair] for pair in counts.train(400, min_frequency=2).merges]
""",
        rare,
    )
    assert found["spilled_runs"] > 0 and found["distinct_pretokens"] > WORDS
    assert found["peak"] < 1.1 * CAP, f"{found['peak'] / CAP:.2f} of the cap"
    roomy = measured(
        f"""
counts = Counts.from_files("text.txt", threads=1)
result = counts.save("roomy{threads}.counts")
result["merges"] = [[m.hex() for m in pair] for pair in counts.train(400, min_frequency=2).merges]
""",
        rare,
    )
    assert roomy["spilled_runs"] == 0 and roomy["peak"] > 4 * CAP
    assert found["merges"] == roomy["merges"] and len(found["merges"]) == 144
    assert (rare / f"{threads}.counts").read_bytes() == (rare / f"roomy{threads}.counts").read_bytes()


def test_packed_input_whose_words_all_differ_keeps_to_the_cap(tmp_path: Path) -> None:
    """What is saved is a table and many runs."""
    text = np.random.default_rng(1).integers(97, 123, size=(5_000_000, 10), dtype=np.uint8)
    text[:, 0] = 32
    with gzip.open(tmp_path / "text.txt.gz", "wb", compresslevel=1) as packed:
        packed.write(text.tobytes())
    work = f"result = Counts.from_files('text.txt.gz', threads=2, max_memory={2 * CAP}).save('x.counts')"
    found = measured(work, tmp_path)
    assert found["spilled_runs"] > 0
    assert found["peak"] < 1.1 * 2 * CAP, f"{found['peak'] / 2 / CAP:.2f} of the cap"


def test_a_text_without_borders_that_has_no_room_is_refused(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "word.txt.gz", "wb") as packed:
        packed.write(b"a" * 200_000_000)
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "' + b"a " * 30_000_000 + b'"}\n')
    for name, said in [("word.txt.gz", "no certain border between words in 4194304"), ("line.jsonl", "longer than")]:
        found = measured(
            f"""
try: Counts.from_files(["{name}"], max_memory={CAP}, threads=2)
except Exception as error: result["said"] = str(error)
""",
            tmp_path,
        )
        assert said in found["said"] and found["said"].endswith("or a larger --max-memory"), found
        assert found["peak"] < CAP, found


@pytest.mark.parametrize("every", [0.05, 0.4])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_checkpoint_keeps_to_the_cap(rare: Path, threads: int, every: float) -> None:
    """Kept again and again while it counts, and while it merges."""
    options = f"vocab_size=400, min_frequency=2, threads={threads}, max_memory={CAP}, beside='x'"
    kept = f"{threads}-{every}.ck"
    found = measured(
        f"""
from os.path import exists
seen = set()
progress = lambda stage, *_: seen.add((stage, exists("{kept}")))
made, stats = _core.train_bpe(["text.txt"], {options}, checkpoint="{kept}", checkpoint_every={every}, progress=progress)
result = {{"runs": stats["spilled_runs"], "merges": stats["merges"], "seen": sorted(seen)}}
""",
        rare,
    )
    assert found["runs"] > 0 and found["merges"] == 144 and (rare / kept).stat().st_size > 0
    assert ["count", True] in found["seen"]  # there before all was counted
    assert found["peak"] < 1.1 * CAP, f"{found['peak'] / CAP:.2f} of the cap"


def test_adding_counts_files_keeps_to_the_cap(rare: Path) -> None:
    measured('Counts.from_files("text.txt").save("a.counts")', rare)
    found = measured(
        f"""
both = Counts.load(["a.counts"] * 9, max_memory={16 << 20})
result = both.save("nine.counts")
""",
        rare,
    )
    assert found["peak"] < 1.1 * (16 << 20), found["peak"]
    assert found["distinct_pretokens"] > WORDS and found["documents"] == 9


def test_documents_are_counted_in_constant_memory(rare: Path) -> None:
    found = measured(
        f"""
counts = Counts(max_memory={CAP})
with open("text.txt") as f:
    counts.add_documents(f)
result["runs"] = counts.spilled_runs
""",
        rare,
    )
    assert found["runs"] > 0 and found["peak"] < 1.1 * CAP, f"{found['peak'] / CAP:.2f} of the cap"


def test_merging_that_has_no_room_is_refused_with_what_fits(rare: Path) -> None:
    found = measured(
        f"""
try:
    Counts.from_files("text.txt", max_memory={CAP}).train(400)
except Exception as exc:
    result["said"] = str(exc)
""",
        rare,
    )
    assert "distinct words needs" in found["said"] and "--min-frequency 2 (needs" in found["said"]
    assert found["peak"] < 1.1 * CAP


@pytest.mark.parametrize(
    ("name", "word", "n", "vocab"),
    [
        (
            "hexadecimal",
            'f"{i * 2654435761 % 2**32:08x}".translate(str.maketrans("0123456789", "ghijklmnop"))',
            400_000,
            2000,
        ),
        ("alike", '"".join(chr(97 + (i >> s) % 4) for s in range(0, 20, 2)) + "ending" * (i % 3)', 300_000, 30_000),
        (
            "long",
            '"ab" * 20 + f"{i:x}".translate(str.maketrans("0123456789", "ghijklmnop")) + "cd" * (i % 40)',
            60_000,
            1000,
        ),
    ],
)
def test_what_merging_needs_is_known_before(tmp_path: Path, name: str, word: str, n: int, vocab: int) -> None:
    """The refusal's figure is above the real peak of merging, and not far above it."""
    measured(f'Path("words.txt").write_text(" ".join({word} for i in range({n})))', tmp_path)
    measured('Counts.from_files("words.txt").save("w.counts")', tmp_path)
    said = measured(
        f"""
try:
    Counts.load("w.counts", max_memory=16 << 20).train({vocab})
except Exception as exc:
    result["said"] = str(exc)
""",
        tmp_path,
    )["said"]
    figure, unit = said.split("words needs ")[1].split(",")[0].split(" ")
    need = float(figure) * {"MB": 1e6, "GB": 1e9}[unit]
    peak = measured(f'_core.train_bpe_from_counts(["w.counts"], vocab_size={vocab})', tmp_path)["peak"]
    assert 0.35 * need < peak < need, f"{name}: {peak / need:.2f} of {said}"
