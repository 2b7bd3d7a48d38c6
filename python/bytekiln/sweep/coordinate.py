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
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from bytekiln.console import human_time
from bytekiln.errors import BytekilnError, ConfigError, FormatError
from bytekiln.signals import Interrupted, Signals
from bytekiln.stack.rules import stackable
from bytekiln.sweep.folder import (
    JOURNAL,
    RUNS,
    remove_run,
    run_folder,
    store_trials,
    stored_names,
    stored_trial,
)
from bytekiln.sweep.journal import Journal
from bytekiln.sweep.locks import coordinating, is_free, still_coordinating, trouble
from bytekiln.sweep.process import LOG, Ending, Process, Running, Start, Together, cores, ending
from bytekiln.sweep.results import DONE, TrialResult, best_of, read_results, read_run, update_results
from bytekiln.sweep.spec import Trial
from bytekiln.sweep.view import EXIT_STATUS, ended, view

__all__ = ["TrialResult", "best_of", "run_sweep", "work"]

POLL_S = 0.05
"""How often children are looked at; the journal and the board every `LOOK_S`."""
LOOK_S = 1.0
RETRIED = ("failed", "diverged", "early_stopped", "interrupted")
"""What `retry` may name."""
LOCK_WAIT_S = 60.0
"""How long a run's folder may still be held by the process of a sweep that was killed, while it saves."""

