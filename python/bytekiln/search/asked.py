"""What `lm-sweep search` was asked for: its flags, and the base, plan and folder that follow from them.

In: an argument list. Out: values for `cli_search`. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bytekiln.config import FIELDS, RunConfig, canonical, presets
from bytekiln.console import Parser, notice
from bytekiln.errors import ConfigError, FileError, FormatError, MismatchError
from bytekiln.metrics import write_atomically
from bytekiln.run_flags import add_run_flags, given_fields
from bytekiln.search.files import CONFIG, STATE, base_of, read_state, state_of, write_state
from bytekiln.search.plan import STAGES, Plan, rungs_of
from bytekiln.search.runs import SweepRunner, check_base
from bytekiln.search.stages import Search
from bytekiln.sweep.axes import short
from bytekiln.sweep.folder import TRIALS, differences, stored_trials
from bytekiln.sweep.process import cores
from bytekiln.sweep.spec import DATA_PATHS, SweepOutput, SweepSpec, changed, load_spec
from bytekiln.sweep.table import PLACES, to_toml

EXAMPLES = (
    "lm-sweep search nanogpt-cpu --dataset shakespeare-char --jobs 2",
    "lm-sweep search tinystories --dataset tinystories --dry-run",
    "lm-sweep search tinystories --until range_test       the range test alone",
    "lm-sweep search tinystories --transfer-to owt        predict the rate of another model, and confirm it there",
    "lm-sweep search tinystories-search                   goes on where it was interrupted",
)
SHAPE = ("d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "ffn_multiple")
"""Fields that a transfer changes: on the command line they are the source's."""
SHOWN = ("train_data", "val_data", "tokenizer", "max_steps", "batch_size", "device", "seed")
EVALUATIONS = 12
"""Evaluations of a run whose own interval is too long for rates to be given up."""
RANGE_SHARE, RANGE_STEPS = 0.15, (30, 200)
"""Steps of the range test: a share of a run, between two bounds."""
LOW, HIGH = 1e-5, 10.0
POINTS, FACTOR, SEEDS, CONFIDENCE = 7, 2.0, 2, 0.95
"""What a flag is that is not given; None on the command line, so that a search's folder can tell."""
PLACEHOLDER = Plan(1, points=3, centre=1.0)
"""Where only a run's config is wanted."""


def asked(options: argparse.Namespace) -> tuple[SweepSpec, Plan, Path]:
    """Base, plan and folder: stored ones of a search's folder, else of the command line."""
    given = _given(options)
    place = str(given.pop("out_dir", "") or options.folder or "")
    source = Path(options.source)
    if source.is_dir() and (source / STATE).exists():
        state = read_state(source)
        assert state is not None
        if given or options.scale or options.dataset:
            named = ", ".join(given) or ("--scale" if options.scale else "--dataset")
            raise ConfigError(f"{source}: found a search and {named}; expected no field of a run: it has its own")
        stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state["plan"].items()}
        stored |= _may_change(options, stored["max_steps"])
        plan = Plan(**stored)
        _check_asked(options, place, plan, source)
        base = dict(state["base"])
        if isinstance(base.get("config"), dict):
            path, text = (source / CONFIG).absolute(), to_toml(base["config"]).encode()
            if not path.exists() or path.read_bytes() != text:  # also of a search that this one has replaced
                write_atomically(path, text)
            base["config"] = str(path)
        return SweepSpec(name=source.resolve().name, base=base), plan, source
    if not source.suffix and is_lost(source):
        raise FileError(
            f"{source}: found its runs and no {STATE}; expected a search (lm-sweep search PRESET|CONFIG --folder "
            f"{source}, with the flags of the first time, makes it anew and keeps the runs; with --overwrite, too, it "
            "begins anew)"
        )
    spec = load_spec(options.source)
    name = spec.name.removesuffix("-sweep")
    spec = spec.model_copy(update={"axes": {}, "seeds": (), "variant": {}, "kind": "grid", "samples": 0, "shipped": "",
                                   "baseline": "", "output": SweepOutput(), "variants_only": False})  # fmt: skip
    if options.dataset:
        spec = spec.model_copy(update={"base": {**spec.base, "dataset": options.dataset}})
    spec = changed(spec, scale=options.scale or "", given=given)
    folder = Path(place or f"{name}-search")
    made = SweepRunner(spec, folder, PLACEHOLDER).config()
    base = dict(spec.base)
    base |= {k: v for k in DATA_PATHS if (v := made.flat().get(k))}
    interval, steps = made.training.eval_interval, made.training.max_steps
    if not rungs_of(steps, interval) or interval > steps / 8:
        interval = max(round(steps / EVALUATIONS), 1)
        base["eval_interval"] = interval
        notice(f"eval_interval: {interval} in the runs of this search, so that rates can be given up early")
    seed = made.training.seed
    seeds = tuple(seed + i for i in range(options.seeds or SEEDS))
    range_steps = options.range_steps
    if range_steps is None:
        range_steps = 0 if options.centre else min(max(round(RANGE_SHARE * steps), RANGE_STEPS[0]), RANGE_STEPS[1])
    low, high = options.range or (LOW, HIGH)
    rungs = () if options.no_pruning else rungs_of(steps, interval)
    earlier = read_state(folder) if folder.is_dir() and not options.overwrite else None
    known = earlier["plan"] if earlier and earlier["plan"].get("max_steps") == steps else {}
    free = {k: v for k, v in known.items() if k in ("budget", "confidence")}
    free = {"budget": 0.0, "confidence": CONFIDENCE, **free, **_may_change(options, steps)}
    plan = Plan(steps, seeds, options.points or POINTS, options.factor or FACTOR, rungs, (4, 3), options.centre or 0.0,
                low, high, range_steps, **free)  # fmt: skip
    spec = spec.model_copy(update={"name": name, "base": base, "scale": {}, "scaled": "", "question": ""})
    if is_lost(folder) and not options.dry_run:
        make_anew(folder, spec, plan, overwrite=options.overwrite)
    return spec, plan, folder


