"""Checkpoints: whole or absent, no bit changes unseen, nothing half-written stays."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bytekiln.checkpoint import (
    Checkpoint,
    checkpoints_in,
    load_checkpoint,
    newest_whole,
    remove_old,
    resolve,
    save_checkpoint,
)
from bytekiln.config import from_flat
from bytekiln.errors import BytekilnError, FileError, FormatError, MismatchError
from bytekiln.train import train
from lm_runs import tiny


def make(step: int = 3, fill: float = 1.0) -> Checkpoint:
    return Checkpoint(
        step=step,
        config=from_flat({"vocab_size": 7}),
        model={"w": torch.full((3, 4), fill)},
        training={"exp_avg/w": torch.arange(12.0).reshape(3, 4)},
        state={"tokens": 12, "owed": None},
        tokenizer_json="{}",
    )


def test_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints/checkpoint_3"
    save_checkpoint(path, make())
    back = load_checkpoint(path)
    assert (back.step, back.config, back.tokenizer_json) == (3, make().config, "{}")
    assert torch.equal(back.model["w"], make().model["w"])
    assert torch.equal(back.training["exp_avg/w"], make().training["exp_avg/w"])
    assert back.state["tokens"] == 12
    assert load_checkpoint(path, weights_only=True).training == {}
    assert sorted(p.name for p in path.iterdir()) == [
        "checksums.json",
        "config.toml",
        "model.safetensors",
        "state.json",
        "tokenizer.json",
        "training.safetensors",
    ]


def test_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_best"
    save_checkpoint(path, make())
    save_checkpoint(path, make(9, 2.0))
    assert load_checkpoint(path).step == 9
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_best"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "checkpoint_3"
    save_checkpoint(path, make())
    return path


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    dice = random.Random(5)
    files = sorted(saved.iterdir())
    places = [(f, i) for f in files for i in range(f.stat().st_size * 8)]
    for file, bit in dice.sample(places, 300) + [(f, 0) for f in files]:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(BytekilnError) as found:
            load_checkpoint(saved)
        assert str(saved) in str(found.value)
        file.write_bytes(whole)
    assert load_checkpoint(saved).step == 3


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training.safetensors", "config.toml", "state.json", "checksums.json"]
)
def test_a_missing_file_and_a_cut_one_are_named(saved: Path, name: str) -> None:
    file = saved / name
    whole = file.read_bytes()
    for damage in (lambda: file.unlink(), lambda: file.write_bytes(whole[: len(whole) // 2])):
        damage()
        with pytest.raises((FileError, FormatError, MismatchError), match=name):
            load_checkpoint(saved)
        file.write_bytes(whole)


def test_an_added_file_is_noticed(saved: Path) -> None:
    (saved / "extra.bin").write_bytes(b"x")
    with pytest.raises(MismatchError, match=r"extra\.bin"):
        load_checkpoint(saved)
    (saved / "extra.bin").unlink()


def test_what_a_path_means(tmp_path: Path) -> None:
    saved = tmp_path / "run/checkpoints/checkpoint_20"
    save_checkpoint(saved, make(20))
    save_checkpoint(saved.with_name("checkpoint_9"), make(9))
    for given in (saved, f"{saved}.pt", tmp_path / "run", tmp_path / "run/checkpoints"):
        assert resolve(given) == saved
    assert resolve(saved.with_name("checkpoint_9")).name == "checkpoint_9"
    with pytest.raises(FileError, match=r"checkpoint_7\.pt: found nothing"):
        resolve(saved.with_name("checkpoint_7.pt"))
    with pytest.raises(FileError, match="folder without checkpoint"):
        resolve(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"\x80\x02")
    with pytest.raises(FormatError, match=r"model.pt: found a file.*never opened"):
        resolve(tmp_path / "model.pt")


def test_newest_whole_one(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save_checkpoint(tmp_path / f"checkpoint_{step}", make(step))
    assert [s for s, _ in checkpoints_in(tmp_path)] == [100, 20, 5]
    (tmp_path / "checkpoint_100/state.json").unlink()
    (tmp_path / "checkpoint_20/model.safetensors").write_bytes(b"")
    said: list[str] = []
    found = newest_whole(tmp_path, said.append)
    assert found is not None
    assert found[1].step == 5
    assert ["checkpoint_100" in said[0], "checkpoint_20" in said[1]] == [True, True]
    assert newest_whole(tmp_path / "none", said.append) is None


def test_old_ones_and_leftovers_go(tmp_path: Path) -> None:
    for name in ("checkpoint_5", "checkpoint_20", "checkpoint_100", "checkpoint_best", ".checkpoint_7.99.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    remove_old(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_100", "checkpoint_20", "checkpoint_best"]
    remove_old(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_keeps_as_many_as_it_was_told(tmp_path: Path) -> None:
    """On the way, and at the end too, where a resume with a smaller number may have saved no numbered one."""
    saved = tmp_path / "run/checkpoints"
    counts: list[int] = []

    def numbered() -> list[str]:
        return sorted(p.name for p in saved.glob("checkpoint_*") if p.name[-1].isdigit())

    train(tiny(tmp_path, max_steps=6, keep_checkpoints=2), say=lambda _: counts.append(len(numbered())))
    assert max(counts) == 2
    assert numbered() == ["checkpoint_4", "checkpoint_6"]
    train(tiny(tmp_path), resume="auto", given={"max_steps": 7, "keep_checkpoints": 1})
    assert numbered() == ["checkpoint_6"]
    assert (saved / "checkpoint_final").is_dir()


def test_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint_best"
    save_checkpoint(path, make())

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="checkpoint_best: cannot be written: no space left on device"):
        save_checkpoint(path, make(9))
    monkeypatch.undo()
    assert load_checkpoint(path).step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_best"]


def test_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    """The kernel itself refuses the bytes, in the middle of the weights."""
    code = (
        "import sys, torch, resource, signal\n"
        "from pathlib import Path\n"
        "from bytekiln.checkpoint import Checkpoint, save_checkpoint\n"
        "from bytekiln.config import from_flat\n"
        "from bytekiln.errors import FileError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    save_checkpoint(Path(sys.argv[1]) / 'checkpoint_1',"
        " Checkpoint(1, from_flat({}), {'w': torch.zeros(100_000)}))\n"
        "except FileError as e:\n"
        "    print(e)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "checkpoint_1: cannot be written" in ran.stdout, ran.stdout + ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "checkpoint_1", make())
