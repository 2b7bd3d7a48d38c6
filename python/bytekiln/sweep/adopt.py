"""Take an existing run into a sweep, as if the sweep had made it.

In: a run's folder or its folder of checkpoints, and the values by which the sweep would name it. Out: checkpoints and
TensorBoard's files under the sweep's names, the run's own files in `runs/NAME`, an entry in the results. What was there
goes only when all of it is in its new place, and a killed adoption is finished by the same command. Called by
`cli_sweep`; imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytekiln.atomic import sync_folder
from bytekiln.config import RunConfig, load_config
from bytekiln.errors import ConfigError, FileError, FormatError, MismatchError, OutputExistsError
from bytekiln.metrics import write_atomically
from bytekiln.section import Value
from bytekiln.sweep.axes import exact_name, folder_names, short
from bytekiln.sweep.folder import RUNS, coordinating, run_folder, store_trials, trouble
from bytekiln.sweep.journal import Place
from bytekiln.sweep.process import LOG, TRIAL
from bytekiln.sweep.results import TrialResult, read_results, update_results
from bytekiln.sweep.spec import SweepSpec, Trial, folder_of, load_spec, sweep_presets
from bytekiln.sweep.view import view

MARK = "adopting.json"
"""In the new run folder while its parts are on their way."""
FILES = ("config.toml", "metrics.csv", "layers.csv", "diverged.json", "tokenizer.json", "tracking.json", LOG)
"""What is copied of a run as it is; `result.json` comes last."""


def adopt(
    source: Path, values: Mapping[str, Value], *, sweep: str = "", tensorboard: Path | None = None
) -> tuple[TrialResult, Path]:
    """Move a run into a sweep's naming and enter it into the results.

    Args:
        source: the run's folder, or its folder of checkpoints.
        values: what the sweep calls it by, as `{"lr": 6e-4}`.
        sweep: preset, file or folder of the sweep; unset: the preset whose checkpoints' name begins like `source`.
        tensorboard: its TensorBoard files; unset: where the run's config says.

    Returns:
        Its entry, and the results file.

    Raises:
        MismatchError: the run's config contradicts a value.
        OutputExistsError: the sweep has such a run already.
        BytekilnError: no run, no such sweep, a folder that cannot be written.
    """
    spec = load_spec(sweep) if sweep else _sweep_of(source)
    folder = Path(sweep) if sweep and Path(sweep).is_dir() else spec.folder
    name = folder_names([exact_name(values, None)])[0]
    place = run_folder(folder, name)
    checkpoints = _checkpoints(source) if not (place / MARK).exists() else Path(_mark(place)["checkpoints"])
    config = _config(source, checkpoints) if checkpoints.is_dir() else load_config(place / TRIAL)
    _same_values(config, values, checkpoints)
    target, board = places(spec, config, values, name, place)
    curves = tensorboard or config.output.tensorboard_folder
    try:
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise trouble(folder, exc) from None
    with coordinating(folder):
        try:
            _refuse_taken(place, target, board if curves.is_dir() else None)
            moved = config.with_(
                out_dir=str(place), checkpoint_dir=str(target) if spec.output.checkpoint_dir else "", metrics_path="",
                tensorboard_dir=str(board) if spec.output.tensorboard_dir else "", run_name=name,
                tensorboard=config.output.tensorboard or curves.is_dir(),
                min_lr=float(f"{config.optimizer.floor_lr:.12g}"),  # as the sweep states it
            )  # fmt: skip
            home = config.output.folder if source.resolve() == checkpoints.resolve() else source
            _bring(place, home, config, moved, checkpoints, target, curves, board)
            trial = Trial(name, dict(values), None, config.training.seed, moved)
            store_trials(folder, [trial], spec.results_name)
        except OSError as exc:
            raise trouble(folder, exc) from None
        path = folder / spec.results_name
        entry = view(folder, trial, Place())
        update_results(path, [entry], [r.name for r in read_results(path)] if path.exists() else [])
    return entry, path


def places(
    spec: SweepSpec, config: RunConfig, values: Mapping[str, Value], name: str, place: Path
) -> tuple[Path, Path]:
    """Where the sweep has a run's checkpoints and its TensorBoard files."""
    parts = []
    for template, usual in ((spec.output.checkpoint_dir, "checkpoints"), (spec.output.tensorboard_dir, "tensorboard")):
        parts.append(folder_of(template, config, values, None, name) if template else place / usual)
    return parts[0].absolute(), parts[1].absolute()


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