def is_lost(folder: Path) -> bool:
    """Whether a folder has stages of a search, and its state no more."""
    stages = (folder / "coarse" / TRIALS, folder / "range_test" / "range_test.json")
    return not (folder / STATE).exists() and any(p.exists() for p in stages)


def make_anew(folder: Path, base: SweepSpec, plan: Plan, *, overwrite: bool) -> None:
    """Write the state of a search whose runs are there, if they are those of this one: it goes on with them.

    Args:
        overwrite: they are removed by whoever opens the folder, and may be any search's.

    Raises:
        MismatchError: they are another search's (says in what).
        FormatError: the range test is damaged.
    """
    for what, was, now in () if overwrite else _not_of(folder, base, plan):
        raise MismatchError(
            f"{folder}: found runs with {what} {was} and no {STATE}; expected {now} (the flags of the first time go on "
            "with them, --overwrite begins anew, --folder takes another place)"
        )
    write_state(folder / STATE, state_of(Search(plan, lambda _: []), base_of(base), 0.0))
    if not overwrite:
        notice(f"{folder / STATE} was lost: it is made anew, and the runs that are there are kept")


def _not_of(folder: Path, base: SweepSpec, plan: Plan) -> Iterator[tuple[str, object, object]]:
    """(field, found, expected) wherever the runs in a folder are not those of a search."""
    test, centre = folder / "range_test" / "range_test.json", plan.centre
    if test.exists() and plan.range_steps:
        try:
            told = json.loads(test.read_bytes())
            low, steps, suggestion = float(told["low"]), int(told["steps"]), float(told["suggestion"])
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise FormatError(f"{test}: {exc}; expected a range test (without the file it is made once more)") from None
        if not math.isclose(low, plan.low, rel_tol=1e-9) or steps > plan.range_steps:
            yield "range test", f"from {low:g}, {steps} steps", f"{plan.low:g}, {plan.range_steps} steps"
        centre = centre or suggestion
    if not (folder / "coarse" / TRIALS).exists():
        return
    trials = stored_trials(folder / "coarse")[1]
    rates, seeds = sorted(t.config.optimizer.lr for t in trials), {t.seed for t in trials}
    if seeds != {plan.seeds[0]}:
        yield "seed", ", ".join(map(str, sorted(seeds))), plan.seeds[0]
    if centre and not set(plan.grid(centre)) <= set(rates):
        yield "lr", ", ".join(map(short, rates)), ", ".join(map(short, plan.grid(centre)))
    for t in trials:
        now = SweepRunner(base, folder, plan).config(t.config.optimizer.lr, t.seed)
        if t.config.training.max_steps != plan.max_steps:
            yield "max_steps", t.config.training.max_steps, plan.max_steps
        yield from differences(t.config, now, None)


def _may_change(options: argparse.Namespace, max_steps: int) -> dict[str, float]:
    """Fields of a plan with which a search can go on after they were changed; those that were given."""
    found = {"confidence": options.confidence, "budget": options.budget and options.budget * max_steps}
    return {k: v for k, v in found.items() if v is not None}


def _check_asked(options: argparse.Namespace, place: str, plan: Plan, source: Path) -> None:
    """Flags beside a search's folder say what was asked for before, or nothing.

    Raises:
        MismatchError: one says something else (names it).
    """
    now: dict[str, Any] = {"folder": Path(place).resolve() if place else None, "range": options.range}
    now |= {name: getattr(options, name) for name in ("points", "factor", "seeds", "centre", "range_steps")}
    now["no_pruning"] = options.no_pruning or None
    was = {"folder": source.resolve(), "range": [plan.low, plan.high], "seeds": len(plan.seeds), "points": plan.points,
           "factor": plan.factor, "centre": plan.centre, "range_steps": plan.range_steps,
           "no_pruning": not plan.rungs}  # fmt: skip
    for name, value in now.items():
        if value is not None and value != was[name]:
            raise MismatchError(
                f"{source}: --{name.replace('_', '-')}: found {value}; expected {was[name]}, which this search has "
                "(another one needs a folder of its own: lm-sweep search PRESET|CONFIG --folder DIR)"
            )


