"""What is decided before a run's first step: device, number type, compiler, checkpoint to go on from.

In: a config as the user gave it. Out: the one that is stored. Called by `train`.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytekiln.accounting import flops_per_token, parameter_count
from bytekiln.attention import Attend, activate_flash, choose
from bytekiln.batch import Batch
from bytekiln.block import is_one_operation
from bytekiln.checkpoint import Checkpoint, checkpoints_in, load_checkpoint, newest_whole, resolve
from bytekiln.config import (
    UNLIMITED_STEPS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    Value,
    alone,
    canonical,
    changed_mathematics,
    extra_of,
)
from bytekiln.convert import load_initial
from bytekiln.data import train_paths
from bytekiln.errors import ConfigError, FileError, MismatchError
from bytekiln.known import KNOWN
from bytekiln.model import TransformerLM
from bytekiln.muon import has_fast_bf16
from bytekiln.objective import has_documents

Say = Callable[[str], object]
COMPILE_COST_S, COMPILE_GAIN, CPU_FLOPS_PER_THREAD = 30.0, 0.2, 5e10
"""What torch.compile costs and brings on a CPU (measured: 27 s cold, 1.25 times as fast), to decide `auto`."""
TWIN_FIELDS = (
    "dense_twin",
    "ffn",
    "d_ff",
    "num_experts",
    "expert_top_k",
    "num_shared_experts",
    "expert_ffn",
    "router_noise",
    "load_balancing",
    "load_balancing_weight",
)
"""What `dense_twin` settles anew."""
PATHS = (
    "train_data",
    "val_data",
    "tokenizer",
    "vocab_path",
    "merges_path",
    "init_from",
    "checkpoint_dir",
    "metrics_path",
    "tensorboard_dir",
)
"""Fields that are stored as absolute paths, so that a run can be repeated from any folder."""


LEFT_OPEN = {"vocab_size": "0", "precision": "auto"}
"""Values that leave a choice to us: on a resume it has been made. Every other value is meant, 0 and false too."""
MEASURE = {"max_time": "seconds", "token_budget": "tokens"}
"""Limits, and what the schedule counts where they end it."""


def find_checkpoint(
    config: RunConfig,
    resume: str,
    given: Mapping[str, object] | None,
    notice: Say,
    changes: Collection[str] = (),
    eval_only: bool = False,
) -> tuple[RunConfig, Checkpoint | None]:
    """The checkpoint to go on from, and the run's own config with what was given on top.

    Args:
        eval_only: the optimizer and the data to train on do not matter; fields of theirs may have any value.
    """
    values: dict[str, object] = {canonical(k, "given"): v for k, v in (given or {}).items()}
    for name, left_open in LEFT_OPEN.items():
        if str(values.get(name, "")) == left_open:  # the run has chosen already
            values.pop(name)
    o = config.output
    if resume == "auto":
        found = newest_whole(o.checkpoints, notice)
        if found is None:
            if next(checkpoints_in(o.checkpoints), None) is not None:
                raise FileError(
                    f"{o.checkpoints}: found damaged checkpoints only; expected a whole one (--overwrite starts anew)"
                )
            notice(f"{o.folder}: no checkpoint to resume from; starting at step 0")
            return config, None
        path, checkpoint = found
        values.setdefault("out_dir", str(o.folder))
        for name in ("checkpoint_dir", "metrics_path"):
            if getattr(o, name):
                values.setdefault(name, getattr(o, name))
    else:
        path = resolve(resume)
        checkpoint = load_checkpoint(path)
        _place(path, checkpoint.config, values)
    stored = checkpoint.config
    before = stored.optimizer
    usual = before.lr * before.min_lr_ratio
    decays = before.decay_lr and before.schedule != "constant"
    if decays and before.min_lr is None and math.isclose(_number(values.get("min_lr")), usual, rel_tol=1e-9):
        values.pop("min_lr")  # says what the ratio makes it, to the last digit or nearly so
    if values.get("init_from"):
        values["init_from"] = str(Path(str(values["init_from"])).absolute())
    if str(values.get("dense_twin", "")).lower() in ("true", "1", "yes", "on") and stored.model.ffn != "moe":
        # The run is the twin already: what made it is no change of it.
        for name in TWIN_FIELDS:
            values.pop(name, None)
    allowed = allowed_changes(changes)
    if "windows" in allowed and str(values.get("windows", "stream")) != "stream" and "sampling" not in values:
        values["sampling"] = DataConfig().sampling  # what a preset pins goes with windows of the stream alone
        allowed.add("sampling")
    if eval_only:
        allowed |= {*DataConfig.model_fields, *OptimizerConfig.model_fields, *TrainingConfig.model_fields}
    anew = {n: _number(alone(n, values[n])) for n in ("lr", "min_lr_ratio") if n in values and n in allowed}
    lr, ratio = anew.get("lr", before.lr), anew.get("min_lr_ratio", before.min_lr_ratio)
    if before.min_lr is not None and "min_lr" not in values and (lr, ratio) != (before.lr, before.min_lr_ratio):
        values["min_lr"] = float(f"{lr * ratio:.12g}")  # follows, as in a new run
        allowed.add("min_lr")
    if "progress" in allowed and "max_steps" not in values and _limited(values):
        values["max_steps"] = UNLIMITED_STEPS
    where = f"with which the run in {path} was started"
    try:
        wanted = stored.with_(**values)  # type: ignore[arg-type]
    except ConfigError:
        _refuse_changes(stored, values, allowed, where)  # the change itself, not what it does not go together with
        raise
    names: Iterable[str] = values
    if given is None:  # what the config says that is not merely every field's default
        defaults, said = RunConfig().flat(), config.flat()
        names = [n for n in said if said[n] != defaults.get(n)]
    if wanted.progress != stored.progress and "progress" not in allowed and given is not None:
        raise MismatchError(
            f"progress: found {wanted.progress}; expected {stored.progress}, by which the run in {path} measures its "
            "schedule (--allow-change progress goes on with the new measure)"
        )
    for name, was, now in changed_mathematics(stored, wanted if given is not None else config, names):
        if name not in allowed:
            raise MismatchError(
                f"{name}: found {now}; expected {was}, {where} (--allow-change {name} goes on with the new value)"
            )
        if not eval_only:
            notice(f"{name}: changes from {was} to {now} at step {checkpoint.step}, as allowed")
    was, now = stored.training.max_steps, wanted.training.max_steps
    if now < checkpoint.step:
        raise ConfigError(f"max_steps: found {now}; expected at least {checkpoint.step}, the step of {path}")
    if now != was and stored.optimizer.decay_lr and not stored.optimizer.decay_steps:
        verb = "rises" if now > was else "falls"
        notice(f"max_steps {verb} from {was} to {now}; the decay now ends there too")
    for name in ("max_time", "token_budget"):
        limit, before = getattr(wanted.training, name), getattr(stored.training, name)
        if limit != before and stored.optimizer.decay_lr and wanted.progress == MEASURE[name]:
            notice(f"{name} changes from {before:g} to {limit:g}; the decay now ends there too")
    return wanted, checkpoint


def _refuse_changes(stored: RunConfig, values: Mapping[str, object], allowed: Collection[str], where: str) -> None:
    before = stored.flat()
    for name, value in values.items():
        now = alone(name, value)
        if extra_of(name, "math") and name not in allowed and now != before.get(name):
            raise MismatchError(f"{name}: found {now}; expected {before.get(name)}, {where}")


def allowed_changes(changes: Collection[str]) -> set[str]:
    """The fields that --allow-change names, any spelling."""
    return {canonical(c, "--allow-change") for c in changes}


def _place(path: Path, stored: RunConfig, values: dict[str, object]) -> None:
    """Where a run goes on that is resumed by its checkpoint's path: where it was, or where it was moved to."""
    if not {"out_dir", "run_name", "save_dir"} & set(values):
        moved = path.resolve().parent.parent
        ours = _is_resolved_config(moved / "config.toml")
        if path.resolve().parent.name == "checkpoints" and not stored.output.checkpoint_dir and ours:
            values["out_dir"] = str(moved)
        return
    values.setdefault("out_dir", "")
    wanted = stored.with_(**values)  # type: ignore[arg-type]
    if wanted.output.folder.resolve() != stored.output.folder.resolve():
        for name in ("checkpoint_dir", "metrics_path", "tensorboard_dir"):
            values.setdefault(name, "")


