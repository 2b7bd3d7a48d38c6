"""What a run says of itself: the console's lines, and at the end `result.json`. Made by `train`; imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from bytekiln.metrics import Row, write_atomically


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended; `result.json` has the same fields."""

    status: str
    """completed, early_stopped, interrupted or diverged; evaluated, where nothing was trained."""
    why: str
    steps: int
    max_steps: int
    tokens: int
    parameters: int
    active_parameters: int
    """Of a mixture of experts: those that work on one token."""
    initial_loss: float | None
    uniform_loss: float
    """ln of the vocabulary's size."""
    final_train_loss: float | None
    final_val_loss: float | None
    final_val_accuracy: float | None
    final_bits_per_byte: float | None
    final_train_eval_loss: float | None
    """On training data in evaluation mode, with the last validation loss."""
    best_val_loss: float | None
    best_step: int | None
    skipped_steps: int
    """Steps whose update was left out: spikes, overflows of fp16."""
    tokens_per_s: float | None
    mfu: float | None
    """Model FLOPs utilisation of a known device."""
    wall_time_s: float
    device: str
    precision: str
    compiled: bool
    recompiles: int | None
    """Graphs that torch.compile had to make beyond the first ones; null where nothing was compiled."""
    processes: int = 1
    hardware: dict[str, str] = dataclasses.field(default_factory=dict)
    """What it ran on, as a person would name it (`hardware.describe`)."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of what computed: python, torch, bytekiln."""
    signal: int | None = None
    """The signal that interrupted it."""

    def write(self, path: Path) -> None:
        """As JSON (docs/formats.md).

        Raises:
            FileError: the folder cannot be written.
        """
        about = {"format": "bytekiln-result", "version": 1, **dataclasses.asdict(self)}
        write_atomically(path, json.dumps(about, indent=1, allow_nan=False).encode() + b"\n")


def lines_of(row: Row, *, logged: bool) -> Iterator[str]:
    """What the console shows of a step; the training loss only where it is `logged`."""
    if row.loss is not None and logged:
        left_out = " | update left out" if row.skipped else ""
        yield (
            f"Iter {row.step:6d} | Loss: {row.loss:.4f} | Time: {row.step_time_s:.3f}s | LR: {row.lr:.2e} | "
            f"{row.tokens_per_s:,.0f} tokens/s{left_out}"
        )
    if row.val_loss is not None:
        bits = f" | {row.bits_per_byte:.4f} bits/byte" if row.bits_per_byte is not None else ""
        accuracy = f" | accuracy {row.val_accuracy:.4f}" if row.val_accuracy is not None else ""
        yield f"Iter {row.step:6d} | Val Loss: {row.val_loss:.4f}{bits}{accuracy}"
