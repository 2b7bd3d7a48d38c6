"""Four runs of 0.3 million parameters trained together, against the same four in turn, in one process.

    python benches/stacked.py [--threads 1 2] [--steps 60] [--shapes 12x64 8x64 …] [--runs 4] [--compile] [--json]
    python benches/stacked.py --command [--rounds 3] [--steps 300] [--shapes 8x32 …] [--runs 4]

The model is 3 layers × 96, 3 heads, 65 tokens, tied embeddings (nanoGPT's recipe for Shakespeare, narrower): 0.34
million parameters; a shape is batch × context. A step is what a run does between two evaluations: windows, forward,
backward, clipping, AdamW, the guard, and the row in metrics.csv. All contestants are built by `train_stacked`'s own
parts and take turns at every step, each thread count in a fresh process, so that what else the machine does hits all.
In turn the runs have all threads. Runs so small are sooner done on one, so that on more threads there is a third
contestant, in turn on one thread, and a ratio to that too. Reported are the medians in ms for one step of all runs, on
the wall and in CPU time of the process (which on one thread does not count what other programs took away), the ratios,
and where the bar of 2 is met. At the end the weights of stacked runs must be those of runs in turn on as many threads
as a stacked one has. `--compile` gives the compiler to all.

`--command` measures what a user waits for: the whole of `lm-sweep` over four learning rates, start to end, with
`--stack` and without (a process a run, one after the other), taking turns; throughput is steps of all runs over that
time. `--jobs` adds what else would keep two cores busy: two processes at once, with runs of their own or half a stack
each.
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
    """All contestants in this process, a step each in turn."""
    import numpy as np
    import torch

    from bytekiln.config import load_config
    from bytekiln.prepare import keep_freed_memory
    from bytekiln.runfolder import prepare_folder
    from bytekiln.signals import Signals
    from bytekiln.stack.command import _prepared
    from bytekiln.stack.run import StackedRun, Stacks, divided_threads

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
                    "nanogpt-cpu",
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
                if compiled and kind != "stacked":
                    run.learner.compile(run.data.train.batch(0, 0, 0, batch), print)
                made.append(run)
            return made

        kinds = ["in turn", "stacked", *(["on one thread"] if 1 < threads < 2 * runs and not compiled else [])]
        made = {kind: built(kind) for kind in kinds}
        together = made["stacked"]
        with divided_threads(together) as most:
            share = torch.get_num_threads()
            stacks = Stacks(together, most, print)
        open_runs.callback(stacks.close)
        if compiled:
            stacks.compile()

        def act(kind: str) -> None:
            if kind == "stacked":
                began = time.perf_counter()
                for run in together:
                    run.began = began
                assert not stacks.gradients()
            for run in made[kind]:
                if kind != "stacked":
                    run.began = time.perf_counter()
                run.step()

        on = {"in turn": threads, "stacked": share, "on one thread": 1}
        taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for step in range(WARMUP + steps):
            for kind in kinds if step % 2 else reversed(kinds):
                torch.set_num_threads(on[kind])
                wall, cpu = time.perf_counter(), time.process_time()
                act(kind)
                if step >= WARMUP:
                    taken[kind].append((time.perf_counter() - wall, time.process_time() - cpu))
        parameters = together[0].parameters
        like = "on one thread" if share < threads else "in turn"
        apart = max(
            float((a - b).detach().abs().max())
            for one, other in zip(made[like], together, strict=True)
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
        for kind in kinds:
            out[f"{clock} ratio, {kind}"] = round(statistics.median(ms[kind]) / statistics.median(ms["stacked"]), 2)
            out[f"{clock} ratio of the least, {kind}"] = round(min(ms[kind]) / min(ms["stacked"]), 2)
    return out


def commands(shape: str, runs: int, steps: int, rounds: int, jobs: bool) -> dict[str, list[float]]:
    """Seconds of the whole sweep, each way."""
    import numpy as np

    batch, context = shape.split("x")
    flags: dict[str, list[str]] = {"in turn": [], "stacked": ["--stack", str(runs)]}
    if jobs:
        flags |= {"two jobs": ["--jobs", "2"], "two jobs, stacked": ["--jobs", "2", "--stack", str(runs // 2)]}
    taken: dict[str, list[float]] = {kind: [] for kind in flags}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "train.npy"
        np.save(data, np.random.default_rng(0).integers(0, VOCAB, 100_000).astype(np.uint16))
        fields = {
            "vocab-size": VOCAB, "num-layers": 3, "d-model": 96, "num-heads": 3, "batch-size": batch,
            "context-length": context, "max-seq-len": 64, "max-steps": steps, "warmup-steps": 1,
            "num-eval-batches": 1, "sample-tokens": 0, "compile": "false", "train-data": data,
        }  # fmt: skip
        line = [str(Path(sys.executable).parent / "lm-sweep"), "nanogpt-cpu"]
        line += ["--lrs", " ".join(f"{1e-4 * 2**i:g}" for i in range(runs))]
        line += [word for field, value in fields.items() for word in (f"--{field}", str(value))]
        for i in range(rounds):
            order = list(taken) if i % 2 == 0 else list(reversed(taken))
            for kind in order:
                folder = Path(name) / f"{kind}{i}"
                began = time.perf_counter()
                command = [*line, *flags[kind], "--folder", str(folder)]
                subprocess.run(command, check=True, capture_output=True, cwd=name)
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
    parser.add_argument("--jobs", action="store_true", help="with --command: two processes at once, too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line a measurement instead of the table")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options.shapes[0], options.threads[0], options.runs, options.steps, options.compile)))
        return 0
    if options.command:
        more = " two jobs, s | two jobs of stacks, s |" if options.jobs else ""
        head = "| batch × context | steps | in turn, s (median / least) | stacked, s | ratio (median / least) | ≥ 2 |"
        print(head + more)
        print("|---" * (head + more).count(" |") + "|")
        for shape in options.shapes:
            taken = commands(shape, options.runs, options.steps, options.rounds, options.jobs)
            of = [(statistics.median(t), min(t)) for t in taken.values()]
            ratio = of[0][0] / of[1][0]
            cells = [f"{median:.1f} / {least:.1f}" for median, least in of]
            cells[2:2] = [f"{ratio:.2f} / {of[0][1] / of[1][1]:.2f}", "yes" if ratio >= BAR else "no"]
            print("| " + " | ".join([shape, str(options.steps), *cells]) + " |", flush=True)
        return 0
    if not options.json:
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print("| batch × context | threads | in turn, ms (median / least) | stacked, ms | ratio (median / least) |"
              " ≥ 2 | CPU: in turn | stacked | in turn on one thread, ms | ratio |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|---|")
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
            ratio = r["wall ratio, in turn"]
            cells += [f"{ratio} / {r['wall ratio of the least, in turn']}", "yes" if ratio >= BAR else "no"]
            cells += [r["cpu in turn"], r["cpu stacked"]]
            one = "on one thread" if "wall on one thread" in r else "in turn"
            cells += [f"{r[f'wall {one}']} / {r[f'wall {one}, least']}"]
            cells += [f"{r[f'wall ratio, {one}']} / {r[f'wall ratio of the least, {one}']}"]
            apart = f" weights differ by {r['apart']}" if r["apart"] and not options.compile else ""
            print("| " + " | ".join(map(str, cells)) + " |" + apart, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