def _newest(checkpoints: Path) -> tuple[dict[str, Any], Path]:
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


def _config(source: Path, checkpoints: Path) -> RunConfig:
    stated = source / "config.toml"
    return load_config(stated if stated.is_file() else _newest(checkpoints)[1] / "config.toml")


def _same_values(config: RunConfig, values: Mapping[str, Value], where: Path) -> None:
    for field, value in values.items():
        found = config.flat().get(field)
        if found != value:
            shown = "nothing" if found is None else short(found)
            raise MismatchError(f"{where}: {field}: found {shown} in the run's config; expected {short(value)}")


def _mark(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / MARK).read_bytes()))


def _refuse_taken(place: Path, target: Path, board: Path | None) -> None:
    if (place / MARK).exists():
        return  # this adoption was killed, and goes on
    if (place / TRIAL).exists() or (place / "result.json").exists():
        raise OutputExistsError(f"{place}: found a run of the sweep; expected none by that name")
    for path, what in ((target, "checkpoint_*"), (board, "events.out.tfevents.*")):
        if path is not None and any(path.glob(what)):
            raise OutputExistsError(f"{path}: found files of a run; expected a free folder")


def _bring(
    place: Path,
    home: Path,
    config: RunConfig,
    moved: RunConfig,
    checkpoints: Path,
    target: Path,
    curves: Path,
    board: Path,
) -> None:
    """Everything to its new place; what was there goes last."""
    place.mkdir(parents=True, exist_ok=True)
    if not (place / MARK).exists():
        write_atomically(place / MARK, json.dumps({"checkpoints": str(checkpoints.absolute())}).encode())
    same = home.resolve() == place.resolve()
    if checkpoints.is_dir() and checkpoints.resolve() != target.resolve():
        target.mkdir(parents=True, exist_ok=True)
        for old in sorted(p for p in checkpoints.glob("checkpoint_*") if (p / "state.json").is_file()):
            _copy_checkpoint(old, target / old.name, moved)
    if curves.is_dir() and curves.resolve() != board.resolve():
        board.mkdir(parents=True, exist_ok=True)
        for old in curves.glob("events.out.tfevents.*"):
            _link(old, board / old.name)
    if not same:
        for file in FILES:
            old = config.output.metrics if file == "metrics.csv" else home / file
            if old.is_file():
                _link(old, place / file, copy=True)
        if (home / "samples").is_dir():
            shutil.copytree(home / "samples", place / "samples", dirs_exist_ok=True)
        write_atomically(place / "config.toml", moved.to_toml().encode())
        _result(home, place, target, config)
    write_atomically(place / TRIAL, moved.to_toml().encode())
    if not same:
        _remove_old(home, config, checkpoints, target, curves, board)
    (place / MARK).unlink()
    sync_folder(place)


def _copy_checkpoint(old: Path, new: Path, moved: RunConfig) -> None:
    """The same tensors (linked, not copied, on one file system) with the config that knows its new place."""
    if new.exists():
        return
    temporary = new.with_name(f".{new.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in old.iterdir():
        if file.is_file() and file.name not in ("config.toml", "checksums.json"):
            _link(file, temporary / file.name)
    text = moved.to_toml().encode()
    write_atomically(temporary / "config.toml", text)
    sums = json.loads((old / "checksums.json").read_bytes())
    sums["sha256"]["config.toml"] = hashlib.sha256(text).hexdigest()
    write_atomically(temporary / "checksums.json", json.dumps(sums, indent=1).encode() + b"\n")
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
    """The run's own result, or what its newest checkpoint tells where it has none."""
    if (home / "result.json").is_file():
        _link(home / "result.json", place / "result.json", copy=True)
        return
    state, path = _newest(checkpoints)
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


def _remove_old(home: Path, config: RunConfig, checkpoints: Path, target: Path, curves: Path, board: Path) -> None:
    """What has been brought away; folders only where nothing is left in them."""
    if checkpoints.resolve() != target.resolve():
        for old in checkpoints.glob("checkpoint_*"):
            if (target / old.name).is_dir():
                shutil.rmtree(old)
    if curves.resolve() != board.resolve():
        for old in curves.glob("events.out.tfevents.*"):
            old.unlink()
    for file in (*FILES, "result.json"):
        (config.output.metrics if file == "metrics.csv" else home / file).unlink(missing_ok=True)
    shutil.rmtree(home / "samples", ignore_errors=True)
    for folder in (checkpoints, curves, home):
        with suppress(OSError):
            folder.rmdir()
