"""What a sweep is: base, axes, variants, places; and one of its runs. Made by `sweep.spec`; imports no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from bytekiln.config import RunConfig
from bytekiln.section import Section, Value, setting
from bytekiln.sweep.axes import Axis, how_many

FORMAT, VERSION = "bytekiln-sweep", 1


class SweepOutput(Section):
    """Where a sweep's files go; `{lr}`, `{seed}`, `{name}` or any field stand for a run's exact value."""

    folder: str = setting("", "the sweep's folder; unset: the spec's name, in the working directory")
    results: str = setting("", "results file in that folder; unset: results.json, or lr_sweep_results.json")
    checkpoint_dir: str = setting("", "folder of a run's checkpoints; unset: in the run's folder")
    tensorboard_dir: str = setting("", "folder of a run's TensorBoard files; unset: in the run's folder")


class SweepSpec(Section):
    """A sweep: what is asked, the base run, what differs."""

    name: str = setting("sweep", "what it is called")
    shipped: str = setting("", "the preset of sweeps that it was loaded from; a sweep's folder remembers it")
    question: str = setting("", "what it asks, in one sentence; the report shows it")
    kind: Literal["grid", "list", "random"] = setting("grid", "how axes combine: all, side by side, or at random")
    axes: dict[str, Axis] = setting({}, "values by field")
    seeds: tuple[int, ...] = setting((), "each combination once a seed; empty: the base's seed")
    samples: int = setting(0, "combinations of a random sweep")
    sampler_seed: int = setting(0, "seed of the random sweep's choice")
    baseline: str = setting("", "variant or run that the others are compared with")
    variants_only: bool = setting(False, "leave out the base run itself, where there are variants")
    base: dict[str, Value] = setting({}, "preset or config, and any field of a run")
    variant: dict[str, dict[str, Value]] = setting({}, "fields that differ, by the variant's name")
    questions: dict[str, str] = setting({}, "what a variant asks, and after the question mark how the answer begins")
    output: SweepOutput = setting(SweepOutput(), "where files go")
    scale: dict[str, dict[str, Any]] = setting({}, "what --scale NAME lays over the base")
    scaled: str = setting("", "which of them is laid over it")
    directory: str = setting("", "what relative paths begin at; unset: the working directory")

    @property
    def results_name(self) -> str:
        """Name of the results file: of a learning-rate sweep that of the user's document."""
        if self.output.results:
            return self.output.results
        return "lr_sweep_results.json" if set(self.axes) == {"lr"} and not self.variant else "results.json"

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path((self.output.folder or self.name) + (f"-{self.scaled}" if self.scaled else ""))

    def templates(self) -> list[tuple[str, str]]:
        """Fields of folders and what makes them; a scaled form has folders of its own, as the sweep's is."""
        end = f"_{self.scaled}" if self.scaled else ""
        return [(n, t and t + end) for n in ("checkpoint_dir", "tensorboard_dir") for t in [getattr(self.output, n)]]

    def count(self) -> int:
        """How many runs it has, without making them."""
        variants = len(self.variant) + (not self.variants_only or not self.variant)
        return how_many(self.axes, self.kind, self.samples) * max(len(self.seeds), 1) * variants

    def plain(self) -> dict[str, Any]:
        """As a TOML file holds it, values that are not set left out; `read_spec` reads it back."""
        said = {k: v for k, v in self.model_dump().items() if k not in ("axes", "output", "name") and v}
        said["axes"] = {field: axis.plain() for field, axis in self.axes.items()}
        said["output"] = {k: v for k, v in self.output.model_dump().items() if v}
        return {"format": FORMAT, "version": VERSION, "name": self.name} | {k: v for k, v in said.items() if v != {}}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    """Made of exact values; also the name of its folder."""
    changes: dict[str, Value]
    """Fields that differ from the base, by name."""
    variant: str | None
    seed: int
    config: RunConfig
