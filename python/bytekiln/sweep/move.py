"""The way of a run's files into a sweep: what was begun is written down, what was there goes last.

In: where the parts of a run are, and where they shall be. Out: them there, no tensor copied within one file system; a
mark in the new folder meanwhile, by which the same command finishes what was killed. Called by `adopt`; no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytekiln.atomic import sync_folder
from bytekiln.config import RunConfig, load_config
from bytekiln.errors import BytekilnError, FileError, FormatError
from bytekiln.metrics import write_atomically
from bytekiln.sweep.locks import remove_unfinished
from bytekiln.sweep.process import LOG, TRIAL
from bytekiln.sweep.results import read_run
from bytekiln.sweep.spec import Trial

MARK = "adopting.json"
"""In the new run folder while its parts are on their way."""
FILES = ("config.toml", "metrics.csv", "layers.csv", "diverged.json", "tokenizer.json", "tracking.json", LOG)
"""What is copied of a run as it is; `result.json` comes last."""
FORMAT, VERSION = "bytekiln-adoption", 1
SUMS = "checksums.json"
"""In a checkpoint: the SHA-256 of its other files."""


@dataclasses.dataclass(frozen=True)
class Old:
    """Where a run was, and which of its folders are its own to be removed."""

    checkpoints: Path
    home: Path
    metrics: Path
    curves: Path
    own: tuple[Path, ...]

    def ours(self, path: Path) -> bool:
        """Whether `path` goes with the run; what is the original's of a copy does not."""
        return any(path.resolve().is_relative_to(o.resolve()) for o in self.own)


def newest(checkpoints: Path) -> tuple[dict[str, Any], Path]:
    """The state and the folder of the checkpoint that came furthest.

    Raises:
        FormatError: none can be read.
    """
    states = []
    for path in checkpoints.glob("checkpoint_*/state.json"):
        try:
            state = json.loads(path.read_bytes())
            states.append((int(state["step"]), path.parent.name == "checkpoint_final", state, path.parent))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not states:
        raise FormatError(f"{checkpoints}: found no readable checkpoint; expected a whole one")
    best = max(states, key=lambda s: s[:2])
    return best[2], best[3]


def config_of(source: Path, checkpoints: Path) -> RunConfig:
    """The run's config, else that of its newest checkpoint."""
    stated = source / "config.toml"
    return load_config(stated if stated.is_file() else newest(checkpoints)[1] / "config.toml")


def read_mark(place: Path) -> tuple[Old, RunConfig]:
    """Where the parts of a run were whose adoption was killed.

    Raises:
        FileError, FormatError: the mark cannot be read, or another version of the program wrote it.
    """
    path = place / MARK
    try:
        said = json.loads(path.read_bytes())
        if (said["format"], said["version"]) != (FORMAT, VERSION):
            raise ValueError(f"found {said['format']}, version {said['version']}")
        parts = {k: Path(said[k]) for k in ("checkpoints", "home", "metrics", "curves")}
        old = Old(**parts, own=tuple(Path(p) for p in said["own"]))
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected where a run was") from None
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        what = f"found no {exc.args[0]}" if isinstance(exc, KeyError) else str(exc)
        raise FormatError(
            f"{path}: {what}; expected {FORMAT}, version {VERSION} (a killed adoption is finished by the version of "
            "bytekiln that began it)"
        ) from None
    known = place / "config.toml"
    return old, load_config(known) if known.is_file() else config_of(old.checkpoints, old.checkpoints)


def bring(place: Path, old: Old, moved: RunConfig, trial: Trial, target: Path, board: Path) -> None:
    """Everything to its new place; what was there goes last, and the mark stays (`arrived`)."""
    place.mkdir(parents=True, exist_ok=True)
    for leftover in target.glob(".checkpoint_*.tmp"):  # of an adoption that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    remove_unfinished(place)
    remove_unfinished(board)
    if not (place / MARK).exists():
        parts = {k: str(v) for k, v in vars(old).items() if k != "own"}
        mark = {"format": FORMAT, "version": VERSION, **parts, "own": [str(p) for p in old.own]}
        write_atomically(place / MARK, json.dumps(mark).encode())
    same = old.home.resolve() == place.resolve()
    if old.checkpoints.is_dir() and old.checkpoints.resolve() != target.resolve():
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(p for p in old.checkpoints.glob("checkpoint_*") if (p / "state.json").is_file()):
            _copy_checkpoint(path, target / path.name, moved)
    if old.curves.is_dir() and old.curves.resolve() != board.resolve():
        board.mkdir(parents=True, exist_ok=True)
        for path in old.curves.glob("events.out.tfevents.*"):
            _link(path, board / path.name, copy=not old.ours(path))
    if not same:
        for file in FILES:
            path = old.metrics if file == "metrics.csv" else old.home / file
            if path.is_file() and file != "config.toml":
                _link(path, place / file, copy=True)
        if (old.home / "samples").is_dir():
            shutil.copytree(old.home / "samples", place / "samples", dirs_exist_ok=True)
        _result(old.home, place, target, moved)
        write_atomically(place / "config.toml", moved.to_toml().encode())
    write_atomically(place / TRIAL, trial.config.with_(out_dir=str(place)).to_toml().encode())
    if not same:
        _remove_old(old, target, board)


