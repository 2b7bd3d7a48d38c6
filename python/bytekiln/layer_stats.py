"""What gradients, weights and activations look like layer by layer: `layers.csv`, warnings, bars on the console.

In: a model behind its backward pass, and a micro-batch. Out: rows (docs/formats.md), sentences for the user, text.
Called by `loop` every `stats_interval` steps; a run without them never comes here. All numbers of one call cross
from the device to the host together. The additional forward is eager, without gradients and in evaluation mode: it
draws nothing from any random generator, and a compiled step keeps its graph.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bytekiln.layer_warnings import ACTIVATION, EXPERT_LOAD, GRADIENT, NEAR_ZERO, WEIGHT, Judge, LayerRow, layer_of
from bytekiln.metrics import RowFile

if TYPE_CHECKING:
    from bytekiln.batch import Batch

LOWEST, BINS = -17, 24
"""The histogram's inner bins are [4^k, 4^(k+1)) for k = -17 … 6, that is 5.8e-11 … 16384. Powers of two are told
by a float's exponent alone, so no value changes its bin by rounding. One bin more at either end takes the rest."""
AT_ONCE = 1 << 18
"""Values counted at once, so that they stay in the cache; a float32 counts as far as 2^24 exactly."""
WIDTH = 80
"""Columns of the console."""

Forward = Callable[[Tensor, Tensor, Tensor | None], object]
"""(inputs_BxT, targets_BxT, documents_BxT) -> anything; its `load_LxE`, where it has one, is the experts' load."""


class LayerStats:
    """`layers.csv`, open for appending, and the memory of what has been warned of."""

    def __init__(
        self, path: Path | None, keep_until: int = -1, source: Path | None = None, *, overflows: bool = False
    ) -> None:
        """Start the file, or go on with it (with a copy of `source`) behind the rows of step `keep_until`.

        Args:
            path: the file. None: write nothing, only take part in what the processes of a sharded model do together.
            keep_until: the checkpoint's step. (Not one less where its metrics row is still owed: the rows here are
                written within the step.)
            source: the file to go on with, where it is another one.
            overflows: gradients that are not finite are no news: fp16 with a loss scale, whose scaler sees to them.

        Raises:
            FileError: the file cannot be written.
            FormatError: an existing file has other columns.
        """
        self._file = RowFile(path, LayerRow, keep_until, source, what="a run's layers") if path is not None else None
        self._judge = Judge(overflows=overflows)
        if self._file is not None:
            for _, rows in groupby(self._file.kept, key=lambda r: r.step):
                self._judge.warnings(list(rows))  # told before the resume
            self._file.kept = []

    @torch.no_grad()
    def record(self, step: int, model: nn.Module, forward: Forward, batch: Batch) -> list[str]:
        """Write the rows of a step. Call it behind the backward pass, before clipping, once gradients are unscaled.

        Args:
            step: number of the step that is under way, from 1.
            model: has the gradients. Of a sharded one, every process must call this.
            forward: the objective, not compiled; called once with the batch.
            batch: a micro-batch of this step.

        Returns:
            Warnings, each once a run and layer.

        Raises:
            FileError: the disk is full.
        """
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        found = [(n, GRADIENT, summary(_whole(p.grad), 0.0)) for n, p in parameters if p.grad is not None]
        found += [(n, WEIGHT, summary(_whole(p), 0.0)) for n, p in parameters]
        device = parameters[0][1].device
        with _watched(model) as seen:
            result = forward(*(None if x is None else x.to(device, non_blocking=True) for x in batch[:3]))  # type: ignore[arg-type]
        found += [(name, ACTIVATION, numbers) for name, numbers in seen]
        load_LxE = getattr(result, "load_LxE", None)
        if self._file is None:
            return []
        numbers, loads = _fetched([n for *_, n in found], load_LxE)
        rows = [_row(step, name, kind, x) for (name, kind, _), x in zip(found, numbers, strict=True)]
        rows += [_load_row(step, f"layers.{i}.ffn", load) for i, load in enumerate(loads)]
        self._file.append(*rows)
        return self._judge.warnings(rows)

    def sync(self) -> None:
        """Make the rows survive the death of the machine: before the checkpoint that relies on them."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


# --- numbers ----------------------------------------------------------------------------------------------------


def summary(x: Tensor, near_zero: float) -> Tensor:
    """[norm, mean, std, min, max, zero share, counts of the histogram …] of a tensor, on its device, without a sync.

    Args:
        x: at least one value; what is not finite falls into the last bin.
        near_zero: the size below which a value counts as zero; 0: only zero itself does.
    """
    x = x.detach().float().flatten()
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # counts beyond 2^24 are not all floats
    low, high = torch.aminmax(x)
    zeros = (x.abs() < near_zero if near_zero else x == 0).float().mean()
    # Over the largest value: the squares of gradients below 1e-19, which do vanish so, would be 0 in float32. Norms in
    # float64 cost more (6.9 ms for 3.8, 4 million values on one core).
    size = torch.maximum(-low, high).clamp(min=torch.finfo(torch.float32).tiny)
    size = torch.where(size.isfinite(), size, 1.0)
    scaled = x / size
    of_scaled = torch.stack([torch.linalg.vector_norm(scaled), scaled.mean(), scaled.std(correction=0)])
    numbers = torch.cat([of_scaled.to(wide) * size.to(wide), torch.stack([low, high, zeros]).to(wide)])
    count = counted if x.device.type == "cpu" else counted_without_sync
    counts = torch.stack([count(_bins(part)).to(wide) for part in torch.split(x, AT_ONCE)]).sum(0)
    return torch.cat([numbers, counts])


def _bins(x: Tensor) -> Tensor:
    """Bin of each float32's size, int32 in 0 … BINS + 1, from the bits of its exponent."""
    bits = x.view(torch.int32).bitwise_right_shift(23).bitwise_and_(0xFF)
    exponent = bits.sub_(127)  # floor(log2 |x|); -127 for 0, 128 for what is not finite
    return exponent.bitwise_right_shift_(1).sub_(LOWEST - 1).clamp_(0, BINS + 1)


