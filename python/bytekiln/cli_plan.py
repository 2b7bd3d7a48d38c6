"""`lm-plan`: what a run will need, before it runs. Argument list in, exit status out.

Called by `cli`, which turns errors into one line. The vocabulary's size comes from the config, the tokenizer, the
weights to start from, or the manifest beside the token file; data that need not be here is not asked for. torch is
imported once there is something to compute.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytekiln.config import FIELDS, RunConfig, load_config, presets
from bytekiln.console import Parser, human_bytes, human_count, human_time, notice, table
from bytekiln.errors import ConfigError
from bytekiln.hardware import percentage
from bytekiln.run_flags import add_run_flags, given_fields, spell_switches, take_shape_of_weights

if TYPE_CHECKING:
    from bytekiln.plan import Plan
    from bytekiln.tokenfile import TokenFile
    from bytekiln.yardstick import Prospect

PLAN_EXAMPLES = (
    "lm-plan tinystories --batch-size 64",
    "lm-plan large --gpu H100 --memory 80G",
    "lm-plan runs/demo --json",
)
SHOWN = (
    "vocab_size context_length d_model num_layers num_heads d_ff train_data tokenizer optimizer batch_size "
    "grad_accum_steps max_steps device precision"
).split()
"""Fields that `--help` shows: those that a plan is about. All are there."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def plan(argv: list[str]) -> int:
    """`lm-plan`: 0, also where the run does not fit; that is what it is there to say."""
    parser = _parser(everything="--help-all" in argv)
    options = parser.parse_args(spell_switches(argv))
    if options.source and options.config:
        raise ConfigError(f"lm-plan: found two configurations, {options.source} and {options.config}; expected one")
    memory = None if options.memory is None else parse_bytes(options.memory)
    source, given = options.source or options.config, given_fields(options)
    if source is None and given.get("init_from"):
        take_shape_of_weights(given)
    config = with_vocabulary(load_config(source, given, say=notice))

    from bytekiln.plan import make_plan

    gpu = options.gpu or (None if "device" in given else config.training.target_gpu or None)
    made = make_plan(config, memory, gpu)
    print(json.dumps(made.as_json(), indent=1) if options.json else show(made))
    return 0


def parse_bytes(text: str) -> int:
    """A size as people write it, in bytes; K, M, G and T are decimal, KiB … TiB binary.

    >>> parse_bytes("24G"), parse_bytes("1.5 GB"), parse_bytes("80GiB"), parse_bytes("1e9")
    (24000000000, 1500000000, 85899345920, 1000000000)

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([KMGT]?)(iB|B)?", text.strip(), re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if not found or number <= 0:
        raise ConfigError(f"--memory: found {text!r}; expected a size, as 24G, 512M or 80GiB")
    unit = UNITS[found[2].upper()]
    if (found[3] or "").lower() == "ib":
        unit = 1024 ** list(UNITS).index(found[2].upper())
    return int(number * unit)


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The run with the vocabulary that `train` would find, a mask token included.

    Ids are read only where a manifest says that some may be beyond the vocabulary: `train`, which reads them all, would
    refuse those.

    Raises:
        ConfigError: nothing tells its size.
        FileError, FormatError, MismatchError: as `data.open_data`, but for files that are not here.
    """
    from bytekiln.data import load_tokenizer, vocabulary_of

    tokenizer = load_tokenizer(config.data)
    stated = bool(config.model.vocab_size)
    files = _token_files(config, need=not stated and tokenizer is None)
    if not stated and tokenizer is None and not any(f.vocab_size for f in files):
        raise ConfigError(
            "vocab_size: unknown; expected --vocab-size N, --tokenizer FILE, or --train-data FILE with its manifest"
        )
    if tokenizer is None and not files:
        return config
    known, size, _ = vocabulary_of(config, tokenizer, files, [])
    for f in files:
        if f.manifest is not None and _greatest_id(f) >= known:
            f.check(known)
    return config.with_(vocab_size=size)


def _token_files(config: RunConfig, *, need: bool) -> list[TokenFile]:
    """The token files that the run names and that are here; the first must be where we `need` its manifest."""
    from bytekiln.data import train_paths
    from bytekiln.tokenfile import TokenFile

    d = config.data
    training = train_paths(d.train_data) if d.train_data else []
    paths = [*training, *([d.val_data] if d.val_data else [])]
    here = [p for p in paths if Path(p).exists() or (need and p in training[:1])]
    return [TokenFile.open(p, dtype=d.data_dtype or None) for p in here]


def _greatest_id(file: TokenFile) -> int:
    """As the manifest says or, from an older one, what it may be."""
    found = (file.manifest or {}).get("max_id")
    return found if isinstance(found, int) else (file.vocab_size or 0) - 1


