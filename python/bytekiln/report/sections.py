"""The page's samples and set-up. In: a `Report`. Out: HTML, every text of a run escaped. Called by `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from bytekiln.config import SECTION_OF
from bytekiln.report.groups import differing
from bytekiln.report.model import Report
from bytekiln.report.runs import Run
from bytekiln.report.tables import shown_fields, swatch
from bytekiln.section import Value
from bytekiln.sweep.axes import short

SAMPLE_RUNS = 24
"""Runs whose samples are shown at most, the first of each group."""


def samples_section(report: Report) -> str:
    """Texts of the models on the same prompts."""
    firsts = [(i, r) for i, g in enumerate(report.groups) for r in [x for x in g.runs if x.samples][:1]]
    if not firsts:
        return ""
    shown = firsts[:SAMPLE_RUNS]
    prompts = dict.fromkeys(p for _, r in shown for p, _ in r.samples)
    out = ["<h2>Samples</h2>\n"]
    out.append('<p class="note">Drawn by the runs themselves; the first run of each variant.')
    out.append(
        f" {len(firsts) - len(shown)} further variants have some.</p>\n" if len(firsts) > len(shown) else "</p>\n"
    )
    for prompt in prompts:
        name = f"After <code>{escape(prompt)}</code>" if prompt.strip() else "From nothing"
        out.append(f'<h3>{name}</h3>\n<div class="samples">')
        for i, run in shown:
            for text in [t for p, t in run.samples if p == prompt]:
                begun = f'<span class="prompt">{escape(prompt)}</span>' if prompt.strip() else ""
                step = (
                    f'<span class="faint"> · step {run.samples_step:,}</span>' if run.samples_step is not None else ""
                )
                out.append(
                    f'<div class="sample">{swatch(i)}<b>{escape(run.name)}</b>{step}'
                    f"<pre>{begun}{escape(text)}</pre></div>"
                )
        out.append("</div>\n")
    return "".join(out)


def setup_section(report: Report) -> str:
    """Machines, versions, configurations, folders."""
    machines: dict[str, int] = {}
    for run in report.runs:
        if said := _machine(run):
            machines[said] = machines.get(said, 0) + 1
    told = "".join(
        f"<li>{escape(m)} <span class=faint>({n} of {len(report.runs)} runs)</span></li>" for m, n in machines.items()
    )
    out = ["<h2>Set-up</h2>\n", f"<ul>{told}</ul>\n" if told else "<p>The runs do not tell what they ran on.</p>\n"]
    every = [r.config for r in report.runs if r.config]
    if every:
        differ = set(differing(report.runs))
        names = [n for n in every[0] if n not in differ and SECTION_OF.get(n) != "output"]
        one = len(every) == 1
        common = {n: every[0][n] for n in names}
        title = "Configuration" if one else "Configuration that all runs share"
        out.append(f"<details><summary>{title} ({len(common)} fields)</summary>{_pairs(common)}</details>\n")
        if not one:
            rest = [n for n in differ if n not in shown_fields(report.runs)]
            if rest:
                lines = "".join(
                    f"<h3>{escape(r.name)}</h3>{_pairs({n: r.config[n] for n in rest if n in r.config})}"
                    for r in report.runs[:50]
                )
                out.append(f"<details><summary>Further fields that differ</summary>{lines}</details>\n")
    folders = "".join(
        f"<div><span>{escape(r.name)}</span><code>{escape(str(r.folder))}</code></div>" for r in report.runs[:300]
    )
    out.append(f'<details><summary>Folders</summary><div class="pairs">{folders}</div></details>\n')
    return "".join(out)


def _machine(run: Run) -> str:
    parts = []
    for key in ("hardware", "versions"):
        value = run.result.get(key)
        if isinstance(value, Mapping):
            parts += [f"{k} {v}" for k, v in value.items() if isinstance(v, str | int | float)]
        elif isinstance(value, str) and value:
            parts.append(value)
    device = run.result.get("device")
    if isinstance(device, str):
        parts.insert(0, device)
        precision = run.result.get("precision")
        parts += [str(precision)] if precision else []
        parts += ["compiled"] if run.result.get("compiled") is True else []
        count = run.number("processes")
        parts += [f"{count:.0f} processes"] if count and count > 1 else []
    return ", ".join(parts)


def _pairs(fields: Mapping[str, Value]) -> str:
    rows = "".join(
        f"<div><span>{escape(k)}</span><code>{escape(short(v)) or '—'}</code></div>" for k, v in fields.items()
    )
    return f'<div class="pairs">{rows}</div>'
