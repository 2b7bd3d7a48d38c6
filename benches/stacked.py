"""Four runs of 0.3 million parameters trained together, against the same four in turn, in one process.

    python benches/stacked.py [--threads 1 2] [--steps 60] [--shapes 12x64 8x64 …] [--runs 4] [--compile] [--json]
    python benches/stacked.py --command [--rounds 3] [--steps 300] [--shapes 8x32 …] [--runs 4]

The model is 3 layers × 96, 3 heads, 65 tokens, tied embeddings (nanoGPT's recipe for Shakespeare, narrower): 0.34
million parameters; a shape is batch × context. A step is what a run does between two evaluations: windows, forward,
backward, clipping, AdamW, the guard, and the row in metrics.csv. Both contestants are built by `train_stacked`'s own
parts and take turns at every step, each thread count in a fresh process, so that what else the machine does hits both.
Reported are the medians in ms for one step of all runs, on the wall and in CPU time of the process (which on one thread
does not count what other programs took away), the ratio of each, and where the bar of 2 is met. The weights of both
must be equal to 1e-5 at the end. `--compile` gives both the compiler.

`--command` measures what a user waits for: the whole of `lm-sweep` over four learning rates, start to end, with
`--stack` and without (a process a run, one after the other), taking turns; throughput is steps of all runs over that
time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the commands do

SHAPES = ("12x64", "8x64", "8x32", "4x32", "2x32", "1x32")
BAR = 2.0
VOCAB = 65
WARMUP = 5


def measure(shape: str, threads: int, runs: int, steps: int, compiled: bool) -> dict[str, object]:
    """Both contestants in this process, a step each in turn."""
    import numpy as np
    import torch

    from bytekiln.config import load_config
    from bytekiln.prepare import keep_freed_memory
    from bytekiln.runfolder import prepare_folder
    from bytekiln.signals import Signals
    from bytekiln.stack.command import _prepared
    from bytekiln.stack.run import Stack, StackedRun

    torch.set_num_threads(threads)
    keep_freed_memory()
    batch, context = map(int, shape.split("x"))
    with tempfile.TemporaryDirectory() as name, ExitStack() as open_runs:
        folder = Path(name)
        np.save(folder / "train.npy", np.random.default_rng(0).integers(0, VOCAB, 100_000).astype(np.uint16))
        signals = open_runs.enter_context(Signals())

        def built(kind: str) -> list[StackedRun]:
            made = []
            for i in range(runs):
                config = load_config(
                    "shakespeare-char-cpu",
                    {
                        "vocab_size": VOCAB, "num_layers": 3, "d_model": 96, "num_heads": 3,
                        "batch_size": batch, "context_length": context, "max_seq_len": 64, "lr": 1e-4 * 2**i,
                        "warmup_steps": 1, "max_steps": 100_000, "train_data": str(folder / "train.npy"),
                        "num_eval_batches": 1, "precision": "fp32", "device": "cpu", "compile": compiled,
                        "sample_tokens": 0, "out_dir": str(folder / f"{kind}{i}"),
                    },
                    say=lambda _: None,
                )  # fmt: skip
                run = _prepared(config, None, False, None, signals, 0.0, lambda _: None, lambda _: None)
                prepare_folder(run.config.output, False, resuming=False)
                run.begin()
                open_runs.callback(run.close)
                if compiled and kind == "single":
                    run.learner.compile(run.data.train.batch(0, 0, 0, batch), print)
                made.append(run)
            return made

        singles, together = built("single"), built("stacked")
        stack = Stack(together, print)
        if compiled:
            stack.compile()

        def in_turn() -> None:
            for run in singles:
                run.began = time.perf_counter()
                run.step()

        def stacked() -> None:
            began = time.perf_counter()
            for run in together:
                run.began = began
            stack.gradients()
            for run in together:
                run.step()

        taken: dict[str, list[tuple[float, float]]] = {"in turn": [], "stacked": []}
        for step in range(WARMUP + steps):
            order = [("in turn", in_turn), ("stacked", stacked)]
            for kind, act in order if step % 2 else reversed(order):
                wall, cpu = time.perf_counter(), time.process_time()
                act()
                if step >= WARMUP:
                    taken[kind].append((time.perf_counter() - wall, time.process_time() - cpu))
        parameters = together[0].parameters
        pairs = zip(singles, together, strict=True)
        apart = max(
            float((a - b).abs().max())
            for one, other in pairs
            for a, b in zip(one.learner.model.parameters(), other.learner.model.parameters(), strict=True)
        )
    out: dict[str, object] = {
        "shape": shape, "threads": threads, "runs": runs, "compiled": compiled, "parameters": parameters, "apart": apart
    }  # fmt: skip
    for i, clock in enumerate(("wall", "cpu")):
        ms = {kind: [1000 * t[i] for t in times] for kind, times in taken.items()}
        for kind, values in ms.items():
            out[f"{clock} {kind}"] = round(statistics.median(values), 2)
            out[f"{clock} {kind}, least"] = round(min(values), 2)
        out[f"{clock} ratio"] = round(statistics.median(ms["in turn"]) / statistics.median(ms["stacked"]), 2)
        out[f"{clock} ratio of the least"] = round(min(ms["in turn"]) / min(ms["stacked"]), 2)
    return out


def commands(shape: str, runs: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the whole sweep, in turn and stacked."""
    import numpy as np

    batch, context = shape.split("x")
    taken: dict[str, list[float]] = {"in turn": [], "stacked": []}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "train.npy"
        np.save(data, np.random.default_rng(0).integers(0, VOCAB, 100_000).astype(np.uint16))
        fields = {
            "vocab-size": VOCAB, "num-layers": 3, "d-model": 96, "num-heads": 3, "batch-size": batch,
            "context-length": context, "max-seq-len": 64, "max-steps": steps, "warmup-steps": 1,
            "num-eval-batches": 1, "sample-tokens": 0, "compile": "false", "train-data": data,
        }  # fmt: skip
        line = [str(Path(sys.executable).parent / "lm-sweep"), "shakespeare-char-cpu"]
        line += ["--lrs", " ".join(f"{1e-4 * 2**i:g}" for i in range(runs))]
        line += [word for field, value in fields.items() for word in (f"--{field}", str(value))]
        for i in range(rounds):
            order = list(taken) if i % 2 == 0 else list(reversed(taken))
            for kind in order:
                folder = Path(name) / f"{kind}{i}"
                began = time.perf_counter()
                extra = ["--stack", str(runs)] if kind == "stacked" else []
                subprocess.run([*line, *extra, "--folder", str(folder)], check=True, capture_output=True, cwd=name)
                taken[kind].append(time.perf_counter() - began)
    return taken


