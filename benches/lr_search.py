"""The learning-rate search against a full grid, on a small model that really trains.

    lr_search.py [--searches 10] [--workers 2] [--text FILE] [--cache FOLDER] [--grid-only]
    lr_search.py --transfer [--optimizer adamw|muon|both] [--widths 128 512] [--steps 100] [--text FILE]

Text: tinyshakespeare's characters where the shared data lies beside the repository, else --text FILE. The model has
some 57,000 parameters and trains 300 steps (a few seconds); all runs are in this process and its forked workers, torch
loaded once. A search's runs are paused and go on as those of `lm-sweep search` are; its steps are counted the same.

First the full grid, 13 rates × 3 seeds; σ from 5 seeds at its best rate. Then searches, each with seeds of its own.
Regret: the mean loss at the recommended rate over the grid's seeds (trained afresh) less that of the grid's best rate,
in σ. The bar: at most 2 σ in 9 of 10, at most a fifth of the grid's steps, σ at most 0.02. Runs and searches are kept
in --cache: remove it to measure anew.

--transfer searches at the smaller width, predicts the rate of the larger one (`bytekiln.search.transfer`), and searches
a grid of factor 2 round it there; the bar: found and predicted are at most one step apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "shakespeare" / "tinyshakespeare.txt.xz"
MODEL: dict[str, Any] = {
    "d_model": 48, "num_layers": 2, "num_heads": 4, "context_length": 32, "ffn": "gelu", "batch_size": 16,
    "max_steps": 300, "schedule": "cosine", "decay_lr": True, "warmup_rule": "fraction", "warmup_fraction": 0.05,
    "weight_decay": 0.1, "beta2": 0.99, "eval_interval": 25, "num_eval_batches": 20, "precision": "fp32",
    "device": "cpu", "compile": False,
}  # fmt: skip
RATES = [float(f"{10 ** (-4 + i / 4):.3g}") for i in range(13)]
GRID_SEEDS, SIGMA_SEEDS = (1, 2, 3), (1, 2, 3, 4, 5)
DIVERGED_ROWS, DIVERGED_FACTOR = 3, 2.0  # as `train` has it
Curve = list[tuple[int, float]]


def token_files(text: Path | None, folder: Path) -> dict[str, Any]:
    """Characters of a text as token files, the last tenth to validate on."""
    import numpy as np

    path = text or SHARED
    if not path.exists():
        sys.exit(f"{path}: no such file; expected --text FILE")
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    symbols, ids = np.unique(np.frombuffer(raw, np.uint8), return_inverse=True)
    cut = len(ids) * 9 // 10
    files = {"train_data": str(folder / "train.npy"), "val_data": str(folder / "val.npy")}
    np.save(files["train_data"], ids[:cut].astype(np.uint16))
    np.save(files["val_data"], ids[cut:].astype(np.uint16))
    return {**files, "vocab_size": len(symbols)}


class Live:
    """A run that can be paused: it simply is not asked for more."""

    def __init__(self, fields: dict[str, Any]) -> None:
        from bytekiln.config import load_config
        from bytekiln.search.bare_run import BareRun

        self.run = BareRun(load_config(None, fields))
        self.curve: Curve = []
        self.start: float | None = None
        self.high, self.status = 0, "interrupted"

    def to(self, until: int) -> None:
        """Train up to a step."""
        t = self.run.config.training
        while self.status == "interrupted" and self.run.step < until:
            loss = self.run.take_step()
            self.start = loss if self.start is None else self.start
            self.high = self.high + 1 if loss > DIVERGED_FACTOR * self.start else 0
            if not math.isfinite(loss) or self.high >= DIVERGED_ROWS:
                self.status = "diverged"
            elif self.run.step % t.eval_interval == 0 or self.run.step == t.max_steps:
                self.curve.append((self.run.step, self.run.val_loss()))
                if self.run.step == t.max_steps:
                    self.status = "completed"


class InProcess:
    """A `Runner` of live runs."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields, self.live = fields, dict[tuple[float, int], Live]()

    def __call__(self, wanted: Sequence[Any]) -> list[Any]:
        from bytekiln.search.plan import Seen

        seen = []
        for w in wanted:
            if (w.lr, w.seed) not in self.live:
                self.live[w.lr, w.seed] = Live({**self.fields, "lr": w.lr, "seed": w.seed})
            run = self.live[w.lr, w.seed]
            run.to(w.until)
            seen.append(Seen(w.stage, w.lr, w.seed, run.status, run.run.step, tuple(run.curve)))
            if run.status != "interrupted":
                run.run.close()
        return seen


def full_run(job: tuple[dict[str, Any], float, int]) -> tuple[float, int, Curve, str]:
    """A whole run, in a worker."""
    fields, lr, seed = job
    run = Live({**fields, "lr": lr, "seed": seed})
    run.to(fields["max_steps"])
    return lr, seed, run.curve, run.status


