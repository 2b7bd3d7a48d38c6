"""How one run of a sweep stands, told from the journal and from what the run left in its folder.

In: a trial, its place in the journal, its folder. Out: its `TrialResult`. Called by `sweep` and `adopt`; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytekiln.config import RunConfig, load_config
from bytekiln.errors import BytekilnError
from bytekiln.metrics import read_metrics
from bytekiln.sweep.axes import short
from bytekiln.sweep.folder import LIMITS, RUNS, differences, run_folder
from bytekiln.sweep.journal import Place
from bytekiln.sweep.process import TRIAL
from bytekiln.sweep.results import DONE, TrialResult, of_run, read_run
from bytekiln.sweep.spec import Trial

EXIT_STATUS = {"completed": 0, "early_stopped": 0, "diverged": 3}
GONE = "its result is gone"
UNREADABLE = "its result cannot be read"
ANOTHER = "its result is that of another run"


def view(folder: Path, trial: Trial, place: Place) -> TrialResult:
    """How a trial stands.

    A run whose `result.json` is damaged, gone though it ended, or of another run, is shown as failed, with the reason.
    """
    run, done = run_folder(folder, trial.name), place.done
    found, bad, why = None, "", UNREADABLE
    try:
        found = read_run(run)
    except BytekilnError as exc:
        bad = str(exc)
    if found is not None and (bad := of_another(run, trial.config)):
        found, why = None, ANOTHER
    told: dict[str, Any]
    if place.holder is not None:
        told = {"status": "running", **so_far(run)}
    elif done is None:
        told = _open(trial, run, found, (why, bad) if bad else None, place.attempt)
    elif done["status"] in DONE:
        if found is None:
            told = {"status": "failed", "why": why if bad else GONE}
            told["error"] = bad or f"{run / 'result.json'}: no such file"
        else:
            told = {"status": found["status"] if found["status"] in DONE else done["status"], **of_run(found)}
            told["why"] = str(found.get("why", ""))
    else:
        ours = found is not None and found["status"] == done["status"]
        told = {"elapsed_time": done.get("elapsed"), **(of_run(found) if ours and found else so_far(run))}
        told |= {"status": done["status"], "why": done.get("why") or "", "error": done.get("error")}
    if done is not None:
        told["exit_status"] = done.get("exit_status")
    return TrialResult(**{**_of_trial(trial, run), **told})


def _open(
    trial: Trial, run: Path, found: dict[str, Any] | None, bad: tuple[str, str] | None, attempt: int
) -> dict[str, Any]:
    """Of a trial that nobody runs, and of which nobody has written that it ended; `bad`: why its result is none."""
    if bad and attempt == 0:
        return {"status": "failed", "why": bad[0], "error": bad[1]}
    if found is None:
        known = so_far(run)
        return {"status": "interrupted" if known else "pending", **known}
    status, told = found["status"], {**of_run(found), "max_steps": trial.config.training.max_steps}
    if status in DONE and not ended(run, trial.config):
        return {**told, "status": "pending"}  # it may go further now
    if status in DONE:
        told["exit_status"] = EXIT_STATUS[status]
    return {**told, "status": status, "why": str(found.get("why", ""))}


def of_another(run: Path, config: RunConfig) -> str:
    """What shows that a run's folder has another run's result than that of `config`; empty: nothing does.

    The sweep of before may have been replaced, or the folder copied.
    """
    path = run / "config.toml"
    try:
        stored = load_config(path) if path.exists() else None
    except BytekilnError:
        return ""
    for field, found, wanted in differences(stored, config, stored) if stored is not None else ():
        return f"{path}: {field}: found {found}; expected {wanted} (--overwrite replaces the sweep)"
    return ""


def ended(run: Path, config: RunConfig) -> bool:
    """Whether the run's own result, and no other run's, says that it reached the end that its config has now."""
    try:
        found = read_run(run)
        stored = load_config(run / "config.toml").flat() if (run / "config.toml").exists() else {}
    except BytekilnError:
        return False
    if found is None or found["status"] not in DONE or of_another(run, config):
        return False
    wanted = config.flat()
    if found["status"] != "diverged" and found.get("max_steps") != wanted["max_steps"]:
        return False  # killed while it went further than before: the config is new, the result is not
    return found["status"] == "diverged" or all(stored.get(n, wanted[n]) == wanted[n] for n in LIMITS)


def so_far(run: Path) -> dict[str, Any]:
    """What the metrics of a run that has no result tell; nothing where there are none."""
    try:
        rows = read_metrics(load_config(run / TRIAL).output.metrics)
    except BytekilnError:
        return {}
    if not rows:
        return {}
    seen = [(r.val_loss, r.step) for r in rows if r.val_loss is not None]
    best = min((s for s in seen if s[1] > 0), default=(None, None))
    return {
        "steps": rows[-1].step,
        "elapsed_time": rows[-1].elapsed_s,
        "tokens": rows[-1].tokens,
        "final_train_loss": rows[-1].loss,
        "final_val_loss": seen[-1][0] if seen else None,
        "best_val_loss": best[0],
        "best_step": best[1],
    }


def _of_trial(trial: Trial, run: Path) -> Mapping[str, Any]:
    """What is known of a trial before it runs."""
    output = trial.config.with_(out_dir=str(run)).output
    final = output.checkpoints / "checkpoint_final"
    optimizer = trial.config.optimizer
    return {
        "name": trial.name,
        "variant": trial.variant,
        "changes": dict(trial.changes),
        "lr": optimizer.lr,
        "lr_str": short(optimizer.lr),
        "min_lr": float(f"{optimizer.floor_lr:.12g}"),
        "seed": trial.seed,
        "status": "pending",
        "checkpoint_dir": shown_path(output.checkpoints),
        "final_checkpoint": shown_path(final) if final.is_dir() else None,
        "tensorboard_dir": shown_path(output.tensorboard_folder) if output.tensorboard else None,
        "run_dir": f"{RUNS}/{trial.name}",
        "max_steps": trial.config.training.max_steps,
    }


def shown_path(path: Path) -> str:
    """Relative to the working directory where it lies below it, as the user's document has it; else absolute."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
