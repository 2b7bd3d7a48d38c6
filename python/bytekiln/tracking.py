"""A run's curves for TensorBoard and Weights & Biases: adapters that can fail without harm.

In: the config, rows of the metrics, the final model's folder. Out: their files and their servers. Called by `record`,
in one process only. Neither package is loaded before a run asks for it; where one is missing, or fails later (network,
disk), there is one notice and training goes on. No torch: TensorBoard's own writer does.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from bytekiln.config import RunConfig
from bytekiln.errors import BytekilnError
from bytekiln.metrics import Row, read_metrics, write_atomically

Notice = Callable[[str], object]

INSTALL = "pip install 'bytekiln[track]'"
KEEP = 0.98
"""What the smoothed loss keeps of its past a step: an average over about 50 steps."""
FLUSH_S = 10
"""TensorBoard sees a curve at most this late."""
CONNECT_S, UPLOAD_S = 30.0, 600.0
"""How long Weights & Biases may take: to begin, and to send the rest at the end; `wandb sync` sends what is left."""


class Tracker(Protocol):
    """Who is told of a run."""

    name: str
    fresh: bool
    """Whether it has seen nothing of this run, and so has to be told the rows before a resume."""

    def scalars(self, step: int, values: Mapping[str, float], age_s: float) -> None:
        """Take one step's values, `age_s` seconds old; steps rise."""

    def end(self, model: Path | None, status: str) -> None:
        """Take the final model, if there is one, and bring everything home."""


class Trackers:
    """All trackers of a run; one that fails is left out from then on."""

    def __init__(self, notice: Notice) -> None:
        """None yet."""
        self._notice = notice
        self._active: list[Tracker] = []
        self._smoothed = Smoothed()

    def start(self, name: str, make: Callable[[], Tracker]) -> None:
        """Add a tracker, or say why not."""
        try:
            self._active.append(make())
        except ImportError as exc:
            missing = f"the package {exc.name} is not installed" if exc.name else str(exc)
            self._notice(f"{name}: {missing}; training goes on without it ({INSTALL} brings it)")
        except Exception as exc:
            self._give_up(name, exc)

    def catch_up(self, rows: Sequence[Row]) -> None:
        """Rows before a resume: they bring the smoothed loss to where it was, and new trackers up to date."""
        new, best = [t for t in self._active if t.fresh], None
        for row in rows:
            if row.val_loss is not None and row.step > 0 and (best is None or row.val_loss < best):
                best = row.val_loss
            self._tell(new, row, best, rows[-1].elapsed_s - row.elapsed_s)

    def row(self, row: Row, best_val_loss: float | None) -> None:
        """Tell a row of the metrics, with the lowest validation loss up to it."""
        if self._active:
            self._tell(list(self._active), row, best_val_loss, 0.0)

    def finish(self, model_folder: Path | None, status: str) -> None:
        """End of the run: hand over the final model, if there is one, and say how it ended; then nothing more."""
        for tracker in self._active[:]:
            self._guarded(tracker, lambda t: t.end(model_folder, status))
        self._active.clear()

    def close(self) -> None:
        """End without a model, where `finish` was not reached."""
        self.finish(None, "failed")

    def _tell(self, to: Sequence[Tracker], row: Row, best_val_loss: float | None, age_s: float) -> None:
        smoothed = self._smoothed.add(row.loss) if row.loss is not None else None
        values = scalars_of(row, smoothed, best_val_loss)
        for tracker in to:
            self._guarded(tracker, lambda t: t.scalars(row.step, values, age_s))

    def _guarded(self, tracker: Tracker, action: Callable[[Tracker], None]) -> None:
        if tracker not in self._active:
            return
        try:
            action(tracker)
        except Exception as exc:
            self._active.remove(tracker)
            self._give_up(tracker.name, exc)

    def _give_up(self, name: str, exc: Exception) -> None:
        said = " ".join(str(exc).split())[:200] or type(exc).__name__
        self._notice(f"{name}: {said}; training goes on without it")


def make_trackers(
    config: RunConfig, folder: Path, step: int, notice: Notice, run_id_file: Path | None = None
) -> Trackers:
    """The trackers that a config asks for.

    Args:
        config: the run.
        folder: the run folder.
        step: the last step whose row stays in the metrics file (already cut back to it); -1: the run is new. What
            the trackers know of later steps is taken back, or told again without harm.
        notice: told what deserves attention.
        run_id_file: keeps the run's id at Weights & Biases; unset: `tracking.json` in the run folder.
    """
    trackers, output = Trackers(notice), config.output
    if not (output.tensorboard or output.wandb):
        return trackers
    if output.tensorboard:
        trackers.start("tensorboard", lambda: TensorBoard(output.tensorboard_folder, config, step))
    if output.wandb:
        ids = run_id_file or folder / "tracking.json"
        trackers.start("wandb", lambda: WandB(config, folder, step, ids, notice))
    if step >= 0:
        try:
            trackers.catch_up([r for r in read_metrics(output.metrics) if r.step <= step])
        except BytekilnError as exc:
            notice(f"tracking: {exc}; the smoothed loss begins anew")
    return trackers


