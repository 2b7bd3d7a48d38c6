"""What a run will need, before it runs: parameters, operations, memory, time, disk, and the largest batch that fits.

In: a `RunConfig` whose vocabulary is known. Out: a `Plan`. Called by `cli_plan`. Parameters and operations are exact
(`accounting`), memory is simulated (`footprint`). Time is that of a few steps taken now (`rehearsal`), or an estimate
from quick measurements (`hardware`), and on a GPU from the published utilisation of the trainer.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bytekiln.accounting import (
    TRAINING_OVER_FORWARD,
    active_parameter_count,
    forward_flops_by_part,
    parameter_count,
    parameters_by_part,
)
from bytekiln.batch_search import largest_batch
from bytekiln.config import RunConfig, stages_of
from bytekiln.errors import BytekilnError, ConfigError
from bytekiln.footprint import Footprint, Simulation
from bytekiln.hardware import available_bytes, device_name, gpu_memory, measure, memory_bytes, peak_flops
from bytekiln.loss import CHUNK_BYTES
from bytekiln.prepare import attention_of, find_device, resolved
from bytekiln.rehearsal import rehearse
from bytekiln.tokenfile import TokenFile
from bytekiln.yardstick import Prospect, load_yardstick, prospect

RESERVE = {"cpu": 700_000_000, "cuda": 1_000_000_000}
"""Memory of the process beside the step: torch's libraries (on the CPU measured: a run of next to nothing peaks at
720 MB), on a GPU its context and fragments of the allocator."""
HELD = {"cpu": 1.28, "cuda": 1.05}
"""What an allocator holds over what is in use: on the CPU measured, 1.11 to 1.28 with `prepare.keep_freed_memory`,
whose heap gets holes; on a GPU assumed."""
HOLES, LARGE = 4, 32_000_000
"""Holes of a CPU's heap, each as large as the largest block: measured where blocks are `LARGE`, as the score matrices
of attention with dropout are: 34 to 134 MB of 0.3 to 1 GB, planned within 10 %."""
GPU_UTILISATION = 0.4
"""Share of a GPU's peak that compiled training of small models reaches (published for one H100: 0.36 to 0.46)."""
COMPILED = 0.8
"""Time of a compiled step over that of an eager one on a CPU in fp32 (measured; in bf16 0.9, taken for 1)."""
CALL_COSTS = 2.5
"""What an operation of a model costs over one in a bare loop, with its gradient: modules, and a step's bookkeeping."""
REHEARSED_S, LONGEST_S = 0.5, 3.0
"""Steps that are taken to tell the time have as many windows as fit into the first; a model of which one window takes
longer than the second, as far as its rates tell, is not tried."""
REHEARSED_PARAMETERS = 30_000_000
"""Nor a larger one, whose weights take a second to draw, and Muon's update several."""
REHEARSED_MEMORY = 0.5
"""Share of the memory that is free, or of the limit that was given, that they may take."""
UNEVEN = 4 * CHUNK_BYTES
"""Bytes by which a peak may lie beside a straight line: chunks of a loss are as even as the batch lets them be."""
BATCHES_WITHOUT_VALIDATION = 100
"""What an evaluation of everything reads where there is no validation data, as in `train`."""
_ROUNDING = 1e-9
"""Shares of a run are quotients: a whole number of steps may come out a hair above it."""


class Estimate(NamedTuple):
    """Seconds, and what they rest on."""

    step_s: float
    """Of a step before any of `batch_stages`."""
    evaluation_s: float
    """Of one evaluation; 0 where nothing tells how much it reads."""
    last_evaluation_s: float
    """Of the last one, which may read more."""
    run_s: float
    basis: str


class StepTime(NamedTuple):
    """Seconds of a step's parts, and what they rest on."""

    micro_step_s: float
    """Forward and backward."""
    update_s: float
    """Clipping, optimizer and average, once a step; 0 where it is not told apart."""
    basis: str


