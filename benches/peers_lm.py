"""A training step beside its peers: bytekiln, transformers, and a plain PyTorch GPT-2.

    peers.py lm [--quick] [--rounds 3] [--threads N] [--only NAME…] [--shape gpt2|llama] [--json]
                [--together | --once NAME]

Two shapes. gpt2: nanoGPT's recipe for a CPU, 4 layers × 128, 4 heads, batch 12 × 64, 65 tokens, tied embeddings.
llama: the TinyStories base, 4 × 512, 16 heads, d_ff 1344, 10,000 tokens (22.7 M parameters), batch 8 × 256. A step is
forward, backward, clipping to 1 and AdamW with decay on matrices, in fp32 unless a name says otherwise, on random
ids. Every run is a fresh process
and the contestants take turns, the order turning round each round; reported are the median of all steps, the fastest
one, and the ratio of the medians. What comes before the first timed step (start, imports, compiling) is a column of its
own. All get what `lm-train` sets for itself: fused AdamW, freed memory kept, OpenMP's threads that wait passively.
`--together` puts the contestants of a round into one process, where they take turns at every step, eager and compiled
in rounds of their own: what else the machine does then hits all of them alike, and differences of a few per cent show.
`--once NAME` runs a single contestant in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

PEAK_LR = 1e-3
SEED = 42
CLIP = 1.0
DECAY = 0.1
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Shape:
    """What is trained, and how many steps are timed."""

    layers: int
    width: int
    heads: int
    d_ff: int
    vocab: int
    batch: int
    context: int
    warmup: int
    steps: int


SHAPES = {
    "gpt2": Shape(4, 128, 4, 512, 65, 12, 64, warmup=10, steps=100),
    "llama": Shape(4, 512, 16, 1344, 10_000, 8, 256, warmup=2, steps=6),
}
Step = Callable[[], Any]
"""One optimizer step; gives the loss, a 0-D tensor."""
Build = Callable[[Shape, bool], Step]
CONTESTANTS: dict[str, dict[str, tuple[str, Build]]] = {"gpt2": {}, "llama": {}}
"""shape → contestant → (package, what builds its step; the flag asks for torch.compile)"""


def contestant(shape: str, name: str, package: str) -> Callable[[Build], Build]:
    """Enter a contestant, eager and compiled."""

    def enter(build: Build) -> Build:
        CONTESTANTS[shape][name] = (package, build)
        return build

    return enter


def batches(shape: Shape) -> Callable[[], Any]:
    """The same random windows for all: one id more than the context."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    return lambda: torch.randint(0, shape.vocab, (shape.batch, shape.context + 1), generator=generator)


# --- bytekiln, its own modules put together as `learner.Learner` does --------------------------------------------


def ours(shape: Shape, compiled: bool, **model: Any) -> Step:
    """A step of a bytekiln run."""
    import torch

    from bytekiln.config import from_flat
    from bytekiln.guard import Guard
    from bytekiln.model import TransformerLM
    from bytekiln.objective import Objective
    from bytekiln.optim import clip_gradients, make_optimizer

    config = from_flat(
        {
            "vocab_size": shape.vocab, "context_length": shape.context, "d_model": shape.width,
            "num_layers": shape.layers, "num_heads": shape.heads, "d_ff": shape.d_ff, "batch_size": shape.batch,
            "precision": "fp32", "lr": PEAK_LR, "weight_decay": DECAY, "beta1": BETAS[0], "beta2": BETAS[1], **model,
        }
    )  # fmt: skip
    lm = TransformerLM(config.model)
    objective = Objective(lm, config)
    loss_of = torch.compile(objective) if compiled else objective
    optimizer = make_optimizer(lm, config.optimizer)
    guard = Guard(torch.device("cpu"))
    draw, count = batches(shape), shape.batch * shape.context

    def step() -> Any:
        ids = draw()
        loss = loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        (loss.total / count).backward()
        mean = loss.nll / count
        take = guard.decide(mean, clip_gradients(optimizer.parameters, CLIP))
        optimizer.step(PEAK_LR, take)
        optimizer.zero_grad()
        return mean

    return step


