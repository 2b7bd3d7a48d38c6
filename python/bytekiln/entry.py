"""`record.json`: all that a leaderboard, or a reader who doubts, asks of a run that is over.

In: the run folder's rows, its config, its `Result`, what data it read. Out: one file (docs/formats.md). Called by
`record` where the config says `record`; imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bytekiln.accounting import flops_per_token
from bytekiln.config import RunConfig
from bytekiln.metrics import Row, write_atomically
from bytekiln.result import Result
from bytekiln.yardstick import load_yardstick

NAME = "record.json"
POINTS = 500
"""Most points of the training curve: each is the mean of the steps that it stands for."""
GIT_S = 5.0
"""How long git may take to tell a revision."""


def write_entry(config: RunConfig, rows: Sequence[Row], result: Result, data: Mapping[str, Any]) -> Path:
    """Write the record of a run that is over.

    Args:
        config: the run, complete.
        rows: of its metrics file, by step.
        result: how it ended.
        data: hashes of what it read, by name.

    Returns:
        The file.

    Raises:
        FileError: the folder cannot be written.
    """
    t = config.training
    about: dict[str, Any] = {
        "format": "bytekiln-record",
        "version": 1,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "loss": result.final_val_loss,
        "bits_per_byte": result.final_bits_per_byte,
        "context_length": config.eval_context,
        "whole_validation_set": t.num_eval_batches == 0 or t.final_eval == "whole",
        "time_s": result.wall_time_s,
        "max_time_s": t.max_time or None,
        "flops": flops_per_token(config.model) * result.tokens,
        "result": dataclasses.asdict(result),
        "yardstick": _beside(config, result),
        "revision": revision(Path(__file__).parent),
        "data": dict(data),
        "curve": [
            {"step": r.step, "elapsed_s": r.elapsed_s, "tokens": r.tokens, "val_loss": r.val_loss}
            for r in rows
            if r.val_loss is not None
        ],
        "training_curve": _thinned([r for r in rows if r.loss is not None]),
        "config": config.flat(),
    }
    path = config.output.folder / NAME
    write_atomically(path, json.dumps(about, indent=1, allow_nan=False).encode() + b"\n")
    return path


def revision(folder: Path) -> dict[str, Any] | None:
    """Commit and state of the repository that the code in `folder` is kept in; None where it is in none.

    An installed package may lie inside somebody's repository without being part of it: that says nothing.
    """

    def git(*args: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=GIT_S
        )
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return None


def _beside(config: RunConfig, result: Result) -> dict[str, Any] | None:
    """The published losses, and by how much this run's lies below each."""
    if not config.training.yardstick:
        return None
    yardstick, loss = load_yardstick(config.training.yardstick), result.final_val_loss
    return {
        "title": yardstick.title,
        "source": yardstick.source,
        "published": [
            {**p._asdict(), "below_by": None if loss is None else round(p.loss - loss, 6)} for p in yardstick.published
        ],
    }


def _thinned(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Means of runs of neighbouring steps, each at its last one."""
    many = -(-len(rows) // POINTS)
    found = []
    for begin in range(0, len(rows), many or 1):
        part = rows[begin : begin + many]
        mean = sum(r.loss for r in part if r.loss is not None) / len(part)
        found.append({"step": part[-1].step, "elapsed_s": part[-1].elapsed_s, "loss": round(mean, 6)})
    return found