class Length(NamedTuple):
    """How far a run goes."""

    steps: int
    tokens: int
    ends_by: str
    """The field that ends it: max_steps, token_budget or max_time."""


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it runs."""

    config: RunConfig
    device: str
    parameters: int
    active_parameters: int
    parameters_by_part: dict[str, int]
    flops_by_part: dict[str, int]
    """Training operations a token."""
    footprint: Footprint
    process_bytes: int
    """What the system will see: the peak, the allocator's holes, and the libraries."""
    memory_limit: int
    largest_batch: int | None
    """Windows in a micro-step; 0 where not even one fits, None where it was not looked for."""
    length: Length
    tokens_per_step: int
    """Before any of `batch_stages`."""
    evaluation_batches: int | None
    """Of validation and of training data each; None: the validation data does not tell its size."""
    time: Estimate
    checkpoint_bytes: int
    """One checkpoint."""
    checkpoints: int
    """How many are kept."""
    prospect: Prospect | None
    """What loss is to be expected, where the run names a yardstick."""

    @property
    def flops_per_token(self) -> int:
        """Forward and backward."""
        return sum(self.flops_by_part.values())

    def as_json(self) -> dict[str, object]:
        """What `lm-plan --json` prints."""
        f, m, t = self.footprint, self.config.model, self.config.training
        return {
            "preset": self.config.output.preset,
            "device": self.device,
            "precision": t.precision,
            "compile": t.compile,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "parameters_by_part": self.parameters_by_part,
            "flops_per_token": self.flops_per_token,
            "flops_per_token_by_part": self.flops_by_part,
            "forward_flops_per_sequence": self.flops_per_token * m.context_length // TRAINING_OVER_FORWARD,
            "batch_size": t.batch_size,
            "memory_bytes": {name: n for name, n in f._asdict().items() if name not in ("largest", "moved", "calls")},
            "process_bytes": self.process_bytes,
            "memory_limit_bytes": self.memory_limit,
            "largest_batch_size": self.largest_batch,
            "steps": self.length.steps,
            "ends_by": self.length.ends_by,
            "tokens_per_step": self.tokens_per_step,
            "tokens": self.length.tokens,
            "flops": self.flops_per_token * self.length.tokens,
            "evaluation_batches": self.evaluation_batches,
            "step_time_s": self.time.step_s,
            "evaluation_time_s": self.time.evaluation_s,
            "last_evaluation_time_s": self.time.last_evaluation_s,
            "run_time_s": self.time.run_s,
            "time_basis": self.time.basis,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoints": self.checkpoints,
            "prospect": None if self.prospect is None else self.prospect.as_json(),
        }


def make_plan(config: RunConfig, memory: int | None = None, gpu: str | None = None, *, largest: bool = True) -> Plan:
    """Plan a run.

    Args:
        config: the run; `vocab_size` must be known.
        memory: bytes that it may take; None: what the device has.
        gpu: plan for a GPU of this name, which need not be here: memory is simulated with torch's kernels for the CPU,
            which keep the same tensors but for attention with dropout, where they keep more.
        largest: whether to look for the largest batch, which takes some ten times as long as the rest.

    Raises:
        ConfigError: the device is not there or not known, or the config makes no sense.
    """
    if gpu is not None:
        memory = gpu_memory(gpu) if memory is None else memory
        config = _for_gpu(config, gpu, memory)
    device = find_device(config.training.device)
    config = resolved(config, config.model.vocab_size, device, lambda _: None)
    m, t = config.model, config.training
    simulation = Simulation(config, device, attention_of(config, device), foreign=gpu is not None)
    footprint = simulation.step(t.batch_size)
    limit = memory if memory is not None else memory_bytes(device)
    kind, name = ("cuda", gpu) if gpu is not None else (device.type, device_name(device))
    batches = evaluation_batches(config)
    peak = peak_flops(name, t.precision)
    step = step_time(config, device, peak, footprint, limit)
    micro_s = step.micro_step_s
    sets = 1 + bool(config.data.val_data and t.eval_train_data)
    evaluation_s = last_s = micro_s * sets * (batches or 0) / TRAINING_OVER_FORWARD
    if t.final_eval == "whole" and t.num_eval_batches:
        whole = evaluation_batches(config.with_(num_eval_batches=0)) if config.data.val_data else None
        last_s += micro_s * ((whole or batches or 0) - (batches or 0)) / TRAINING_OVER_FORWARD
    length = length_of(config, micro_s, evaluation_s, last_s, step.update_s)
    run_s = micro_s * length.tokens / (t.batch_size * m.context_length) + step.update_s * length.steps
    run_s += evaluation_s * (evaluations(config, length.steps) - 1) + last_s
    flops = length.tokens * TRAINING_OVER_FORWARD * sum(forward_flops_by_part(m).values())
    expects = None
    if t.yardstick:
        expects = prospect(load_yardstick(t.yardstick), flops, None if peak is None else GPU_UTILISATION)
    return Plan(
        config=config,
        device=name,
        parameters=parameter_count(m),
        active_parameters=active_parameter_count(m),
        parameters_by_part=parameters_by_part(m),
        flops_by_part={part: TRAINING_OVER_FORWARD * n for part, n in forward_flops_by_part(m).items()},
        footprint=footprint,
        memory_limit=limit,
        process_bytes=_process(footprint, kind),
        largest_batch=largest_batch(
            lambda b: _process(simulation.step(b), kind),
            limit,
            {
                0: RESERVE.get(kind, 0) + footprint.weights + footprint.optimizer,
                t.batch_size: _process(footprint, kind),
            },
            UNEVEN,
        )
        if largest
        else None,
        length=length,
        tokens_per_step=t.batch_size * t.grad_accum_steps * m.context_length,
        evaluation_batches=batches,
        time=Estimate(micro_s * t.grad_accum_steps + step.update_s, evaluation_s, last_s, run_s, step.basis),
        checkpoint_bytes=simulation.checkpoint_bytes,
        checkpoints=checkpoints_kept(config, length.steps),
        prospect=expects,
    )


