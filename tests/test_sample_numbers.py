"""Sampling held to numbers: the temperature by hand, and every flag of the command seen in the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bytekiln import Tokenizer, cli_lm, encode_files, train_bpe_from_iterator
from bytekiln.config import ModelConfig
from bytekiln.model import TransformerLM
from bytekiln.sample import Sampling, generate, next_token_probabilities
from bytekiln.train import train
from lm_runs import tiny


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_by_hand(temperature: float) -> None:
    """exp(ln w / T) is w^(1/T): squares at one half, roots at two."""
    weights = [1.0, 2.0, 3.0, 10.0]
    powers = [w ** (1 / temperature) for w in weights]
    p = next_token_probabilities(torch.tensor(weights).double().log(), Sampling(temperature=temperature))
    assert p.tolist() == pytest.approx([x / sum(powers) for x in powers], rel=1e-9)


def test_top_p_is_measured_at_the_temperature() -> None:
    """At one half the weights are 1, 4, 9, 100 of 114: the greatest alone holds 0.88."""
    logits = torch.tensor([1.0, 2.0, 3.0, 10.0]).double().log()
    kept = [
        int((next_token_probabilities(logits, Sampling(temperature=t, top_p=0.8)) > 0).sum()) for t in (0.5, 1.0, 2.0)
    ]
    assert kept == [1, 2, 3]


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(vocab_size=5, d_model=8, num_layers=1, num_heads=1, context_length=4)).eval()
    sampling = Sampling(temperature=0.5)
    with torch.no_grad():
        p = next_token_probabilities(model(torch.tensor([[1]]))[0, -1], sampling)
    drawn = [next(generate(model, [1], max_new_tokens=1, sampling=sampling, seed=s)) for s in range(1500)]
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / len(drawn)
    assert float((shares - p).abs().max()) < 5 * (0.25 / len(drawn)) ** 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    tokenizer: Tokenizer = train_bpe_from_iterator(["the kiln is warm"], vocab_size=262)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "text.txt").write_text("the kiln is warm " * 30, encoding="utf-8")
    encode_files(tokenizer, folder / "text.txt", folder / "text.npy")
    data = str(folder / "text.npy")
    config = tiny(
        folder, vocab_size=0, tokenizer=str(folder / "tokenizer.json"), train_data=data, val_data=data, max_steps=2
    )
    train(config)
    return folder / "run"


def texts(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    capsys.readouterr()
    assert cli_lm.sample([str(run), "--prompt", "the", "--max-new-tokens", "25", *flags]) == 0
    out = capsys.readouterr().out
    return [part for part in out.split("--- sample ") if part]


def test_every_flag_of_the_command_is_seen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hot = ("--temperature", "4")
    greedy = texts(run, capsys, "--temperature", "0")
    free = texts(run, capsys, *hot)
    assert free != greedy
    assert texts(run, capsys, *hot, "--top-k", "1") == greedy
    assert texts(run, capsys, *hot, "--top-p", "1e-9") == greedy
    assert texts(run, capsys, "--temperature", "1e-6") == greedy
    assert texts(run, capsys, *hot, "--seed", "1") != free
    assert texts(run, capsys, *hot, "--seed", "0") == free


def test_samples_of_one_command_differ_and_the_second_is_the_next_seed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ("--temperature", "4", "--seed", "7")
    first, second = (part.partition("---\n")[2] for part in texts(run, capsys, *hot, "--num-samples", "2"))
    assert first != second
    assert texts(run, capsys, *hot) == [first]
    assert texts(run, capsys, "--temperature", "4", "--seed", "8") == [second]
