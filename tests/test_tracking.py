"""TensorBoard and Weights & Biases: what their files say, what a resume leaves in them, and that they never do harm."""

from __future__ import annotations

import json
import math
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bytekiln.config import RunConfig, load_config
from bytekiln.metrics import MetricsFile, Row
from bytekiln.tracking import KEEP, Smoothed, Trackers, make_trackers, perplexity, scalars_of

TAGS = {
    "train/loss",
    "train/loss_smoothed",
    "train/lr",
    "train/grad_norm",
    "train/perplexity",
    "system/tokens_per_sec",
    "val/loss",
    "val/perplexity",
    "val/best_loss",
}
EVALUATED = {"val/loss", "val/perplexity", "val/best_loss"}


def row(step: int, *, shift: float = 0.0) -> Row:
    if step == 0:
        return Row(0, 0, 0.0, val_loss=4.1)
    evaluated = {"val_loss": 4.0 - step / 10, "val_perplexity": 1.0} if step % 2 == 0 else {}
    taken = {"loss": 5.0 / step + shift, "lr": 1e-3 * step, "grad_norm": 1.5, "tokens_per_s": 99.0}
    return Row(step, 10 * step, 0.5 * step, **taken, **evaluated)


def config(folder: Path, **values: object) -> RunConfig:
    (folder / "run").mkdir(exist_ok=True)
    return load_config(None, {"out_dir": str(folder / "run"), "vocab_size": 61, **values})


def run(
    c: RunConfig, first: int, last: int, *, kept: int = -1, shift: float = 0.0, model: Path | None = None
) -> list[str]:
    """The steps first … last as the loop takes them, after a resume behind row `kept`; returns the notices."""
    said: list[str] = []
    metrics = MetricsFile(c.output.metrics, kept)
    trackers = make_trackers(c, c.output.folder, kept, said.append)
    best = None
    for step in range(first, last + 1):
        r = row(step, shift=shift)
        metrics.append(r)
        best = r.val_loss if r.val_loss is not None and step else best
        trackers.row(r, best)
    trackers.finish(model, "completed")
    trackers.close()
    metrics.close()
    return said


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def smoothed_by_definition(losses: list[float]) -> float:
    """Σ keep^(n-i) x_i / Σ keep^(n-i)."""
    weights = [KEEP ** (len(losses) - 1 - i) for i in range(len(losses))]
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_curve(tmp_path: Path) -> None:
    c = config(tmp_path, tensorboard=True)
    assert run(c, 0, 5) == []
    found = curves(tmp_path / "run/tensorboard")
    assert set(found) == TAGS
    for tag in TAGS:
        steps = [0, 2, 4] if tag in EVALUATED - {"val/best_loss"} else [2, 4] if tag in EVALUATED else [1, 2, 3, 4, 5]
        assert [s for s, _ in found[tag]] == steps, tag
    near = pytest.approx
    assert found["train/loss"] == [(s, near(5.0 / s)) for s in range(1, 6)]
    assert found["train/perplexity"] == [(s, near(math.exp(5.0 / s))) for s in range(1, 6)]
    assert found["train/lr"][2] == (3, near(3e-3))
    assert found["train/grad_norm"][0] == (1, 1.5)
    assert found["system/tokens_per_sec"][0] == (1, 99.0)
    assert found["val/loss"] == [(0, near(4.1)), (2, near(3.8)), (4, near(3.6))]
    assert found["val/perplexity"][1] == (2, near(math.exp(3.8)))
    assert found["val/best_loss"] == [(2, near(3.8)), (4, near(3.6))]
    losses = [5.0 / s for s in range(1, 6)]
    assert found["train/loss_smoothed"] == [(n, near(smoothed_by_definition(losses[:n]))) for n in range(1, 6)]


