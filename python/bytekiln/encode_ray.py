"""Encoding on a Ray cluster that is there already: a task a part of the inputs, their files joined here.

In: inputs in a folder that the cluster's machines share. Out: the token files that one process would write. Called by
`encode_flags` for `--ray`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bytekiln import _core
from bytekiln.atomic import AtomicFile, in_our_words, write_file
from bytekiln.cluster import Answer, answer, connect, gather, has_records, sizes_of
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, TextError
from bytekiln.inputs import Inputs
from bytekiln.tokens.files import refuse_link
from bytekiln.tokens.join import Part, join, manifest_of, verify

LEAST_PART = 1 << 20
"""Bytes of input below which no task is worth while."""
HELD_S = 30.0
"""How long a task waits for one of a killed command that still writes the same part."""
VERSION = 1
"""Of `run.json`, which says of which run the parts are."""
Setting = list[str]
"""Name and value, as JSON has it."""


def encode_there(
    tokenizer: _core.Tokenizer, inputs: Inputs, out: str, settings: dict[str, Any], part: tuple[int, int]
) -> Answer[tuple[list[Part], int]]:
    """The task: one part of the inputs. Returns its files, and how many of their ids were there already.

    A part that an earlier run has finished is verified, not made again; one that it has begun is gone on with.
    """

    def encode() -> tuple[list[Part], int]:
        with suppress(BytekilnError, KeyError, TypeError):
            done = [(path, manifest_of(path)) for path in outputs(Path(out), settings["split"])]
            for path, manifest in done:
                verify(path, manifest)
            return done, sum(manifest["tokens"] for _, manifest in done)
        until = time.monotonic() + HELD_S
        while True:
            try:
                made, before = _core.encode_files(tokenizer, inputs, out, part=part, **settings)
                return [(Path(path), manifest) for path, manifest in made], before
            except FileError as error:
                if "another process is writing it" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.2)

    return answer(encode)


def outputs(out: Path, split: dict[str, float] | None) -> list[Path]:
    """The files of an encoding without shards: `out`, and one for each share, in the order of their names."""
    return [out, *(out.with_name(f"{out.stem}_{name}{out.suffix}") for name in sorted(split or ()))]


def parts_folder(out: Path) -> Path:
    """Where the parts of `out` lie until they are joined, those of a run that was stopped too."""
    return out.with_name(f".{out.name}.parts")


def encode_on_cluster(
    tokenizer: _core.Tokenizer,
    inputs: Inputs,
    out: Path,
    settings: dict[str, Any],
    progress: Callable[[str, int, int], object],
) -> tuple[list[Part], int]:
    """Encode on all machines; parts lie beside `out` until they are joined.

    Four tasks a processor, so that a slow machine does not keep the others waiting; each on one thread, unless
    `settings` say more. A run that was stopped, by whatever, is gone on with by the same call, on a cluster of another
    size, too. Returns the files, and how many of their ids were there already.

    Raises:
        MissingExtraError, ConfigError, FileError, TextError, FormatError: as `encode_files`; a task's error is this
        command's.
    """
    ray = connect()
    files, overwrite = _core.find_inputs(inputs), settings["overwrite"]
    size, threads = sum(sizes_of(files)), settings["threads"] or 1
    at_once = max(int(ray.cluster_resources().get("CPU", 1)) // threads, 1)
    field = inputs.field if has_records(files) else None
    there = inputs._replace(paths=[str(f.resolve()) for f in files], field=field)
    task_settings = {**settings, "threads": threads, "overwrite": True}
    run = _Run(parts_folder(out), _settings(tokenizer, there, files, settings), overwrite=overwrite)
    paths = outputs(out, settings["split"])
    for path in paths:
        refuse_link(path)
    with ExitStack() as stack:
        # Its only writer from here on, and nothing but a lock until all parts are there. Between two names an earlier
        # run was stopped: those that are there are its own.
        replace = overwrite or run.is_joining
        written = [stack.enter_context(AtomicFile(path, overwrite=replace)) for path in paths]
        count = run.begin(max(min(4 * at_once, size // LEAST_PART), 1))
        try:
            task = ray.remote(num_cpus=threads, max_retries=2)(encode_there)
            names = [run.folder / f"{number:05}.npy" for number in range(count)]
            refs = [
                task.remote(tokenizer, there, str(path.resolve()), task_settings, (number, count))
                for number, path in enumerate(names, 1)
            ]
            made = gather(ray, refs, lambda done: progress("encode", size * len(done) // count, size))
            # By the paths of this machine; all parts of one output, of the next.
            parts = [[(run.folder / path.name, about) for path, about in of_task] for of_task, _ in made]
            by_output = list(zip(written, zip(*parts, strict=True), strict=True))
            for ids, of_one in by_output:
                if settings["split"] and not any(about["tokens"] for _, about in of_one):
                    raise ConfigError(
                        f"split: no document fell to {ids.path}; expected more documents, another share or another seed"
                    )
            run.note(count, joining=True)
            joined = [join(of_one, files, ids, overwrite=replace) for ids, of_one in by_output]
        except (TextError, FormatError, ConfigError, MismatchError):
            run.remove()  # as by one process: nobody can go on with these
            raise
        run.remove()
        return joined, sum(resumed for _, resumed in made)


def _settings(
    tokenizer: _core.Tokenizer, inputs: Inputs, files: Sequence[Path], settings: dict[str, Any]
) -> list[Setting]:
    """All that decides what is written, by name: as the core's states have it."""
    known: dict[str, object] = {"tokenizer": tokenizer.hash}
    known |= {name: settings[name] for name in ("dtype", "append_eot", "errors", "split", "seed", "index")}
    known |= {"field": inputs.field, "sample": inputs.sample, "seed of the sample": inputs.seed}
    known["version of bytekiln"] = _core.__version__
    for number, file in enumerate(files, 1):
        about = file.stat()
        known[f"input {number}"] = f"{file.resolve()} of {about.st_size} bytes, {about.st_mtime_ns} ns"
    return [
        [name, json.dumps(value, sort_keys=True) if not isinstance(value, str) else value]
        for name, value in known.items()
    ]