@contestant("gpt2", "bytekiln", "bytekiln")
def _(shape: Shape, compiled: bool) -> Step:
    return ours(shape, compiled, norm="layer", position="learned", ffn="gelu", tie_embeddings=True, init="gpt2")


@contestant("llama", "bytekiln", "bytekiln")
def _(shape: Shape, compiled: bool) -> Step:
    return ours(shape, compiled)


@contestant("llama", "bytekiln, auto", "bytekiln")
def _(shape: Shape, compiled: bool) -> Step:
    import torch

    from bytekiln.muon import has_fast_bf16

    # What `precision = "auto"` comes to.
    return ours(shape, compiled, precision="bf16" if has_fast_bf16(torch.device("cpu")) else "fp32")


@contestant("llama", "bytekiln, auto, bf16 residual", "bytekiln")
def _(shape: Shape, compiled: bool) -> Step:
    import torch

    from bytekiln.muon import has_fast_bf16

    fast = has_fast_bf16(torch.device("cpu"))
    return ours(shape, compiled, precision="bf16" if fast else "fp32", residual_precision="products")


# --- transformers ------------------------------------------------------------------------------------------------


@contestant("gpt2", "transformers GPT-2", "transformers")
def _(shape: Shape, compiled: bool) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    return theirs(
        GPT2LMHeadModel(
            GPT2Config(  # type: ignore[call-arg]
                vocab_size=shape.vocab, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
                n_head=shape.heads, n_inner=shape.d_ff, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
                attn_implementation="sdpa",
            )
        ),
        shape,
        compiled,
    )  # fmt: skip


@contestant("llama", "transformers Llama", "transformers")
def _(shape: Shape, compiled: bool) -> Step:
    return theirs(llama_of_transformers(shape), shape, compiled)


@contestant("llama", "transformers Llama, bf16 by autocast", "transformers")
def _(shape: Shape, compiled: bool) -> Step:
    return theirs(llama_of_transformers(shape), shape, compiled, bf16=True)


def llama_of_transformers(shape: Shape) -> Any:
    """A new model of their own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(  # type: ignore[call-arg]
            vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.d_ff,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            max_position_embeddings=shape.context, tie_word_embeddings=False, use_cache=False, bos_token_id=0,
            eos_token_id=0, attn_implementation="sdpa",
        )
    )  # fmt: skip


def theirs(lm: Any, shape: Shape, compiled: bool, *, bf16: bool = False) -> Step:
    """A step of a transformers model, its loss made from labels as its users do (it drops one target a window)."""
    import torch

    lm.train()
    forward = torch.compile(lm) if compiled else lm

    def loss_of(x: Any, _: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return forward(input_ids=x, labels=x).loss

    return plain_loop(lm, loss_of, shape)


def plain_loop(lm: Any, loss_of: Callable[[Any, Any], Any], shape: Shape) -> Step:
    """A step as one writes it by hand."""
    import torch

    matrices = [p for p in lm.parameters() if p.ndim >= 2]
    vectors = [p for p in lm.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS, fused=True)
    draw = batches(shape)

    def step() -> Any:
        ids = draw()
        loss = loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# --- a plain PyTorch GPT-2: what one writes in an afternoon, attention through SDPA ------------------------------


def plain_gpt2(shape: Shape) -> Any:
    """A model whose forward takes ids and targets (both B × T) and gives the mean loss; initialised as nanoGPT does."""
    import torch
    import torch.nn.functional as F  # noqa: N812 - torch's own convention
    from torch import nn

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
            self.out = nn.Linear(shape.width, shape.width, bias=False)

        def forward(self, x: Any) -> Any:
            B, T, D = x.shape
            q, k, v = (y.view(B, T, shape.heads, D // shape.heads).transpose(1, 2) for y in self.qkv(x).split(D, dim=2))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(mixed.transpose(1, 2).reshape(B, T, D))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(shape.width, bias=False) for _ in range(2))
            self.mixer = Mixer()
            self.up = nn.Linear(shape.width, shape.d_ff, bias=False)
            self.down = nn.Linear(shape.d_ff, shape.width, bias=False)

        def forward(self, x: Any) -> Any:
            x = x + self.mixer(self.norm1(x))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class GPT2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(shape.vocab, shape.width)
            self.positions = nn.Embedding(shape.context, shape.width)
            self.layers = nn.Sequential(*(Layer() for _ in range(shape.layers)))
            self.norm = nn.LayerNorm(shape.width, bias=False)
            for name, p in self.named_parameters():
                if p.ndim >= 2:
                    projects = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(p, 0.0, 0.02 / (2 * shape.layers) ** 0.5 if projects else 0.02)

        def forward(self, ids: Any, targets: Any) -> Any:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            logits = F.linear(self.norm(self.layers(x)), self.tokens.weight)
            return F.cross_entropy(logits.view(-1, shape.vocab), targets.view(-1))

    return GPT2()


@contestant("gpt2", "plain PyTorch", "torch")
def _(shape: Shape, compiled: bool) -> Step:
    import torch

    lm = plain_gpt2(shape)
    return plain_loop(lm, torch.compile(lm) if compiled else lm, shape)


# --- the contest ---------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What one process measured."""

    ready_s: float
    """From the start of the process to the first timed step."""
    step_s: list[float]
    first_loss: float
    last_loss: float


