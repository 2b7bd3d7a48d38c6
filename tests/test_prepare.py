"""Before the first step: what a run may delete and overwrite (its own files only), and what a resume refuses."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bytekiln import loop, prepare
from bytekiln.checkpoint import Checkpoint, load_checkpoint, remove_all, remove_old, save_checkpoint
from bytekiln.config import from_flat
from bytekiln.data import open_data
from bytekiln.errors import ConfigError, FileError, FormatError, MismatchError, OutputExistsError
from bytekiln.metrics import read_metrics
from bytekiln.objective import Objective
from bytekiln.ranks import Ranks
from bytekiln.runfolder import locked
from bytekiln.signals import Signals
from bytekiln.train import train
from lm_runs import ONE_THREAD, TIMES, VOCAB, tiny


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_overwrite_deletes_nothing_but_its_own(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("precious/letter.txt", "checkpoint_notes/x.txt", "note.txt"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("mine")
    values = {"out_dir": str(home / "run9"), "checkpoint_dir": str(home)}
    mine = files(home)
    train(tiny(tmp_path, **values), overwrite=True)
    with pytest.raises(OutputExistsError):
        train(tiny(tmp_path, **values))
    train(tiny(tmp_path, **values, max_steps=2), overwrite=True)
    assert mine.items() <= files(home).items()
    assert not (home / "checkpoint_6").exists(), "of the old run"


def test_resume_by_path_leaves_a_config_of_the_users_alone(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("max_steps = 4\n")
    train(tiny(tmp_path, checkpoint_dir=str(tmp_path / "checkpoints"), out_dir=str(tmp_path / "r")))
    train(from_flat({}), resume=tmp_path / "checkpoints/checkpoint_2.pt")
    assert (tmp_path / "config.toml").read_text() == "max_steps = 4\n"
    assert not (tmp_path / "metrics.csv").exists()
    assert len(read_metrics(tmp_path / "r/metrics.csv")) == 7


def test_moved_run_goes_on_where_it_is(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    (tmp_path / "run").rename(tmp_path / "moved")
    train(from_flat({}), resume=tmp_path / "moved/checkpoints/checkpoint_2")
    assert not (tmp_path / "run").exists()


def test_resume_into_another_folder_is_a_new_output(tmp_path: Path) -> None:
    a, b, c = (tmp_path / n for n in "abc")
    train(tiny(tmp_path, out_dir=str(a)))
    train(tiny(tmp_path, out_dir=str(b), max_steps=2))
    before = files(a) | files(b)
    with pytest.raises(OutputExistsError):
        train(from_flat({}), resume=a / "checkpoints/checkpoint_2", given={"out_dir": str(b)})
    train(from_flat({}), resume=a / "checkpoints/checkpoint_2", given={"out_dir": str(c)})
    assert files(a) | files(b) == before
    assert [r.step for r in read_metrics(c / "metrics.csv")] == list(range(7))
    final = "checkpoints/checkpoint_final/model.safetensors"
    assert (c / final).read_bytes() == (a / final).read_bytes()


def test_going_back_removes_what_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny(tmp_path))
    saved = tmp_path / "run/checkpoints"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "_take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(from_flat({}), resume=saved / "checkpoint_2")
    assert {load_checkpoint(p).step for p in saved.iterdir()} <= {1, 2}
    monkeypatch.undo()
    assert train(tiny(tmp_path), resume="auto").status == "completed"
    assert [r.step for r in read_metrics(tmp_path / "run/metrics.csv")] == list(range(7))


def rows_but_times(run: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in vars(r).items() if k not in TIMES} for r in read_metrics(run / "metrics.csv")]


def killed_and_whole(folder: Path) -> Path:
    """The metrics of a run that stands at step 4, beside a whole one of 6 steps."""
    values = {"decay_steps": 6}
    train(tiny(folder / "whole", **values))
    train(tiny(folder, **values, max_steps=4))
    return folder / "run/metrics.csv"


def test_a_row_that_a_crash_tore_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    metrics, said = killed_and_whole(tmp_path), list[str]()
    whole = metrics.read_text()
    metrics.write_text(whole[: whole.rindex(",") - 9])
    assert train(tiny(tmp_path), resume="auto", given={"max_steps": 6}, notice=said.append).status == "completed"
    assert rows_but_times(tmp_path / "run") == rows_but_times(tmp_path / "whole/run")
    assert metrics.read_text().startswith(whole), "to the last digit, times included"
    assert said == []


@pytest.mark.parametrize(
    ("left", "found"), [(4, "rows up to step 2"), (1, "no rows"), (0, "no rows"), (None, "no rows")]
)
def test_rows_that_were_lost_stop_no_run(tmp_path: Path, left: int | None, found: str) -> None:
    metrics, said = killed_and_whole(tmp_path), list[str]()
    if left is None:
        metrics.unlink()
    else:
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:left]))
    assert train(tiny(tmp_path), resume="auto", given={"max_steps": 6}, notice=said.append).status == "completed"
    assert [line for line in said if f"metrics.csv: found {found}; expected them up to step 4" in line] == said != []
    weights = [f / "run/checkpoints/checkpoint_final/model.safetensors" for f in (tmp_path, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    kept = list(range((left or 1) - 1))
    assert [r.step for r in read_metrics(metrics)] == [*kept, 4, 5, 6]


@pytest.mark.parametrize(("cut", "rows"), [("row", 7), ("rows", 6), ("all", 2)])
def test_torn_rows_go_along_into_another_folder(tmp_path: Path, cut: str, rows: int) -> None:
    metrics, said = killed_and_whole(tmp_path), list[str]()
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join({"row": [*lines[:-1], lines[-1][:9]], "rows": lines[:-2], "all": lines[:1]}[cut]))
    where = {"out_dir": str(tmp_path / "other"), "max_steps": 6}
    saved = tmp_path / "run/checkpoints/checkpoint_4"
    assert train(from_flat({}), resume=saved, given=where, notice=said.append).status == "completed"
    assert len(read_metrics(tmp_path / "other/metrics.csv")) == rows
    told = [line for line in said if "metrics.csv: found " in line and "expected them up to step 4" in line]
    assert len(told) == (cut != "row")


def test_what_a_killed_writer_moved_aside_is_put_back(tmp_path: Path) -> None:
    """Two renames, where a system cannot exchange two folders; the process died between them."""
    for name in ("checkpoint_best", "checkpoint_2"):
        save_checkpoint(tmp_path / name, Checkpoint(2, tiny(tmp_path), {}))
    aside = tmp_path / ".checkpoint_best.77.old.tmp"
    (tmp_path / "checkpoint_best").rename(aside)
    remove_old(tmp_path, 0)
    assert load_checkpoint(tmp_path / "checkpoint_best").step == 2 and not aside.exists()
    shutil.copytree(tmp_path / "checkpoint_best", aside)
    remove_old(tmp_path, 0)
    assert not aside.exists()
    (tmp_path / "checkpoint_best").rename(aside)
    remove_all(tmp_path)
    assert list(tmp_path.glob("*checkpoint*")) == []


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_ctrl_c_ends_at_once_where_no_other_process_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    def ended(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    signals = Signals()
    config = tiny(tmp_path)
    monkeypatch.setattr(loop, "Prefetcher", ended)  # the first thing behind
    data = open_data(config, None)
    run = loop.Run(config, torch.device("cpu"), Ranks(), signals, data, None, None, 0.0, print, print)
    run.ranks = Ranks(rank=1, world=world) if world > 1 else Ranks(rank=1)  # not the first: it writes no file
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert signals.at_once is (world == 1)


def test_metrics_that_are_none_name_the_way_out(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=2))
    metrics = tmp_path / "run/metrics.csv"
    metrics.write_text(metrics.read_text().replace("\n1,", "\none,"))
    before = files(tmp_path)
    with pytest.raises(
        FormatError, match=r"metrics\.csv: line 3: found .* \(restore it, or move it away: the run then"
    ):
        train(tiny(tmp_path), resume="auto", given={"max_steps": 3})
    assert files(tmp_path) == before
    metrics.rename(tmp_path / "away.csv")
    assert train(tiny(tmp_path), resume="auto", given={"max_steps": 3}).steps == 3


def test_what_dead_writers_left_goes_and_nothing_else(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=2))
    run = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead, alive = child.pid, os.getppid()
    (run / "samples").mkdir(exist_ok=True)
    left = [f".{n}.{dead}.tmp" for n in ("metrics.csv", "tokenizer.json", "config.toml", "result.json", "layers.csv")]
    left += [f"samples/.step_2.json.{dead}.tmp", f".metrics.csv.{os.getpid()}.tmp", f".metrics.csv.{10**30}.tmp"]
    kept = [f".metrics.csv.{alive}.tmp", f".notes.csv.{dead}.tmp", ".metrics.csv.mine.tmp"]
    for name in (*left, *kept):
        (run / name).write_text("half")
    train(tiny(tmp_path), resume="auto", given={"max_steps": 3})
    assert [n for n in left if (run / n).exists()] == []
    assert [n for n in kept if (run / n).exists()] == kept


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        (
            "last_row",
            {"step": 2, "tokens": 1, "elapsed_s": 1.0, "perplexity": 1.0},
            "last_row: found perplexity; expected",
        ),
        ("owed", [1, 2], "owed: found \\[1, 2\\]; expected a row"),
        ("last_row", {"step": 2}, "last_row: found .*; expected a row"),
        ("last_row", {"step": 2, "tokens": 1, "elapsed_s": 1.0, "loss": "low"}, "last_row: found .*; expected a row"),
    ],
)
def test_a_state_that_is_none_names_its_file(tmp_path: Path, name: str, row: object, words: str) -> None:
    train(tiny(tmp_path, max_steps=2))
    path = tmp_path / "run/checkpoints/checkpoint_2"
    saved = load_checkpoint(path)
    save_checkpoint(path, dataclasses.replace(saved, state={**saved.state, name: row}))
    with pytest.raises(FormatError, match=f"checkpoint_2/state.json: {words}"):
        train(tiny(tmp_path), resume=path)


def test_second_process_in_a_run_folder_is_refused(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=2))
    before = files(tmp_path)
    with locked(tiny(tmp_path).output):
        for how in ({"overwrite": True}, {"resume": "auto", "given": {"max_steps": 4}}):
            with pytest.raises(FileError, match="run: in use by another process"):
                train(tiny(tmp_path), **how)  # type: ignore[arg-type]
    assert files(tmp_path) == before
    assert train(tiny(tmp_path), overwrite=True).steps == 6


def test_run_inside_a_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="checkpoint_2: found a checkpoint"):
        train(tiny(tmp_path, out_dir=str(tmp_path / "run/checkpoints/checkpoint_2")), overwrite=True)
    assert files(tmp_path) == before


def test_old_run_outlives_a_new_one_that_cannot_start(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    before = files(tmp_path)
    with pytest.raises(MemoryError, match="parameters does not fit"):
        train(tiny(tmp_path, d_model=1_000_000, d_ff=1_000_000), overwrite=True)
    assert files(tmp_path) == before


def test_resume_and_overwrite_contradict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found both"):
        train(tiny(tmp_path), resume="auto", overwrite=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_during_start_up(tmp_path: Path, command: Callable[..., object], number: int, status: int) -> None:
    (tmp_path / "config.toml").write_text(tiny(tmp_path).to_toml())
    code = (
        "import os, sys\nfrom bytekiln import cli, train\n"
        f"train.open_data = lambda *_: os.kill(os.getpid(), {int(number)})\n"
        f"sys.exit(cli.main(['lm-train', {str(tmp_path / 'config.toml')!r}]))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    assert ran.returncode == status, ran.stderr
    assert "internal error" not in ran.stderr


@pytest.mark.parametrize("field", ["checkpoint_dir", "metrics_path"])
def test_folders_that_cannot_be_written_are_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    place = tmp_path / "sealed"
    place.mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and real(path, mode))
    value = place if field == "checkpoint_dir" else place / "metrics.csv"
    with pytest.raises(FileError, match="sealed: no permission to write"):
        train(tiny(tmp_path, **{field: str(value)}))
    assert not (tmp_path / "run/result.json").exists()


def test_evaluation_alone_needs_the_weights_alone(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    (tmp_path / "run/metrics.csv").unlink()
    result = train(tiny(tmp_path), resume="auto", eval_only=True, given={"batch_size": 2, "lr": 5.0})
    assert (result.status, result.steps) == ("evaluated", 6)
    with pytest.raises(MismatchError, match="num_layers"):
        train(tiny(tmp_path), resume="auto", eval_only=True, given={"num_layers": 1})


def test_second_ctrl_c_ends_a_checkpoint_that_hangs(tmp_path: Path) -> None:
    """The first asks for a checkpoint; while that is written, the second does not wait for it."""
    script = """
