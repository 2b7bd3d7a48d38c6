"""A run as data: presets and files in TOML or JSON, spellings, and given values on top.

In: a preset's name, a file or a run folder, and explicitly given values. Out: one `RunConfig`, complete and
checked (`fields`). Called by `cli_lm`, `train` and `checkpoint`; imports no torch.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from bytekiln import fields
from bytekiln.console import nearest
from bytekiln.errors import ConfigError, FileError, FormatError
from bytekiln.fields import (
    FIELDS,
    SECTION_OF,
    SECTIONS,
    OutputConfig,
    RunConfig,
    alone,
    extra_of,
    from_flat,
    unsaid,
)
from bytekiln.model_config import ModelConfig
from bytekiln.section import Section, Value
from bytekiln.training_config import DataConfig, OptimizerConfig, TrainingConfig, stages_of

__all__ = [
    "ALIASES",
    "FIELDS",
    "SECTIONS",
    "SECTION_OF",
    "SWITCHES",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "RunConfig",
    "Section",
    "TrainingConfig",
    "Value",
    "alone",
    "canonical",
    "changed_mathematics",
    "extra_of",
    "from_flat",
    "load_config",
    "presets",
    "read_table",
    "refuse_idle",
    "stages_of",
    "stated_in",
]

SWITCHES = {"no_rope": ("position", "none"), "no_rmsnorm": ("norm", "none"), "post_norm": ("norm_position", "post")}
"""Spellings that stand for a value of another field."""


UNLIMITED_STEPS = 10**9
"""`max_steps` of a run that ends by time or tokens."""

ALIASES: dict[str, str] = {also: name for name in FIELDS for also in extra_of(name, "also")}


def canonical(key: str, where: str) -> str:
    """The field that `key` means.

    >>> canonical("learning-rate", "x"), canonical("n_layer", "x")
    ('lr', 'num_layers')

    Raises:
        ConfigError: there is no such field; names the nearest.
    """
    name = key.replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in FIELDS:
        meant = nearest(name, [*FIELDS, *ALIASES])
        hint = f"did you mean {meant}?" if meant else "lm-train --help-all lists them"
        raise ConfigError(f"{where}: unknown key {key}; {hint}")
    return name


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in _preset_folder().iterdir() if p.name.endswith(".toml"))


def load_config(
    source: str | Path | None = None, given: Mapping[str, object] | None = None, *, say: Callable[[str], object] = print
) -> RunConfig:
    """A complete, checked run.

    Args:
        source: preset, TOML or JSON file, or run folder; None: the preset `default`. `train_X.py` means preset X.
        given: values that win over the source, any spelling. `lr` or `min_lr_ratio` without `min_lr` frees a pinned
            `min_lr`; `run_name` or `save_dir` without `out_dir` frees a pinned `out_dir`; `max_time` or
            `token_budget` without `max_steps` frees a pinned `max_steps`, `windows` a pinned `sampling`, what says how
            the rate falls (`DECAY`) a pinned `decay_lr`, and a value frees what a run's stored config has derived
            from it.
        say: told in one line when a name was understood as another.

    Raises:
        ConfigError: unknown preset or key, value out of range, contradiction.
        FileError, FormatError: the file cannot be read, or is no TOML or JSON.
    """
    base, preset = _read_source(source, say)
    explicit = _flatten(given or {}, "command line" if given else "values")
    if "max_steps" in _free(base, explicit):
        base["max_steps"] = UNLIMITED_STEPS
    merged: dict[str, object] = {**base, **explicit}
    if preset:
        merged["preset"] = preset
    return from_flat(merged)


DECAY = ("schedule", "min_lr", "min_lr_ratio", "decay_steps", "decay_fraction")
"""Fields that say how the rate falls: one of them, given, switches on a decay that a preset has switched off."""
_NO_DECAY: dict[str, tuple[Value, ...]] = {"schedule": ("constant",), "decay_steps": (0,)}


def _free(base: dict[str, object], explicit: Mapping[str, object]) -> list[str]:
    """Take out of `base` what yields to the explicit values; of what a preset or a file pins, the names."""
    if set(FIELDS) - {"min_lr"} <= set(base):  # a run's; what a preset or a file of the user's says was meant
        _free_derived(base, explicit)
    yielding = _yields(explicit)
    for name in yielding:
        base.pop(name, None)
    return yielding


def _yields(explicit: Mapping[str, object]) -> list[str]:
    """What a preset or a file pins and an explicit value frees, unless it is given beside it."""
    read = ("max_time", "token_budget", "windows", *DECAY)
    said = {name: alone(name, value) if name in read else value for name, value in explicit.items()}
    frees = {
        "min_lr": bool({"lr", "min_lr_ratio"} & set(said)),
        "out_dir": bool({"run_name", "save_dir"} & set(said)),
        "max_steps": any(said.get(n) for n in ("max_time", "token_budget")),
        "sampling": said.get("windows", "stream") != "stream",
        "decay_lr": any(n in said and said[n] not in _NO_DECAY.get(n, ()) for n in DECAY),
    }
    return [*(name for name, freed in frees.items() if freed and name not in said), *unsaid(explicit)]


DERIVED = {"num_heads": "num_kv_heads", "context_length": "max_seq_len", "d_model": "d_ff", "ffn": "d_ff"}
"""Fields that another one gives its value where they are left open."""


def _free_derived(base: dict[str, object], explicit: Mapping[str, object]) -> None:
    """Leave open in a run's stored config, which is complete, what an explicit value would have derived anew."""
    shape: dict[str, Any] = {n: base[n] for n in ModelConfig.model_fields if n in base}
    for parent, child in DERIVED.items():
        if parent in explicit and child not in explicit and child in base:
            usual = ModelConfig(**{**shape, child: 0})
            if getattr(usual, child) == base[child]:
                base.pop(child)