class Smoothed:
    """Exponential moving average without the pull towards its start (as in Adam); its state is the rows so far."""

    def __init__(self) -> None:
        """Of nothing."""
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """The average with one value more; what is not finite is left out, since it would stay for good."""
        if math.isfinite(value):
            self._sum, self._weight = KEEP * self._sum + value, KEEP * self._weight + 1
        return self._sum / self._weight if self._weight else math.nan


def scalars_of(row: Row, smoothed: float | None, best_val_loss: float | None) -> dict[str, float]:
    """Names and values of what a row has to say; the names are those of the user's documents."""
    values = {
        "train/loss": row.loss,
        "train/loss_smoothed": smoothed,
        "train/lr": row.lr,
        "train/grad_norm": row.grad_norm,
        "train/perplexity": perplexity(row.loss),
        "system/tokens_per_sec": row.tokens_per_s,
        "val/loss": row.val_loss,
        "val/perplexity": perplexity(row.val_loss),
        "val/best_loss": best_val_loss if row.val_loss is not None else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def perplexity(loss: float | None) -> float | None:
    """e to the power of a loss; inf where no float is that large.

    >>> perplexity(0.0), perplexity(1000.0)
    (1.0, inf)
    """
    if loss is None:
        return None
    return math.exp(loss) if loss < 709 else math.inf if loss == loss else math.nan


class TensorBoard:
    """Event files. A resume writes a session start, from whose step on TensorBoard forgets what it read before."""

    name = "tensorboard"

    def __init__(self, folder: Path, config: RunConfig, step: int) -> None:
        """Open a new file in `folder`, behind the values of `step`."""
        import_module("tensorboard")  # its submodules may be loaded while it is said to be missing
        self._proto: Any = import_module("tensorboard.compat.proto.event_pb2")
        self._summary: Any = import_module("tensorboard.compat.proto.summary_pb2").Summary
        text: Any = import_module("tensorboard.plugins.text.summary_v2")
        writer: Any = import_module("tensorboard.summary.writer.event_file_writer")
        self.fresh = not any(folder.glob("events.out.tfevents.*"))
        self._writer = writer.EventFileWriter(str(folder), flush_secs=FLUSH_S)
        # TensorBoard drops values of this step and later ones; those of a run that was overwritten, too.
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(step + 1, session_log=start)
        toml = "".join(f"    {line}\n" for line in config.to_toml().splitlines())
        self._write(step + 1, summary=text.text_pb("config", toml))

    def _write(self, step: int, age_s: float = 0.0, **content: object) -> None:
        self._writer.add_event(self._proto.Event(step=step, wall_time=time.time() - age_s, **content))

    def scalars(self, step: int, values: Mapping[str, float], age_s: float) -> None:
        """As `Tracker`."""
        one = self._summary.Value
        self._write(step, age_s, summary=self._summary(value=[one(tag=k, simple_value=v) for k, v in values.items()]))

    def end(self, model: Path | None, status: str) -> None:
        """As `Tracker`; there is no place for a model."""
        self._writer.close()


class WandB:
    """Weights & Biases, online or into files in the run folder for a later `wandb sync`."""

    name = "wandb"

    def __init__(self, config: RunConfig, folder: Path, step: int, ids: Path, notice: Notice) -> None:
        """Begin the run, or go on with the one whose id `ids` holds."""
        self._wandb: Any = import_module("wandb")
        output = config.output
        known = _stored_id(ids) if step >= 0 else None
        self.fresh = known is None
        run_id = known or secrets.token_hex(4)
        self._run: Any = self._wandb.init(
            project=output.wandb_project,
            name=output.run_name or folder.resolve().name,
            id=run_id,
            resume="allow",
            mode="offline" if output.wandb_mode == "offline" else None,  # None: as WANDB_MODE says, else online
            dir=str(folder),
            config=config.model_dump(),
            settings=self._wandb.Settings(silent=True, console="off", init_timeout=CONNECT_S, finish_timeout=UPLOAD_S),
        )
        self._first: int = self._run.step
        about = {"format": "bytekiln-tracking", "version": 1, "wandb": run_id}
        write_atomically(ids, json.dumps(about).encode() + b"\n")
        offline = f"offline run {run_id}; `wandb sync {Path(self._run.dir).parent}` sends it"
        notice(f"wandb: {offline if self._run.offline else self._run.url}")

    def scalars(self, step: int, values: Mapping[str, float], age_s: float) -> None:
        """As `Tracker`."""
        # Steps that a killed run had sent already: the server would refuse them, each with a line on the console.
        if step >= self._first:
            self._run.log(dict(values), step=step)

    def end(self, model: Path | None, status: str) -> None:
        """As `Tracker`; the model's folder becomes the artifact `model-ID`."""
        self._run.summary["status"] = status
        if model is not None:
            artifact = self._wandb.Artifact(f"model-{self._run.id}", type="model")
            for path in sorted(p for p in model.rglob("*") if p.is_file()):
                artifact.add_file(str(path), name=str(path.relative_to(model)))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if status in ("completed", "early_stopped", "interrupted") else 1)


def _stored_id(path: Path) -> str | None:
    """The id in `tracking.json`; None where it holds none (then the run gets a new one)."""
    try:
        found = json.loads(path.read_text("utf-8"))["wandb"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and found else None
