"""Where the time of a step goes: `lm-train … --profile N`.

In: a run. Out: a table of shares, the same as JSON, and a trace for a browser (chrome://tracing, Perfetto), in the
folder `profile` of the run's. Called by `cli_lm`. Nothing is trained that lasts. The steps are taken twice: N without
the profiler, whose time is the step's, and N under it, which tells the shares, since it slows down small operations.

On a GPU the kernels are counted, each by the operation that launched it; on a CPU the operations of the main thread,
which waits for its helpers. What is left of the time is idle: the device waited, or Python worked. Blocks that the core
does in one operation are taken apart for it; norms and activations that it does on the way are part of the products.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bytekiln import objective
from bytekiln.accounting import flops_per_token
from bytekiln.block import is_one_operation, taken_apart
from bytekiln.config import RunConfig
from bytekiln.console import human_time, table
from bytekiln.errors import ConfigError
from bytekiln.hardware import describe, device_name, mfu, peak_flops, percentage, versions
from bytekiln.metrics import write_atomically
from bytekiln.search.bare_run import BareRun

P = ParamSpec("P")
R = TypeVar("R")
WARM_UP = 3
"""Steps before anything is measured: the first makes the optimizer's memory."""
PARTS = ("matmul", "attention", "loss", "optimizer", "data", "other", "idle")
LABELS = {f"bytekiln {part}": part for part in ("loss", "optimizer", "data")}
"""Ranges that are marked while it is profiled: whatever runs inside belongs to the part, products too."""
PATTERNS = (
    ("loss", re.compile(r"cross_?entropy|nll_loss|NllLoss|log_?softmax", re.IGNORECASE)),
    ("attention", re.compile(r"attention|flash|fmha|flex", re.IGNORECASE)),
    (
        "matmul",
        re.compile(r"\b(addmm|baddbmm|mm|bmm|matmul|linear|_grouped_mm)\b|gemm|cutlass|nvjet|products", re.IGNORECASE),
    ),
)
"""Names of operations and kernels; the first that fits."""
WAITING = "bytekiln data"
"""The range whose own time is a wait, for the thread that makes batches."""
TOP = 12


@dataclass(frozen=True)
class Profile:
    """What was found; times are those of one step."""

    step_s: float
    """Without the profiler."""
    shares: dict[str, float]
    """Of the time under the profiler, by part; they add up to 1."""
    top: list[tuple[str, float, int]]
    """The operations or kernels that took longest: name, share, calls in a step."""
    tokens_per_s: float
    mfu: float | None
    device: str
    taken_apart: bool
    """Whether shares are of steps whose blocks, one operation each in `step_s`, were taken apart."""


def profile_run(config: RunConfig, steps: int, notice: Callable[[str], object]) -> tuple[Profile, Path]:
    """Take steps and say where they went.

    Args:
        config: the run; a GPU's or a compiled one as it would be trained.
        steps: how many are measured, and as many again profiled.
        notice: told what deserves attention.

    Returns:
        The profile, and the folder with `profile.txt`, `profile.json` and `trace.json`.

    Raises:
        BytekilnError: config or data cannot be used, or the folder cannot be written.
    """
    if steps < 1:
        raise ConfigError(f"--profile: found {steps}; expected at least 1 step")
    with BareRun(config, compiled=True, notice=notice) as run:
        c, device, rate = run.config, run.learner.device, run.config.optimizer.lr * 1e-3
        for _ in range(WARM_UP):
            run.take_step(rate)
        began = time.perf_counter()
        before = run.tokens
        for _ in range(steps):
            run.take_step(rate)  # reads its loss, and so waits for the device
        step_s = (time.perf_counter() - began) / steps
        tokens_per_s = (run.tokens - before) / steps / step_s
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with _marked(run), taken_apart(), profile(activities=activities, acc_events=True) as found:
            began = time.perf_counter()
            for _ in range(steps):
                run.take_step(rate)
            profiled_s = time.perf_counter() - began
        shares, top = _shares(found.events(), profiled_s, steps, on_gpu=device.type == "cuda")
        peak = peak_flops(torch.cuda.get_device_name(device), c.training.precision) if device.type == "cuda" else None
        made = Profile(
            step_s,
            shares,
            top,
            tokens_per_s,
            mfu(flops_per_token(c.model), tokens_per_s, peak),
            device_name(device),
            is_one_operation(c.model) and any(name.startswith("bytekiln::linear") for name, *_ in top),
        )
        folder = c.output.folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / "trace.json"))
    about = {
        "format": "bytekiln-profile",
        "version": 1,
        "steps": steps,
        "step_s": step_s,
        "shares": shares,
        "top": [{"name": name, "share": share, "calls_per_step": calls} for name, share, calls in top],
        "tokens_per_s": tokens_per_s,
        "mfu": made.mfu,
        "taken_apart": made.taken_apart,
        "hardware": describe(device),
        "versions": versions(),
        "config": c.flat(),
    }
    write_atomically(folder / "profile.json", json.dumps(about, indent=1, allow_nan=False).encode() + b"\n")
    write_atomically(folder / "profile.txt", show(made).encode() + b"\n")
    return made, folder


