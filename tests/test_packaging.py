"""The set-up: what it says when something is missing, when it does nothing, and what the repository must not hold."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from conftest import ROOT

TOOLS = ["cat", "cksum", "dirname", "find", "ls", "mkdir", "mv", "sed", "sh", "sort"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder for PATH in which every prerequisite answers; tests take away or replace some."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, tool
        (folder / tool).symlink_to(found)
    for tool in ("git", "make", "cc"):
        program(folder / tool, "exit 0")
    program(folder / "cargo", "echo cargo 1.99.0")
    (folder / "python3").symlink_to(sys.executable)
    return folder


def program(path: Path, body: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def prerequisites(path: Path, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "scripts" / "prerequisites.sh")],
        env={"PATH": str(path), "HOME": str(home or path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_there(path: Path) -> None:
    run = prerequisites(path)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip() == str(path / "python3")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("git", ["git", "apt install"]),
        ("make", ["make", "apt install"]),
        ("cc", ["C compiler", "gcc"]),
        ("cargo", ["Rust toolchain", "1.8", "rustup"]),
        ("python3", ["Python 3.11", "python3-venv"]),
    ],
)
def test_each_missing_one_is_a_line(path: Path, missing: str, words: list[str]) -> None:
    (path / missing).unlink()
    run = prerequisites(path)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("missing: ")
    for word in words:
        assert word in run.stderr


def test_several_missing_are_named_at_once(path: Path) -> None:
    for tool in ("git", "cc", "cargo"):
        (path / tool).unlink()
    assert [line.split()[1] for line in prerequisites(path).stderr.splitlines()] == ["git;", "a", "a"]


@pytest.mark.parametrize(
    ("tool", "body", "words"),
    [
        ("python3", 'case "$2" in *ensurepip*) exit 1 ;; *) exit 0 ;; esac', ["venv", "python3-venv"]),
        ("python3", 'case "$2" in *exit*) exit 1 ;; *) echo 3.9 ;; esac', ["Python 3.11", "found: 3.9"]),
        ("cargo", "echo cargo 1.70.0", ["1.70", "rustup update"]),
        ("cargo", "exit 1", ["does not answer", "rustup default stable"]),
    ],
)
def test_present_but_of_no_use(path: Path, tool: str, body: str, words: list[str]) -> None:
    program(path / tool, body)
    run = prerequisites(path)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    for word in words:
        assert word in run.stderr


def test_cargo_beside_the_path(path: Path, tmp_path: Path) -> None:
    (path / "cargo").unlink()
    (tmp_path / ".cargo" / "bin").mkdir(parents=True)
    program(tmp_path / ".cargo" / "bin" / "cargo", "echo cargo 1.99.0")
    run = prerequisites(path, home=tmp_path)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "~/.cargo/bin" in run.stderr and ".cargo/env" in run.stderr


def test_setup_ends_with_the_prerequisites_line(path: Path) -> None:
    (path / "cc").unlink()
    run = subprocess.run(
        [str(ROOT / "scripts" / "setup.sh")],
        env={"PATH": str(path), "HOME": str(path), "BYTEKILN_VENV": str(path / "venv")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1 and "C compiler" in run.stderr
    assert not (path / "venv").exists()


@pytest.fixture
def project(path: Path, tmp_path: Path) -> Path:
    """A copy of what the set-up reads, and an environment whose tools only say that they were called."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("pyproject.toml", "Cargo.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "rust").mkdir()
    (folder / "rust" / "lib.rs").write_text("// one")
    (folder / "python" / "bytekiln").mkdir(parents=True)
    bin = folder / ".venv" / "bin"
    bin.mkdir(parents=True)
    called = tmp_path / "called"
    program(
        bin / "python",
        f'case "$*" in *"pip install"*) echo pip >>{called} ;; *requirements.py*) exec {sys.executable} "$@" ;; esac',
    )
    program(bin / "maturin", f"echo maturin >>{called}; : >python/bytekiln/_core.abi3.so")
    return folder


def setup(project: Path, path: Path) -> list[str]:
    """The tools that a set-up called."""
    called = project.parent / "called"
    called.unlink(missing_ok=True)
    env = {"PATH": str(path), "HOME": str(path)}
    subprocess.run([str(project / "scripts" / "setup.sh")], env=env, check=True, capture_output=True)
    return called.read_text().split() if called.exists() else []


def test_setup_does_only_what_has_changed(project: Path, path: Path) -> None:
    assert setup(project, path) == ["pip", "maturin"]
    assert setup(project, path) == []
    (project / "rust" / "lib.rs").touch()
    assert setup(project, path) == [], "a new date alone is no change"
    (project / "rust" / "lib.rs").write_text("// two")
    assert setup(project, path) == ["maturin"]
    metadata = (project / "pyproject.toml").read_text()
    (project / "pyproject.toml").write_text(metadata.replace('"rich>=13.7"', '"rich>=13.8"'))
    assert setup(project, path) == ["pip", "maturin"]
    (project / "python" / "bytekiln" / "_core.abi3.so").unlink()
    assert setup(project, path) == ["maturin"]
    assert setup(project, path) == []


def test_setup_begins_again_after_a_failure(project: Path, path: Path) -> None:
    maturin = project / ".venv" / "bin" / "maturin"
    works = maturin.read_text()
    program(maturin, "exit 3")
    with pytest.raises(subprocess.CalledProcessError):
        setup(project, path)
    program(maturin, works)
    assert setup(project, path) == ["maturin"]


@pytest.mark.alone
def test_setup_of_an_unchanged_tree_is_quick(project: Path, path: Path) -> None:
    """Under three seconds with the real sources; nothing is printed."""
    shutil.rmtree(project / "rust")
    shutil.copytree(ROOT / "rust", project / "rust")
    assert setup(project, path) == ["pip", "maturin"]
    start = time.monotonic()
    assert setup(project, path) == []
    assert time.monotonic() - start < 3


def test_requirements_are_read_from_the_metadata() -> None:
    def asked(*arguments: str) -> list[str]:
        command = [sys.executable, str(ROOT / "scripts" / "requirements.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(asked()) == set(project["dependencies"])
    assert set(asked("test")) == {*project["dependencies"], *project["optional-dependencies"]["test"]}
    assert set(project["optional-dependencies"]["test"]) <= set(asked("dev")), "dev names the extra test"
    assert set(asked("--only", "bench")) == set(project["optional-dependencies"]["bench"])
    assert len(asked("all")) > len(asked("dev"))


def test_make_alone_lists_the_targets() -> None:
    run = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("setup", "demo", "test", "lint", "format", "bench", "ci", "clean"):
        assert re.search(rf"^  make {target} +\S", run.stdout, re.M), target


def tracked() -> list[Path]:
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if name]


def test_tracked_files_are_small_and_name_no_machine() -> None:
    machine = re.compile(rf"{re.escape(str(ROOT.parent))}/|/home/\w+/|index-url *[= ] *http|find-links *[= ]")
    for file in tracked():
        assert file.stat().st_size < 600_000, file
        if file.suffix in (".py", ".pyi", ".rs", ".md", ".toml", ".sh", "") and file != Path(__file__):
            assert not machine.search(file.read_text(encoding="utf-8")), file


def test_scripts_are_executable() -> None:
    for script in [ROOT / ".ci" / "run", *(ROOT / "scripts").glob("*.sh")]:
        assert os.access(script, os.X_OK), script
        assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