def counted(bins: Tensor) -> Tensor:
    """How often each bin occurs. On the CPU five times as fast as `counted_without_sync` (2.8 and 13 ns a value)."""
    return torch.bincount(bins, minlength=BINS + 2)


def counted_without_sync(bins: Tensor) -> Tensor:
    """The same for other devices, where bincount waits to ask for the largest value."""
    return torch.histc(bins.float(), BINS + 2, -0.5, BINS + 1.5)


def _fetched(numbers: Sequence[Tensor], load_LxE: Tensor | None) -> tuple[list[list[float]], list[list[float]]]:
    """The only point where the host waits for the device."""
    together = torch.stack(list(numbers))
    if load_LxE is None or not load_LxE.numel():
        return together.tolist(), []
    flat = torch.cat([together.flatten(), load_LxE.detach().flatten().to(together)]).cpu()
    of_tensors, of_experts = torch.split(flat, [together.numel(), load_LxE.numel()])
    return of_tensors.view(together.shape).tolist(), of_experts.view(load_LxE.shape).tolist()


def _row(step: int, layer: str, kind: str, numbers: Sequence[float]) -> LayerRow:
    norm, mean, std, low, high, zeros = numbers[:6]
    return LayerRow(step, layer, kind, norm, mean, std, low, high, zeros, _cell(numbers[6:]))


def _load_row(step: int, layer: str, load: Sequence[float]) -> LayerRow:
    zeros = sum(x == 0 for x in load) / len(load)
    numbers = math.hypot(*load), fmean(load), pstdev(load), min(load), max(load), zeros
    return LayerRow(step, layer, EXPERT_LOAD, *numbers, _cell(load))


def _cell(counts: Sequence[float]) -> str:
    return " ".join(str(round(c)) for c in counts)


def _whole(x: Tensor) -> Tensor:
    """A parameter of FSDP is a shard; gathering it is a collective, one tensor at a time."""
    gather: Callable[[], Tensor] | None = getattr(x, "full_tensor", None)
    return x if gather is None else gather()


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """While open, a forward of the model in evaluation mode leaves summaries of its layers' outputs in the list."""
    seen: list[tuple[str, Tensor]] = []

    def note(name: str, value: object) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, Tensor):
            seen.append((name, summary(value, NEAR_ZERO)))

    def output_of(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda _module, _inputs, output: note(name, output)

    def input_of(name: str) -> Callable[[nn.Module, object], None]:
        return lambda _module, inputs: note(name, inputs)

    was, hooks = model.training, []
    for name, module in model.named_modules():
        if re.fullmatch(r"token_embeddings|ln_final|layers\.\d+(\.attn|\.ffn)?", name):
            hooks.append(module.register_forward_hook(output_of(name)))
        elif re.fullmatch(r"layers\.\d+\.ffn(\.shared)?\.w2", name):
            hooks.append(module.register_forward_pre_hook(input_of(name.removesuffix("w2") + "hidden")))
    model.eval()
    try:
        yield seen
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()


# --- gradients a layer --------------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Norm of the gradient of each layer, in the model's order, as 0-D tensors on the device; no sync.

    A layer without a gradient does not occur. Of a sharded model, every process must call this.
    """
    layers: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers[layer_of(name)].append(parameter.grad)
    return {name: _whole(nn.utils.get_total_norm(grads)) for name, grads in layers.items()}


def bars(norms: Mapping[str, Tensor | float]) -> str:
    """Gradient norms as a bar chart in text, at most 80 columns wide, on a logarithmic scale of whole decades.

    The shortest bar has one block; zero has none, what is not finite a full one with its name.

    >>> print(bars({"token_embeddings": 0.02, "layers.0": 1.5, "layers.1": 0.0}))
    gradient norm a layer, logarithmic from 1e-02 to 1e+01
    token_embeddings █████▍                                                     0.02
    layers.0         ██████████████████████████████████████▌                     1.5
    layers.1                                                                       0
    """
    tensors = [x for x in norms.values() if isinstance(x, Tensor)]
    values: list[float] = torch.stack(tensors).tolist() if tensors else [float(x) for x in norms.values()]
    finite = [v for v in values if 0 < v < math.inf]
    low = math.floor(math.log10(min(finite))) if finite else 0
    high = max(low + 1, math.ceil(math.log10(max(finite)))) if finite else 1
    names = [n if len(n) <= 24 else f"{n[:23]}…" for n in norms]
    name_width, number_width = max(map(len, names), default=0), 9
    room = WIDTH - name_width - number_width - 2
    lines = [f"gradient norm a layer, logarithmic from 1e{low:+03d} to 1e{high:+03d}"]
    for name, value in zip(names, values, strict=True):
        if 0 < value < math.inf:
            eighths = max(8, round((math.log10(value) - low) / (high - low) * 8 * room))
        else:
            eighths = 0 if value == 0 else 8 * room
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        lines.append(f"{name:{name_width}} {bar:{room}} {value:>{number_width}.3g}")
    return "\n".join(lines)
