"""A run of a sweep as a process of its own: how it is started, stopped, and what its end means.

In: a run's config in its folder. Out: `lm-train` at work there, its console in `log.txt`; an exit status as one of the
sweep's statuses. Called by `sweep` and `sweep.ray`; imports no torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from bytekiln.errors import BytekilnError
from bytekiln.sweep.results import read_run

PARENT = "BYTEKILN_PARENT"
"""Environment variable: the process with which a run ends, so that none goes on unseen (`cli`)."""
TRIAL, LOG = "trial.toml", "log.txt"
FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""A run that such a signal killed did nothing wrong: it is resumed, not retried."""
EXIT_OF = {129: signal.SIGHUP, 130: signal.SIGINT, 143: signal.SIGTERM}


class Running(Protocol):
    """A run at work."""

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""

    def send(self, number: int) -> None:
        """Send it a signal."""

    def kill(self) -> None:
        """End it at once."""


class Start(Protocol):
    """How a run is started."""

    def __call__(self, folder: Path, threads: int) -> Running:
        """Start the run whose config is `trial.toml` in `folder`, which is absolute."""


class Ending(NamedTuple):
    """How a run ended."""

    status: str
    why: str
    error: str | None


class Process:
    """`lm-train` as a child that gets only the signals that are sent to it."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Start it.

        Raises:
            OSError: the folder cannot be written, or the system has no room for a process.
        """
        self._launch(command(folder), folder, threads)

    def _launch(self, run: Sequence[str], folder: Path, threads: int) -> None:
        with (folder / LOG).open("ab") as log:
            self._child = subprocess.Popen(
                run,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(threads),
                process_group=0,  # Ctrl-C in the terminal reaches the sweep alone, which passes it on once
            )

    def poll(self) -> int | None:
        """As `Running`."""
        return self._child.poll()

    def send(self, number: int) -> None:
        """As `Running`."""
        with suppress(ProcessLookupError):
            self._child.send_signal(number)

    def kill(self) -> None:
        """As `Running`."""
        with suppress(ProcessLookupError):
            self._child.kill()
        self._child.wait()


class Together(Process):
    """Several runs in one process (`stack`): each writes its own folder, the console is in that of the first."""

    def __init__(self, folders: Sequence[Path], threads: int) -> None:
        """Start them; as `Process`."""
        first = folders[0]
        for other in folders[1:]:
            with (other / LOG).open("a", encoding="utf-8") as log:
                log.write(f"trained together with {first.name}, whose {LOG} has the console\n")
        run = [sys.executable, "-m", "bytekiln.cli", "lm-stack", *(str(f / TRIAL) for f in folders)]
        self._launch([*run, "--in-place", "--resume"], first, threads)


def command(folder: Path) -> list[str]:
    """The command line of the run in `folder`: it goes on where it was, or begins."""
    run = [sys.executable, "-m", "bytekiln.cli", "lm-train", str(folder / TRIAL)]
    return [*run, "--out-dir", str(folder), "--resume", "auto"]


def environment(threads: int) -> dict[str, str]:
    """Its environment: as many threads as it may take, and who its parent is."""
    env = {**os.environ, PARENT: str(os.getpid())}
    env.setdefault("OMP_NUM_THREADS", str(threads))
    return env


def stated_threads() -> int:
    """Threads of a run by OMP_NUM_THREADS, which goes before all else; 0: it says none."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(said) if said.isdecimal() else 0


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ending(folder: Path, code: int, log_from: int = 0, log_in: Path | None = None) -> Ending:
    """What the exit status of a run means, together with what it left in its folder.

    Args:
        folder: the run's folder.
        code: exit status, negative for a signal.
        log_from: byte of `log.txt` at which this attempt began.
        log_in: whose `log.txt` has its console, where it was trained together with others.
    """
    logs = log_in or folder
    if code < 0 or code in EXIT_OF:
        number = EXIT_OF.get(code) or signal.Signals(-code)
        if number in FROM_OUTSIDE:
            how = "arrived" if code > 0 else "killed it"
            return Ending("interrupted", f"{number.name} {how}; the sweep goes on from its newest checkpoint", None)
        return Ending("failed", f"{number.name} ended it", last_line(logs, log_from) or number.name)
    if code in (0, 3):
        try:
            found = read_run(folder)
        except BytekilnError as exc:
            return Ending("failed", "its result cannot be read", str(exc))
        wanted = ("diverged",) if code == 3 else ("completed", "early_stopped")
        if found is not None and found["status"] in wanted:
            return Ending(found["status"], str(found.get("why", "")), None)
        said = "no result.json" if found is None else f"status {found['status']}"
        why = f"exit status {code} with {said}; expected {' or '.join(wanted)}"
        return Ending("failed", why, last_line(logs, log_from) or why)
    return Ending("failed", f"exit status {code}", last_line(logs, log_from) or f"exit status {code}")


def last_line(folder: Path, log_from: int = 0) -> str | None:
    """The last error in a run's log, or the last line where none is marked as one."""
    try:
        with (folder / LOG).open("rb") as f:
            f.seek(max(log_from, (folder / LOG).stat().st_size - 20_000))
            lines = [line.strip() for line in f.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return None
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = errors or lines
    return said[-1][:500] if said else None
