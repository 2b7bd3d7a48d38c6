"""How soon a model of characters is as good as nanoGPT's CPU recipe makes one: our preset beside that recipe.

    time_to_loss.py [--preset shakespeare-char-cpu] [--seeds 5] [--target 1.886] [--threads 2] [--whole] [--json]
    time_to_loss.py --once [--json]                          # one seed of each

The text is Karpathy's tinyshakespeare (1,003,854 characters to train on, 111,540 to validate), `--text FILE` or the
one of ../shared/data. Ours is the command that a user types, `lm-train PRESET` in a fresh process and folder; its loss
is that of the whole validation split at the end. The peer is nanoGPT's recipe on a plain PyTorch model of its shape
(`peers_lm`): 4 layers × 128, 4 heads, batch 12 × 64, AdamW with clipping, 2,000 steps; its time is the median of 40
steps × 2,000, with `--compiled-peer` eager or compiled as is faster. `--whole` trains the peer to its end instead, and
validates it, too. Both take turns, the order turning round each round.

`ours_s` and `peer_s` are seconds of steps alone (a window drawn, forward, backward, clipping, update). Compiling,
evaluations and checkpoints are listed apart: `ours_process_s` is the whole process from its start. The ratio that
counts is peer_s / ours_s, of medians, where the loss was reached.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TEXT = ROOT.parent / "shared" / "data" / "shakespeare" / "tinyshakespeare.txt.xz"
STEPS, TIMED, WARM = 2000, 40, 10
BATCH, CONTEXT, VOCAB = 12, 64, 65


def data_folder(text: Path, folder: Path) -> None:
    """Encode the text as `bpe-encode --characters` does: nine tenths to train on."""
    raw = lzma.decompress(text.read_bytes()) if text.suffix == ".xz" else text.read_bytes()
    (folder / "input.txt").write_bytes(raw)
    command = [
        sys.executable,
        "-m",
        "bytekiln.cli",
        "bpe-encode",
        "input.txt",
        "--characters",
        "--dataset",
        "shakespeare-char",
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def ours(preset: str, seed: int, threads: int, folder: Path) -> dict[str, Any]:
    """One run of the preset."""
    name = f"ours-{seed}"
    command = [
        sys.executable, "-m", "bytekiln.cli", "lm-train", preset, "--dataset", "shakespeare-char",
        "--seed", str(seed), "--run-name", name, "--final-eval", "whole", "--overwrite",
    ]  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(threads), capture_output=True, text=True)
    process = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"lm-train {preset}: exit {done.returncode}\n{done.stderr[-2000:]}")
    run = folder / "runs" / name
    with (run / "metrics.csv").open() as file:
        times = [float(row["step_time_s"]) for row in csv.DictReader(file) if row["step_time_s"]]
    result = json.loads((run / "result.json").read_text())
    if len(times) != result["steps"]:
        raise SystemExit(f"{run}/metrics.csv: found {len(times)} steps; expected {result['steps']}")
    # The first step of a compiled run compiles: it counts as any other, and what is beyond that as compiling.
    usual = statistics.median(times)
    compiling = max(0.0, times[0] - usual) if result["compiled"] else 0.0
    return {
        "seed": seed, "ours_s": sum(times) - compiling, "ours_process_s": process, "compile_s": compiling,
        "step_ms": usual * 1e3, "steps": len(times), "loss": result["final_val_loss"],
        "parameters": result["parameters"],
    }  # fmt: skip


def environment(threads: int) -> dict[str, str]:
    """That of a fresh process with so many threads."""
    path = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def peer(threads: int, folder: Path, whole: bool, compiled: bool) -> dict[str, Any]:
    """nanoGPT's recipe in a fresh process."""
    command = [sys.executable, __file__, "--peer-process", str(folder), "--threads", str(threads)]
    command += ["--whole"] * whole + ["--compiled"] * compiled
    done = subprocess.run(command, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"peer: exit {done.returncode}\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def peer_process(folder: Path, threads: int, whole: bool, compiled: bool) -> None:
    """The recipe itself: constant settings of nanoGPT's README, learning rate 1e-3 → 1e-4 by a cosine, warm-up 100."""
    import numpy as np
    import torch

    import peers_lm

    torch.set_num_threads(threads)
    torch.manual_seed(1337)
    train, valid = (
        torch.from_numpy(np.load(folder / "data" / "processed" / f"shakespeare-char_{part}.npy").astype(np.int64))
        for part in ("train", "valid")
    )
    model = peers_lm.plain_gpt2(peers_lm.SHAPES["gpt2"])
    forward = torch.compile(model) if compiled else model
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)

    def windows(tokens: Any) -> tuple[Any, Any]:
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,))
        rows = torch.stack([tokens[s : s + CONTEXT + 1] for s in starts.tolist()])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step(n: int) -> None:
        part = (n - 100) / (STEPS - 100)
        lr = 1e-3 * (n + 1) / 101 if n < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * part)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = windows(train)
        forward(inputs, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    begin, times = time.perf_counter(), []
    for n in range(STEPS if whole else WARM + TIMED):
        start = time.perf_counter()
        step(n)
        times.append(time.perf_counter() - start)
    usual = statistics.median(times[WARM:])
    answer = {"peer_s": sum(times) if whole else usual * STEPS, "peer_step_ms": usual * 1e3, "compiled": compiled}
    if whole:
        rows = valid[: (len(valid) - 1) // CONTEXT * CONTEXT + 1]
        inputs, targets = rows[:-1].view(-1, CONTEXT), rows[1:].view(-1, CONTEXT)
        with torch.no_grad():
            parts = zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True)
            losses = [model(x, y).item() * y.numel() for x, y in parts]
        answer |= {"peer_loss": sum(losses) / targets.numel(), "peer_process_s": time.perf_counter() - begin}
    print(json.dumps(answer))


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="shakespeare-char-cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--target", type=float, default=1.886)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--whole", action="store_true", help="train the peer to its end, and validate it")
    parser.add_argument("--compiled-peer", action="store_true", help="time the compiled peer, too, and take the faster")
    parser.add_argument("--once", action="store_true", help="one seed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer-process", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer_process:
        peer_process(args.peer_process, args.threads, args.whole, args.compiled)
        return
    if not args.text.exists():
        parser.error(f"--text: {args.text}: no such file; expected tinyshakespeare's text")
    runs: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_folder(args.text, folder)
        for seed in range(1, 2 if args.once else args.seeds + 1):
            turns = ["ours", "eager", *["compiled"] * args.compiled_peer]
            for turn in turns if seed % 2 else turns[::-1]:
                if turn == "ours":
                    runs.append(ours(args.preset, seed, args.threads, folder))
                else:
                    peers.append(peer(args.threads, folder, args.whole, turn == "compiled"))
            if not args.json:
                print(json.dumps(runs[-1]), json.dumps(peers[-1]), sep="\n", flush=True)
    kinds = {kind: [p["peer_s"] for p in peers if p["compiled"] == kind] for kind in (False, True)}
    answer = {
        "preset": args.preset,
        "ours_s": statistics.median(r["ours_s"] for r in runs),
        "peer_s": min(statistics.median(times) for times in kinds.values() if times),
        "ours_process_s": statistics.median(r["ours_process_s"] for r in runs),
        "loss": statistics.median(r["loss"] for r in runs),
        "worst_loss": max(r["loss"] for r in runs),
        "target": args.target,
        "reached": sum(r["loss"] <= args.target for r in runs),
        "seeds": len(runs),
    }
    if args.whole:
        answer["peer_loss"] = statistics.median(p["peer_loss"] for p in peers)
    answer["ratio"] = answer["peer_s"] / answer["ours_s"]
    print(json.dumps(answer, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