def test_tensorboard_shows_the_config(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    c = config(tmp_path, tensorboard=True, tensorboard_dir=str(tmp_path / "elsewhere/lr_1"))
    run(c, 0, 1)
    events = EventAccumulator(str(tmp_path / "elsewhere/lr_1"))
    events.Reload()
    (shown,) = events.Tensors("config")
    text = shown.tensor_proto.string_val[0].decode()
    assert [line[4:] for line in text.splitlines()] == c.to_toml().splitlines()


def test_a_resume_continues_the_same_curves(tmp_path: Path) -> None:
    """Killed behind step 6, resumed from step 4: as if unbroken, and nothing of the lost steps 5 and 6 is left."""
    broken, whole = config(tmp_path, tensorboard=True), tmp_path / "whole"
    whole.mkdir()
    run(broken, 0, 6, shift=0.0)
    run(broken, 5, 5, kept=4, shift=0.25)  # a second death, so that both earlier files reach behind the checkpoint
    run(broken, 5, 8, kept=4)
    run(config(whole, tensorboard=True), 0, 8)
    assert curves(tmp_path / "run/tensorboard") == curves(whole / "run/tensorboard")


def test_an_overwritten_run_leaves_no_curve(tmp_path: Path) -> None:
    c = config(tmp_path, tensorboard=True)
    run(c, 0, 6)
    run(c, 0, 3, shift=1.0)
    assert curves(tmp_path / "run/tensorboard")["train/loss"] == [(s, pytest.approx(5.0 / s + 1)) for s in (1, 2, 3)]


def test_tensorboard_that_comes_later_gets_the_rows_before(tmp_path: Path) -> None:
    """The user's own command: a run without TensorBoard, resumed with it, in one picture."""
    plain, whole = config(tmp_path), tmp_path / "whole"
    whole.mkdir()
    assert run(plain, 0, 4) == []
    assert not (tmp_path / "run/tensorboard").exists()
    run(config(tmp_path, tensorboard=True), 5, 6, kept=4)
    run(config(whole, tensorboard=True), 0, 6)
    assert curves(tmp_path / "run/tensorboard") == curves(whole / "run/tensorboard")


# --- Weights & Biases -----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever a test does, it never sends


def parsed(data: bytes) -> Iterator[Any]:
    """Of an offline run: a LevelDB log (blocks of 32 kB; checksum, length, kind of fragment) of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + size > len(data):
            return  # half-written
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield Record.FromString(whole)
            whole = b""


def records(folder: Path) -> list[Any]:
    """All records; wandb's own process writes the last ones up to a second after it said that it is done."""
    (path,) = folder.glob("*.wandb")
    for _ in range(300):
        found = list(parsed(path.read_bytes()))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path}: no end of the run after 30 s")


def history(folder: Path) -> list[dict[str, float]]:
    told = [r.history.item for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in told]


def test_wandb_offline(tmp_path: Path, offline: None) -> None:
    model = tmp_path / "checkpoint_final"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    c = config(tmp_path, wandb=True, wandb_mode="offline", wandb_project="kiln", run_name="bowl")
    (said,) = run(c, 0, 4, model=model)
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert said.startswith("wandb: offline run ") and f"`wandb sync {folder}`" in said
    (stored,) = [json.loads(p.read_text()) for p in (tmp_path / "run").glob("tracking.json")]
    assert stored == {"format": "bytekiln-tracking", "version": 1, "wandb": folder.name.rsplit("-", 1)[1]}
    told = [r for r in history(folder) if "train/loss" in r]
    assert [r["_step"] for r in told] == [1, 2, 3, 4]
    assert told[1].keys() >= TAGS
    assert told[1]["train/loss"] == 2.5
    every = records(folder)
    (begun,) = [r.run for r in every if r.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.display_name, begun.run_id) == ("kiln", "bowl", stored["wandb"])
    sent = {u.key: json.loads(u.value_json) for u in begun.config.update}
    assert sent["model"]["vocab_size"] == 61 and sent["training"]["seed"] == c.training.seed
    (artifact,) = [r.request.log_artifact.artifact if r.WhichOneof("record_type") == "request" else r.artifact
                   for r in every if r.WhichOneof("record_type") == "artifact"]  # fmt: skip
    assert (artifact.name, artifact.type) == (f"model-{stored['wandb']}", "model")
    assert [e.path for e in artifact.manifest.contents] == ["model.safetensors"]


def test_wandb_goes_on_with_its_run(tmp_path: Path, offline: None) -> None:
    c = config(tmp_path, wandb=True)  # offline by WANDB_MODE
    run(c, 0, 3)
    first = json.loads((tmp_path / "run/tracking.json").read_text())["wandb"]
    (before,) = (tmp_path / "run/wandb").glob(f"offline-run-*-{first}")
    run(c, 3, 4, kept=2)
    assert json.loads((tmp_path / "run/tracking.json").read_text())["wandb"] == first
    (folder,) = set((tmp_path / "run/wandb").glob(f"offline-run-*-{first}*")) - {before}
    assert [r["_step"] for r in history(folder) if "train/loss" in r] == [3, 4]
    (tmp_path / "run/tracking.json").write_text("no JSON")
    run(c, 5, 5, kept=4)
    second = json.loads((tmp_path / "run/tracking.json").read_text())["wandb"]
    (folder,) = (tmp_path / "run/wandb").glob(f"offline-run-*-{second}")
    assert [r["_step"] for r in history(folder) if "train/loss" in r] == [1, 2, 3, 4, 5], "new to it: all rows"
    run(c, 0, 1)
    assert json.loads((tmp_path / "run/tracking.json").read_text())["wandb"] not in (first, second), "overwritten"


