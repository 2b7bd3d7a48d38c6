"""A command in a tmux session of its own, which stays when the terminal is closed.

In: a session's name and a command line. Out: the session, or one clear line why not. Called by `cli_sweep`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from bytekiln.errors import ConfigError, MissingExtraError, OutputExistsError

KEPT = ("BYTEKILN_", "OMP_", "MKL_", "CUDA_", "RAY_", "HF_", "WANDB_", "PYTHON", "VIRTUAL_ENV", "PATH", "LD_LIBRARY")
"""Variables that the command gets as they are here: a running tmux server has those of its own start."""


def check(name: str) -> str:
    """The tmux program, where a session `name` can be started.

    Raises:
        MissingExtraError: tmux is not installed.
        ConfigError: no name for a session.
        OutputExistsError: there is one by that name.
    """
    tmux = shutil.which("tmux")
    if tmux is None:
        raise MissingExtraError("--detach: tmux is not installed; expected it (apt install tmux), or no --detach")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"--detach: found {name!r}; expected letters, digits, '_' and '-'")
    if subprocess.run([tmux, "has-session", "-t", f"={name}"], capture_output=True, check=False).returncode == 0:
        raise OutputExistsError(
            f"--detach: found a tmux session {name}; expected a new name (tmux attach -t {name} shows that one)"
        )
    return tmux


def detach(name: str, command: Sequence[str]) -> str:
    """Start `command` in a new session, in this folder and environment; the line that tells how to see it.

    Raises:
        MissingExtraError, ConfigError, OutputExistsError: as `check`.
    """
    tmux = check(name)
    env = [part for k, v in os.environ.items() if k.startswith(KEPT) for part in ("-e", f"{k}={v}")]
    # What ends badly stays on the screen until somebody has read it.
    line = f'{shlex.join(command)} || {{ echo "exit status $?; Enter closes this session"; read _; }}'
    start = [tmux, "new-session", "-d", "-s", name, "-x", "120", "-y", "40", *env, line]
    run = subprocess.run(start, capture_output=True, text=True, check=False)
    if run.returncode:
        said = run.stderr.strip() or f"exit status {run.returncode}"
        raise ConfigError(f"--detach: tmux: {said}; expected a new session {name}")
    return f"runs in the tmux session {name}: tmux attach -t {name} shows it, Ctrl-B D leaves it running"
