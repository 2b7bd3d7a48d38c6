"""`lm-report`: runs and sweeps compared on one page. Argument list in, exit status out. Called by `cli`."""

from __future__ import annotations

import math
from pathlib import Path

from bytekiln.console import Parser, table
from bytekiln.errors import ConfigError, FileError

FEW, LISTED = 6, 20
"""Runs of which each is summarised on stdout; of more, how many are told in one line each, the best first."""
BESIDE = "\0"
"""What a flag without its value stands for: no folder has such a name."""
"""Of a flag without a value: beside the page."""


def report(argv: list[str]) -> int:
    """`lm-report`: a summary on stdout, a page, and on demand pictures and tables."""
    parser = Parser(
        "lm-report",
        description="Compare runs and sweeps on one self-contained HTML page, from the files in their folders: what "
        "was asked, the answer, tables, curves, samples, significance. Runs that are old, unfinished or damaged are "
        "shown as what they are.",
        examples=(
            "lm-report tinystories-lr                         the page is tinystories-lr/report.html",
            "lm-report runs/base runs/no-rope --out compared.html --baseline base",
            "lm-report runs/demo --png                        the page, and every chart as a picture",
            "lm-report runs/a runs/b --png losses.png         one picture of the loss curves, no page",
            "lm-report ablations --csv tables",
            "lm-report ablations --analysis                   ablations/analysis.md: each variant in words",
        ),
    )
    parser.add_argument("runs", nargs="+", metavar="RUN|SWEEP", help="run folder, sweep folder, or a folder of such")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page; default: report.html in the folder of the only RUN or SWEEP, else in this folder. "
        "FILE.png: one picture of the loss curves instead",
    )
    parser.add_argument(
        "--png",
        nargs="?",
        const=BESIDE,
        metavar="FOLDER|FILE",
        help="every chart as a picture, into FOLDER; default: beside the page. FILE.png: the losses only, no page",
    )
    parser.add_argument(
        "--csv", nargs="?", const=BESIDE, metavar="FOLDER", help="tables and curves as CSV; default: beside the page"
    )
    parser.add_argument(
        "--analysis", nargs="?", const=BESIDE, metavar="FILE.md",
        help="what the numbers say of each variant, in words; default: analysis.md beside the page",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", metavar="NAME", default="", help="variant or run that the others are compared with"
    )
    parser.add_argument(
        "--title", default="", metavar="TEXT", help="of the page; default: the sweep's or the run's name"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what exists")
    options = parser.parse_args(argv)
    paths = [Path(r) for r in options.runs]
    given = Path(options.out) if options.out else None
    only = next((Path(p) for p in (options.png, options.out) if p and p.lower().endswith(".png")), None)
    if given is not None and given != only and given.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out: found {given}; expected FILE.html, or FILE.png for a picture of the losses")
    ours = given is None and len(paths) == 1  # its own folder: drawn anew each time
    home = given.parent if given is not None else paths[0] if len(paths) == 1 else Path()
    words = Path(options.analysis) if options.analysis not in (None, BESIDE) else None
    if words is not None and words.suffix.lower() != ".md":
        raise ConfigError(f"--analysis: found {words}; expected FILE.md")
    for path in (given, only, words):
        if path is not None and not path.parent.is_dir():
            raise FileError(f"{path.parent}: no such folder; expected the folder for {path.name}")

    from bytekiln.report.build import read_report, summary, write_analysis, write_csv, write_page, write_pictures
    from bytekiln.report.pictures import draw_losses, write_picture

    found = read_report(paths, title=options.title, baseline=options.baseline)
    overwrite = options.overwrite or ours
    """What lies beside the page is drawn anew with it; what stands where the user says is theirs."""
    if len(found.runs) <= FEW:
        print("\n\n".join(table(summary(run), indent="") for run in found.runs))
    else:
        ranked = sorted(found.runs, key=lambda r: (not r.counts, r.number("best_val_loss") or math.inf))
        lines = [(r.name, r.status, _loss(r.number("best_val_loss")), f"{r.steps:,} steps") for r in ranked[:LISTED]]
        print(table(lines, indent=""))
        if len(ranked) > LISTED:
            print(f"and {len(ranked) - LISTED} more")
    print(f"\n{found.answer}\n")
    if only is not None:
        write_picture(lambda f: draw_losses(f, found), only, overwrite=options.overwrite)
        print(f"picture: {only}")
    elif options.png:
        there = overwrite if options.png == BESIDE else options.overwrite
        for picture in write_pictures(found, _folder(options.png, home), overwrite=there):
            print(f"picture: {picture}")
    if options.csv:
        there = overwrite if options.csv == BESIDE else options.overwrite
        for path in write_csv(found, _folder(options.csv, home), overwrite=there):
            print(f"table: {path}")
    if options.analysis:
        write_analysis(found, words or home / "analysis.md", overwrite=options.overwrite or (ours and words is None))
        print(f"analysis: {words or home / 'analysis.md'}")
    if only is None or (given is not None and given != only):
        out = given if given is not None else home / "report.html"
        write_page(found, out, overwrite=overwrite)
        print(f"page: {out}")
    return 0


def _folder(text: str, home: Path) -> Path:
    if text == BESIDE:
        return home
    folder = Path(text)
    if not folder.parent.is_dir():
        raise FileError(f"{folder.parent}: no such folder; expected the folder for {folder.name}")
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder}: found a file; expected a folder")
    folder.mkdir(exist_ok=True)
    return folder


def _loss(loss: float | None) -> str:
    return "—" if loss is None else f"{loss:.4f}"
