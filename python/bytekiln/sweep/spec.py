"""A sweep as data: a base run, axes, variants; and the runs that they make.

In: a preset of sweeps, a TOML or JSON file, a sweep folder, and what the command line lays over it. Out: a `SweepSpec`
and its list of `Trial`s. Called by `cli_sweep`, searches and pipelines; imports no torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from bytekiln.config import RunConfig, canonical, load_config, presets, read_table, stated_in
from bytekiln.console import nearest
from bytekiln.errors import ConfigError, FormatError
from bytekiln.known import KNOWN
from bytekiln.section import Value
from bytekiln.sweep.axes import Axis, exact_name, folder_names, points_of, short
from bytekiln.sweep.model import FORMAT, VERSION, SweepOutput, SweepSpec, Trial
from bytekiln.sweep.table import PLACES, axes_of, fields_of, seeds_of, variant_name

__all__ = ["SweepOutput", "SweepSpec", "Trial", "changed", "load_spec", "read_spec", "sweep_presets", "trials_of"]

SOURCES = ("preset", "config", "dataset")
"""What a base may name beside fields: where they come from, and the files that a dataset's name stands for."""
DATA_PATHS = ("train_data", "val_data", "tokenizer", "vocab_path", "merges_path", "init_from")
_HOLE = re.compile(r"\{(\w+)\}")


def sweep_presets() -> list[str]:
    """Names of the sweeps that come with the package."""
    folder = resources.files("bytekiln") / "presets" / "sweeps"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def load_spec(source: str | Path) -> SweepSpec:
    """A sweep by the name of a preset, a file, or a sweep's folder; of a run's preset or config its base alone.

    Raises:
        ConfigError: unknown name or key, a value out of range.
        FileError, FormatError: a file cannot be read, or is neither TOML nor JSON.
    """
    name = str(source)
    if (stem := name.replace("_", "-")) in sweep_presets():
        text = (resources.files("bytekiln") / "presets" / "sweeps" / f"{stem}.toml").read_text("utf-8")
        return read_spec(tomllib.loads(text), f"preset {stem}", stem, Path()).model_copy(update={"shipped": stem})
    if stem in presets():
        return SweepSpec(name=f"{stem}-sweep", base={"preset": stem})
    path = Path(name)
    if path.is_dir():
        if not (path / "sweep.toml").is_file():
            raise ConfigError(
                f"{path}: found a folder without sweep.toml; expected a sweep's folder, a preset or a file"
            )
        path = path / "sweep.toml"
    elif not path.exists():
        meant = nearest(name, [*sweep_presets(), *presets()])
        hint = f"did you mean {meant}?" if meant else f"presets: {', '.join(sweep_presets())}"
        raise ConfigError(f"{name}: neither a preset nor an existing file or sweep folder; {hint}")
    found = read_table(path)
    known = set(SweepSpec.model_fields) | {"format", "version"}
    if not known & {str(k).replace("-", "_") for k in found}:
        stated_in(path)  # a run's config, or refused in its words
        return SweepSpec(name=f"{path.stem}-sweep", base={"config": str(path.absolute())})
    stem = path.parent.resolve().name if path.name == "sweep.toml" else path.stem
    spec = read_spec(found, str(path), stem, path.parent)
    return spec if path.name == "sweep.toml" else spec.model_copy(update={"shipped": ""})


