"""What every group of fields is made of: frozen, checked values whose sentence is the help text.

In: values as a file or a flag holds them. Out: the base class and the field makers that `model_config` and `fields`
use. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from bytekiln.console import nearest
from bytekiln.errors import ConfigError

Value = str | int | float | bool
"""What a field can hold in a file or a flag."""


def _number(value: object) -> object:
    """Python's true and false are numbers; a file's are not."""
    if isinstance(value, bool):
        raise PydanticCustomError("a_switch", "Input should be a number, not true or false")
    return value


def _whole(value: object) -> object:
    """Let `1e5` and `40_000.0` be integers, as people write them."""
    value = _number(value)
    if isinstance(value, str) and any(c in value for c in ".eE"):
        with suppress(ValueError):
            value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def seconds(value: object) -> object:
    """A time as people write it, in seconds; what is no time is left for pydantic to refuse.

    >>> seconds("90m"), seconds("1h30m"), seconds("45"), seconds("soon")
    (5400.0, 5400.0, 45.0, 'soon')
    """
    if not isinstance(value, str):
        return _number(value)
    total, rest = 0.0, value.strip().lower()
    for letter, unit in (("h", 3600.0), ("m", 60.0), ("s", 1.0)):
        head, found, tail = rest.partition(letter)
        if found:
            try:
                total += float(head) * unit
            except ValueError:
                return value
            rest = tail.strip()
    try:
        total += float(rest) if rest else 0.0
    except ValueError:
        return value
    return total if value.strip() and math.isfinite(total) else value


Int = Annotated[int, BeforeValidator(_whole)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Seconds = Annotated[float, BeforeValidator(seconds), Field(allow_inf_nan=False)]


def setting(
    default: object, text: str, *, also: Iterable[str] = (), main: bool = False, math: bool = True, **limits: float
) -> Any:  # noqa: ANN401 - a pydantic default stands for a value of any type
    """A field.

    Args:
        default: value when neither preset, file nor flag says anything (seed values of the default preset).
        text: one sentence; help text and documentation.
        also: other spellings, underscores; hyphens work by themselves.
        main: shown by `--help` (every field by `--help-all`).
        math: whether another value would change the numbers of a run; then a resume refuses it.
        limits: `gt`, `ge`, `lt`, `le` of pydantic.
    """
    extra: dict[str, Any] = {"also": list(also), "main": main, "math": math}
    annotation: Any = Field  # its overloads cannot be told from keyword arguments in a dict
    return annotation(default, description=text, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """Frozen, refuses unknown keys, and raises `ConfigError` in this project's words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: object) -> None:
        """Check and complete the values.

        Raises:
            ConfigError: a value has the wrong type or range, or two values contradict each other.
        """
        try:
            super().__init__(**values)
        except ValidationError as exc:
            raise ConfigError(_in_our_words(exc, type(self))) from None

    def settle(self, **values: Value) -> None:
        """Fill in values that follow from others; for validators only, since a section is frozen."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _in_our_words(exc: ValidationError, section: type[Section]) -> str:
    said = []
    for e in exc.errors():
        own = e.get("ctx", {}).get("error")
        if isinstance(own, Exception):
            said.append(str(own))
            continue
        name = next((str(p) for p in reversed(e["loc"]) if p in section.model_fields), ".".join(map(str, e["loc"])))
        if e["type"] == "extra_forbidden":
            meant = nearest(str(e["loc"][-1]), section.model_fields)
            said.append(f"unknown key {e['loc'][-1]}" + (f"; did you mean {meant}?" if meant else ""))
        else:
            said.append(f"{name}: found {e['input']!r}; expected {e['msg'].removeprefix('Input should be ')}")
    return "; ".join(dict.fromkeys(said))
