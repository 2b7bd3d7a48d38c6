"""Where runs are: run folders, sweep folders, searches, folders with such in them.

In: paths. Out: `Place`s. Called by `report.runs` and `report`; imports no torch. What a sweep's files do not tell, or
tell in no readable way, is left out.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytekiln.errors import FileError

RUN_FILES = ("config.toml", "metrics.csv", "result.json", "trial.toml")
RESULTS = ("results.json", "lr_sweep_results.json")
RECOMMENDATION = "lr_recommendation.json"
SEARCHED = "Which learning rate is the best?"
"""The question of a search, whose stages are sweeps of their own."""
DEPTH = 3
"""How far below a folder that is neither run nor sweep its runs are looked for."""


@dataclass(frozen=True)
class Asked:
    """What a sweep's folder says of itself."""

    folder: Path
    question: str = ""
    baseline: str = ""
    recommendation: str = ""
    """Of the learning-rate search that the sweep is a stage of."""
    questions: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Of single variants, and after the question mark how the answer begins."""


@dataclass(frozen=True)
class Place:
    """Where a run is, and what its sweep says of it."""

    folder: Path
    name: str
    asked: Asked | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)
    """Of the sweep's results file; empty where there is none."""


def find_places(path: Path) -> list[Place]:
    """The runs at a path: a run folder, a sweep's folder, or a folder with such in it.

    Raises:
        FileError: there is no folder, or no run in it.
    """
    if not path.is_dir():
        raise FileError(f"{path}: {'found a file' if path.exists() else 'no such folder'}; expected a run or a sweep")
    found = list(_places(path, DEPTH))
    if not found:
        raise FileError(f"{path}: found no run; expected a folder with config.toml and metrics.csv, or a sweep")
    return found


def _places(path: Path, depth: int) -> Iterator[Place]:
    if any((path / name).is_file() for name in RUN_FILES):
        yield Place(path, path.resolve().name)
    elif (path / "runs").is_dir() and _is_sweep(path):
        yield from _of_sweep(path)
    elif depth:
        for below in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
            yield from _places(below, depth - 1)


def _is_sweep(path: Path) -> bool:
    return any((path / name).is_file() for name in ("sweep.toml", "trials.json", *RESULTS))


def _of_sweep(path: Path) -> Iterator[Place]:
    spec = read_toml(path / "sweep.toml") or {}
    told = [read_json(p / RECOMMENDATION) for p in (path, path.parent)]
    said = [t["recommendation"] for t in told if isinstance(t, dict) and isinstance(t.get("recommendation"), str)]
    of_variants = spec.get("questions")
    questions = {str(k): str(v) for k, v in of_variants.items()} if isinstance(of_variants, dict) else {}
    question, baseline = str(spec.get("question", "")), str(spec.get("baseline", ""))
    search = path.parent
    if any((search / n).is_file() for n in (RECOMMENDATION, "search.json")):  # its stages' runs belong together
        asked = Asked(search, SEARCHED, "", said[0] if said else "", questions)
    else:
        asked = Asked(path, question, baseline, said[0] if said else "", questions)
    trials = read_json(path / "trials.json")
    name = trials.get("results") if isinstance(trials, dict) else None
    planned = trials.get("trials") if isinstance(trials, dict) else None
    entries: dict[str, Mapping[str, Any]] = {}
    for entry in planned if isinstance(planned, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            entries[entry["name"]] = entry
    for file in dict.fromkeys([*([name] if isinstance(name, str) else []), *RESULTS]):
        results = read_json(path / file)
        for entry in results if isinstance(results, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                entries[entry["name"]] = {**entries.get(entry["name"], {}), **entry}
    folders = {name: _folder_of(path, name, entry) for name, entry in entries.items()}
    for name, entry in entries.items():
        yield Place(folders[name], name, asked, entry)
    known = {f.resolve() for f in folders.values()}
    for folder in sorted(p for p in (path / "runs").iterdir() if p.is_dir()):
        if folder.resolve() not in known and any((folder / n).is_file() for n in RUN_FILES):
            yield Place(folder, folder.name, asked)


def _folder_of(sweep: Path, name: str, entry: Mapping[str, Any]) -> Path:
    told = entry.get("run_dir")
    if isinstance(told, str) and told and (sweep / told).is_dir():
        return sweep / told
    return sweep / "runs" / name


def read_toml(path: Path) -> dict[str, Any] | None:
    """A TOML file; None where it is missing or damaged."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def read_json(path: Path) -> Any:  # noqa: ANN401 - any value of JSON
    """A JSON file; None where it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
