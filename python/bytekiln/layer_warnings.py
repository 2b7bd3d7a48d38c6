"""What is wrong with a model's layers, told from their numbers: vanishing, exploding, dead.

In: the rows of `layers.csv`. Out: sentences. Called by `layer_stats`, which makes the rows; imports no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

GRADIENT, WEIGHT, ACTIVATION, EXPERT_LOAD = "gradient", "weight", "activation", "expert_load"
NEAR_ZERO = 1e-3
"""An activation below it counts as zero: silu and gelu never reach zero, only come near it."""
VANISHING, EXPLODING, LARGE, DEAD, IN_SUCCESSION = 1e-3, 100.0, 10.0, 0.95, 3
"""When to warn; see `Judge`."""


@dataclass(frozen=True)
class LayerRow:
    """One tensor at one step."""

    step: int
    layer: str
    """The parameter's name, or the module whose output it is (`….hidden`: what the last matrix of an FFN reads)."""
    kind: str
    """gradient, weight, activation or expert_load."""
    norm: float
    """Square root of the sum of squares."""
    mean: float
    std: float
    min: float
    max: float
    zero_share: float
    """Share of the values that are exactly zero; of activations, below NEAR_ZERO in size."""
    counts: str
    """The histogram of |x|, lowest bin first; in rows of expert_load the tokens of each expert. Between spaces."""


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: a Transformer block, or the first part of its name.

    >>> layer_of("layers.3.attn.q_proj.weight"), layer_of("lm_head.weight"), layer_of("x0_lambdas")
    ('layers.3', 'lm_head', 'x0_lambdas')
    """
    parts = parameter.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


class Judge:
    """Says what deserves attention, once a run and layer. A function of the rows alone, so a resume replays it.

    - large: the norm of the whole gradient is above 10. At once.
    - exploding: a layer's gradient norm is not finite, or above 10 and above 100 times the median layer's. At once.
    - vanishing: it is below a thousandth of the median layer's, though not zero.
    - dead: all gradients of an attention, a feed-forward, an embedding or the head are exactly zero; or more than
      95 % of what a feed-forward computes behind its activation is zero (below a thousandth).

    The last two must hold in three records in succession: matrices that start at zero keep the gradients behind them
    at zero for a step or two, and the first step may have a learning rate of zero. Layers are Transformer blocks,
    embeddings and the head; norms and the few learned scalars are no layers here, their gradients are of another size.
    """

    def __init__(self, *, overflows: bool = False) -> None:
        """Nothing seen yet. `overflows`: as `LayerStats` has it."""
        self._overflows = overflows
        self._told: set[tuple[str, str]] = set()
        self._times: Counter[tuple[str, str]] = Counter()

    def warnings(self, rows: Iterable[LayerRow]) -> list[str]:
        """The sentences about one step's rows."""
        rows = list(rows)
        gradients = [r for r in rows if r.kind == GRADIENT]
        step = rows[0].step if rows else 0
        if self._overflows and not math.isfinite(_together(gradients)):
            gradients = []
        total = _together(gradients)
        norms = {name: _together(of) for name, of in _grouped(gradients, _compared).items()}
        usual = median([n for n in norms.values() if math.isfinite(n)] or [0.0])
        said: list[str | None] = []
        if total > LARGE:
            hint = "consider a lower lr or clipping (grad_clip)"
            said.append(self._once("large", "", f"the gradient is large, norm {total:.4g} before clipping; {hint}"))
        for name, norm in norms.items():
            if not math.isfinite(norm) or (norm > LARGE and norm > EXPLODING * usual):
                text = f"{name}: exploding gradient, norm {norm:.4g}, where the median layer has {usual:.4g}"
                said.append(self._once("exploding", name, text))
            if self._lasts("vanishing", name, 0 < norm < VANISHING * usual):
                text = f"{name}: vanishing gradient, norm {norm:.3g}, where the median layer has {usual:.3g}"
                said.append(self._once("vanishing", name, text))
        for name, of in _grouped(gradients, _sublayer).items():
            if self._lasts("dead", name, all(r.norm == 0 for r in of)):
                said.append(self._once("dead", name, f"{name}: dead, every gradient is exactly zero"))
        for r in rows:
            if r.kind == ACTIVATION and r.layer.endswith(".hidden"):
                name = r.layer.removesuffix(".hidden")
                if self._lasts("silent", name, r.zero_share > DEAD):
                    text = f"{name}: dead, {r.zero_share:.1%} of the activations are zero (below {NEAR_ZERO:g})"
                    said.append(self._once("silent", name, text))
        return [f"step {step}: ⚠ {text}" for text in said if text]

    def _lasts(self, what: str, name: str, holds: bool) -> bool:
        self._times[what, name] = self._times[what, name] + 1 if holds else 0
        return self._times[what, name] >= IN_SUCCESSION

    def _once(self, what: str, name: str, text: str) -> str | None:
        if (what, name) in self._told:
            return None
        self._told.add((what, name))
        return text


def _together(rows: Iterable[LayerRow]) -> float:
    return math.hypot(*(r.norm for r in rows))


def _grouped(rows: Iterable[LayerRow], group: Callable[[str], str | None]) -> dict[str, list[LayerRow]]:
    out: dict[str, list[LayerRow]] = defaultdict(list)
    for r in rows:
        if (name := group(r.layer)) is not None:
            out[name].append(r)
    return out


def _compared(parameter: str) -> str | None:
    """The layer whose gradient is compared with the other layers', if the parameter belongs to one."""
    layer = layer_of(parameter)
    return None if layer.startswith("ln_") or layer.endswith("_lambdas") else layer


def _sublayer(parameter: str) -> str | None:
    """Attention or feed-forward of a block; an embedding; the head."""
    within = re.match(r"layers\.\d+\.(attn|ffn)\.", parameter)
    return within[0][:-1] if within else None if parameter.startswith("layers.") else _compared(parameter)
