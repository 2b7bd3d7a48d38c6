"""Small runs for the tests of the language model: token files without a tokenizer, configs that train in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from bytekiln.config import RunConfig, load_config

torch.set_num_threads(1)  # models this small gain nothing from more, and several test runs share the cores
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For child processes whose numbers are compared with ours: bit-identical means the same thread count."""
VOCAB = 61
TINY: dict[str, object] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "context_length": 8,
    "batch_size": 3,
    "max_steps": 6,
    "lr": 1e-2,
    "warmup_steps": 2,
    "decay_lr": True,
    "eval_interval": 4,
    "num_eval_batches": 2,
    "log_interval": 2,
    "checkpoint_interval": 2,
    "compile": False,
    "precision": "fp32",
    "device": "cpu",
}
TIMES = ("elapsed_s", "step_time_s", "tokens_per_s", "eval_time_s")


def tokens(
    path: Path, count: int = 600, vocab: int = VOCAB, *, seed: int = 0, manifest: bool = True, eot: int | None = None
) -> Path:
    """A token file whose ids follow one another often enough that a model can learn something.

    With `eot` the manifest calls this id the end of a document.
    """
    rng = np.random.default_rng(seed)
    ids = (np.arange(count) * 7 % vocab + rng.integers(0, 2, count)).clip(max=vocab - 1).astype(np.uint16)
    np.save(path, ids)
    if manifest:
        about = {
            "format": "bytekiln-tokens",
            "version": 1,
            "file": path.name,
            "dtype": "uint16",
            "tokens": count,
            "text_bytes": 3 * count,
            "vocab_size": vocab,
            "max_id": int(ids.max()),
            "tokenizer_hash": "sha256:" + "ab" * 32,
        }
        if eot is not None:
            about["eot_id"] = eot
        path.with_name(path.name + ".json").write_text(json.dumps(about), encoding="utf-8")
    return path


def tiny(folder: Path, **values: object) -> RunConfig:
    """A run in `folder/run` on token files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    train, val = folder / "train.npy", folder / "val.npy"
    if not train.exists():
        tokens(train)
        tokens(val, 200, seed=1)
    base = {"train_data": str(train), "val_data": str(val), "out_dir": str(folder / "run")}
    return load_config(None, {**TINY, **base, **values})
