"""The language model's commands: `lm-train`, `lm-sample`. Argument list in, exit status out.

Called by `cli`, which turns errors into one line. torch is imported once there is something to compute;
`--help` needs the fields of `config` only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bytekiln.config import SECTION_OF, RunConfig, load_config, presets, stated_in
from bytekiln.console import Parser, notice, started
from bytekiln.errors import ConfigError, FileError
from bytekiln.result import Result
from bytekiln.run_flags import add_run_flags, given_fields, spell_switches, take_shape_of_weights
from bytekiln.sampling import SAMPLING_FLAGS, sampling_flags, write_samples

TRAIN_EXAMPLES = (
    "lm-train demo --train-data train.npy --val-data val.npy --tokenizer tokenizer.json",
    "lm-train tinystories --dataset tinystories --lr 1e-3 --out-dir runs/lr1e-3",
    "lm-train runs/lr1e-3                       goes on where the run was interrupted",
    "lm-train runs/lr1e-3/config.toml --seed 7  repeats the run in a new folder",
)
STATUS = {"completed": 0, "early_stopped": 0, "evaluated": 0, "diverged": 3}


def train(argv: list[str]) -> int:
    """`lm-train`: 0 completed, 3 diverged, 130 and 143 interrupted after a checkpoint."""
    began = started()
    parser = _train_parser(everything="--help-all" in argv)
    options = parser.parse_args(spell_switches(argv))
    given = given_fields(options)
    said = tuple(given)
    if options.source and options.config:
        raise ConfigError(f"lm-train: found two configurations, {options.source} and {options.config}; expected one")
    source, resume = options.source or options.config, options.resume
    source = source or options.dataset
    path = Path(source) if source and source.replace("_", "-") not in presets() and Path(source).exists() else None
    if path is not None and _is_checkpoint(path):
        if resume:
            raise ConfigError(f"lm-train: found two checkpoints, {source} and --resume {resume}; expected one")
        source, path, resume = None, None, source
    _one_thing_to_do(options)
    if options.generate:
        return write_samples(_run_to_sample(path, source, resume, given), options, str(given.get("device", "auto")))
    for name in SAMPLING_FLAGS:
        if getattr(options, name) != parser.get_default(name):
            raise ConfigError(f"--{name.replace('_', '-')}: found it without --generate; expected both, or lm-sample")
    if options.dataset:
        _dataset_files(options.dataset, given)
    if path is not None and path.is_dir():
        if options.overwrite and options.eval_only:
            raise ConfigError("lm-train: found --eval-only and --overwrite; expected one of them")
        if not resume and {"out_dir", "run_name", "save_dir"} & set(given):
            resume = source  # goes on elsewhere, from this run's newest checkpoint
        resume = resume or "auto"
        given.setdefault("out_dir", source)
    elif path is not None and not resume and path.name == "config.toml" and _is_run(path.parent):
        _into_a_new_folder(path, given)
    resumed = _place_of_run(source, resume, given)
    if resumed is not None and path is not None and path.is_file():
        given = stated_in(path, given)
    if resumed is None and source is None and given.get("init_from"):
        take_shape_of_weights(given)
    config = resumed or load_config(source, given, say=notice)
    if source and config.output.preset:
        given["preset"] = config.output.preset

    changes = [name for names in options.allow_change for name in names.split(",")]
    if changes and resume is None:
        notice("--allow-change: nothing is resumed; every field may have any value")
    if options.profile:
        return _profile(config, resume, options.profile)
    if options.show_batch:
        return _show_batch(config, resume, given, changes)

    from bytekiln.ranks import is_first
    from bytekiln.train import train as run

    result = run(
        config,
        resume=resume,
        overwrite=options.overwrite,
        eval_only=options.eval_only,
        given=given,
        said=said,
        changes=changes,
        began=began,
        pause_at=options.pause_at,
        say=_say,
        notice=notice,
    )
    if is_first():
        for line in _summary(result):
            print(line)
    if result.status == "interrupted":
        return 128 + (result.signal or 2)
    return STATUS[result.status]


def _one_thing_to_do(options: argparse.Namespace) -> None:
    """Refuse what would have to be left out."""
    instead = [
        f"--{n.replace('_', '-')}" for n in ("eval_only", "show_batch", "generate", "profile") if getattr(options, n)
    ]
    if len(instead) > 1:
        raise ConfigError(f"lm-train: found {' and '.join(instead)}; expected one of them")
    if options.pause_at < 0:
        raise ConfigError(f"--pause-at: found {options.pause_at}; expected a step, or 0 for no pause")
    if options.pause_at and instead:
        raise ConfigError(f"--pause-at: found it with {instead[0]}, which trains nothing; expected one")


def _summary(result: Result) -> Iterator[str]:
    """How a run ended, in a few lines."""
    yield f"{result.status}: {result.why}"
    if result.final_val_loss is not None:
        bits = f", {result.final_bits_per_byte:.4f} bits a byte" if result.final_bits_per_byte is not None else ""
        best = (
            f", best {result.best_val_loss:.4f} at step {result.best_step}" if result.best_val_loss is not None else ""
        )
        yield f"validation loss {result.final_val_loss:.4f}{bits}{best}"
    if result.status == "evaluated":
        yield f"training loss {result.final_train_eval_loss:.4f} in evaluation mode"
    elif result.tokens_per_s:
        share = "unknown" if result.mfu is None else f"{100 * result.mfu:.1f} %"
        compiled = f", {result.recompiles} recompiles" if result.recompiles is not None else ""
        yield f"{result.tokens_per_s:,.0f} tokens/s, MFU {share}{compiled}"
    if result.skipped_steps:
        yield f"{result.skipped_steps} updates were left out"


def _show_batch(config: RunConfig, resume: str | None, given: dict[str, Any], changes: list[str]) -> int:
    """Print the first batch that the run would train on, or go on with, and train nothing."""
    from bytekiln.data import load_tokenizer, open_data
    from bytekiln.preview import show_batch
    from bytekiln.run_state import State

    at = State()
    if resume:
        from bytekiln.prepare import find_checkpoint

        config, checkpoint = find_checkpoint(config, resume, given, notice, changes)
        if checkpoint is not None:
            at = State.from_json(checkpoint.state, checkpoint.where)
            notice(f"{checkpoint.path}: step {at.step}; this is the batch of the step behind it")
    tokenizer = load_tokenizer(config.data)
    data = open_data(config, tokenizer)
    for line in data.notices:
        notice(line)
    print(show_batch(data.train.batch(at.step, at.windows, 0, config.training.batch_size), tokenizer))
    return 0


def _profile(config: RunConfig, resume: str | None, steps: int) -> int:
    """Say where the time of a few steps goes, and train nothing."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is there: the tracer's own lines are no news of ours
    from bytekiln.profiling import profile_run, show

    if resume:
        raise ConfigError("--profile: found a run that is resumed; expected its config.toml, or a preset")
    made, folder = profile_run(config, steps, notice)
    print(show(made))
    notice(f"{folder}: profile.txt, profile.json, and trace.json for https://ui.perfetto.dev or chrome://tracing")
    return 0


