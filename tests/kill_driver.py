"""Runs small trainings and kills them with SIGKILL at counted moments; started by test_resume.py in a fresh process.

Usage: python kill_driver.py FOLDER SEED COUNT [more]. Each training is a forked child (the parent has paid for the
import of torch and never computes). The child counts events: micro-steps, flushes to the disk, renames, deletions,
rows of the metrics (killed with the row half written). One unbroken run tells how many there are; then COUNT
moments are drawn, every kind of event among them, and each killed run is resumed until it is complete. The result
is printed as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported by the first optimizer step otherwise: two seconds in every child

from bytekiln import metrics, objective, train
from lm_runs import tiny, tokens

KINDS = ("micro", "evaluate", "fsync", "rename", "rmtree", "row")
SETTINGS = {"dropout": 0.1, "grad_accum_steps": 3, "max_steps": 7, "keep_checkpoints": 2, "grad_clip": 0.5}
# the best evaluation, at step 4, is not the last one: a resumed run that forgot it would write another
SETTINGS |= {"eval_interval": 2, "lr": 0.5, "decay_lr": False, "sampling": "random"}
# what else has a memory: an average of the weights, the guard against spikes, patience, statistics of the layers
SETTINGS |= {
    "averaging": "ema",
    "ema_decay": 0.3,
    "skip_spikes": True,
    "early_stopping_patience": 50,
    "stats_interval": 2,
}
MORE = {
    "optimizer": "muon",
    "normuon": True,
    "averaging": "tail",
    "ffn": "moe",
    "num_experts": 4,
    "load_balancing": "bias",
    "load_balancing_weight": 0.01,
    "num_kv_heads": 1,
    "value_embeddings": True,
    "residual_lambdas": True,
    "windows": "packed",
    "sampling": "shuffled",
    "batch_stages": "0.5:2",
    "token_corruption": 0.1,
}
"""Laid over them where the fourth argument is `more`."""
NATIVE = {"dropout": 0.0, "sliding_window": 5, "num_kv_heads": 1, "ffn": "gelu", "attention": "native"}
"""Where it is `native`: the core's attention, which has no dropout, and its activations."""
CLOCK = ("elapsed_s", "training_s", "step_time_s", "tokens_per_s", "wall_time_s")
CLOCK += ("eval_time_s", "evaluation_s", "saving_s")


class Events:
    """Counts events and kills this process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.log: list[str] = []
        self.kill_at = kill_at
        self.watch(objective.Objective, "forward", lambda *_, **__: "micro")
        self.watch(objective.Objective, "scores", lambda *_, **__: "evaluate")
        self.watch(os, "fsync", lambda *_: "fsync")
        self.watch(os, "rename", lambda *_: "rename")
        self.watch(shutil, "rmtree", lambda path, **_: "rmtree" if Path(path).exists() else None)
        append = metrics.MetricsFile.append

        def torn_append(file: metrics.MetricsFile, row: metrics.Row) -> None:
            if self.happens("row"):
                whole = metrics._line([getattr(row, c) for c in metrics.COLUMNS])
                file._out.write(whole[: len(whole) // 2])
                file._out.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            append(file, row)

        metrics.MetricsFile.append = torn_append  # type: ignore[method-assign]

    def watch(self, owner: Any, name: str, kind_of: Callable[..., str | None]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            kind = kind_of(*args, **options)
            if kind and self.happens(kind):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(owner, name, watched)

    def happens(self, kind: str) -> bool:
        self.log.append(kind)
        return len(self.log) - 1 == self.kill_at


def child(folder: Path, *, kill_at: int | None = None, resume: bool = False) -> tuple[int, list[str]]:
    """Train in a forked process: (exit status or -signal, events)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            if "windows" in SETTINGS and not (folder / "train.npy").exists():
                folder.mkdir(parents=True)
                tokens(folder / "train.npy", eot=7)
                tokens(folder / "val.npy", 200, seed=1, eot=7)
            events = Events(kill_at)
            config = tiny(folder, **SETTINGS)
            ended = train.train(config, resume="auto" if resume else None, given=SETTINGS)
            os.write(writer, json.dumps(events.log).encode())
            status = 0 if ended.status == "completed" else 71
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as f:
        said = f.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, json.loads(said) if said else []


def less_times(value: Any) -> Any:
    """The same, without what the clock decides."""
    if isinstance(value, dict):
        return {k: less_times(v) for k, v in value.items() if k not in CLOCK}
    return value


def outcome(run: Path) -> dict[str, str]:
    """All that must be equal: weights, moments, counters, rows and result without their times; and time only rises."""
    told = {"rows": "", "elapsed": "rises"}
    for name in ("checkpoint_final", "checkpoint_best"):
        saved = run / "checkpoints" / name
        for part in ("model.safetensors", "training.safetensors"):
            told[f"{name}/{part}"] = (saved / part).read_bytes().hex()
        told[f"{name}/state"] = json.dumps(less_times(json.loads((saved / "state.json").read_bytes())))
    rows = metrics.read_metrics(run / "metrics.csv")
    told["rows"] = json.dumps([less_times(vars(r)) for r in rows])
    result = json.loads((run / "result.json").read_bytes())
    told["result"] = json.dumps(less_times(result))
    times = [r.elapsed_s for r in rows] + [result["wall_time_s"] + 0.001]  # which is rounded to milliseconds
    if times != sorted(times):
        told["elapsed"] = f"falls: {times}"
    told["layers"] = (run / "layers.csv").read_text()
    told["checkpoints"] = json.dumps(sorted(p.name for p in (run / "checkpoints").iterdir()))
    return told


def main(root: Path, seed: int, count: int, kind: str = "") -> None:
    torch.set_num_threads(1)
    SETTINGS.update({"more": MORE, "native": NATIVE}.get(kind, {}))
    if kind:
        root.mkdir(parents=True, exist_ok=True)
    status, log = child(root / "whole")
    assert status == 0, status
    expected = outcome(root / "whole/run")
    assert kind or json.loads(expected["result"])["best_step"] == 4
    assert expected["elapsed"] == "rises"
    dice = random.Random(seed)
    moments = [dice.choice([i for i, k in enumerate(log) if k == kind]) for kind in KINDS]
    # the second of three micro-steps of a step, and the renames of a save and of a replaced save
    moments.append(next(i for i in [i for i, k in enumerate(log) if k == "micro"][7:] if i not in moments))
    moments += dice.sample([i for i in range(len(log)) if i not in moments], count - len(moments))
    results = []
    for moment in moments:
        folder = root / f"killed-{moment}"
        killed, _ = child(folder, kill_at=moment)
        again, _ = child(folder, kill_at=dice.randrange(5, len(log) // 2), resume=True)  # and once more on the way
        ended, _ = child(folder, resume=True)
        different = [k for k, v in outcome(folder / "run").items() if v != expected[k]] if ended == 0 else ["all"]
        ends = {"killed": killed, "again": again, "ended": ended}
        results.append({"moment": moment, "kind": log[moment], **ends, "different": different})
    print(json.dumps({"events": len(log), "kinds": sorted(set(log)), "results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
