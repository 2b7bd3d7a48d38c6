"""What a sweep's file is made of: tables of fields, axes and seeds in, their checked values out; and TOML again.

Called by `sweep.spec` and `cli_sweep`; imports no torch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from bytekiln.config import FIELDS, SECTIONS, SWITCHES, canonical
from bytekiln.errors import ConfigError
from bytekiln.section import Value
from bytekiln.sweep.axes import Axis, read_axis

PLACES = ("out_dir", "run_name", "save_dir", "metrics_path", "checkpoint_dir", "tensorboard_dir")
"""Fields that each run of a sweep gets by its name."""
MOST_SEEDS = 100_000
"""More are not even listed; far fewer runs want --yes."""
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def fields_of(table: Mapping[str, object], where: str) -> dict[str, Value]:
    """Fields of a run by their one spelling; sections and switches (`no_rope`) are understood.

    Raises:
        ConfigError: there is no such field, or it is not for a sweep to set.
    """
    out: dict[str, Value] = {}
    for key, value in leaves(table, where):
        switch = SWITCHES.get(key.replace("-", "_"))
        name = switch[0] if switch else canonical(key, where)
        if switch:
            value = switch[1] if str(value).lower() in ("true", "1", "yes", "on") else FIELDS[name].default
        if name in PLACES:
            raise ConfigError(f"{where}: {name}: each run of a sweep has its own; expected [output] or --folder")
        if not isinstance(value, str | int | float | bool):
            raise ConfigError(f"{where}: {name}: found {value!r}; expected one value (several are an axis)")
        out[name] = typed(name, value)
    return out


def typed(field: str, value: Value) -> Value:
    """A value as its field's type has it, where it can be: "64" as a number; limits are checked with the whole run.

    >>> typed("batch_size", "64"), typed("lr", "1e-3"), typed("compile", "false"), typed("batch_size", "many")
    (64, 0.001, False, 'many')
    """
    try:
        known = _reader(field).validate_python(value)
    except ValidationError:
        return value
    return value if known is None else known


@functools.cache
def _reader(field: str) -> TypeAdapter[Value | None]:
    info = FIELDS[field]
    kind: Any = info.annotation
    for extra in info.metadata:
        kind = Annotated[kind, extra]
    return TypeAdapter(kind)


def leaves(table: object, where: str) -> Iterator[tuple[str, object]]:
    """Keys and values, those of a run's sections too.

    Raises:
        ConfigError: it is no table.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: found {table!r}; expected a table")
    for key, value in table.items():
        if isinstance(value, Mapping) and key in SECTIONS:
            yield from value.items()
        else:
            yield key, value


def axes_of(table: Mapping[str, object], where: str) -> dict[str, Axis]:
    """Axes by their fields' one spelling.

    Raises:
        ConfigError: no such field (names the nearest), or no list or range.
    """
    axes: dict[str, Axis] = {}
    for key, value in leaves(table, f"{where}: axes"):
        field = canonical(key, f"{where}: axes")
        if field in PLACES:
            raise ConfigError(f"{where}: axes.{field}: each run of a sweep has its own; expected another field")
        if field in axes:
            raise ConfigError(f"{where}: axes.{field} is given twice; expected it once")
        axes[field] = typed_axis(field, read_axis(value, f"{where}: axes.{field}"))
    return axes


def typed_axis(field: str, axis: Axis) -> Axis:
    """An axis whose values are of its field's type."""
    return axis.model_copy(update={"values": tuple(typed(field, v) for v in axis.values)})


def seeds_of(value: Any, where: str) -> tuple[int, ...]:  # noqa: ANN401 - whatever a file holds
    """A number of seeds (1 to N), or the seeds themselves.

    >>> seeds_of(3, "x"), seeds_of([7, 8], "x")
    ((1, 2, 3), (7, 8))

    Raises:
        ConfigError: neither, one seed twice, or more than `MOST_SEEDS`.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        if value > MOST_SEEDS:
            raise ConfigError(f"{where}: seeds: found {value}; expected at most {MOST_SEEDS}")
        return tuple(range(1, value + 1))
    whole = isinstance(value, list | tuple) and all(isinstance(v, int) and v >= 0 for v in value)
    if not whole or len(set(value)) < len(value):
        raise ConfigError(f"{where}: seeds: found {value!r}; expected how many, or a list of different whole numbers")
    return tuple(value)


def rates_of(text: str, where: str) -> list[float]:
    """The numbers of a flag.

    >>> rates_of("3e-4, 1e-3 2", "--lrs")
    [0.0003, 0.001, 2.0]

    Raises:
        ConfigError: something else, or nothing, as an empty variable of a shell gives.
    """
    with suppress(ValueError):
        if found := [float(part) for part in text.replace(",", " ").split()]:
            return found
    raise ConfigError(f"{where}: found {text!r}; expected numbers, as '3e-4 1e-3'")


def variant_name(name: object, where: str) -> str:
    """The name of a variant, which becomes part of a folder's.

    Raises:
        ConfigError: it cannot be one.
    """
    if not isinstance(name, str) or not _WORD.fullmatch(name):
        raise ConfigError(f"{where}: variant: found {name!r}; expected letters, digits, '.', '_', '+' and '-'")
    return name


def to_toml(plain: Mapping[str, Any]) -> str:
    """A table of scalars, lists, and tables of them as TOML."""
    lines = ["# bytekiln sweep; `lm-sweep` with this file's folder goes on with it"]

    def table(name: str, content: Mapping[str, Any]) -> None:
        lines.extend(["", f"[{name}]"])
        lines.extend(f"{_key(k)} = {_toml(v)}" for k, v in content.items())

    lines += [f"{_key(k)} = {_toml(v)}" for k, v in plain.items() if not isinstance(v, Mapping)]
    for key, value in plain.items():
        if key in ("variant", "scale"):
            for name, content in value.items():
                table(f"{key}.{_key(name)}", content)
        elif isinstance(value, Mapping):
            table(key, value)
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(str(k))} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
