"""From a config to a trained model: everything is opened and checked here before the `loop` begins.

In: a `RunConfig`. Out: a folder with `config.toml`, `metrics.csv`, `result.json` and `checkpoints/`
(docs/formats.md), and a `Result`. Called by `cli_lm` and by users.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path

from bytekiln import _core
from bytekiln.characters import AnyTokenizer, from_json_any
from bytekiln.config import RunConfig, refuse_idle
from bytekiln.data import load_tokenizer, open_data
from bytekiln.errors import ConfigError
from bytekiln.loop import Run
from bytekiln.prepare import (
    Say,
    allowed_changes,
    find_checkpoint,
    find_device,
    initial_weights,
    keep_freed_memory,
    resolved,
)
from bytekiln.ranks import processes
from bytekiln.result import Result
from bytekiln.runfolder import check_folder, lies_in, locked, prepare_folder
from bytekiln.samples_file import check_prompts
from bytekiln.signals import Signals


def train(
    config: RunConfig,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    eval_only: bool = False,
    given: Mapping[str, object] | None = None,
    said: Collection[str] = (),
    changes: Collection[str] = (),
    began: float | None = None,
    pause_at: int = 0,
    say: Say = lambda _: None,
    notice: Say = lambda _: None,
) -> Result:
    """Train a model, or go on training one.

    Under `torchrun` every process calls this; the first one speaks and writes.

    Args:
        config: the run; `config.output` says where it goes.
        resume: "auto" for the newest whole checkpoint of the run folder (none: start), or a checkpoint's path.
        overwrite: replace an existing run.
        eval_only: evaluate the checkpoint, or the weights of `init_from`, and write nothing.
        given: on a resume, the fields that the caller set on purpose; the others come from the checkpoint. Those
            that change the mathematics must equal the run's; `max_steps` may rise.
        said: fields that stand on the command line; one that nothing would read is refused.
        changes: fields that may change the mathematics all the same.
        began: `time.perf_counter()` at which `max_time` began to count; None: now.
        pause_at: end at this step as interrupted, behind its evaluation if one is due and a checkpoint; the schedule is
            that of the whole run, which a resume goes on with. 0: no pause.
        say: told the lines of the console. `notice`: told what deserves attention.

    Returns:
        How it ended; the same is in `result.json`.

    Raises:
        BytekilnError: config, data, checkpoint or folder cannot be used; nothing was trained.
    """
    if resume is not None and overwrite:
        raise ConfigError("found both --resume (or a run's folder) and --overwrite; expected one of them")
    began = time.perf_counter() if began is None else began
    with Signals() as signals, processes(config.training.device) as ranks:
        if not ranks.first:
            say = notice = lambda _: None
        checkpoint = None
        if resume is not None:
            config, checkpoint = find_checkpoint(config, str(resume), given, notice, changes, eval_only)
        if not eval_only:
            refuse_idle(config, said, checkpoint.config if checkpoint is not None else None)
        device = find_device(config.training.device, ranks.local_rank)
        if device.type == "cpu":
            keep_freed_memory()
            _core.simd_level()  # refuses a BYTEKILN_SIMD that is not here, before anything is made
        say(f"Using device: {device}" + (f", {ranks.world} processes" if ranks.world > 1 else ""))
        say("Loading tokenizer...")
        if checkpoint and checkpoint.tokenizer_json and not {"tokenizer", "vocab_path"} & set(given or {}):
            tokenizer: AnyTokenizer | None = from_json_any(checkpoint.tokenizer_json)
        else:
            tokenizer = load_tokenizer(config.data)
        say("Tokenizer loaded." if tokenizer else "No tokenizer given: ids are taken as they are.")
        say("Loading training data..." + ("\nLoading validation data..." if config.data.val_data else ""))
        data = open_data(config, tokenizer)
        for line in data.notices:
            notice(line)
        if tokenizer is not None and tokenizer.n_vocab < data.vocab_size and checkpoint is None:
            notice(
                f"vocab_size: the model has {data.vocab_size} tokens, the tokenizer uses {tokenizer.n_vocab} of them"
            )
        config = resolved(config, data.vocab_size, device, say)
        if config.training.early_stopping_patience and data.val is None:
            raise ConfigError("early_stopping_patience: found one without val_data; expected validation data to watch")
        o = config.optimizer
        if o.decay_lr and 0 < o.decay_steps < o.warmup_steps and config.progress == "steps":
            notice(
                f"decay_steps: found {o.decay_steps}; expected at least warmup_steps, {o.warmup_steps}: "
                "the rate falls to min_lr at once behind the warm-up"
            )
        why_none, t = check_prompts(config, tokenizer), config.training
        if why_none and (t.sample_prompts or t.sample_interval):  # asked for, not merely left on
            notice(why_none)
        tokenizer_json = tokenizer.to_json() if tokenizer else checkpoint.tokenizer_json if checkpoint else None
        resuming = resume is not None and (checkpoint is None or lies_in(checkpoint, config.output))
        if not eval_only:
            check_folder(config.output, overwrite, resuming=resuming)
        run = Run(config, device, ranks, signals, data, tokenizer, tokenizer_json, began, say, notice)
        if checkpoint is not None:
            run.restore(checkpoint, allowed_changes(changes), eval_only=eval_only)
        elif config.training.init_from:
            run.learner.load_weights(initial_weights(config, say), config.training.init_from)
        elif eval_only:
            raise ConfigError("found nothing to evaluate; expected a run, --resume, or --init-from with weights")
        run.horizon.pause_at = pause_at
        if pause_at > config.training.max_steps:
            notice(f"--pause-at {pause_at}: behind the end of the run, {config.training.max_steps} steps; no pause")
        elif 0 < pause_at < run.s.step:
            notice(f"--pause-at {pause_at}: the run is at step {run.s.step} already, and pauses there")
        if eval_only:
            if checkpoint is not None:
                say(f"Evaluating {checkpoint.path}, step {checkpoint.step}")
            return run.evaluate_only()
        with locked(config.output) if ranks.first else nullcontext():
            if (status := run.how_it_ended()) is not None:
                notice(f"{config.output.folder}: complete at step {run.s.step}; a greater --max-steps continues it")
                return run.result(status, "nothing was left to do")
            if ranks.first:
                with signals.hold():
                    prepare_folder(config.output, overwrite, resuming=resuming)
            return run.go()
