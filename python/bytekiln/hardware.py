"""What devices can do: peaks of known GPUs, utilisation, and quick measurements of the one at hand.

In: a device's name or the device. Out: operations and bytes a second; None where nothing is known, which callers
print as "unknown". Called by `train` (utilisation) and `plan` (time). torch is imported only to measure.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bytekiln.console import human_bytes

if TYPE_CHECKING:
    import torch


class Peak(NamedTuple):
    """Dense operations a second by type of the matrix products; None: it has no fast instructions for it."""

    bf16: float | None
    fp16: float
    fp32: float


def _ampere(half: float) -> Peak:
    """Of a GPU with TF32: half of the 16-bit rate, which fp32 products take (`float32_matmul_precision` high)."""
    return Peak(half, half, half / 2)


PEAKS: dict[str, Peak] = {
    # NVIDIA's data sheets, without sparsity (which doubles the figure on most of them), 16-bit products accumulated
    # in fp32 as torch does (on GeForce half of the advertised rate).
    r"(GH200.*|H[12]00|H800)( \d+GB HBM3e?)?": _ampere(989.4e12),  # H100 data sheet, SXM5: 1,979 sparse
    r"H100 PCIe|H100 80GB HBM2e": _ampere(756.4e12),  # H100 data sheet: 1,513 sparse
    r"H[12]00 NVL": _ampere(835.5e12),  # H100 NVL data sheet: 1,671 sparse a GPU
    r"B200|B300.*": _ampere(2250e12),  # HGX B200 data sheet: 36 PFLOP/s sparse of 8
    r"GB200": _ampere(2500e12),  # GB200 NVL72 data sheet: 360 PFLOP/s sparse of 72
    r"A[18]00([- ].*)?": _ampere(312e12),  # A100 data sheet, SXM and PCIe alike
    r"A40": _ampere(149.7e12),  # A40 data sheet
    r"A10": _ampere(125e12),  # A10 data sheet
    r"A10G": _ampere(70e12),  # as AWS states it for g5
    r"A30": _ampere(165e12),  # A30 data sheet
    r"RTX A6000": _ampere(154.8e12),  # Ampere GA102 white paper
    r"L4": _ampere(121e12),  # L4 data sheet: 242 sparse
    r"L40": _ampere(181.05e12),  # L40 data sheet
    r"L40S": _ampere(362.05e12),  # L40S data sheet
    r"RTX 6000 Ada Generation": _ampere(364.2e12),  # Ada white paper: 728.5 sparse
    r"RTX 3090": _ampere(71e12),  # Ampere GA102 white paper: 71 with fp32 accumulation
    r"RTX 4090": _ampere(165.2e12),  # Ada white paper: 165.2 with fp32 accumulation
    r"RTX 5090": _ampere(209.5e12),  # Blackwell RTX white paper: 209.5 with fp32 accumulation
    r"V100(-SXM2.*)?": Peak(None, 125e12, 15.7e12),  # V100 data sheet; no bf16 and no TF32
    r"V100-PCIE.*": Peak(None, 112e12, 14e12),
    r"T4": Peak(None, 65e12, 8.1e12),  # T4 data sheet
}
"""By name as CUDA tells it, the maker's name left off. A name must match whole: a laptop's RTX 4090 is another chip,
and a slice of an A100 (MIG) has a part of its peak."""


MEMORY: dict[str, float] = {
    r"H100( 80GB HBM3)?|H100 PCIe|H800|A100.*80GB": 80e9,
    r"H200( \d+GB HBM3e?)?|H200 NVL": 141e9,
    r"B200": 180e9,
    r"A100.*40GB": 40e9,
    r"L40S?": 48e9,
    r"RTX (3090|4090)|L4|A10G?|A30": 24e9,
    r"RTX 5090": 32e9,
}
"""Bytes, by the data sheets of `PEAKS`; a name that stands for several sizes has none."""


def gpu_memory(name: str) -> int | None:
    """Memory of a GPU by its name, as `peak_flops` reads it.

    >>> gpu_memory("NVIDIA H100 80GB HBM3"), gpu_memory("A100")
    (80000000000, None)
    """
    short = _short(name)
    return next((int(size) for pattern, size in MEMORY.items() if re.fullmatch(pattern, short)), None)


def _short(device_name: str) -> str:
    """The name without its maker's."""
    return re.sub(r"^(NVIDIA |Tesla |Quadro |GeForce )+", "", device_name.strip())


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device in operations a second, None for a device that is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: bf16, fp16 or fp32 (which is TF32 where there is such).

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16"), peak_flops("Tesla V100-SXM2-16GB", "bf16")
    (989400000000000.0, None)
    >>> peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16") is None
    True
    """
    name = _short(device_name)
    if "MIG" in name:
        return None
    for pattern, peak in PEAKS.items():
        if re.fullmatch(pattern, name):
            found: float | None = getattr(peak, precision, None)
            return found
    return None


def mfu(flops_per_token: float, tokens_per_s: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: what was needed of what was there (PaLM, appendix B); None for an unknown peak.

    Args:
        flops_per_token: forward and backward, `accounting.flops_per_token`.
        tokens_per_s: as measured, on all devices together.
        peak: of all devices together.
    """
    return None if peak is None else flops_per_token * tokens_per_s / peak


