"""Runs of a sweep, each a process of its own: started, watched, written down; gone on with after any end.

In: trials and a folder. Out: a run folder a trial, the journal of who ran what, and the results file, rewritten after
every run. Called by `cli_sweep`, searches and pipelines; imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import signal
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from bytekiln.errors import BytekilnError, ConfigError
from bytekiln.signals import Interrupted, Signals
from bytekiln.stack.rules import stackable
from bytekiln.sweep.folder import RUNS, run_folder, store_trials, stored_names, stored_trial, tidy
from bytekiln.sweep.ledger import Ledger, Say
from bytekiln.sweep.locks import coordinating, still_coordinating, trouble
from bytekiln.sweep.process import LOG, Ending, Process, Running, Start, Together, cores, ending
from bytekiln.sweep.results import TrialResult, best_of, read_run
from bytekiln.sweep.spec import Trial
from bytekiln.sweep.view import EXIT_STATUS, ended

__all__ = ["TrialResult", "best_of", "run_sweep", "work"]

POLL_S = 0.05
"""How often children are looked at; the journal and the board every `LOOK_S`."""
LOOK_S = 1.0
RETRIED = ("failed", "diverged", "early_stopped", "interrupted")
"""What `retry` may name."""
END_S = 60.0
"""How long a run that gets SIGTERM, since the sweep is broken, may take to save before it is killed."""


class Board(Protocol):
    """Who is shown how things stand."""

    def show(self, results: Sequence[TrialResult], folder: Path) -> None:
        """Called about once a second."""


def run_sweep(
    trials: Sequence[Trial],
    folder: str | Path,
    *,
    jobs: int = 1,
    retry: Collection[str] = (),
    results: str = "results.json",
    say: Say = lambda _: None,
    start: Start = Process,
    stack: int = 1,
    board: Board | None = None,
    threads: int = 0,
) -> list[TrialResult]:
    """Run what is not done of a list of trials, and go on with what was interrupted.

    A trial that failed does not stop the others. One whose folder another process still holds, that of a sweep which
    was killed, is waited for.

    Args:
        trials: the runs; names must differ.
        folder: the sweep's folder, made where it is missing.
        jobs: runs at once.
        retry: statuses that are run again: "failed", "diverged", "interrupted" (always is), "early_stopped".
        results: name of the results file in the folder.
        say: told a line when a run begins and ends.
        start: how a run is started; a process of its own.
        stack: runs that one process may train together where their shapes, data and lengths are the same
            (`stack.rules`); each then ends as it would alone, to a rounding.
        board: shown how things stand, about once a second.
        threads: of a run, unless OMP_NUM_THREADS says otherwise; 0: this machine's cores, divided by `jobs`.

    Returns:
        How every trial stands, in the order of `trials`.

    Raises:
        BytekilnError: the folder is in use (says by whom), cannot be written, or has other runs by these names.
        KeyboardInterrupt, or the process's own end by SIGTERM: the runs have saved their checkpoints, the results
            say interrupted. A second Ctrl-C does not wait for them.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: found {jobs}; expected at least 1")
    check_retry(retry)
    folder = Path(folder)
    try:
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise trouble(folder, exc) from None
    with coordinating(folder):
        tidy(folder, results, [run_folder(folder, t.name) for t in trials])
        moved = store_trials(folder, trials, results)
        named = {t.name: t for t in trials}
        ledger = Ledger(folder, list(named), named.__getitem__, results, threads or _share(jobs), say)
        ledger.look_back(retry, moved)
        return _Sweep(ledger, jobs, start, board, stack).go(coordinator=True)


