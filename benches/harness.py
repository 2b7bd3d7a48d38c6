"""HellaSwag by bytekiln and by lm-evaluation-harness's own `hf` model: the same weights, rows and batch, in turns.

    harness.py [--rows 300] [--batch 16] [--rounds 3] [--vocab 50257] [--layers 4] [--width 256] [--heads 8]
               [--context 256] [--threads 1] [--data FILE] [--vocabulary FOLDER] [--json]

A model of random weights is written as a Llama of Hugging Face's layout with GPT-2's tokenizer, and read by the harness
(`HFLM`, device cpu, float32). Both get the rows of a seeded sample as texts and return the log-likelihoods of all
endings: tokenizing is part of the time, reading the rows and the weights is not. They take turns in one process, the
order turning round each round; wall-clock time and the process's own time are reported, the minimum and the median of
the rounds, and in how many questions `acc` and `acc_norm` chose the same ending. `--vocab` below 50,257 takes GPT-2's
first so many tokens but one, and the end-of-text token.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import lzma
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
SEED = 0
Answers = list[list[float]]
"""Log-likelihoods of the endings of every question."""


def gpt2_tokenizer(folder: Path, size: int) -> Any:
    """GPT-2's tokenizer, or what its first `size` - 257 merges make."""
    from bytekiln.tokenizer import Tokenizer

    def text(name: str) -> str:
        packed = folder / f"{name}.xz"
        data = lzma.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
        return data.decode()

    vocab: dict[str, int] = json.loads(text("encoder.json"))
    head, *merges = text("vocab.bpe").splitlines()
    if size < len(vocab):
        kept = {token: id for token, id in vocab.items() if id < size - 1}
        merges = merges[: size - 257]
        vocab = {**kept, "<|endoftext|>": size - 1}
    with tempfile.TemporaryDirectory() as place:
        files = Path(place) / "encoder.json", Path(place) / "vocab.bpe"
        files[0].write_text(json.dumps(vocab), "utf-8")
        files[1].write_text("\n".join([head, *merges]) + "\n", "utf-8")
        return Tokenizer.from_vocab_and_merges(*files, special_tokens={"<|endoftext|>": len(vocab) - 1})


def as_huggingface(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer for `transformers`."""
    import safetensors.torch
    import transformers

    from bytekiln.convert import export

    tensors, config = export(model.state_dict(), model.config, eot_id=tokenizer.eot_id)
    safetensors.torch.save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer.save(folder / "tokenizer.json", overwrite=True)
    fast = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)


def contestants(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Callable[[], Answers]], Any]:
    """What is timed, and the questions."""
    import torch
    from lm_eval.api.instance import Instance  # type: ignore[import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

    from bytekiln.config import ModelConfig
    from bytekiln.model import TransformerLM
    from bytekiln.score.choices import encode_pair, likelihoods
    from bytekiln.score.scorer import Scorer
    from bytekiln.score.tasks import read_questions

    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    tokenizer = gpt2_tokenizer(Path(options.vocabulary), options.vocab)
    model = TransformerLM(
        ModelConfig(
            vocab_size=tokenizer.n_vocab,
            d_model=options.width,
            num_layers=options.layers,
            num_heads=options.heads,
            context_length=options.context,
            d_ff=options.width * 8 // 3 // 16 * 16,
        )
    ).eval()
    questions = read_questions("hellaswag", options.data, limit=options.rows, seed=SEED)
    scorer = Scorer(model, tokenizer, "bench", batch_size=options.batch)
    as_huggingface(model, tokenizer, folder)
    theirs = HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=options.batch, max_length=options.context
    )

    def bytekiln() -> Answers:
        requests = [[encode_pair(tokenizer, *pair) for pair in q.pairs] for q in questions.rows]
        found: dict[int, Any] = {}
        for some in likelihoods(scorer, requests):
            found.update(some)
        return [[a.loglikelihood for a in found[i]] for i in range(len(requests))]

    def harness() -> Answers:
        instances = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
            for q in questions.rows
            for i, pair in enumerate(q.pairs)
        ]
        flat = iter([likelihood for likelihood, _ in theirs.loglikelihood(instances, disable_tqdm=True)])
        return [[next(flat) for _ in q.pairs] for q in questions.rows]

    return {"bytekiln": bytekiln, "lm_eval hf": harness}, questions


def agreement(found: dict[str, Answers], questions: Any) -> dict[str, Any]:
    """How far the answers of both are the same."""
    a, b = found.values()
    same, same_normed, right, most = 0, 0, [0, 0], 0.0
    for q, mine, theirs in zip(questions.rows, a, b, strict=True):
        best = [max(range(len(x)), key=x.__getitem__) for x in (mine, theirs)]
        normed = [
            max(range(len(x)), key=[y / n for y, n in zip(x, q.lengths, strict=True)].__getitem__)
            for x in (mine, theirs)
        ]
        same += best[0] == best[1]
        same_normed += normed[0] == normed[1]
        right = [r + (g == q.gold) for r, g in zip(right, best, strict=True)]
        most = max(most, *(abs(x - y) for x, y in zip(mine, theirs, strict=True)))
    count = len(questions.rows)
    return {
        "questions": count,
        "same_acc_answers": same,
        "same_acc_norm_answers": same_normed,
        "acc": [r / count for r in right],
        "greatest_difference_nats": most,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, default in (
        ("rows", 300), ("batch", 16), ("rounds", 3), ("vocab", 50257), ("layers", 4), ("width", 256), ("heads", 8),
        ("context", 256), ("threads", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", default=str(SHARED / "hellaswag" / "hellaswag_val.jsonl.xz"))
    parser.add_argument("--vocabulary", default=str(SHARED / "gpt2"), help="folder of encoder.json and vocab.bpe")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as place:
        run, questions = contestants(options, Path(place))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in run}
        found: dict[str, Answers] = {}
        for turn in range(options.rounds):
            for name in list(run)[:: -1 if turn % 2 else 1]:
                wall, own = time.perf_counter(), time.process_time()
                found[name] = run[name]()
                times[name].append((time.perf_counter() - wall, time.process_time() - own))
                print(f"{name}: {times[name][-1][0]:.2f} s, own {times[name][-1][1]:.2f} s", file=sys.stderr)
    rows = {
        name: {
            "median_s": statistics.median(t[0] for t in ts),
            "min_s": min(t[0] for t in ts),
            "own_median_s": statistics.median(t[1] for t in ts),
            "own_min_s": min(t[1] for t in ts),
        }
        for name, ts in times.items()
    }
    ours, theirs = rows.values()
    report: dict[str, Any] = {
        "settings": {k: v for k, v in vars(options).items() if isinstance(v, int) and k != "json"},
        "versions": {p: importlib.metadata.version(p) for p in ("bytekiln", "lm_eval", "transformers", "torch")},
        "seconds": rows,
        "ratio": {k: theirs[k] / ours[k] for k in ours},
        "agreement": agreement({name: found[name] for name in run}, questions),
    }
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    print(", ".join(f"{k} {v}" for k, v in report["settings"].items()))
    print(", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    print(f"{'':12}" + "".join(f"{k:>14}" for k in ours))
    for name, row in [*rows.items(), ("ratio", report["ratio"])]:
        print(f"{name:12}" + "".join(f"{v:14.2f}" for v in row.values()))
    print(", ".join(f"{k} {v}" for k, v in report["agreement"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
