"""Every field of a run, once: its name is the TOML key and the flag, its sentence is the help text.

In: values. Out: frozen, complete, checked models; `config` makes them from presets, files and flags, and is the
module to import them from. The sections are in `model_config` and `training_config`. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator
from pydantic.fields import FieldInfo

from bytekiln.console import nearest
from bytekiln.errors import ConfigError
from bytekiln.model_config import ModelConfig
from bytekiln.section import Section, Value, setting
from bytekiln.training_config import DataConfig, OptimizerConfig, TrainingConfig


class OutputConfig(Section):
    """The run folder, and who else is told."""

    out_dir: str = setting("", "run folder; unset: save_dir/run_name", main=True, math=False)
    save_dir: str = setting("runs", "folder of run folders", math=False)
    run_name: str = setting("", "name of the run in save_dir; unset: the preset's name", math=False)
    checkpoint_dir: str = setting("", "folder of checkpoints; unset: checkpoints in the run folder", math=False)
    metrics_path: str = setting("", "metrics file; unset: metrics.csv in the run folder", math=False)
    tensorboard: bool = setting(False, "write the curves for TensorBoard too (extra: track)", main=True, math=False)
    tensorboard_dir: str = setting(
        "", "folder of TensorBoard's files; unset: tensorboard in the run folder", math=False
    )
    wandb: bool = setting(
        False, "send config, curves and the final model to Weights & Biases (extra: track)", math=False
    )
    wandb_project: str = setting("bytekiln", "project there", math=False)
    wandb_mode: Literal["online", "offline"] = setting("online", "offline: write for a later `wandb sync`", math=False)
    record: bool = setting(
        False, "write record.json at the end: config, hardware, time, loss, curve, revision of the code", math=False
    )
    preset: str = setting("", "preset that the run was made from")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out_dir) if self.out_dir else Path(self.save_dir) / (self.run_name or self.preset or "run")

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return Path(self.checkpoint_dir) if self.checkpoint_dir else self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return Path(self.metrics_path) if self.metrics_path else self.folder / "metrics.csv"

    @property
    def tensorboard_folder(self) -> Path:
        """The folder of TensorBoard's files."""
        return Path(self.tensorboard_dir) if self.tensorboard_dir else self.folder / "tensorboard"


class RunConfig(Section):
    """Everything about a run; stored in its folder and in every checkpoint."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    output: OutputConfig = OutputConfig()

    @property
    def decay_end(self) -> int:
        """The step at which the decay ends."""
        return self.optimizer.decay_steps or self.training.max_steps

    @property
    def eval_context(self) -> int:
        """Tokens in a window of evaluations."""
        return self.training.eval_context_length or self.model.context_length

    @property
    def eval_batch_size(self) -> int:
        """Windows in a batch of evaluations: as many tokens as a micro-step has, or nearly so."""
        return max(1, self.training.batch_size * self.model.context_length // self.eval_context)

    @property
    def progress(self) -> str:
        """What the schedule counts: steps, tokens or seconds."""
        if self.optimizer.progress != "auto":
            return self.optimizer.progress
        return "seconds" if self.training.max_time else "tokens" if self.training.token_budget else "steps"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        m, d, o, t = self.model, self.data, self.optimizer, self.training
        mlm = t.objective == "mlm"
        if mlm and m.causal is True:
            raise ConfigError(
                "causal: found true with objective mlm; expected false or auto: "
                "a masked token is predicted from both sides"
            )
        if not mlm and m.bidirectional:
            raise ConfigError(
                "causal: found false with objective next_token; expected true or auto: "
                "each position would see its own target"
            )
        if mlm and m.causal == "auto":
            self.settle(model=m.model_copy(update={"causal": False}))  # type: ignore[arg-type]
            if m.sliding_window:
                raise ConfigError("sliding_window: found one with objective mlm; expected none, it looks back only")
        if mlm and d.token_corruption:
            raise ConfigError("token_corruption: found a share with objective mlm; expected 0: mlm masks by mlm_share")
        if d.windows != "stream" and d.sampling == "random":
            raise ConfigError(
                f"sampling: found random with windows {d.windows}; expected shuffled or sequential: "
                "a document starts where it starts"
            )
        if t.eval_context_length > m.max_seq_len:
            raise ConfigError(
                f"eval_context_length: found {t.eval_context_length}; expected at most max_seq_len, {m.max_seq_len}"
            )
        if t.final_eval == "whole" and t.early_stopping_patience:
            raise ConfigError(
                "final_eval: found whole with early_stopping_patience; expected same: nobody knows of an evaluation "
                "that it is the last one before it is made"
            )
        needs = {"seconds": ("max_time", t.max_time), "tokens": ("token_budget", t.token_budget)}
        name, budget = needs.get(self.progress, ("", 1))
        if not budget:
            raise ConfigError(f"progress: found {o.progress} without {name}; expected {name}, by which it is measured")
        return self

    def flat(self) -> dict[str, Value]:
        """Every field that has a value, by name."""
        return {
            name: value
            for section in SECTIONS
            for name, value in getattr(self, section).model_dump().items()
            if value is not None
        }

    def with_(self, **values: Value) -> RunConfig:
        """The same run with some fields changed."""
        base = self.flat()
        for name in unsaid(values):
            base.pop(name, None)
        return from_flat({**base, **values})

    def to_toml(self) -> str:
        """The run as a TOML file; `load_config` reads it back."""
        out = ["# bytekiln run; `lm-train` with this file's path repeats it"]
        for section in SECTIONS:
            out += ["", f"[{section}]"]
            values = getattr(self, section).model_dump()
            out += [f"{k} = {_toml(v)}" for k, v in values.items() if v is not None]
        return "\n".join(out) + "\n"


def unsaid(said: Mapping[str, object]) -> list[str]:
    """Of the two ways to say a feed-forward's width the one that yields to what was said."""
    pairs = (("ffn_multiple", "d_ff"), ("d_ff", "ffn_multiple"))
    return [other for one, other in pairs if one in said and other not in said and str(said[one]) not in ("0", "0.0")]