def _given(options: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = given_fields(options)
    given |= _pairs(options.set, "--set")
    if "lr" in given:
        raise ConfigError("lr: found one in a search for it; expected --centre LR, the middle of the grid")
    return given


def _pairs(texts: list[str], flag: str) -> dict[str, Any]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{flag}: found {text!r}; expected FIELD=VALUE")
        found[canonical(key.strip(), flag)] = value.strip()
    return found


def target_of(options: argparse.Namespace, base: SweepSpec) -> tuple[SweepSpec, RunConfig]:
    """The model that the rate is transferred to, on the same data and with the same flags but those of its shape."""
    spec = load_spec(options.transfer_to)
    given = {k: v for k, v in _given(options).items() if k not in (*SHAPE, "out_dir")}
    given |= {
        k: v for k, v in base.base.items() if k in DATA_PATHS or k in ("vocab_size", "data_dtype", "eval_interval")
    }
    given |= _pairs(options.transfer_set, "--transfer-set")
    spec = spec.model_copy(update={"axes": {}, "seeds": (), "variant": {}, "kind": "grid", "baseline": "",
                                   "output": SweepOutput(), "variants_only": False, "name": "transfer",
                                   "shipped": ""})  # fmt: skip
    spec = changed(spec, given=given)
    config = SweepRunner(spec, Path(), PLACEHOLDER).config()
    check_base(config)
    return spec, config


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"found {text!r}; expected a number between {low:g} and {high:g}")
        return value

    return read


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number from 1 on")
    return int(text)


def search_parser(*, everything: bool) -> Parser:
    parser = Parser(
        "lm-sweep search",
        usage="lm-sweep search PRESET|CONFIG.toml|FOLDER [flags] [flags of lm-train]",
        description="Find the learning rate of a run: a range test, a coarse grid whose bad rates are given up early, "
        "further seeds near the best, a parabola with its confidence interval, and the recommended rate at full length "
        "beside its neighbours. Judged by the best validation loss. The same command goes on with what is not done. "
        f"Presets: {', '.join(presets())}.",
        examples=EXAMPLES,
    )
    add, positive = parser.add_argument, _number(0, float("inf"))
    add("source", metavar="PRESET|CONFIG|FOLDER", help="the run; a search's folder goes on")
    add("--help-all", action="help", help="show every field of a run, too")
    add("--points", type=_count, metavar="N", help=f"rates of the coarse grid; default: {POINTS}")
    add("--factor", type=_number(1, 1000), metavar="X", help=f"between two of them; default: {FACTOR:g}")
    add("--seeds", type=_count, metavar="N", help=f"seeds at the best rate and its neighbours; default: {SEEDS}")
    add(
        "--centre",
        type=positive,
        metavar="LR",
        help="middle of the grid; default: the range test's suggestion",
    )
    add(
        "--range", type=positive, nargs=2, metavar=("LOW", "HIGH"), help=f"of the range test; default: {LOW:g} {HIGH:g}"
    )
    add("--range-steps", type=_count, metavar="N", help="its steps; default: 15 %% of a run, 30 to 200")
    add(
        "--budget",
        type=positive,
        metavar="N",
        help="full runs that the search may cost at most; default: 7.8, a fifth of a grid",
    )
    add("--confidence", type=_number(0, 1), metavar="P", help=f"of the interval; default: {CONFIDENCE:g}")
    add("--no-pruning", action="store_true", help="train every rate to the end")
    add(
        "--until", choices=STAGES, default=STAGES[-1], metavar="STAGE", help=f"stop behind a stage: {', '.join(STAGES)}"
    )
    add("--transfer-to", metavar="PRESET|CONFIG", help="then predict the rate of this run, and confirm it there")
    add("--transfer-set", action="append", default=[], metavar="FIELD=VALUE", help="a field of that run")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of all runs, as --FIELD VALUE does")
    add("--scale", metavar="NAME", help="a smaller form that a sweep has, as cpu")
    add("--dataset", metavar="NAME", help="train on data/processed/NAME_{train,valid}.npy")
    add("--folder", metavar="DIR", help="the search's folder; default: NAME-search, here")
    add("--dry-run", action="store_true", help="show the stages with their steps, FLOPs and time; start none")
    add(
        "--jobs", type=_count, default=1, metavar="N", help=f"runs at once, which share the {cores()} cores; default: 1"
    )
    add("--retry", action="append", default=[], metavar="STATUS", help="run again what ended so: failed, diverged …")
    add("--overwrite", action="store_true", help="replace an existing search and its runs")
    add_run_flags(parser, everything=everything)
    hidden = (*PLACES, "lr")
    for action in parser._actions:
        if action.dest in FIELDS and (action.dest in hidden or (not everything and action.dest not in SHOWN)):
            action.help = argparse.SUPPRESS
    return parser
