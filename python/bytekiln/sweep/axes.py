"""The axes of a sweep: which values a field takes, and how a value is written in a name.

In: lists and ranges as a spec or a flag holds them. Out: values, and their shortest exact spelling. Called by
`sweep.spec`; imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import model_validator

from bytekiln.config import FIELDS
from bytekiln.errors import ConfigError
from bytekiln.section import Section, Value

DIGITS = 3
"""Significant digits of a value that a range gives; more where two would be the same."""
LONGEST_NAME = 120
"""Characters of a run's name; file systems take 255 bytes, and suffixes are put behind it."""
_PLAIN = re.compile(r"[^A-Za-z0-9._=,+-]+")


class Axis(Section):
    """The values of one field: a list, or a range."""

    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    points: int = 0
    """Of a range, both ends included; 0: only for random search."""
    scale: Literal["list", "log", "linear"] = "list"

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.scale == "list":
            if not self.values:
                raise ConfigError("found an empty list; expected at least one value")
            return self
        if not self.low < self.high or (self.scale == "log" and self.low <= 0):
            above = " above 0" if self.scale == "log" else ""
            raise ConfigError(f"found {self.scale} = [{self.low:g}, {self.high:g}]; expected two rising numbers{above}")
        if self.points < 0 or self.points == 1:
            raise ConfigError(f"points: found {self.points}; expected at least 2")
        return self

    def listed(self, field: str) -> tuple[Value, ...]:
        """Every value of a list or of a range with points.

        Raises:
            ConfigError: a range without points.
        """
        if self.scale == "list":
            return self.values
        if not self.points:
            raise ConfigError(f"axes.{field}: found a range without points; expected points = N, or kind = random")
        places = [i / (self.points - 1) for i in range(self.points)]
        return self._rounded([self._at(x) for x in places], field)

    def drawn(self, dice: random.Random, field: str) -> Value:
        """One value at random: of a list uniformly, of a range uniformly on its scale."""
        if self.scale == "list":
            return dice.choice(self.values)
        return self._rounded([self._at(dice.random())], field)[0]

    def _at(self, place: float) -> float:
        if self.scale == "linear":
            return self.low + place * (self.high - self.low)
        return math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))

    def _rounded(self, values: Sequence[float], field: str) -> tuple[Value, ...]:
        kind = str(FIELDS[field].annotation)
        if "int" in kind and "float" not in kind:
            return tuple(dict.fromkeys(round(v) for v in values))
        for digits in range(DIGITS, 18):
            rounded = [float(f"{v:.{digits}g}") for v in values]
            if len(set(rounded)) == len(values):
                return tuple(rounded)
        return tuple(values)

    def plain(self) -> object:
        """As a TOML file holds it."""
        if self.scale == "list":
            return list(self.values)
        ends: dict[str, object] = {self.scale: [self.low, self.high]}
        return {**ends, "points": self.points} if self.points else ends


def read_axis(value: Any, where: str) -> Axis:  # noqa: ANN401 - whatever a file holds
    """An axis as a spec writes it: a value, a list, `{ log = [1e-5, 1e-2], points = 7 }`, `{ values = […] }`.

    Raises:
        ConfigError: it is none of them.
    """
    try:
        if not isinstance(value, Mapping):
            return Axis(values=tuple(value) if isinstance(value, list | tuple) else (value,))
        ranges = [k for k in ("log", "linear", "values") if k in value]
        unknown = set(value) - {"log", "linear", "values", "points"}
        if len(ranges) != 1 or unknown:
            raise ConfigError(
                f"found {', '.join(map(str, value)) or 'nothing'}; expected log = [LOW, HIGH], linear = [LOW, HIGH] or "
                "values = [...], and points = N"
            )
        kind, ends = ranges[0], value[ranges[0]]
        if kind == "values":
            return read_axis(ends, where)
        if not isinstance(ends, list | tuple) or len(ends) != 2:
            raise ConfigError(f"{kind}: found {ends!r}; expected [LOW, HIGH]")
        scale: Any = kind
        return Axis(scale=scale, low=ends[0], high=ends[1], points=value.get("points", 0))
    except ConfigError as exc:
        raise ConfigError(f"{where}: {str(exc).removeprefix(where + ': ')}") from None


