"""A sweep's place on the disk: its spec, each run's config, the list of runs.

In: trials. Out: `trials.json`, `runs/NAME/trial.toml`, `sweep.toml`; refusals of what does not belong together. Called
by `sweep`, `adopt` and `cli_sweep`; imports no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytekiln.atomic import remove_partial
from bytekiln.config import FIELDS, RunConfig, changed_mathematics, load_config, stated_in
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, OutputExistsError
from bytekiln.metrics import write_atomically
from bytekiln.section import Value
from bytekiln.sweep.locks import JOURNAL as JOURNAL
from bytekiln.sweep.locks import LOCK as LOCK
from bytekiln.sweep.locks import RUNS as RUNS
from bytekiln.sweep.locks import check_idle as check_idle
from bytekiln.sweep.locks import coordinating as coordinating
from bytekiln.sweep.locks import is_free, remove_unfinished
from bytekiln.sweep.locks import trouble as trouble
from bytekiln.sweep.process import LOG, TRIAL
from bytekiln.sweep.results import alone
from bytekiln.sweep.spec import DATA_PATHS, SweepSpec, Trial, inlined, load_spec
from bytekiln.sweep.table import to_toml

TRIALS, SPEC = "trials.json", "sweep.toml"
TOLD = ("analysis.md", "comparison.png", "report.html")
"""What reports write into a sweep's folder."""
NEVER_COMPARED = ("name", "question", "questions", "baseline", "format", "version", "directory", "shipped")
"""What of a spec changes no run."""
LIMITS = ("max_steps", "max_time", "token_budget", "early_stopping_patience")
"""Where a run ends: with others, one that ended goes on."""
OF_A_RUN = "config.toml metrics.csv layers.csv result.json diverged.json tokenizer.json tracking.json".split()
"""What a run writes into its folder."""
LEFT_OPEN = {"vocab_size": 0, "precision": "auto"}
"""Values with which a run's config leaves a choice open, which the run itself has made (`prepare.LEFT_OPEN`)."""


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
        _refuse_foreign(trial, run_folder(folder, trial.name))
    for trial in trials:
        place = run_folder(folder, trial.name)
        config = trial.config.with_(out_dir=str(place))
        stored, chosen = _stored_configs(place)
        if stored is not None:
            for field, was, now in differences(stored, config, chosen):
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


def differences(
    was: RunConfig, now: RunConfig, chosen: RunConfig | None
) -> Iterator[tuple[str, Value | None, Value | None]]:
    """As `changed_mathematics`, but what one of them leaves open is equal to what the run (`chosen`) made of it."""
    for field, before, after in changed_mathematics(was, now, FIELDS):
        if field in LEFT_OPEN and chosen is not None:
            settled = chosen.flat()[field]
            if {before, after} <= {LEFT_OPEN[field], settled}:
                continue
        if field != "preset":
            yield field, before, after


def _stored_configs(place: Path) -> tuple[RunConfig | None, RunConfig | None]:
    """What a run was asked to be, and what it made of it; where the former is damaged the latter has to do."""
    found = []
    for name in (TRIAL, "config.toml"):
        try:
            there = (place / name).exists() and (place / name).stat().st_size  # an empty one would be all defaults
            found.append(load_config(place / name) if there else None)
        except (ConfigError, FormatError):
            found.append(None)
    return (found[0] or found[1], found[1]) if (place / TRIAL).exists() else (None, found[1])


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
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise FormatError(
            f"{path}: {exc}; expected the list of a sweep's runs (the file may be deleted: the command that began the "
            "sweep makes it anew)"
        ) from None


