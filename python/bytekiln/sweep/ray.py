"""Runs of a sweep as tasks of a Ray cluster that is there already; the folder must be shared by its machines.

In: a run's folder. Out: `sweep.process.Running` whose process works on whichever machine Ray chose. Called by
`cli_sweep` for `--ray`.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytekiln.cluster import connect
from bytekiln.metrics import write_atomically
from bytekiln.sweep.process import Process, stated_threads

SIGNAL = "signal"
"""File in a run's folder that holds the number of a signal to pass on."""
POLL_S = 0.2


class RayStart:
    """Starts runs on the cluster; as many at once as have room."""

    def __init__(self) -> None:
        """Connect to the cluster that RAY_ADDRESS names, else to the one of this machine.

        Raises:
            MissingExtraError: ray is not installed.
            ConfigError: there is no cluster.
        """
        self._ray = connect()
        self._gpus = float(self._ray.cluster_resources().get("GPU", 0))

    def _processors(self) -> list[int]:
        """Of each machine of the cluster: a task is on one of them."""
        alive = [n["Resources"] for n in self._ray.nodes() if n["Alive"]]
        return [int(resources.get("CPU", 0)) for resources in alive] or [1]

    def jobs(self, threads: int = 0) -> int:
        """Runs that the cluster has room for, with so many threads each; 0: those of OMP_NUM_THREADS, else one.

        One a GPU, or by its processors.
        """
        each = threads or stated_threads() or 1
        return max(int(self._gpus) or sum(has // each for has in self._processors()), 1)

    def threads(self, jobs: int) -> int:
        """Threads of a run where so many are at work at once: OMP_NUM_THREADS, else the cluster's processors divided.

        As many as leave room for all of them; what is asked for must be there on one machine, or a run waits forever.
        """
        has = self._processors()
        fitting = (n for n in range(max(has), 0, -1) if sum(each // n for each in has) >= jobs)
        return stated_threads() or next(fitting, 1)

    def __call__(self, folder: Path, threads: int) -> RayRun:
        """As `sweep.process.Start`; a run of an earlier attempt with more threads than a machine has gets those."""
        (folder / SIGNAL).unlink(missing_ok=True)
        threads = max(min(threads, max(self._processors())), 1)
        task = self._ray.remote(num_cpus=threads, num_gpus=1 if self._gpus else 0, max_retries=0)(train_there)
        return RayRun(self._ray, task.remote(str(folder), threads), folder)


class RayRun:
    """A run on the cluster, as `sweep.process.Running`."""

    def __init__(self, ray: Any, task: Any, folder: Path) -> None:  # noqa: ANN401 - ray's own types
        """Under way."""
        self._ray, self._task, self._folder = ray, task, folder
        self._code: int | None = None

    def poll(self) -> int | None:
        """As `Running`; a machine that is lost has killed its run."""
        if self._code is None:
            done, _ = self._ray.wait([self._task], timeout=0)
            if done:
                try:
                    self._code = int(self._ray.get(self._task))
                except self._ray.exceptions.RayError as exc:
                    lost = isinstance(exc, self._ray.exceptions.WorkerCrashedError | self._ray.exceptions.NodeDiedError)
                    gone = isinstance(exc, self._ray.exceptions.TaskCancelledError)
                    self._code = -9 if lost or gone else 1
        return self._code

    def send(self, number: int) -> None:
        """As `Running`."""
        write_atomically(self._folder / SIGNAL, str(int(number)).encode())

    def kill(self) -> None:
        """As `Running`."""
        with suppress(Exception):  # the disk may be full, the cluster gone
            self.send(9)
        with suppress(Exception):
            self._ray.wait([self._task], timeout=10)
            self._ray.cancel(self._task, force=True)


def train_there(folder: str, threads: int) -> int:
    """The task: a process beside it, and the signals that the sweep leaves in the folder."""
    place = Path(folder)
    run = Process(place, threads)
    while (code := run.poll()) is None:
        with suppress(OSError, ValueError):
            run.send(int((place / SIGNAL).read_text()))
            (place / SIGNAL).unlink()
        time.sleep(POLL_S)
    return code
