"""What `lm-sweep` was asked for: its flags, and the sweep and the folder that follow from them.

In: an argument list. Out: values for `cli_sweep`. Imports no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from bytekiln.config import FIELDS, canonical, presets
from bytekiln.console import Parser
from bytekiln.errors import ConfigError
from bytekiln.run_flags import add_run_flags, given_fields
from bytekiln.sweep.axes import Axis
from bytekiln.sweep.process import cores
from bytekiln.sweep.spec import SweepSpec, changed, load_spec, sweep_presets
from bytekiln.sweep.table import PLACES, rates_of, seeds_of, typed_axis

MANY_RUNS = 1000
"""More runs than this are started only with --yes."""
EXAMPLES = (
    "lm-sweep tinystories-lr --jobs 2",
    'lm-sweep shakespeare-char --lrs "3e-4 1e-3 3e-3" --seeds 3 --dry-run',
    'lm-sweep tinystories-lr --detach lr_sweep --then "lm-report tinystories-lr --png"',
    "lm-sweep tinystories-lr                         goes on where it was interrupted",
    "lm-sweep worker tinystories-lr                  joins it, from another machine too",
    "lm-sweep adopt checkpoints/tinystories --as lr=6e-4",
)
NOT_MINE = (*PLACES, "lr", "seed")
"""Fields whose flags a sweep's help leaves out."""
SHOWN = ("train_data", "val_data", "tokenizer", "max_steps", "batch_size", "device")
"""Fields that `--help` shows; all are there."""
TOGETHER = 8
"""Runs of a bare `--stack`: more bring no more speed on a CPU, and each adds its memory (docs/sweeps.md)."""


def asked(options: argparse.Namespace) -> tuple[SweepSpec, Path]:
    """The sweep with the command line's values on top, and its folder."""
    given: dict[str, object] = {**given_fields(options), **set_fields(options.set)}
    place = str(given.pop("out_dir", ""))
    axes = given_axes(options.axis)
    spec = load_spec(options.source)
    source, named = Path(options.source), str(options.source).replace("_", "-") in (*sweep_presets(), *presets())
    there = options.folder or place or (source if (source / "sweep.toml").is_file() and not named else "")
    lrs = None if options.lrs is None else rates_of(options.lrs, "--lrs")
    seeds = None if options.seeds is None else _seeds(options.seeds)
    given_nothing = not (given or axes or lrs or seeds or options.dataset or options.overwrite)
    if given_nothing:
        folder = Path(there or changed(spec, scale=options.scale or "").folder)
        if (folder / "sweep.toml").is_file() and (named or not options.scale):
            return load_spec(folder / "sweep.toml"), folder  # as it was begun here, with the flags of then
    if options.dataset:
        spec = spec.model_copy(update={"base": {**spec.base, "dataset": options.dataset}})
    spec = changed(
        spec,
        scale=options.scale or "",
        lrs=lrs or (),
        seeds=seeds or (),
        axes=axes,
        given=given,
    )
    return spec, Path(there or spec.folder)


def set_fields(texts: Sequence[str]) -> dict[str, object]:
    """Fields and values of `--set`."""
    given: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set: found {text!r}; expected FIELD=VALUE")
        given[canonical(key.strip(), "--set")] = value.strip()
    return given


def given_axes(texts: Sequence[str]) -> dict[str, Axis]:
    """Axes of `--axis`.

    Raises:
        ConfigError: no such field, one that was given before, or no values.
    """
    axes: dict[str, Axis] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise ConfigError(f"--axis: found {text!r}; expected FIELD='VALUE VALUE …'")
        if (field := canonical(key.strip(), "--axis")) in axes:
            raise ConfigError(
                f"--axis: found {field} twice; expected all of its values in one: {field}='VALUE VALUE …'"
            )
        axes[field] = typed_axis(field, Axis(values=tuple(value.replace(",", " ").split())))
    return axes


def _seeds(text: str) -> Sequence[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(p.isdecimal() and len(p) < 20 for p in parts) or (len(parts) == 1 and int(parts[0]) < 1):
        raise ConfigError(f"--seeds: found {text[:50]!r}; expected how many, or the seeds themselves: '1 2 3'")
    return seeds_of([int(p) for p in parts] if len(parts) > 1 else int(parts[0]), "--seeds")


def whole(text: str) -> int:
    """A flag's number of something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number from 1 on")
    return int(text)


def sweep_parser(pipelines: Iterable[str], *, everything: bool) -> Parser:
    """The flags; `pipelines` are named in the help."""
    parser = Parser(
        "lm-sweep",
        usage="lm-sweep PRESET|SPEC.toml|FOLDER [flags] [flags of lm-train], or lm-sweep search|worker|adopt …",
        description="Train runs that differ in learning rate, seed or any other field, each in a process and a folder "
        "of its own, and compare them. The same command goes on with what is not done. "
        f"Sweeps: {', '.join(sweep_presets())}; of several stages: {', '.join(pipelines)}; a run's preset "
        f"({', '.join(presets())}) or config is a base.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="PRESET|SPEC|FOLDER", help="what to sweep; a sweep's folder goes on")
    add("--help-all", action="help", help="show every field of a run, too")
    add("--lrs", metavar="'X Y …'", help="learning rates, in the place of the sweep's")
    add("--seeds", metavar="N", help="each combination with N seeds (1 to N), or with these: '7 8 9'")
    add("--axis", action="append", default=[], metavar="FIELD='V …'", help="values of any field; several make a grid")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of all runs, as --FIELD VALUE does")
    add("--scale", metavar="NAME", help="a smaller form that the sweep has, as cpu")
    add("--dataset", metavar="NAME", help="train on data/processed/NAME_{train,valid}.npy")
    add("--folder", metavar="DIR", help="the sweep's folder; default: its name, here")
    add("--dry-run", action="store_true", help="list the runs with parameters, FLOPs, time and disk; start none")
    add("--jobs", type=whole, metavar="N", help=f"runs at once, which share the {cores()} cores; default: 1")
    add("--stack", type=whole, nargs="?", const=TOGETHER, default=1, metavar="N",
        help=f"train up to N runs of one shape together in one process; bare: {TOGETHER}")  # fmt: skip
    add("--retry", action="append", default=[], metavar="STATUS", help="run again what ended so: failed, diverged …")
    add("--overwrite", action="store_true", help="replace an existing sweep and its runs")
    add("--yes", action="store_true", help=f"more than {MANY_RUNS:,} runs are meant")
    add("--detach", metavar="NAME", help="run in a new tmux session of this name")
    add("--then", metavar="COMMAND", help="run this once all is done; never when every run failed, nor after Ctrl-C")
    add("--ray", action="store_true", help="run as tasks of an existing Ray cluster (extra: ray)")
    add_run_flags(parser, everything=everything)
    for action in parser._actions:
        if action.dest in FIELDS and (action.dest in NOT_MINE or (not everything and action.dest not in SHOWN)):
            action.help = argparse.SUPPRESS
    return parser
