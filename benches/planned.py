"""What `lm-plan` says of a step's time, beside what `lm-train` takes for it, in fresh processes one after the other.

    python benches/planned.py [--rounds 3]

Reported are the medians of both and the ratio of each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

MODELS: dict[str, dict[str, object]] = {
    "1 × 256, 2,000 tokens, batch 4 × 128": {
        "vocab_size": 2000, "d_model": 256, "num_layers": 1, "num_heads": 4, "context_length": 128, "batch_size": 4,
    },
    "6 × 96, 100 tokens, batch 8 × 64": {
        "vocab_size": 100, "d_model": 96, "num_layers": 6, "num_heads": 6, "context_length": 64, "batch_size": 8,
        "ffn": "gelu", "norm": "layer", "position": "learned",
    },
    "4 × 512, 10,000 tokens, batch 8 × 256": {
        "vocab_size": 10000, "d_model": 512, "num_layers": 4, "num_heads": 16, "context_length": 256, "batch_size": 8,
    },
    "4 × 512, 10,000 tokens, batch 32 × 256": {
        "vocab_size": 10000, "d_model": 512, "num_layers": 4, "num_heads": 16, "context_length": 256, "batch_size": 32,
    },
}  # fmt: skip
FIRST_STEPS = 2
"""Which are not counted."""


def main() -> int:
    """The table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print("| model | precision | planned, ms | taken, ms | planned / taken |\n|---|---|---|---|---|")
    for model, values in MODELS.items():
        for precision in ("fp32", "bf16"):
            pairs = [measured({**values, "precision": precision}) for _ in range(rounds)]
            planned, taken = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
            ratios = ", ".join(f"{p / t:.2f}" for p, t in pairs)
            print(f"| {model} | {precision} | {planned:.1f} | {taken:.1f} | {ratios} |", flush=True)
    return 0


def measured(values: dict[str, object]) -> tuple[float, float]:
    """Seconds of a step, planned and taken."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = int(str(values["vocab_size"]))
        for file in ("train.npy", "val.npy"):
            np.save(folder / file, np.random.default_rng(0).integers(0, size, 20_000).astype(np.uint16))
        steps = 6 if size > 5000 else 40
        given = {
            **values, "train_data": "train.npy", "val_data": "val.npy", "out_dir": "run", "max_steps": steps,
            "eval_interval": 0, "num_eval_batches": 1, "checkpoint_interval": 0, "warmup_steps": 1,
        }  # fmt: skip
        (folder / "c.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in given.items()), "utf-8")
        plan = json.loads(said(folder, "lm-plan", "c.toml", "--json", "--memory", "8G"))
        assert "steps of" in plan["time_basis"], plan["time_basis"]
        said(folder, "lm-train", "c.toml")
        rows = (folder / "run" / "metrics.csv").read_text("utf-8").splitlines()
        at = rows[0].split(",").index("step_time_s")
        taken = [float(row.split(",")[at]) for row in rows[2 + FIRST_STEPS :]]
        return plan["step_time_s"], statistics.median(taken)


def said(folder: Path, *command: str) -> str:
    """Standard output of one of our commands."""
    program = Path(sys.executable).with_name(command[0])
    return subprocess.run([program, *command[1:]], cwd=folder, stdout=subprocess.PIPE, check=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
