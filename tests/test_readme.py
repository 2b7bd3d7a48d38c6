"""What the README tells a newcomer to type is typed here, scaled down."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bytekiln import cli
from bytekiln.demo import Demo
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "bpe-train": ["--vocab-size", "300"],
    "lm-train": "--max-steps 4 --context-length 16 --batch-size 2 --d-model 16 --num-layers 1 --num-heads 2 "
    "--num-eval-batches 1 --compile=false --device cpu".split(),
    "lm-sample": ["--max-new-tokens", "8"],
}


def block(language: str) -> str:
    """The code block that follows the tour's mark."""
    found = re.search(rf"<!-- tour: [^>]*-->\n```{language}\n(.*?)```", README, re.S)
    assert found, f"README.md has no tour in {language}"
    return found[1]


@pytest.fixture(scope="module")
def toured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every line of the tour has been run, in order."""
    folder = tmp_path_factory.mktemp("tour")
    (folder / "demo").mkdir()
    text = "".join(f"The king said word {i * i}, and again: word {i}.\n<|endoftext|>" for i in range(200))
    (folder / "demo" / "train.txt").write_text(text)
    (folder / "demo" / "val.txt").write_text(text[: len(text) // 4])
    for line in block("sh").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        run = subprocess.run(
            [sys.executable, "-m", "bytekiln.cli", *words, *SMALLER.get(words[0], [])],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, f"{line}\n{run.stdout}{run.stderr}"
    return folder


def test_the_tour_runs(toured: Path) -> None:
    assert (toured / "demo" / "run" / "result.json").exists()
    assert (toured / "demo" / "wide" / "metrics.csv").exists()
    assert list((toured / "demo" / "run").glob("*.png"))


def test_the_python_snippet_runs(toured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toured)
    exec(compile(block("python").replace("vocab_size=4096", "vocab_size=300"), "README.md", "exec"), {})


def test_the_tour_shows_what_the_demo_runs() -> None:
    demo = Demo(Path("demo"), 4096, [], state={"corpus": {"prompt": "KING."}})
    for stage in demo.stages():
        assert f"\n{shlex.join(stage.command)}\n" in README, shlex.join(stage.command)


def test_every_make_target_and_command_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8")
        assert set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.M)) <= targets
        assert set(re.findall(r"\b((?:bpe|lm)-[a-z]+)\b", text)) <= {*cli.COMMANDS, "lm-eval"}, document.name


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
