"""Several runs of one shape trained together in one process: a sweep over learning rates in fewer, larger kernels.

In: configs that `stackable` lets through. Out: for each the ordinary run folder and `Result` that `train` would have
made, its numbers equal to 1e-5. Called by sweeps, and as `python -m bytekiln.stack.command CONFIG…`.

Each run is an ordinary one, with its own learner, guard, average, data, rows and checkpoints (`stack.run`); only the
pass through the model, forward and back, is made for several of them at once (`stack.model`), in as many stacks as
there are threads. So optimizers and their settings need no second implementation, a stacked run can be resumed alone,
and a single one in a stack. A run that ends, diverges or fails leaves, and the others go on.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from bytekiln.characters import AnyTokenizer, from_json_any
from bytekiln.config import RunConfig, load_config
from bytekiln.console import Parser, Progress
from bytekiln.console import notice as tell
from bytekiln.data import load_tokenizer, open_data
from bytekiln.errors import ConfigError, DivergedError
from bytekiln.loop import QUIET_STEPS
from bytekiln.prepare import Say, find_checkpoint, find_device, initial_weights, keep_freed_memory, resolved
from bytekiln.ranks import Ranks
from bytekiln.result import Result
from bytekiln.runfolder import check_folder, lies_in, locked, prepare_folder
from bytekiln.signals import Interrupted, Signals
from bytekiln.stack.rules import stackable
from bytekiln.stack.run import StackedRun, Stacks, divided_threads

__all__ = ["stackable", "train_stacked"]


def train_stacked(
    configs: Sequence[RunConfig],
    *,
    resume: str | None = None,
    overwrite: bool = False,
    given: Mapping[str, object] | None = None,
    say: Say = lambda _: None,
    notice: Say = lambda _: None,
) -> list[Result]:
    """Train several runs together, or go on with them.

    Args:
        configs: the runs, as for `train`; each has its own `config.output`.
        resume: "auto": each goes on from the newest whole checkpoint of its folder, or starts. They need not stand at
            the same step: those behind go ahead alone until they meet. One that is complete is left as it is.
        overwrite: replace existing runs.
        given: as in `train`, the same for all runs.
        say, notice: told the lines of the console, each with the run's name in front.

    Returns:
        How each ended, in the order of `configs`.

    Raises:
        BytekilnError: the runs cannot be stacked, or one of them cannot be trained; nothing was trained.
        Exception: one failed on its way, its folder is as it was then; the others have been trained to their ends.
    """
    if resume not in (None, "auto"):
        raise ConfigError(f"resume: found {resume} for stacked runs; expected auto, each run has its own checkpoints")
    if resume is not None and overwrite:
        raise ConfigError("found both resume and overwrite; expected one of them")
    if why := stackable(configs):
        raise ConfigError(f"stack: {why}")
    began = time.perf_counter()
    with Signals() as signals, ExitStack() as held:
        runs: list[StackedRun] = []
        for i, config in enumerate(configs):
            aloud = notice if not i else (lambda _: None)  # what the data has to say concerns all alike
            runs.append(_prepared(config, resume, overwrite, given, signals, began, _named(say, config), aloud))
        if why := stackable([r.config for r in runs]):  # once more, with nothing left open
            raise ConfigError(f"stack: {why}")
        for run in runs:
            held.enter_context(locked(run.config.output))
        ended: dict[int, Result] = {}
        for i, run in enumerate(runs):
            if (status := run.how_it_ended()) is not None:
                ended[i] = run.result(status, "nothing was left to do")
                continue
            with signals.hold():
                prepare_folder(run.config.output, overwrite, resuming=resume is not None)
        most = held.enter_context(divided_threads(runs))
        return _Group(runs, ended, most, signals, say, notice).go()


def _named(say: Say, config: RunConfig) -> Say:
    name = config.output.folder.name
    return lambda line: say(f"{name}: {line}")


def _prepared(
    config: RunConfig,
    resume: str | None,
    overwrite: bool,
    given: Mapping[str, object] | None,
    signals: Signals,
    began: float,
    say: Say,
    notice: Say,
) -> StackedRun:
    """A run that is ready to begin: what `train` does before its first step."""
    checkpoint = None
    if resume is not None:
        config, checkpoint = find_checkpoint(config, resume, given, notice)
    device = find_device(config.training.device)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer: AnyTokenizer | None
    if checkpoint and checkpoint.tokenizer_json and not {"tokenizer", "vocab_path"} & set(given or {}):
        tokenizer = from_json_any(checkpoint.tokenizer_json)
    else:
        tokenizer = load_tokenizer(config.data)
    data = open_data(config, tokenizer)
    for line in data.notices:
        notice(line)
    config = resolved(config, data.vocab_size, device, say)
    if config.training.early_stopping_patience and data.val is None:
        raise ConfigError("early_stopping_patience: found one without val_data; expected validation data to watch")
    tokenizer_json = tokenizer.to_json() if tokenizer else checkpoint.tokenizer_json if checkpoint else None
    resuming = resume is not None and (checkpoint is None or lies_in(checkpoint, config.output))
    check_folder(config.output, overwrite, resuming=resuming)
    run = StackedRun(config, device, Ranks(), signals, data, tokenizer, tokenizer_json, began, say, notice)
    if checkpoint is not None:
        run.restore(checkpoint)
    elif config.training.init_from:
        run.learner.load_weights(initial_weights(config, say), config.training.init_from)
    return run


class _Group:
    """The loop over runs that are trained together."""

    def __init__(
        self,
        runs: Sequence[StackedRun],
        ended: dict[int, Result],
        most: int,
        signals: Signals,
        say: Say,
        notice: Say,
    ) -> None:
        """Of `runs`, those in `ended` are over already; the others make at most so many stacks."""
        self.runs, self.ended, self.signals, self.say, self.notice = runs, ended, signals, say, notice
        self.live = [r for i, r in enumerate(runs) if i not in ended]
        self.most, self.stacks = most, Stacks([], most, notice)
        self.failure: Exception | None = None
        """The first one's."""

    def go(self) -> list[Result]:
        """From the first step that is not done to the last run's end."""
        collecting = gc.isenabled()
        self.signals.late = self._late
        try:
            self._each(self.live, StackedRun.begin)
            if self.failure is not None:
                raise self.failure
            if self.live:
                self.say(f"Training {len(self.live)} runs together...")
                self._train()
        except Interrupted:
            self.signals.claim()
            for run in self.live:
                self.ended[self.runs.index(run)] = run.interrupted()
            self.failure = None  # one is enough to tell, and the run goes on with the others
        except BaseException:
            self.signals.claim()
            raise
        finally:
            gc.unfreeze()
            if collecting:
                gc.enable()
            self.signals.late = None
            self.stacks.close()
            for run in self.runs:
                run.close()
        if self.failure is not None:
            raise self.failure
        return [self.ended[i] for i in range(len(self.runs))]

    def _train(self) -> None:
        with Progress("training", *self.live[0].horizon.job()) as bar:
            taken = 0
            while self._end_what_is_over():
                step = min(r.horizon.step for r in self.live)
                now = [r for r in self.live if r.horizon.step == step]
                if self.stacks.runs != now:
                    self._restack(now)
                began = time.perf_counter()
                for run in now:
                    run.began = began
                for stack, exc in self.stacks.gradients():
                    for run in stack.runs:
                        self._failed(run, exc)
                now = [r for r in now if r in self.live]
                self._each(now, StackedRun.step)
                bar.update(step + 1, runs=len(now), **_losses(now))
                taken += 1
                if taken == QUIET_STEPS:
                    gc.collect()
                    gc.freeze()
                    gc.disable()

    def _restack(self, runs: Sequence[StackedRun]) -> None:
        self.stacks.let_go()
        self.stacks = Stacks(runs, self.most, self.notice)
        if runs[0].config.training.compile is True:
            self.say(f"Compiling the model for {len(runs)} runs...")
            self.stacks.compile()

    def _each(self, runs: Sequence[StackedRun], act: Callable[[StackedRun], None]) -> None:
        """Let each run act; one that diverges or fails leaves, the others go on."""
        for run in list(runs):
            try:
                act(run)
            except DivergedError as exc:
                with self.signals.hold():
                    self.live.remove(run)
                    self.ended[self.runs.index(run)] = run.diverged(str(exc))
                self.notice(f"{run.config.output.folder.name}: diverged: {exc}")
            except Exception as exc:  # is raised once the others have ended
                self._failed(run, exc)

    def _failed(self, run: StackedRun, exc: Exception) -> None:
        with self.signals.hold():
            self.live.remove(run)
            self.ended[self.runs.index(run)] = run.result("failed", str(exc))
            self.failure = self.failure or exc
        self.notice(f"{run.config.output.folder.name}: failed: {exc}")

    def _end_what_is_over(self) -> bool:
        """Save, sample and judge the runs that are over; whether any is left."""
        for run in [r for r in self.live if r.horizon.over is not None]:
            self._each([run], StackedRun.end)
            if run not in self.live:
                continue
            with self.signals.hold():  # the run is whole: a signal cuts its samples short and then meets the others
                self.live.remove(run)
                self.ended[self.runs.index(run)] = run.results()
                if not self.live:
                    self.signals.number = None
        return bool(self.live)

    def _late(self, number: int) -> None:
        """In a thread, while the main one is in a long call that moves no weight: save all runs, end the process."""
        self.signals.number = number
        for run in list(self.live):
            run.interrupted()
        os._exit(128 + number)


