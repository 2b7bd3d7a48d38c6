"""Which runs may be trained together in one process, and why others may not.

In: configs. Out: a reason, or nothing. Called by `stack` and by sweeps before they start anything; imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from bytekiln.config import FIELDS, SECTION_OF, RunConfig

MAY_DIFFER = frozenset(name for name in FIELDS if SECTION_OF[name] in ("optimizer", "output")) - {"progress"} | {
    "seed",
    "init_from",
    "skip_spikes",
    "spike_sigma",
    "eval_interval",
    "num_eval_batches",
    "eval_train_data",
    "early_stopping_patience",
    "early_stopping_min_delta",
    "log_interval",
    "stats_interval",
    "show_gradients",
    "checkpoint_interval",
    "keep_checkpoints",
    "sample_interval",
    "sample_prompts",
    "sample_tokens",
}
"""Fields in which stacked runs may differ. Each run has its own optimizer, guard, average, data order and files; what
is done together is the pass through the model, so shapes, data and length of the run must be the same."""


def stackable(configs: Sequence[RunConfig]) -> str:
    """Why these runs cannot be trained together, in one sentence; empty where they can.

    >>> stackable([RunConfig().with_(lr=lr, out_dir=f"runs/{lr}", precision="fp32") for lr in (1e-3, 2e-3)])
    ''
    >>> stackable([RunConfig().with_(out_dir="a", precision="fp32", dropout=0.1)] * 2)
    'dropout: found 0.1; expected 0: its masks are drawn for a whole batch, and a stacked run would get others'
    """
    if not configs:
        return "runs: found none; expected at least one"
    for config in configs:
        if why := _why_not(config):
            return why
    first = configs[0].flat()
    for config in configs[1:]:
        now = config.flat()
        for name in FIELDS:
            if name not in MAY_DIFFER and first.get(name) != now.get(name):
                return f"{name}: found {first.get(name)} and {now.get(name)}; expected one value for all stacked runs"
    if configs[0].data.windows == "padded" and len({c.training.seed for c in configs}) > 1:
        return "windows: found padded with several seeds; expected one seed: their batches have other lengths"
    for part in ("folder", "checkpoints", "metrics"):
        places = [getattr(c.output, part).absolute() for c in configs]
        for place in places:
            if places.count(place) > 1:
                return f"{place}: found twice among the runs; expected a place for each run"
    return ""


def _why_not(config: RunConfig) -> str:
    m, t = config.model, config.training
    low = t.precision in ("bf16", "fp16")  # auto is asked again once it is settled
    found = [
        (
            bool(m.dropout),
            f"dropout: found {m.dropout:g}; expected 0: its masks are drawn for a whole batch, and a stacked run "
            "would get others",
        ),
        (m.ffn == "moe", "ffn: found moe; expected a dense one: experts sort the tokens of a whole batch"),
        (
            low,
            f"precision: found {t.precision}; expected fp32: rounding to less would part stacked runs from single ones",
        ),
        (
            bool(t.max_time) or config.progress == "seconds",
            "max_time: found one; expected max_steps or token_budget: a second of a stack is shared by its runs",
        ),
        (
            t.parallel == "fsdp" or os.environ.get("WORLD_SIZE", "1") != "1",
            "parallel: found several processes; expected one: a stack is trained in one process",
        ),
    ]
    return next((why for wrong, why in found if wrong), "")
