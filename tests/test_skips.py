"""The skip policy of `conftest.py`, tried on a project of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import NO_SHARED, ROOT


@pytest.mark.parametrize(
    ("reason", "ci", "shared", "where", "status"),
    [
        ("no CUDA device", "true", True, "test", 0),
        ("the moon is full", "true", True, "test", 1),
        ("the moon is full", "true", True, "module", 1),
        ("the moon is full", "", True, "module", 0),
        ("the moon is full", "true", False, "test", 0),
        (NO_SHARED, "true", False, "module", 0),
        (NO_SHARED, "true", True, "test", 1),
    ],
)
def test_skips(tmp_path: Path, reason: str, ci: str, shared: bool, where: str, status: int) -> None:
    tests = tmp_path / "project" / "tests"
    tests.mkdir(parents=True)
    for name in ("conftest.py", "skips.toml"):
        shutil.copy(ROOT / "tests" / name, tests)
    if shared:
        (tmp_path / "shared" / "data").mkdir(parents=True)
    skip = f"pytest.skip({reason!r}" + (", allow_module_level=True)" if where == "module" else ")")
    body = f"import pytest\n{skip}\n" if where == "module" else f"import pytest\ndef test_it():\n    {skip}\n"
    (tests / "test_one.py").write_text(body)
    (tests / "test_two.py").write_text("def test_it():\n    pass\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        cwd=tmp_path / "project",
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == status, run.stdout + run.stderr
    assert ("skips.toml does not name" in run.stdout) == bool(status)