class Cache:
    """Whole runs by (rate, seed), in a file of one line a run."""

    def __init__(self, fields: dict[str, Any], folder: Path, workers: Any) -> None:
        shape = {k: v for k, v in fields.items() if not k.endswith("_data")}
        data = hashlib.sha256(Path(fields["train_data"]).read_bytes()).hexdigest()
        key = hashlib.sha256(json.dumps([shape, data], sort_keys=True).encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.fields, self.workers = folder / f"runs-{key}.jsonl", fields, workers
        self.runs: dict[tuple[float, int], float] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            (lr, seed), curve = json.loads(line)
            self.runs[lr, seed] = best(curve)

    def losses(self, rates: Sequence[float], seeds: Sequence[int]) -> dict[tuple[float, int], float]:
        """Best validation loss of each; a diverged run's is infinite."""
        todo = [(self.fields, lr, s) for s in seeds for lr in rates if (lr, s) not in self.runs]
        with self.path.open("a") as out:
            for lr, seed, curve, status in self.workers.imap(full_run, todo):
                curve = curve if status == "completed" else []
                out.write(json.dumps([[lr, seed], curve]) + "\n")
                out.flush()
                self.runs[lr, seed] = best(curve)
                print(f"  lr {lr:g}, seed {seed}: {status}, {self.runs[lr, seed]:.4f}", file=sys.stderr, flush=True)
        return {(lr, s): self.runs[lr, s] for lr in rates for s in seeds}


def best(curve: Curve) -> float:
    """The lowest loss of a curve."""
    return min((loss for _, loss in curve), default=math.inf)


def one_search(job: tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]) -> dict[str, Any]:
    """A search with seeds of its own, range test and all, in a worker."""
    from bytekiln.config import load_config
    from bytekiln.search.plan import Plan, rungs_of
    from bytekiln.search.range_test import measure
    from bytekiln.search.stages import Search

    fields, seeds, more = job
    began = time.perf_counter()
    steps = fields["max_steps"]
    settings: dict[str, Any] = {
        "seeds": seeds, "rungs": rungs_of(steps, fields["eval_interval"]), "range_steps": max(round(0.15 * steps), 30),
        "low": 1e-5, "high": 10.0,
    }  # fmt: skip
    plan = Plan(steps, **{**settings, **more})

    def range_test() -> dict[str, Any]:
        config = load_config(None, {**fields, "seed": seeds[0]})
        return measure(config, low=plan.low, high=plan.high, steps=plan.range_steps).summary

    found = Search(plan, InProcess(fields), range_test).run()
    fit = found.last_fit or found.fit
    return {
        "seeds": seeds, "status": found.status, "suggestion": found.found_range.get("suggestion"),
        "lr": found.recommended, "low": fit.low if fit else None, "high": fit.high if fit else None,
        "bounded": fit.bounded if fit else None, "predicted": found.predicted_loss,
        "confirmed": found.confirmed_loss, "steps": found.steps, "share": found.steps / plan.grid_steps,
        "given_up": sum(bool(r.given_up) for r in found.runs.values()), "notes": [*found.notes],
        "runs": [(r.lr, r.seed, r.status, r.steps, r.best) for r in found.runs.values()],
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def against_the_grid(options: argparse.Namespace, fields: dict[str, Any], workers: Any) -> int:
    """The bench; its exit status is 0 where the bar is reached."""
    from bytekiln.search.rate_fit import Point, fit_rates

    cache = Cache(fields, options.cache, workers)
    grid = cache.losses(RATES, GRID_SEEDS)
    means = {lr: statistics.fmean(grid[lr, s] for s in GRID_SEEDS) for lr in RATES}
    top = min(means, key=lambda lr: means[lr])
    at_top = list(cache.losses([top], SIGMA_SEEDS).values())
    sigma = statistics.stdev(at_top)
    truth = fit_rates([Point(lr, s, loss) for (lr, s), loss in grid.items()])
    print("| lr | mean of 3 seeds | above the best, σ |\n|---|---|---|")
    for lr in RATES:
        print(f"| {lr:g} | {means[lr]:.4f} | {(means[lr] - means[top]) / sigma:.1f} |")
    print(f"\nσ from {len(SIGMA_SEEDS)} seeds at {top:g}: {sigma:.4f} (bar: at most 0.02)")
    print(f"the grid's own parabola: {truth.lr:.3g}, {truth.low:.3g} to {truth.high:.3g}, loss {truth.loss:.4f}\n")
    if options.grid_only:
        return 0
    kept = cache.path.with_name(cache.path.name.replace("runs-", "searches-"))
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    found: list[dict[str, Any]] = [told for told in known if told["seeds"][0] < 101 + 2 * options.searches]
    done = {tuple(told["seeds"]) for told in found}
    jobs: list[Any] = [(fields, (101 + 2 * i, 102 + 2 * i), {}) for i in range(options.searches)]
    with kept.open("a") as out:
        for told in workers.imap(one_search, [job for job in jobs if job[1] not in done]):
            found.append(told)
            out.write(json.dumps(told) + "\n")
            out.flush()
            print(f"  search {len(found)}: {told['lr']:g}, {told['seconds']:.0f} s", file=sys.stderr, flush=True)
    afresh = cache.losses(sorted({told["lr"] for told in found}), GRID_SEEDS)
    print("| seeds | suggestion | recommended | interval | predicted | confirmed | regret, σ | of the grid | status |")
    print("|---|---|---|---|---|---|---|---|---|")
    good, covered = 0, 0
    for told in found:
        mean = statistics.fmean(afresh[told["lr"], s] for s in GRID_SEEDS)
        regret = (mean - means[top]) / sigma
        good += regret <= 2
        covered += told["low"] <= truth.lr <= told["high"]
        print(
            f"| {', '.join(map(str, told['seeds']))} | {told['suggestion']:.2g} | {told['lr']:.3g} | "
            f"{told['low']:.2g} to {told['high']:.2g}{'' if told['bounded'] else ' (open)'} | "
            f"{told['predicted'] or math.nan:.4f} | {told['confirmed']:.4f} | {regret:+.2f} | "
            f"{100 * told['share']:.1f} % | {told['status']} |"
        )
        for note in told["notes"]:
            print(f"|  | {note} |")
    worst = max(told["share"] for told in found)
    print(
        f"\nregret at most 2 σ in {good} of {len(found)} (bar: 9 of 10); at most {100 * worst:.1f} % of the grid's "
        f"steps (bar: 20 %); the grid's optimum lies in {covered} of {len(found)} intervals"
    )
    return 0 if good >= 0.9 * len(found) and worst <= 0.2 and sigma <= 0.02 else 1


def transferred(options: argparse.Namespace, fields: dict[str, Any], workers: Any) -> int:
    """The record of a transfer in width, for each optimizer."""
    optimizers = ["adamw", "muon"] if options.optimizer == "both" else [options.optimizer]
    told = list(workers.imap(one_transfer, [(fields, o, tuple(options.widths)) for o in optimizers]))
    print("| optimizer | width | found there | rule | predicted | width | found there | steps apart | minutes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for t in told:
        print(
            f"| {t['optimizer']} | {options.widths[0]} | {t['source']:.3g} | {t['rule']} | {t['predicted']:.3g} | "
            f"{options.widths[1]} | {t['found']:.3g} | {t['off']:+.2f} | {t['seconds'] / 60:.1f} |"
        )
        for where, runs in (("source", t["source_runs"]), ("target", t["target_runs"])):
            full = sorted((lr, seed, b[0]) for lr, seed, status, _, b in runs if status == "completed")
            print(f"|  | {where}: " + ", ".join(f"{lr:.3g} {loss:.4f}" for lr, _, loss in full) + " |")
    return 0 if all(abs(t["off"]) <= 1 for t in told) else 1


def one_transfer(job: tuple[dict[str, Any], str, tuple[int, int]]) -> dict[str, Any]:
    """Search at the smaller width, predict, search beside the prediction at the larger one."""
    from bytekiln.config import load_config
    from bytekiln.search.transfer import off_by, predict

    fields, optimizer, widths = job
    began = time.perf_counter()
    small, large = ({**fields, "optimizer": optimizer, "d_model": w, "num_heads": max(w // 32, 1)} for w in widths)
    source = one_search((small, (1,), {}))
    said = predict(source["lr"], load_config(None, small), load_config(None, large))
    print(f"  {optimizer}: {said.rule}", file=sys.stderr, flush=True)
    near = {"points": 3, "centre": said.lr, "range_steps": 0, "rungs": (), "keep": ()}
    target = one_search((large, (1,), {**near, "budget": 8 * fields["max_steps"]}))
    return {
        "optimizer": optimizer, "source": source["lr"], "rule": said.rule, "predicted": said.lr, "found": target["lr"],
        "off": off_by(said.lr, target["lr"], 2.0), "seconds": time.perf_counter() - began,
        "source_runs": source["runs"], "target_runs": target["runs"],
    }  # fmt: skip


def main() -> int:
    """Read the flags, make the data, fork the workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=10)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "bytekiln-lr-search")
    parser.add_argument("--grid-only", action="store_true")
    parser.add_argument("--transfer", action="store_true")
    parser.add_argument("--optimizer", choices=["adamw", "muon", "both"], default="both")
    parser.add_argument("--widths", type=int, nargs=2, default=[128, 512])
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # a worker a core
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fields = {**MODEL, **token_files(options.text, Path(folder))}
        if options.transfer:
            fields["max_steps"] = options.steps or 100
            fields["eval_interval"] = max(fields["max_steps"] // 12, 1)
            fields["num_eval_batches"] = 10
        elif options.steps:
            fields["max_steps"] = options.steps
        with multiprocessing.get_context("fork").Pool(options.workers) as workers:
            status = (transferred if options.transfer else against_the_grid)(options, fields, workers)
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}, {options.workers} workers of one thread"
    print(f"\n{time.perf_counter() - began:.0f} s, {versions}")
    return status


if __name__ == "__main__":
    sys.exit(main())
