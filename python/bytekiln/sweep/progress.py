"""How a sweep stands while it runs: one live table on a terminal, now and then a plain line elsewhere.

In: results, and the metrics files that the runs write. Out: run, status, step, losses, time left of each run and of
the whole. Called by `sweep` through `cli_sweep`; rich is imported only on a terminal.
"""

from __future__ import annotations

import csv
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from bytekiln.console import human_time
from bytekiln.metrics import COLUMNS
from bytekiln.sweep.results import DONE, TrialResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

PLAIN_INTERVAL_S = 60.0
"""Without a terminal: at most one line a run in this time."""
RECENT_S = 300.0
"""The pace by which the end of the whole is told is that of so long, of all workers together."""
MOST_ROWS = 40
"""Rows of the live table: those at work first."""


class Seen(NamedTuple):
    """What a run's metrics have told so far."""

    step: int = 0
    elapsed_s: float = 0.0
    loss: float | None = None
    val_loss: float | None = None
    best: float | None = None


class Follower:
    """Reads a metrics file as it grows, each row once."""

    def __init__(self, path: Path) -> None:
        """From its beginning."""
        self.path, self.seen = path, Seen()
        self._offset = 0
        self._inode = 0
        self._places = {name: COLUMNS.index(name) for name in ("step", "elapsed_s", "loss", "val_loss")}

    def look(self) -> Seen:
        """Take in the whole rows that are new; a file that was rewritten is read anew."""
        try:
            with self.path.open("rb") as f:
                about = self.path.stat()
                if about.st_ino != self._inode or about.st_size < self._offset:
                    self._inode, self._offset, self.seen = about.st_ino, 0, Seen()
                f.seek(self._offset)
                text = f.read()
        except OSError:
            return self.seen
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        for row in csv.reader(text[:whole].decode("utf-8", "replace").splitlines()):
            self._take(row)
        return self.seen

    def _take(self, row: list[str]) -> None:
        try:
            step, elapsed, loss, val = (row[i] for i in self._places.values())
            val_loss = float(val) if val else self.seen.val_loss
            rises = self.seen.best is None or (val_loss is not None and val_loss < self.seen.best)
            best = val_loss if val and int(step) > 0 and rises else self.seen.best
            self.seen = Seen(int(step), float(elapsed), float(loss) if loss else self.seen.loss, val_loss, best)
        except (ValueError, IndexError):
            return  # the header


