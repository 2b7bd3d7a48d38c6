"""Reports of runs, from their files alone: one HTML page, pictures, tables. Imports no torch.

In: run folders and sweep folders. Out: files. Called by `cli_report` and by what ends in a report. The parts:
`report.runs` reads, `report.groups` compares, `report.html` makes the page, `report.pictures` the PNG files.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from bytekiln.atomic import write_file
from bytekiln.config import UNLIMITED_STEPS
from bytekiln.errors import FileError
from bytekiln.report.analysis import analysis
from bytekiln.report.curves import points_for
from bytekiln.report.groups import differing
from bytekiln.report.html import page
from bytekiln.report.model import Report
from bytekiln.report.pictures import draw_losses, pictures, write_picture
from bytekiln.report.places import Place, find_places
from bytekiln.report.runs import Run, read_run

SEVERAL_BYTES = 100_000_000
"""Metrics that are more than this together are read by several processes."""
CURVES = "loss val_loss train_eval_loss val_accuracy bits_per_byte lr grad_norm tokens_per_s expert_load".split()


def read_report(paths: Sequence[Path], *, title: str = "", baseline: str = "") -> Report:
    """Read runs and sweeps.

    Args:
        paths: run folders, sweep folders, folders with such in them.
        title: of the page; empty: the sweep's or the run's name.
        baseline: group or run that the others are compared with; empty: what the sweeps say.

    Raises:
        FileError: a path is no folder, or has no run in it.
        ConfigError: no group or run is called like the baseline.
    """
    places: dict[Path, Place] = {}
    for path in paths:
        for place in find_places(path):
            places.setdefault(place.folder.resolve(), place)
    listed = [*places.values()]
    points = points_for(len(listed))
    runs = _read_all(listed, points)
    _tell_apart(runs)
    return Report.of(runs, title=title, baseline=baseline, points=points)


def _read_all(places: Sequence[Place], points: int) -> list[Run]:
    size = sum(m.stat().st_size for p in places if (m := p.folder / "metrics.csv").is_file())
    workers = min(os.cpu_count() or 1, len(places), 16)
    if size > SEVERAL_BYTES and workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
            return list(pool.map(read_run, places, repeat(points), chunksize=2))
    return [read_run(p, points) for p in places]


def _tell_apart(runs: Sequence[Run]) -> None:
    """Equal names of different runs get their folders' names before them."""
    names = [r.name for r in runs]
    for run in runs:
        if names.count(run.name) > 1:
            parts = run.folder.resolve().parts
            above = run.asked.folder.resolve().name if run.asked else parts[-2] if len(parts) > 1 else ""
            run.name = f"{above}/{run.name}"


def write_page(report: Report, out: Path, *, overwrite: bool) -> None:
    """Write the page.

    Raises:
        OutputExistsError: it exists.
        FileError: it cannot be written.
    """
    write_file(out, page(report).encode("utf-8", "replace"), overwrite=overwrite)


def write_analysis(report: Report, out: Path, *, overwrite: bool) -> None:
    """Write the analysis, in Markdown.

    Raises:
        OutputExistsError: it exists.
        FileError: it cannot be written.
    """
    write_file(out, analysis(report).encode("utf-8", "replace"), overwrite=overwrite)


def analyse_sweep(folder: Path) -> list[Path]:
    """Write what a sweep that has ended tells into its folder, anew each time: `analysis.md`, `comparison.png`.

    Returns:
        The files; no picture where no run has a loss.

    Raises:
        BytekilnError: there is no run in it, or a file cannot be written.
    """
    found = read_report([folder])
    out = [folder / "analysis.md"]
    write_analysis(found, out[0], overwrite=True)
    if any({"loss", "val_loss"} & set(r.curves) for r in found.runs):
        out.append(folder / "comparison.png")
        write_picture(lambda f: draw_losses(f, found), out[1], overwrite=True)
    return out


