"""What the commands say: flags in, lines and progress bars out.

Every command builds its flags with `Parser` and reports through the functions here, so that all of
them read alike. Messages go to stderr, results to stdout. rich is imported only when a bar is drawn.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from bytekiln.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

QUIET_S = 2.0
"""A job that ends sooner shows no progress at all."""
PLAIN_INTERVAL_S = 5.0
"""Without a terminal: at most one progress line in this time, so that a log stays readable."""


_process_began: list[float] = []
"""`time.perf_counter()` at the start of the process, where a command is all that it is there for."""


def note_start() -> None:
    """Say that this process runs one command: whatever has passed since its start belongs to that.

    On Linux the kernel knows when that was; elsewhere it is now, behind some imports.
    """
    if _process_began:
        return
    age_s = 0.0
    try:
        ticks = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
        age_s = float(Path("/proc/uptime").read_text("utf-8").split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        pass
    _process_began.append(time.perf_counter() - max(age_s, 0.0))


def started() -> float:
    """`time.perf_counter()` at which the command began: with its process, or, called from Python, now."""
    return _process_began[0] if _process_began else time.perf_counter()


def colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that wants colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def error_console_line(exc: BaseException) -> None:
    """Print `error: …` as one line on stderr, red on a terminal."""
    text = "error: " + "; ".join(line.strip() for line in str(exc).splitlines() if line.strip())
    if colour(sys.stderr):
        text = f"\x1b[31m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def notice(text: str) -> None:
    """Print one line on stderr: something the user should know, not a result."""
    print(text, file=sys.stderr, flush=True)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most likely meant to be, if any is close.

    >>> nearest("vocab-sise", ["vocab-size", "threads"])
    'vocab-size'
    >>> nearest("q", ["vocab-size", "threads"])
    """
    by_folded = {k.lower().replace("_", "-"): k for k in known}
    import difflib

    found = difflib.get_close_matches(name.lower().replace("_", "-"), list(by_folded), n=1, cutoff=0.55)
    return by_folded[found[0]] if found else None


