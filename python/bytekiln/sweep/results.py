"""The results file of a sweep: one object a run, written whole after each of them.

In: what runs left in their folders. Out: `results.json` or `lr_sweep_results.json` (docs/formats.md), and which run was
best. Called by `sweep`, searches, pipelines and the report; imports no torch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bytekiln.errors import BytekilnError, FileError, FormatError
from bytekiln.metrics import write_atomically
from bytekiln.section import Value

STATUSES = ("pending", "running", "completed", "failed", "diverged", "interrupted", "early_stopped")
DONE = ("completed", "early_stopped", "diverged")
"""A run that ended so is not run again."""
RANKED = ("completed", "early_stopped")
"""Only a run that ended so can be the best."""

SPREAD = 100
"""Up to so many runs, a field has a line of its own in the file."""


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """How one run of a sweep stands; a value that is not known or not finite is null."""

    name: str
    variant: str | None
    changes: dict[str, Value]
    """Fields that differ from the base."""
    lr: float
    lr_str: str
    """Its shortest exact spelling."""
    min_lr: float
    seed: int
    status: str
    why: str = ""
    exit_status: int | None = None
    elapsed_time: float | None = None
    """Seconds spent on the run, those before a resume included."""
    checkpoint_dir: str = ""
    """With `final_checkpoint` and `tensorboard_dir`: relative to the working directory where it lies below it."""
    final_checkpoint: str | None = None
    tensorboard_dir: str | None = None
    run_dir: str = ""
    """Relative to the folder of the results file."""
    final_val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    final_train_loss: float | None = None
    final_train_eval_loss: float | None = None
    final_val_accuracy: float | None = None
    final_bits_per_byte: float | None = None
    steps: int = 0
    max_steps: int = 0
    tokens: int | None = None
    parameters: int | None = None
    tokens_per_s: float | None = None
    error: str | None = None
    """Of a failed run: the last line of its trouble."""
    pruned: str | None = None
    """Why a search gave it up; null once it is taken up again."""


OF_RUN = (
    "final_val_loss best_val_loss best_step final_train_loss final_train_eval_loss final_val_accuracy "
    "final_bits_per_byte steps tokens parameters tokens_per_s"
).split()
"""Fields that a run's own `result.json` has by the same names."""
WHOLE = ("steps", "max_steps", "best_step", "tokens", "parameters")
"""Those of them that count something."""
_FIELDS = {f.name: f for f in dataclasses.fields(TrialResult)}


