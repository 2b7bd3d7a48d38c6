"""A run's place on the disk: who may write there, what is ours in it, what a resume finds.

In: a resolved config. Out: folders that are free, made and locked. Called by `train`. Deletes only what a run of
this program wrote.
"""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bytekiln.checkpoint import Checkpoint, checkpoints_in, is_checkpoint, remove_all, remove_old
from bytekiln.config import OutputConfig
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, OutputExistsError
from bytekiln.metrics import read_metrics
from bytekiln.run_state import State
from bytekiln.samples_file import remove_samples

OWN_FILES = (
    "config.toml",
    "metrics.csv",
    "layers.csv",
    "result.json",
    "diverged.json",
    "record.json",
    "tokenizer.json",
    "tracking.json",
)


def lies_in(checkpoint: Checkpoint, output: OutputConfig) -> bool:
    """Whether a checkpoint is one of this run's own."""
    return checkpoint.path is not None and checkpoint.path.resolve().parent == output.checkpoints.resolve()


def check_folder(output: OutputConfig, overwrite: bool, *, resuming: bool) -> None:
    """Refuse a place where the run cannot go; nothing is touched.

    Raises:
        OutputExistsError: a run is there already.
        ConfigError, FileError: it is no place for a run.
    """
    folder, metrics = output.folder, output.metrics
    try:
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder}: found a file; expected a folder for the run")
        if is_checkpoint(folder):
            raise ConfigError(f"{folder}: found a checkpoint; expected a folder for the run (--resume goes on from it)")
        if metrics.is_dir():
            raise FileError(f"{metrics}: found a folder; expected a name for the metrics file")
        if not metrics.parent.is_dir() and not metrics.absolute().is_relative_to(folder.absolute()):
            raise FileError(f"{metrics.parent}: no such folder; expected the folder for {metrics.name}")
        there = _existing(output)
    except OSError as exc:
        raise _in_our_words(exc, folder) from None
    if there and not resuming and not overwrite:
        raise OutputExistsError(
            f"{there[0]}: found an existing run; expected a free folder: --resume auto goes on with it, "
            "--overwrite replaces it, --out-dir takes another name"
        )


def prepare_folder(output: OutputConfig, overwrite: bool, *, resuming: bool) -> None:
    """Make the run's folders, and remove what an overwritten run and killed writers left in them.

    Raises:
        BytekilnError: as `check_folder`, or it cannot be written.
    """
    check_folder(output, overwrite, resuming=resuming)
    folder = output.folder
    try:
        for parent in (folder, output.metrics.parent, output.checkpoints):
            parent.mkdir(parents=True, exist_ok=True)
        for place in (folder, output.metrics.parent, output.checkpoints):
            if not os.access(place, os.W_OK | os.X_OK):
                raise FileError(f"{place}: no permission to write; expected a writable folder")
        if not resuming:
            for path in _existing(output):
                if path.is_file():
                    path.unlink()
            remove_all(output.checkpoints)
            remove_samples(folder)
        remove_old(output.checkpoints, 0)
        _remove_unfinished(output)
    except OSError as exc:
        raise _in_our_words(exc, folder) from None


def _remove_unfinished(output: OutputConfig) -> None:
    """Remove the temporary files of `write_atomically` whose writers are dead.

    One with our own number is of a process before us; one whose number another process has now stays.
    """
    places = [(output.folder, name) for name in OWN_FILES] + [(output.metrics.parent, output.metrics.name)]
    found = [path for folder, name in places for path in folder.glob(f".{glob.escape(name)}.*.tmp")]
    for path in [*found, *(output.folder / "samples").glob(".step_*.json.*.tmp")]:
        number = path.name.split(".")[-2]
        if number.isdecimal() and (int(number) == os.getpid() or not _is_alive(int(number))):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # someone else's
    return True


@contextmanager
def locked(output: OutputConfig) -> Iterator[None]:
    """Hold the run folder and the folder of checkpoints: no other process writes there meanwhile.

    Raises:
        FileError: another process holds one of them, or it cannot be made.
    """
    with ExitStack() as held:
        for path in (output.folder, output.checkpoints):
            try:
                path.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_RDONLY)
            except OSError as exc:
                raise _in_our_words(exc, path) from None
            held.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileError(f"{path}: in use by another process; expected one run at a time") from None
            except OSError:
                pass  # a file system without locks
        yield


def rows_to_keep(
    checkpoint: Checkpoint, output: OutputConfig, state: State, notice: Callable[[str], object]
) -> Path | None:
    """The metrics file whose rows a resumed run goes on from; None where a new folder finds none.

    No row is needed to go on: where the run's own file was lost or cut short, `notice` is told which rows are gone.

    Raises:
        FormatError: the run's own file is no metrics file, or a line in it is none.
        OutputExistsError: a new `metrics_path` names a file that is not this run's.
    """
    stored, last = checkpoint.config.output, state.last_row_kept
    own = lies_in(checkpoint, output)
    beside = checkpoint.path.resolve().parent.parent / "metrics.csv" if checkpoint.path else stored.metrics
    surely = stored.metrics if stored.checkpoint_dir or stored.metrics_path else beside
    enough = last - (state.last_row is not None)  # the checkpoint has the last one (`Record`)
    paths = [_own_rows(stored, output, state)] if own else [beside, stored.metrics, surely]
    for number, path in enumerate(paths, 1):
        try:
            rows = read_metrics(path)
        except FormatError as exc:
            if own and path.stat().st_size:
                raise FormatError(
                    f"{exc} (restore it, or move it away: the run then goes on without its rows)"
                ) from None
            rows = []
        except FileError:
            if own and path.exists():
                raise
            rows = []
        reached = rows[-1].step if rows else -1
        if reached < enough and number == len(paths):
            found = f"rows up to step {reached}" if rows else "no rows"
            notice(f"{path}: found {found}; expected them up to step {last}; the run goes on without those between")
        if own or (rows and (reached >= enough or number == len(paths))):
            return path
    return None


def _own_rows(stored: OutputConfig, output: OutputConfig, state: State) -> Path:
    """The file with the rows of a run that goes on in its folder: under a new `metrics_path` it may have another name.

    Raises:
        OutputExistsError: there are rows under the new name, and they are not this run's.
    """
    new, old = output.metrics, stored.metrics
    if output.metrics_path == stored.metrics_path or new.resolve() == old.resolve():
        return new
    refusal = OutputExistsError(f"{new}: found a file that is not this run's; expected a free name for its metrics")
    try:
        rows = read_metrics(new) if new.exists() and new.stat().st_size else []
    except FormatError:
        raise refusal from None
    if not rows:
        return old if old.exists() else output.folder / "metrics.csv"  # the run may have been moved
    if state.last_row not in rows:  # not moved there, nor copied by a resume that was killed
        raise refusal
    return new


def _existing(output: OutputConfig) -> list[Path]:
    files = dict.fromkeys([*(output.folder / name for name in OWN_FILES), output.metrics])
    return [
        *(p for p in files if p.is_file()),
        *(p for _, p in checkpoints_in(output.checkpoints) if is_checkpoint(p)),
    ]


def _in_our_words(exc: OSError, folder: Path) -> BytekilnError:
    if isinstance(exc, BytekilnError):
        return exc
    reason = (exc.strerror or str(exc)).lower()
    return FileError(f"{exc.filename or folder}: {reason}; expected a writable folder for the run")
