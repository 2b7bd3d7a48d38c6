"""What the page's charts are drawn from, as small JSON. In: runs in groups. Out: a dict. Called by `report.html`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bytekiln.report.curves import Curve
from bytekiln.report.groups import Comparison, Group
from bytekiln.report.rates import RateSeries
from bytekiln.report.runs import Run

LAYER_RUNS = 24
"""Runs whose layers a page shows at most, the first of each group first."""
CHARTED = "loss loss_smooth val_loss gap lr grad_norm tokens_per_s expert_load val_accuracy bits_per_byte".split()
LIGHT = ("#0069a8", "#c85000", "#008062", "#a8467f", "#a87400", "#2f8fc4", "#5b5f66", "#7a7000")
DARK = ("#56b4f0", "#ff8f4d", "#35c9a0", "#e694c4", "#f0b73c", "#9ad4f7", "#c3c7cd", "#ddd35c")
"""Okabe and Ito's colours (2008), told apart by eyes that confuse red and green, each in a shade for its background."""
RAMP = ("#3b4cc0", "#2a78b8", "#1f9a8f", "#6b9a2a", "#b98a12", "#d2651d", "#b3303a")
RAMP_DARK = ("#8fa0ff", "#5fb4f0", "#4fd0c0", "#a8d45a", "#f0c04a", "#ff9a5c", "#ff7d84")
"""For values in order, where there are more groups than colours."""


def colours(count: int) -> list[tuple[str, str]]:
    """(on white, on black) of each group.

    >>> colours(2), len({*colours(100)})
    ([('#0069a8', '#56b4f0'), ('#c85000', '#ff8f4d')], 100)
    """
    if count <= len(LIGHT):
        return [*zip(LIGHT, DARK, strict=True)][:count]
    shares = [i / (count - 1) for i in range(count)]
    return [(_between(RAMP, s), _between(RAMP_DARK, s)) for s in shares]


def _between(stops: Sequence[str], share: float) -> str:
    at = share * (len(stops) - 1)
    i = min(int(at), len(stops) - 2)
    one, other = (tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in (stops[i], stops[i + 1]))
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in zip(one, other, strict=True))


def page_data(
    groups: Sequence[Group],
    comparisons: Sequence[Comparison],
    rates: Sequence[RateSeries],
) -> dict[str, Any]:
    """Everything that the page's script draws; numbers in five digits."""
    runs = [r for g in groups for r in g.runs]
    number = {id(g): i for i, g in enumerate(groups)}
    return {
        "groups": [{"name": g.name} for g in groups],
        "runs": [_run(r, i) for i, g in enumerate(groups) for r in g.runs],
        "rates": [_rates(s) for s in rates],
        "deltas": [
            {
                "group": number[id(c.group)],
                "mean": digits(c.difference.mean),
                "low": digits(c.difference.low),
                "high": digits(c.difference.high),
            }
            for c in comparisons
            if c.difference
        ],
        "layers": [_layers(i, runs[i]) for i in shown_layers(groups)],
    }


def shown_layers(groups: Sequence[Group]) -> list[int]:
    """Numbers of the runs whose layers are shown: first runs of groups, then the others."""
    order, at = [], 0
    for g in groups:
        for k, run in enumerate(g.runs):
            if run.layers:
                order.append((k, at))
            at += 1
    return sorted(i for _, i in sorted(order)[:LAYER_RUNS])


def _run(run: Run, group: int) -> dict[str, Any]:
    clock = [[digits(v, 7) for v in run.clock.get(n, [])] for n in ("step", "tokens", "elapsed_s")]
    return {
        "name": run.name,
        "group": group,
        "status": run.status,
        "clock": clock,
        "speed": digits(run.number("tokens_per_s")),
        "curves": {n: _curve(run.curves[n]) for n in CHARTED if n in run.curves},
    }


def _curve(curve: Curve) -> list[list[float | None]]:
    return [[digits(x, 7) for x in curve.x.tolist()], [digits(y) for y in curve.y.tolist()]]


def _rates(s: RateSeries) -> dict[str, Any]:
    f = s.fit
    said = None
    if f is not None and f.kind == "fitted":
        said = {"lr": digits(f.lr), "low": digits(f.low), "high": digits(f.high), "bounded": f.bounded,
                "loss": digits(f.loss), "confidence": f.confidence}  # fmt: skip
    return {
        "name": s.name,
        "points": [[digits(a), digits(b, 6), g] for a, b, g in s.points],
        "means": [[digits(a), digits(b, 6)] for a, b in s.means],
        "lost": [digits(x) for x in s.lost],
        "curve": [[digits(a), digits(b, 6)] for a, b in s.curve],
        "fit": said,
        "said": s.said,
    }


def _layers(number: int, run: Run) -> dict[str, Any]:
    layers = run.layers
    if layers is None:
        return {}
    norms: dict[str, Mapping[str, Iterable[float | None]]] = dict(layers.norms)
    return {
        "run": number,
        "steps": layers.steps,
        "norms": {
            kind: {name: [digits(v, 3) for v in values] for name, values in of.items()} for kind, of in norms.items()
        },
        "counts": layers.counts,
    }


def digits(value: float | None, places: int = 5) -> float | int | None:
    """A number in so many digits; None where JSON has no word for it.

    >>> digits(3.14159265), digits(40000.0, 7), digits(float("nan")), digits(1e-9)
    (3.1416, 40000, None, 1e-09)
    """
    if value is None or not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value) if abs(value) < 10**places else int(float(f"{value:.{places}g}"))
    return float(f"{value:.{places}g}")


def embedded(data: object) -> str:
    """JSON that may stand in a `script` element: no text in it ends the element or begins a comment."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
