"""Calls from Python, by pytest-benchmark: short strings, batches, one training step. `make bench` runs it.

The text is made here, so that the figures can be had anywhere; the tokenizer is trained on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import bytekiln

Benchmark = Callable[..., object]
SHORT = "To be, or not to be, that is the question"


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """A thousand documents of invented words with a natural distribution (Zipf)."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(5000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=200)) + ".\n" for _ in range(1000)]


@pytest.fixture(scope="module")
def tokenizer(documents: list[str]) -> bytekiln.Tokenizer:
    return bytekiln.train_bpe_from_iterator(documents, vocab_size=4096, special_tokens=["<|endoftext|>"])


def test_encode_short_string(benchmark: Benchmark, tokenizer: bytekiln.Tokenizer) -> None:
    benchmark(tokenizer.encode, SHORT)


def test_encode_short_string_to_numpy(benchmark: Benchmark, tokenizer: bytekiln.Tokenizer) -> None:
    benchmark(tokenizer.encode_to_numpy, SHORT)


def test_decode_short_string(benchmark: Benchmark, tokenizer: bytekiln.Tokenizer) -> None:
    benchmark(tokenizer.decode, tokenizer.encode(SHORT))


def test_encode_batch_of_a_thousand_documents(
    benchmark: Benchmark, tokenizer: bytekiln.Tokenizer, documents: list[str]
) -> None:
    benchmark(tokenizer.encode_batch, documents)


def test_encode_long_text(benchmark: Benchmark, tokenizer: bytekiln.Tokenizer, documents: list[str]) -> None:
    benchmark(tokenizer.encode_to_numpy, "".join(documents))


def test_train_tokenizer(benchmark: Benchmark, documents: list[str]) -> None:
    benchmark(bytekiln.train_bpe_from_iterator, documents, vocab_size=4096)


def test_load_a_tokenizer_of_fifty_thousand_tokens(benchmark: Benchmark, tmp_path: Path) -> None:
    rng = random.Random(1)
    words = {"".join(rng.choices("etaoinshrdlu", k=rng.randint(4, 12))) for _ in range(60_000)}
    trained = bytekiln.train_bpe_from_iterator([" ".join(sorted(words))], vocab_size=50_000)
    assert trained.n_vocab == 50_000
    trained.save(tmp_path / "tokenizer.json")
    benchmark(bytekiln.Tokenizer.from_file, tmp_path / "tokenizer.json")


def test_one_training_step(benchmark: Benchmark) -> None:
    """The model of the preset `demo`, eager: forward, backward, clipping, AdamW."""
    import torch

    from bytekiln.config import load_config
    from bytekiln.model import TransformerLM
    from bytekiln.objective import Objective
    from bytekiln.optim import clip_gradients, make_optimizer

    config = load_config("demo", {"vocab_size": 4096})
    torch.manual_seed(0)
    model = TransformerLM(config.model)
    objective = Objective(model, config)
    optimizer = make_optimizer(model, config.optimizer)
    shape = (config.training.batch_size, config.model.context_length)
    inputs, targets = torch.randint(4096, shape), torch.randint(4096, shape)

    def step() -> None:
        optimizer.zero_grad()
        (objective(inputs, targets).total / targets.numel()).backward()
        clip_gradients(optimizer.parameters, 1.0)
        optimizer.step(1e-3)

    benchmark(step)