def show(made: Plan) -> str:
    """The plan as a table for people."""
    t, m, f = made.config.training, made.config.model, made.footprint
    compiled = t.compile is True
    name = made.config.output.preset or made.config.output.run_name or "run"
    working = f"{made.active_parameters:,} of them work on a token" if m.ffn == "moe" else ""
    forward = made.flops_per_token // 3 * m.context_length
    batch = f"{t.batch_size} × {m.context_length}" + (
        f" × {t.grad_accum_steps} micro-steps" if t.grad_accum_steps > 1 else ""
    )
    fits = made.process_bytes <= made.memory_limit
    memory = [
        ("weights", f.weights, ""),
        ("gradients", f.gradients, ""),
        ("optimizer", f.optimizer, "averaged weights included" if made.config.optimizer.averaging != "none" else ""),
        ("activations", f.activations, ""),
        ("loss", f.loss, "logits and their gradient"),
        ("peak", f.total, "the parts do not all stand at once" + ("; compiled takes less" if compiled else "")),
        ("process", made.process_bytes, "with the libraries and the allocator's holes"),
        ("available", made.memory_limit, "" if fits else "IT DOES NOT FIT"),
    ]
    kept = made.checkpoint_bytes * made.checkpoints
    return "\n\n".join(
        [
            f"{name} on {made.device}, {t.precision}, {'compiled' if compiled else 'eager'}",
            _block("parameters", f"{made.parameters:,}", working, _shares(made.parameters_by_part, "{:,}".format)),
            _block(
                "training FLOPs a token",
                human_count(made.flops_per_token),
                f"forward of a window: {human_count(forward)}",
                _shares(made.flops_by_part, human_count),
            ),
            _block(f"memory of a step, {batch}", "", "", [(label, human_bytes(n), note) for label, n, note in memory]),
            table(
                [
                    ("largest batch", _largest(made)),
                    ("time of a step", f"{human_time(made.time.step_s)} ({made.time.basis})"),
                    (
                        "time of the run",
                        f"{_long(made.time.run_s)}: {made.length.steps:,} step{'s' * (made.length.steps != 1)}, "
                        f"{human_count(made.length.tokens)} tokens, {_evaluations(made)}{_end(made)}",
                    ),
                    (
                        "checkpoints",
                        f"{human_bytes(made.checkpoint_bytes)} each, {made.checkpoints} kept: {human_bytes(kept)}",
                    ),
                ],
                indent="",
            ),
            *([_prospect(made, made.prospect)] if made.prospect is not None else []),
        ]
    )


def _prospect(made: Plan, expects: Prospect) -> str:
    """Operations, utilisation, and the loss that may be expected of them."""
    flops = made.flops_per_token * made.length.tokens
    rows = [
        ("tokens", human_count(made.length.tokens)),
        ("training FLOPs", f"{flops:.2e}"),
        ("assumed MFU", percentage(expects.mfu)),
        ("expected loss", f"{expects.expected.loss:.3f} ± {expects.expected.plus_minus:.3f}, an estimate"),
    ]
    for b in expects.break_even:
        needs = f"MFU {percentage(b.mfu)}" if b.mfu is not None else f"{b.flops:.2e} FLOPs"
        rows.append((f"{b.published.loss:.4f}", f"{b.published.name}: expected from {needs} on"))
    t = made.config.training
    rows.append(("source", expects.yardstick.source))
    unknown = t.final_eval == "whole" and not made.config.data.val_data
    rows.append(("left out", "start, compiling" + (", the whole validation set (--val-data)" * unknown)))
    return f"{expects.yardstick.title}\n{table(rows)}"


def _largest(made: Plan) -> str:
    if not made.largest_batch:
        return f"not even one window fits into {human_bytes(made.memory_limit)}; expected a smaller model or context"
    return f"{made.largest_batch:,} windows in a micro-step fit into {human_bytes(made.memory_limit)}"


def _evaluations(made: Plan) -> str:
    if made.evaluation_batches is None:
        return "without evaluations, since val_data tells no size"
    return "with evaluations"


def _end(made: Plan) -> str:
    t = made.config.training
    if made.length.ends_by == "token_budget":
        return "; token_budget ends it"
    if made.length.ends_by == "max_steps":
        return ""
    if t.max_time_counts == "all" and made.time.run_s > t.max_time:
        return f"; more than max_time, {_long(t.max_time)}: an evaluation takes {_long(made.time.evaluation_s)}"
    return f"; as many as fit into max_time, {_long(t.max_time)}"


def _long(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:,.1f} days" if days >= 3 else human_time(seconds)


def _shares(parts: dict[str, int], written: Any) -> list[tuple[str, str, str]]:  # noqa: ANN401 - int to str
    total = sum(parts.values())
    return [(part.replace("_", " "), written(n), f"{100 * n / total:5.1f} %") for part, n in parts.items()]


def _block(title: str, total: str, note: str, rows: list[tuple[str, str, str]]) -> str:
    """A title with its total, and indented rows; numbers stand under each other, flush right."""
    width = max(len(number) for number in [total, *(number for _, number, _ in rows)])
    lines = [(title, total.rjust(width), note), *(("  " + label, n.rjust(width), said) for label, n, said in rows)]
    return table(lines, indent="")


def _parser(*, everything: bool) -> Parser:
    parser = Parser(
        "lm-plan",
        usage="lm-plan [PRESET | CONFIG.toml | CONFIG.json | RUN] [flags of lm-train]",
        description="Say what a run will need before it runs: parameters, FLOPs a token, memory, time, disk, and the "
        "largest batch that fits. Nothing is written; on a CPU a few steps of a small model tell the time. "
        f"Presets: {', '.join(presets())}.",
        examples=PLAN_EXAMPLES,
    )
    parser.add_argument("source", nargs="?", metavar="PRESET|CONFIG|RUN", help="what to plan; default: default")
    parser.add_argument("--help-all", action="help", help="show every field, and the other spellings")
    parser.add_argument("--config", metavar="FILE", help="the same as the positional argument")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--memory", metavar="SIZE", help="memory that the run may take, as 24G; default: what the device has"
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="plan for this GPU, which need not be here: H100, A100, RTX 4090 …; with --memory where it comes in sizes",
    )
    add_run_flags(parser, everything=everything)
    for action in parser._actions if not everything else ():
        if action.dest in FIELDS and action.dest not in SHOWN:
            action.help = argparse.SUPPRESS
    return parser
