"""`record.json`: what a run's numbers are, what they rest on, and nothing of a run that is not over."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bytekiln import entry
from bytekiln.accounting import flops_per_token
from bytekiln.config import from_flat
from bytekiln.entry import POINTS, _thinned, revision
from bytekiln.metrics import Row, read_metrics
from bytekiln.train import train
from lm_runs import tiny


def told(folder: Path) -> dict:
    return json.loads((folder / "run/record.json").read_text("utf-8"))


def test_a_record_has_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "revision", lambda _: {"commit": "abc", "changed_files": 0})
    config = tiny(tmp_path, record=True, yardstick="owt-32k", final_eval="whole")
    assert train(config, pause_at=4).status == "interrupted"
    assert not (tmp_path / "run/record.json").exists(), "the run is not over"
    result = train(config, resume="auto")
    about, rows = told(tmp_path), read_metrics(tmp_path / "run/metrics.csv")
    assert (about["format"], about["version"]) == ("bytekiln-record", 1)
    assert about["loss"] == result.final_val_loss == rows[-1].val_loss
    assert about["time_s"] == result.wall_time_s > 0
    assert (about["whole_validation_set"], about["context_length"]) == (True, 8)
    assert about["flops"] == flops_per_token(from_flat(about["config"]).model) * 6 * 3 * 8
    assert [p["step"] for p in about["curve"]] == [0, 4, 6]
    assert [p["val_loss"] for p in about["curve"]] == [r.val_loss for r in rows if r.val_loss is not None]
    assert [p["step"] for p in about["training_curve"]] == [1, 2, 3, 4, 5, 6]
    assert about["result"] == json.loads(json.dumps(about["result"])) and about["result"]["hardware"]["cores"]
    assert about["data"]["val"] and about["data"]["train"] and about["data"]["tokenizer"]
    below = {p["loss"]: p["below_by"] for p in about["yardstick"]["published"]}
    assert below[3.0117] == pytest.approx(3.0117 - about["loss"], abs=1e-6)
    assert about["revision"] == {"commit": "abc", "changed_files": 0}
    assert from_flat(about["config"]).flat() == about["config"]
    train(config.with_(record=False), overwrite=True)
    assert not (tmp_path / "run/record.json").exists(), "an overwritten run's record is gone with it"


def test_no_record_unless_asked(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=1))
    assert not (tmp_path / "run/record.json").exists()


def test_a_long_curve_is_thinned_to_means() -> None:
    rows = [Row(i, i, i / 2, loss=float(i)) for i in range(1, 2 * POINTS + 2)]
    points = _thinned(rows)
    assert len(points) <= POINTS
    assert points[0] == {"step": 3, "elapsed_s": 1.5, "loss": 2.0}
    assert points[-1]["step"] == 2 * POINTS + 1
    assert _thinned([]) == []


def test_the_revision_is_the_codes_own(tmp_path: Path) -> None:
    """In a checkout its commit and whether it is as committed; a package that merely lies in a repository has none."""

    def git(*args: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(
            ["git", *who, "-C", str(tmp_path), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "notes.txt").write_text("mine")
    git("add", ".")
    git("commit", "-qm", "one")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    (inside / "entry.py").write_text("")
    assert revision(inside) is None
    git("add", ".")
    git("commit", "-qm", "two")
    assert revision(inside) == {"commit": git("rev-parse", "HEAD"), "changed_files": 0}
    (tmp_path / "notes.txt").write_text("changed")
    assert revision(inside) == {"commit": git("rev-parse", "HEAD"), "changed_files": 1}
    assert revision(Path("/")) is None