def show(made: Profile) -> str:
    """The profile as a table for people."""
    rows = [(part, human_time(made.step_s * share), f"{100 * share:5.1f} %") for part, share in made.shares.items()]
    top = [(name[:60], f"{100 * share:5.1f} %", f"{calls:,} calls") for name, share, calls in made.top]
    head = f"a step takes {human_time(made.step_s)} on {made.device}: {made.tokens_per_s:,.0f} tokens/s, "
    parts = "\nshares are of steps whose blocks, here one operation each, are taken apart" if made.taken_apart else ""
    return f"{head}MFU {percentage(made.mfu)}{parts}\n{table(rows)}\n\nlongest\n{table(top)}"


def _labelled(function: Callable[P, R], part: str) -> Callable[P, R]:
    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with record_function(f"bytekiln {part}"):
            return function(*args, **kwargs)

    return inside


@contextlib.contextmanager
def _marked(run: BareRun) -> Iterator[None]:
    """Mark what belongs to loss, optimizer and data while this lasts."""
    learner, loss = run.learner, vars(objective)["chunked_cross_entropy"]
    marks: list[tuple[Any, str, str]] = [
        (learner, "clipped_norm", "optimizer"),
        (learner, "update", "optimizer"),
        (run.batches, "get", "data"),
    ]
    if learner.recompiles is None:  # a compiled graph has no ranges inside, and would be made anew
        marks.append((objective, "chunked_cross_entropy", "loss"))
    for owner, name, part in marks:
        setattr(owner, name, _labelled(getattr(owner, name), part))
    try:
        yield
    finally:
        for owner, name, _ in marks:
            if owner is objective:
                setattr(owner, name, loss)
            else:
                delattr(owner, name)  # the class's own is behind it


def part_of(name: str, above: Sequence[str]) -> str:
    """The part that an operation or a kernel belongs to.

    Args:
        name: its own.
        above: names of the operations and ranges around it, the nearest first.

    >>> part_of("aten::mm", ["aten::linear"]), part_of("aten::mm", ["bytekiln loss"]), part_of("aten::add", [])
    ('matmul', 'loss', 'other')
    """
    for around in above:
        if around in LABELS:
            return LABELS[around]
    names = (name, *above)
    return next((part for part, pattern in PATTERNS if any(pattern.search(n) for n in names)), "other")


def _shares(
    events: Sequence[Any], seconds: float, steps: int, *, on_gpu: bool
) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Shares of `seconds` by part, and the operations that took longest."""
    spent: dict[str, float] = defaultdict(float)
    by_name: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    main = next((e.thread for e in events if e.name in LABELS), None)
    for event in events:
        above = []
        parent = event.cpu_parent
        while parent is not None:
            above.append(parent.name)
            parent = parent.cpu_parent
        if on_gpu:
            above = [event.name, *above]
            done = [(kernel.name, float(kernel.duration)) for kernel in event.kernels]
        elif event.thread != main or (event.name in LABELS and event.name != WAITING):
            done = []  # the own time of a range is Python's
        else:
            done = [(event.name, float(event.self_cpu_time_total))]
        for name, microseconds in done:
            spent[LABELS.get(name) or part_of(name, above)] += microseconds
            by_name[name] += microseconds
            calls[name] += 1
    whole = max(1e6 * seconds, sum(spent.values()))
    shares = {part: spent[part] / whole for part in PARTS if part != "idle"}
    shares["idle"] = max(0.0, 1.0 - sum(shares.values()))
    top = [(name, t / whole, calls[name] // steps) for name, t in sorted(by_name.items(), key=lambda x: -x[1])[:TOP]]
    return shares, top
