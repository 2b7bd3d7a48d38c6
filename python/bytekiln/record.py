"""The files of a run while it goes on: rows, layers, curves for others, samples, checkpoints, the result.

In: rows, tensors, ends. Out: the run folder (docs/formats.md). Called by `loop`, in the first process only.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bytekiln.characters import AnyTokenizer
from bytekiln.checkpoint import Checkpoint, remove_all, remove_old, save_checkpoint
from bytekiln.config import RunConfig
from bytekiln.entry import NAME as RECORD
from bytekiln.entry import write_entry
from bytekiln.errors import FileError
from bytekiln.layer_stats import LayerStats
from bytekiln.learner import Learner, Numbers, Taken
from bytekiln.metrics import MetricsFile, Row, read_metrics, write_atomically
from bytekiln.prepare import Say
from bytekiln.result import Result
from bytekiln.run_state import State
from bytekiln.samples_file import remove_samples, write_samples_file
from bytekiln.tracking import make_trackers

DUMPED_ROWS = 10
"""Rows that are written down beside the step at which a run diverged."""


class Record:
    """Everything that a run writes."""

    def __init__(
        self,
        config: RunConfig,
        state: State,
        tokenizer: AnyTokenizer | None,
        tokenizer_json: str | None,
        earlier_rows: Path | None,
        say: Say,
        notice: Say,
    ) -> None:
        """Open the run folder's files, behind the last row that `state` knows.

        Args:
            config: the run; it is written down.
            state: where the run stands; what lies behind is removed.
            tokenizer: for samples, if the run has one. tokenizer_json: the same as text, for checkpoints.
            earlier_rows: the metrics file that a run goes on with, if it is not its own.
            say, notice: the console.
        """
        self.config, self.tokenizer, self.tokenizer_json = config, tokenizer, tokenizer_json
        self.say, self.notice = say, notice
        folder, kept = config.output.folder, state.last_row_kept
        for name in ("result.json", "diverged.json", RECORD):
            (folder / name).unlink(missing_ok=True)
        # Newer checkpoints go before the rows that they rely on: a kill in between leaves a run that is whole.
        remove_all(config.output.checkpoints, behind=state.step)
        write_atomically(folder / "config.toml", config.to_toml().encode())
        if tokenizer_json is not None:
            write_atomically(folder / "tokenizer.json", tokenizer_json.encode())
        last = state.last_row if earlier_rows is not None else None  # if torn in the file, whole in the checkpoint
        self.metrics = MetricsFile(config.output.metrics, kept, earlier_rows, last)
        self.layers: LayerStats | None = None
        if config.training.stats_interval:
            elsewhere = earlier_rows is not None and earlier_rows.resolve() != config.output.metrics.resolve()
            elsewhere &= not (folder / "layers.csv").exists()  # its own, where only the metrics have another name
            source = earlier_rows.with_name("layers.csv") if earlier_rows is not None and elsewhere else None
            self.layers = LayerStats(
                folder / "layers.csv",
                state.step,
                source if source is not None and source.is_file() else None,
                overflows=config.training.precision == "fp16",
            )
        remove_samples(folder, behind=state.step)
        self.trackers = make_trackers(config, folder, kept, notice)
        self._last: deque[Row] = deque([state.last_row] if state.last_row else [], DUMPED_ROWS)

    def row(self, row: Row, best_val_loss: float | None) -> None:
        """Write one row; it survives the death of the process from here on."""
        self.metrics.append(row)
        self._last.append(row)
        self.trackers.row(row, best_val_loss)

    def checkpoint(
        self, name: str, state: State, weights: dict[str, Tensor], training: dict[str, Tensor], data: Mapping[str, Any]
    ) -> None:
        """Save; the rows that the checkpoint relies on are brought to the disk first."""
        path = self.config.output.checkpoints / name
        self.metrics.sync()
        if self.layers is not None:
            self.layers.sync()
        self.say(f"Saving checkpoint to {path}")
        about = {**state.to_json(), "data": dict(data)}
        save_checkpoint(path, Checkpoint(state.step, self.config, weights, training, about, self.tokenizer_json))

    def remove_old(self) -> None:
        """Keep as many numbered checkpoints as wanted."""
        remove_old(self.config.output.checkpoints, self.config.training.keep_checkpoints)

    def samples(self, learner: Learner, step: int, stop: Callable[[], bool]) -> None:
        """Texts for the fixed prompts, from the weights that are evaluated; given up once `stop` says so."""
        if not self.config.training.sample_tokens or self.tokenizer is None:
            return
        if self.config.training.parallel == "fsdp" and learner.ranks.world > 1:
            self.notice("samples: found a model in shards; the run writes none (lm-sample reads its checkpoints)")
            return
        try:
            with learner.shown_weights():
                done = write_samples_file(
                    self.config.output.folder, learner.model, self.tokenizer, self.config, step, stop=stop
                )
        except (FileError, OSError) as exc:  # no reason to lose a run, whose numbers and weights are safe
            self.notice(f"samples of step {step}: not written: {exc}")
            return
        if done is None and stop():
            self.notice(f"samples of step {step}: no time was left for them")

    def diverged(self, step: Taken, told: Numbers, norms: Mapping[str, float]) -> None:
        """Write down what led to a step that is not finite: its numbers, its windows, the rows before it."""
        about = {
            "format": "bytekiln-diverged",
            "version": 1,
            "step": step.step,
            "lr": step.lr,
            "windows": list(step.windows),
            "loss": str(told.loss),
            "grad_norm": str(told.grad_norm),
            "grad_norm_of_layers": {name: str(x) for name, x in norms.items()},
            "last_steps": [dataclasses.asdict(r) for r in self._last],
        }
        write_atomically(
            self.config.output.folder / "diverged.json", json.dumps(about, indent=1, allow_nan=False).encode() + b"\n"
        )

    def finish(self, result: Result, data: Mapping[str, Any]) -> None:
        """Write `result.json` and, where it is wanted and the run is over, `record.json`; tell the trackers."""
        result.write(self.config.output.folder / "result.json")
        if self.config.output.record and result.status != "interrupted":
            self.say(f"Record written to {write_entry(self.config, read_metrics(self.metrics.path), result, data)}")
        final = self.config.output.checkpoints / "checkpoint_final"
        self.trackers.finish(final if final.is_dir() else None, result.status)

    def close(self) -> None:
        """Close all files."""
        self.metrics.close()
        if self.layers is not None:
            self.layers.close()
        self.trackers.close()
