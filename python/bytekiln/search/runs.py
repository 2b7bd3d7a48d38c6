"""A search's runs as those of sweeps: each a process, paused where rates are given up, found again when it goes on.

In: requests of a `Search`, the base of its runs. Out: sweep folders, one a stage, and what their runs tell. Called by
`cli_search`; imports no torch but for the range test.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from bytekiln.config import RunConfig
from bytekiln.console import Progress
from bytekiln.errors import BytekilnError, ConfigError, FormatError
from bytekiln.metrics import read_metrics
from bytekiln.search.plan import Plan, Request, Seen
from bytekiln.sweep.axes import Axis
from bytekiln.sweep.coordinate import Board, run_sweep
from bytekiln.sweep.folder import run_folder, write_spec
from bytekiln.sweep.process import LOG, Process, Start, command, environment
from bytekiln.sweep.results import DONE, TrialResult, read_results, read_run, update_results
from bytekiln.sweep.spec import SweepSpec, Trial, trials_of

RESULTS = "results.json"
RETRIED = ("failed", "diverged", "early_stopped", "interrupted")
ATTEMPTS = 3
"""How often a run is begun or gone on with that is stopped from outside before it comes to its step."""
_PAUSED = re.compile(r"^(.*): interrupted( in [^,:]*(?:, [^:]*)?): SIGINT arrived.*$")


class Paused(Process):
    """`lm-train` as a child that ends at a step, with the schedule of the whole run."""

    def __init__(self, folder: Path, threads: int, *, step: int) -> None:
        """Start it; as `Process`."""
        with (folder / LOG).open("ab") as log:
            self._child = subprocess.Popen(
                [*command(folder), "--pause-at", str(step)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(threads),
                process_group=0,
            )


@dataclasses.dataclass(frozen=True)
class UpTo:
    """A board that is told of runs which pause at a step: as far as that they have to go."""

    board: Board
    step: int

    def show(self, results: Sequence[TrialResult], folder: Path) -> None:
        """As `Board`."""
        self.board.show([dataclasses.replace(r, max_steps=min(r.max_steps, self.step)) for r in results], folder)


class SweepRunner:
    """A `Runner` whose runs are trained by `run_sweep`."""

    def __init__(
        self,
        base: SweepSpec,
        folder: Path,
        plan: Plan,
        *,
        jobs: int = 1,
        retry: Collection[str] = (),
        say: Callable[[str], object] = lambda _: None,
        board: Board | None = None,
        start: Callable[[int | None], Start] | None = None,
    ) -> None:
        """Args:
        base: the run, by `SweepSpec.base`; axes and seeds are the search's.
        folder: of the search. plan: its plan.
        jobs: runs at once. retry: statuses that are run again. say, board: as `run_sweep`.
        start: from the step to pause at (None: none) to how a run is started; for tests.
        """
        self.base, self.folder, self.plan, self.jobs, self.retry = base, folder, plan, jobs, retry
        self.say, self.board = say, board
        self.start = start or (lambda step: Process if step is None else functools.partial(Paused, step=step))
        self._tried: set[tuple[str, str]] = set()
        """Runs that were tried again in this process."""

    def config(self, lr: float | None = None, seed: int | None = None) -> RunConfig:
        """The run at a rate; None: at that of the base."""
        axes = {} if lr is None else {"lr": Axis(values=(lr,))}
        spec = self.base.model_copy(update={"axes": axes, "seeds": () if seed is None else (seed,)})
        return trials_of(spec)[0].config

    def __call__(self, wanted: Sequence[Request]) -> list[Seen]:
        """Train what is not there yet; the runs of one stage and rung at once.

        Raises:
            BytekilnError: as `run_sweep`.
        """
        found = {w: self._seen(w, t) for w, t in zip(wanted, self._trials(wanted), strict=True)}
        for stage, until in sorted({(w.stage, w.until) for w in wanted}):
            mine = [w for w in wanted if (w.stage, w.until) == (stage, until)]
            for _ in range(ATTEMPTS):
                todo = [w for w in mine if not self._done(w, found[w])]
                if todo:
                    found |= self._train(stage, until, todo)
            for w in mine:
                seen = found[w]
                if not self._done(w, seen):  # stopped from outside again and again; the next search goes on with it
                    why = f"{seen.name} was {seen.status} at step {seen.steps}, {ATTEMPTS} times: {seen.why}"
                    found[w] = dataclasses.replace(seen, status="failed", why=why)
        return [found[w] for w in wanted]

    def _train(self, stage: str, until: int, todo: Sequence[Request]) -> dict[Request, Seen]:
        """Have runs of one stage trained up to a step."""
        folder, trials = self.folder / stage, self._trials(todo)
        folder.mkdir(parents=True, exist_ok=True)
        write_spec(self._spec(stage, [(t.config.optimizer.lr, t.seed) for t in trials]), folder)
        full = until >= self.plan.max_steps
        run_sweep(
            trials,
            folder,
            jobs=self.jobs,
            retry=self.retry,
            results=RESULTS,
            say=self.say if full else self._say_paused,
            board=self.board and UpTo(self.board, until),
            start=self.start(None if full else until),
        )
        self._tried |= {(stage, t.name) for t in trials}
        return {w: self._seen(w, trial) for w, trial in zip(todo, trials, strict=True)}

    def _say_paused(self, line: str) -> None:
        """A run that comes to its rung ends as interrupted; to a person that is a pause."""
        self.say(_PAUSED.sub(r"\1: paused\2", line))

    def tell_given_up(self, runs: Sequence[Seen]) -> None:
        """Write into the results files which runs were given up, and why."""
        for stage in dict.fromkeys(r.stage for r in runs):
            told = self._told(stage)
            why = {r.name: r.given_up for r in runs if r.stage == stage and r.given_up}
            news = [
                dataclasses.replace(r, pruned=why[r.name], why=f"paused at step {r.steps}")
                for r in told
                if r.name in why and r.status == "interrupted"  # one that went on after all is none
            ]
            if news:
                update_results(self.folder / stage / RESULTS, news, [r.name for r in told])

    def results(self) -> list[TrialResult]:
        """All runs of all stages, as their results files say."""
        return [r for stage in ("coarse", "seeds", "confirm") for r in self._told(stage)]

    def _told(self, stage: str) -> list[TrialResult]:
        """What the results file of a stage says; a view of the runs: a damaged one is made anew as a missing one.

        Raises:
            FileError: it cannot be read.
        """
        path = self.folder / stage / RESULTS
        try:
            return read_results(path) if path.exists() else []
        except FormatError:
            return []

    def _done(self, wanted: Request, seen: Seen) -> bool:
        if seen.status in self.retry and (wanted.stage, seen.name) not in self._tried:
            return False
        return seen.status in ("completed", "early_stopped", "diverged", "failed") or (
            seen.status == "interrupted" and seen.steps >= wanted.until
        )

    def _trials(self, wanted: Sequence[Request]) -> list[Trial]:
        made = []
        for w in wanted:
            spec = self.base.model_copy(update={"axes": {"lr": Axis(values=(w.lr,))}, "seeds": (w.seed,)})
            made += trials_of(spec)
        return made

    def _spec(self, stage: str, runs: Sequence[tuple[float, int]]) -> SweepSpec:
        """What the folder of a stage is as a sweep: the rates and seeds that it has so far."""
        known = {(r.lr, r.seed) for r in self._told(stage)} | set(runs)
        axes = {"lr": Axis(values=tuple(sorted({lr for lr, _ in known})))}
        question = {
            "coarse": "Which learning rates are worth a full run?",
            "seeds": "How much does the seed change near the best learning rate?",
            "confirm": "Does the recommended learning rate keep what the fit promises?",
        }.get(stage, "")
        seeds = tuple(sorted({seed for _, seed in known}))
        return self.base.model_copy(update={"axes": axes, "seeds": seeds, "name": stage, "question": question})

    def _seen(self, wanted: Request, trial: Trial) -> Seen:
        """What a run has left, trained by whomever.

        Raises:
            FormatError: its metrics end before its own result says, and the search needs what they lack.
        """
        folder = self.folder / wanted.stage
        run = run_folder(folder, trial.name)
        told = next((r for r in self._told(wanted.stage) if r.name == trial.name), None)
        seen = Seen(wanted.stage, wanted.lr, wanted.seed, "pending", 0, name=trial.name)
        if told is not None:
            seen = dataclasses.replace(seen, status=told.status, why=told.error or told.why)
        ended = _ended(run, told)
        metrics, bad = trial.config.with_(out_dir=str(run)).output.metrics, "no such file"
        if metrics.exists():
            try:
                rows = read_metrics(metrics)
                bad = f"found {len(rows)} rows, the last of step {rows[-1].step}" if rows else "found no row"
            except BytekilnError as exc:
                if ended is None:
                    return dataclasses.replace(seen, status="failed", why=str(exc))
                rows, bad = [], str(exc).removeprefix(f"{metrics}: ").partition(";")[0]
            curve = tuple((r.step, r.val_loss) for r in rows if r.val_loss is not None and r.step > 0)
            seen = dataclasses.replace(seen, steps=rows[-1].step if rows else 0, curve=curve)
        if ended is None:
            return seen
        steps, best = ended
        if wanted.until < steps and wanted.until not in dict(seen.curve):
            if "failed" in self.retry and not (run / "result.json").exists():
                return dataclasses.replace(seen, status="failed", why="its result is gone")
            raise FormatError(
                f"{metrics}: {bad}, without the loss at step {wanted.until}; expected {steps} steps, as the run's "
                f"result says (put the file back; or remove {run}, and --retry failed trains the run again)"
            )
        return _completed(seen, steps, best, wanted.until)


def _ended(run: Path, told: TrialResult | None) -> tuple[int, tuple[int, float] | None] | None:
    """How far a run came by its own result, and its best (step, loss): what damaged metrics are held against.

    None: it has no result that can be read, nor does the sweep know that it ended.
    """
    try:
        found = read_run(run)
    except BytekilnError:
        found = None
    if found is None and told is not None and told.status in DONE:
        found = vars(told)
    if found is None or not found.get("steps"):
        return None
    step, loss = found.get("best_step"), found.get("best_val_loss")
    return int(found["steps"]), None if step is None or loss is None else (int(step), float(loss))


def _completed(seen: Seen, steps: int, best: tuple[int, float] | None, until: int) -> Seen:
    """A run as its result has it, where its metrics lack the end or the best loss."""
    curve = seen.curve
    if best is not None and best[0] not in dict(curve):
        curve = tuple(sorted((*curve, best)))
    return dataclasses.replace(seen, steps=max(seen.steps, steps), curve=curve)


def retried(texts: Sequence[str]) -> list[str]:
    """Statuses of `--retry`, each text one or several of them.

    Raises:
        ConfigError: one is no status that a run can end with.
    """
    found = [status for text in texts for status in text.replace(",", " ").split()]
    for status in found:
        if status not in RETRIED:
            raise ConfigError(f"--retry: found {status}; expected {', '.join(RETRIED[:-1])} or {RETRIED[-1]}")
    return found


def range_tester(
    runner: SweepRunner, plan: Plan, say: Callable[[str], object] = lambda _: None
) -> Callable[[], dict[str, Any]]:
    """Makes the range test of a search in this process, or reads the one that is done."""

    def test() -> dict[str, Any]:
        from bytekiln.search.range_test import measure, read_range_test, write_range_test

        folder = runner.folder / "range_test"
        found = read_range_test(folder)
        if found is None:
            say(f"range test: {plan.range_steps} steps, lr {plan.low:g} to {plan.high:g}")
            with Progress("range test", plan.range_steps, "steps") as bar:
                found = measure(
                    runner.config(seed=plan.seeds[0]),
                    low=plan.low,
                    high=plan.high,
                    steps=plan.range_steps,
                    each=lambda step: bar.update(step),
                )
            write_range_test(found, folder)
        return found.summary

    return test


def check_base(config: RunConfig) -> None:
    """Refuse a run whose length or loss a search cannot compare.

    Raises:
        ConfigError: no validation data, or a run that does not end by steps.
    """
    if not config.data.val_data:
        raise ConfigError("val_data: found none; expected validation data, by whose loss rates are judged")
    if config.progress != "steps" or config.training.token_budget or config.training.max_time:
        raise ConfigError("max_steps: found a run that ends by time or tokens; expected one that ends by --max-steps N")