def _refuse_foreign(trial: Trial, place: Path) -> None:
    """A new run must not begin in a folder of checkpoints that is not its own: it would go on from them."""
    there = trial.config.output.checkpoint_dir
    if not there or any((place / name).exists() for name in (LOG, "config.toml", "result.json")):
        return
    found = sorted(Path(there).glob("checkpoint_*"))
    if found:
        raise OutputExistsError(
            f"{there}: found {found[0].name} of another run; expected a free folder: lm-sweep adopt takes the run in, "
            "else remove it or rename the folder"
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
        FileError: it cannot be written; or it is to be removed, and somebody trains one of its runs.
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
    said = {**spec.plain(), "directory": str(Path(spec.directory).absolute())}
    config = spec.base.get("config")
    if config is not None:
        fields = stated_in(Path(str(config)))
        write_atomically(folder / "base.toml", to_toml(fields).encode())
        said["base"] = {**said["base"], "config": "base.toml"}
    write_atomically(folder / SPEC, to_toml(said).encode())


def _same_or_refused(spec: SweepSpec, path: Path) -> None:
    there = load_spec(path)
    stored, wanted = _flat(inlined(there)), _flat(inlined(spec))
    if there.directory and _begins_there(spec):
        stored["directory"], wanted["directory"] = there.directory, str(Path(spec.directory).absolute())
    for key in {**stored, **wanted}:
        if stored.get(key) != wanted.get(key):
            raise MismatchError(
                f"{path}: {key}: found {_shown(stored.get(key))}; expected {_shown(wanted.get(key))} "
                "(--folder takes another place, --overwrite replaces the sweep)"
            )


def _begins_there(spec: SweepSpec) -> bool:
    """Whether the working directory says where its data or its runs are."""
    said = inlined(spec)
    values = [v for _, v in spec.templates()]
    axes = [{field: value} for field, axis in spec.axes.items() for value in axis.values]
    for fields in (said.get("base", {}), *spec.variant.values(), *axes):
        values += [part for n in DATA_PATHS for part in str(fields.get(n) or "").split(",")]
    return "dataset" in spec.base or any(v and not Path(v.strip()).is_absolute() for v in values)


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
    """Remove what a sweep wrote: its runs, their checkpoints and curves elsewhere, results, journal.

    Its runs are those in `runs/` that have what only a sweep writes, whether or not its lists can still be read.

    Raises:
        FileError: somebody trains one of them (named); or it cannot be removed.
    """
    check_idle(folder)
    results = {"results.json", "lr_sweep_results.json"}
    with suppress(BytekilnError):
        results.add(_read_trials(folder)[0])
    with suppress(BytekilnError):
        results.add(load_spec(folder / SPEC).results_name)
    try:
        for place in sorted((folder / RUNS).iterdir()) if (folder / RUNS).is_dir() else []:
            if (place / TRIAL).exists() or (place / LOG).exists():
                remove_run(place)
                shutil.rmtree(place, ignore_errors=True)
        for name in (*(n for r in results for n in (r, f".{r}.lock")), TRIALS, SPEC, "base.toml", JOURNAL):
            (folder / name).unlink(missing_ok=True)
    except OSError as exc:
        raise trouble(folder, exc) from None


def tidy(folder: Path, results: str, runs: Iterable[Path]) -> None:
    """Remove what killed writers left half written, a sweep's or an adoption's; called by the one who coordinates.

    Raises:
        FileError: the folder cannot be written.
    """
    remove_unfinished(folder, (TRIALS, SPEC, "base.toml"))
    for name in TOLD:
        remove_partial(folder / name)
    with alone(folder / results):  # of which every worker is a writer
        remove_unfinished(folder, (results,))
    for place in runs:
        if place.is_dir() and is_free(place):
            remove_unfinished(place)


def remove_run(place: Path) -> None:
    """Remove what one run of a sweep left, its checkpoints and curves elsewhere too; `trial.toml` and `log.txt` stay.

    Raises:
        OSError: something of it cannot be removed.
    """
    stored, chosen = _stored_configs(place)
    if (config := stored or chosen) is not None:
        output = config.with_(out_dir=str(place.absolute())).output
        for path in output.checkpoints.glob("checkpoint_*"):
            if (path / "state.json").is_file() or (path / "checksums.json").is_file():
                shutil.rmtree(path)
        for path in output.tensorboard_folder.glob("events.out.tfevents.*"):
            path.unlink()
    for name in OF_A_RUN:
        (place / name).unlink(missing_ok=True)
    shutil.rmtree(place / "samples", ignore_errors=True)
