"""Checkpoints: folders that are whole or absent, and that notice every changed bit. No pickle.

In: tensors by name, the state of the loop, the run's config. Out: a folder (docs/formats.md):

    model.safetensors      the weights
    training.safetensors   the optimizer's moments
    state.json             step, best loss, the row that an interrupted evaluation still owes …
    config.toml            the run, resolved
    tokenizer.json         where the run knows its tokenizer
    checksums.json         SHA-256 of each of these

Called by `train` (save, resume) and `sample` (weights).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from bytekiln.atomic import sync_folder
from bytekiln.config import RunConfig, load_config
from bytekiln.errors import BytekilnError, FileError, FormatError, MismatchError

FORMAT, VERSION = "bytekiln-checkpoint", 1
SUMS = "checksums.json"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on."""

    step: int
    """Optimizer steps done."""
    config: RunConfig
    model: dict[str, Tensor]
    training: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    """What the loop keeps beside tensors; JSON."""
    tokenizer_json: str | None = None
    path: Path | None = None
    """Where it was read from."""

    @property
    def where(self) -> str:
        """The file that `state` is from, for the words of an error."""
        return str(self.path / "state.json") if self.path is not None else f"checkpoint at step {self.step}"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the folder `path`; a reader, and a crash, sees the old one or the new one.

    All is written into a hidden folder beside it, flushed to the disk, and renamed. An existing folder changes
    places with the new one in a single system call and is deleted afterwards.

    Raises:
        FileError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            safetensors.torch.save_file(checkpoint.model, temporary / "model.safetensors")
            safetensors.torch.save_file(checkpoint.training, temporary / "training.safetensors")
            head = {"format": FORMAT, "version": VERSION, "step": checkpoint.step}
            (temporary / "state.json").write_text(
                json.dumps({**head, **checkpoint.state}, indent=1, allow_nan=False) + "\n", "utf-8"
            )
            (temporary / "config.toml").write_text(checkpoint.config.to_toml(), "utf-8")
            if checkpoint.tokenizer_json is not None:
                (temporary / "tokenizer.json").write_text(checkpoint.tokenizer_json, "utf-8")
            (temporary / SUMS).write_text(_checksums(temporary), "utf-8")
            for file in sorted(temporary.iterdir()):
                _sync_file(file)
            sync_folder(temporary)
            _put_in_place(temporary, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise FileError(f"{path}: cannot be written: {reason.lower()}; expected a writable folder with space") from None


def load_checkpoint(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Read a folder, every file checked against its checksum first.

    Args:
        path: the folder, see `resolve`.
        weights_only: leave the optimizer's moments out.

    Raises:
        FileError: it is missing or unreadable.
        MismatchError: a file is not what was written.
        FormatError: it is no checkpoint, or one of a later version.
    """
    state = _read_state(path)
    try:
        written, found = (path / SUMS).read_text("utf-8", errors="replace"), _checksums(path)
    except OSError as exc:
        raise FileError(
            f"{exc.filename}: {(exc.strerror or 'unreadable').lower()}; expected a whole checkpoint"
        ) from None
    if written != found:
        raise MismatchError(
            f"{_culprit(path, written, found)}: found other bytes than were written; expected those of {SUMS}"
        )
    names = ["model.safetensors"] if weights_only else ["model.safetensors", "training.safetensors"]
    tensors = [safetensors.torch.load_file(path / n) for n in names]
    tokenizer = path / "tokenizer.json"
    return Checkpoint(
        step=state["step"],
        config=load_config(path / "config.toml"),
        model=tensors[0],
        training={} if weights_only else tensors[1],
        state=state,
        tokenizer_json=tokenizer.read_text("utf-8") if tokenizer.is_file() else None,
        path=path,
    )


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint folder, whole or damaged."""
    return (path / "state.json").is_file() or (path / SUMS).is_file()


def folder_of_checkpoints(run: Path) -> Path:
    """Where a run folder's checkpoints are: where its config says, else in `checkpoints`."""
    try:
        named = load_config(run / "config.toml").output.checkpoint_dir
    except BytekilnError:
        named = ""
    return Path(named) if named else run / "checkpoints"


def resolve(given: str | Path) -> Path:
    """The checkpoint folder that a user's path means: itself, a run folder's newest, or the folder without `.pt`.

    Raises:
        FileError: there is none.
        FormatError: it is a pickle, which is never opened.
    """
    path = Path(given)
    if path.is_file():
        raise FormatError(f"{path}: found a file; expected a checkpoint folder (pickles such as .pt are never opened)")
    if not path.exists() and path.suffix == ".pt" and path.with_suffix("").is_dir():
        path = path.with_suffix("")
    if is_checkpoint(path):
        return path
    for folder in (folder_of_checkpoints(path), path / "checkpoints", path):
        found = next((p for _, p in checkpoints_in(folder)), None)
        if found is not None:
            return found
    what = "a folder without checkpoint" if path.is_dir() else "nothing"
    raise FileError(f"{path}: found {what}; expected a checkpoint folder or a run folder that has one")


def checkpoints_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoints in a folder, newest step first, with the step that they claim; nothing is verified."""
    claimed: list[tuple[int, str, Path]] = []
    for path in folder.glob("checkpoint_*") if folder.is_dir() else ():
        try:
            claimed.append((int(_read_state(path)["step"]), path.name, path))
        except BytekilnError:
            number = path.name.removeprefix("checkpoint_")
            claimed.append((int(number) if number.isdecimal() else -1, path.name, path))
    yield from ((step, path) for step, _, path in sorted(claimed, reverse=True))


def newest_whole(
    folder: Path, notice: Callable[[str], object], *, weights_only: bool = False
) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that passes every check; each damaged one before it is told in a line."""
    for _, path in checkpoints_in(folder):
        try:
            return path, load_checkpoint(path, weights_only=weights_only)
        except BytekilnError as exc:
            notice(f"{exc}; going back to the checkpoint before it")
    return None


def weights_of(run: str | Path, notice: Callable[[str], object] = lambda _: None) -> Checkpoint:
    """The weights to use: a run folder's best checkpoint's, else its newest whole one's; or those at this path.

    Raises:
        FileError: no whole checkpoint is there.
    """
    folder = folder_of_checkpoints(Path(run))
    best = folder / "checkpoint_best"
    if not best.is_dir():
        path = resolve(run)
        if path.parent != folder:
            return load_checkpoint(path, weights_only=True)
    else:
        try:
            return load_checkpoint(best, weights_only=True)
        except BytekilnError as exc:
            notice(f"{exc}; taking the newest whole checkpoint")
    found = newest_whole(folder, notice, weights_only=True)
    if found is None:
        raise FileError(f"{folder}: found damaged checkpoints only; expected a whole one")
    return found[1]


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest numbered checkpoints, and what killed writers left behind.

    What a writer had moved aside, and was killed before the new one was in its place, is put back.
    """
    for old in folder.glob(".checkpoint_*.old.tmp"):
        path = folder / old.name[1:].rsplit(".", 3)[0]
        if not path.exists():
            old.rename(path)
    for leftover in folder.glob(".checkpoint_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    numbered = [p for p in folder.glob("checkpoint_*") if p.name[11:].isdecimal() and is_checkpoint(p)]
    numbered.sort(key=lambda p: int(p.name.removeprefix("checkpoint_")), reverse=True)
    for old in numbered[keep:] if keep else ():
        _remove(old)


def remove_all(folder: Path, *, behind: int = -2) -> None:
    """Delete the checkpoints of steps behind `behind`, newest first, and nothing else that lies in the folder."""
    remove_old(folder, 0)  # first: what it puts back is to go too
    for step, path in list(checkpoints_in(folder)):
        if step > behind and is_checkpoint(path):
            _remove(path)


def _remove(path: Path) -> None:
    # Renamed first, so that a crash leaves no half of it under a checkpoint's name.
    doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_bytes())
    except OSError as exc:
        raise FileError(
            f"{exc.filename}: {(exc.strerror or 'unreadable').lower()}; expected a whole checkpoint"
        ) from None
    except ValueError:
        raise FormatError(f"{path / 'state.json'}: found no JSON; expected the state of a checkpoint") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("step"), int):
        raise FormatError(f"{path / 'state.json'}: found something else; expected format {FORMAT} with its step")
    if state.get("version") != VERSION:
        raise FormatError(f"{path / 'state.json'}: found version {state.get('version')}; expected {VERSION}")
    return state


def _checksums(folder: Path) -> str:
    """The only text that `checksums.json` may have: compared whole, so that no bit of it can change unseen."""
    files: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if file.name != SUMS:
            with file.open("rb") as f:
                files[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return json.dumps({"format": "bytekiln-checksums", "version": 1, "sha256": files}, indent=1) + "\n"


def _culprit(path: Path, written: str, found: str) -> Path:
    try:
        sums: tuple[Mapping[str, str], ...] = tuple(json.loads(t)["sha256"] for t in (written, found))
        return path / next(n for n in {**sums[0], **sums[1]} if sums[0].get(n) != sums[1].get(n))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return path / SUMS


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _put_in_place(new: Path, path: Path) -> None:
    """Rename `new` to `path`; where `path` exists the two change places (Linux renameat2, RENAME_EXCHANGE)."""
    if not path.exists():
        new.rename(path)
        return
    at_cwd, exchange = -100, 2
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
        if swap(at_cwd, os.fsencode(new), at_cwd, os.fsencode(path), exchange) == 0:
            return
    except (OSError, AttributeError):
        pass  # another system: two renames, with a moment in which only the numbered checkpoints are there
    old = new.with_name(new.name.replace(".tmp", ".old.tmp"))
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