def points_of(axes: Mapping[str, Axis], kind: str, samples: int, sampler_seed: int) -> list[dict[str, Value]]:
    """The combinations of a grid, a list (axes side by side) or a random search.

    Raises:
        ConfigError: lists of different lengths side by side; random without a number of samples.
    """
    if kind == "random":
        if samples < 1:
            raise ConfigError(f"samples: found {samples}; expected at least 1 with kind random")
        dice, drawn = random.Random(sampler_seed), dict[str, dict[str, Value]]()
        for _ in range(100 * samples):
            if len(drawn) == samples:
                break
            point = {field: axis.drawn(dice, field) for field, axis in axes.items()}
            drawn.setdefault(repr(point), point)
        if len(drawn) < samples:
            raise ConfigError(f"samples: found {samples}; expected at most {len(drawn)}, as many as the axes have")
        return list(drawn.values())
    listed = {field: axis.listed(field) for field, axis in axes.items()}
    for field, values in listed.items():
        twice = [v for i, v in enumerate(values) if v in values[:i]]
        if twice and kind == "grid":
            raise ConfigError(f"axes.{field}: found {short(twice[0])} twice; expected each value once")
    if kind == "list":
        lengths = {field: len(values) for field, values in listed.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{n} of {field}" for field, n in lengths.items())
            raise ConfigError(f"axes: found {said}; expected as many of each with kind list")
        return [dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True)] or [{}]
    return [dict(zip(listed, row, strict=True)) for row in itertools.product(*listed.values())]


def how_many(axes: Mapping[str, Axis], kind: str, samples: int) -> int:
    """How many combinations there would be, without making them."""
    if kind == "random":
        return samples
    sizes = [len(a.values) or a.points for a in axes.values()]
    return math.prod(sizes) if kind == "grid" else max(sizes, default=1)


def short(value: Value) -> str:
    """A value as names have it: a float in its shortest exact spelling, without padding.

    >>> [short(v) for v in (3e-4, 2.5e-4, 1.2e-3, 0.001, 0.01, 0.05, 0.1, 1.0, 10.0, 1000.0, 64, True, "rope")]
    ['3e-4', '2.5e-4', '1.2e-3', '1e-3', '1e-2', '0.05', '0.1', '1', '10', '1e3', '64', 'true', 'rope']
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    plain = repr(value).removesuffix(".0")
    digits, _, power = f"{value:.16e}".partition("e")
    for places in range(17):
        digits, _, power = f"{value:.{places}e}".partition("e")
        if float(f"{digits}e{power}") == value:
            break
    exponent = f"{digits}e{int(power)}"
    if "e" in plain or len(exponent) < len(plain):
        return exponent
    return exponent if len(exponent) == len(plain) and abs(value) < 0.02 else plain


def exact_name(changes: Mapping[str, Value], variant: str | None) -> str:
    """A run's name out of what makes it different.

    >>> exact_name({"lr": 2.5e-4, "seed": 2}, None), exact_name({"seed": 2}, "no-rope"), exact_name({}, None)
    ('lr=2.5e-4,seed=2', 'no-rope,seed=2', 'base')
    """
    ordered = [k for k in changes if k != "seed"] + [k for k in changes if k == "seed"]
    parts = [variant] if variant else []
    return ",".join([*parts, *(f"{k}={short(changes[k])}" for k in ordered)]) or "base"


def folder_names(names: Sequence[str]) -> list[str]:
    """Names that every file system keeps apart: plain characters, not too long, not equal but for their case.

    What had to be changed ends in a piece of the exact name's hash.

    >>> folder_names(["lr=3e-4", "train_data=/a b", "x" * 200])[:2]
    ['lr=3e-4', 'train_data=_a_b-fa0fcc22']
    """
    folded = [n.casefold() for n in names]
    seen = {f: folded.count(f) for f in folded} if len(set(folded)) < len(folded) else {}
    return [_safe(n, twin=seen.get(n.casefold(), 1) > 1) for n in names]


def _safe(name: str, *, twin: bool) -> str:
    plain = _PLAIN.sub("_", name).lstrip(".-")
    if plain == name and len(plain) <= LONGEST_NAME and not twin:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: LONGEST_NAME - 9]}-{mark}"