def sample(argv: list[str]) -> int:
    """`lm-sample`: text from a run, on stdout as it comes."""
    parser = Parser(
        "lm-sample",
        description="Generate text from a trained model. The same seed gives the same text.",
        examples=(
            'lm-sample runs/demo --prompt "ROMEO:" --max-new-tokens 200',
            "lm-sample runs/demo --start FILE:opening.txt --temperature 0.9 --top-p 0.95 --num-samples 3",
        ),
    )
    parser.add_argument("run", metavar="RUN", help="run folder (its best checkpoint is taken) or checkpoint folder")
    sampling_flags(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer; default: the run's own")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N or mps")
    options = parser.parse_args(argv)
    return write_samples(options.run, options, options.device)


def _is_checkpoint(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "checksums.json").is_file()


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("checkpoints", "metrics.csv", "result.json"))


def _place_of_run(source: str | None, resume: str | None, given: dict[str, Any]) -> RunConfig | None:
    """Of a run that is resumed, what says where it is: the rest is its checkpoint's. None: nothing is resumed."""
    if not resume:
        return None
    place = load_config(source, {k: v for k, v in given.items() if SECTION_OF[k] == "output"}, say=notice)
    there = place.output.checkpoints
    return place if resume != "auto" or (there.is_dir() and any(there.glob("checkpoint_*"))) else None


