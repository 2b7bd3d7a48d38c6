"""Adoption of runs that exist: what is refused before anything moves, what goes, what stays, and the sweep after it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bytekiln import cli
from bytekiln.config import RunConfig, load_config
from bytekiln.errors import ConfigError, FileError, FormatError, MismatchError
from bytekiln.sweep.adopt import adopt
from bytekiln.sweep.coordinate import run_sweep
from bytekiln.sweep.folder import open_folder, stored_trial
from bytekiln.sweep.results import TrialResult, read_results
from bytekiln.sweep.spec import changed, load_spec, trials_of
from sweep_driver import Start, write_result

SPEC = """
axes.lr = [1e-3, 2e-3]
axes.batch_size = [2, 4]
[base]
d_model = 16
num_layers = 1
num_heads = 2
context_length = 8
max_steps = 6
vocab_size = 0 # that of the data, which the run settles, as it does precision
train_data = "train.npy"
[output]
checkpoint_dir = "checkpoints/s_lr{lr}_b{batch_size}"
"""
AS = {"batch_size": 2, "lr": 1e-3}
NAME = "lr=1e-3,batch_size=2"
SHAPE = {"d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 8, "max_steps": 6}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(SPEC)
    return tmp_path


def past_run(here: Path, **fields: object) -> RunConfig:
    """A run as `lm-train` leaves it, every choice made in its config; its tensors are mere bytes."""
    given = {**SHAPE, "lr": 1e-3, "batch_size": 2, "vocab_size": 61, "precision": "fp32", "out_dir": str(here / "r")}
    config = load_config(None, {**given, "checkpoint_dir": str(here / "c"), **fields}, say=lambda _: None)
    last = config.training.max_steps
    for name, step in (("checkpoint_4", 4), ("checkpoint_final", last)):
        place = config.output.checkpoints / name
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps({"step": step, "val_loss": 2.0, "best_val_loss": 2.0}))
        (place / "model.safetensors").write_bytes(b"tensors of step %d" % step)
        (place / "config.toml").write_text(config.to_toml())
        sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in place.iterdir()}
        (place / "checksums.json").write_text(json.dumps({"sha256": sums}))
    write_result(here / "r", steps=last, max_steps=last)
    (here / "r/config.toml").write_text(config.to_toml())
    (here / "r/metrics.csv").write_text("step\n")
    return config


def all_files(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def begin(start: Start | None = None) -> list[TrialResult]:
    spec = load_spec("s.toml")
    open_folder(spec, Path("s"))
    return run_sweep(trials_of(spec), "s", start=start or Start())


@pytest.mark.parametrize("source", ["r", "c"])
def test_the_sweep_takes_an_adopted_run_for_its_own(here: Path, source: str) -> None:
    """The run has settled what the sweep leaves open, vocabulary and precision."""
    past_run(here)
    entry, _ = adopt(here / source, AS, sweep="s.toml")
    assert entry.name == NAME and entry.status == "completed", "in the order of the sweep's axes"
    assert not (here / "r").exists() and not (here / "c").exists()
    assert (here / "checkpoints/s_lr1e-3_b2/checkpoint_final").is_dir()
    stored = stored_trial(Path("s"), NAME).config
    assert (stored.training.precision, stored.model.vocab_size) == ("auto", 0)
    assert load_config(Path("s/runs") / NAME / "config.toml").training.precision == "fp32"
    results = begin(start := Start())
    assert NAME not in start.started and len(start.started) == 3
    assert [r.status for r in results] == ["completed"] * 4


def test_another_run_is_refused_before_anything_moves(here: Path) -> None:
    past_run(here, d_model=32, max_steps=8)
    before = all_files(here)
    words = r"d_model: found 32 in the run's config; expected 16 .*--set d_model=32 .*--set max_steps=8"
    with pytest.raises(MismatchError, match=words):
        adopt(here / "c", AS, sweep="s.toml")
    with pytest.raises(MismatchError, match="lr: found 1e-3 in the run's config; expected 2e-3"):
        adopt(here / "c", {**AS, "lr": 2e-3}, sweep="s.toml")
    assert all_files(here) == before
    wider = {"d_model": 32, "max_steps": 8}
    adopt(here / "c", AS, sweep="s.toml", changes=lambda spec: changed(spec, given=wider))
    open_folder(spec := changed(load_spec("s.toml"), given=wider), Path("s"))
    run_sweep(trials_of(spec), "s", start=(start := Start()))
    assert NAME not in start.started


def test_a_sweep_that_has_begun_is_taken_as_it_was_begun(here: Path) -> None:
    past_run(here, max_steps=8)
    open_folder(changed(load_spec("s.toml"), given={"max_steps": 8}), Path("s"))
    assert adopt(here / "c", AS, sweep="s.toml")[0].max_steps == 8
    past_run(here, lr=2e-3)
    with pytest.raises(MismatchError, match=r"max_steps: found 6 .* expected 8 .as the sweep was begun"):
        adopt(here / "c", {**AS, "lr": 2e-3}, sweep="s.toml")


@pytest.mark.parametrize(
    ("values", "words"),
    [({"lr": 1e-3}, "did you mean lr=1e-3,batch_size="), ({"lr": 1e-3, "batch_size": 3}, "did you mean lr=1e-3,bat")],
)
def test_a_name_that_the_sweep_does_not_have_is_refused(here: Path, values: dict[str, float], words: str) -> None:
    past_run(here, batch_size=3)
    before = all_files(here)
    with pytest.raises(ConfigError, match=words):
        adopt(here / "c", values, sweep="s.toml")
    assert all_files(here) == before


@pytest.mark.parametrize("held", ["r", "c"])
@pytest.mark.parametrize("source", ["r", "c"])
def test_a_run_at_work_is_refused(here: Path, held: str, source: str) -> None:
    past_run(here)
    before = all_files(here)
    fd = os.open(here / held, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(FileError, match=f"{held}: in use by another process"):
            adopt(here / source, AS, sweep="s.toml")
    finally:
        os.close(fd)
    assert {k: v for k, v in all_files(here).items() if not k.startswith("s/")} == before


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_of_a_copy_only_the_copy_goes(here: Path, apart: bool, whole: bool) -> None:
    config = past_run(here, **({} if apart else {"checkpoint_dir": ""}))
    (here / "r/tensorboard").mkdir()
    (config.output.tensorboard_folder / "events.out.tfevents.1").parent.mkdir(parents=True, exist_ok=True)
    (config.output.tensorboard_folder / "events.out.tfevents.1").write_text("curves")
    shutil.copytree(here / "r" if whole else config.output.checkpoints, here / "copied")
    before = {k: v for k, v in all_files(here).items() if k[:2] in ("r/", "c/")}
    entry, _ = adopt(here / "copied", AS, sweep="s.toml")
    assert {k: v for k, v in all_files(here).items() if k[:2] in ("r/", "c/")} == before
    assert not [p for p in (here / "copied").rglob("*") if p.is_file()]
    assert entry.status == "completed" and (here / "s/runs" / NAME / "metrics.csv").exists()
    assert (here / "checkpoints/s_lr1e-3_b2/checkpoint_4/state.json").exists()


@pytest.mark.parametrize("file", ["results.json", "trials.json"])
def test_damaged_lists_are_found_before_anything_moves(here: Path, file: str) -> None:
    past_run(here)
    begin(Start())
    shutil.rmtree(here / "s/runs" / NAME)
    (here / "s" / file).write_text("{")
    before = all_files(here / "c")
    with pytest.raises(FormatError, match=file):
        adopt(here / "c", AS, sweep="s.toml")
    assert all_files(here / "c") == before and not (here / "s/runs" / NAME).exists()


def test_an_adopted_run_outside_the_spec_stays_in_the_results(here: Path) -> None:
    past_run(here)
    adopt(here / "c", AS, sweep="s.toml")
    (here / "s/results.json").write_text("{")
    spec = changed(load_spec("s.toml"), lrs=[2e-3])
    run_sweep(trials_of(spec), "s", start=Start())
    assert NAME in [r.name for r in read_results(here / "s/results.json")]


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"checkpoints": "c", "home": "r"}, "found no format"),
        ({"format": "bytekiln-adoption", "version": 0}, "found bytekiln-adoption, version 0"),
        ({"format": "bytekiln-adoption", "version": 1, "own": []}, "found no checkpoints"),
        ([], "list indices"),
        ("{", "Expecting"),
    ],
)
def test_the_mark_of_another_version_is_refused_by_name(
    here: Path, capsys: pytest.CaptureFixture[str], mark: object, words: str
) -> None:
    past_run(here)
    place = here / "s/runs" / NAME
    place.mkdir(parents=True)
    (place / "adopting.json").write_text(mark if isinstance(mark, str) else json.dumps(mark))
    before = all_files(here)
    argv = ["adopt", "c", "--as", "lr=1e-3,batch_size=2", "--sweep", "s.toml"]
    assert cli.run("lm-sweep", argv) == 2
    err = capsys.readouterr().err
    assert f"{NAME}/adopting.json: {words}" in err and "expected bytekiln-adoption, version 1" in err
    assert err.count("\n") == 1 and all_files(here) == before


@pytest.mark.parametrize("source", ["r", "c"])
def test_killed_while_it_removes_it_is_finished_by_the_same_command(
    here: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    past_run(here)
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        if path.name == "result.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            adopt(here / source, AS, sweep="s.toml")
    entry, path = adopt(here / source, AS, sweep="s.toml")
    assert read_results(path) == [entry] and entry.why == "all steps done", "the run's own result"
    assert not (here / "r").exists() and not [p for p in (here / "c").rglob("*") if p.is_file()]
    assert NAME not in [r.name for r in begin(Start()) if r.status != "completed"]


@pytest.mark.parametrize("last", ["store_trials", "update_results", "arrived"])
def test_killed_at_its_very_end_it_is_finished_by_the_same_command(
    here: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    past_run(here)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(f"bytekiln.sweep.adopt.{last}", killed)
        with pytest.raises(KeyboardInterrupt):
            adopt(here / "c", AS, sweep="s.toml")
    assert not (here / "c").exists(), "all is in its new place; only the sweep's lists do not know it"
    process = subprocess.Popen(["true"])
    process.wait()
    left = here / f"s/.results.json.{process.pid}.tmp"
    left.touch()
    entry, path = adopt(here / "c", AS, sweep="s.toml")
    assert read_results(path) == [entry] and entry.status == "completed" and not left.exists()
    assert stored_trial(Path("s"), NAME).changes == {"lr": 1e-3, "batch_size": 2}
    assert not (here / "s/runs" / NAME / "adopting.json").exists()


@pytest.mark.parametrize("checkpoint", ["checkpoint_4", "checkpoint_final"])
@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("model.safetensors", None, "no such file"),
        ("model.safetensors", "other tensors", "found other bytes than were written"),
        ("state.json", '{"step": 5}', "found other bytes than were written"),
        ("checksums.json", None, "no such file"),
        ("checksums.json", "{}", "found no checksums"),
    ],
)
def test_a_damaged_run_is_refused_by_its_file_before_anything_moves(
    here: Path, checkpoint: str, file: str, damage: str | None, words: str
) -> None:
    past_run(here)
    path = here / "c" / checkpoint / file
    path.unlink() if damage is None else path.write_text(damage)
    before = {k: v for k, v in all_files(here).items() if k[:2] in ("r/", "c/")}
    with pytest.raises(FormatError, match=f"{checkpoint}/{file}: {words}.*expected a whole checkpoint"):
        adopt(here / "c", AS, sweep="s.toml")
    assert {k: v for k, v in all_files(here).items() if k[:2] in ("r/", "c/")} == before
    assert not (here / "s/runs" / NAME).exists() and not (here / "checkpoints").exists()
    shutil.rmtree(here / "c" / checkpoint)
    status = adopt(here / "c", AS, sweep="s.toml")[0].status
    assert status == ("interrupted" if checkpoint == "checkpoint_final" else "completed")
