"""What a search writes down: `search.json` as it goes on, `lr_recommendation.json` at its end (docs/formats.md).

In: a `Search`. Out: both files, whole at any moment. Called by `cli_search`; imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bytekiln.config import stated_in
from bytekiln.errors import FileError, FormatError, MismatchError
from bytekiln.metrics import write_atomically
from bytekiln.search.plan import ENDED_WELL, GRID_POINTS, GRID_SEEDS, LOST, Plan, not_ranked, rounded
from bytekiln.search.stages import Search
from bytekiln.sweep.axes import short
from bytekiln.sweep.results import TrialResult
from bytekiln.sweep.spec import SweepSpec

STATE, RECOMMENDATION, CONFIG = "search.json", "lr_recommendation.json", "base.toml"
MAY_CHANGE = ("budget", "widenings", "confidence")
"""Fields of a plan with which a search can go on after they were changed."""


def base_of(spec: SweepSpec) -> dict[str, Any]:
    """The run that is searched for, with what its config file says in the place of the path."""
    base: dict[str, Any] = dict(spec.base)
    if "config" in base:
        base["config"] = stated_in(Path(str(base["config"])))
    return base


def state_of(search: Search, base: Mapping[str, Any], elapsed_s: float) -> dict[str, Any]:
    """Everything about a search that is not in its runs' own files."""
    return {
        "format": "bytekiln-search",
        "version": 1,
        "status": search.status,
        "stage": search.stage,
        "elapsed_s": round(elapsed_s, 3),
        "base": dict(base),
        "plan": dataclasses.asdict(search.plan),
        "range_test": search.found_range or None,
        "runs": [
            {
                "stage": r.stage,
                "name": r.name,
                "lr": r.lr,
                "seed": r.seed,
                "status": r.status,
                "steps": r.steps,
                "best_val_loss": r.best[0] if r.best else None,
                "best_step": r.best[1] if r.best else None,
                "given_up": r.given_up or None,
                "why": r.why,
            }
            for r in search.runs.values()
        ],
        "widened": search.widened,
        "fit": dataclasses.asdict(search.fit) if search.fit else None,
        "last_fit": dataclasses.asdict(search.last_fit) if search.last_fit else None,
        "predicted_loss": search.predicted_loss,
        "recommended": search.recommended,
        "confirmed_loss": search.confirmed_loss,
        "notes": search.notes,
        "steps": search.steps,
    }


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Replace `search.json`.

    Raises:
        FileError: the folder cannot be written; the old file stays.
    """
    write_atomically(path, to_json(state))


def to_json(about: Mapping[str, Any]) -> bytes:
    """As both files hold it; what is not finite is null."""
    return json.dumps(_plain(about), indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def read_state(folder: Path) -> dict[str, Any] | None:
    """A folder's `search.json`; None: it has none.

    Raises:
        FileError: it cannot be read.
        FormatError: it is no search's.
    """
    path = folder / STATE
    try:
        found = json.loads(path.read_bytes())
        if (found["format"], found["version"]) != ("bytekiln-search", 1):
            raise ValueError(f"found {found['format']}, version {found['version']}")
        if not isinstance(found["plan"], dict) or not isinstance(found["base"], dict):
            raise ValueError("found no plan")
        return {**found, "elapsed_s": float(found["elapsed_s"])}
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected the state of a search") from None
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        way_out = "without it, the command of the first time makes it anew and keeps the runs; --overwrite begins anew"
        raise FormatError(f"{path}: {exc}; expected the state of a search ({way_out})") from None


def check_same(stored: Mapping[str, Any], base: Mapping[str, Any], plan: Plan, path: Path) -> None:
    """Refuse to go on with another search's runs.

    Raises:
        MismatchError: its base or its plan differ (says in what).
    """
    now = {f"plan.{k}": v for k, v in _plain(dataclasses.asdict(plan)).items() if k not in MAY_CHANGE}
    was = {f"plan.{k}": v for k, v in stored["plan"].items() if k not in MAY_CHANGE}
    now |= _flat(_plain(base))
    was |= _flat(stored["base"])
    for key in {**was, **now}:
        if was.get(key) != now.get(key):
            raise MismatchError(
                f"{path}: {key}: found {was.get(key)}; expected {now.get(key)} "
                "(--folder takes another place, --overwrite replaces the search)"
            )


def _flat(base: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names, those of a config's fields among them."""
    inner = base.get("config")
    fields = {f"base.config.{k}": v for k, v in inner.items()} if isinstance(inner, Mapping) else {}
    return {f"base.{k}": v for k, v in base.items() if not isinstance(v, Mapping)} | fields