class Pace:
    """Steps a second of all runs of a sweep together, of late; and when it will be done at this pace."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._steps: dict[str, int] = {}
        """Of each run, when it was last looked at."""
        self._taken = 0
        self._marks: deque[tuple[float, int]] = deque()
        """(time, steps taken since this process looks) whenever there were new ones."""

    def look(self, steps: dict[str, int], now: float) -> None:
        """Take in how far each run is; one that goes back to its checkpoint has taken no step."""
        new = sum(max(step - self._steps.get(name, step), 0) for name, step in steps.items())
        self._steps.update(steps)
        if not new:
            return
        self._taken += new
        self._marks.append((now, self._taken))
        while len(self._marks) > 2 and self._marks[1][0] <= now - RECENT_S:
            self._marks.popleft()

    def seconds(self, steps: int) -> float | None:
        """How long so many steps will take; None: not known yet."""
        if not steps:
            return 0.0
        if len(self._marks) < 2:
            return None
        (began, before), (until, taken) = self._marks[0], self._marks[-1]
        return steps * (until - began) / (taken - before)


class ProgressBoard:
    """Shows a sweep; also the place where lines are said while the table is up."""

    def __init__(self, print_line: Callable[[str], object], *, live: bool | None = None) -> None:
        """Lines go to `print_line`; the table to the terminal on stderr, where there is one."""
        self._print = print_line
        self._live_wanted = sys.stderr.isatty() if live is None else live
        self._followers: dict[str, Follower] = {}
        self._speed: dict[str, tuple[int, float, float]] = {}
        self._said: dict[str, float] = {}
        self._pace = Pace()
        self._folder: Path | None = None
        self._live: Live | None = None
        self._console: Console | None = None

    def __enter__(self) -> Self:
        """Ready."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the table down."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """One line, above the table."""
        if self._live is not None and self._console is not None:
            self._console.print(line, markup=False, highlight=False)
        else:
            self._print(line)

    def show(self, results: Sequence[TrialResult], folder: Path) -> None:
        """As `sweep.Board`."""
        if folder != self._folder:  # a search's next stage, with other runs, perhaps by the same names
            self._folder, self._pace = folder, Pace()
            for known in (self._followers, self._speed, self._said):
                known.clear()
        running = [r for r in results if r.status == "running"]
        seen = {r.name: self._follow(r, folder) for r in running}
        left = {r.name: self.time_left(r, seen[r.name]) for r in running}
        now = time.monotonic()
        self._pace.look({r.name: seen[r.name].step if r.name in seen else r.steps for r in results}, now)
        eta = self.eta(results, seen, left)
        if self._live_wanted:
            self._draw(results, seen, left, eta)
            return
        for r in running:
            if now - self._said.setdefault(r.name, now) >= PLAIN_INTERVAL_S:
                self._said[r.name] = now
                self._print(plain_line(r, seen[r.name], left[r.name], results, eta))

    def _follow(self, r: TrialResult, folder: Path) -> Seen:
        if r.name not in self._followers:
            self._followers[r.name] = Follower(folder / r.run_dir / "metrics.csv")
        return self._followers[r.name].look()

    def time_left(self, r: TrialResult, seen: Seen) -> float | None:
        """Seconds until a run is done, by its speed since it was first looked at; None: not known yet."""
        first = self._speed.setdefault(r.name, (seen.step, seen.elapsed_s, 0.0))
        if seen.step < first[0]:
            first = self._speed[r.name] = (seen.step, seen.elapsed_s, 0.0)
        steps, seconds = seen.step - first[0], seen.elapsed_s - first[1]
        if steps <= 0:  # of a sweep that is joined late: the run's whole past
            steps, seconds = seen.step, seen.elapsed_s
        return (r.max_steps - seen.step) * seconds / steps if steps > 0 else None

    def eta(self, results: Sequence[TrialResult], seen: dict[str, Seen], left: dict[str, float | None]) -> float | None:
        """Seconds until the whole sweep is done: the steps that remain, at the pace of late; None: not known yet.

        Not before the longest of those at work, behind which the other workers find nothing to do.
        """
        remain = sum(r.max_steps - (seen[r.name].step if r.name in seen else r.steps) for r in results if to_come(r))
        whole = self._pace.seconds(max(remain, 0))
        return None if whole is None else max([whole, *(s for s in left.values() if s is not None)])

    def _draw(
        self,
        results: Sequence[TrialResult],
        seen: dict[str, Seen],
        left: dict[str, float | None],
        eta: float | None,
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        if self._live is None:
            self._console = Console(stderr=True)
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table_of(results, seen, left, eta), refresh=True)


def to_come(r: TrialResult) -> bool:
    """Whether a run has steps to take: it is at work, or open; one that was stopped in this sweep has its status."""
    return r.status in ("running", "pending") or (r.status == "interrupted" and r.exit_status is None)


def standing(results: Sequence[TrialResult], eta: float | None) -> str:
    """How far the whole is, and when it will be done."""
    done = sum(r.status in DONE for r in results)
    return f"{done} of {len(results)} runs done, ETA {'-' if eta is None else human_time(eta)}"


def table_of(
    results: Sequence[TrialResult], seen: dict[str, Seen], left: dict[str, float | None], eta: float | None = None
) -> Table:
    """The live table: runs at work, then those to come, then those that ended; above it `standing`."""
    from rich.table import Table

    table = Table(title=standing(results, eta), title_justify="left", box=None, pad_edge=False)
    for name, justify in (("run", "left"), ("status", "left"), ("step", "right"), ("loss", "right"), ("val", "right"),
                          ("best", "right"), ("left", "right")):  # fmt: skip
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    order = sorted(results, key=lambda r: (r.status != "running", r.status == "pending"))
    for r in order[:MOST_ROWS]:
        at = seen.get(r.name) or Seen(r.steps, 0.0, r.final_train_loss, r.final_val_loss, r.best_val_loss)
        table.add_row(
            r.name, r.status, f"{at.step:,}/{r.max_steps:,}", number(at.loss), number(at.val_loss), number(at.best),
            human_time(s) if (s := left.get(r.name)) is not None else "",
        )  # fmt: skip
    if len(order) > MOST_ROWS:
        table.add_row(f"and {len(order) - MOST_ROWS} more", "", "", "", "", "", "")
    return table


def plain_line(
    r: TrialResult, seen: Seen, left: float | None, results: Sequence[TrialResult], eta: float | None = None
) -> str:
    """One line of a log: a run, and how far the whole is."""
    parts = [f"{r.name}: step {seen.step:,} of {r.max_steps:,}"]
    parts += [f"loss {number(seen.loss)}"] if seen.loss is not None else []
    parts += [f"validation {number(seen.val_loss)}"] if seen.val_loss is not None else []
    parts += [f"{human_time(left)} left"] if left is not None else []
    return ", ".join([*parts, standing(results, eta)])


def number(value: float | None) -> str:
    """A loss with four decimals; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"
