"""From the best learning rate of one model to that of a wider or deeper one, by a stated rule.

In: two runs' configs and the rate of the first. Out: a `Prediction`, a sentence and its factors included. Called by
`cli_search`, which always confirms it by runs beside it; imports no torch.

A run has one `lr` for all of its weights (the scales of embeddings, head and vectors stay as they are), so one rate
must do for all, and the matrices of the blocks decide it: they are what grows.

Width, r = d_model of the target over that of the source:
- AdamW and Lion move every weight by about lr, whatever its gradient. The output of a matrix sums over its inputs, so
  its change grows with the width unless lr falls as 1/r: μP's rule for hidden matrices (Yang et al. 2022, table 3).
- Muon with muon_scale "shape" makes updates whose spectral norm is lr·√max(1, rows/cols): the change of an output does
  not depend on the width, and the rate stays (Bernstein and Newhouse 2024, Jordan 2024). With "rms" its updates are as
  large by element as AdamW's, and fall as 1/r.
- SGD: in μP the rate of hidden matrices does not depend on the width either.

Depth, L layers: the blocks' changes add up on the residual stream. With the same update in each, independent ones add
up as √L, so the rate falls as 1/√L (Yang, Yu, Zhu and Hayou 2023, without their multiplier on the branches).

Not corrected: batch size, length of training, data. Where they differ, the prediction says so.
"""

from __future__ import annotations

import dataclasses
import math

from bytekiln.config import RunConfig
from bytekiln.errors import ConfigError
from bytekiln.search.plan import rounded
from bytekiln.sweep.axes import short

SAME_BUT = ("batch_size", "grad_accum_steps", "context_length", "max_steps", "schedule", "warmup_steps", "vocab_size")
"""Fields whose difference no rule corrects."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The rate that a rule gives for another model."""

    lr: float
    source_lr: float
    width: float
    """Factor for the width."""
    depth: float
    """Factor for the depth."""
    rule: str
    """What was applied, in a sentence."""
    warnings: tuple[str, ...]
    """What was not corrected for."""


def predict(lr: float, source: RunConfig, target: RunConfig) -> Prediction:
    """The learning rate of `target`, from the best one of `source`.

    Raises:
        ConfigError: the optimizers differ, or the blocks are of different kinds: no rule leads from one to the other.
    """
    s, t = source.optimizer, target.optimizer
    if s.optimizer != t.optimizer:
        raise ConfigError(f"optimizer: found {t.optimizer} in the target; expected {s.optimizer}, that of the source")
    if s.optimizer == "muon" and s.muon_scale != t.muon_scale:
        raise ConfigError(f"muon_scale: found {t.muon_scale} in the target; expected {s.muon_scale}, as in the source")
    ratio = target.model.d_model / source.model.d_model
    layers = target.model.num_layers / source.model.num_layers
    width, why = _width(s.optimizer, s.muon_scale, ratio)
    depth = 1 / math.sqrt(layers)
    said = [f"{s.optimizer}: {why}"]
    if layers != 1:
        said.append(f"depth {source.model.num_layers} to {target.model.num_layers}: 1/√{layers:g} = {depth:.3g}")
    ours, theirs = source.flat(), target.flat()
    warnings = [
        f"{name} changes from {ours.get(name)} to {theirs.get(name)}, for which nothing corrects"
        for name in SAME_BUT
        if ours.get(name) != theirs.get(name)
    ]
    predicted = rounded(lr * width * depth)
    rule = f"{short(lr)} × {width * depth:.3g} = {short(predicted)} ({'; '.join(said)})"
    return Prediction(predicted, lr, width, depth, rule, tuple(warnings))


def _width(optimizer: str, muon_scale: str, ratio: float) -> tuple[float, str]:
    """(factor, reason)."""
    if optimizer == "muon" and muon_scale == "shape":
        return 1.0, "its updates' spectral norm does not depend on the width, so the rate stays"
    if optimizer == "sgd":
        return 1.0, "the rate of hidden matrices does not depend on the width (μP)"
    what = "muon_scale rms, updates as large as AdamW's" if optimizer == "muon" else "μP, hidden matrices"
    return 1 / ratio, f"lr ∝ 1/width ({what}), width × {ratio:g}"


def off_by(predicted: float, found: float, factor: float) -> float:
    """By how many steps of a grid of this factor the rate that was found lies above the predicted one.

    >>> off_by(1e-3, 2e-3, 2.0)
    1.0
    """
    return math.log(found / predicted) / math.log(factor)
