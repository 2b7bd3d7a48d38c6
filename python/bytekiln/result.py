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
    """completed, interrupted or diverged."""
    why: str
    steps: int
    max_steps: int
    tokens: int
    parameters: int
    initial_loss: float | None
    uniform_loss: float
    """ln of the vocabulary's size."""
    final_train_loss: float | None
    final_val_loss: float | None
    final_bits_per_byte: float | None
    best_val_loss: float | None
    best_step: int | None
    tokens_per_s: float | None
    wall_time_s: float
    device: str
    precision: str
    compiled: bool
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
        yield (
            f"Iter {row.step:6d} | Loss: {row.loss:.4f} | Time: {row.step_time_s:.3f}s | LR: {row.lr:.2e} | "
            f"{row.tokens_per_s:,.0f} tokens/s"
        )
    if row.val_loss is not None:
        bits = f" | {row.bits_per_byte:.4f} bits/byte" if row.bits_per_byte is not None else ""
        yield f"Iter {row.step:6d} | Val Loss: {row.val_loss:.4f}{bits}"