def main() -> int:
    """0: measured; the table says where the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--command", action="store_true", help="the whole of lm-sweep instead of single steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line a measurement instead of the table")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options.shapes[0], options.threads[0], options.runs, options.steps, options.compile)))
        return 0
    if options.command:
        print("| batch × context | steps | in turn, s (median / least) | stacked, s | ratio (median / least) | ≥ 2 |")
        print("|---|---|---|---|---|---|")
        for shape in options.shapes:
            taken = commands(shape, options.runs, options.steps, options.rounds)
            of = [(statistics.median(t), min(t)) for t in taken.values()]
            ratio = of[0][0] / of[1][0]
            cells = [f"{median:.1f} / {least:.1f}" for median, least in of]
            cells += [f"{ratio:.2f} / {of[0][1] / of[1][1]:.2f}", "yes" if ratio >= BAR else "no"]
            print("| " + " | ".join([shape, str(options.steps), *cells]) + " |", flush=True)
        return 0
    if not options.json:
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print("| batch × context | threads | in turn, ms (median / least) | stacked, ms | ratio (median / least) |"
              " CPU: in turn | stacked | ratio | ≥ 2 |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|")
    for threads in options.threads:
        for shape in options.shapes:
            command = [sys.executable, __file__, "--once", "--threads", str(threads), "--shapes", shape]
            command += ["--runs", str(options.runs), "--steps", str(options.steps)]
            command += ["--compile"] if options.compile else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stderr.write(done.stderr)
                return 1
            line = done.stdout.strip().splitlines()[-1]
            if options.json:
                print(line, flush=True)
                continue
            r = json.loads(line)
            cells = [shape, threads]
            cells += [f"{r[f'wall {kind}']} / {r[f'wall {kind}, least']}" for kind in ("in turn", "stacked")]
            cells += [f"{r['wall ratio']} / {r['wall ratio of the least']}"]
            cells += [r["cpu in turn"], r["cpu stacked"], r["cpu ratio"], "yes" if r["wall ratio"] >= BAR else "no"]
            apart = f" weights differ by {r['apart']}" if r["apart"] and not options.compile else ""
            print("| " + " | ".join(map(str, cells)) + " |" + apart, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
