"""Every field of a run, once: its name is the TOML key and the flag, its sentence is the help text.

In: values. Out: frozen, complete, checked models; `config` makes them from presets, files and flags, and is the
module to import them from. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from bytekiln.console import nearest
from bytekiln.errors import ConfigError

Value = str | int | float | bool
"""What a field can hold in a file or a flag."""


def _whole(value: object) -> object:
    """Let `1e5` and `40_000.0` be integers, as people write them."""
    if isinstance(value, str) and any(c in value for c in ".eE"):
        with suppress(ValueError):
            value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
Float = Annotated[float, Field(allow_inf_nan=False)]


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
            raise ConfigError(_in_our_words(exc)) from None


class ModelConfig(Section):
    """The shape of a Transformer; all that `TransformerLM` needs to know."""

    vocab_size: Int = setting(
        0, "tokens in the vocabulary; 0: what the tokenizer or the data's manifest says", main=True, ge=0
    )
    context_length: Int = setting(512, "tokens in a training window", also=["block_size"], main=True, ge=1)
    max_seq_len: Int = setting(0, "positions that the model can take; 0: context_length", ge=0)
    d_model: Int = setting(768, "width of the residual stream", also=["n_embd"], main=True, ge=1)
    num_layers: Int = setting(12, "Transformer blocks", also=["n_layers", "n_layer"], main=True, ge=1)
    num_heads: Int = setting(12, "attention heads; must divide d_model", also=["n_heads", "n_head"], main=True, ge=1)
    d_ff: Int = setting(0, "width of the feed-forward; 0: ffn_multiple times d_model", main=True, ge=0)
    ffn_multiple: Float = setting(
        0.0, "d_ff over d_model where d_ff is unset; 0: 8/3 rounded to 64 for swiglu, else 4", ge=0
    )
    rope_theta: Float = setting(10000.0, "base of the rotary position angles", gt=0)
    norm: Literal["rms", "layer", "none"] = setting("rms", "normalisation: RMSNorm, LayerNorm without bias, or none")
    norm_position: Literal["pre", "post"] = setting("pre", "normalise before each sub-layer or after its residual sum")
    position: Literal["rope", "learned", "none"] = setting("rope", "how the model knows where a token stands")
    ffn: Literal["swiglu", "silu", "gelu"] = setting(
        "swiglu", "feed-forward: gated SwiGLU (three matrices) or a plain activation (two)", also=["ffn_type"]
    )
    tie_embeddings: bool = setting(False, "share one matrix between the token embedding and the output head")
    dropout: Float = setting(0.0, "share of activations dropped while training", main=True, ge=0, lt=1)
    init: Literal["course", "gpt2"] = setting(
        "course", "initialisation: truncated normal by fan (course) or sigma 0.02 (gpt2)"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.d_model % self.num_heads or (self.position == "rope" and self.d_model // self.num_heads % 2):
            raise ConfigError(_heads_that_would_do(self.d_model, self.num_heads, self.position == "rope"))
        if not self.d_ff:
            multiple = self.ffn_multiple or (0.0 if self.ffn == "swiglu" else 4.0)
            width = round(multiple * self.d_model) if multiple else max(64, round(self.d_model * 8 / 3 / 64) * 64)
            object.__setattr__(self, "d_ff", width)
        if not self.max_seq_len:
            object.__setattr__(self, "max_seq_len", self.context_length)
        if self.max_seq_len < self.context_length:
            raise ConfigError(
                f"max_seq_len: found {self.max_seq_len}; expected at least context_length, {self.context_length}"
            )
        return self


class DataConfig(Section):
    """Where the tokens come from."""

    train_data: str = setting(
        "", "token file to train on (.npy or .bin, from bpe-encode)", also=["train_path"], main=True, math=False
    )
    val_data: str = setting(
        "", "token file to validate on; optional", also=["valid_path", "val_path", "valid_data"], main=True, math=False
    )
    tokenizer: str = setting(
        "", "tokenizer of the data: checked against it, copied into the run, used for samples", main=True, math=False
    )
    vocab_path: str = setting("", "tokenizer as a pair of files: the vocabulary", math=False)
    merges_path: str = setting("", "tokenizer as a pair of files: the merges", math=False)
    data_dtype: Literal["", "uint16", "uint32", "int32", "int64"] = setting(
        "", "type of the ids in a raw .bin without manifest", math=False
    )


class OptimizerConfig(Section):
    """AdamW, its learning-rate schedule and clipping."""

    lr: Float = setting(3e-4, "peak learning rate", also=["max_lr", "learning_rate"], main=True, gt=0)
    min_lr: Float | None = setting(
        None, "learning rate at the end of the decay; unset: min_lr_ratio times lr", main=True, ge=0
    )
    min_lr_ratio: Float = setting(0.1, "min_lr over lr where min_lr is unset", ge=0, le=1)
    warmup_steps: Int = setting(0, "steps of linear warm-up", also=["warmup_iters"], main=True, ge=0)
    warmup_rule: Literal["course", "nanogpt"] = setting(
        "course", "warm-up of step t (from 0) over T: t/T (course) or (t+1)/(T+1) (nanogpt)"
    )
    decay_lr: bool = setting(True, "cosine decay after the warm-up; false: constant", main=True)
    decay_steps: Int = setting(
        0, "step at which the decay ends, warm-up included; 0: max_steps", also=["cosine_iters", "lr_decay_iters"], ge=0
    )
    weight_decay: Float = setting(0.01, "decoupled weight decay, on matrices only", main=True, ge=0)
    beta1: Float = setting(0.9, "AdamW: decay of the mean of gradients", ge=0, lt=1)
    beta2: Float = setting(0.999, "AdamW: decay of the mean of squared gradients", ge=0, lt=1)
    eps: Float = setting(1e-8, "AdamW: added to the denominator", gt=0)
    grad_clip: Float = setting(
        1.0, "largest norm of the gradient; 0: no clipping", also=["max_grad_norm"], main=True, ge=0
    )

    @property
    def floor_lr(self) -> float:
        """Learning rate at the end of the decay."""
        return self.min_lr if self.min_lr is not None else self.lr * self.min_lr_ratio

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ConfigError(f"min_lr: found {self.min_lr:g}; expected at most lr, {self.lr:g}")
        return self


class TrainingConfig(Section):
    """The loop: how many steps, on what, and what is done in between."""

    batch_size: Int = setting(32, "windows in a micro-step", main=True, ge=1)
    grad_accum_steps: Int = setting(
        1, "micro-steps in an optimizer step", also=["gradient_accumulation_steps"], main=True, ge=1
    )
    max_steps: Int = setting(
        100_000,
        "optimizer steps in all, those before a resume included",
        also=["max_iters"],
        main=True,
        math=False,
        ge=1,
    )
    eval_interval: Int = setting(
        1000, "steps between evaluations; 0: only at the start and the end", main=True, math=False, ge=0
    )
    num_eval_batches: Int = setting(
        100,
        "batches in an evaluation, of validation and of training data each",
        also=["eval_iters"],
        main=True,
        math=False,
        ge=1,
    )
    log_interval: Int = setting(
        100, "steps between lines on the console (metrics.csv has every step)", math=False, ge=1
    )
    checkpoint_interval: Int = setting(
        5000,
        "steps between checkpoints; 0: only the best and the final one",
        also=["save_interval"],
        main=True,
        math=False,
        ge=0,
    )
    keep_checkpoints: Int = setting(0, "numbered checkpoints kept, newest first; 0: all", math=False, ge=0)
    seed: Int = setting(42, "seed of initialisation, data order and dropout", main=True, ge=0, le=2**63 - 1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", main=True, math=False)
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        "type of the matrix products; weights stay fp32; auto: bf16 where the hardware has instructions for it",
        also=["dtype"],
        main=True,
    )
    compile: bool | Literal["auto"] = setting(
        "auto", "torch.compile: true, false, or auto (only where it pays for itself)", main=True, math=False
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _torchs_names(cls, value: object) -> object:
        if value in ("float16", "fp16", "half"):
            raise ConfigError(f"precision: found {value}, which needs loss scaling; expected bf16 or fp32")
        return {"bfloat16": "bf16", "float32": "fp32"}.get(str(value), value)


class OutputConfig(Section):
    """The run folder."""

    out_dir: str = setting("", "run folder; unset: save_dir/run_name", main=True, math=False)
    save_dir: str = setting("runs", "folder of run folders", math=False)
    run_name: str = setting("", "name of the run in save_dir; unset: the preset's name", math=False)
    checkpoint_dir: str = setting("", "folder of checkpoints; unset: checkpoints in the run folder", math=False)
    metrics_path: str = setting("", "metrics file; unset: metrics.csv in the run folder", math=False)
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
        return from_flat({**self.flat(), **values})

    def to_toml(self) -> str:
        """The run as a TOML file; `load_config` reads it back."""
        out = ["# bytekiln run; `lm-train` with this file's path repeats it"]
        for section in SECTIONS:
            out += ["", f"[{section}]"]
            values = getattr(self, section).model_dump()
            out += [f"{k} = {_toml(v)}" for k, v in values.items() if v is not None]
        return "\n".join(out) + "\n"


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


def from_flat(values: Mapping[str, object]) -> RunConfig:
    """A run from field names without sections.

    Raises:
        ConfigError: unknown field, value out of range, contradiction.
    """
    by_section: dict[str, Any] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        if name not in FIELDS:
            raise ConfigError(f"config: {_unknown('field', name)}")
        by_section[SECTION_OF[name]][name] = value
    return RunConfig(**by_section)


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _heads_that_would_do(d_model: int, found: int, rope: bool) -> str:
    fits = [h for h in range(1, d_model + 1) if d_model % h == 0 and not (rope and d_model // h % 2)]
    fits = sorted(sorted(fits, key=lambda h: abs(math.log(h / found)))[:4])
    why = "rotary positions need an even width a head, and " if rope and d_model % found == 0 else ""
    would = f"{', '.join(map(str, fits))} would do" if fits else "an even d_model is needed"
    return f"num_heads: found {found} for d_model {d_model}; {why}expected a divisor of {d_model}: {would}"


def _unknown(what: str, name: str) -> str:
    meant = nearest(name, FIELDS)
    return f"unknown {what} {name}" + (f"; did you mean {meant}?" if meant else "")


def _in_our_words(exc: ValidationError) -> str:
    said = []
    for e in exc.errors():
        own = e.get("ctx", {}).get("error")
        if isinstance(own, Exception):
            said.append(str(own))
            continue
        name = next((str(p) for p in reversed(e["loc"]) if p in FIELDS), ".".join(map(str, e["loc"])))
        if e["type"] == "extra_forbidden":
            said.append(_unknown("key", str(e["loc"][-1])))
        else:
            said.append(f"{name}: found {e['input']!r}; expected {e['msg'].removeprefix('Input should be ')}")
    return "; ".join(dict.fromkeys(said))
