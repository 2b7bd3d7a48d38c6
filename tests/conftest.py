"""What all tests share: the skip policy, the data beside the repository, and running a command as a user does.

Skips: with CI=true and `../shared` beside the repository, a test may skip only for a reason that
`skips.toml` names; any other skip fails the run.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
NO_SHARED = "../shared/data is not beside the repository"

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the commands do; before any test loads torch
# A cache of the compiler's own: what a killed compilation left in the user's would fail a test.
_compiled = tempfile.mkdtemp(prefix="bytekiln-compiled-")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _compiled)

hypothesis.settings.register_profile("bytekiln", deadline=None, print_blob=True)
hypothesis.settings.load_profile("bytekiln")

_skipped: list[tuple[str, str]] = []


def _allowed_reasons() -> list[re.Pattern[str]]:
    entries = tomllib.loads((ROOT / "tests" / "skips.toml").read_text(encoding="utf-8"))["skip"]
    return [re.compile(e["reason"]) for e in entries if not (e.get("bare_clone_only") and SHARED.is_dir())]


def unnamed_skips() -> list[tuple[str, str]]:
    """The skips so far that fail a run in CI: (test, reason)."""
    if os.environ.get("CI") != "true" or not SHARED.is_dir():
        return []
    allowed = _allowed_reasons()
    return [(test, reason) for test, reason in _skipped if not any(a.search(reason) for a in allowed)]


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append((report.nodeid, reason.removeprefix("Skipped: ")))


def pytest_unconfigure() -> None:
    shutil.rmtree(_compiled, ignore_errors=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if unnamed_skips() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = unnamed_skips()
    if found:
        terminalreporter.section("skips that tests/skips.toml does not name fail this run", red=True)
        for test, reason in found:
            terminalreporter.line(f"{test}: {reason}")


@pytest.fixture(scope="session")
def shared_bytes() -> Callable[[str], bytes]:
    """`shared_bytes("books/books_64mb.txt.xz", 1_000_000)`: the first bytes of a shared file, unpacked.

    Skips the test where the data is absent.
    """

    def read(name: str, limit: int = -1) -> bytes:
        path = SHARED / name
        if not path.exists():
            pytest.skip(NO_SHARED)
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as f:
            return f.read(limit)

    return read


class Result:
    """How a command ended."""

    def __init__(self, run: subprocess.CompletedProcess[str]) -> None:
        self.status, self.stdout, self.stderr = run.returncode, run.stdout, run.stderr

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Result]:
    """`command("bpe-train", …, status=2)` runs a command in a fresh process, in `tmp_path`.

    The exit status must be `status`; a traceback or a panic fails the test. An error must be exactly one line.
    """

    def run(name: str, *args: object, status: int = 0, env: dict[str, str] | None = None, **options: object) -> Result:
        result = Result(
            subprocess.run(
                [sys.executable, "-m", "bytekiln.cli", name, *map(str, args)],
                **{"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 120, **options},
                env={**os.environ, "NO_COLOR": "1", **(env or {})},
            )
        )
        assert "Traceback" not in result.output and "panicked" not in result.output, result.output
        assert result.status == status, f"exit status {result.status}, expected {status}:\n{result.output}"
        if status == 2:
            errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and result.stderr.strip().endswith(errors[0]), result.stderr
        return result

    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Iterator[Path]:
    """A small text of several documents, each ended by the end-of-text token."""
    path = tmp_path / "corpus.txt"
    words = "the kiln is warm and the clay is wet so the potter turns the wheel and the bowl grows".split()
    documents = (" ".join(words[i % 7 :] + words[: i % 5]) + f", bowl {i}.\n" for i in range(60))
    path.write_text("".join(f"{d}<|endoftext|>" for d in documents), encoding="utf-8")
    return path
