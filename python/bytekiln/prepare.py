"""What is decided before a run's first step: device, number type, compiler, run folder, checkpoint to go on from.

In: a config as the user gave it. Out: the one that is stored. Called by `train`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bytekiln.checkpoint import Checkpoint, checkpoints_in, load_checkpoint, newest_whole, remove_old, resolve
from bytekiln.config import RunConfig, Value, canonical, changed_mathematics
from bytekiln.errors import ConfigError, FileError, MismatchError, OutputExistsError
from bytekiln.model import parameter_count

Say = Callable[[str], object]
OWN_FILES = ("config.toml", "metrics.csv", "result.json", "tokenizer.json", "checkpoints")
COMPILE_COST_S, COMPILE_GAIN, CPU_FLOPS_PER_THREAD = 30.0, 0.2, 5e10
"""What torch.compile costs and brings on a CPU (measured: 27 s cold, 1.25 times as fast), to decide `auto`."""


def find_checkpoint(
    config: RunConfig, resume: str, given: Mapping[str, object], notice: Say
) -> tuple[RunConfig, Checkpoint | None]:
    """The checkpoint to go on from, and the run's own config with what was given on top."""
    if resume == "auto":
        found = newest_whole(config.output.checkpoints, notice)
        if found is None:
            if next(checkpoints_in(config.output.checkpoints), None) is not None:
                raise FileError(
                    f"{config.output.checkpoints}: found damaged checkpoints only; "
                    "expected a whole one (--overwrite starts anew)"
                )
            notice(f"{config.output.folder}: no checkpoint to resume from; starting at step 0")
            return config, None
        path, checkpoint = found
    else:
        path = resolve(resume)
        checkpoint = load_checkpoint(path)
    stored, values = checkpoint.config, {canonical(k, "given"): v for k, v in given.items()}
    if "out_dir" not in values and (path.parent.parent / "config.toml").is_file():
        values["out_dir"] = str(path.parent.parent)
    wanted = stored.with_(**values)  # type: ignore[arg-type]
    for name, was, now in changed_mathematics(stored, wanted, values):
        raise MismatchError(f"{name}: found {now}; expected {was}, with which the run in {path} was started")
    if (
        wanted.training.max_steps > stored.training.max_steps
        and stored.optimizer.decay_lr
        and not stored.optimizer.decay_steps
    ):
        notice(
            f"max_steps rises from {stored.training.max_steps} to {wanted.training.max_steps}; "
            "the decay now ends there too"
        )
    return wanted, checkpoint


def resolved(config: RunConfig, vocab_size: int, device: torch.device, say: Say) -> RunConfig:
    """Every choice made, every path absolute: what is stored."""
    t, o = config.training, config.output
    chosen: dict[str, Value] = {"vocab_size": vocab_size, "out_dir": str(o.folder.absolute())}
    for name in ("train_data", "val_data", "tokenizer", "vocab_path", "merges_path", "checkpoint_dir", "metrics_path"):
        if value := config.flat().get(name):
            chosen[name] = str(Path(str(value)).absolute())
    if t.precision == "auto":
        chosen["precision"] = "bf16" if _bf16_is_fast(device) else "fp32"
    if t.compile == "auto":
        chosen["compile"], why = _worth_compiling(config.with_(vocab_size=vocab_size), device)
        say(f"torch.compile: {'on' if chosen['compile'] else 'off'} ({why})")
    return config.with_(**chosen)


def _worth_compiling(config: RunConfig, device: torch.device) -> tuple[bool, str]:
    t = config.training
    if device.type == "cuda":
        return (True, "a GPU, and more than 200 steps") if t.max_steps > 200 else (False, "200 steps or fewer")
    if device.type != "cpu":
        return False, f"not tried on {device.type}"
    tokens = t.max_steps * t.batch_size * t.grad_accum_steps * config.model.context_length
    seconds = 6 * parameter_count(config.model) * tokens / (CPU_FLOPS_PER_THREAD * torch.get_num_threads())
    gain = seconds * COMPILE_GAIN
    pays = gain > 2 * COMPILE_COST_S
    return pays, f"would save about {gain:.0f} s of {seconds:.0f} s and costs about {COMPILE_COST_S:.0f} s"


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # Without these instructions bf16 products are emulated, dozens of times slower than fp32.
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device: found {name}; expected auto, cpu, cuda, cuda:N or mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
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


def prepare_folder(config: RunConfig, overwrite: bool, *, resuming: bool) -> None:
    """Make the run folder, or refuse one that holds a run already."""
    folder = config.output.folder
    own = dict.fromkeys([*(folder / name for name in OWN_FILES), config.output.checkpoints, config.output.metrics])
    try:
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder}: found a file; expected a folder for the run")
        there = [p for p in own if p.exists() and not (p.is_dir() and not any(p.iterdir()))]
        if there and not resuming:
            if not overwrite:
                raise OutputExistsError(
                    f"{there[0]}: found an existing run; expected a free folder: --resume auto goes on with it, "
                    "--overwrite replaces it, --out-dir takes another name"
                )
            for path in there:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for parent in (folder, config.output.metrics.parent, config.output.checkpoints):
            parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise FileError(f"{folder}: no permission to write; expected a writable folder")
    except OSError as exc:
        if isinstance(exc, FileError | OutputExistsError):
            raise
        raise FileError(
            f"{exc.filename or folder}: {(exc.strerror or str(exc)).lower()}; expected a writable folder for the run"
        ) from None
    remove_old(config.output.checkpoints, 0)