def _process(f: Footprint, kind: str) -> int:
    held = f.total * HELD.get(kind, 1.0)
    if kind == "cpu" and f.largest >= LARGE:
        held = max(held, f.total + HOLES * f.largest)
    return round(held) + RESERVE.get(kind, 0)


def _for_gpu(config: RunConfig, gpu: str, memory: int | None) -> RunConfig:
    peaks = {precision: peak_flops(gpu, precision) for precision in ("bf16", "fp16", "fp32")}
    if not any(peaks.values()):
        raise ConfigError(
            f"--gpu: found {gpu}; expected a name as CUDA tells it of a known one, as H100, A100 or RTX 4090"
        )
    if memory is None:
        raise ConfigError(f"--memory: found nothing; expected the memory of the {gpu}, as --memory 80G")
    t = config.training
    best = "bf16" if peaks["bf16"] else "fp16"
    if t.precision != "auto" and peaks[t.precision] is None:
        raise ConfigError(f"precision: found {t.precision}; expected auto, {best} or fp32, which a {gpu} is fast in")
    return config.with_(
        device="cpu",
        attention="sdpa" if t.attention in ("auto", "flex", "native") else t.attention,
        flash="torch",
        precision=best if t.precision == "auto" else t.precision,
        compile=True if t.compile == "auto" else t.compile,
    )


def length_of(
    config: RunConfig,
    micro_step_s: float = 0.0,
    evaluation_s: float = 0.0,
    last_s: float | None = None,
    update_s: float = 0.0,
) -> Length:
    """How far the run goes until its first limit, batch stages included.

    Args:
        config: `max_steps`, `token_budget` and `max_time` end it; `progress` says what the stages are shares of.
        micro_step_s: time of a micro-step, by which `max_time` is spent.
        evaluation_s: time of an evaluation. As in `horizon` the one at the start counts, and the last is kept free.
        last_s: time of the last one; None: as the others.
        update_s: what a step takes beside its micro-steps.

    >>> length_of(RunConfig().with_(context_length=8, batch_size=2, max_steps=100, batch_stages="0.5:3"))
    Length(steps=100, tokens=3200, ends_by='max_steps')
    >>> length_of(RunConfig().with_(context_length=8, batch_size=2, max_time=60, eval_interval=10), 0.5, 5.0)
    Length(steps=50, tokens=800, ends_by='max_time')
    """
    t = config.training
    counted_s = evaluation_s if t.max_time_counts == "all" else 0.0
    limits = {"max_steps": float(t.max_steps)}
    if t.token_budget:
        limits["token_budget"] = float(t.token_budget)
    if t.max_time:
        limits["max_time"] = max(t.max_time - (counted_s if last_s is None or not counted_s else last_s), 0.0)
    measure = {"steps": "max_steps", "tokens": "token_budget", "seconds": "max_time"}[config.progress]
    done = {"max_steps": 0.0, "token_budget": 0.0, "max_time": counted_s}
    starts, multiples = zip(*stages_of(t.batch_stages), strict=True)
    ends_by = measure
    for end, multiple in zip((*starts[1:], 1.0), multiples, strict=True):
        micro_steps = t.grad_accum_steps * multiple
        each = {
            "max_steps": 1.0,
            "token_budget": float(t.batch_size * micro_steps * config.model.context_length),
            "max_time": micro_step_s * micro_steps
            + update_s
            + (counted_s / t.eval_interval if t.eval_interval else 0.0),
        }
        left = {name: max(limit - done[name], 0.0) / each[name] for name, limit in limits.items() if each[name]}
        ends_by = min(left, key=lambda name: left[name])
        stage = max(limits[measure] * end - done[measure], 0.0) / each[measure] if each[measure] else math.inf
        over = left[ends_by] <= stage
        for name in done:
            done[name] += each[name] * (left[ends_by] if over else stage)
        if over:
            break
    steps, tokens = done["max_steps"], done["token_budget"]
    if ends_by != "max_time":
        return Length(math.ceil(steps - _ROUNDING * steps), round(tokens), ends_by)
    whole = max(math.floor(steps + _ROUNDING * steps), 1)  # a step is begun only if there is time for it, but the first
    return Length(whole, round(whole * tokens / steps) if steps else round(each["token_budget"]), ends_by)


