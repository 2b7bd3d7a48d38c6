"""The files of a learning-rate search, and of the long run behind it, as their users look for them.

In: how the runs of a sweep stand, and their metrics. Out: a result a run, a summary, a recommendation, pictures
(docs/exp9.md). Written anew after every end of the sweep, whole or not. Called by `catalogue` and `exp9`; no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bytekiln.errors import BytekilnError, FileError
from bytekiln.experiments.figures import Drawn, long_figure, metrics_of, save, search_figure
from bytekiln.metrics import write_atomically
from bytekiln.report.rows import Table
from bytekiln.sweep.axes import short
from bytekiln.sweep.locks import remove_unfinished
from bytekiln.sweep.results import DONE, RANKED, TrialResult, best_of, best_repeats, finite, read_results
from bytekiln.sweep.spec import SweepSpec

RESULTS, SUMMARY, RECOMMENDATION, PICTURE = (
    "results",
    "lr_search_results.json",
    "lr_recommendation.json",
    "lr_search_comparison.png",
)
LONG_RESULTS, LONG_PICTURE = "exp9_long_term_results.json", "exp9_long_term_training_curves.png"
BEGUN = (*DONE, "failed", "interrupted")
"""A run that stands so has a result of its own, as far as it came."""
Say = Callable[[str], object]
After = Callable[[SweepSpec, Path, Sequence[TrialResult], Say], None]
"""Writes what belongs to a sweep, as far as it has come."""


@contextmanager
def whenever_it_ends(after: After | None, spec: SweepSpec, folder: Path, say: Say) -> Iterator[None]:
    """Have `after` called when the sweep inside is over, Ctrl-C and SIGTERM included; a refusal changes no file."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        if after is not None:
            with suppress(BytekilnError):  # the interruption is what is to be told
                after(spec, folder, read_results(folder / spec.results_name), say)
        raise
    if after is not None:
        after(spec, folder, read_results(folder / spec.results_name), say)


def write_search(spec: SweepSpec, folder: Path, results: Sequence[TrialResult], say: Say) -> None:
    """Write `results/`, the summary, the recommendation and the picture into a sweep's folder.

    Raises:
        FileError: the folder cannot be written.
    """
    tables = [metrics_of(folder / r.run_dir) for r in results]
    model = model_name(spec)
    entries = [result_of(r, t, model) for r, t in zip(results, tables, strict=True)]
    files = {result_file(r): e for r, e in zip(results, entries, strict=True) if r.status in BEGUN}
    try:
        (folder / RESULTS).mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder, (SUMMARY, RECOMMENDATION, PICTURE))
        remove_unfinished(folder / RESULTS)
        for old in (folder / RESULTS).glob("lr_*_result.json"):
            if old.name not in files:  # of a sweep that this one has replaced
                old.unlink()
    except OSError as exc:
        raise FileError(f"{folder}: {(exc.strerror or str(exc)).lower()}; expected a writable folder") from None
    for name, entry in files.items():
        _write(folder / RESULTS / name, entry)
    best = best_of(results)
    summary = {
        "format": "bytekiln-lr-search",
        "version": 1,
        "name": spec.name,
        "model_name": model,
        "best_learning_rate": best.lr if best else None,
        "search_time_minutes": _minutes(results),
        "results": entries,
    }
    _write(folder / SUMMARY, summary)
    told = recommendation(results, entries)
    _write(folder / RECOMMENDATION, told)
    drawn = [drawn_of(r, t, wins=r is best) for r, t in zip(results, tables, strict=True)]
    save(search_figure(drawn, f"{spec.name}: {model}, {len(results)} runs"), folder / PICTURE)
    say(told["recommendation"])
    say(f"recommendation: {folder / RECOMMENDATION}; picture: {folder / PICTURE}")


def write_long(spec: SweepSpec, folder: Path, results: Sequence[TrialResult], say: Say) -> None:
    """Write the result and the curves of a long run into its folder.

    Raises:
        FileError: the folder cannot be written.
    """
    remove_unfinished(folder, (LONG_RESULTS, LONG_PICTURE))
    for r in results[:1]:
        table = metrics_of(folder / r.run_dir)
        about = {"checkpoint_dir": r.checkpoint_dir, "run_dir": r.run_dir, "max_steps": r.max_steps}
        _write(folder / LONG_RESULTS, {**result_of(r, table, model_name(spec)), **about})
        title = f"{model_name(spec)}, {r.steps:,} of {r.max_steps:,} steps ({r.status.replace('_', ' ')})"
        save(long_figure(drawn_of(r, table, wins=False), title), folder / LONG_PICTURE)
        say(f"long run: {folder / LONG_RESULTS}; curves: {folder / LONG_PICTURE}")