def changed_mathematics(
    was: RunConfig, now: RunConfig, names: Iterable[str]
) -> Iterator[tuple[str, Value | None, Value | None]]:
    """Which of the fields `names` differ so that the numbers of a run would: (name, value before, value now)."""
    before, after = was.flat(), now.flat()
    for name in names:
        if extra_of(name, "math") and before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)


def refuse_idle(config: RunConfig, said: Collection[str], before: RunConfig | None = None) -> None:
    """`fields.refuse_idle`; in a new run a value that its preset pins asks for nothing.

    Raises:
        ConfigError: names what would switch a field on.
    """
    if before is None and config.output.preset in presets():
        before = load_config(config.output.preset)
    fields.refuse_idle(config, said, before)


def stated_in(path: Path, given: Mapping[str, object] | None = None) -> dict[str, object]:
    """What a config file says, by field, with `given` on top as `load_config` lays it; nothing is completed."""
    explicit = _flatten(given or {}, "command line")
    base = _flatten(read_table(path), str(path))
    _free(base, explicit)
    return {**base, **explicit}


def _read_source(source: str | Path | None, say: Callable[[str], object]) -> tuple[dict[str, object], str]:
    name = str(source or "default")
    if name.endswith(".py"):
        stem = Path(name).stem.removeprefix("train_").replace("_", "-")
        if not Path(name).stem.startswith("train_") or stem not in presets():
            raise ConfigError(
                f"{name}: a Python file is never run; expected a TOML or JSON file or a preset: {', '.join(presets())}"
            )
        say(f"{name}: taken as preset {stem}; Python files are never run")
        name = stem
    if (stem := name.replace("_", "-")) in presets():
        return _flatten(tomllib.loads((_preset_folder() / f"{stem}.toml").read_text("utf-8")), f"preset {stem}"), stem
    path = Path(name)
    if path.is_dir():
        if not (path / "config.toml").is_file():
            raise ConfigError(f"{path}: found a folder without config.toml; expected a run folder, preset or file")
        path = path / "config.toml"
    elif not path.exists():
        meant = nearest(name, presets())
        hint = f"did you mean {meant}?" if meant else f"presets: {', '.join(presets())}"
        raise ConfigError(f"{name}: neither a preset nor an existing file or run folder; {hint}")
    return _flatten(read_table(path), str(path)), ""


def read_table(path: Path) -> dict[str, Any]:
    """A TOML or JSON file as a table; JSON is known by its opening brace, not by its suffix.

    Raises:
        FileError: the file cannot be read.
        FormatError: it is neither TOML nor a JSON object.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise FormatError(f"{path}: invalid UTF-8 at byte {exc.start}; expected a TOML or JSON file") from None
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected a TOML or JSON file") from None
    try:
        return dict(json.loads(text)) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, TypeError) as exc:
        raise FormatError(f"{path}: {exc}; expected a TOML or JSON file") from None


def _flatten(table: Mapping[str, object], where: str) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in _leaves(table, where):
        switch = SWITCHES.get(key.replace("-", "_"))
        if switch is not None:
            on = str(value).lower() in ("true", "1", "yes", "on")
            name, value = switch[0], switch[1] if on else FIELDS[switch[0]].default
        else:
            name = canonical(key, where)
        if name in out and out[name] != value:
            raise ConfigError(f"{where}: {name} is given twice, as {out[name]} and {value}; expected one value")
        if value is not None:
            out[name] = value
    return out


def _leaves(table: Mapping[str, object], where: str) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and key in SECTIONS:
            yield from value.items()
        elif key in SECTIONS and key not in FIELDS:  # `optimizer` is both
            raise ConfigError(f"{where}: {key}: found {value!r}; expected a table, since it is a section of fields")
        else:
            yield key, value


def _preset_folder() -> Traversable:
    return resources.files("bytekiln") / "presets"
