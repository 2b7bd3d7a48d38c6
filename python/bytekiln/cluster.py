"""The Ray cluster that is there already, and tasks on it.

In: the environment. Out: ray, connected; what tasks have made. Called by `count_ray`, `encode_ray` and `sweep.ray` for
`--ray`; ray is imported here only, when it is asked for.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bytekiln import errors
from bytekiln.errors import BytekilnError, ConfigError, FileError, MissingExtraError

Made = TypeVar("Made")
Answer = tuple[Made | None, str, str]
"""What a task sends back: what it made, or the kind of a user's error and its words."""
POLL_S = 0.2
GONE_S = 10.0
"""How long tasks that are of no use any more may take to end."""


def connect() -> Any:  # noqa: ANN401 - ray's own module
    """Ray, connected to the cluster that RAY_ADDRESS names, else to the one of this machine.

    Raises:
        MissingExtraError: ray is not installed.
        ConfigError: there is no cluster.
    """
    try:
        import ray
    except ImportError:
        said = 'the package ray is not installed; expected pip install "bytekiln[ray]"'
        raise MissingExtraError(f"--ray: {said}") from None
    if ray.is_initialized():
        return ray
    where, before = os.environ.get("RAY_ADDRESS", "auto"), signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as exc:
        said = " ".join(str(exc).split())[:200]
        raise ConfigError(
            f"--ray: found no cluster at {where} ({said}); expected a running one: ray start --head"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own ends the command with exit status 15
    return ray


def sizes_of(files: Sequence[Path]) -> list[int]:
    """Bytes of files that tasks are to read.

    Raises:
        FileError: one is missing, or no file.
    """
    for file in files:
        if not file.is_file():
            raise FileError(f"{file}: no such file; expected a file that every machine of the cluster sees")
    return [file.stat().st_size for file in files]


def has_records(files: Sequence[Path]) -> bool:
    """Whether a field of records says anything to one of these files.

    >>> has_records([Path("a.txt"), Path("b.jsonl.gz")]), has_records([Path("a.txt.gz")])
    (True, False)
    """
    names = (f.with_suffix("") if f.suffix.lower() in (".gz", ".zst", ".xz", ".bz2") else f for f in files)
    return any(name.suffix.lower() in (".jsonl", ".ndjson", ".parquet") for name in names)


def answer(work: Callable[[], Made]) -> Answer[Made]:
    """What a task does, so that a user's error comes back as itself, not as Ray's with a trace of the task."""
    try:
        return work(), "", ""
    except BytekilnError as exc:
        return None, type(exc).__name__, str(exc)


def gather(ray: Any, refs: Sequence[Any], progress: Callable[[Collection[Any]], object]) -> list[Any]:  # noqa: ANN401
    """What tasks that `answer` have made, in their order; those that are left are ended where one fails.

    Args:
        ray: from `connect`.
        refs: the tasks.
        progress: called several times a second with what is made so far.

    Raises:
        BytekilnError: a task's error, as itself; or a task ended again and again, as without memory.
    """
    left, made = list(refs), dict[Any, Any]()
    try:
        while left:
            ready, left = ray.wait(left, timeout=POLL_S)
            for ref in ready:
                result, kind, said = ray.get(ref)
                if kind:
                    raise getattr(errors, kind, ConfigError)(said)
                made[ref] = result
            progress(made.values())
    except ray.exceptions.RayError as exc:
        said = next((line.strip() for line in reversed(str(exc).splitlines()) if line.strip()), type(exc).__name__)
        raise BytekilnError(
            f"--ray: a task failed ({type(exc).__name__}: {said[:300]}); expected it to end; "
            "the same command tries again"
        ) from None
    finally:
        for ref in left:
            ray.cancel(ref, force=True)
        if left:
            ray.wait(left, num_returns=len(left), timeout=GONE_S)
    return [made[ref] for ref in refs]