def _is_resolved_config(path: Path) -> bool:
    try:
        with path.open("rb") as f:
            return f.readline().startswith(b"# bytekiln run")
    except OSError:
        return False


def _limited(values: Mapping[str, object]) -> bool:
    """Whether one of the values is a limit by time or tokens; a zero takes one away."""
    return any(name in values and alone(name, values[name]) for name in MEASURE)


def _number(value: object) -> float:
    """The value as a number, NaN where it is none: that is for the field itself to refuse."""
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def resolved(config: RunConfig, vocab_size: int, device: torch.device, say: Say) -> RunConfig:
    """Every choice made, every path absolute: what is stored."""
    t, o = config.training, config.output
    chosen: dict[str, Value] = {"vocab_size": vocab_size, "out_dir": str(o.folder.absolute())}
    for name in PATHS:
        if value := str(config.flat().get(name) or ""):
            parts = train_paths(value) if name == "train_data" else [value]
            if name == "tokenizer" and value in KNOWN and not Path(value).exists():
                continue  # a name, which means the same everywhere
            chosen[name] = ",".join(str(Path(part).absolute()) for part in parts)
    if t.precision == "auto":
        chosen["precision"] = "bf16" if _bf16_is_fast(device) else "fp32"
    if t.compile == "auto":
        known = {name: chosen[name] for name in ("vocab_size", "precision") if name in chosen}
        chosen["compile"], why = _worth_compiling(config.with_(**known), device)
        say(f"torch.compile: {'on' if chosen['compile'] else 'off'} ({why})")
    return config.with_(**chosen)