def result_of(r: TrialResult, table: Table | None, model: str) -> dict[str, Any]:
    """A run by the names of `lr_…_result.json`; null what is not known or not finite.

    `val_…` are of the last evaluation, `best_val_loss` is what decides.
    """
    rates = table.of("lr")[1].tolist() if table is not None else []
    perplexity = math.exp(r.final_val_loss) if r.final_val_loss is not None and r.final_val_loss < 700 else None
    told = {
        "model_name": model,
        "learning_rate": r.lr,
        "status": r.status,
        "val_loss": r.final_val_loss,
        "val_accuracy": r.final_val_accuracy,
        "val_perplexity": perplexity,
        "best_val_loss": r.best_val_loss,
        "best_step": r.best_step,
        "final_train_loss": r.final_train_loss,
        "final_lr": rates[-1] if rates else None,
        "total_steps": r.steps,
        "early_stopped": r.status == "early_stopped",
        "training_time_minutes": round((r.elapsed_time or 0.0) / 60, 4),
        "parameter_count": r.parameters,
        "parameters_millions": None if r.parameters is None else r.parameters / 1e6,
        "seed": r.seed,
        "changes": dict(r.changes),
        "error": r.error,
    }
    return {k: finite(v) for k, v in told.items()}


def recommendation(results: Sequence[TrialResult], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `lr_recommendation.json` says; of a search that is not done, as far as it is."""
    best = best_of(results)
    chosen = next((dict(e) for r, e in zip(results, entries, strict=True) if r is best), None)
    return {
        "best_learning_rate": best.lr if best else None,
        "best_result": chosen,
        "all_results": [dict(e) for e in entries],
        "search_time_minutes": _minutes(results),
        "recommendation": advice(results, best),
    }


def advice(results: Sequence[TrialResult], best: TrialResult | None) -> str:
    """The recommendation in words, and what speaks against it."""
    parts = []
    seeds = len({r.seed for r in results}) > 1
    group = best_repeats(results)
    open_ = [r for r in results if r.status not in (*DONE, "failed")]
    if best is None or group is None:
        ended = ", ".join(f"{short(r.lr)} {r.status.replace('_', ' ')}" for r in results)
        whole = any(r.status in RANKED and r.best_val_loss is not None for r in results)
        why = "no rate has ended with one for every seed" if whole else "no run has ended with a validation loss"
        parts.append(f"No learning rate can be recommended: {why} ({ended}).")
    elif len(group.runs) > 1:
        losses = " and ".join(f"{r.best_val_loss:.4f}" for r in group.runs)
        parts.append(
            f"Train with a learning rate of {short(best.lr)}: its best validation loss, {group.mean:.4f} in the mean "
            f"of {len(group.runs)} seeds ({losses}), is the lowest of the rates that ended well with every seed."
        )
    else:
        parts.append(
            f"Train with a learning rate of {short(best.lr)}: its best validation loss of {len(results)} runs is the "
            f"lowest, {best.best_val_loss:.4f} at step {best.best_step:,}."
        )
    if best is not None:
        rates = sorted({r.lr for r in results})
        if len(rates) > 1 and best.lr in (rates[0], rates[-1]):
            side = "low" if best.lr == rates[0] else "high"
            parts.append(f"It is the {side}est rate tried; a {side}er one may be better.")
    early = [_rate(r, seeds) for r in results if r.status == "early_stopped"]
    if early:
        parts.append(f"Early stopping ended {', '.join(early)}; their best loss counts, not the last.")
    if lost := [f"{_rate(r, seeds)} ({r.status})" for r in results if r.status in ("diverged", "failed")]:
        parts.append(f"Out of the running: {', '.join(lost)}.")
    if open_ and best is not None:
        parts.append(f"Provisional: {len(open_)} of {len(results)} runs have not ended.")
    return " ".join(parts)


def _rate(r: TrialResult, seeds: bool) -> str:
    """`seeds`: whether there are several, so that the rate alone names no run."""
    return f"{short(r.lr)} with seed {r.seed}" if seeds else short(r.lr)


def drawn_of(r: TrialResult, table: Table | None, *, wins: bool) -> Drawn:
    """A run as the pictures take it."""
    label = short(r.lr) + _others(r, ", ")
    return Drawn(label, r.lr, r.status, r.best_val_loss, r.best_step, r.final_val_loss, wins, table)


def result_file(r: TrialResult) -> str:
    """The name of a run's file: the rate in two digits where that says it exactly, and whatever else differs.

    As `lr_1.00e-04_result.json`, `lr_2.512e-4_result.json`, `lr_1.00e-03_seed2_result.json`.
    """
    padded = f"{r.lr:.2e}"
    exact = padded if float(padded) == r.lr else short(r.lr)
    return f"lr_{exact}{_others(r, '_')}_result.json"


def model_name(spec: SweepSpec) -> str:
    """What the results call the model: its preset, and whether it is the dense twin of that."""
    name = str(spec.base.get("preset") or spec.name)
    return f"{name}-dense" if spec.base.get("dense_twin") and not name.endswith("-dense") else name


def _others(r: TrialResult, between: str) -> str:
    """What besides the rate makes a run different; slashes of a path would make folders."""
    parts = [r.variant] if r.variant else []
    parts += [f"{k}{short(v)}".replace("/", "_") for k, v in r.changes.items() if k != "lr"]
    return "".join(between + p for p in parts)


def _minutes(results: Sequence[TrialResult]) -> float:
    """Of all runs together, those before a resume included."""
    return round(sum(r.elapsed_time or 0.0 for r in results) / 60, 4)


def _write(path: Path, about: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(about, indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n")