def step_time(
    config: RunConfig, device: torch.device, peak: float | None, footprint: Footprint, memory: int
) -> StepTime:
    """What a step takes.

    On a device of known peak: 40 % of it. On a CPU: a few steps, taken now; where they are too long or too large for
    that, products at the rate of products of this width, all else at the rate of additions on tensors of this size, and
    the cost of calls, each measured now. Elsewhere: 40 % of the rate of products.

    Args:
        memory: bytes that a rehearsal may take, if as much is free.
    """
    m, t = config.model, config.training
    rows = t.batch_size * m.context_length
    flops = TRAINING_OVER_FORWARD * sum(forward_flops_by_part(m).values()) * rows
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(t.precision, torch.float32)
    if peak is not None:
        basis = f"assuming {GPU_UTILISATION:.0%} of the peak, {peak / 1e12:,.0f} TFLOP/s"
        return StepTime(flops / (GPU_UTILISATION * peak), 0.0, basis)
    speed = measure(device, dtype, rows, m.d_model)
    basis = f"measured now: products {speed.flops_per_s / 1e9:,.0f} GFLOP/s, memory {speed.bytes_per_s / 1e9:,.0f} GB/s"
    if device.type != "cpu":
        return StepTime(flops / (GPU_UTILISATION * speed.flops_per_s), 0.0, basis)
    calls_s, update_s = CALL_COSTS * speed.call_s * footprint.calls, 0.0
    micro_s = flops / speed.flops_per_s + footprint.moved / speed.bytes_per_s + calls_s
    if windows := windows_to_rehearse(config, micro_s, footprint, min(memory, available_bytes())):
        with suppress(MemoryError):  # somebody else has taken it meanwhile
            timed = rehearse(config, device, windows)
            micro_s, update_s = timed.micro_step_s * t.batch_size / windows, timed.update_s
            basis = f"measured now: steps of {windows} window{'s' if windows > 1 else ''}"
    if t.compile is True and dtype is torch.float32:
        micro_s, basis = micro_s * COMPILED, f"{basis}; compiled {COMPILED:.0%} of that"
    return StepTime(micro_s, update_s, basis)


def windows_to_rehearse(config: RunConfig, micro_s: float, footprint: Footprint, memory: int) -> int:
    """Windows of the steps that are taken for their time, 0: none.

    Args:
        micro_s: what a whole micro-step may take.
        footprint: of a whole step.
        memory: bytes, of which `REHEARSED_MEMORY` may be taken.
    """
    batch = config.training.batch_size
    windows = min(max(int(batch * REHEARSED_S / micro_s), 1), batch)
    fixed = RESERVE["cpu"] + footprint.weights + footprint.gradients + footprint.optimizer
    fits = fixed + HELD["cpu"] * (footprint.activations + footprint.loss) * windows / batch < REHEARSED_MEMORY * memory
    small = parameter_count(config.model) <= REHEARSED_PARAMETERS
    return windows if fits and small and micro_s * windows / batch < LONGEST_S else 0


def evaluations(config: RunConfig, steps: int) -> int:
    """At the start, every `eval_interval`, and at the end.

    >>> [evaluations(RunConfig().with_(eval_interval=n), 40) for n in (0, 20, 30)]
    [2, 3, 3]
    """
    interval = config.training.eval_interval
    return 1 + (-(-steps // interval) if interval else 1)


def evaluation_batches(config: RunConfig) -> int | None:
    """Batches of validation data in an evaluation; as many of training data are read.

    The file's size is asked where it is there; None: all of it is to be read, and it is not there.
    """
    d, t = config.data, config.training
    if not d.val_data:
        return t.num_eval_batches or BATCHES_WITHOUT_VALIDATION
    try:
        tokens = len(TokenFile.open(d.val_data, dtype=d.data_dtype or None))
    except BytekilnError:
        return t.num_eval_batches or None
    shifted, context = int(t.objective != "mlm"), config.eval_context
    windows = (tokens - 1) // context if t.num_eval_batches else -(-(tokens - shifted) // context)
    fitting = -(-windows // config.eval_batch_size)
    return min(t.num_eval_batches, fitting) if t.num_eval_batches else fitting


def checkpoints_kept(config: RunConfig, steps: int) -> int:
    """Checkpoints on the disk at the end: the numbered ones, the best (with validation data), the final one."""
    t = config.training
    numbered = steps // t.checkpoint_interval if t.checkpoint_interval else 0
    if t.keep_checkpoints:
        numbered = min(numbered, t.keep_checkpoints)
    return numbered + 1 + bool(config.data.val_data)