def measure(shape: Shape, entered: dict[str, tuple[Build, bool]], threads: int) -> dict[str, Run]:
    """In the fresh process: warm up, then time every step; several contestants take turns, the order turning round."""
    began = time.perf_counter()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads OpenMP
    import gc

    import torch

    with contextlib.suppress(OSError, AttributeError):  # elsewhere than glibc there is nothing to set
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # as `prepare.keep_freed_memory`: M_MMAP_MAX, M_TRIM_THRESHOLD
    torch.set_num_threads(threads)
    steps, first = {}, {}
    for name, (build, compiled) in entered.items():
        torch.manual_seed(SEED)
        steps[name] = build(shape, compiled)
        first[name] = float(steps[name]())
        for _ in range(shape.warmup - 1):
            steps[name]()
    gc.collect()
    gc.disable()
    ready = time.perf_counter() - began
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, Any] = {}
    for i in range(shape.steps):
        for name in steps if i % 2 == 0 else reversed(steps):
            start = time.perf_counter()
            losses[name] = steps[name]()
            times[name].append(time.perf_counter() - start)
    return {name: Run(ready, times[name], first[name], float(losses[name])) for name in steps}


def entrants(shape: str, only: list[str]) -> dict[str, tuple[str, Build, bool]]:
    """name → (package, build, compiled) of those who are here."""
    found = {}
    for name, (package, build) in CONTESTANTS[shape].items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name}: {package} is not installed; left out", file=sys.stderr)
            continue
        for compiled in (False, True):
            full = f"{name}, {'compiled' if compiled else 'eager'}"
            if not only or any(o in full for o in only):
                found[full] = package, build, compiled
    return found


