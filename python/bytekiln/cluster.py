"""The Ray cluster that is there already.

In: the environment. Out: ray, connected. Called by `count_ray` and `sweep.ray` for `--ray`; ray is imported here only,
when it is asked for.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from bytekiln.errors import ConfigError, MissingExtraError


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
