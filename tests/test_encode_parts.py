"""`bpe-encode --part` and `--ray`: parts in order are the whole; joined, checked, gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import TokenFile, Tokenizer, _core, cli, encode_ray, train_bpe_from_iterator
from bytekiln.atomic import AtomicFile
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, OutputExistsError
from bytekiln.inputs import Inputs
from bytekiln.tokens import join as join_module
from bytekiln.tokens.join import join, read_parts
from encode_faults import EOT, WORDS, files_of, write_corpus, write_texts

Result = Any
KILN = train_bpe_from_iterator(
    ["the kiln is warm and the potter's clay don't " * 5], vocab_size=300, special_tokens=[EOT]
)
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map("".join), min_size=1, max_size=3)
HOW = st.fixed_dictionaries(
    {"threads": st.sampled_from([1, 2, 3]), "chunk_bytes": st.sampled_from([1, 7, 50, 1 << 20])}
)


@pytest.fixture
def kiln(tmp_path: Path) -> Tokenizer:
    KILN.save(tmp_path / "t.json")
    return KILN


def encode(inputs: Any, out: Path, **options: Any) -> tuple[list[tuple[Path, dict[str, Any]]], int]:
    made, before = _core.encode_files(KILN, inputs, out, **options)
    return [(Path(path), manifest) for path, manifest in made], before


@settings(max_examples=60)
@given(
    TEXTS,
    st.booleans(),
    st.sampled_from([None, True, False]),
    HOW,
    st.sampled_from([1, 2, 5]),
    st.sampled_from([".npy", ".bin"]),
    st.sampled_from([".npy", ".bin"]),
    st.sampled_from([1, 3, 1 << 20]),
    st.randoms(use_true_random=False),
)
def test_parts_in_order_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    records: bool,
    end: bool | None,
    how: dict[str, int],
    count: int,
    from_suffix: str,
    to_suffix: str,
    block: int,
    dice: random.Random,
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    inputs = write_texts(folder, texts, records)
    ((whole, _),), _ = encode(inputs, folder / f"a{to_suffix}", append_eot=end, index=True)
    paths = [folder / f"p{n}{from_suffix}" for n in range(count)]
    for n, path in enumerate(paths, 1):
        encode(inputs, path, append_eot=end, index=True, part=(n, count), **how)
    dice.shuffle(paths)
    parts = read_parts(paths)
    assert [path.name for path, _ in parts] == [f"p{n}{from_suffix}" for n in range(count)]
    for name, files in (("j", inputs), ("k", None)):
        with AtomicFile(folder / (name + to_suffix), overwrite=False) as ids, pytest.MonkeyPatch.context() as patch:
            patch.setattr(join_module, "BLOCK", block)
            joined, manifest = join(parts, files, ids, overwrite=False)
        assert joined.read_bytes() == whole.read_bytes()
        ends = [p.with_name(p.name + ".documents.npy") for p in (whole, joined)]
        assert ends[0].exists() == ends[1].exists()
        assert not ends[0].exists() or ends[0].read_bytes() == ends[1].read_bytes()
        written, expected = (json.loads(p.with_name(p.name + ".json").read_text()) for p in (joined, whole))
        assert written == manifest
        if files is None:  # their pieces, where they were divided
            sources = written.pop("sources")
            assert sum(s["bytes"] for s in sources) == sum(s["bytes"] for s in expected.pop("sources"))
        told = json.dumps(written).replace(joined.name, whole.name)
        assert told == json.dumps(expected)


def test_one_large_file_is_divided(kiln: Tokenizer, tmp_path: Path) -> None:
    (text,) = write_corpus(tmp_path, 300_000)[:1]
    ids = bytekiln.encode_files(kiln, text, tmp_path / "a.bin").array
    parts = [bytekiln.encode_files(kiln, text, tmp_path / f"p{n}.bin", part=(n, 4)) for n in range(1, 5)]
    assert b"".join((tmp_path / f"p{n}.bin").read_bytes() for n in range(1, 5)) == (tmp_path / "a.bin").read_bytes()
    assert all(abs(len(p) - len(ids) / 4) < len(ids) / 10 for p in parts)
    assert parts[1].manifest["sources"][0]["offset"] > 0 and parts[1].manifest["part"]["number"] == 2


@pytest.fixture
def three(kiln: Tokenizer, tmp_path: Path) -> list[Path]:
    """Three parts of a corpus, with the ends of documents."""
    inputs = write_corpus(tmp_path, 3000)
    paths = [tmp_path / f"p{n}.npy" for n in (1, 2, 3)]
    for n, path in enumerate(paths, 1):
        encode(inputs, path, index=True, part=(n, 3))
    return paths


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    side = path.with_name(path.name + ".json")
    manifest = json.loads(side.read_text())
    change(manifest)
    side.write_text(json.dumps(manifest))


def byte_changed(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def moved(manifest: dict[str, Any]) -> None:
    manifest["sources"][0]["offset"] += 1


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda p: p.pop(1), MismatchError, "part 2/3: found no file of it among 2; expected all 3 parts"),
        (lambda p: p.__delitem__(slice(0, 2)), MismatchError, "part 1/3: found no file of it and 1 more among 1"),
        (lambda p: p.append(p[0]), MismatchError, "p1.npy: is part 1/3, as .*p1.npy is; expected each part once"),
        (lambda p: p[1].unlink(), FileError, "p2.npy: no such file"),
        (lambda p: p[1].with_name("p2.npy.json").unlink(), FileError, "p2.npy.json: no such file"),
        (lambda p: p[1].with_name("p2.npy.json").write_text("{"), FormatError, "p2.npy.json: .*expected the manifest"),
        (lambda p: p[1].with_name("p2.npy.json").write_text("[]"), FormatError, "p2.npy.json: not a manifest"),
        (lambda p: byte_changed(p[1], 500), MismatchError, "p2.npy: checksum .*; expected .*p2.npy.json says"),
        (lambda p: os.truncate(p[1], 600), MismatchError, "p2.npy: holds 472 bytes of ids; expected"),
        (lambda p: byte_changed(p[2].with_name("p3.npy.documents.npy"), 130), MismatchError, "documents.npy: checksum"),
        (lambda p: p[2].with_name("p3.npy.documents.npy").unlink(), FileError, "p3.npy.documents.npy: no such file"),
        (lambda p: edit(p[2], lambda m: m.pop("part")), FormatError, "p3.npy.json: is no part of an encoding"),
        (lambda p: edit(p[2], lambda m: m.update(part=3)), FormatError, "p3.npy.json: found part 3; expected"),
        (lambda p: edit(p[2], lambda m: m.pop("sources")), FormatError, "p3.npy.json: found part .*; expected the man"),
        (lambda p: edit(p[2], lambda m: m.update(sources=[3])), FormatError, "p3.npy.json: found part .* as bpe"),
        (lambda p: edit(p[2], lambda m: m.pop("checksum")), FormatError, "p3.npy.json: found part .* as bpe"),
        (lambda p: edit(p[2], lambda m: m.update(document_ends=1)), FormatError, "p3.npy.json: found part .* as bpe"),
        (lambda p: edit(p[2], lambda m: m.update(dtype="int8")), FormatError, "p3.npy.json: found part .* as bpe"),
        (lambda p: edit(p[2], lambda m: m.update(shard={})), FormatError, "p3.npy: is in shards"),
        (lambda p: edit(p[2], lambda m: m["part"].update(of=4)), MismatchError, "found parts 4; expected 3"),
        (
            lambda p: edit(p[1], lambda m: m.update(tokenizer_hash="sha256:0")), MismatchError,
            "p2.npy.json: found tokenizer_hash sha256:0; expected sha256:.*, as .*p1.npy.json has it",
        ),
        (lambda p: edit(p[1], lambda m: m.update(dtype="uint32")), MismatchError, "dtype uint32; expected uint16"),
        (lambda p: edit(p[1], lambda m: m.pop("document_ends")), MismatchError, "p2.npy.json: found no document_ends"),
        (lambda p: edit(p[1], lambda m: m["part"].update(settings=[])), FormatError, "p2.npy.json: found part .* as"),
        (lambda p: edit(p[1], moved), MismatchError, "p2.npy.json: begins at byte .* of the same inputs"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(
    three: list[Path], damage: Callable[[list[Path]], object], error: type[BytekilnError], said: str
) -> None:
    damage(three)
    with pytest.raises(error, match=said):
        read_parts(three)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"errors": "replace"}, "was made with errors replace; expected error, as .*p1.npy.json has it"),
        ({"append_eot": True}, "was made with append_eot true; expected none"),
    ],
)
def test_parts_made_with_other_flags(three: list[Path], tmp_path: Path, other: dict[str, Any], said: str) -> None:
    inputs = [tmp_path / n for n in ("a.txt", "b.txt", "c.jsonl", "d.txt.gz")]
    encode(inputs, three[1], index=True, part=(2, 3), overwrite=True, **other)
    with pytest.raises(MismatchError, match=said):
        read_parts(three)
    encode(inputs, three[1], index=True, part=(2, 3), overwrite=True)
    assert [manifest["part"]["number"] for _, manifest in read_parts(three)] == [1, 2, 3]


def test_the_command_joins(command: Callable[..., Result], three: list[Path], tmp_path: Path) -> None:
    inputs = [tmp_path / n for n in ("a.txt", "b.txt", "c.jsonl", "d.txt.gz")]
    encode(inputs, tmp_path / "whole.npy", index=True)
    named = [option for path in inputs for option in ("--input", path)]
    said = command("bpe-encode", "join", *reversed(three), "--out", "j.npy", *named)
    assert "wrote j.npy" in said.stdout and "3, verified" in said.stdout
    for end in ("", ".documents.npy"):
        assert (tmp_path / f"j.npy{end}").read_bytes() == (tmp_path / f"whole.npy{end}").read_bytes()
    manifests = [(tmp_path / f"{name}.npy.json").read_text().replace(f"{name}.npy", "x") for name in ("j", "whole")]
    assert manifests[0] == manifests[1]
    command("bpe-encode", "join", *three, "--out", "j.bin")
    assert (tmp_path / "j.bin").read_bytes() == (tmp_path / "whole.npy").read_bytes()[128:]
    pieces = TokenFile.open(tmp_path / "j.bin").manifest["sources"]
    assert [s["name"] for s in pieces if s.get("offset")] and TokenFile.open(tmp_path / "j.bin").verify() is None
    before = files_of(tmp_path, "j.npy")
    (tmp_path / "link.npy").symlink_to(three[0])
    for more, message in (
        (["--out", "j.npy"], "exists already"),
        (["--out", "p1.npy", "--overwrite"], "p1.npy: is one of the inputs"),
        (["--out", "none/j.npy"], "does not exist"),
        (["--out", "link.npy", "--overwrite"], "is a symbolic link to"),
        (["--out", "j.npy", "--overwrite", "--input", "a.txt"], "input 2: found no file; expected b.txt"),
        (
            ["--out", "j.npy", "--overwrite", *named[2:4], *named[:2], *named[4:]],
            "1: found b.txt; expected a.txt",
        ),
    ):
        assert message in command("bpe-encode", "join", *three, *more, status=2).stderr
        assert files_of(tmp_path, "j.npy") == before
    divided = tmp_path / next(s["name"] for s in pieces if s.get("offset"))
    divided.write_text(divided.read_text() + "x")
    said = command("bpe-encode", "join", *three, "--out", "j.npy", "--overwrite", *named, status=2)
    assert f"{divided.name}: found" in said.stderr and "as the parts were made of it" in said.stderr
    assert files_of(tmp_path, "j.npy") == before


def test_parts_of_a_split_are_joined_each_by_itself(kiln: Tokenizer, tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path, 3000)
    encode(inputs, tmp_path / "whole.npy", split={"val": 0.3}, seed=5)
    for n in (1, 2, 3, 4, 5):
        encode(inputs, tmp_path / f"p{n}.npy", split={"val": 0.3}, seed=5, part=(n, 5))
    for which in ("", "_val"):
        parts = read_parts([tmp_path / f"p{n}{which}.npy" for n in (1, 2, 3, 4, 5)])
        with AtomicFile(tmp_path / "j.npy", overwrite=True) as ids:
            join(parts, inputs, ids, overwrite=True)
        assert (tmp_path / "j.npy").read_bytes() == (tmp_path / f"whole{which}.npy").read_bytes()
    with pytest.raises(MismatchError, match=r"p2_val\.npy\.json: found split .*; expected .*p1\.npy\.json has it"):
        read_parts([tmp_path / n for n in ("p1.npy", "p2_val.npy", "p3.npy", "p4.npy", "p5.npy")])


# --- on a cluster ---------------------------------------------------------------------------------------------


class OneProcess:
    """What `encode_on_cluster` uses of ray, one task after another in this process; stops before task `stop`."""

    exceptions = SimpleNamespace(RayError=ZeroDivisionError)

    def __init__(self, processors: int = 2, stop: int = 1000) -> None:
        self.processors, self.stop, self.done = processors, stop, 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.processors)}

    def remote(self, **_: object) -> Callable[[Any], Any]:
        return lambda task: SimpleNamespace(remote=lambda *arguments: partial(task, *arguments))

    def wait(self, left: list[Any], timeout: float, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        if self.done == self.stop:
            raise KeyboardInterrupt
        return left[:1], left[1:]

    def get(self, ref: Any) -> Any:
        self.done += 1
        return ref()

    def cancel(self, ref: object, force: bool) -> None:
        self.stop = -1  # nothing waits for what will not come


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(inputs: Any, out: Path, ray: OneProcess, tokenizer: Tokenizer = KILN, **options: Any) -> Any:
        monkeypatch.setattr(encode_ray, "connect", lambda: ray)
        monkeypatch.setattr(encode_ray, "LEAST_PART", 1000)
        options = {
            "dtype": None, "append_eot": None, "errors": "error", "overwrite": False, "threads": None, "split": None,
            "seed": 0, "index": True, **options,
        }  # fmt: skip
        return encode_ray.encode_on_cluster(tokenizer, Inputs(list(inputs)), out, options, lambda *_: None)

    return run


@pytest.mark.parametrize("more", [{}, {"split": {"val": 0.3, "test": 0.1}, "seed": 3}])
def test_on_a_cluster_a_stopped_run_keeps_its_finished_parts(
    kiln: Tokenizer, tmp_path: Path, on: Callable[..., Any], more: dict[str, Any]
) -> None:
    inputs, folder = write_corpus(tmp_path, 20_000), tmp_path / ".x.npy.parts"
    encode(inputs, tmp_path / "x.npy", index=True, **more)
    whole = files_of(tmp_path, "x.npy")
    for name in whole:
        (tmp_path / name).unlink()
    with pytest.raises(KeyboardInterrupt):
        on(inputs, tmp_path / "x.npy", OneProcess(stop=5), **more)
    parts = {p: p.stat().st_mtime_ns for p in folder.glob("*.npy") if "documents" not in p.name}
    assert len({p.name[:5] for p in parts}) == 5 and not (tmp_path / "x.npy").exists()
    # One of them is damaged: it is made again. The cluster is another one: the parts are not.
    damaged = max(parts, key=lambda path: path.stat().st_size)
    byte_changed(damaged, 200)
    ray = OneProcess(processors=1, stop=7)
    with pytest.raises(KeyboardInterrupt):
        on(inputs, tmp_path / "x.npy", ray, **more)
    changed = [p.name for p, at in parts.items() if p.stat().st_mtime_ns != at]
    assert {name[:5] for name in changed} == {damaged.name[:5]}
    ray = OneProcess(processors=1)
    made, resumed = on(inputs, tmp_path / "x.npy", ray, **more)
    assert ray.done == 8 and 0 < resumed < sum(m["tokens"] for _, m in made)
    assert [path.name for path, _ in made] == [name for name in ("x.npy", "x_test.npy", "x_val.npy") if name in whole]
    assert files_of(tmp_path, "x.npy") == whole and not folder.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"append_eot": True}, "append_eot null; found append_eot true"),
        ({"split": {"val": 0.5}}, 'split null; found split {"val": 0.5}'),
        ({"index": False}, "index true; found index false"),
        ({"tokenizer": train_bpe_from_iterator(["other"], vocab_size=260, special_tokens=[EOT])}, "tokenizer sha256"),
        ({"inputs": 2}, r"input 3 .*; found inputs fewer"),
        ({"touch": 1}, r"input 2 .*b\.txt of"),
    ],
)
def test_on_a_cluster_another_run_is_refused_by_name(
    kiln: Tokenizer, tmp_path: Path, on: Callable[..., Any], change: dict[str, Any], named: str
) -> None:
    inputs, out = write_corpus(tmp_path, 5000), tmp_path / "x.npy"
    with pytest.raises(KeyboardInterrupt):
        on(inputs, out, OneProcess(stop=2))
    change = dict(change)
    if change.pop("touch", None):
        os.utime(inputs[1])
    used = inputs[: change.pop("inputs", len(inputs))]
    before = {p.name: p.read_bytes() for p in (tmp_path / ".x.npy.parts").iterdir()}
    with pytest.raises(ConfigError, match=rf"\.x\.npy\.parts: is of an unfinished run with .*{named}.*--overwrite"):
        on(used, out, OneProcess(), **change)
    assert {p.name: p.read_bytes() for p in (tmp_path / ".x.npy.parts").iterdir()} == before
    _, resumed = on(used, out, OneProcess(), overwrite=True, **change)
    assert resumed == 0 and not [p for p in files_of_folder(tmp_path) if p.startswith(".")]


def files_of_folder(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


def test_on_a_cluster_what_cannot_be(
    command: Callable[..., Result], kiln: Tokenizer, tmp_path: Path, on: Callable[..., Any]
) -> None:
    inputs, out = write_corpus(tmp_path, 5000), tmp_path / "x.npy"
    state = tmp_path / ".x.npy.parts" / "run.json"
    with pytest.raises(KeyboardInterrupt):
        on(inputs, out, OneProcess(stop=2))
    # Another way of running is another run.
    line = ["bpe-encode", *inputs, "--tokenizer", "t.json", "--out", "x.npy"]
    assert "is of an unfinished run with --ray" in command(*line, status=2).stderr and state.exists()
    told = state.read_text()
    for broken in (
        "{",
        "[]",
        "3",
        told.replace('"parts": 8', '"parts": 9'),
        told.replace('"version": 1', '"version": 2'),
    ):
        assert broken != told
        state.write_text(broken)
        with pytest.raises(FormatError, match=r"run\.json: is a broken state of an unfinished run .*--overwrite"):
            on(inputs, out, OneProcess())
    command(*line, "--overwrite")
    assert not state.parent.exists()
    with pytest.raises(OutputExistsError, match="exists already"):
        on(inputs, out, OneProcess())
    out.unlink()
    out.symlink_to(tmp_path / "a.txt")
    with pytest.raises(FileError, match="is a symbolic link to"):
        on(inputs, out, OneProcess(), overwrite=True)
    out.unlink()
    with AtomicFile(out, overwrite=False), pytest.raises(FileError, match="another process is writing it"):
        on(inputs, out, OneProcess(), overwrite=True)
    with pytest.raises(FileError, match=r"none\.txt: no such file"):
        on([tmp_path / "none.txt"], out, OneProcess())
    # Text that cannot be encoded leaves nothing, as with one process; a part without a document is an error.
    inputs[1].write_bytes(inputs[1].read_bytes() + b"\xff")
    with pytest.raises(BytekilnError, match=r"b\.txt: byte offset"):
        on(inputs, out, OneProcess(), overwrite=True)
    with pytest.raises(ConfigError, match=r"split: no document fell to .*x_val\.npy"):
        on(inputs[:1], tmp_path / "x.npy", OneProcess(), overwrite=True, split={"val": 1e-9})
    assert not [name for name in files_of_folder(tmp_path) if name.startswith(".")]


def test_a_part_whose_writer_was_killed_a_moment_ago_is_waited_for(
    kiln: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = write_corpus(tmp_path, 500)[:1]
    settings = {"split": None, "overwrite": True, "threads": 1}
    monkeypatch.setattr(encode_ray, "HELD_S", 0.3)
    asked = (KILN, Inputs([text]), str(tmp_path / "p.npy"), settings, (1, 1))
    with AtomicFile(tmp_path / "p.npy", overwrite=False):
        made, kind, said = encode_ray.encode_there(*asked)
        assert made is None and kind == "FileError" and "another process is writing it" in said
    made, _, _ = encode_ray.encode_there(*asked)
    assert made is not None and made[0][0][1]["tokens"] > 0


def test_between_two_names_a_run_on_a_cluster_goes_on(
    kiln: Tokenizer, tmp_path: Path, on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, more = write_corpus(tmp_path, 20_000), {"split": {"val": 0.3}}
    encode(inputs, tmp_path / "x.npy", index=True, **more)
    whole = files_of(tmp_path, "x.npy")
    for name in whole:
        (tmp_path / name).unlink()
    count = 0

    def join_one(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return join(*arguments, **options)

    monkeypatch.setattr(encode_ray, "join", join_one)
    with pytest.raises(KeyboardInterrupt):
        on(inputs, tmp_path / "x.npy", OneProcess(), **more)
    assert (tmp_path / "x.npy").exists() and not (tmp_path / "x_val.npy").exists()
    on(inputs, tmp_path / "x.npy", OneProcess(), **more)
    assert files_of(tmp_path, "x.npy") == whole


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, kiln: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = write_corpus(tmp_path, 50)[:1]
    monkeypatch.setitem(sys.modules, "ray", None)
    line = [str(text), "--tokenizer", str(tmp_path / "t.json"), "--out", str(tmp_path / "x.npy"), "--ray"]
    assert cli.run("bpe-encode", line) == 2
    assert 'pip install "bytekiln[ray]"' in capsys.readouterr().err
    assert cli.run("bpe-encode", [*line, "--part", "1/2"]) == 2
    assert "--part with --ray" in capsys.readouterr().err
    assert not files_of(tmp_path, "x.npy")


def dies(*_: object) -> None:
    os._exit(1)


@pytest.mark.slow
def test_on_a_local_ray_cluster_of_two_processes(
    kiln: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    inputs = [str(p) for p in write_corpus(tmp_path, 600_000)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir="/tmp/bytekiln-ray")
    try:
        line = [*inputs, "--tokenizer", str(tmp_path / "t.json"), "--index", "--out"]
        assert cli.run("bpe-encode", [*line, str(tmp_path / "once.npy")]) == 0
        assert cli.run("bpe-encode", [*line, str(tmp_path / "ray.npy"), "--ray"]) == 0, capsys.readouterr()
        for end in ("", ".documents.npy"):
            assert (tmp_path / f"ray.npy{end}").read_bytes() == (tmp_path / f"once.npy{end}").read_bytes()
        manifests = [(tmp_path / f"{name}.npy.json").read_text().replace(name, "x") for name in ("once", "ray")]
        assert manifests[0] == manifests[1]
        # Killed in the middle, with its parts; the next one keeps what was finished.
        parts = tmp_path / ".ray.npy.parts"
        driver = subprocess.Popen(
            [sys.executable, "-m", "bytekiln.cli", "bpe-encode", *line, "ray.npy", "--ray", "--overwrite"],
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while driver.poll() is None and not (parts / "00000.npy").exists():
            time.sleep(0.001)
        driver.send_signal(signal.SIGKILL)
        said = driver.communicate()[1]
        assert driver.returncode == -signal.SIGKILL, said
        assert parts.exists()
        assert cli.run("bpe-encode", [*line, str(tmp_path / "ray.npy"), "--ray", "--overwrite"]) == 0
        assert "went on" in capsys.readouterr().out and not parts.exists()
        for end in ("", ".documents.npy"):
            assert (tmp_path / f"ray.npy{end}").read_bytes() == (tmp_path / f"once.npy{end}").read_bytes()
        split = ["--split", "val=0.2", "--seed", "1"]
        assert cli.run("bpe-encode", [*line, str(tmp_path / "one.npy"), *split]) == 0
        assert cli.run("bpe-encode", [*line, str(tmp_path / "two.npy"), *split, "--ray"]) == 0, capsys.readouterr()
        for end in ("", "_val"):
            assert (tmp_path / f"one{end}.npy").read_bytes() == (tmp_path / f"two{end}.npy").read_bytes()
            assert (tmp_path / f"one{end}.npy.json").read_text().replace("one", "two") == (
                tmp_path / f"two{end}.npy.json"
            ).read_text()
        bad = tmp_path / "bad.txt"
        bad.write_bytes(b"fine until here \xff")
        assert cli.run("bpe-encode", [*line[:-1], str(bad), "--ray", "--out", str(tmp_path / "n.npy")]) == 2
        assert "bad.txt: byte offset 16: invalid UTF-8" in capsys.readouterr().err
        assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "n"))]
        # A task that always dies is no traceback.
        monkeypatch.setattr(encode_ray, "encode_there", dies)
        assert cli.run("bpe-encode", [*line, str(tmp_path / "n.npy"), "--ray"]) == 2
        assert "--ray: a task failed (" in capsys.readouterr().err
    finally:
        ray.shutdown()
