"""Where a run stands: the counters and memories that a checkpoint holds beside tensors. Made by `loop`; no torch.

In: what `state.json` says. Out: the same again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bytekiln.errors import FormatError
from bytekiln.metrics import COLUMNS, Row


@dataclasses.dataclass
class State:
    """Everything of a run that is no tensor and no setting."""

    step: int = 0
    """Optimizer steps done, those that the guard left out included."""
    windows: int = 0
    """Training windows read: the place in the data."""
    tokens: int = 0
    """Real targets read."""
    elapsed_s: float = 0.0
    """Time spent on the run, earlier parts included."""
    training_s: float = 0.0
    """Time of its steps alone."""
    skipped: int = 0
    """Steps whose update was left out."""
    owed: Row | None = dataclasses.field(default_factory=lambda: Row(0, 0, 0.0))
    """The row of the last step, while its evaluation is still to come; row 0 waits for the first one."""
    last_row: Row | None = None
    initial_loss: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    train_eval_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    high_rows: int = 0
    """Losses in succession that lie far above the first one."""
    waiting: int = 0
    """Evaluations in succession that did not lie below `mark` by the least that counts."""
    mark: float | None = None
    """Validation loss at the last improvement that counted."""
    evaluation_s: float = 0.0
    saving_s: float = 0.5
    """How long the next evaluation and the next checkpoint may take: what has to be left of `max_time` at the end."""

    @property
    def last_row_kept(self) -> int:
        """Step of the last row that is in the metrics file."""
        return self.step - 1 if self.owed is not None else self.step

    def to_json(self) -> dict[str, Any]:
        """As `state.json` holds it."""
        out = dataclasses.asdict(self)
        return {k: round(v, 6) if k.endswith("_s") else v for k, v in out.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], where: str) -> State:
        """What `to_json` gave.

        Raises:
            FormatError: a value is missing, or a row is none; the message begins with `where`.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        missing = [n for n in names if n not in stored]
        if missing:
            raise FormatError(f"{where}: found no {missing[0]}; expected the state of a run")
        values = {n: stored[n] for n in names}
        for name in ("owed", "last_row"):
            values[name] = _row(values[name], f"{where}: {name}")
        return cls(**values)


def _row(stored: object, where: str) -> Row | None:
    if stored is None:
        return None
    if not isinstance(stored, Mapping):
        raise FormatError(f"{where}: found {stored!r}; expected a row of metrics.csv, or null")
    if unknown := [k for k in stored if k not in COLUMNS]:
        raise FormatError(f"{where}: found {unknown[0]}; expected columns of metrics.csv: {', '.join(COLUMNS)}")
    try:
        return Row(**stored)
    except TypeError:  # one of the three that every row has is missing, or a text stands for a number
        raise FormatError(f"{where}: found {dict(stored)!r}; expected a row of metrics.csv") from None
