"""Reads the dependencies out of pyproject.toml, so that they are written down once.

`requirements.py EXTRA…` prints what the package and these extras need, one requirement a line (after
`--only`: what the extras need alone);
`requirements.py --have NAME` exits with 0 if the installed NAME meets what pyproject.toml asks.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extras: list[str], *, package: bool = True) -> list[str]:
    """The package's dependencies and those of `extras`; an extra may name others of the package's own."""
    found = list(PROJECT["dependencies"]) if package else []
    waiting, done = list(extras), set()
    while waiting:
        extra = waiting.pop(0)
        if extra in done:
            continue
        done.add(extra)
        for line in PROJECT["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{PROJECT['name']}\[([\w,-]+)\]", line)
            if own:
                waiting += own[1].split(",")
            else:
                found.append(line)
    return sorted(set(found))


def numbers(version: str) -> list[int]:
    """The leading numbers of a version: `2.10.0+cpu` → [2, 10, 0]."""
    return [int(n) for n in re.findall(r"\d+", version.partition("+")[0])]


def have(name: str) -> bool:
    """Whether `name` is installed in at least the version that the package asks for."""
    wanted = next(line for line in requirements([]) if re.match(rf"{name}\b", line))
    try:
        return numbers(metadata.version(name)) >= numbers(wanted.partition(">=")[2])
    except metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    if sys.argv[1:2] == ["--have"]:
        sys.exit(not have(sys.argv[2]))
    only = sys.argv[1:2] == ["--only"]
    print("\n".join(requirements(sys.argv[2:] if only else sys.argv[1:], package=not only)))