def _worth_compiling(config: RunConfig, device: torch.device) -> tuple[bool, str]:
    t = config.training
    if device.type == "cuda":
        return (True, "a GPU, and more than 200 steps") if t.max_steps > 200 else (False, "200 steps or fewer")
    if device.type != "cpu":
        return False, f"not tried on {device.type}"
    blocks = t.precision == "fp32" and t.attention in ("auto", "native") and not has_documents(config)
    if blocks and is_one_operation(config.model):
        return False, "the core's own blocks are faster than what it makes"
    tokens = t.max_steps * t.batch_size * t.grad_accum_steps * config.model.context_length
    seconds = flops_per_token(config.model) * tokens / (CPU_FLOPS_PER_THREAD * torch.get_num_threads())
    if t.max_time:
        seconds = min(seconds, t.max_time)
    gain = seconds * COMPILE_GAIN
    pays = gain > 2 * COMPILE_COST_S
    return pays, f"would save about {gain:.0f} s of {seconds:.0f} s and costs about {COMPILE_COST_S:.0f} s"


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # Without AMX bf16 loses: emulated it takes dozens of times as long as fp32, and with AVX-512-BF16 alone a step
    # takes twice as long (measured): conversions and torch's slower kernels cost more than the products gain.
    return has_fast_bf16(device)


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a config's name means; with several processes a machine, `cuda` is each one's own.

    Raises:
        ConfigError: there is no such device here.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local_rank}"
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device: found {name}; expected auto, cpu, cuda, cuda:N or mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if not count:
        raise ConfigError(f"device: found {name}; this machine has no {device.type} device; expected cpu or auto")
    if (device.index or 0) >= count:
        raise ConfigError(f"device: found {name}; expected one of the {count} {device.type} devices of this machine")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks for the next step instead of giving them back to the kernel.

    A step allocates and frees the same tens of megabytes of activations and logits again and again; by default each
    is mapped, zeroed page by page and unmapped. Measured on two cores (demo preset): a quarter of the time went to
    the kernel, and 10,800 tokens a second instead of 6,900. Results do not change. Elsewhere than glibc: nothing.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def make_model(config: ModelConfig, device: torch.device, attend: Attend | None = None) -> TransformerLM:
    """The model, freshly initialised.

    Raises:
        MemoryError: it does not fit.
    """
    try:
        return TransformerLM(config, attend=attend).to(device)
    except RuntimeError as exc:
        if not isinstance(exc, torch.OutOfMemoryError) and "memory" not in str(exc):
            raise
        wanted = f"a model of {parameter_count(config):,} parameters"
        raise MemoryError(f"{wanted} does not fit; expected a smaller one (lm-plan tells what would fit)") from None


def attention_of(config: RunConfig, device: torch.device) -> Attend:
    """The attention kernel of the run; what it calls on CUDA is chosen here, too.

    Raises:
        ConfigError: it does not work on this device.
    """
    t = config.training
    activate_flash(t.flash, config.model, device, t.precision)
    return choose(t.attention, config.model, device, config.data.document_mask)


def initial_weights(config: RunConfig, say: Say) -> dict[str, Tensor]:
    """The weights that `init_from` names."""
    say(f"Starting from the weights of {config.training.init_from}")
    return load_initial(config.training.init_from, config.model, say, say)


def compiled(loss: nn.Module, batch: Batch, notice: Say) -> Callable[..., Any]:
    """The objective compiled and tried once on a batch of the run; or itself, where the compiler fails."""
    faster = torch.compile(loss)
    try:
        faster(*batch[:3]).total.backward()
    except Exception as exc:  # whatever the compiler's many parts raise, training can go on without it
        notice(f"torch.compile failed, going on without it: {type(exc).__name__}: {str(exc).splitlines()[0][:200]}")
        return loss
    return faster


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process so far."""
    counters = importlib.import_module("torch._dynamo.utils").counters
    return int(counters["stats"]["unique_graphs"])