import sys, time
from bytekiln import cli, record
real = record.Record.checkpoint
def slow(self, *args, **kwargs):
    print("saving", flush=True)
    time.sleep(60)
    return real(self, *args, **kwargs)
record.Record.checkpoint = slow
sys.exit(cli.main(["lm-train", sys.argv[1]]))
"""
    (tmp_path / "c.toml").write_text(tiny(tmp_path, max_steps=10**6, checkpoint_interval=0).to_toml(), "utf-8")
    command = [sys.executable, "-u", "-c", script, str(tmp_path / "c.toml")]
    env = {**os.environ, **ONE_THREAD}
    sent = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if ("Iter" in line and not sent) or "saving" in line:
                process.send_signal(signal.SIGINT)
                sent += 1
        assert process.wait(timeout=20) == 130
    assert sent == 2
    assert not list((tmp_path / "run/checkpoints").glob("checkpoint_*")), "nothing half-written"


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ((), "fp32"),
        (("_is_avx512_bf16_supported",), "fp32"),
        (("_is_amx_tile_supported",), "bf16"),
    ],
)
def test_precision_follows_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: tuple[str, ...], expected: str
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in has, raising=False)
    settled = prepare.resolved(tiny(tmp_path, precision="auto"), VOCAB, torch.device("cpu"), print)
    assert settled.training.precision == expected


def test_compile_auto_explains_itself(tmp_path: Path) -> None:
    said: list[str] = []
    for steps, on in ((6, False), (10**8, True)):
        config = tiny(tmp_path, compile="auto", max_steps=steps, norm_position="post")
        assert prepare.resolved(config, VOCAB, torch.device("cpu"), said.append).training.compile is on
    assert [re.sub(r"[\d,]+ s", "N s", line) for line in said] == [
        f"torch.compile: {word} (would save about N s of N s and costs about N s)" for word in ("off", "on")
    ]


def test_blocks_of_the_core_are_not_compiled(tmp_path: Path) -> None:
    said: list[str] = []
    small = {"compile": "auto", "max_steps": 10**8, "d_model": 64, "d_ff": 128, "num_heads": 4, "num_kv_heads": 4}
    for more, on in (({}, False), ({"dropout": 0.1}, True), ({"precision": "bf16"}, True), ({"d_ff": 100}, True)):
        config = tiny(tmp_path, **{**small, "precision": "fp32", **more})
        assert prepare.resolved(config, VOCAB, torch.device("cpu"), said.append).training.compile is on, more
    assert said[0] == "torch.compile: off (the core's own blocks are faster than what it makes)"


def test_a_failed_compile_is_said_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Callable[..., object]:
        def call(*args: object) -> None:
            raise RuntimeError("no C++ compiler\nwith more lines")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    said: list[str] = []
    result = train(tiny(tmp_path, compile=True), notice=said.append)
    assert (result.status, result.compiled, result.recompiles) == ("completed", False, None)
    assert [s for s in said if "compile" in s] == [
        "torch.compile failed, going on without it: RuntimeError: no C++ compiler"
    ]


def test_infinite_loss_at_the_start_is_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Objective.scores

    def infinite(self: Objective, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nll, correct = real(self, *batch)
        return nll * math.inf, correct

    monkeypatch.setattr(Objective, "scores", infinite)
    result = train(tiny(tmp_path))
    assert (result.status, result.steps, result.initial_loss) == ("diverged", 0, None)
    assert (tmp_path / "run/result.json").is_file()


def test_stale_manifest_does_not_hide_other_data(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=2))
    manifest = (tmp_path / "train.npy.json").read_bytes()
    ids = np.load(tmp_path / "train.npy")
    ids[5] = (ids[5] + 1) % 61
    np.save(tmp_path / "train.npy", ids)
    assert (tmp_path / "train.npy.json").read_bytes() == manifest
    with pytest.raises(MismatchError, match=r"train\.npy: found data"):
        train(tiny(tmp_path), resume="auto", given={"max_steps": 4})


def test_tokenizer_of_the_data_is_bound_to_the_run(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=2))
    for name in ("train.npy.json", "val.npy.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("ab" * 32, "cd" * 32))
    with pytest.raises(MismatchError, match="found tokenizer hash sha256:cdcd"):
        train(tiny(tmp_path), resume="auto", given={"max_steps": 4})


def test_max_steps_may_fall_but_says_so_and_not_below_what_is_done(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=6))
    said: list[str] = []
    two = tmp_path / "run/checkpoints/checkpoint_2"
    with pytest.raises(ConfigError, match="max_steps: found 4; expected at least 6"):
        train(tiny(tmp_path), resume="auto", given={"max_steps": 4})
    assert train(from_flat({}), resume=two, given={"max_steps": 4}, notice=said.append).steps == 4
    assert said == ["max_steps falls from 6 to 4; the decay now ends there too"]


def test_config_alone_is_compared_too(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=2))
    with pytest.raises(MismatchError, match=r"lr: found 0\.5"):
        train(tiny(tmp_path, lr=0.5), resume="auto")