def human_bytes(n: float) -> str:
    """Bytes in decimal units.

    >>> human_bytes(999), human_bytes(64_000_000)
    ('999 B', '64.0 MB')
    """
    return _scaled(n, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def human_count(n: float) -> str:
    """A count in thousands, millions, billions.

    >>> human_count(4096), human_count(22_696_448)
    ('4.1k', '22.7M')
    """
    return _scaled(n, ("", "k", "M", "G", "T"), "")


def counted(n: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "document"), counted(4096, "document")
    ('1 document', '4,096 documents')
    """
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _scaled(n: float, units: Sequence[str], space: str) -> str:
    value = float(n)
    for unit in units[:-1]:
        if abs(value) < 999.95 or (unit == units[0] and abs(value) < 1000):
            return f"{value:.0f}{space}{unit}" if unit == units[0] else f"{value:.1f}{space}{unit}"
        value /= 1000
    return f"{value:.1f}{space}{units[-1]}"


def human_time(s: float) -> str:
    """Seconds as a person says them.

    >>> human_time(0.0123), human_time(7.26), human_time(95), human_time(7260)
    ('12 ms', '7.3 s', '1 min 35 s', '2 h 01 min')
    """
    if s < 1:
        return f"{s * 1000:.0f} ms"
    if s < 59.95:
        return f"{s:.1f} s"
    whole = round(s)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def table(rows: Iterable[Sequence[object]], *, indent: str = "  ") -> str:
    """Rows as aligned columns, without a last newline.

    >>> print(table([("tokens", 4096), ("time", "1.2 s")], indent=""))
    tokens  4096
    time    1.2 s
    """
    cells = [[str(c) for c in row] for row in rows]
    width: dict[int, int] = {}
    for row in cells:
        for i, cell in enumerate(row):
            width[i] = max(width.get(i, 0), len(cell))
    return "\n".join((indent + "  ".join(c.ljust(width[i]) for i, c in enumerate(row))).rstrip() for row in cells)


class Progress:
    """Shows how far a long job is: a bar on a terminal, now and then a plain line elsewhere.

    Nothing is shown in the first two seconds. Ordinary `print` calls appear above the bar.

    >>> with Progress("reading", total=10, unit="lines") as bar:
    ...     bar.update(10, loss=0.5)
    """

    def __init__(self, description: str, total: float | None = None, unit: str = "") -> None:
        """`unit` "bytes" prints sizes; any other word counts things."""
        self.description, self.total, self.unit = description, total, unit
        self._start = self._said = time.monotonic()
        self._first: float | None = None
        self._bar: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        """Start the clock."""
        self._start = self._said = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, done: float, **fields: object) -> None:
        """Say that `done` of the total is behind us; `fields` are shown as `name value`."""
        now = time.monotonic()
        if self._first is None:
            self._first = done  # a resumed job does not start at zero: its speed is measured from here
        if now - self._start < QUIET_S:
            return
        extra = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
        if sys.stderr.isatty():
            self._draw(done, extra)
        elif now - self._said >= (PLAIN_INTERVAL_S if self._said > self._start else QUIET_S):
            self._said = now
            notice(self._plain(done, extra, now - self._start))

    def _amount(self, n: float) -> str:
        return human_bytes(n) if self.unit == "bytes" else f"{n:,.0f}"

    def _plain(self, done: float, extra: str, elapsed: float) -> str:
        parts = [self.description]
        speed = (done - (self._first or 0)) / elapsed
        if self.total:
            parts.append(f"{100 * done / self.total:3.0f} %")
            parts.append(f"{self._amount(done)} of {self._amount(self.total)}")
        else:
            parts.append(self._amount(done))
        if self.unit and self.unit != "bytes":
            parts[-1] += f" {self.unit}"
        if extra:
            parts.append(extra)
        if self.total and speed > 0:
            parts.append(f"{human_time(max(self.total - done, 0) / speed)} left")
        return "  ".join(parts)

    def _draw(self, done: float, extra: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[amount]}"),
                TextColumn("{task.fields[extra]}", markup=False),  # it may hold text of the user's
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, amount="", extra="")
        amount = self._amount(done) + (f"/{self._amount(self.total)}" if self.total else "")
        if self.unit and self.unit != "bytes":
            amount += f" {self.unit}"
        self._bar.update(self._task, completed=done, amount=amount, extra=extra)


class _VersionAction(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from bytekiln._core import UNICODE_VERSION, __version__

        print(f"bytekiln {__version__} (Unicode {UNICODE_VERSION})")
        parser.exit()


def flag(name: str) -> str:
    """The one spelling of a long flag: hyphens.

    >>> flag("--vocab_size=3_2"), flag("-h"), flag("--"), flag("<|end_of_text|>")
    ('--vocab-size=3_2', '-h', '--', '<|end_of_text|>')
    """
    if not name.startswith("--"):
        return name
    head, equals, value = name.partition("=")
    return name if " " in head else head.replace("_", "-") + equals + value


class Parser(argparse.ArgumentParser):
    """argparse as all commands use it.

    Hyphens and underscores are interchangeable in flags, `--key=value` and `--key value` mean the same, no
    flag may be abbreviated, an unknown one is an error that names the nearest, and `--version` is there.
    Errors are raised as `ConfigError`; the entry point prints them as one line and exits with 2.
    """

    def __init__(self, prog: str, *, description: str, examples: Sequence[str] = (), usage: str | None = None) -> None:
        """`examples` are whole command lines; they end the help text."""
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog="examples:\n" + "\n".join(f"  {e}" for e in examples) if examples else None,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=100),
            allow_abbrev=False,
            add_help=False,
        )
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        self.add_argument("-h", "--help", action="help", help="show this help and exit")
        self.add_argument(
            "--version", action=_VersionAction, nargs=0, dest=argparse.SUPPRESS, help="show the version and exit"
        )

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As in argparse; flags may be written with hyphens or underscores."""
        return super().add_argument(*(flag(n) for n in names), **options)

    def format_help(self) -> str:
        """As in argparse, the description filled."""
        import textwrap

        self.description = textwrap.fill(self.description or "", 100)
        return super().format_help()

    def flags(self) -> list[str]:
        """Every long flag that this command knows."""
        return [s for s in self._option_string_actions if s.startswith("--")]

    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """Normalise the spelling of flags and refuse unknown ones before argparse complains of anything else."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        given[:end] = [flag(a) for a in given[:end]]
        for a in given[:end]:
            name = a.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                meant = nearest(name, self.flags())
                self.error(
                    f"unknown flag {name}" + (f"; did you mean {meant}?" if meant else f"; see {self.prog} --help")
                )
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(f"{self.prog}: {message}")