Say = Callable[[str], object]


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
) -> list[TrialResult]:
    """Run what is not done of a list of trials, and go on with what was interrupted.

    A trial that failed does not stop the others. Each gets `cores // jobs` threads, unless OMP_NUM_THREADS says
    otherwise.

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
        moved = store_trials(folder, trials, results)
        named = {t.name: t for t in trials}
        sweep = _Sweep(folder, list(named), named.__getitem__, results, jobs, say, start, board, stack)
        sweep.look_back(retry, moved)
        return sweep.go(coordinator=True)


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

    return _Sweep(folder, names, trial, results, jobs, say, start, board).go(coordinator=False)


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

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        trial: Callable[[str], Trial],
        results: str,
        jobs: int,
        say: Say,
        start: Start,
        board: Board | None,
        stack: int = 1,
    ) -> None:
        self.stack = stack
        self.alone: set[str] = set()
        """Why runs were not trained together, as far as it was said."""
        self.singly: set[str] = set()
        """Runs whose stack could not be trained."""
        self.folder, self.names, self.trial, self.jobs, self.say = folder, names, trial, jobs, say
        self.start, self.board = start, board
        self.path = folder / results
        self.threads = max(cores() // jobs, 1)
        self.journal = Journal(folder / JOURNAL)
        self.at_work: dict[str, _Job] = {}
        self.told: dict[str, TrialResult] = {}
        """What the results file says of each trial."""
        self.keys: dict[str, tuple[int, str, bool]] = {}
        """The state of the journal that it was told from."""
        self.held: dict[str, float] = {}
        """Runs whose folder another process still held, and since when."""

    # --- before ---------------------------------------------------------------------------------------------

    def look_back(self, retry: Collection[str], moved: Collection[str]) -> None:
        """Take in what earlier processes left: what has ended stays, what was interrupted or is retried is opened."""
        journal = self.journal
        for name, holder in journal.take_from_the_dead(self.names):
            self.say(f"{name}: {holder} has died; the run is taken up again")
        for name in self.names:
            place, found = journal.place(name), self.view(name)
            if place.done is None:
                if place.holder is None and found.status in (*DONE, "failed"):
                    told = {"exit_status": found.exit_status, "why": found.why, "error": found.error}
                    journal.finish(name, found.status, **told)
                else:
                    continue
            if found.status == "interrupted" or found.status in retry or name in moved:
                journal.reopen(name)
                if found.status in DONE and name not in moved:
                    self._anew(name)
        self.write(self.names)
        self._restore()

    def _anew(self, name: str) -> None:
        """Remove what a run left that is to be trained again from its first step; claimed meanwhile."""
        place = run_folder(self.folder, name)
        if not is_free(place):
            self.say(f"{name}: not trained again: {place} is in use by another process")
            return
        if not self.journal.claim(name, self.threads):
            return  # a worker was faster, and found the old end
        try:
            remove_run(place)
        except OSError as exc:
            raise trouble(place, exc) from None
        finally:
            self.journal.release(name, "is trained again")

    def _restore(self) -> None:
        """Runs of the folder that are not among these, adopted ones for instance, stay in the results."""
        told = {r.name for r in read_results(self.path)}
        for name in (n for n in stored_names(self.folder)[1] if n not in told):
            with suppress(ConfigError, FormatError):  # its own trouble is not these runs'
                trial = stored_trial(self.folder, name)
                update_results(self.path, [view(self.folder, trial, self.journal.place(name))])

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
                    if not self.at_work and self._all_ended():
                        break
                    time.sleep(POLL_S)
                if signals.number is not None:
                    self._stop(signals.number)
                    raise Interrupted
                self._look(coordinator=coordinator)
            finally:
                self._leave_none(wait=signals.number is None)
        told = {r.name: r for r in read_results(self.path)}
        behind = [n for n in self.names if n not in told or told[n].status in ("pending", "running")]
        self.write(behind)  # whoever ended them has not written it yet, or died before
        return [{**told, **self.told}[n] if n in behind else told[n] for n in self.names]

    def _all_ended(self) -> bool:
        return all(self.journal.place(n).done is not None for n in self.names)

    def _look(self, *, coordinator: bool) -> None:
        """See what the other workers did, and show how things stand."""
        self.journal.beat()
        self.journal.read()
        for name, holder in self.journal.take_from_the_dead(self.names):
            self.say(f"{name}: {holder} has died; the run is taken up again")
        mine = self.names if coordinator else list(self.at_work)
        self.write([n for n in mine if self.keys.get(n) != self._key(n)])
        if coordinator:
            still_coordinating(self.folder)
        if self.board is not None:
            self.board.show([self.told[n] for n in self.names if n in self.told], self.folder)

    def _key(self, name: str) -> tuple[int, str, bool]:
        """What changes in the journal when something happens to a trial."""
        place = self.journal.place(name)
        return place.attempt, place.holder.worker if place.holder else "", place.done is not None

    def _fill(self, *, coordinator: bool) -> None:
        """Start trials while there is room, in their order; one that joins takes any, so that few want the same."""
        for name in self.names if coordinator else random.sample(self.names, len(self.names)):
            if len(self._processes()) >= self.jobs:
                return
            if self._take(name):
                self._begin([name, *self._companions(name)])

    def _processes(self) -> list[Running]:
        """What runs here; a stack of runs once."""
        return list({id(job.run): job.run for job in self.at_work.values()}.values())

    def _take(self, name: str) -> bool:
        """Claim a trial that nobody runs; false also where it turns out to be over, which is written then."""
        place, folder = self.journal.place(name), run_folder(self.folder, name)
        if place.done is not None or place.holder is not None or not self._is_free(name):
            return False
        if not self.journal.claim(name, self.threads):
            return False
        if ended(folder, self.trial(name).config):  # whoever ran it died before it could say so
            code = EXIT_STATUS[str((read_run(folder) or {})["status"])]
            self._ended(name, ending(folder, code), code, 0.0)
            return False
        if name in self.held:
            del self.held[name]
            told = Ending("failed", "its folder is in use", f"{folder}: in use by another process")
            self._ended(name, told, None, 0.0)
            return False
        return True

    def _companions(self, first: str) -> list[str]:
        """Claim the trials that one process trains together with `first`."""
        group: list[str] = []
        configs = [self.trial(first).config]
        if first in self.singly:
            return []
        if self.stack > 1 and (why := stackable(configs)) and why not in self.alone:
            self.alone.add(why)
            self.say(f"{first} is trained by itself: {why}")
        for name in self.names:
            if len(configs) >= self.stack:
                break
            more = [*configs, self.trial(name).config]
            if name != first and name not in self.singly and not stackable(more) and self._take(name):
                group.append(name)
                configs = more
        return group

    def _is_free(self, name: str) -> bool:
        """Whether no process trains there: that of a sweep that was killed gets time to save and end."""
        if is_free(run_folder(self.folder, name)):
            self.held.pop(name, None)
            return True
        return time.monotonic() - self.held.setdefault(name, time.monotonic()) > LOCK_WAIT_S

    def _begin(self, names: Sequence[str]) -> None:
        """Start claimed trials: one in a process of its own, several together in one."""
        places = [run_folder(self.folder, name) for name in names]
        log = places[0] / LOG
        threads = self.journal.place(names[0]).threads or self.threads
        known = [(place / LOG).exists() for place in places]
        try:
            size = log.stat().st_size if log.exists() else 0
            run = self.start(places[0], threads) if len(names) == 1 else Together(places, threads)
        except OSError as exc:
            for name in names:
                self.journal.release(name, "could not be started")
            raise trouble(places[0], exc) from None
        for name, place, before in zip(names, places, known, strict=True):
            self.at_work[name] = _Job(place, run, time.monotonic(), places[0], size, len(names) > 1)
            together = f" (one of {len(names)} in one process)" if len(names) > 1 else ""
            self.say(f"{name}: {'goes on' if before else 'begins'}{together}")

    def _reap(self) -> None:
        over = {name: (job, code) for name, job in self.at_work.items() if (code := job.run.poll()) is not None}
        for name, (job, code) in over.items():
            del self.at_work[name]
            if job.stacked and code in (1, 2) and not ended(job.place, self.trial(name).config):
                # One run's trouble ends its stack before a step; by itself each says what is wrong with it.
                self.singly.add(name)
                self.journal.release(name, "its stack could not be trained")
                self.say(f"{name}: its stack could not be trained; once more by itself")
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
        self._ended(name, told, code, time.monotonic() - job.began)

    def _ended(self, name: str, told: Ending, code: int | None, seconds: float) -> None:
        status, why, error = told
        mine = self.journal.finish(name, status, exit_status=code, why=why, error=error, elapsed=round(seconds, 3))
        if not mine:
            return  # this worker was taken for dead; who took over tells
        self.write([name])
        r = self.told[name]
        loss = f", best validation loss {r.best_val_loss:.4f} at step {r.best_step}" if r.best_val_loss else ""
        took = f" in {human_time(r.elapsed_time)}" if r.elapsed_time else ""
        self.say(f"{name}: {status}{took}{loss}" + (f": {error or why}" if status not in DONE else ""))

    # --- when it is stopped ---------------------------------------------------------------------------------

    def _stop(self, number: int) -> None:
        """Pass a signal on; the runs save their checkpoints, the results say interrupted."""
        if number == signal.SIGHUP:
            self.say = lambda _: None  # the terminal is gone
        self.say(f"stopping {len(self.at_work)} run{'s' * (len(self.at_work) != 1)} (a second Ctrl-C does not wait)")
        for run in self._processes():
            run.send(number)
        while self.at_work:
            for name, job in list(self.at_work.items()):
                code = job.run.poll()
                if code is None:
                    continue
                del self.at_work[name]
                if self._ending(name, job, code)[0].status == "interrupted":
                    self.journal.release(name, "the sweep was stopped")
                    self.write([name])
                else:
                    self._finished(name, job, code)
            time.sleep(POLL_S)

    def _leave_none(self, *, wait: bool) -> None:
        """Whatever broke the loop, a second Ctrl-C or a full disk: no run goes on unseen."""
        until = time.monotonic() + (LOCK_WAIT_S if wait else 0.0)
        for run in self._processes():
            run.send(signal.SIGTERM)
        while time.monotonic() < until and any(job.run.poll() is None for job in self.at_work.values()):
            time.sleep(POLL_S)
        for name, job in self.at_work.items():
            if job.run.poll() is None:
                job.run.kill()
            with suppress(BytekilnError):  # the disk may be what broke it
                self.journal.release(name, "the sweep was stopped")
                self.write([name])

    # --- what is told ---------------------------------------------------------------------------------------

    def write(self, names: Sequence[str]) -> None:
        """Bring the results file up to date for some trials."""
        if names:
            self.keys.update({n: self._key(n) for n in names})
            news = [self.view(n) for n in names]
            self.told.update({r.name: r for r in update_results(self.path, news, self.names)})

    def view(self, name: str) -> TrialResult:
        """How a trial stands."""
        return view(self.folder, self.trial(name), self.journal.place(name))
