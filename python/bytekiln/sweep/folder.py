"""A sweep's place on the disk: one coordinator at a time, each run's config, the list of runs.

In: trials. Out: `trials.json`, `runs/NAME/trial.toml`, `sweep.toml`; refusals of what does not belong together. Called
by `sweep`, `adopt` and `cli_sweep`; imports no torch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bytekiln.config import FIELDS, changed_mathematics, load_config, stated_in
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, OutputExistsError
from bytekiln.metrics import write_atomically
from bytekiln.sweep.journal import BEAT_S, Holder
from bytekiln.sweep.process import TRIAL
from bytekiln.sweep.spec import SweepSpec, Trial, inlined, load_spec
from bytekiln.sweep.table import to_toml

LOCK, TRIALS, SPEC, JOURNAL, RUNS = "coordinator.lock", "trials.json", "sweep.toml", "journal.log", "runs"
NEVER_COMPARED = ("name", "question", "questions", "baseline", "format", "version")
"""What of a spec changes no run."""
LIMITS = ("max_steps", "max_time", "token_budget", "early_stopping_patience")
"""Where a run ends: with others, one that ended goes on."""


@contextmanager
def coordinating(folder: Path) -> Iterator[None]:
    """Be the one process that decides about a sweep.

    Raises:
        FileError: another one is (named), or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as exc:
        raise trouble(path, exc) from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder, _owner(path)) from None
        except OSError:  # a file system without locks: what the file says decides
            owner = _owner(path)
            if owner is not None and _seems_alive(path, owner):
                raise _in_use(folder, owner) from None
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(dataclasses.asdict(Holder.me())).encode() + b"\n", 0)
        except OSError as exc:
            raise trouble(path, exc) from None
        yield
        with suppress(OSError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def still_coordinating(folder: Path) -> None:
    """Show that the coordinator lives, where locks do not."""
    with suppress(OSError):
        os.utime(folder / LOCK)


def _owner(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _seems_alive(path: Path, owner: Holder) -> bool:
    here = owner.runs_here()
    if here is not None:
        return here
    probe = path.with_name(f".{path.name}.{os.getpid()}")  # both times are the file server's
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime < 3 * BEAT_S
    finally:
        probe.unlink(missing_ok=True)


def _in_use(folder: Path, owner: Holder | None) -> FileError:
    who = str(owner) if owner else "another process"
    return FileError(
        f"{folder}: found a sweep run by {who}; expected one coordinator (lm-sweep worker {folder} joins it)"
    )


def trouble(path: Path, exc: OSError) -> BytekilnError:
    """An error of the operating system in our words."""
    if isinstance(exc, BytekilnError):
        return exc
    reason = (exc.strerror or str(exc)).lower()
    return FileError(f"{exc.filename or path}: {reason}; expected a writable folder with space for the sweep")


def run_folder(folder: Path, name: str) -> Path:
    """The absolute folder of a run."""
    return (folder / RUNS / name).absolute()


def store_trials(folder: Path, trials: Sequence[Trial], results: str) -> list[str]:
    """Write down the runs; names of those that a change of their limits opens anew.

    Runs that are there already and not among `trials` stay.

    Raises:
        MismatchError: a run of that name has another config, which would change its numbers.
        OutputExistsError: a run's folder of checkpoints has another run's.
        FileError: the folder cannot be written.
    """
    moved = []
    for trial in trials:
        place = run_folder(folder, trial.name)
        config = trial.config.with_(out_dir=str(place))
        _refuse_foreign(trial, place)
        if (place / TRIAL).exists():
            stored = load_config(place / TRIAL)
            for field, was, now in changed_mathematics(stored, config, FIELDS):
                if field != "preset":
                    raise MismatchError(
                        f"{place}: found a run with {field} {was}; expected {now} (another folder, or --overwrite)"
                    )
            if any(stored.flat()[n] != config.flat()[n] for n in LIMITS):
                moved.append(trial.name)
        text = config.to_toml().encode()
        try:
            place.mkdir(parents=True, exist_ok=True)
            if not (place / TRIAL).exists() or (place / TRIAL).read_bytes() != text:
                write_atomically(place / TRIAL, text)
        except OSError as exc:
            raise trouble(place, exc) from None
    about: list[dict[str, Any]] = [
        {"name": t.name, "variant": t.variant, "changes": t.changes, "seed": t.seed} for t in trials
    ]
    known = {t.name for t in trials}
    with suppress(FileError):
        _, before = _read_trials(folder)
        about += [e for e in before if e["name"] not in known]
    said = {"format": "bytekiln-trials", "version": 1, "results": results, "trials": about}
    write_atomically(folder / TRIALS, json.dumps(said, indent=1, allow_nan=False).encode() + b"\n")
    return moved


def stored_trials(folder: Path) -> tuple[str, list[Trial]]:
    """The name of the results file, and the runs, as `store_trials` wrote them.

    Raises:
        FileError, FormatError: there are none, or they cannot be read.
    """
    results, entries = _read_trials(folder)
    return results, [_trial(folder, e) for e in entries]


def stored_names(folder: Path) -> tuple[str, list[str]]:
    """As `stored_trials`, the names alone."""
    results, entries = _read_trials(folder)
    return results, [str(e["name"]) for e in entries]


def stored_trial(folder: Path, name: str) -> Trial:
    """One of `stored_trials`."""
    return _trial(folder, next(e for e in _read_trials(folder)[1] if e["name"] == name))


def _trial(folder: Path, e: dict[str, Any]) -> Trial:
    config = load_config(run_folder(folder, e["name"]) / TRIAL)
    return Trial(e["name"], e["changes"], e["variant"], e["seed"], config)


def _read_trials(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    path = folder / TRIALS
    try:
        found = json.loads(path.read_bytes())
        if (found["format"], found["version"]) != ("bytekiln-trials", 1):
            raise ValueError(f"found {found['format']}, version {found['version']}")
        for e in found["trials"]:
            _ = e["name"], e["changes"], e["variant"], e["seed"]
        return str(found["results"]), list(found["trials"])
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; expected a sweep's folder") from None
    except OSError as exc:
        raise trouble(path, exc) from None
    except (ValueError, KeyError, TypeError) as exc:
        raise FormatError(f"{path}: {exc}; expected the list of a sweep's runs") from None


def _refuse_foreign(trial: Trial, place: Path) -> None:
    """A new run must not begin in a folder of checkpoints that is not its own: it would go on from them."""
    there = trial.config.output.checkpoint_dir
    if not there or (place / TRIAL).exists():
        return
    found = sorted(Path(there).glob("checkpoint_*"))
    if found:
        raise OutputExistsError(
            f"{there}: found {found[0].name} of another run; expected a free folder: lm-sweep adopt takes the run in, "
            "--overwrite replaces it"
        )


# --- the spec ---------------------------------------------------------------------------------------------------


def open_folder(spec: SweepSpec, folder: Path, *, overwrite: bool = False) -> None:
    """Begin a sweep's folder, or go on with the one that has the same spec.

    Args:
        spec: the sweep.
        folder: its folder.
        overwrite: remove the sweep that is there; other people's files stay.

    Raises:
        MismatchError: it has another spec (says what differs).
        OutputExistsError: it has something else.
        FileError: it cannot be written.
    """
    path = folder / SPEC
    try:
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder}: found a file; expected a folder for the sweep")
        if path.exists() and not overwrite:
            _same_or_refused(spec, path)
            return
        if overwrite and (path.exists() or (folder / TRIALS).exists()):
            with coordinating(folder):
                remove_sweep(folder)
                write_spec(spec, folder)
            return
        mine = ("base.toml", LOCK, JOURNAL, RUNS)
        there = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        strange = [n for n in there if n not in mine and not n.startswith(".")]
        if strange and not path.exists() and TRIALS not in strange:
            raise OutputExistsError(
                f"{folder}: found {sorted(strange)[0]} and no sweep; expected a free folder: --folder takes another"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise trouble(folder, exc) from None
    write_spec(spec, folder)


def write_spec(spec: SweepSpec, folder: Path) -> None:
    """Write `sweep.toml`, and beside it the file that its base names."""
    said = spec.plain()
    config = spec.base.get("config")
    if config is not None:
        fields = stated_in(Path(str(config)))
        write_atomically(folder / "base.toml", to_toml(fields).encode())
        said["base"] = {**said["base"], "config": "base.toml"}
    write_atomically(folder / SPEC, to_toml(said).encode())


def _same_or_refused(spec: SweepSpec, path: Path) -> None:
    stored, wanted = _flat(inlined(load_spec(path))), _flat(inlined(spec))
    for key in {**stored, **wanted}:
        if stored.get(key) != wanted.get(key):
            raise MismatchError(
                f"{path}: {key}: found {_shown(stored.get(key))}; expected {_shown(wanted.get(key))} "
                "(--folder takes another place, --overwrite replaces the sweep)"
            )


def _flat(said: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in said.items():
        if not prefix and key in NEVER_COMPARED:
            continue
        if isinstance(value, dict) and not {"log", "linear"} & set(value):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out


def _shown(value: object) -> str:
    return "nothing" if value is None else str(value)[:200]


def remove_sweep(folder: Path) -> None:
    """Remove what a sweep wrote: its runs, their checkpoints and curves elsewhere, results, journal."""
    try:
        results, trials = stored_trials(folder)
    except BytekilnError:
        results, trials = "results.json", []
    try:
        for trial in trials:
            output = trial.config.output
            if output.checkpoint_dir:
                for path in Path(output.checkpoint_dir).glob("checkpoint_*"):
                    if (path / "state.json").is_file() or (path / "checksums.json").is_file():
                        shutil.rmtree(path)
            if output.tensorboard_dir:
                for path in Path(output.tensorboard_dir).glob("events.out.tfevents.*"):
                    path.unlink()
            shutil.rmtree(run_folder(folder, trial.name), ignore_errors=True)
        for name in (results, f".{results}.lock", TRIALS, SPEC, "base.toml", JOURNAL):
            (folder / name).unlink(missing_ok=True)
    except OSError as exc:
        raise trouble(folder, exc) from None


def is_free(place: Path) -> bool:
    """Whether no process trains in a run's folder."""
    try:
        fd = os.open(place, os.O_RDONLY)
    except FileNotFoundError:
        return True
    except OSError as exc:
        raise trouble(place, exc) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    finally:
        os.close(fd)
    return True


def checked_data(trials: Sequence[Trial], dataset: str = "") -> None:
    """Every run has data that is there, before the first one starts.

    Raises:
        ConfigError: a run names none.
        FileError: a file is missing; says what makes it, where a dataset's name stands for it.
    """
    seen: set[str] = set()
    for trial in trials:
        d = trial.config.data
        if not d.train_data:
            raise ConfigError(f"run {trial.name}: train_data: found none; expected --train-data FILE")
        for text in (*d.train_data.split(","), d.val_data, d.tokenizer):
            path = Path(text)
            if text and text not in seen and not path.exists():
                of = dataset if dataset and path.name.startswith(f"{dataset}_") else ""
                if path.parts[-3:-1] == ("data", "processed"):  # of a dataset that one variant names
                    of = of or path.stem.rpartition("_")[0]
                how = f"make it with: bpe-train --dataset {of} && bpe-encode --dataset {of}"
                if of.endswith("-char"):
                    how = f"make it with: bpe-encode TEXT --characters --dataset {of}"
                raise FileError(f"{path}: no such file; {how if of else 'expected the data of the sweep'}")
            seen.add(text)
