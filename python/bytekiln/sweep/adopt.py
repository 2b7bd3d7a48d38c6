"""Take an existing run into a sweep, as if the sweep had made it.

In: a run's folder or its folder of checkpoints, and the values by which the sweep would name it. Out: checkpoints and
TensorBoard's files under the sweep's names, the run's own files in `runs/NAME`, an entry in the results. What was there
goes only when all of it is in its new place, and a killed adoption is finished by the same command. Called by
`cli_sweep`; imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bytekiln.config import RunConfig, load_config
from bytekiln.console import nearest
from bytekiln.errors import ConfigError, FileError, MismatchError, OutputExistsError
from bytekiln.section import Value
from bytekiln.sweep.axes import exact_name, short
from bytekiln.sweep.folder import (
    LIMITS,
    RUNS,
    SPEC,
    TRIALS,
    differences,
    run_folder,
    store_trials,
    stored_names,
    tidy,
)
from bytekiln.sweep.journal import Place
from bytekiln.sweep.locks import coordinating, held, trouble
from bytekiln.sweep.move import MARK, Old, arrived, bring, check_whole, config_of, read_mark
from bytekiln.sweep.process import TRIAL
from bytekiln.sweep.results import TrialResult, read_results, update_results
from bytekiln.sweep.spec import SweepSpec, Trial, load_spec, sweep_presets, trials_of
from bytekiln.sweep.view import view


def adopt(
    source: Path,
    values: Mapping[str, Value],
    *,
    sweep: str = "",
    tensorboard: Path | None = None,
    changes: Callable[[SweepSpec], SweepSpec] = lambda spec: spec,
) -> tuple[TrialResult, Path]:
    """Move a run into a sweep's naming and enter it into the results.

    What is moved is `source` and, where the run's own config says so, what belongs to it elsewhere. Of a copy of a run
    only the copy goes; what its config names elsewhere is the original's, and is copied.

    Args:
        source: the run's folder, or its folder of checkpoints.
        values: what the sweep calls it by, as `{"lr": 6e-4}`, in any order.
        sweep: preset, file or folder of the sweep; unset: the preset whose checkpoints' name begins like `source`.
        tensorboard: its TensorBoard files; unset: where the run's config says.
        changes: what the command line will lay over a sweep that has not begun; one that has is taken as it was begun.

    Returns:
        Its entry, and the results file.

    Raises:
        ConfigError: the sweep has no run of these values (names the nearest).
        MismatchError: the run's config contradicts a value, or is another one than the sweep's run has.
        OutputExistsError: the sweep has such a run already.
        FormatError: a checkpoint of the run is damaged (names the file).
        BytekilnError: no run, one that is being trained, no such sweep, a folder or results that cannot be used.
    """
    spec = load_spec(sweep) if sweep else _sweep_of(source)
    if sweep and (Path(sweep) / SPEC).is_file():
        folder = Path(sweep)
    else:
        spec = changes(spec)
        folder = spec.folder
    begun = (folder / SPEC).is_file()
    if begun:
        spec = load_spec(folder / SPEC)
    trials = trials_of(spec)
    trial = _same_values(trials, values)
    place = run_folder(folder, trial.name) if trial else None
    if place is not None and (place / MARK).exists():
        old, config = read_mark(place)
    else:
        old, config = _old(source, tensorboard)
    _expect(config, values, old.checkpoints)
    if trial is None or place is None:
        name = exact_name(values, None)
        alike = max(trials, key=lambda t: sum(t.changes.get(k) == v for k, v in values.items()))
        meant = nearest(name, [t.name for t in trials]) or alike.name
        raise ConfigError(f"adopt: {spec.name} has no run {name}; did you mean {meant}?")
    _same_run(config, trial, old.checkpoints, begun=begun)
    wanted = trial.config.with_(out_dir=str(place)).output
    target, board = wanted.checkpoints.absolute(), wanted.tensorboard_folder.absolute()
    try:
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise trouble(folder, exc) from None
    path = folder / spec.results_name
    leaving = [p for p in (old.home, old.checkpoints) if old.ours(p)]
    with coordinating(folder), held(source, *leaving, place, target):
        order = [r.name for r in read_results(path)] if path.exists() else []
        if (folder / TRIALS).exists():
            stored_names(folder)
        try:
            _refuse_taken(place, target, board if old.curves.is_dir() else None)
            check_whole(old.checkpoints, target)
            tidy(folder, spec.results_name, [])
            moved = config.with_(
                out_dir=str(place), checkpoint_dir=wanted.checkpoint_dir, tensorboard_dir=wanted.tensorboard_dir,
                metrics_path="", run_name=trial.name, min_lr=float(f"{config.optimizer.floor_lr:.12g}"),
                tensorboard=config.output.tensorboard or old.curves.is_dir(),
            )  # fmt: skip
            bring(place, old, moved, trial, target, board)
            store_trials(folder, [trial], spec.results_name)
            entry = view(folder, trial, Place())
            update_results(path, [entry], order)
            arrived(place)  # last: until then the same command finishes what was killed
        except OSError as exc:
            raise trouble(folder, exc) from None
    return entry, path


def _old(source: Path, tensorboard: Path | None) -> tuple[Old, RunConfig]:
    """Where the parts of a run are, all absolute; and its config.

    A path of the config counts as the run's own only if the run is where its config says that it is.
    """
    checkpoints = _checkpoints(source)
    config = config_of(source, checkpoints)
    said, whole = config.output, source.resolve() != checkpoints.resolve()
    at_home = said.checkpoints.resolve() == checkpoints.resolve()
    if whole:
        at_home = at_home and said.folder.resolve() == source.resolve()
    home = source if whole else said.folder
    inside = home / "metrics.csv"
    metrics = said.metrics if at_home or not inside.is_file() else inside
    curves = said.tensorboard_folder
    if not at_home and whole and curves.is_relative_to(said.folder):  # the copy's own
        curves = source / curves.relative_to(said.folder)
    curves = tensorboard or curves
    own = [source, *([tensorboard] if tensorboard else []), *([home, checkpoints, metrics, curves] if at_home else [])]
    at = [p.absolute() for p in (checkpoints, home, metrics, curves)]
    return Old(at[0], at[1], at[2], at[3], tuple(p.absolute() for p in own)), config


def _sweep_of(source: Path) -> SweepSpec:
    """The preset whose folders of checkpoints are named like this one."""
    specs = [load_spec(n) for n in sweep_presets()]
    fitting = [s for s in specs if s.output.checkpoint_dir.partition("{")[0].startswith(f"{os.path.normpath(source)}_")]
    if len(fitting) != 1:
        raise ConfigError(f"adopt: found no sweep that {source} belongs to; expected --sweep PRESET or its folder")
    return fitting[0]


def _checkpoints(source: Path) -> Path:
    if not source.is_dir():
        raise FileError(f"{source}: no such folder; expected a run's folder or its folder of checkpoints")
    if any(source.glob("checkpoint_*/state.json")):
        return source
    inside = load_config(source / "config.toml").output if (source / "config.toml").is_file() else None
    named = Path(inside.checkpoint_dir) if inside is not None and inside.checkpoint_dir else source / "checkpoints"
    if not any(named.glob("checkpoint_*/state.json")):
        raise FileError(f"{source}: found no checkpoint; expected a run's folder or its folder of checkpoints")
    return named


def _same_values(trials: Sequence[Trial], values: Mapping[str, Value]) -> Trial | None:
    """The run of a sweep that has these values, in whatever order."""
    return next((t for t in trials if t.changes == dict(values)), None)


def _expect(config: RunConfig, values: Mapping[str, Value], where: Path) -> None:
    for field, value in values.items():
        found = config.flat().get(field)
        if found != value:
            shown = "nothing" if found is None else short(found)
            raise MismatchError(f"{where}: {field}: found {shown} in the run's config; expected {short(value)}")


def _same_run(config: RunConfig, trial: Trial, where: Path, *, begun: bool) -> None:
    """The sweep must be able to go on with the run as if it were its own."""
    mine = config.with_(min_lr=float(f"{config.optimizer.floor_lr:.12g}"))  # as the sweep states it
    found = list(differences(mine, trial.config, config))
    was, now = mine.flat(), trial.config.flat()
    found += [(f, was[f], now[f]) for f in LIMITS if was[f] != now[f] and f not in {name for name, _, _ in found}]
    if found:
        field, there, wanted = found[0]
        given = " ".join(f"--set {f}={short(v)}" for f, v, _ in found if v is not None)
        way = "as the sweep was begun" if begun else f"or: {given}, if the sweep is to begin so"
        raise MismatchError(f"{where}: {field}: found {there} in the run's config; expected {wanted} ({way})")


def _refuse_taken(place: Path, target: Path, board: Path | None) -> None:
    if (place / MARK).exists():
        return  # this adoption was killed, and goes on
    if (place / TRIAL).exists() or (place / "result.json").exists():
        raise OutputExistsError(f"{place}: found a run of the sweep; expected none by that name")
    for path, what in ((target, "checkpoint_*"), (board, "events.out.tfevents.*")):
        if path is not None and any(path.glob(what)):
            raise OutputExistsError(f"{path}: found files of a run; expected a free folder")