def one_process(shape: str, names: list[str], threads: int, steps: int) -> dict[str, Run] | str:
    """Contestants in one fresh process, or why there is no result."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, __file__, "--shape", shape, "--once", *names, "--json"]
    command += ["--steps", str(steps), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:100] if done.stderr.strip() else f"exit status {done.returncode}"
    return {name: Run(**run) for name, run in json.loads(done.stdout.splitlines()[-1]).items()}


def hold(
    shape: str, threads: int, rounds: int, only: list[str], steps: int, together: bool = False
) -> dict[str, list[Run]]:
    """All rounds, contestants taking turns: processes by default, steps where they are put `together`."""
    names = list(entrants(shape, only))
    groups = [[name] for name in names]
    if together:
        groups = [g for mode in ("eager", "compiled") if (g := [n for n in names if n.endswith(mode)])]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for i in range(rounds):
        for group in groups if i % 2 == 0 else [g[::-1] for g in groups[::-1]]:
            if not all(name in runs for name in group):
                continue
            found = one_process(shape, group, threads, steps)
            if isinstance(found, str):
                print(f"  {'; '.join(group)}: failed, left out: {found}", file=sys.stderr)
                for name in group:
                    del runs[name]
            else:
                for name in group:
                    runs[name].append(found[name])
    return {name: found for name, found in runs.items() if found}


def rows_of(shape: str, runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """The contest as rows, fastest first; ratios to bytekiln, eager to eager and compiled to compiled."""
    packages = {name: package for name, (package, _, _) in entrants(shape, []).items()}
    medians = {name: statistics.median(t for r in found for t in r.step_s) for name, found in runs.items()}
    rows = []
    for name, found in runs.items():
        ours_too = medians.get("bytekiln, " + name.rpartition(", ")[2])
        rows.append(
            {
                "shape": shape,
                "contestant": name,
                "version": importlib.metadata.version(packages[name]),
                "step_s_median": medians[name],
                "step_s_min": min(t for r in found for t in r.step_s),
                "steps": sum(len(r.step_s) for r in found),
                "ready_s_median": statistics.median(r.ready_s for r in found),
                "ratio": medians[name] / ours_too if ours_too else None,
                "first_loss": found[0].first_loss,
                "last_loss": found[0].last_loss,
            }
        )
    return sorted(rows, key=lambda row: row["step_s_median"])


def report(shape: str, threads: int, rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table."""
    s = SHAPES[shape]
    print(
        f"\nlm, {shape}: {s.layers} × {s.width}, {s.heads} heads, batch {s.batch} × {s.context}, {s.vocab:,} tokens, "
        f"threads: {threads}\n"
    )
    print("| contestant | step, ms (median / min) | steps | before the first, s | × bytekiln | loss, first → last |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else "–"
        times = f"{1e3 * row['step_s_median']:.1f} / {1e3 * row['step_s_min']:.1f} | {row['steps']}"
        losses = f"{row['first_loss']:.3f} → {row['last_loss']:.3f}"
        ready = f"{row['ready_s_median']:.1f}"
        print(f"| {row['contestant']} {row['version']} | {times} | {ready} | {ratio} | {losses} |")


def main(argv: list[str] | None = None) -> int:
    """Command line, also called by `peers.py lm`."""
    parser = argparse.ArgumentParser(
        prog="peers.py lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="one round, a third of the steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contestants whose names contain this")
    parser.add_argument("--steps", type=int, default=0, help="timed steps of a run; default: the shape's")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines instead of tables")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--together", action="store_true", help="contestants of a round in one process, step by step")
    how.add_argument("--once", nargs="+", metavar="NAME", help="run these contestants here, once")
    args = parser.parse_args(argv)
    for shape in args.shape:
        spec = SHAPES[shape]
        steps = args.steps or (max(spec.steps // 3, 2) if args.quick else spec.steps)
        if args.once:
            found = entrants(shape, [])
            if unknown := [name for name in args.once if name not in found]:
                parser.error(f"--once: found {unknown[0]}; expected some of {'; '.join(found)}")
            spec = Shape(**{**spec.__dict__, "steps": steps})
            ran = measure(spec, {name: found[name][1:] for name in args.once}, args.threads)
            if args.json:
                print(json.dumps({name: run._asdict() for name, run in ran.items()}))
            else:
                report(shape, args.threads, rows_of(shape, {name: [run] for name, run in ran.items()}))
            continue
        runs = hold(shape, args.threads, args.rounds or (1 if args.quick else 3), args.only, steps, args.together)
        rows = rows_of(shape, runs)
        if args.json:
            for row in rows:
                print(json.dumps({**row, "threads": args.threads}))
        elif rows:
            report(shape, args.threads, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