def test_wandb_is_not_sent_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is ahead of the checkpoint after a kill: its step is asked once, and no older step is sent."""
    logged: list[int] = []
    begun: dict[str, Any] = {}
    server = SimpleNamespace(
        step=6,
        id="abc",
        offline=False,
        url="https://there/abc",
        dir=str(tmp_path),
        summary={},
        log=lambda values, step: logged.append(step),
        finish=lambda exit_code: begun.update(exit_code=exit_code),
    )
    fake: Any = ModuleType("wandb")
    fake.init = lambda **options: begun.update(options) or server
    fake.Settings = dict
    monkeypatch.setitem(sys.modules, "wandb", fake)
    c = config(tmp_path, wandb=True)
    metrics = MetricsFile(c.output.metrics)
    for step in range(6):
        metrics.append(row(step))
    metrics.close()
    (tmp_path / "run/ids.json").write_text('{"wandb": "abc"}')
    said: list[str] = []
    trackers = make_trackers(c, c.output.folder, 3, said.append, tmp_path / "run/ids.json")
    for step in (4, 5, 6, 7):
        trackers.row(row(step), None)
    trackers.finish(None, "diverged")
    assert logged == [6, 7]
    assert said == ["wandb: https://there/abc"]
    assert (begun["id"], begun["resume"], begun["mode"], begun["exit_code"]) == ("abc", "allow", None, 1)
    assert server.summary == {"status": "diverged"}


# --- no harm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    (said,) = run(config(tmp_path, **{name: True}), 0, 3)
    assert said.startswith(f"{name}: ") and "training goes on without it (pip install 'bytekiln[track]'" in said


def test_nothing_is_loaded_or_read_without_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    c = config(tmp_path)
    monkeypatch.setattr("bytekiln.tracking.read_metrics", lambda _: pytest.fail("read the metrics for nobody"))
    trackers = make_trackers(c, c.output.folder, 5, pytest.fail)
    trackers.row(row(1), None)
    trackers.finish(None, "completed")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == []


class Broken:
    """A tracker that fails from its third value on."""

    name, fresh = "broken", False

    def __init__(self) -> None:
        self.calls = 0

    def scalars(self, step: int, values: object, age_s: float) -> None:
        self.calls += 1
        if self.calls == 3:
            raise OSError(28, "No space\nleft on device")

    def end(self, model: Path | None, status: str) -> None:
        raise AssertionError("left out long ago")


def test_a_tracker_that_fails_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    trackers, broken, other = Trackers(said.append), Broken(), Broken()
    other.scalars = lambda *_: None  # type: ignore[method-assign]
    ended: list[str] = []
    other.end = lambda _, status: ended.append(status)  # type: ignore[method-assign]
    trackers.start("broken", lambda: broken)
    trackers.start("other", lambda: other)
    for step in range(1, 8):
        trackers.row(row(step), None)
    trackers.finish(None, "completed")
    assert said == ["broken: [Errno 28] No space left on device; training goes on without it"]
    assert broken.calls == 3
    assert ended == ["completed"], "the other one goes on"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = run(config(tmp_path, tensorboard=True, tensorboard_dir=str(tmp_path / "file/events")), 0, 3)
    assert len(said) == 1
    assert said[0].startswith("tensorboard: ") and said[0].endswith("training goes on without it")


def test_wandb_without_network_or_key_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    import wandb

    def fails(**_: object) -> None:
        raise wandb.errors.CommError("Network error: connection refused")

    monkeypatch.setattr(wandb, "init", fails)
    said = run(config(tmp_path, wandb=True), 0, 3)
    assert said == ["wandb: Network error: connection refused; training goes on without it"]


def test_metrics_that_are_gone_leave_the_curves(tmp_path: Path) -> None:
    c, said = config(tmp_path, tensorboard=True), []
    trackers = make_trackers(c, c.output.folder, 4, said.append)
    trackers.row(row(5), None)
    trackers.finish(None, "completed")
    assert len(said) == 1 and "the smoothed loss begins anew" in said[0]
    assert [s for s, _ in curves(tmp_path / "run/tensorboard")["train/loss"]] == [5]


# --- numbers --------------------------------------------------------------------------------------------------------


def test_smoothing_skips_what_is_not_finite() -> None:
    average = Smoothed()
    assert math.isnan(average.add(math.nan))
    assert [average.add(x) for x in (4.0, math.inf, 4.0)] == pytest.approx([4.0, 4.0, 4.0])


def test_scalars_of_odd_rows() -> None:
    assert scalars_of(Row(0, 0, 0.0), None, None) == {}
    assert "train/loss" not in scalars_of(replace(row(2), loss=None), None, 1.0)
    assert "val/best_loss" not in scalars_of(row(3), 1.0, 1.0), "only where there was an evaluation"
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan) or 0.0)
    assert perplexity(-1.0) == pytest.approx(1 / math.e)
