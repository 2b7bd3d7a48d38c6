"""What one process of a sweep knows of its trials: the journal of who ran what, brought together with the results file.

In: events of this process, the folder as others leave it. Out: which trial may be run, how each stands, the results
file kept up to date. Called by `coordinate`, which runs them; imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from bytekiln.console import human_time
from bytekiln.errors import ConfigError, FormatError
from bytekiln.sweep.folder import JOURNAL, remove_run, run_folder, stored_names, stored_trial
from bytekiln.sweep.journal import Journal
from bytekiln.sweep.locks import is_free, trouble
from bytekiln.sweep.process import Ending, ending
from bytekiln.sweep.results import DONE, TrialResult, read_results, read_run, update_results
from bytekiln.sweep.spec import Trial
from bytekiln.sweep.view import EXIT_STATUS, ended, view

REMIND_S = 60.0
"""How often it is said again what is waited for."""

Say = Callable[[str], object]


class Ledger:
    """The trials of a sweep, as one of the processes that share it knows them."""

    def __init__(
        self, folder: Path, names: Sequence[str], trial: Callable[[str], Trial], results: str, threads: int, say: Say
    ) -> None:
        """Read the journal.

        Args:
            folder: the sweep's. names: of its trials, in their order. trial: makes one of its name.
            results: name of the results file. threads: of a run. say: told what deserves a line.

        Raises:
            BytekilnError: as `Journal`.
        """
        self.folder, self.names, self.trial, self.threads, self.say = folder, names, trial, threads, say
        self.path = folder / results
        self.journal = Journal(folder / JOURNAL)
        self.told: dict[str, TrialResult] = {}
        """What the results file says of each trial."""
        self._keys: dict[str, tuple[int, str, bool]] = {}
        """The state of the journal that it was told from."""
        self._held: dict[str, tuple[float, float]] = {}
        """Runs whose folder another process still holds: since when, and when it was last said."""

    # --- what others left -----------------------------------------------------------------------------------

    def look_back(self, retry: Collection[str], moved: Collection[str]) -> None:
        """Take in what earlier processes left: what has ended stays, what was interrupted or is retried is opened."""
        journal = self.journal
        self._free_the_dead()
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

    def look(self) -> None:
        """Take in what the other processes did since."""
        self.journal.beat()
        self.journal.read()
        self._free_the_dead()

    def _free_the_dead(self) -> None:
        for name, holder in self.journal.take_from_the_dead(self.names):
            self.say(f"{name}: {holder} has died; the run is taken up again")

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

    # --- who may run what -----------------------------------------------------------------------------------

    def all_ended(self) -> bool:
        """Whether nothing is left to run, here or elsewhere."""
        return all(self.journal.place(n).done is not None for n in self.names)

    def take(self, name: str) -> bool:
        """Claim a trial that nobody runs; false also where it turns out to be over, which is written then."""
        place, folder = self.journal.place(name), run_folder(self.folder, name)
        if place.done is not None or place.holder is not None or not self._is_free(name):
            return False
        if not self.journal.claim(name, self.threads):
            return False
        if ended(folder, self.trial(name).config):  # whoever ran it died before it could say so
            code = EXIT_STATUS[str((read_run(folder) or {})["status"])]
            self.finish(name, ending(folder, code), code, 0.0)
            return False
        if name in self.told and self.told[name].pruned:
            self.write([name])  # what a search gave up goes on: before it ends, so that nobody reads the old reason
        return True

    def _is_free(self, name: str) -> bool:
        """Whether no process trains there: that of a sweep that was killed has all the time that it needs to save."""
        place, now = run_folder(self.folder, name), time.monotonic()
        if is_free(place):
            self._held.pop(name, None)
            return True
        since, said = self._held.get(name, (now, -REMIND_S))
        if now - said >= REMIND_S:
            so_long = f", for {human_time(now - since)} now" if name in self._held else ""
            self.say(f"{name}: waits{so_long} for the process that still trains or saves in {place}")
            said = now
        self._held[name] = (since, said)
        return False

    def give_back(self, name: str, why: str) -> None:
        """Let a claimed trial be run by whoever comes."""
        self.journal.release(name, why)

    def finish(self, name: str, told: Ending, code: int | None, seconds: float) -> None:
        """Write down how a trial ended, and say it."""
        status, why, error = told
        mine = self.journal.finish(name, status, exit_status=code, why=why, error=error, elapsed=round(seconds, 3))
        if not mine:
            return  # this process was taken for dead; who took over tells
        self.write([name])
        r = self.told[name]
        loss = f", best validation loss {r.best_val_loss:.4f} at step {r.best_step}" if r.best_val_loss else ""
        took = f" in {human_time(r.elapsed_time)}" if r.elapsed_time else ""
        self.say(f"{name}: {status}{took}{loss}" + (f": {error or why}" if status not in DONE else ""))

    # --- what is told ---------------------------------------------------------------------------------------

    def changed(self, names: Sequence[str]) -> list[str]:
        """Which of these the journal has news of that the results file does not have."""
        return [n for n in names if self._keys.get(n) != self._key(n)]

    def _key(self, name: str) -> tuple[int, str, bool]:
        """What changes in the journal when something happens to a trial."""
        place = self.journal.place(name)
        return place.attempt, place.holder.worker if place.holder else "", place.done is not None

    def write(self, names: Sequence[str]) -> None:
        """Bring the results file up to date for some trials."""
        if names:
            self._keys.update({n: self._key(n) for n in names})
            news = [self.view(n) for n in names]
            self.told.update({r.name: r for r in update_results(self.path, news, self.names)})

    def view(self, name: str) -> TrialResult:
        """How a trial stands."""
        return view(self.folder, self.trial(name), self.journal.place(name))

    def shown(self) -> list[TrialResult]:
        """How the trials stand, as far as the results file has told."""
        return [self.told[n] for n in self.names if n in self.told]

    def outcome(self) -> list[TrialResult]:
        """How every trial stands at the end, in their order."""
        told = {r.name: r for r in read_results(self.path)}
        behind = [n for n in self.names if n not in told or told[n].status in ("pending", "running")]
        self.write(behind)  # whoever ended them has not written it yet, or died before
        return [{**told, **self.told}[n] if n in behind else told[n] for n in self.names]