def recommendation(search: Search, results: Sequence[TrialResult], elapsed_s: float, **more: Any) -> dict[str, Any]:
    """`lr_recommendation.json`: what was found, how sure it is, what it cost, what was given up and why.

    The fields of the user's document (best_learning_rate, best_result, all_results, search_time_minutes,
    recommendation) are among them.
    """
    fit, plan = search.last_fit or search.fit, search.plan
    best = search.recommended
    by_run = {(r.lr, r.seed): r for r in results}
    mine = [r for r in search.runs.values() if r.lr == best and r.status in ENDED_WELL and r.best]
    won = min(mine, key=lambda r: r.best[0] if r.best else math.inf, default=None)
    about = {
        "format": "bytekiln-lr-recommendation",
        "version": 1,
        "status": search.status,
        "best_learning_rate": best,
        "lr_str": short(best) if best else None,
        "recommendation": sentence(search),
        "interval": None
        if fit is None
        else {
            "low": rounded(fit.low),
            "high": rounded(fit.high),
            "confidence": fit.confidence,
            "bounded": fit.bounded,
            "method": "Fieller's interval of the parabola's minimum, a level for each seed",
        },
        "predicted_loss": search.predicted_loss,
        "confirmed_loss": search.confirmed_loss,
        "neighbours": [{"lr": lr, "val_loss": loss} for lr, loss in search.neighbours],
        "fit": None if fit is None else dataclasses.asdict(fit),
        "cost": {
            "steps": search.steps,
            "grid_steps": plan.grid_steps,
            "share_of_grid": search.steps / plan.grid_steps,
            "grid": f"{GRID_POINTS} rates x {GRID_SEEDS} seeds x {plan.max_steps} steps",
            "runs": len(search.runs),
        },
        "pruned": [
            {"lr": r.lr, "seed": r.seed, "step": r.steps, "val_loss": r.best[0] if r.best else None, "why": r.given_up}
            for r in search.runs.values()
            if r.given_up
        ],
        "not_ranked": [
            {"lr": r.lr, "seed": r.seed, "status": r.status, "why": r.why}
            for r in search.runs.values()
            if r.status in LOST
        ],
        "range_test": search.found_range or None,
        "widened": search.widened,
        "notes": search.notes,
        "best_result": None if won is None else _result(won.lr, won.seed, search, by_run),
        "all_results": [_result(lr, seed, search, by_run) for lr, seed in sorted(search.runs)],
        "search_time_minutes": elapsed_s / 60,
        **more,
    }
    return dict(_plain(about))


def sentence(search: Search) -> str:
    """The answer for a person."""
    fit, best = search.last_fit or search.fit, search.recommended
    lost = "; ".join(not_ranked(search.runs.values()).values())
    if search.status == "failed" or best is None:
        why = search.notes[-1] if search.notes else "the search is not done"
        named = f": {lost}" if search.status == "unconfirmed" else ""
        return f"No learning rate can be recommended: {why}{named}"
    share = f"{100 * search.steps / search.plan.grid_steps:.0f} % of the steps of a full grid"
    if fit is None or search.confirmed_loss is None:
        return f"Learning rate {short(best)}, not confirmed yet"
    sure = (
        f"{100 * fit.confidence:g} % interval {short(rounded(fit.low))} to {short(rounded(fit.high))}"
        if fit.bounded
        else "its interval is the whole range that was searched: the runs do not tell the rates near it apart"
    )
    held = (
        "confirmed at full length beside its neighbours"
        if search.status == "confirmed"
        else "not confirmed by its neighbours"
    )
    return (
        f"Use learning rate {short(best)} ({sure}): validation loss {search.confirmed_loss:.4f}, {held}, for {share}."
        + (f" Note: {lost}." if lost else "")
    )


def _result(lr: float, seed: int, search: Search, by_run: Mapping[tuple[float, int], TrialResult]) -> dict[str, Any]:
    r = search.runs[lr, seed]
    told = by_run.get((lr, seed))
    return {
        "learning_rate": lr,
        "lr_str": short(lr),
        "seed": seed,
        "status": r.status,
        "stage": r.stage,
        "best_val_loss": r.best[0] if r.best else None,
        "best_step": r.best[1] if r.best else None,
        "val_loss": told.final_val_loss if told else (r.curve[-1][1] if r.curve else None),
        "val_accuracy": told.final_val_accuracy if told else None,
        "total_steps": r.steps,
        "early_stopped": r.status == "early_stopped",
        "final_train_loss": told.final_train_loss if told else None,
        "training_time_minutes": told.elapsed_time / 60 if told and told.elapsed_time else None,
        "parameter_count": told.parameters if told else None,
        "pruned": r.given_up or None,
    }


def _plain(value: Any) -> Any:  # noqa: ANN401 - any value of JSON
    """Tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
