"""`lm-sweep`: runs that differ in something, side by side. Argument list in, exit status out.

Called by `cli`, which turns errors into one line. The words `search`, `worker` and `adopt` come first; the names of
pipelines are those of `experiments.catalogue`. torch is imported only to plan a dry run.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytekiln.config import RunConfig, canonical
from bytekiln.console import Parser, Progress, human_bytes, human_count, human_time, notice, table
from bytekiln.errors import BytekilnError, ConfigError, MissingExtraError
from bytekiln.experiments import catalogue
from bytekiln.experiments.lr_search import whenever_it_ends
from bytekiln.report.build import analysed
from bytekiln.run_flags import spell_switches
from bytekiln.section import Value
from bytekiln.sweep.adopt import adopt as adopt_run
from bytekiln.sweep.asked import MANY_RUNS, asked, given_axes, set_fields, sweep_parser, whole
from bytekiln.sweep.coordinate import check_retry, run_sweep, work
from bytekiln.sweep.detach import check, detach
from bytekiln.sweep.folder import check_idle, coordinating, open_folder
from bytekiln.sweep.journal import Holder
from bytekiln.sweep.progress import ProgressBoard, number
from bytekiln.sweep.ready import checked_data
from bytekiln.sweep.results import RANKED, TrialResult, best_repeats
from bytekiln.sweep.spec import SweepSpec, Trial, changed, load_spec, sweep_presets, trials_of
from bytekiln.sweep.table import typed

SHAPELESS = set(
    "lr min_lr min_lr_ratio seed run_name out_dir save_dir checkpoint_dir metrics_path tensorboard_dir weight_decay "
    "beta1 beta2 eps momentum decay_lr decay_steps decay_fraction warmup_steps warmup_fraction warmup_rule schedule "
    "ema_decay embedding_lr_scale head_lr_scale scalar_lr_scale init head_init zero_init_projections sampling "
    "rope_theta norm_eps".split()
)
"""Fields that change nothing of what a run costs."""
MOST_BASES = 3
"""Of what times rest on, so many are said."""


def sweep(argv: list[str]) -> int:
    """`lm-sweep`: 0 done, 1 every run failed, 4 some failed, 130 and 143 interrupted.

    Of a search that ends without a rate to recommend: 1, or 4 where some run ended well.
    """
    words: dict[str, Callable[[list[str]], int]] = {"worker": _worker, "adopt": _adopt, "search": _search}
    if argv and argv[0] in words:
        return words[argv[0]](argv[1:])
    if argv and (pipeline := catalogue.pipeline(argv[0])) is not None:
        return pipeline(argv[1:])
    parser = sweep_parser(catalogue.PIPELINES, everything="--help-all" in argv)
    options = parser.parse_args(spell_switches(argv))
    if options.source is None:
        raise ConfigError(f"lm-sweep: found no sweep; expected a preset ({', '.join(sweep_presets())}), file or folder")
    retry = [s for text in options.retry for s in text.replace(",", " ").split()]
    check_retry(retry)
    spec, folder = asked(options)
    if spec.count() > MANY_RUNS and not options.yes:
        raise ConfigError(f"{spec.name}: found {spec.count():,} runs; expected at most {MANY_RUNS:,}, or --yes")
    trials = trials_of(spec)
    if options.dry_run:
        print(dry_run(trials, options.jobs or 1))
        return 0
    _check_ready(spec, trials)
    if options.ray and options.stack > 1:
        raise ConfigError("--stack: found it with --ray, whose tasks are single runs; expected one of them")
    if options.detach:
        return _detached(options.detach, argv, spec, folder, overwrite=options.overwrite)
    start: dict[str, Any] = {}
    jobs = options.jobs or 1
    if options.ray:
        from bytekiln.sweep.ray import RayStart

        ray = start["start"] = RayStart()
        jobs = options.jobs or ray.jobs()
        start["threads"] = ray.threads(jobs)
    open_folder(spec, folder, overwrite=options.overwrite)
    notice(f"{len(trials)} run{'s' * (len(trials) != 1)} in {folder}, {jobs} at once")
    after = catalogue.after(spec)
    with whenever_it_ends(after, spec, folder, notice), analysed(folder, notice), ProgressBoard(notice) as board:
        results = run_sweep(
            trials, folder, jobs=jobs, retry=retry, results=spec.results_name, say=board.say, board=board,
            stack=options.stack, **start,
        )  # fmt: skip
    status = catalogue.status(spec, results)
    print(summary(results))
    print(f"\nresults: {folder / spec.results_name}")
    if options.then:
        _then(options.then, status)
    return status


def summary(results: Sequence[TrialResult]) -> str:
    """How the runs ended, as a table, and which was best."""
    rows: list[tuple[str, ...]] = [("run", "status", "best val", "at step", "final val", "steps", "time")]
    rows += [
        (
            r.name,
            r.status,
            number(r.best_val_loss),
            "" if r.best_step is None else f"{r.best_step:,}",
            number(r.final_val_loss),
            f"{r.steps:,}",
            human_time(r.elapsed_time) if r.elapsed_time else "",
        )
        for r in results
    ]
    best, troubles = best_repeats(results), [r for r in results if r.status in ("failed", "interrupted")]
    lines = [table(rows, indent="")]
    lines += [f"{r.name}: {r.error or r.why}" for r in troubles]
    if best is not None and len(best.runs) > 1:
        lines += ["", f"best: {best.name}, validation loss {number(best.mean)}, the mean of {len(best.runs)} seeds"]
    elif best is not None:
        lines += ["", f"best: {best.name}, validation loss {number(best.mean)} at step {best.best.best_step:,}"]
    elif any(r.status in RANKED and r.best_val_loss is not None for r in results):
        lines += ["", "best: none; of no setting has every seed ended with a validation loss"]
    else:
        lines += ["", "best: none; no run has ended with a validation loss"]
    return "\n".join(lines)


def dry_run(trials: Sequence[Trial], jobs: int) -> str:
    """What every run would need, and all of them together."""
    from bytekiln.cli_plan import with_vocabulary
    from bytekiln.plan import Plan, make_plan

    plans: dict[tuple[tuple[str, object], ...], Plan] = {}
    rows: list[tuple[str, ...]] = [("run", "parameters", "steps", "tokens", "FLOPs", "time", "disk")]
    total = [0.0, 0.0, 0.0]
    keyed: list[tuple[Trial, RunConfig, tuple[tuple[str, object], ...]]] = []
    for trial in trials:
        config = with_vocabulary(trial.config)
        keyed.append((trial, config, tuple(sorted((k, v) for k, v in config.flat().items() if k not in SHAPELESS))))
    with Progress("planning", len({key for *_, key in keyed}), "models") as bar:
        for _, config, key in keyed:
            if key not in plans:
                bar.update(len(plans))
                plans[key] = make_plan(config, largest=False)
    for trial, _, key in keyed:
        made = plans[key]
        flops, disk = made.flops_per_token * made.length.tokens, made.checkpoint_bytes * made.checkpoints
        total = [total[0] + flops, total[1] + made.time.run_s, total[2] + disk]
        rows.append(
            (
                trial.name, f"{made.parameters:,}", f"{made.length.steps:,}", human_count(made.length.tokens),
                human_count(flops), human_time(made.time.run_s), human_bytes(disk),
            )
        )  # fmt: skip
    rows.append(("all", "", "", "", human_count(total[0]), human_time(total[1]), human_bytes(total[2])))
    at_once = f"; {jobs} at once, if that slows none down: {human_time(total[1] / jobs)}" if jobs > 1 else ""
    bases = sorted({made.time.basis for made in plans.values()})
    if len(bases) > MOST_BASES:
        bases = [*bases[:MOST_BASES], "…"]
    return f"{table(rows, indent='')}\n\n{len(trials)} runs; time {' | '.join(bases)}{at_once}"


def _check_ready(spec: SweepSpec, trials: Sequence[Trial]) -> None:
    """What every run would stumble over, before the first one begins."""
    checked_data(trials, str(spec.base.get("dataset", "")))
    if any(t.config.output.tensorboard for t in trials) and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError(
            'tensorboard: the package is not installed; expected pip install "bytekiln[track]", or --no-tensorboard'
        )


def _detached(name: str, argv: list[str], spec: SweepSpec, folder: Path, *, overwrite: bool) -> int:
    """Start the same command in tmux; what can be refused is refused here, where it is seen."""
    check(name)
    if (folder / "sweep.toml").exists() and not overwrite:
        open_folder(spec, folder)
    if (folder / "coordinator.lock").exists():
        with coordinating(folder):
            if overwrite:
                check_idle(folder)
    rest, skip = [], False
    for arg in argv:
        if skip:
            skip = False
        elif arg == "--detach":
            skip = True
        elif not arg.startswith("--detach="):
            rest.append(arg)
    print(detach(name, [sys.executable, "-m", "bytekiln.cli", "lm-sweep", *rest]))
    return 0


def _then(command: str, status: int) -> None:
    """Run what is to follow, unless nothing came of the sweep."""
    if status == 1:
        notice(f"--then: not run, since every run failed: {command}")
        return
    notice(f"then: {command}")
    ended = subprocess.run(command, shell=True, check=False).returncode
    if ended:
        notice(f"--then: ended with exit status {ended}")


def _worker(argv: list[str]) -> int:
    parser = Parser(
        "lm-sweep worker",
        description="Join a sweep that runs, or has stopped, from another terminal or another machine that shares its "
        "folder: take runs from it until none is left.",
        examples=("lm-sweep worker tinystories-lr --jobs 2",),
    )
    parser.add_argument("folder", metavar="FOLDER", help="the sweep's folder")
    parser.add_argument("--jobs", type=whole, default=1, metavar="N", help="runs at once; default: 1")
    options = parser.parse_args(argv)
    notice(f"joins {options.folder} as {Holder.me()}")
    folder, spec = Path(options.folder), SweepSpec()
    with suppress(BytekilnError):  # its own trouble: the runs are in trials.json
        spec = load_spec(folder / "sweep.toml")
    after = catalogue.after(spec)  # the sweep that was joined may have been killed meanwhile
    with whenever_it_ends(after, spec, folder, notice), analysed(folder, notice), ProgressBoard(notice) as board:
        results = work(folder, jobs=options.jobs, say=board.say, board=board)
    print(summary(results))
    return catalogue.status(spec, results)


def _adopt(argv: list[str]) -> int:
    parser = Parser(
        "lm-sweep adopt",
        description="Take a run that exists into a sweep: its checkpoints and TensorBoard files get the sweep's names, "
        "and it is entered into the results. Refused where the run's config says another value.",
        examples=(
            "lm-sweep adopt checkpoints/tinystories --as lr=6e-4",
            "lm-sweep adopt runs/base --as lr=1e-3,seed=1 --sweep my-sweep",
        ),
    )
    parser.add_argument("run", metavar="FOLDER", help="run folder, or folder of checkpoints")
    parser.add_argument("--as", dest="values", action="append", required=True, metavar="FIELD=VALUE",
                        help="what the sweep calls it by; several: lr=6e-4,seed=1")  # fmt: skip
    parser.add_argument("--sweep", default="", metavar="PRESET|FILE|FOLDER", help="the sweep; default: by its name")
    parser.add_argument("--tensorboard", metavar="DIR", help="its TensorBoard files; default: as its config says")
    for flag, value, about in (
        ("--axis", "FIELD='V …'", "of a sweep that has not begun: an axis that it is to begin with"),
        ("--set", "FIELD=VALUE", "of a sweep that has not begun: a field that it is to begin with"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=value, help=about)
    parser.add_argument("--scale", default="", metavar="NAME", help="of a sweep that has not begun: its smaller form")
    options = parser.parse_args(argv)
    given, axes = set_fields(options.set), given_axes(options.axis)
    values: dict[str, Value] = {}
    for text in (part for given in options.values for part in given.split(",")):
        key, equals, value = text.partition("=")
        if not equals or not value:
            raise ConfigError(f"--as: found {text!r}; expected FIELD=VALUE")
        field = canonical(key.strip(), "--as")
        values[field] = typed(field, value.strip())
    board = Path(options.tensorboard) if options.tensorboard else None
    entry, path = adopt_run(
        Path(options.run), values, sweep=options.sweep, tensorboard=board,
        changes=lambda spec: changed(spec, scale=options.scale, axes=axes, given=given),
    )  # fmt: skip
    print(f"{entry.name}: {entry.status}, checkpoints in {entry.checkpoint_dir}")
    if entry.tensorboard_dir:
        print(f"TensorBoard: {entry.tensorboard_dir}")
    print(f"results: {path}")
    return 0


def _search(argv: list[str]) -> int:
    from bytekiln.cli_search import search  # here: matplotlib and more come with it

    return search(argv)