def _share(jobs: int) -> int:
    """Threads of a run, of which so many share this machine."""
    return max(cores() // jobs, 1)


def check_retry(retry: Collection[str]) -> None:
    """Refuse what is no end that a run can be trained again from.

    Raises:
        ConfigError: found such a status.
    """
    for status in retry:
        if status not in RETRIED:
            raise ConfigError(f"retry: found {status}; expected failed, diverged, early_stopped or interrupted")


def work(
    folder: str | Path,
    *,
    jobs: int = 1,
    say: Say = lambda _: None,
    start: Start = Process,
    board: Board | None = None,
) -> list[TrialResult]:
    """Join a sweep, from another terminal or machine on a shared folder: take its trials until none is left.

    Raises:
        BytekilnError: it is no sweep's folder, or cannot be written.
    """
    folder = Path(folder)
    results, names = stored_names(folder)

    @functools.cache
    def trial(name: str) -> Trial:  # of hundreds, a worker runs a few
        return stored_trial(folder, name)

    ledger = Ledger(folder, names, trial, results, _share(jobs), say)
    return _Sweep(ledger, jobs, start, board).go(coordinator=False)


@dataclasses.dataclass
class _Job:
    place: Path
    run: Running
    """The same one for all runs of a stack."""
    began: float
    log_in: Path
    log_from: int
    stacked: bool


class _Sweep:
    """A sweep at work, in one of the processes that share it."""

    def __init__(self, ledger: Ledger, jobs: int, start: Start, board: Board | None, stack: int = 1) -> None:
        self.ledger, self.jobs, self.start, self.board, self.stack = ledger, jobs, start, board, stack
        self.folder, self.names, self.trial = ledger.folder, ledger.names, ledger.trial
        self.alone: set[str] = set()
        """Why runs were not trained together, as far as it was said."""
        self.singly: set[str] = set()
        """Runs whose stack could not be trained."""
        self.at_work: dict[str, _Job] = {}

    # --- the loop -------------------------------------------------------------------------------------------

    def go(self, *, coordinator: bool) -> list[TrialResult]:
        """Until every trial has ended, here or elsewhere."""
        with Signals() as signals:
            signals.deferred = True
            looked = -LOOK_S
            try:
                while signals.number is None:
                    self._reap()
                    if time.monotonic() - looked >= LOOK_S:
                        looked = time.monotonic()
                        self._look(coordinator=coordinator)
                    self._fill(coordinator=coordinator)
                    if not self.at_work and self.ledger.all_ended():
                        break
                    time.sleep(POLL_S)
                if signals.number is not None:
                    self._stop(signals.number)
                    raise Interrupted
                self._look(coordinator=coordinator)
            finally:
                self._leave_none(wait=signals.number is None)
        return self.ledger.outcome()

    def _look(self, *, coordinator: bool) -> None:
        """See what the other workers did, and show how things stand."""
        self.ledger.look()
        self.ledger.write(self.ledger.changed(self.names if coordinator else list(self.at_work)))
        if coordinator:
            still_coordinating(self.folder)
        if self.board is not None:
            self.board.show(self.ledger.shown(), self.folder)

    def _fill(self, *, coordinator: bool) -> None:
        """Start trials while there is room, in their order; one that joins takes any, so that few want the same."""
        for name in self.names if coordinator else random.sample(self.names, len(self.names)):
            if len(self._processes()) >= self.jobs:
                return
            if self.ledger.take(name):
                self._begin([name, *self._companions(name)])

    def _processes(self) -> list[Running]:
        """What runs here; a stack of runs once."""
        return list({id(job.run): job.run for job in self.at_work.values()}.values())

    def _companions(self, first: str) -> list[str]:
        """Claim the trials that one process trains together with `first`."""
        group: list[str] = []
        configs = [self.trial(first).config]
        if first in self.singly:
            return []
        if self.stack > 1 and (why := stackable(configs)) and why not in self.alone:
            self.alone.add(why)
            self.ledger.say(f"{first} is trained by itself: {why}")
        for name in self.names:
            if len(configs) >= self.stack:
                break
            more = [*configs, self.trial(name).config]
            if name != first and name not in self.singly and not stackable(more) and self.ledger.take(name):
                group.append(name)
                configs = more
        return group

    def _begin(self, names: Sequence[str]) -> None:
        """Start claimed trials: one in a process of its own, several together in one."""
        places = [run_folder(self.folder, name) for name in names]
        log = places[0] / LOG
        threads = self.ledger.journal.place(names[0]).threads or self.ledger.threads
        known = [(place / LOG).exists() for place in places]
        try:
            size = log.stat().st_size if log.exists() else 0
            run = self.start(places[0], threads) if len(names) == 1 else Together(places, threads)
        except OSError as exc:
            for name in names:
                self.ledger.give_back(name, "could not be started")
            raise trouble(places[0], exc) from None
        for name, place, before in zip(names, places, known, strict=True):
            self.at_work[name] = _Job(place, run, time.monotonic(), places[0], size, len(names) > 1)
            together = f" (one of {len(names)} in one process)" if len(names) > 1 else ""
            self.ledger.say(f"{name}: {'goes on' if before else 'begins'}{together}")

    def _reap(self) -> None:
        over = {name: (job, code) for name, job in self.at_work.items() if (code := job.run.poll()) is not None}
        for name, (job, code) in over.items():
            del self.at_work[name]
            if job.stacked and code in (1, 2) and not ended(job.place, self.trial(name).config):
                # One run's trouble ends its stack before a step; by itself each says what is wrong with it.
                self.singly.add(name)
                self.ledger.give_back(name, "its stack could not be trained")
                self.ledger.say(f"{name}: its stack could not be trained; once more by itself")
                continue
            self._finished(name, job, code)

    def _ending(self, name: str, job: _Job, code: int) -> tuple[Ending, int]:
        """How a run ended, and with which status: its own where the stack went on without it."""
        if job.stacked:
            found = read_run(job.place) if ended(job.place, self.trial(name).config) else None
            code = code if found is None else EXIT_STATUS[str(found["status"])]
        return ending(job.place, code, job.log_from, job.log_in), code

    def _finished(self, name: str, job: _Job, code: int) -> None:
        told, code = self._ending(name, job, code)
        self.ledger.finish(name, told, code, time.monotonic() - job.began)

    # --- when it is stopped ---------------------------------------------------------------------------------

    def _stop(self, number: int) -> None:
        """Pass a signal on; the runs save their checkpoints, the results say interrupted."""
        if number == signal.SIGHUP:
            self.ledger.say = lambda _: None  # the terminal is gone
        many = "s" * (len(self.at_work) != 1)
        self.ledger.say(f"stopping {len(self.at_work)} run{many} (a second Ctrl-C does not wait)")
        for run in self._processes():
            run.send(number)
        while self.at_work:
            for name, job in list(self.at_work.items()):
                code = job.run.poll()
                if code is None:
                    continue
                del self.at_work[name]
                if self._ending(name, job, code)[0].status == "interrupted":
                    self.ledger.give_back(name, "the sweep was stopped")
                    self.ledger.write([name])
                else:
                    self._finished(name, job, code)
            time.sleep(POLL_S)

    def _leave_none(self, *, wait: bool) -> None:
        """Whatever broke the loop, a second Ctrl-C or a full disk: no run goes on unseen."""
        until = time.monotonic() + (END_S if wait else 0.0)
        for run in self._processes():
            with suppress(BytekilnError):  # one on a cluster is told by a file
                run.send(signal.SIGTERM)
        while time.monotonic() < until and any(job.run.poll() is None for job in self.at_work.values()):
            time.sleep(POLL_S)
        for name, job in self.at_work.items():
            if job.run.poll() is None:
                job.run.kill()
            with suppress(BytekilnError):  # the disk may be what broke it
                self.ledger.give_back(name, "the sweep was stopped")
                self.ledger.write([name])