def read_results(path: Path) -> list[TrialResult]:
    """All runs of a results file, in its order.

    Raises:
        FileError: it is missing or unreadable.
        FormatError: it is no array of such objects.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected a sweep's results") from None
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{path}: {exc}; expected a sweep's results in JSON") from None
    if not isinstance(found, list):
        raise FormatError(f"{path}: found {type(found).__name__}; expected an array of runs")
    return [_read(entry, f"{path}: run {i + 1}") for i, entry in enumerate(found)]


def _read(entry: object, where: str) -> TrialResult:
    if not isinstance(entry, dict):
        raise FormatError(f"{where}: found {type(entry).__name__}; expected an object")
    values = {k: v for k, v in entry.items() if k in _FIELDS}  # a later version's fields are no trouble
    missing = [n for n, f in _FIELDS.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise FormatError(f"{where}: found no {missing[0]}; expected all of {', '.join(_FIELDS)}")
    for name, value in values.items():
        if not _fits(str(_FIELDS[name].type), value):
            raise FormatError(f"{where}: {name}: found {value!r}; expected {_FIELDS[name].type}")
    if values["status"] not in STATUSES:
        raise FormatError(f"{where}: status: found {values['status']}; expected one of {', '.join(STATUSES)}")
    return TrialResult(**values)


def _fits(kind: str, value: object) -> bool:
    if value is None:
        return "None" in kind
    if isinstance(value, bool):
        return False
    types = {"str": str, "int": int, "float": int | float, "dict": dict}
    return isinstance(value, types[kind.partition("[")[0].partition(" ")[0]])


def write_results(path: Path, results: Sequence[TrialResult]) -> None:
    """Replace a results file; always valid JSON, for a reader the old or the new.

    Raises:
        FileError: the folder cannot be written, or the disk is full; the old file stays.
    """
    entries = [{k: finite(v) for k, v in vars(r).items()} for r in results]
    if len(entries) <= SPREAD:
        text = json.dumps(entries, indent=1, allow_nan=False, ensure_ascii=False)
    else:  # a line a run: written after each of them, and twenty times as fast
        text = "[\n" + ",\n".join(json.dumps(e, allow_nan=False, ensure_ascii=False) for e in entries) + "\n]"
    write_atomically(path, text.encode() + b"\n")


def finite(value: Any) -> Any:  # noqa: ANN401 - any value of JSON
    """The value, or None where JSON has no word for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def update_results(path: Path, news: Iterable[TrialResult], order: Sequence[str] = ()) -> list[TrialResult]:
    """Put runs into a results file, in the place of what it says of them; several processes may do so at once.

    Args:
        path: the results file; where it is damaged it is made anew of `news`.
        news: the runs; what a search wrote into `pruned` stays for as long as a run stands as it did then.
        order: names in the order of the file; others follow.

    Returns:
        What the file says now.
    """
    with alone(path):
        try:
            known = {r.name: r for r in read_results(path)}
        except BytekilnError:
            known = {}
        for r in news:
            before = known.get(r.name)
            if before is not None and before.pruned and (r.status, r.steps) == (before.status, before.steps):
                r = dataclasses.replace(r, pruned=r.pruned or before.pruned)
            known[r.name] = r
        names = [n for n in order if n in known]
        names += [n for n in known if n not in set(names)]
        results = [known[n] for n in names]
        write_results(path, results)
    return results


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Be the one process that writes a results file."""
    try:
        fd = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise FileError(f"{path}: cannot be written: {reason}; expected a writable folder with space") from None
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def read_run(folder: Path) -> dict[str, Any] | None:
    """A run's `result.json`; None where it has none yet.

    Raises:
        FormatError: it is there, and no result of a run.
        FileError: it cannot be read.
    """
    path = folder / "result.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected the result of a run") from None
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{path}: {exc}; expected the result of a run in JSON") from None
    if not isinstance(found, dict) or found.get("status") not in STATUSES:
        raise FormatError(f"{path}: found no status of a run; expected the result of a run")
    for name in (*OF_RUN, "max_steps", "wall_time_s"):
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise FormatError(f"{path}: {name}: found {value!r}; expected a number")
        if name in WHOLE and value is not None and not (isinstance(value, int) and 0 <= value < 2**63):
            raise FormatError(f"{path}: {name}: found {str(value)[:30]}; expected a whole number")
    return found


def of_run(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `TrialResult` that a run's result has."""
    told = {name: finite(found.get(name)) for name in OF_RUN}
    told["steps"] = told["steps"] or 0
    return {**told, "max_steps": found.get("max_steps") or 0, "elapsed_time": finite(found.get("wall_time_s"))}


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Runs that differ in nothing but the seed: what is ranked."""

    name: str
    runs: tuple[TrialResult, ...]

    @property
    def mean(self) -> float | None:
        """Of the best validation losses; None unless every run ended well and has one: a rate that is lost with one
        seed is no good one, whatever the others say.
        """
        losses = [r.best_val_loss for r in self.runs if r.status in RANKED and r.best_val_loss is not None]
        return math.fsum(losses) / len(losses) if losses and len(losses) == len(self.runs) else None

    @property
    def best(self) -> TrialResult:
        """Its run of lowest loss."""
        return min(self.runs, key=lambda r: math.inf if r.best_val_loss is None else r.best_val_loss)


def repeats_of(results: Iterable[TrialResult]) -> list[Repeats]:
    """The runs by what is changed but the seed, in the order of the first ones; as the report groups them."""
    found: dict[object, list[TrialResult]] = {}
    for r in results:
        changed = (r.variant, *((k, v) for k, v in r.changes.items() if k != "seed"))
        found.setdefault(changed if r.variant or r.changes else r.name, []).append(r)
    return [Repeats(_name_of(runs), tuple(runs)) for runs in found.values()]


def _name_of(runs: Sequence[TrialResult]) -> str:
    name, seed = runs[0].name, f"seed={runs[0].changes.get('seed')}"
    return name if len(runs) == 1 else name.removesuffix(seed).removesuffix(",") or "base"


def best_repeats(results: Iterable[TrialResult]) -> Repeats | None:
    """Those of lowest mean best validation loss among those of which every run ended well; None: there are none.

    A diverged, interrupted or failed run never wins, whatever loss it has seen; neither does one without validation.
    """
    ranked = [(g.mean, i, g) for i, g in enumerate(repeats_of(results)) if g.mean is not None]
    return min(ranked)[2] if ranked else None


def best_of(results: Iterable[TrialResult]) -> TrialResult | None:
    """The best run of the best setting, by the mean over its seeds (`best_repeats`); None: there is none."""
    best = best_repeats(results)
    return best.best if best else None


def exit_status(results: Sequence[TrialResult]) -> int:
    """Of the sweep: 0 all ended (diverged runs are results too), 1 not one did, 4 some did not."""
    done = [r for r in results if r.status in DONE]
    return 0 if len(done) == len(results) else 4 if done else 1
