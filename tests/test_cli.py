"""The frame that all commands share: flags, help, version, exit statuses, speed of answering."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bytekiln import cli, console
from bytekiln.errors import BytekilnError, ConfigError, DivergedError, FileError, OutputExistsError
from conftest import ROOT


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> int:
    """The exit status of a command that raises `error`."""

    class Module:
        @staticmethod
        def train(argv: list[str]) -> int:
            if error is not None:
                raise error
            return 0

    monkeypatch.setattr(cli, "import_module", lambda name: Module)
    before = signal.getsignal(signal.SIGTERM)
    try:
        return cli.run("bpe-train", [])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (BytekilnError("a: found b; expected c"), 2, "error: a: found b; expected c\n"),
        (FileError("x.txt: no such file"), 2, "error: x.txt: no such file\n"),
        (OutputExistsError("x: exists"), 2, "error: x: exists\n"),
        (ConfigError("two\n lines"), 2, "error: two; lines\n"),
        (DivergedError("step 9: loss is nan"), 3, "error: step 9: loss is nan\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out.npy"), 2, "error: out.npy: no space left on device\n"),
        (MemoryError(), 1, "error: out of memory\n"),
        (KeyboardInterrupt(), 130, "bpe-train: interrupted\n"),
        (cli.Terminated(), 143, "bpe-train: terminated\n"),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
    status: int,
    line: str,
) -> None:
    assert ending(monkeypatch, error) == status
    assert capsys.readouterr().err == line


def test_internal_errors_are_one_line_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BYTEKILN_DEBUG", raising=False)
    assert ending(monkeypatch, TypeError("oh")) == 1
    assert capsys.readouterr().err.startswith("error: internal error: TypeError: oh (BYTEKILN_DEBUG=1 ")
    monkeypatch.setenv("BYTEKILN_DEBUG", "1")
    with pytest.raises(TypeError):
        ending(monkeypatch, TypeError("oh"))


def a_command(body: str) -> str:
    """A program whose command `x` runs `body`."""
    return (
        "import sys, time\nfrom bytekiln import cli\n"
        "cli.COMMANDS['x'] = ('__main__', 'command', '')\n"
        f"def command(argv):\n    {body}\n    return 0\n"
        "sys.exit(cli.run('x', []))"
    )


def test_sigterm_ends_with_143(tmp_path: Path) -> None:
    code = a_command("print('up', flush=True); time.sleep(60)")
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout is not None and p.stdout.readline() == "up\n"
    p.terminate()
    _, err = p.communicate(timeout=20)
    assert (p.returncode, err) == (143, "x: terminated\n")


def test_a_closed_pipe_is_quiet() -> None:
    code = a_command("[print('y' * 99) for _ in range(99999)]")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout is not None and p.stderr is not None
        p.stdout.readline()
        p.stdout.close()
        assert p.stderr.read() == b""
    assert p.returncode == 141


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_and_has_an_example(command, name: str) -> None:
    text = command(name, "--help").stdout
    assert len(text.splitlines()) <= 110
    assert max(map(len, text.splitlines())) <= 120
    assert name in text.partition("examples:")[2]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_version(command, name: str) -> None:
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert command(name, "--version").stdout.startswith(f"bytekiln {version} (Unicode ")


def test_every_command_has_its_entry_point() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == set(cli.COMMANDS)
    for name, target in scripts.items():
        assert target == f"bytekiln.cli:{name.replace('-', '_')}"
        assert callable(getattr(cli, name.replace("-", "_")))


def test_the_module_dispatches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)
    assert cli.main(["bpe-trian"]) == 2
    assert "did you mean bpe-train?" in capsys.readouterr().err


@pytest.mark.parametrize("code", ["import bytekiln", "from bytekiln.cli import bpe_encode; bpe_encode()"])
def test_answers_at_once(code: str) -> None:
    """`import bytekiln` and `bpe-encode --version` load nothing that they do not need, however fast the machine is."""
    shown = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "

    def loaded(code: str) -> set[str]:
        line = [sys.executable, "-c", shown + code, "--version"]
        return set(subprocess.run(line, capture_output=True, text=True, check=True).stderr.split())

    more = loaded(code) - loaded("pass")
    foreign = {name.partition(".")[0] for name in more} - set(sys.stdlib_module_names) - {"bytekiln"}
    assert "bytekiln" in more and not foreign
    # Each of these takes a millisecond or more.
    slow = "asyncio ctypes dataclasses difflib fractions hashlib http inspect shutil subprocess tempfile textwrap"
    assert not more & set(slow.split())
    assert "bytekiln.characters_file" not in more
    if code == "import bytekiln":
        assert not more & {"argparse", "json", "pathlib", "re", "typing"}


@pytest.fixture
def parser() -> console.Parser:
    p = console.Parser("potter", description="Turns.", examples=["potter bowl"])
    p.add_argument("inputs", nargs="*")
    p.add_argument("--clay_size", "--clay-weight", type=int)
    p.add_argument("--lr", type=float)
    return p


def test_hyphens_and_underscores_are_one(parser: console.Parser) -> None:
    for spelling in ("--clay-size", "--clay_size", "--clay_weight"):
        assert parser.parse_args([spelling, "3"]).clay_size == 3
        assert parser.parse_args([f"{spelling}=3"]).clay_size == 3


def test_values_keep_their_underscores_and_signs(parser: console.Parser) -> None:
    assert parser.parse_args(["<|a_b|>", "--lr", "-1e-3"]).inputs == ["<|a_b|>"]
    assert parser.parse_args(["--lr", "-1e-3"]).lr == -1e-3
    assert parser.parse_args(["--", "--a_b"]).inputs == ["--a_b"]


def test_flags_and_inputs_mix(parser: console.Parser) -> None:
    assert parser.parse_intermixed_args(["a", "--lr", "1", "b"]).inputs == ["a", "b"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--clay-sise", "3"], "unknown flag --clay-sise; did you mean --clay-size?"),
        (["--clay", "3"], "unknown flag --clay; did you mean"),
        (["--zzz"], "unknown flag --zzz; see potter --help"),
        (["--lr", "x"], "argument --lr: invalid float value: 'x'"),
    ],
)
def test_wrong_flags(parser: console.Parser, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="potter: ") as e:
        parser.parse_args(argv)
    assert message in str(e.value)


def test_progress_is_silent_when_quick_and_plain_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.Progress("turning", 10, "bowls") as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""
    now = iter(range(100))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(now)))
    with console.Progress("turning", 10, "bowls") as bar:
        for i in range(11):
            bar.update(i, loss=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 3
    assert lines[0].startswith("turning   10 %  1 of 10 bowls  loss 0.5  ")


def test_progress_draws_a_bar_on_a_terminal() -> None:
    """In a pseudo-terminal, since rich asks for one."""
    import os
    import pty

    code = (
        "import bytekiln.console as c, time\nc.QUIET_S = 0\n"
        "with c.Progress('turning', 10, 'bowls') as b:\n"
        "    for i in range(11):\n        b.update(i, loss=0.5); time.sleep(0.03)\n"
        "    print('above')"
    )
    main, side = pty.openpty()
    p = subprocess.Popen([sys.executable, "-c", code], stdout=side, stderr=side, env={**os.environ, "TERM": "xterm"})
    os.close(side)
    seen = b""
    while True:
        try:
            block = os.read(main, 4096)
        except OSError:
            break
        if not block:
            break
        seen += block
    os.close(main)
    assert p.wait(20) == 0
    assert b"turning" in seen and b"bowls" in seen and b"loss 0.5" in seen and b"above" in seen


@pytest.mark.parametrize("argv", [["--no-such-flag"], []], ids=["refused", "help is missing"])
def test_a_command_leaves_the_callers_handler(argv: list[str]) -> None:
    """Else whatever the caller forks later would end in a traceback of ours, or hang."""

    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert cli.run("bpe-inspect", argv) == 2
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_commands_clock_begins_with_its_process() -> None:
    """A second before our first import counts where the process is a command's, not where it is somebody's Python."""
    code = (
        "import time; time.sleep(1); from bytekiln import console; {}; print(time.perf_counter() - console.started())"
    )
    told = [
        float(
            subprocess.run([sys.executable, "-c", code.format(call)], capture_output=True, text=True, check=True).stdout
        )
        for call in ("console.note_start()", "pass")
    ]
    assert told[0] > 1.0 and told[1] < 1.0