def read_spec(found: Mapping[str, Any], where: str, name: str, directory: Path) -> SweepSpec:
    """A sweep from a table.

    Args:
        found: the table.
        where: how errors name it.
        name: what the sweep is called unless it says so.
        directory: what a base's `config` is relative to.

    Raises:
        ConfigError, FormatError: a key, type or value that cannot be.
    """
    table = {str(k).replace("-", "_"): v for k, v in found.items()}
    if table.pop("format", FORMAT) != FORMAT or table.pop("version", VERSION) != VERSION:
        raise FormatError(f"{where}: found format {found.get('format')}, version {found.get('version')}; "
                          f"expected {FORMAT}, {VERSION}")  # fmt: skip
    for key in table:
        if key not in SweepSpec.model_fields:
            meant = nearest(key, SweepSpec.model_fields)
            hint = f"did you mean {meant}?" if meant else "a field of a run stands under [base] or [axes]"
            raise ConfigError(f"{where}: unknown key {key}; {hint}")
    for key in ("axes", "base", "variant", "questions", "output", "scale"):
        if not isinstance(table.get(key, {}), Mapping):
            raise ConfigError(f"{where}: {key}: found {table[key]!r}; expected a table")
    axes = axes_of(table.pop("axes", {}), where)
    base = _base(table.pop("base", {}), where, directory)
    variants = {
        variant_name(n, where): fields_of(v, f"{where}: variant.{n}") for n, v in table.pop("variant", {}).items()
    }
    seeds = seeds_of(table.pop("seeds", ()), where)
    if "seed" in axes and table.get("kind", "grid") == "grid":
        seeds = seeds_of(list(axes.pop("seed").listed("seed")), where)
    try:
        spec = SweepSpec(**{"name": name, **table}, axes=axes, base=base, variant=variants, seeds=seeds)
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}") from None
    _check(spec, where)
    return spec


def changed(
    spec: SweepSpec,
    *,
    scale: str = "",
    lrs: Sequence[float] = (),
    seeds: Sequence[int] = (),
    axes: Mapping[str, Axis] | None = None,
    given: Mapping[str, object] | None = None,
) -> SweepSpec:
    """The sweep with a scale and the command line's values laid over it, in this order.

    Raises:
        ConfigError: no such scale; a given field is an axis.
    """
    where, update = "command line", dict[str, Any]()
    if scale:
        if scale not in spec.scale:
            known = ", ".join(spec.scale) or "none"
            raise ConfigError(f"--scale: found {scale}; expected one that {spec.name} has: {known}")
        over = {str(k).replace("-", "_"): v for k, v in spec.scale[scale].items()}
        more = {k: over.pop(k) for k in ("axes", "seeds", "samples", "variant", "baseline") if k in over}
        kinds: dict[str, tuple[type, str]] = {
            "samples": (int, "a number"), "variant": (dict, "a table"), "baseline": (str, "a name"),
        }  # fmt: skip
        for key, value in more.items():
            kind, wanted = kinds.get(key, (object, ""))
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ConfigError(f"scale.{scale}: {key}: found {value!r}; expected {wanted}")
        update = {"scaled": scale, "base": {**spec.base, **fields_of(over, f"scale.{scale}")}}
        if "axes" in more:
            update["axes"] = {**spec.axes, **axes_of(more["axes"], f"scale.{scale}")}
        if "seeds" in more:
            update["seeds"] = seeds_of(more["seeds"], f"scale.{scale}")
        update |= {k: more[k] for k in ("samples", "baseline") if k in more}
        if "variant" in more:
            laid = {n: fields_of(v, f"scale.{scale}: variant.{n}") for n, v in more["variant"].items()}
            update["variant"] = {n: {**spec.variant.get(n, {}), **laid.get(n, {})} for n in {**spec.variant, **laid}}
        spec = spec.model_copy(update=update)
    new_axes = {**spec.axes, **(axes or {})}
    if lrs:
        new_axes["lr"] = Axis(values=tuple(lrs))
    new_seeds = tuple(seeds) or spec.seeds
    if "seed" in new_axes and spec.kind == "grid":
        new_seeds = seeds_of(list(new_axes.pop("seed").listed("seed")), where)
    base = {**spec.base, **fields_of(given or {}, where)}
    if "train_data" in (given or {}):
        base.pop("dataset", None)
    baseline = "" if "=" in spec.baseline and new_axes != spec.axes else spec.baseline  # it may be no run of it now
    update = {"axes": new_axes, "seeds": new_seeds, "base": base, "baseline": baseline, "scale": {}}
    spec = spec.model_copy(update=update)
    for field in fields_of(given or {}, where):
        if field in new_axes or (field == "seed" and new_seeds):
            way = {"lr": "--lrs", "seed": "--seeds"}.get(field, f"--axis {field}=...")
            raise ConfigError(f"{field}: found it as an axis of {spec.name} and as one value; expected {way}")
    _check(spec, where)
    return spec


