"""Flags made from the fields of a run: every command that takes a run takes the same ones.

In: an argument parser and an argument list. Out: flags in it, and the list in one spelling. Called by the commands of
language models; imports no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from bytekiln.config import ALIASES, FIELDS, SECTIONS, SWITCHES, extra_of
from bytekiln.console import Parser

HIDDEN_FIELDS = ("preset",)
CONTEXT_OF_WEIGHTS = 512
"""Window of a run that starts from weights and names no preset; fewer where they know fewer positions."""
ON, OFF = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
SWITCH_FIELDS = [n for n, f in FIELDS.items() if f.annotation is bool or "bool" in str(f.annotation)]
"""Fields that take --x, --no-x and --x=true|false."""


def add_run_flags(parser: Parser, *, everything: bool) -> None:
    """A flag for every field; help shows the main ones, or `everything`."""
    for section, fields in SECTIONS.items():
        group = parser.add_argument_group(section)
        for name in fields.model_fields:
            if name not in HIDDEN_FIELDS:
                _field_flag(group, name, everything)
    switches = parser.add_argument_group("spellings of values") if everything else parser
    for name, (field, value) in SWITCHES.items():
        switches.add_argument(
            f"--{name}".replace("_", "-"),
            dest=field,
            action="store_const",
            const=value,
            help=f"{field} = {value}" if everything else argparse.SUPPRESS,
        )


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields that were set on the command line."""
    return {k: v for k, v in vars(options).items() if k in FIELDS and v is not None}


def _field_flag(group: Any, name: str, everything: bool) -> None:  # noqa: ANN401 - argparse's groups are private types
    also = extra_of(name, "also")
    text = f"{FIELDS[name].description}"
    if everything and also:
        text += f" (also --{', --'.join(a.replace('_', '-') for a in also)})"
    shown = everything or extra_of(name, "main")
    switch = name in SWITCH_FIELDS
    group.add_argument(
        "--" + name.replace("_", "-"),
        dest=name,
        metavar=_metavar(name),
        help=text.replace("%", "%%") if shown else argparse.SUPPRESS,
    )
    negative = ["no_" + n for n in (name, *also)] if switch else []
    for hidden in (*also, *negative):
        group.add_argument("--" + hidden.replace("_", "-"), dest=name, help=argparse.SUPPRESS)


def _metavar(name: str) -> str:
    kind = str(FIELDS[name].annotation)
    if name in SWITCH_FIELDS:
        return "true|false|auto" if "auto" in kind else "true|false"
    if "Literal" in kind:
        return "|".join(v.strip("' ") for v in kind[kind.index("[") + 1 : kind.rindex("]")].split(",") if v.strip("' "))
    return (
        "N"
        if "int" in kind
        else "X"
        if "float" in kind
        else "DEVICE"
        if name == "device"
        else "NAME"
        if name == "run_name"
        else "PATH"
    )


def spell_switches(argv: Iterable[str]) -> list[str]:
    """Give every true-or-false flag its value, so that one without may stand before anything.

    >>> spell_switches(["--no-compile", "demo", "--decay_lr", "False", "--tie-embeddings"])
    ['--compile=false', 'demo', '--decay-lr=False', '--tie-embeddings=true']
    """
    names = {n: n for n in SWITCH_FIELDS} | {a: n for a, n in ALIASES.items() if n in SWITCH_FIELDS}
    out: list[str] = []
    pending: str | None = None
    for arg in argv:
        if pending is not None:
            literal = arg.lower() in (*ON, *OFF, "auto")
            out.append(f"{pending}={arg if literal else 'true'}")
            pending = None
            if literal:
                continue
        head, equals, value = arg.partition("=")
        key = head.removeprefix("--").replace("-", "_") if head.startswith("--") else ""
        positive = key.removeprefix("no_")
        if key in SWITCHES and equals:
            field, on = SWITCHES[key]
            out.append(f"--{field.replace('_', '-')}={on if value.lower() in ON else FIELDS[field].default}")
        elif key in names and not equals:
            pending = "--" + names[key].replace("_", "-")
        elif key not in names and key.startswith("no_") and positive in names:
            flag = "--" + names[positive].replace("_", "-")
            off = not equals or value.lower() in ON
            out.append(f"{flag}={'false' if off else 'true'}")
        elif key in names:
            out.append(f"--{names[key].replace('_', '-')}={value}")
        else:
            out.append(arg)
    return [*out, f"{pending}=true"] if pending else out


def take_shape_of_weights(given: dict[str, Any]) -> None:
    """Fill in the shape of the weights that `init_from` names; given fields win. For a run without a preset or config.

    Raises:
        FileError, FormatError: as `convert.config_of`, which is imported here only: it loads torch.
    """
    from bytekiln.convert import config_of

    implied = config_of(str(given["init_from"]))
    if "context_length" not in given and "max_seq_len" not in given:
        given["context_length"] = min(CONTEXT_OF_WEIGHTS, int(implied["max_seq_len"]))
    for name, value in implied.items():
        given.setdefault(name, value)
