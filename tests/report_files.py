"""Run folders and sweep folders as `lm-train` and `lm-sweep` leave them, their numbers made up; without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bytekiln.config import load_config
from bytekiln.layer_warnings import LayerRow
from bytekiln.metrics import COLUMNS, MetricsFile, Row, RowFile

SHAPE: dict[str, object] = {
    "vocab_size": 64, "d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 8, "batch_size": 4,
    "max_steps": 40, "eval_interval": 10, "train_data": "train.npy", "val_data": "val.npy", "device": "cpu",
    "precision": "fp32", "compile": False,
}  # fmt: skip


def write_config(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(None, {**SHAPE, "out_dir": str(folder), **values}, say=lambda _: None)
    (folder / "config.toml").write_text(config.to_toml(), "utf-8")


def write_result(folder: Path, status: str = "completed", **values: object) -> None:
    about = {
        "format": "bytekiln-result", "version": 1, "status": status, "why": "all steps done", "steps": 40,
        "max_steps": 40, "tokens": 1280, "parameters": 9000, "tokens_per_s": 1000.0, "wall_time_s": 4.0,
        "device": "cpu", "precision": "fp32", "compiled": False, "processes": 1,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps({**about, **values}), "utf-8")


def rows_to(end: float, *, steps: int = 40, seed: int = 0, lr: float = 1e-3, every: int = 10) -> list[Row]:
    """A run that falls from 4.2 to about `end`."""
    rng = np.random.default_rng(seed)
    rows = [Row(0, 0, 0.0, val_loss=4.2, train_eval_loss=4.2, val_accuracy=0.02, bits_per_byte=2.0)]
    for s in range(1, steps + 1):
        level = end + (4.2 - end) * float(np.exp(-5 * s / steps))
        loss = level + float(rng.normal(0, 0.02))
        told: dict[str, float] = {}
        if s % every == 0:
            told = {"val_loss": level, "train_eval_loss": level - 0.01, "val_accuracy": 0.2, "bits_per_byte": level / 2}
        speed = 1000.0 + float(rng.normal(0, 10))
        rows.append(Row(s, 32 * s, 0.1 * s, loss, lr, abs(float(rng.normal(1, 0.1))), 0.1, speed, 0, **told))
    return rows


def write_run(
    folder: Path, end: float = 3.0, *, seed: int = 0, status: str = "completed", rows: Sequence[Row] | None = None,
    samples: Mapping[str, str] | None = None, layers: bool = False, result: bool = True, **values: object,
) -> Path:  # fmt: skip
    """A whole run that ends at about the validation loss `end`."""
    write_config(folder, seed=seed, **values)
    rows = rows_to(end, seed=seed, lr=float(str(values.get("lr", 1e-3)))) if rows is None else rows
    file = MetricsFile(folder / "metrics.csv")
    file.append(*rows)
    file.close()
    seen = [r for r in rows if r.val_loss is not None]
    if result:
        best = min(seen, key=lambda r: r.val_loss or 0.0) if seen else None
        write_result(
            folder, status, best_val_loss=best.val_loss if best else None, best_step=best.step if best else None,
            final_val_loss=seen[-1].val_loss if seen else None, final_train_loss=rows[-1].loss, steps=rows[-1].step,
            final_train_eval_loss=seen[-1].train_eval_loss if seen else None,
        )  # fmt: skip
    if samples:
        (folder / "samples").mkdir()
        told = [{"prompt": p, "prompt_ids": [1], "seed": 1, "ids": [2], "text": t} for p, t in samples.items()]
        about = {"format": "bytekiln-samples", "version": 1, "step": 40, "samples": told}
        (folder / "samples/step_40.json").write_text(json.dumps(about, ensure_ascii=False), "utf-8")
    if layers:
        write_layers(folder)
    return folder


def write_layers(folder: Path, steps: Sequence[int] = (10, 20, 30, 40)) -> None:
    """Two blocks, an embedding and a head, whose gradients shrink."""
    names = ["token_embeddings.weight", "layers.0.attn.q_proj.weight", "layers.0.attn.k_proj.weight",
             "layers.1.ffn.w1.weight", "lm_head.weight"]  # fmt: skip
    counts = " ".join(str(i) for i in range(26))
    out = RowFile(folder / "layers.csv", LayerRow, what="layers")
    for s in steps:
        for i, name in enumerate(names):
            out.append(LayerRow(s, name, "gradient", (i + 1) / s, 0.0, 1.0, -1.0, 1.0, 0.0, counts))
            out.append(LayerRow(s, name, "weight", i + 1.0, 0.0, 1.0, -1.0, 1.0, 0.0, counts))
        out.append(LayerRow(s, "layers.0", "activation", 2.0, 0.0, 1.0, -1.0, 1.0, 0.0, counts))
    out.close()


def write_sweep(
    folder: Path, runs: Mapping[str, tuple[str | None, Mapping[str, object], float]], *, question: str = "",
    baseline: str = "", **options: object,
) -> Path:  # fmt: skip
    """A sweep's folder.

    Args:
        folder: its place.
        runs: name -> (variant, changes, validation loss to end at); below 0: it failed before its first step.
        question, baseline: of the sweep.
        options: of every run.
    """
    folder.mkdir(parents=True)
    entries = []
    for name, (variant, changes, end) in runs.items():
        lr, seed = float(str(changes.get("lr", 1e-3))), int(str(changes.get("seed", 0)))
        entry: dict[str, object] = {
            "name": name, "variant": variant, "changes": dict(changes), "lr": lr, "lr_str": f"{lr:g}",
            "min_lr": lr / 10, "seed": seed, "status": "completed" if end >= 0 else "failed", "run_dir": f"runs/{name}",
        }  # fmt: skip
        if end >= 0:
            write_run(folder / "runs" / name, end, **{**options, **changes})  # type: ignore[arg-type]
        else:
            write_config(folder / "runs" / name, **changes)
            entry["error"] = "error: out of memory: tried to allocate 4.0 GB"
        entries.append(entry)
    (folder / "results.json").write_text(json.dumps(entries), "utf-8")
    spec = f"question = {json.dumps(question)}\nbaseline = {json.dumps(baseline)}\n"
    (folder / "sweep.toml").write_text('format = "bytekiln-sweep"\nversion = 1\n' + spec, "utf-8")
    return folder


def write_large(folder: Path, runs: int, steps: int, files: int = 5) -> Path:
    """A sweep of many long runs: `files` different metrics files, linked as often as it takes."""
    rng = np.random.default_rng(0)
    made = []
    folder.mkdir(parents=True)
    for k in range(files):
        lines = [",".join(COLUMNS)]
        noise, norms = rng.normal(0, 0.05, steps + 1), rng.gamma(3, 0.1, steps + 1)
        for s in range(steps + 1):
            level = 2.0 + 6 / (1 + s / 300) ** 0.5 + float(noise[s])
            level += 3.0 if s == 12_345 else 0.0
            told = (
                f"{level!r},{np.exp(level):.12g},0.31,{level / 3!r},{level!r},0.31,2.5," if s % 2000 == 0 else ",,,,,,,"
            )
            lines.append(
                f"{s},{s * 8192},{round(s * 0.31, 5)},{level!r},{6e-4 * (1 - s / steps)!r},{float(norms[s])!r},"
                f"0.310123,{26000 + 100 * float(noise[s]):.1f},0,{told}"
            )
        made.append(folder / f"metrics_{k}.csv")
        made[-1].write_text("\n".join(lines) + "\n", "utf-8")
    entries = []
    for i in range(runs):
        lr, seed = round(1e-4 * 1.07 ** (i // 2), 9), i % 2
        name = f"lr={lr:g},seed={seed}"
        place = folder / "runs" / name
        write_config(place, lr=lr, seed=seed, max_steps=steps)
        os.link(made[i % files], place / "metrics.csv")
        loss = 3.0 + abs(i // 2 - 50) / 100 + 0.001 * seed
        write_result(place, best_val_loss=loss, best_step=steps, final_val_loss=loss, steps=steps, max_steps=steps)
        write_layers(place, range(1000, steps + 1, 1000))
        entries.append({"name": name, "variant": None, "changes": {"lr": lr, "seed": seed}, "status": "completed",
                        "run_dir": f"runs/{name}", "lr": lr, "seed": seed})  # fmt: skip
    for path in made:
        path.unlink()
    (folder / "results.json").write_text(json.dumps(entries), "utf-8")
    (folder / "sweep.toml").write_text('question = "Which rate is best?"\nbaseline = ""\n', "utf-8")
    return folder