def _checksum(kept: dict[str, object]) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()}"


class _Run:
    """The folder of parts, of an unfinished run of the same kind or of a new one."""

    def __init__(self, folder: Path, asked: list[Setting], *, overwrite: bool) -> None:
        """See what is there; change nothing.

        Raises:
            ConfigError: it is of another run, the first difference of which is named.
            FormatError: nobody can tell of which.
        """
        self.folder, self._about, self._asked = folder, folder / "run.json", asked
        self._count, self.is_joining = 0, False
        begin_anew = "expected the same to go on, another name, or --overwrite to begin anew"
        try:
            kept = json.loads(self._about.read_bytes())
            if kept.pop("checksum", None) != _checksum(kept) or kept["version"] != VERSION:
                raise ValueError("another version or other bytes")
            theirs, count = [list(map(str, setting)) for setting in kept["settings"]], int(kept["parts"])
            is_joining = bool(kept["joining"])
        except FileNotFoundError:
            return  # stopped before anything was begun, if at all
        except OSError as error:
            raise in_our_words(self._about, error) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if overwrite:
                return
            raise FormatError(
                f"{self._about}: is a broken state of an unfinished run ({error}); expected a whole one, another name, "
                "or --overwrite to begin anew"
            ) from None
        if theirs == asked:
            self._count, self.is_joining = count, is_joining
        elif not overwrite:
            none = ["inputs", "fewer"]
            at = next(n for n in range(max(len(theirs), len(asked))) if theirs[n : n + 1] != asked[n : n + 1])
            one, other = (" ".join(those[at] if at < len(those) else none) for those in (theirs, asked))
            raise ConfigError(f"{folder}: is of an unfinished run with {one}; found {other}; {begin_anew}")

    def begin(self, count: int) -> int:
        """Make the folder, of `count` parts or as many as it has. Returns which."""
        if not self._count:
            try:
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self.folder.mkdir()
            except OSError as error:
                raise in_our_words(self.folder, error) from None
            self._count = count
            self.note(count, joining=False)
        return self._count

    def note(self, count: int, *, joining: bool) -> None:
        """Say how far the run is."""
        kept: dict[str, object] = {
            "format": "bytekiln-parts", "version": VERSION, "parts": count, "joining": joining, "settings": self._asked
        }  # fmt: skip
        kept["checksum"] = _checksum(kept)
        write_file(self._about, json.dumps(kept, indent=1).encode() + b"\n", overwrite=True)

    def remove(self) -> None:
        """The run is over, or what it left is of no use."""
        shutil.rmtree(self.folder, ignore_errors=True)
