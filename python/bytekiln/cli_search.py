"""`lm-sweep search`: find a learning rate by few runs, and say how sure it is. Argument list in, exit status out.

Called by `cli_sweep`. torch is loaded for the range test and for the times of a dry run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytekiln.config import RunConfig
from bytekiln.console import error_console_line, human_count, human_time, notice, table
from bytekiln.errors import ConfigError, OutputExistsError
from bytekiln.metrics import write_atomically
from bytekiln.run_flags import spell_switches
from bytekiln.search.asked import asked, is_lost, make_anew, search_parser, target_of
from bytekiln.search.files import (
    CONFIG,
    RECOMMENDATION,
    STATE,
    base_of,
    check_same,
    read_state,
    recommendation,
    sentence,
    state_of,
    to_json,
    write_state,
)
from bytekiln.search.plan import STAGES, Plan
from bytekiln.search.runs import SweepRunner, check_base, range_tester, retried
from bytekiln.search.stages import Search
from bytekiln.search.transfer import off_by, predict
from bytekiln.sweep.folder import LOCK, coordinating, remove_sweep, trouble
from bytekiln.sweep.locks import remove_unfinished
from bytekiln.sweep.progress import ProgressBoard
from bytekiln.sweep.ready import checked_data
from bytekiln.sweep.spec import SweepSpec, Trial

PICTURE = "lr_search.png"
PARTS = ("coarse", "seeds", "confirm")
"""Folders of a search that are sweeps."""
TRANSFER_RUNS = 10
"""Full runs of the target that a transfer may cost: three rates, them again, the recommended one, and some to widen."""


def search(argv: list[str]) -> int:
    """0 done, 1 no run ended well, 4 some runs failed or no rate is whole, 130 and 143 interrupted."""
    parser = search_parser(everything="--help-all" in argv)
    options = parser.parse_args(spell_switches(argv))
    base, plan, folder = asked(options)
    runner_args: dict[str, Any] = {"jobs": options.jobs, "retry": retried(options.retry)}
    made = SweepRunner(base, folder, plan).config()
    check_base(made)
    target = target_of(options, base) if options.transfer_to else None
    if target is not None:
        predict(1e-3, made, target[1])  # refused before anything is trained
    if options.dry_run:
        print(dry_run(plan, made, options.jobs))
        if target is not None:
            steps = target[1].training.max_steps
            print("\nand in transfer/, round the rate that is predicted from the one found:\n")
            print(dry_run(_plan_there(plan, 1.0, steps), target[1], options.jobs))
        return 0
    checked_data([Trial("search", {}, None, 0, c) for c in (made, *([target[1]] if target else []))])
    _open(folder, base, plan, overwrite=options.overwrite)
    if options.until != STAGES[-1] and _is_beyond(folder, options.until):
        if runner_args["retry"]:
            raise ConfigError(f"--retry: found it with --until {options.until} on a search that is beyond that stage; "
                              "expected it without --until")  # fmt: skip
        print(f"the search is beyond {options.until}, and is left as it is; state: {folder / STATE}")
        return 0
    with coordinating(folder), ProgressBoard(notice) as board:
        found, status = _one(base, plan, folder, board, options.until, runner_args)
        if target is None or found.recommended is None or found.status not in ("confirmed", "unconfirmed"):
            return status
        return max(status, _transfer(found, made, target, plan, folder, board, runner_args))


def _is_beyond(folder: Path, stage: str) -> bool:
    """Whether a search has nothing left to do up to a stage."""
    stored = read_state(folder)
    if stored is None or stored.get("stage") not in STAGES:
        return False
    return STAGES.index(stored["stage"]) > STAGES.index(stage)


def _one(
    base: SweepSpec, plan: Plan, folder: Path, board: ProgressBoard, until: str, runner_args: Mapping[str, Any]
) -> tuple[Search, int]:
    """A search from where it stands to the end of a stage, its files and its words."""
    from bytekiln.search.picture import draw_search
    from bytekiln.search.range_test import read_range_test

    began = time.monotonic()
    remove_unfinished(folder, (STATE, RECOMMENDATION, PICTURE, CONFIG))
    remove_unfinished(folder / "range_test")
    stored = read_state(folder)
    before = stored["elapsed_s"] if stored else 0.0
    described = base_of(base)
    runner = SweepRunner(base, folder, plan, say=board.say, board=board, **runner_args)

    def elapsed() -> float:
        return before + time.monotonic() - began

    def save(s: Search) -> None:
        write_state(folder / STATE, state_of(s, described, elapsed()))
        runner.tell_given_up([r for r in s.runs.values() if r.given_up])

    found = Search(plan, runner, range_tester(runner, plan, board.say), save=save, say=board.say).run(until)
    results = runner.results()
    about = recommendation(found, results, elapsed())
    if found.status != "stopped":
        write_atomically(folder / RECOMMENDATION, to_json(about))
    if found.runs:
        draw_search(found, folder / PICTURE, read_range_test(folder / "range_test"))
    if found.status == "failed":
        error_console_line(ConfigError(sentence(found)))
        return found, 1
    _tell(found, folder)
    nothing = found.status == "unconfirmed" and found.recommended is None
    return found, 4 if nothing or any(r.status == "failed" for r in found.runs.values()) else 0


def _tell(found: Search, folder: Path) -> None:
    """What was found, on stdout."""
    if found.status == "stopped":
        if found.stage == "range_test":
            print(f"range test: {found.found_range['why']}")
        print(f"stopped behind {found.stage}, as asked; the same command without --until goes on")
        print(f"state: {folder / STATE}")
        return
    rows: list[tuple[str, ...]] = [("lr", "seed", "stage", "status", "steps", "best val", "")]
    for r in sorted(found.runs.values(), key=lambda r: (r.lr, r.seed)):
        loss = f"{r.best[0]:.4f}" if r.best else ""
        rows.append((f"{r.lr:.3g}", str(r.seed), r.stage, "given up" if r.given_up else r.status, f"{r.steps:,}", loss,
                     r.given_up or (r.why if r.status in ("diverged", "failed") else "")))  # fmt: skip
    print(table(rows, indent=""))
    for note in found.notes:
        print(f"note: {note}")
    print(f"\n{sentence(found)}\n\nrecommendation: {folder / RECOMMENDATION}\npicture: {folder / PICTURE}")


def _transfer(
    found: Search,
    made: RunConfig,
    target: tuple[SweepSpec, RunConfig],
    plan: Plan,
    folder: Path,
    board: ProgressBoard,
    runner_args: Mapping[str, Any],
) -> int:
    """Predict the rate of the target, and search beside it at full length."""
    spec, config = target
    assert found.recommended is not None
    said = predict(found.recommended, made, config)
    board.say(f"transfer: {said.rule}")
    for line in said.warnings:
        board.say(f"transfer: {line}")
    there = _plan_there(plan, said.lr, config.training.max_steps)
    place = folder / "transfer"
    if is_lost(place):
        make_anew(place, spec, there, overwrite=False)
    _open(place, spec, there, overwrite=False)
    second, status = _one(spec, there, place, board, STAGES[-1], runner_args)
    if second.recommended is None:
        return status
    off = off_by(said.lr, second.recommended, plan.factor)
    within = abs(off) <= 1
    about = {**dataclasses.asdict(said), "found": second.recommended, "grid_steps_off": off, "within_one_step": within}
    runner = SweepRunner(spec, place, there)
    told = recommendation(second, runner.results(), read_state(place)["elapsed_s"], transfer=about)  # type: ignore[index]
    write_atomically(place / RECOMMENDATION, to_json(told))
    print(f"transfer: predicted {said.lr:g}, found {second.recommended:g}: {abs(off):.2f} steps of a factor "
          f"{plan.factor:g} {'above' if off > 0 else 'below'}")  # fmt: skip
    return status


def _plan_there(plan: Plan, lr: float, steps: int) -> Plan:
    """The search round a predicted rate: three rates at full length, two seeds, without which noise has no measure."""
    seeds = plan.seeds[:2] if len(plan.seeds) > 1 else (plan.seeds[0], plan.seeds[0] + 1)
    low, high = min(plan.low, lr) / 100, max(plan.high, lr * plan.factor**2)
    return Plan(steps, seeds, points=3, factor=plan.factor, centre=lr, low=low, high=high, keep=(),
                budget=TRANSFER_RUNS * steps, confidence=plan.confidence)  # fmt: skip


def dry_run(plan: Plan, config: RunConfig, jobs: int) -> str:
    """The stages, their runs, and what they would need."""
    from bytekiln.cli_plan import with_vocabulary
    from bytekiln.plan import make_plan

    made = make_plan(with_vocabulary(config), largest=False)
    full = plan.max_steps
    stages: list[tuple[str, str, int]] = []
    if plan.range_steps:
        stages.append(("range test", f"one run, lr {plan.low:g} to {plan.high:g}", plan.range_steps))
    before, alive = 0, plan.points
    for rung, keep in plan.stops:
        what = f"{alive} rates to step {rung:,}" + ("" if keep else ", the end")
        stages.append(("coarse", what, alive * (rung - before)))
        before, alive = rung, min(keep, alive) if keep else alive
    others = len(plan.seeds) - 1
    room = int((plan.limit - plan.least_steps) / full)
    repeats = min(3 * others, room)
    if others:
        fit = "" if repeats == 3 * others else f", {repeats} of {3 * others} runs fit in the budget"
        what = f"{others} more seed{'s' * (others > 1)} at the best rate and its neighbours{fit}"
        stages.append(("seeds", what, repeats * full))
    stages.append(("fit", "parabola in ln(lr), interval", 0))
    confirming = 1 + min(others, room - repeats)
    what = f"the recommended rate at full length, {confirming} seed{'s' * (confirming > 1)}"
    stages.append(("confirm", what, confirming * full))
    total = sum(steps for _, _, steps in stages)

    def line(name: str, what: str, steps: int) -> tuple[str, ...]:
        share = steps / full
        flops = human_count(made.flops_per_token * made.length.tokens * share)
        return name, what, f"{steps:,}", f"{share:.2f}", flops, human_time(made.time.run_s * share)

    rows: list[tuple[str, ...]] = [("stage", "runs", "steps", "full runs", "FLOPs", "time")]
    rows += [line(*s) for s in stages]
    rows += [line("all", "", total), line("full grid", "13 rates x 3 seeds", plan.grid_steps)]
    return (
        f"{table(rows, indent='')}\n\n{made.parameters:,} parameters; {100 * total / plan.grid_steps:.0f} % of the "
        f"full grid's steps, without rates that widen the grid; never more than {int(plan.limit):,} steps; "
        f"time {made.time.basis}, {jobs} at once"
    )


def _open(folder: Path, base: SweepSpec, plan: Plan, *, overwrite: bool) -> None:
    """Begin a search's folder, or go on with the one of the same search."""
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(f"{folder}: found a file; expected a folder for the search")
        replaced = overwrite and (folder / STATE).exists()
        if replaced:
            with coordinating(folder):
                _remove(folder)
        stored = read_state(folder)
        if stored is not None:
            check_same(stored, base_of(base), plan, folder / STATE)
        elif not replaced and (strange := _strangers(folder)):
            raise OutputExistsError(
                f"{folder}: found {strange[0]} and no search; expected a free folder: --folder takes another"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if stored is None:
            empty = Search(plan, lambda _: [])
            write_state(folder / STATE, state_of(empty, base_of(base), 0.0))
    except OSError as exc:
        raise trouble(folder, exc) from None


def _strangers(folder: Path) -> list[str]:
    """What is in a folder in which no search was begun; what one that was removed has left behind is nothing."""
    return sorted(p.name for p in folder.iterdir() if not _is_emptied(p)) if folder.is_dir() else []


def _is_emptied(path: Path) -> bool:
    """Whether it is a lock, or a folder of ours with nothing but locks in it."""
    if path.name == LOCK:
        return True
    ours = (*PARTS, "range_test", "transfer")
    return path.name in ours and path.is_dir() and all(p.is_dir() or _is_lock(p) for p in path.rglob("*"))


def _is_lock(path: Path) -> bool:
    return path.name == LOCK or (path.name.startswith(".") and path.suffix == ".lock")


def _remove(folder: Path) -> None:
    """What a search wrote, and nothing else."""
    for stage in PARTS:
        if (folder / stage).is_dir():
            remove_sweep(folder / stage)
    test = [f"range_test/range_test.{kind}" for kind in ("json", "csv", "png")]
    for name in (*test, PICTURE, RECOMMENDATION, CONFIG, STATE):
        (folder / name).unlink(missing_ok=True)
    if (folder / "transfer" / STATE).exists() or is_lost(folder / "transfer"):
        _remove(folder / "transfer")