def _run_to_sample(path: Path | None, source: str | None, resume: str | None, given: dict[str, Any]) -> str:
    if resume and resume != "auto":
        return resume
    if path is not None and (path.is_dir() or _is_run(path.parent)):
        return str(path if path.is_dir() else path.parent)
    return str(load_config(source, given, say=notice).output.folder)


def _say(line: str) -> None:
    print(line, flush=True)


def _train_parser(*, everything: bool) -> Parser:
    parser = Parser(
        "lm-train",
        usage="lm-train [PRESET | CONFIG.toml | CONFIG.json | RUN] [flags]",
        description="Train a Transformer language model on token files, or go on with a run.\n"
        f"Presets: {', '.join(presets())}; default where none is named: default.",
        examples=TRAIN_EXAMPLES,
    )
    parser.add_argument("source", nargs="?", metavar="PRESET|CONFIG|RUN", help="what to run; a run folder is resumed")
    parser.add_argument("--help-all", action="help", help="show every field, and the other spellings")
    parser.add_argument("--config", metavar="FILE", help="the same as the positional argument")
    parser.add_argument("--dataset", metavar="NAME", help="preset NAME on data/processed/NAME_{train,valid}.npy")
    parser.add_argument(
        "--resume",
        "--load_checkpoint",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on from the newest whole checkpoint, or from PATH",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="on a resume: let this field change, though the run's numbers change with it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run")
    parser.add_argument(
        "--pause-at",
        type=int,
        default=0,
        metavar="STEP",
        help="save and end at this step, as interrupted; --resume goes on, the schedule is the whole run's"
        if everything
        else argparse.SUPPRESS,
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="no training: evaluate the run, or the weights of --init-from"
    )
    parser.add_argument("--show-batch", action="store_true", help="no training: print the next batch and its targets")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="no training: a table and a trace of where N steps go"
    )
    parser.add_argument(
        "--generate", action="store_true", help="no training: generate text from the run, flags as lm-sample"
    )
    add_run_flags(parser, everything=everything)
    sampling_flags(parser, hidden=not everything)
    return parser


def _dataset_files(dataset: str, given: dict[str, Any]) -> None:
    """The token files and the tokenizer that a dataset's name stands for; given ones win."""
    folder = Path("data") / "processed"
    tokenizer = folder / f"{dataset}_tokenizer.json"
    if not {"train_data", "tokenizer", "vocab_path"} & set(given) and tokenizer.exists():
        given["tokenizer"] = str(tokenizer)
    for field, split in (("train_data", "train"), ("val_data", "valid")):
        if field not in given:
            path = folder / f"{dataset}_{split}.npy"
            if not path.exists():
                how = f"bpe-train --dataset {dataset} && bpe-encode --dataset {dataset}"
                if dataset.endswith("-char"):
                    how = f"bpe-encode TEXT --characters --dataset {dataset}"
                raise FileError(f"{path}: no such file; make it with: {how}")
            given[field] = str(path)


def _into_a_new_folder(config: Path, given: dict[str, Any]) -> None:
    """A run's own config repeats it: beside the run, under the first free name."""
    run = config.resolve().parent
    if not {"out_dir", "run_name", "save_dir"} & set(given):
        free = next(p for n in range(2, 1_000_000) if not (p := run.with_name(f"{run.name}-{n}")).exists())
        notice(f"{config}: repeats the run in {free}")
        given["out_dir"] = str(free)
    given.setdefault("out_dir", "")
    for field in ("checkpoint_dir", "metrics_path", "tensorboard_dir"):
        given.setdefault(field, "")