@contextmanager
def analysed(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Have `analyse_sweep` called when the sweep inside is over, Ctrl-C and SIGTERM included, refusals not.

    The sweep is done, whatever can be said of it: what goes wrong here is told in one line.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException:
        _analyse(folder, say)
        raise
    _analyse(folder, say)


def _analyse(folder: Path, say: Callable[[str], object]) -> None:
    try:
        for path in analyse_sweep(folder):
            say(f"{'analysis' if path.suffix == '.md' else 'picture'}: {path}")
    except Exception as exc:
        say(f"analysis: not written: {str(exc) or type(exc).__name__}".splitlines()[0])


def write_pictures(report: Report, folder: Path, *, overwrite: bool) -> list[Path]:
    """Write every picture that there is something to draw in.

    Raises:
        OutputExistsError: one exists.
        FileError: there is nothing to draw, or one cannot be written.
    """
    drawn = pictures(report)
    if not drawn:
        raise FileError(f"{report.runs[0].folder}: found no step of a run; expected at least one for a picture")
    out = []
    for name, draw in drawn.items():
        out.append(folder / f"{name}.png")
        write_picture(draw, out[-1], overwrite=overwrite)
    return out


def write_csv(report: Report, folder: Path, *, overwrite: bool) -> list[Path]:
    """Write `report_runs.csv`, `report_differences.csv` and `report_curves.csv` (long form, thinned as on the page).

    Raises:
        OutputExistsError: one exists.
        FileError: one cannot be written.
    """
    fields = list(differing(report.runs))
    numbers = (
        "best_val_loss best_step final_val_loss final_train_loss final_train_eval_loss final_bits_per_byte "
        "final_val_accuracy steps max_steps tokens parameters tokens_per_s wall_time_s"
    ).split()
    judged = "spikes expected_spikes sigma highest highest_step largest_grad_norm largest_grad_step slope end".split()
    runs: list[list[object]] = [["run", "variant", "status", *fields, *numbers, *judged, "note", "folder"]]
    curves: list[list[object]] = [["run", "curve", "step", "value"]]
    for run in report.runs:
        of_result = [run.result.get(n) for n in numbers]
        of_loss = [getattr(run.stability, n) if run.stability else None for n in judged]
        notes = "; ".join([*([run.why] if run.why else []), *run.notes])
        values = [run.config.get(n) for n in fields]
        runs.append([run.name, run.group, run.status, *values, *of_result, *of_loss, notes, run.folder])
        for name in CURVES:
            if (curve := run.curves.get(name)) is not None:
                curves += [[run.name, name, int(x), y] for x, y in zip(curve.x.tolist(), curve.y.tolist(), strict=True)]
    differences: list[list[object]] = [
        [
            "variant",
            "runs",
            "mean_best_val_loss",
            "sigma",
            "baseline",
            "difference",
            "low",
            "high",
            "p",
            "test",
            "verdict",
        ]
    ]
    known = {id(c.group): c for c in report.comparisons}
    for g in report.groups:
        c = known.get(id(g))
        d = c.difference if c else None
        told: list[object] = [None] * 5 + [c.verdict if c else ""]
        if c and d:
            told = [d.mean, d.low, d.high, c.p, d.how, c.verdict]
        base = report.baseline.name if report.baseline else ""
        differences.append([g.name, len(g.losses), g.mean, g.sigma, base, *told])
    out = []
    for name, rows in (("runs", runs), ("differences", differences), ("curves", curves)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["" if v is None else v for v in row] for row in rows])
        out.append(folder / f"report_{name}.csv")
        write_file(out[-1], text.getvalue().encode("utf-8", "replace"), overwrite=overwrite)
    return out


def summary(run: Run) -> list[tuple[str, str]]:
    """The run in a few lines: (what, value)."""
    limit = run.config.get("max_steps")
    of = f" of {limit:,}" if isinstance(limit, int) and limit < UNLIMITED_STEPS else ""
    loss = run.curves.get("loss")
    rows = [
        ("run", str(run.folder)),
        ("status", run.status if run.status != "unfinished" else "no result yet"),
        ("step", f"{run.steps:,}{of}"),
    ]
    if loss is not None:
        last = int(loss.x[-1])
        of_step = f" at step {last:,}: later ones are not finite" if last < run.steps else ""
        rows.append(("training loss", f"{float(loss.y[-1]):.4f}{of_step}"))
    else:
        rows.append(("training loss", "none that is finite"))
    if (validation := run.curves.get("val_loss")) is not None:
        best = int(validation.y.argmin())
        rows += [
            ("validation loss", f"{float(validation.y[-1]):.4f}"),
            ("best", f"{float(validation.y[best]):.4f} at step {int(validation.x[best]):,}"),
        ]
        if (bits := run.curves.get("bits_per_byte")) is not None:
            rows.append(("bits a byte", f"{float(bits.y[-1]):.4f}"))
    return [*rows, *(("note", n) for n in run.notes)]
