"""What run folders tell, read for a report: whole, unfinished, old and damaged ones.

In: places. Out: `Run`s, small enough for a page. Called by `report`; imports no torch.
Nothing in a run's files makes this fail: what cannot be read becomes a note of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bytekiln.errors import BytekilnError
from bytekiln.report.curves import Curve, averaged, sampled, smoothed, thinned
from bytekiln.report.places import Asked, Place, read_json, read_toml
from bytekiln.report.rows import Floats, Layers, Table, read_layers, read_table
from bytekiln.report.stability import Stability, stability
from bytekiln.section import Value
from bytekiln.sweep.results import STATUSES

SMOOTH_POINTS, OTHER_POINTS, CLOCK_POINTS, EVALUATIONS = 160, 200, 48, 400
"""Most points of a smoothed curve; of gradient norms, rates and speeds; of the clock; of validation."""
SAMPLE_CHARACTERS = 2000


@dataclass
class Run:
    """A run, as far as its files tell."""

    folder: Path
    name: str
    asked: Asked | None
    status: str
    """Of `result.json`, else (also where that is of an earlier attempt) of the sweep; `unfinished` where neither tells,
    `unreadable` where nothing can be read."""
    why: str
    notes: list[str]
    """What is missing or damaged, in sentences."""
    config: dict[str, Value]
    result: dict[str, Any]
    variant: str | None
    changes: dict[str, Value]
    steps: int
    curves: dict[str, Curve]
    """By column of `metrics.csv`; `loss_smooth` beside them."""
    clock: dict[str, list[float]]
    """`step`, `tokens` and `elapsed_s` at the same moments."""
    stability: Stability | None
    layers: Layers | None
    samples: list[tuple[str, str]]
    """(prompt, text behind it) of the last step that has some."""
    samples_step: int | None
    resolved: bool = True
    """Whether the config is that of a run that has begun, every `auto` decided."""
    group: str = ""
    """Its name without the seed; filled in by `report.groups`."""

    def number(self, name: str) -> float | None:
        """A finite number of the result."""
        value = self.result.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        try:
            return float(value) if math.isfinite(value) else None
        except OverflowError:  # a whole number beyond all floats
            return None

    @property
    def seed(self) -> int | None:
        """The run's seed."""
        seed = self.config.get("seed", self.result.get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def counts(self) -> bool:
        """Whether it ended well and has a validation loss: only such runs are compared."""
        return self.status in ("completed", "early_stopped") and self.number("best_val_loss") is not None


# --- one run ------------------------------------------------------------------------------------------------------


def read_run(place: Place, points: int) -> Run:
    """What a run's files tell; never fails for what is in them.

    Args:
        place: the run.
        points: most points of its training curve.
    """
    notes: list[str] = []
    folder, entry = place.folder, place.entry
    config = _config(folder, notes)
    result = {k: v for k, v in entry.items() if k not in ("name", "changes", "variant")}
    told = _result(folder, notes)
    if _is_stale(told, entry, _planned_steps(folder)):
        notes.append(f"result.json says {told['status']}, the sweep otherwise: left out")
        told = {}
    result.update({k: v for k, v in told.items() if v is not None})
    table = _metrics(folder, config, notes)
    status = str(told.get("status") or entry.get("status") or ("unfinished" if table or config else "unreadable"))
    if status == "failed" and entry.get("error"):
        notes.append(str(entry["error"]))
    if entry.get("pruned"):
        notes.append(f"given up by the search: {entry['pruned']}")
    if status not in (*STATUSES, "unfinished", "unreadable", "evaluated"):
        notes.append(f"status {status!r} is unknown")
    curves, clock, judged, steps = _curves(table, points) if table else ({}, {}, None, 0)
    if table:
        _fill_in(result, table)
    samples, samples_step = _samples(folder, notes)
    changes = entry.get("changes")
    variant = entry.get("variant")
    return Run(
        folder=folder,
        name=place.name,
        asked=place.asked,
        status=status,
        why=str(result.get("why") or ""),
        notes=notes,
        config=config,
        result=result,
        variant=variant if isinstance(variant, str) else None,
        changes=changes if isinstance(changes, dict) else {},
        steps=steps,
        curves=curves,
        clock=clock,
        stability=judged,
        layers=_layers(folder, notes),
        samples=samples,
        samples_step=samples_step,
        resolved=(folder / "config.toml").is_file(),
    )


def _config(folder: Path, notes: list[str]) -> dict[str, Value]:
    for name in ("config.toml", "trial.toml"):
        if (folder / name).is_file():
            found = read_toml(folder / name)
            if found is None:
                notes.append(f"{name} cannot be read")
                continue
            sections = [v if isinstance(v, dict) else {k: v} for k, v in found.items()]
            return {k: v for s in sections for k, v in s.items() if isinstance(v, str | int | float | bool)}
    if not any("cannot be read" in n for n in notes):
        notes.append("no config.toml" if folder.is_dir() else "has not begun")
    return {}


def _result(folder: Path, notes: list[str]) -> dict[str, Any]:
    path = folder / "result.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("status"), str):
        notes.append("result.json cannot be read")
        return {}
    return found


def _planned_steps(folder: Path) -> object:
    """The length that a sweep has asked a run for; None: no sweep has."""
    found = read_toml(folder / "trial.toml") or {}
    sections = [s for s in found.values() if isinstance(s, dict)]
    return next((s["max_steps"] for s in [found, *sections] if "max_steps" in s), None)


def _is_stale(told: Mapping[str, Any], entry: Mapping[str, Any], planned: object) -> bool:
    """Whether a `result.json` is of an earlier attempt than the sweep knows of, or of another length."""
    if not told:
        return False
    said = entry.get("status")
    if said in ("failed", "pending", "running") and told["status"] != said:
        return True
    wanted, steps = (entry.get("max_steps") or planned) if said else planned, told.get("max_steps")
    return isinstance(wanted, int) and isinstance(steps, int) and steps != wanted


def metrics_file(folder: Path, config: Mapping[str, Value]) -> Path:
    """Where a run's rows are, or would be."""
    path, elsewhere = folder / "metrics.csv", config.get("metrics_path")
    return Path(elsewhere) if not path.is_file() and isinstance(elsewhere, str) and elsewhere else path


def _metrics(folder: Path, config: Mapping[str, Value], notes: list[str]) -> Table | None:
    path = metrics_file(folder, config)
    if not path.is_file():
        if folder.is_dir() and config:
            notes.append("no metrics.csv")
        return None
    try:
        table = read_table(path)
    except BytekilnError as exc:
        notes.append(str(exc).replace(str(path), path.name))
        return None
    if table.damaged:
        notes.append(f"metrics.csv: {table.damaged:,} damaged lines left out")
    return table


def _curves(table: Table, points: int) -> tuple[dict[str, Curve], dict[str, list[float]], Stability | None, int]:
    steps = table.steps
    if not len(steps):
        return {}, {}, None, 0
    curves = {"loss": thinned(*table.of("loss"), points)}
    smooth = averaged(*table.of("loss"), SMOOTH_POINTS)
    curves["loss_smooth"] = Curve(smooth.x, smoothed(smooth.y, len(smooth) / 20))
    curves["grad_norm"] = thinned(*table.of("grad_norm"), OTHER_POINTS)
    curves["lr"] = sampled(*table.of("lr"), OTHER_POINTS)
    curves["tokens_per_s"] = averaged(*table.of("tokens_per_s"), OTHER_POINTS // 2)
    for name in ("val_loss", "train_eval_loss", "val_accuracy", "bits_per_byte"):
        curves[name] = thinned(*table.of(name), EVALUATIONS)
    curves["gap"] = thinned(*_both(table, "val_loss", "train_eval_loss"), EVALUATIONS)
    curves["expert_load"] = averaged(*table.of("expert_load"), OTHER_POINTS // 2)
    judged = None
    x, losses = table.of("loss")
    if steps[-1] > 0:
        norm_x, norms = table.of("grad_norm")
        judged = stability(x, losses, norms, norm_x)
    clock = {}
    if len(at := table.of("tokens")[0]):
        some = at[np.unique(np.linspace(0, len(at) - 1, CLOCK_POINTS).round().astype(int))]
        clock = {n: np.interp(some, *table.of(n)).tolist() for n in ("tokens", "elapsed_s") if len(table.of(n)[0])}
        clock["step"] = some.tolist()
    return {n: c for n, c in curves.items() if len(c)}, clock, judged, int(steps[-1])


def _both(table: Table, one: str, other: str) -> tuple[Floats, Floats]:
    """Steps at which two columns have a value, and their difference."""
    (x, a), (z, b) = table.of(one), table.of(other)
    steps, i, k = np.intersect1d(x, z, return_indices=True)
    return steps, a[i] - b[k]


def _fill_in(result: dict[str, Any], table: Table) -> None:
    """What the result would say, where there is none yet, out of the rows."""
    x, losses = table.of("val_loss")
    if len(losses):
        best = int(np.argmin(losses))
        if result.get("best_val_loss") is None:
            result.update(best_val_loss=float(losses[best]), best_step=int(x[best]))
        result.setdefault("final_val_loss", float(losses[-1]))
    for name, column in (
        ("final_train_loss", "loss"),
        ("final_train_eval_loss", "train_eval_loss"),
        ("final_bits_per_byte", "bits_per_byte"),
        ("final_val_accuracy", "val_accuracy"),
        ("tokens", "tokens"),
        ("wall_time_s", "elapsed_s"),
    ):
        _, values = table.of(column)
        if result.get(name) is None and len(values):
            result[name] = float(values[-1])
    _, speeds = table.of("tokens_per_s")
    if result.get("tokens_per_s") is None and len(speeds):
        result["tokens_per_s"] = float(np.median(speeds))


def _layers(folder: Path, notes: list[str]) -> Layers | None:
    path = folder / "layers.csv"
    if not path.is_file():
        return None
    try:
        layers = read_layers(path)
    except BytekilnError as exc:
        notes.append(str(exc).replace(str(path), path.name))
        return None
    if layers.damaged:
        notes.append(f"layers.csv: {layers.damaged:,} damaged lines left out")
    return layers if layers.steps and layers.norms else None


def _samples(folder: Path, notes: list[str]) -> tuple[list[tuple[str, str]], int | None]:
    files = {int(p.stem[5:]): p for p in (folder / "samples").glob("step_*.json") if p.stem[5:].isdigit()}
    for step in sorted(files, reverse=True):
        found = read_json(files[step])
        try:
            texts = [(str(s["prompt"]), str(s["text"])[:SAMPLE_CHARACTERS]) for s in found["samples"]]
        except (KeyError, TypeError):
            notes.append(f"samples/{files[step].name} cannot be read")
            continue
        return texts, step
    return [], None