def trials_of(spec: SweepSpec) -> list[Trial]:
    """Every run of a sweep, variants outermost, seeds innermost.

    Raises:
        ConfigError: a run cannot be, or two would be one.
    """
    points = points_of(spec.axes, spec.kind, spec.samples, spec.sampler_seed)
    variants: list[tuple[str | None, dict[str, Value]]] = [(n, dict(v)) for n, v in spec.variant.items()]
    if not spec.variants_only or not variants:
        variants.insert(0, ("base" if variants else None, {}))
    made: list[tuple[dict[str, Value], dict[str, Value], str | None, RunConfig]] = []
    for variant, fields in variants:
        for point in points:
            for seed in spec.seeds or (None,):
                axis = {**point, **({} if seed is None else {"seed": seed})}
                config = _config(spec, {**fields, **axis}, variant)
                flat = config.flat()
                axis = {k: _typed(v, flat.get(k)) for k, v in axis.items()}
                made.append((axis, {**{k: _typed(v, flat.get(k)) for k, v in fields.items()}, **axis}, variant, config))
    names = [exact_name(axis, variant) for axis, _, variant, _ in made]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"{spec.name}: found {name} twice; expected runs that differ")
    trials = [
        Trial(name, changes, variant, config.training.seed, _placed(spec, config, axis, variant, name))
        for name, (axis, changes, variant, config) in zip(folder_names(names), made, strict=True)
    ]
    _apart(trials)
    known = {t.name for t in trials} | {t.variant for t in trials if t.variant}
    known |= {exact_name({k: v for k, v in axis.items() if k != "seed"}, variant) for axis, _, variant, _ in made}
    if spec.baseline and spec.baseline not in known and trials:
        meant = nearest(spec.baseline, known)
        hint = f"did you mean {meant}?" if meant else f"expected a variant or a run, as {trials[0].name}"
        raise ConfigError(f"baseline: found {spec.baseline}; {hint}")
    return trials


def inlined(spec: SweepSpec) -> dict[str, Any]:
    """`plain` with the fields of a base's file in the place of its path: what two sweeps are compared by."""
    said = spec.plain()
    config = spec.base.get("config")
    if config is not None:
        said["base"] = {**stated_in(Path(str(config))), **{k: v for k, v in spec.base.items() if k != "config"}}
    return said


def _base(table: Mapping[str, object], where: str, directory: Path) -> dict[str, Value]:
    sources: dict[str, Value] = {}
    for key in SOURCES:
        if key in table:
            value = table[key]
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{where}: base.{key}: found {value!r}; expected a name")
            sources[key] = str((directory / value).absolute()) if key == "config" else value
    if {"preset", "config"} <= set(sources):
        raise ConfigError(f"{where}: base: found preset and config; expected one of them")
    return {**sources, **fields_of({k: v for k, v in table.items() if k not in SOURCES}, f"{where}: base")}


def _check(spec: SweepSpec, where: str) -> None:
    if spec.kind == "random" and not spec.axes:
        raise ConfigError(f"{where}: axes: found none; expected at least one with kind random")
    if unknown := [n for n in spec.questions if n not in (*spec.variant, "base")]:
        meant = nearest(unknown[0], spec.variant)
        hint = f"did you mean {meant}?" if meant else "expected the name of a variant"
        raise ConfigError(f"{where}: questions: found {unknown[0]}; {hint}")
    if spec.seeds and "seed" in spec.axes:
        raise ConfigError(f"{where}: seed: found axes.seed and seeds; expected one of them")
    for key, template in spec.templates():
        for hole in _HOLE.findall(template):
            if hole not in ("name", "variant"):
                canonical(hole, f"{where}: output.{key}")
    if Path(spec.results_name).name != spec.results_name or not spec.results_name.endswith(".json"):
        raise ConfigError(f"{where}: output.results: found {spec.results_name}; expected a name that ends in .json")