def arrived(place: Path) -> None:
    """The adoption is over; called last, when the sweep's own lists know the run."""
    (place / MARK).unlink()
    sync_folder(place)


def check_whole(old: Path, target: Path) -> None:
    """Every checkpoint that is still to be brought has the bytes that were written; nothing is touched.

    Raises:
        FormatError: names the file that is missing, damaged, or not a checkpoint's.
        OSError: one cannot be read.
    """
    for path in sorted(p.parent for p in old.glob("checkpoint_*/state.json")):
        if old.resolve() != target.resolve() and (target / path.name).exists():
            continue  # was brought before this adoption was killed
        way = f"expected a whole checkpoint (without {path.name} the rest of the run can be adopted)"
        try:
            sums = dict(json.loads((path / SUMS).read_bytes())["sha256"])
        except FileNotFoundError:
            raise FormatError(f"{path / SUMS}: no such file; {way}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise FormatError(f"{path / SUMS}: found no checksums ({exc}); {way}") from None
        for name, wanted in sums.items():
            if not (path / name).is_file():
                raise FormatError(f"{path / name}: no such file; {way}")
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != wanted:
                raise FormatError(f"{path / name}: found other bytes than were written; {way}")


def _copy_checkpoint(old: Path, new: Path, moved: RunConfig) -> None:
    """The same tensors (linked, not copied, on one file system) with the config that knows its new place."""
    if new.exists():
        return
    temporary = new.with_name(f".{new.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in old.iterdir():
        if file.is_file() and file.name not in ("config.toml", SUMS):
            _link(file, temporary / file.name)
    text = moved.to_toml().encode()
    write_atomically(temporary / "config.toml", text)
    sums = json.loads((old / SUMS).read_bytes())
    sums["sha256"]["config.toml"] = hashlib.sha256(text).hexdigest()
    write_atomically(temporary / SUMS, json.dumps(sums, indent=1).encode() + b"\n")
    sync_folder(temporary)
    temporary.rename(new)
    sync_folder(new.parent)


def _link(old: Path, new: Path, *, copy: bool = False) -> None:
    if new.exists():
        return
    if not copy:
        with suppress(OSError):
            new.hardlink_to(old)
            return
    temporary = new.with_name(f".{new.name}.{os.getpid()}.tmp")
    shutil.copyfile(old, temporary)
    temporary.rename(new)


def _result(home: Path, place: Path, checkpoints: Path, config: RunConfig) -> None:
    """The run's own result, or what its newest checkpoint tells where it has none, or has gone on elsewhere."""
    if (place / "result.json").exists():
        return  # brought before this adoption was killed
    state, path = newest(checkpoints)
    with suppress(BytekilnError):
        found = read_run(home)
        if found is not None and found.get("steps") == state["step"]:
            _link(home / "result.json", place / "result.json", copy=True)
            return
    row, final = state.get("last_row") or {}, path.name == "checkpoint_final"
    status = "completed" if final and state["step"] >= config.training.max_steps else "interrupted"
    about = {
        "format": "bytekiln-result",
        "version": 1,
        "status": status,
        "why": f"adopted; its state is that of {path.name}",
        "steps": state["step"],
        "max_steps": config.training.max_steps,
        "tokens": state.get("tokens"),
        "final_train_loss": row.get("loss"),
        "final_val_loss": state.get("val_loss"),
        "final_val_accuracy": state.get("val_accuracy"),
        "final_train_eval_loss": state.get("train_eval_loss"),
        "best_val_loss": state.get("best_val_loss"),
        "best_step": state.get("best_step"),
        "wall_time_s": state.get("elapsed_s"),
    }
    write_atomically(place / "result.json", json.dumps(about, indent=1, allow_nan=False).encode() + b"\n")


def _remove_old(old: Old, target: Path, board: Path) -> None:
    """What has been brought away and is the run's own; folders only where nothing is left in them."""
    if old.checkpoints.resolve() != target.resolve() and old.ours(old.checkpoints):
        for path in old.checkpoints.glob("checkpoint_*"):
            if (target / path.name).is_dir():
                shutil.rmtree(path)
    if old.curves.resolve() != board.resolve() and old.ours(old.curves):
        for path in old.curves.glob("events.out.tfevents.*"):
            path.unlink()
    for file in (*FILES, "result.json"):
        path = old.metrics if file == "metrics.csv" else old.home / file
        if old.ours(path):
            path.unlink(missing_ok=True)
    if old.ours(old.home):
        shutil.rmtree(old.home / "samples", ignore_errors=True)
    for folder in (old.checkpoints, old.curves, old.home):
        if old.ours(folder):
            with suppress(OSError):
                folder.rmdir()