def _losses(runs: Sequence[StackedRun]) -> dict[str, object]:
    last = [r.s.last_row.loss for r in runs if r.s.last_row is not None and r.s.last_row.loss is not None]
    return {"best loss": round(min(last), 4)} if last else {}


def stack(argv: list[str]) -> int:
    """`python -m bytekiln.cli lm-stack CONFIG…`: 0 done, 3 all diverged, 130 and 143 interrupted."""
    parser = Parser("lm-stack", description="Train several runs of one shape together in one process.")
    parser.add_argument("configs", nargs="+", metavar="CONFIG.toml", help="the runs, one file each")
    parser.add_argument("--resume", action="store_true", help="each goes on from its newest whole checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace existing runs")
    parser.add_argument("--in-place", action="store_true", help="each run in the folder of its config file")
    options = parser.parse_args(argv)
    paths = [Path(p) for p in options.configs]
    configs = [load_config(p, say=tell) for p in paths]
    if options.in_place:
        configs = [c.with_(out_dir=str(p.absolute().parent)) for c, p in zip(configs, paths, strict=True)]
    results = train_stacked(
        configs,
        resume="auto" if options.resume else None,
        overwrite=options.overwrite,
        say=_line,
        notice=tell,
    )
    for config, result in zip(configs, results, strict=True):
        loss = "" if result.final_val_loss is None else f", validation loss {result.final_val_loss:.4f}"
        _line(f"{config.output.folder}: {result.status}: {result.why}{loss}")
    if any(r.status == "interrupted" for r in results):
        return 128 + next(r.signal or signal.SIGINT for r in results if r.status == "interrupted")
    return 3 if all(r.status == "diverged" for r in results) else 0


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
