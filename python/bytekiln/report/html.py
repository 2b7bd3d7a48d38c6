"""The page: one HTML file with everything in it. In: a `Report`. Out: text. Called by `report`; no torch.

Text from runs (names, prompts, samples, reasons) is escaped here, and reaches the script as JSON; the page's policy
(CSP) allows no network at all and no script but its own, which it knows by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources

from bytekiln._core import __version__
from bytekiln.console import human_count, human_time
from bytekiln.report.data import LAYER_RUNS, colours, embedded, page_data, shown_layers
from bytekiln.report.model import Report
from bytekiln.report.sections import samples_section, setup_section
from bytekiln.report.tables import comparisons_table, runs_table, stability_table, swatch

SCRIPTS = ("axes.js", "charts.js", "page.js")


def page(report: Report) -> str:
    """The whole page."""
    folder = resources.files("bytekiln") / "report/page"
    script = "".join((folder / name).read_text("utf-8") for name in SCRIPTS)
    style = (folder / "page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    palette = colours(len(report.groups))
    light = "".join(f"--g{i}:{c[0]};" for i, c in enumerate(palette))
    dark = "".join(f"--g{i}:{c[1]};" for i, c in enumerate(palette))
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en" data-theme="light">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escape(report.title)}</title>\n<style>\n{style}",
            f':root{{{light}}}\n:root[data-theme="dark"]{{{dark}}}\n</style>\n</head>\n<body>\n<div class="wrap">\n',
            _header(report),
            "<main>\n",
            runs_table(report),
            _charts(report),
            comparisons_table(report),
            stability_table(report),
            _layers(report),
            samples_section(report),
            setup_section(report),
            "</main>\n",
            f'<footer class="faint">Made by lm-report of bytekiln {escape(__version__)} from the runs’ files alone. '
            f"Curves of training losses have at most {report.points:,} points each; the lowest and the highest value "
            "of each stretch are among them, so no spike is lost.</footer>\n</div>\n",
            '<script id="data" type="application/json">',
            embedded(page_data(report.groups, report.comparisons, report.rates)),
            f"</script>\n<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _header(report: Report) -> str:
    ended: dict[str, int] = {}
    for run in report.runs:
        ended[run.status] = ended.get(run.status, 0) + 1
    facts = [("runs", f"{len(report.runs):,}"), *((s.replace("_", " "), f"{n:,}") for s, n in ended.items())]
    if len(ended) == 1:
        facts = [("runs", f"{len(report.runs):,}, all {next(iter(ended)).replace('_', ' ')}")]
    tokens = sum(r.number("tokens") or 0 for r in report.runs)
    spent = sum(r.number("wall_time_s") or r.number("elapsed_time") or 0 for r in report.runs)
    sizes = sorted({int(p) for r in report.runs if (p := r.number("parameters"))})
    if sizes:
        ends = [sizes[0]] if len(sizes) == 1 else [sizes[0], sizes[-1]]
        facts.append(("parameters", " to ".join(human_count(n) for n in ends)))
    facts += [("tokens read", human_count(tokens))] * (tokens > 0) + [("time", human_time(spent))] * (spent > 0)
    listed = "".join(f"<li>{escape(k)} <b>{escape(v)}</b></li>" for k, v in facts)
    found = dict.fromkeys(r.asked.recommendation for r in report.runs if r.asked and r.asked.recommendation)
    searches = "".join(
        f'<p class="asked">The search: {escape(text)}</p>\n' for text in found if text not in report.answer
    )
    return (
        f'<header class="top">\n<div class="row"><h1>{escape(report.title)}</h1>'
        '<button id="theme" type="button">Dark</button></div>\n'
        f'<p class="asked">{escape(report.question)}</p>\n'
        f'<p class="answer" id="answer">{escape(report.answer)}</p>\n{searches}'
        f'<ul class="facts">{listed}</ul>\n</header>\n'
    )


# --- charts -------------------------------------------------------------------------------------------------------


def _figure(kind: str, title: str, caption: str, *, number: int = 0, wide: bool = False) -> str:
    return (
        f'<figure data-chart="{kind}" data-number="{number}"{" class=wide" if wide else ""}><h3>{escape(title)}</h3>'
        f'<div class="plot"></div><figcaption>{escape(caption)}<span class="cut"></span></figcaption></figure>\n'
    )


def _charts(report: Report) -> str:
    has = {n for r in report.runs for n in r.curves}
    legend = "".join(
        f'<button type="button" data-group="{i}" aria-pressed="true">{swatch(i)}<span>{escape(g.name)}'
        f"{f' ×{len(g.runs)}' if len(g.runs) > 1 else ''}</span></button>"
        for i, g in enumerate(report.groups)
    )
    both = '<button type="button" id="show-all">all</button><button type="button" id="show-none">none</button>'
    controls = (
        '<div class="sticky"><div class="legend" id="legend" role="group" aria-label="runs shown">'
        f"{legend}</div>\n<div class=controls>"
        '<label>against <select id="axis"><option value="step">steps</option><option value="tokens">tokens</option>'
        '<option value="time">time</option></select></label>'
        '<label>shown <select id="part"><option value="all">whole run</option><option value="half">last half</option>'
        '<option value="tenth">last tenth</option></select></label>'
        '<label><input type="checkbox" id="logx"> log x</label><label><input type="checkbox" id="logy"> log y</label>'
        '<label><input type="checkbox" id="raw"> every step</label>'
        f"{both if len(report.groups) > 2 else ''}</div></div>\n"
    )
    out = []
    if "val_loss" in has:
        text = "Nats a token on the validation data. Arrow keys or the pointer read values."
        out.append(_figure("val_loss", "Validation loss", text, wide=True))
    if "loss" in has:
        out.append(
            _figure(
                "loss", "Training loss", "Smoothed; “every step” shows what it was made of.", wide="val_loss" not in has
            )
        )
    for i, series in enumerate(report.rates):
        name = f" ({series.name})" if series.name and len(report.rates) > 1 else ""
        mark = " ✕: diverged." if series.lost else ""
        out.append(
            _figure(
                "rates", f"Loss against learning rate{name}", f"Lowest validation loss; {series.said}{mark}", number=i
            )
        )
    if any(c.difference for c in report.comparisons) and report.baseline:
        text = f"Validation loss minus that of {report.baseline.name}; left of the line is better. "
        text += "Bars: 95 % interval of the mean."
        out.append(_figure("deltas", "Difference to the baseline", text))
    if "gap" in has:
        out.append(
            _figure("gap", "Over-fitting", "Validation loss minus the loss on training data, both in evaluation mode.")
        )
    if "val_accuracy" in has:
        out.append(
            _figure(
                "val_accuracy", "Validation accuracy", "Share of the validation tokens that were the most likely one."
            )
        )
    if "lr" in has:
        out.append(_figure("lr", "Learning rate", "As it was at each step."))
    if "grad_norm" in has:
        out.append(_figure("grad_norm", "Gradient norm", "Before clipping, on a logarithmic scale."))
    if any(r.number("tokens_per_s") is not None for r in report.runs):
        out.append(_figure("speed", "Throughput", "Tokens a second, evaluation and saving excluded; one dot a run."))
    if "tokens_per_s" in has:
        out.append(_figure("tokens_per_s", "Throughput over time", "Tokens a second, averaged."))
    if "expert_load" in has:
        out.append(_figure("expert_load", "Load of the busiest expert", "Over the mean of the experts; 1 is even."))
    if not out:
        return f'<h2>Curves</h2>\n<p class="empty">No run has a step yet.</p>\n<div hidden>{controls}</div>'
    return f'<h2>Curves</h2>\n{controls}<div class="charts">\n{"".join(out)}</div>\n'


def _layers(report: Report) -> str:
    shown = shown_layers(report.groups)
    if not shown:
        return ""
    every = [r for g in report.groups for r in g.runs]
    options = "".join(f'<option value="{k}">{escape(every[i].name)}</option>' for k, i in enumerate(shown))
    kinds = dict.fromkeys(k for i in shown if (layers := every[i].layers) for k in layers.norms)
    choices = "".join(f'<option value="{k}">{k}</option>' for k in kinds)
    total = sum(1 for r in every if r.layers)
    left_out = (
        f" {total - len(shown)} further runs have layers; a page shows {LAYER_RUNS}." if total > len(shown) else ""
    )
    return (
        '<h2>Layers</h2>\n<div class="controls"><label>run <select id="layer-run">'
        f'{options}</select></label><label>of <select id="layer-kind">{choices}</select></label></div>\n'
        '<div class="charts">\n'
        + _figure(
            "layers",
            "Norm by layer",
            "Dark is small, bright is large: a band that darkens vanishes, one that brightens explodes.",
        )
        + _figure(
            "counts",
            "Sizes of gradients at the last record",
            f"Share of a layer’s gradients in each power of 4.{left_out}",
        )
        + "</div>\n"
    )