def percentage(utilisation: float | None) -> str:
    """A utilisation as the console prints it.

    >>> percentage(0.4217), percentage(None)
    ('42.2 %', 'unknown')
    """
    return "unknown" if utilisation is None else f"{100 * utilisation:.1f} %"


CACHES = 64 << 20
"""Bytes of operands that no cache keeps from one turn to the next."""


class Speed(NamedTuple):
    """What a device did in a quick measurement."""

    flops_per_s: float
    """Matrix products."""
    bytes_per_s: float
    """Elementwise work, bytes read and written."""
    call_s: float
    """Cost of an operation on next to nothing, autograd's part of it included."""


def measure(device: torch.device, dtype: torch.dtype, rows: int, width: int, seconds: float = 0.3) -> Speed:
    """Time products of a model's size, elementwise work on tensors of that size, and calls on tiny tensors.

    As in a step: no product's operand is in a cache when its turn comes, and calls are a model's with gradients.

    Args:
        device: where.
        dtype: type of the products.
        rows: tokens in a micro-step; at most 4,096 of them are taken, more changes no rate.
        width: of the model; products are rows×width by width×width.
        seconds: time that it may take, a third for each.
    """
    import torch

    rows, width = min(rows, 4096), min(width, 4096)
    sets = 1 + CACHES // ((2 * rows + width) * width * dtype.itemsize)
    operands = [
        (torch.ones(rows, width, device=device, dtype=dtype), torch.ones(width, width, device=device, dtype=dtype))
        for _ in range(sets)
    ]
    outs = [x @ w for x, w in operands]
    turn = itertools.cycle(range(sets))
    sums, a, b = (torch.ones(rows, width, device=device) for _ in range(3))

    def product() -> None:
        at = next(turn)
        torch.mm(*operands[at], out=outs[at])

    def addition() -> None:
        torch.add(a, b, out=sums)

    tiny, calls = _a_little_of_a_model(device)
    third = seconds / 3
    return Speed(
        2 * rows * width * width / _time_of(product, third, device),
        3 * 4 * rows * width / _time_of(addition, third, device),
        _time_of(tiny, third, device) / calls,
    )


def _a_little_of_a_model(device: torch.device) -> tuple[Callable[[], None], int]:
    """Forward and backward of a few operations on next to nothing, and how many operations that is."""
    import torch
    import torch.nn.functional as F  # noqa: N812 - torch's own convention
    from torch.utils._python_dispatch import TorchDispatchMode

    x_1xD, w_DxD = (torch.ones(n, 8, device=device, requires_grad=True) for n in (1, 8))

    def work() -> None:
        y_1xD = F.gelu(F.layer_norm(x_1xD, (8,)) @ w_DxD) @ w_DxD + x_1xD
        torch.autograd.grad(y_1xD.sum(), (x_1xD, w_DxD))

    class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Counted() as counted:  # type: ignore[no-untyped-call]
        work()
    return work, counted.calls


def _time_of(work: Callable[[], None], seconds: float, device: torch.device) -> float:
    """Time of one call, the lower quartile of as many as fit: what else runs on the machine only adds to it."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()  # the first call sets up threads and kernels
    wait()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 4]


CONTAINERS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where Linux tells what a container may have, what it has, and what of that it would give back (cgroups 2 and 1)."""


def memory_bytes(device: torch.device) -> int:
    """Memory of the device: of the GPU, or what this machine, or the container it runs in, has."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder, limit, _, _ in CONTAINERS:
        allowed = _number_in(folder / limit)
        if allowed is not None:
            return min(machine, allowed)
    return machine


def available_bytes(machine: Path = Path("/proc/meminfo")) -> int:
    """Memory of this machine that nobody uses, and of the container it runs in; all of it where nothing tells."""
    import torch

    free = [memory_bytes(torch.device("cpu"))]
    with suppress(OSError):
        lines = machine.read_text("ascii").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for folder, limit, usage, inactive in CONTAINERS:
        allowed, used = _number_in(folder / limit), _number_in(folder / usage)
        if allowed is None or used is None:
            continue
        with suppress(OSError):
            lines = (folder / "memory.stat").read_text("ascii").splitlines()
            used -= sum(int(line.split()[1]) for line in lines if line.startswith(f"{inactive} "))
        free.append(max(allowed - used, 0))
    return min(free)


def _number_in(file: Path) -> int | None:
    try:
        text = file.read_text("ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def describe(device: torch.device) -> dict[str, str]:
    """Device, processors, memory and system of this machine, for a report."""
    import platform

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    about = {"device": device_name(device), "memory": human_bytes(memory_bytes(device))}
    return {**about, "cores": str(cpus), "system": f"{platform.system()} {platform.machine()}"}


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on; `flash` where it is not torch's own."""
    import platform

    import torch

    import bytekiln

    known = {"python": platform.python_version(), "torch": str(torch.__version__), "bytekiln": bytekiln.__version__}
    flash = getattr(importlib.import_module("torch.nn.attention"), "current_flash_attention_impl", lambda: None)()
    return known if flash is None else {**known, "flash": flash}


def device_name(device: torch.device) -> str:
    """The device as a person would name it."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{model}, {torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() != 1 else "")
