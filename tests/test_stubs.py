"""The hand-written stub of the Rust core says what the core has."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from conftest import ROOT


def test_stub_matches_the_core() -> None:
    assert importlib.util.find_spec("mypy"), "mypy is missing: make setup"
    run = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "bytekiln._core", "--concise"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