ABOVE_0: tuple[Value, ...] = ()
DECAYS = (("decay_lr", (True,)), ("schedule", ("linear", "cosine", "trapezoid", "inverse_sqrt")))
NEEDS: dict[str, tuple[tuple[str, tuple[Value, ...]], ...]] = {
    "beta1": (("optimizer", ("adamw", "lion", "muon")),),
    "beta2": (("optimizer", ("adamw", "lion", "muon")),),
    "eps": (("optimizer", ("adamw", "muon")),),
    "momentum": (("optimizer", ("muon", "sgd")),),
    "nesterov": (("optimizer", ("muon", "sgd")),),
    "ns_steps": (("optimizer", ("muon",)),),
    "ns_coefficients": (("optimizer", ("muon",)),),
    "muon_scale": (("optimizer", ("muon",)),),
    "normuon": (("optimizer", ("muon",)),),
    "normuon_beta2": (("optimizer", ("muon",)), ("normuon", (True,))),
    "attention_dropout": (("dropout", ABOVE_0),),
    "decay_embeddings": (("weight_decay", ABOVE_0),),
    "cautious_weight_decay": (("weight_decay", ABOVE_0),),
    "head_lr_scale": (("tie_embeddings", (False,)),),
    "schedule": DECAYS[:1],
    "min_lr": DECAYS,
    "min_lr_ratio": DECAYS,
    "decay_steps": (*DECAYS, ("progress", ("steps",))),
    "decay_fraction": (DECAYS[0], ("schedule", ("trapezoid",))),
    "ema_decay": (("averaging", ("ema",)),),
    "tail_fraction": (("averaging", ("tail",)),),
    "mlm_share": (("objective", ("mlm",)),),
    "max_time_counts": (("max_time", ABOVE_0),),
    "early_stopping_min_delta": (("early_stopping_patience", ABOVE_0),),
    "spike_sigma": (("skip_spikes", (True,)),),
    "wandb_project": (("wandb", (True,)),),
    "wandb_mode": (("wandb", (True,)),),
}
"""Fields that nothing reads unless others have one of these values. Those of the model are refused by `ModelConfig`."""


def refuse_idle(config: RunConfig, said: Collection[str], before: RunConfig | None = None) -> None:
    """Refuse a field that was said on purpose and that nothing in the run reads.

    A field's default, and the value that the run (its preset, where it is new) had `before`, ask for nothing. What
    says how the rate falls may stand beside a `decay_lr` that is said to be off, as in nanoGPT's lines.

    Raises:
        ConfigError: names what would switch it on.
    """
    values: dict[str, Value] = {**config.flat(), "progress": config.progress}
    had = before.flat() if before is not None else {}
    no_decay = "decay_lr" in said and not config.optimizer.decay_lr
    for name in (n for n in said if n in NEEDS):
        value = values.get(name)
        if value is None or value in (FIELDS[name].default, had.get(name)) or (name, value) == ("schedule", "constant"):
            continue
        if no_decay and NEEDS[name][0] == DECAYS[0]:
            continue
        for other, wanted in NEEDS[name]:
            found = values[other]
            if found not in wanted if wanted else not found:
                choices = [_plain(v) for v in wanted]
                would = " or ".join([", ".join(choices[:-1]), choices[-1]] if choices[1:] else choices)
                raise ConfigError(
                    f"{name}: found {_plain(value)} with {other} {_plain(found)}; expected {other} "
                    f"{f'= {would}' if wanted else 'above 0'}, without which nothing reads it"
                )


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "output": OutputConfig,
}
FIELDS: dict[str, FieldInfo] = {name: info for s in SECTIONS.values() for name, info in s.model_fields.items()}
SECTION_OF: dict[str, str] = {name: section for section, s in SECTIONS.items() for name in s.model_fields}


def extra_of(name: str, key: str) -> Any:  # noqa: ANN401 - heterogeneous by nature
    """What `setting` noted about a field: `also`, `main` or `math`."""
    extra = FIELDS[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra[key]


def alone(name: str, value: object) -> Value | None:
    """A field's value as the field holds it, whatever the others are.

    >>> alone("d_model", "65"), alone("schedule", "wsd")
    (65, 'trapezoid')

    Raises:
        ConfigError: the field takes no such value.
    """
    section = SECTIONS[SECTION_OF[name]]
    checks = dict.fromkeys(section.__pydantic_decorators__.model_validators, model_validator(mode="after")(_as_it_is))
    bare = type(section.__name__, (section,), {"__module__": __name__, **checks})
    held: Value | None = getattr(bare(**{name: value}), name)
    return held


def _as_it_is(section: Section) -> Section:
    return section


def from_flat(values: Mapping[str, object]) -> RunConfig:
    """A run from field names without sections.

    Raises:
        ConfigError: unknown field, value out of range, contradiction.
    """
    by_section: dict[str, Any] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        if name not in FIELDS:
            meant = nearest(name, FIELDS)
            raise ConfigError(f"config: unknown field {name}" + (f"; did you mean {meant}?" if meant else ""))
        by_section[SECTION_OF[name]][name] = value
    return RunConfig(**by_section)


def _plain(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else _toml(value)


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
