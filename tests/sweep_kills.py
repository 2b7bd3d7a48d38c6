"""Kills a sweep, or one of its runs, with SIGKILL at random moments; started by test_cli_sweep.py, or by hand.

Usage: python sweep_kills.py FOLDER SEED COUNT. A whole sweep of real runs tells how long one takes and how it ends.
Then COUNT sweeps are killed, every second one by killing one of its runs, and gone on with until they end. The result
is printed as JSON: what was killed, when, and what differs from the whole sweep (times excepted).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lm_runs import TINY, tokens

CLOCK = ("elapsed_time", "tokens_per_s")
SETTINGS = {**TINY, "num_layers": 1, "dropout": 0.1, "max_steps": 40, "checkpoint_interval": 5, "eval_interval": 10}


def make(root: Path) -> Path:
    """A spec of two runs and its data."""
    root.mkdir(parents=True, exist_ok=True)
    tokens(root / "train.npy")
    tokens(root / "val.npy", 200, seed=1)
    base = {**SETTINGS, "train_data": str(root / "train.npy"), "val_data": str(root / "val.npy")}
    base.pop("lr")
    spec = root / "spec.json"
    output = {"results": "results.json"}
    spec.write_text(json.dumps({"axes": {"lr": [1e-3, 1e-2]}, "base": base, "output": output}))
    return spec


def start(spec: Path, folder: Path) -> subprocess.Popen[bytes]:
    """The sweep as a command."""
    line = [sys.executable, "-m", "bytekiln.cli", "lm-sweep", str(spec), "--folder", str(folder), "--jobs", "2"]
    with (spec.parent / f"{folder.name}.said").open("ab") as said:
        return subprocess.Popen(line, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})


def runs_of(folder: Path) -> list[int]:
    """Process numbers of the sweep's runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"lm-train" in words and any(w.startswith(str(folder.absolute()).encode() + b"/") for w in words):
            found.append(int(path.parent.name))
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be equal."""
    told: dict[str, Any] = {}
    for entry in json.loads((folder / "results.json").read_bytes()):
        about = {k: v for k, v in entry.items() if k not in (*CLOCK, "checkpoint_dir", "final_checkpoint")}
        for name in ("checkpoint_best", "checkpoint_final"):
            weights = folder / entry["run_dir"] / "checkpoints" / name / "model.safetensors"
            about[name] = hashlib.sha256(weights.read_bytes()).hexdigest()
        told[entry["name"]] = about
    return told


def killed(spec: Path, folder: Path, expected: dict[str, Any], whole: float, what: str, dice: random.Random) -> Any:
    """One sweep that is killed, and how it ended after all; one that was done before it could be is none."""
    while True:
        sweep, moment = start(spec, folder), dice.uniform(0.02, 1.0) * whole
        time.sleep(moment)
        runs = runs_of(folder)
        if sweep.poll() is None:
            break
        shutil.rmtree(folder)
    victim = dice.choice(runs) if what == "run" and runs else sweep.pid
    os.kill(victim, signal.SIGKILL)
    first = sweep.wait(300)
    ends = [first]
    while ends[-1] != 0 and len(ends) < 4:
        ends.append(start(spec, folder).wait(300))
    left = runs_of(folder)
    found = outcome(folder) if ends[-1] == 0 else {}
    different = [f"{n}.{k}" for n, about in expected.items() for k, v in about.items() if found.get(n, {}).get(k) != v]
    return {"moment": round(moment, 2), "killed": "run" if victim != sweep.pid else "sweep", "ends": ends,
            "left": left, "different": different}  # fmt: skip


def main(root: Path, seed: int, count: int) -> None:
    """Kill `count` sweeps."""
    spec, dice = make(root), random.Random(seed)
    began = time.monotonic()
    assert start(spec, root / "whole").wait(300) == 0
    whole = time.monotonic() - began
    expected = outcome(root / "whole")
    results = [killed(spec, root / f"killed-{i}", expected, whole, ("sweep", "run")[i % 2], dice) for i in range(count)]
    print(json.dumps({"whole": round(whole, 2), "results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
