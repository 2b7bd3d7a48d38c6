"""Models for the tests of scores: a small tokenizer, random and trained models, runs as folders, questions."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bytekiln import Tokenizer, train_bpe_from_iterator
from bytekiln.checkpoint import Checkpoint, save_checkpoint
from bytekiln.config import ModelConfig, RunConfig, load_config
from bytekiln.model import TransformerLM
from bytekiln.score.scorer import Scorer
from lm_runs import TINY

WORDS = "kiln clay wheel potter glaze bowl fire ash brick mug slip oven soft cold red wet".split()
SHAPE = {"d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 48, "d_ff": 32}


@cache
def tokenizer(vocab_size: int = 280) -> Tokenizer:
    texts = [" ".join(random.Random(i).choices(WORDS, k=40)) for i in range(8)]
    return train_bpe_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<|endoftext|>"])


def model(seed: int = 0, **changes: Any) -> TransformerLM:
    torch.manual_seed(seed)
    config = ModelConfig(**{"vocab_size": tokenizer().n_vocab, **SHAPE, **changes})
    made = TransformerLM(config)
    with torch.no_grad():  # a fresh model is so even that wrong positions would hardly show
        for weight in made.parameters():
            weight.mul_(1.5 if weight.ndim > 1 else 1.0).add_(torch.randn_like(weight) * 0.05)
    return made.eval()


def scorer(seed: int = 0, *, batch_size: int = 8, context_length: int = 0, **changes: Any) -> Scorer:
    return Scorer(
        model(seed, **changes), tokenizer(), f"model{seed}", batch_size=batch_size, context_length=context_length
    )


def run_config(folder: Path, **values: Any) -> RunConfig:
    base = {**TINY, **SHAPE, "vocab_size": tokenizer().n_vocab, "out_dir": str(folder), "train_data": ""}
    return load_config(None, {**base, **values})


def saved(
    folder: Path,
    seed: int = 0,
    made: TransformerLM | None = None,
    own: Tokenizer | None = None,
    *,
    keeps_tokenizer: bool = True,
    **values: Any,
) -> Path:
    """A run folder with one checkpoint."""
    own = own or tokenizer()
    made = made or model(seed, vocab_size=own.n_vocab)
    config = run_config(folder, **{"vocab_size": own.n_vocab, **values})
    save_checkpoint(
        folder / "checkpoints" / "checkpoint_best",
        Checkpoint(
            3,
            config,
            made.state_dict(),
            {},
            {"data": {"tokenizer": own.hash}},
            own.to_json() if keeps_tokenizer else None,
        ),
    )
    (folder / "config.toml").write_text(config.to_toml(), "utf-8")
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """HellaSwag's fields; endings and right answers are drawn, so that nothing can be known of them."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    return [
        {
            "ind": i,
            "activity_label": draw.choice(WORDS).capitalize(),
            "ctx_a": words(2, 6) + ".",
            "ctx_b": draw.choice(["", "then she"]),
            "endings": [words(1, 4) + draw.choice(["", " [step] " + words(1, 1)]) for _ in range(4)],
            "label": str(draw.randrange(4)),
        }
        for i in range(count)
    ]


def write_rows(path: Path, some: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    return path


def taught(some: list[tuple[list[int], list[int]]], steps: int = 120) -> TransformerLM:
    """A model that has learnt (context, continuation) by heart."""
    made = model(7, d_model=32, d_ff=64).train()
    width = max(len(c) + len(a) for c, a in some)
    ids = torch.zeros(len(some), width, dtype=torch.int64)
    asked = torch.zeros(len(some), width, dtype=torch.bool)
    for i, (context, answer) in enumerate(some):
        ids[i, : len(context) + len(answer)] = torch.tensor(context + answer)
        asked[i, len(context) : len(context) + len(answer)] = True
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = made(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits[asked[:, 1:]], ids[:, 1:][asked[:, 1:]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval()