def _config(spec: SweepSpec, changes: Mapping[str, Value], variant: str | None) -> RunConfig:
    """The run with its changes on top of the base, as `lm-train BASE --field value` would make it."""
    given: dict[str, Value] = {k: v for k, v in spec.base.items() if k not in SOURCES}
    given |= changes
    dataset = str(spec.base.get("dataset", ""))
    if dataset:
        folder = Path(spec.directory) / "data" / "processed"
        tokenizer = folder / f"{dataset}_tokenizer.json"
        if not {"train_data", "tokenizer", "vocab_path"} & set(given) and tokenizer.exists():
            given["tokenizer"] = str(tokenizer)
        for field, split in (("train_data", "train"), ("val_data", "valid")):
            given.setdefault(field, str(folder / f"{dataset}_{split}.npy"))
    source = spec.base.get("config") or spec.base.get("preset") or dataset or None
    try:
        return load_config(str(source) if source else None, given, say=lambda _: None)
    except ConfigError as exc:
        name = exact_name(changes, variant)
        raise ConfigError(f"run {name}: {exc}" if name != "base" else str(exc)) from None


def _typed(value: Value, settled: Value | None) -> Value:
    """An axis's value as its field holds it: `8` of a float field is 8.0, the text "64" of a whole number 64."""
    return settled if settled is not None and type(settled) is not type(value) else value


def _placed(spec: SweepSpec, config: RunConfig, axis: Mapping[str, Value], variant: str | None, name: str) -> RunConfig:
    """The run with absolute paths: its data, and the folders that a template gives it."""
    begin = Path(spec.directory).absolute()
    paths: dict[str, Value] = dict.fromkeys(PLACES, "")
    paths["run_name"] = name
    paths["save_dir"] = "runs"
    # Stated, and a tenth of 8e-4 is 8e-5 to the last digit: --min-lr 8e-5 resumes the run by hand.
    paths["min_lr"] = float(f"{config.optimizer.floor_lr:.12g}")
    flat = config.flat()
    for field in DATA_PATHS:
        if (text := str(flat.get(field) or "")) and not (
            field == "tokenizer" and text in KNOWN and not (begin / text).exists()
        ):
            parts = text.split(",") if field == "train_data" else [text]
            paths[field] = ",".join(str(begin / p.strip()) for p in parts)
    for field, template in spec.templates():
        if template:
            paths[field] = str(begin / folder_of(template, config, axis, variant, name))
    return config.with_(**paths)


def folder_of(template: str, config: RunConfig, axis: Mapping[str, Value], variant: str | None, name: str) -> Path:
    """The folder that a template of `[output]` means for a run; what it leaves open is put behind it, as `_seed2`."""
    holes = _HOLE.findall(template)
    values = {"name": name, "variant": variant or "base", **{k: short(v) for k, v in config.flat().items()}}
    values |= {h: values.get(canonical(h, "output"), "") for h in holes if h not in values}
    text = _HOLE.sub(lambda m: values[m[1]], template)
    if "name" not in holes:
        known = {h if h == "variant" else canonical(h, "output") for h in holes}
        text += f"_{variant}" if variant is not None and "variant" not in known else ""
        text += "".join(f"_{k}{short(v)}" for k, v in axis.items() if k not in known)
    return Path(text)


def _apart(trials: Sequence[Trial]) -> None:
    """No two runs in one folder.

    Raises:
        ConfigError: a template gives two runs the same.
    """
    for field in ("checkpoint_dir", "tensorboard_dir"):
        seen: dict[str, str] = {}
        for trial in trials:
            place = str(trial.config.flat()[field])
            if place and (other := seen.setdefault(place.casefold(), trial.name)) != trial.name:
                raise ConfigError(
                    f"output.{field}: found {place} for {other} and {trial.name}; expected {{name}} in the template"
                )
