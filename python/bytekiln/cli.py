"""Entry points of the commands: find the module, run it, turn its end into an exit status.

Each command is imported only when it runs, so that `bpe-encode --version` answers in milliseconds and
tokenizer commands never load torch. `python -m bytekiln.cli bpe-train …` works too.

Exit status: 0 done, 1 internal error or every run of a sweep failed, 2 the user's mistake, 3 training diverged, 4 some
runs of a sweep failed, 129 (a closed terminal), 130 and 143 interrupted.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import NoReturn

from bytekiln.console import error_console_line, nearest, note_start
from bytekiln.errors import BytekilnError, ConfigError, DivergedError

COMMANDS = {
    "bpe-train": ("bytekiln.cli_train", "train", "train a BPE tokenizer on text files"),
    "bpe-count": ("bytekiln.cli_count", "count", "count the words of text files, for bpe-train --counts"),
    "bpe-encode": ("bytekiln.cli_bpe", "encode", "turn text files into a token file"),
    "bpe-inspect": ("bytekiln.cli_inspect", "inspect", "measure tokenizers on a text, and show their tokens"),
    "lm-train": ("bytekiln.cli_lm", "train", "train a Transformer language model"),
    "lm-plan": ("bytekiln.cli_plan", "plan", "count parameters, FLOPs, memory and time before a run"),
    "lm-sample": ("bytekiln.cli_lm", "sample", "generate text from a trained model"),
    "lm-score": ("bytekiln.cli_score", "score", "measure a model: loss, bits a byte, HellaSwag and other sets"),
    "lm-sweep": ("bytekiln.cli_sweep", "sweep", "train runs that differ, side by side, and compare them"),
    "lm-report": ("bytekiln.cli_report", "report", "compare runs and sweeps on one page"),
}

UNLISTED = {"lm-stack": ("bytekiln.stack.command", "stack")}
"""What only `lm-sweep` calls: it has no command of its own."""

USERS_TROUBLE = frozenset(
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOENT EISDIR ENOTDIR ENAMETOOLONG".split()
)
"""Operating-system errors that tell of the user's files and disks, not of a mistake in the program."""


PR_SET_PDEATHSIG = 1
"""Of Linux's `prctl`."""


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt no `except Exception` may swallow it."""


def _on_sigterm(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _end_with(parent: int) -> None:
    """Get SIGTERM when the process that started this one dies, a run of a killed sweep for instance; Linux only."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died before
            sys.exit(128 + signal.SIGTERM)


def run(command: str, argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; nothing escapes but `--help` and `--version` (SystemExit 0).

    With BYTEKILN_DEBUG=1 every error is raised instead, with its traceback.
    """
    module, function = UNLISTED.get(command) or COMMANDS[command][:2]
    if argv is None:
        note_start()
    args = sys.argv[1:] if argv is None else argv
    if command.startswith("lm-"):
        # Before torch loads OpenMP: its threads otherwise spin while they wait, and on a machine that has other
        # work a training step takes eight times as long (docs/performance.md).
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if (parent := os.environ.pop("BYTEKILN_PARENT", "")).isdigit():
        _end_with(int(parent))
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))  # noqa: SIM115, PTH123
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
        status = int(getattr(import_module(module), function)(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print(f"{command}: terminated", file=sys.stderr)
        return 143
    except BrokenPipeError:
        # The reader (head, less) has gone. Point stdout elsewhere so that Python's exit does not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SystemExit:
        raise
    except BaseException as exc:  # the last line of defence, a panic of the core included
        if os.environ.get("BYTEKILN_DEBUG") == "1":
            raise
        return _status_of(exc)
    finally:
        if before is not None:  # of Python's own making: whoever called this, and what it forks, has its way back
            signal.signal(signal.SIGTERM, before)
    return status


def _status_of(exc: BaseException) -> int:
    if isinstance(exc, BytekilnError):
        error_console_line(exc)
        return 3 if isinstance(exc, DivergedError) else 2
    if isinstance(exc, OSError) and exc.errno in USERS_TROUBLE:
        where = exc.filename if exc.filename is not None else "output"
        error_console_line(ConfigError(f"{where}: {(exc.strerror or str(exc)).lower()}"))
        return 2
    if isinstance(exc, MemoryError):
        error_console_line(MemoryError(f"out of memory: {exc}" if str(exc) else "out of memory"))
        return 1
    error_console_line(
        RuntimeError(f"internal error: {type(exc).__name__}: {exc} (BYTEKILN_DEBUG=1 shows where it comes from)")
    )
    return 1


def bpe_train() -> int:
    """Entry point of `bpe-train`."""
    return run("bpe-train")


def bpe_count() -> int:
    """Entry point of `bpe-count`."""
    return run("bpe-count")


def bpe_encode() -> int:
    """Entry point of `bpe-encode`."""
    return run("bpe-encode")


def bpe_inspect() -> int:
    """Entry point of `bpe-inspect`."""
    return run("bpe-inspect")


def lm_train() -> int:
    """Entry point of `lm-train`."""
    return run("lm-train")


def lm_plan() -> int:
    """Entry point of `lm-plan`."""
    return run("lm-plan")


def lm_sample() -> int:
    """Entry point of `lm-sample`."""
    return run("lm-sample")


def lm_score() -> int:
    """Entry point of `lm-score`."""
    return run("lm-score")


def lm_sweep() -> int:
    """Entry point of `lm-sweep`."""
    return run("lm-sweep")


def lm_report() -> int:
    """Entry point of `lm-report`."""
    return run("lm-report")


def main(argv: list[str] | None = None) -> int:
    """`python -m bytekiln.cli COMMAND …`."""
    if argv is None:
        note_start()
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: python -m bytekiln.cli COMMAND …\n\ncommands:")
        print("\n".join(f"  {name:{width}}  {what}" for name, (_, _, what) in COMMANDS.items()))
        return 0
    command = args[0].replace("_", "-")
    if command not in COMMANDS and command not in UNLISTED:
        meant = nearest(command, COMMANDS)
        hint = f"did you mean {meant}?" if meant else "expected one of " + ", ".join(COMMANDS)
        error_console_line(ConfigError(f"unknown command {args[0]}; {hint}"))
        return 2
    return run(command, args[1:])


if __name__ == "__main__":
    sys.exit(main())
