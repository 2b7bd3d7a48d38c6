"""Sampling: the distribution, the loop, the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytekiln import Tokenizer, cli_lm, train_bpe_from_iterator
from bytekiln.checkpoint import weights_of
from bytekiln.config import ModelConfig
from bytekiln.errors import BytekilnError, ConfigError, FileError, MismatchError
from bytekiln.model import TransformerLM
from bytekiln.sample import (
    Sampling,
    decode_stream,
    generate,
    load_model,
    next_token_probabilities,
    prompt_ids,
    tokenizer_for,
)
from bytekiln.train import train
from lm_runs import VOCAB, tiny

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30).map(torch.tensor)


@given(logits=LOGITS, top_p=st.floats(0.01, 1.0))
def test_top_p_is_the_smallest_set_that_reaches_p(logits: torch.Tensor, top_p: float) -> None:
    full = next_token_probabilities(logits, Sampling(temperature=1.0))
    kept = next_token_probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
    inside = kept > 0
    assert float(kept.sum()) == pytest.approx(1)
    assert float(full[inside].sum()) >= top_p - 1e-9, "the token that crosses p stays in"
    smallest = float(full[inside].min())
    assert float(full[inside].sum()) - smallest < top_p + 1e-9, "and nothing behind it"
    assert inside.all() or float(full[~inside].max()) <= smallest
    torch.testing.assert_close(kept[inside], full[inside] / full[inside].sum())


@given(logits=LOGITS, top_k=st.integers(1, 40))
def test_top_k(logits: torch.Tensor, top_k: int) -> None:
    kept = next_token_probabilities(logits, Sampling(temperature=1.0, top_k=top_k))
    assert int((kept > 0).sum()) == min(top_k, len(logits))
    assert float(kept.sum()) == pytest.approx(1)


def test_crossing_token_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = next_token_probabilities(logits, Sampling(temperature=1.0, top_p=0.6))
    torch.testing.assert_close(kept, torch.tensor([0.625, 0.375, 0, 0], dtype=torch.float64), rtol=1e-6, atol=0)
    both = next_token_probabilities(logits, Sampling(temperature=1.0, top_k=3, top_p=0.99))
    assert int((both > 0).sum()) == 3


@given(logits=LOGITS)
def test_temperature_zero_is_greedy(logits: torch.Tensor) -> None:
    p = next_token_probabilities(logits, Sampling(temperature=0))
    assert float(p.max()) == 1.0
    assert int(p.argmax()) == int(logits.argmax())


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}])
def test_ranges(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Sampling(**values)


def model(position: str = "rope") -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(
        ModelConfig(vocab_size=40, d_model=16, num_layers=2, num_heads=2, context_length=8, position=position)
    ).eval()


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_greedy_equals_reading_everything_anew(position: str) -> None:
    """With the cache inside the context and the sliding window behind it."""
    m, ids = model(position), [1, 2, 3]
    drawn = list(generate(m, ids, max_new_tokens=20, sampling=Sampling(temperature=0)))
    for token in drawn:
        with torch.no_grad():
            assert token == int(m(torch.tensor([ids[-8:]]))[0, -1].argmax())
        ids.append(token)
    assert len(drawn) == 20


def test_seed_decides() -> None:
    a, b, c = (list(generate(model(), [1], max_new_tokens=30, seed=s)) for s in (4, 4, 5))
    assert a == b != c


def test_ends_at_end_of_text() -> None:
    whole = list(generate(model(), [1], max_new_tokens=30, seed=4))
    assert list(generate(model(), [1], max_new_tokens=30, seed=4, eot_id=whole[9])) == whole[: whole.index(whole[9])]


def test_comes_one_at_a_time() -> None:
    stream = generate(model(), [1], max_new_tokens=10**9)
    assert [next(stream) for _ in range(3)]
    with pytest.raises(ConfigError, match="prompt: found no tokens"):
        next(generate(model(), []))


def test_a_model_that_sees_both_sides_does_not_continue() -> None:
    shape = {"vocab_size": 40, "d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 8}
    both = TransformerLM(ModelConfig(**shape, causal=False)).eval()
    with pytest.raises(ConfigError, match=r"^model: found a model that fills in masked tokens"):
        next(generate(both, [1]))


@pytest.mark.parametrize("how", ["lm-sample", "--generate"])
def test_a_masked_run_is_refused_in_a_line(tmp_path: Path, how: str) -> None:
    """Before its missing tokenizer is told, or a device that is not there."""
    train(tiny(tmp_path, objective="mlm", max_steps=1, vocab_size=VOCAB + 1))
    run = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"^{run}: found a model that fills in masked tokens .objective mlm. and"):
        if how == "lm-sample":
            cli_lm.sample([run, "--device", "cuda:77"])
        else:
            cli_lm.train([run, "--generate"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed=x"], "seed: found 'x'; expected a whole number"),
        (["--seed=1.5"], "seed: found '1.5'; expected a whole number"),
        (["--seed=inf"], "seed: found 'inf'; expected a whole number"),
        (["--seed=-1"], "seed: found -1; expected 0 …"),
        (["--seed=1e30"], "seed: found 1000000000000000019884624838656; expected 0 …"),
        (["--top-p=1.5"], "top_p: found 1.5; expected more than 0 and at most 1"),
        (["--top-p=0"], "top_p: found 0.0; expected more than 0 and at most 1"),
        (["--top-p=nan"], "top_p: found nan; expected more than 0 and at most 1"),
        (["--top-p=most"], "top-p: invalid float value: 'most'"),
        (["--top-k=-1"], "top_k: found -1; expected 0 or more"),
        (["--top-k=2.5"], "top-k: found '2.5'; expected a whole number"),
        (["--temperature=-1"], "temperature: found -1.0; expected 0 or more"),
        (["--temperature=inf"], "temperature: found inf; expected 0 or more"),
        (["--num-samples=0"], "num_samples: found 0; expected 1 or more"),
        (["--max-new-tokens=0"], "max_new_tokens: found 0; expected 1 or more"),
    ],
)
def test_mistakes_are_told_by_both_commands(tmp_path: Path, flags: list[str], said: str) -> None:
    """Before anything is opened: there is no run at all."""
    (tmp_path / "config.toml").touch()
    for command in (cli_lm.sample, lambda argv: cli_lm.train([*argv, "--generate"])):
        with pytest.raises(ConfigError, match=re.escape(said)):
            command([str(tmp_path), *flags])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe_from_iterator(["the kiln"], vocab_size=258, special_tokens=["<|endoftext|>"])


def test_text_streams_as_whole_characters(tokenizer: Tokenizer) -> None:
    text = "é🧱 the kiln 日"
    pieces = list(decode_stream(tokenizer, iter(tokenizer.encode(text))))
    assert "".join(pieces) == text
    assert "🧱" in pieces, "four byte tokens, one piece"
    broken: Iterator[int] = iter(tokenizer.encode("🧱")[:2])
    assert "".join(decode_stream(tokenizer, broken)) == "�"


def test_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("the kiln", encoding="utf-8")
    assert prompt_ids(tokenizer, f"FILE:{tmp_path / 'p.txt'}") == tokenizer.encode("the kiln")
    assert prompt_ids(tokenizer, "") == [tokenizer.eot_id]
    assert prompt_ids(tokenizer, "a<|endoftext|>")[-1] == tokenizer.eot_id
    with pytest.raises(FileError, match=r"none\.txt: no such file"):
        prompt_ids(tokenizer, f"FILE:{tmp_path / 'none.txt'}")
    with pytest.raises(ConfigError, match="prompt: found nothing"):
        prompt_ids(train_bpe_from_iterator(["x"], vocab_size=256), "")


def test_run_brings_its_tokenizer(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "tokenizer.json"
    tokenizer.save(own)
    for name in ("train", "val"):
        from bytekiln import encode_files

        (tmp_path / f"{name}.txt").write_text("the kiln is warm " * 20, encoding="utf-8")
        encode_files(tokenizer, tmp_path / f"{name}.txt", tmp_path / f"{name}.npy")
    train(tiny(tmp_path, vocab_size=0, tokenizer=str(own)))
    texts = []
    for command, seed in ((cli_lm.sample, "1000"), (cli_lm.sample, "1e3"), (cli_lm.sample, "7")):
        assert command([str(tmp_path / "run"), "--max-new-tokens=3e1", f"--seed={seed}"]) == 0
        texts.append(capsys.readouterr().out)
    assert cli_lm.train([str(tmp_path / "run"), "--generate", "--max-new-tokens=30", "--seed=1e3"]) == 0
    assert texts[0] == texts[1] == capsys.readouterr().out != texts[2]
    m, stored = load_model(tmp_path / "run")
    assert m.config.vocab_size == 258
    assert tokenizer_for(m, None, stored, "run").hash == tokenizer.hash
    assert tokenizer_for(m, str(own), None, "run").hash == tokenizer.hash
    other = tmp_path / "other.json"
    train_bpe_from_iterator(["other words"], vocab_size=270).save(other)
    for stored_or_not, words in ((stored, "tokenizer hash"), (None, "expected at most 258")):
        with pytest.raises(MismatchError, match=words):
            tokenizer_for(m, str(other), stored_or_not, "run")
    with pytest.raises(FileError, match="--tokenizer"):
        tokenizer_for(m, None, None, "run")
    with pytest.raises(BytekilnError):
        load_model(tmp_path)


def test_only_tokens_of_the_tokenizer_are_drawn_and_prompts_are_checked() -> None:
    m = model()
    drawn = list(generate(m, [1], max_new_tokens=40, sampling=Sampling(temperature=5.0), vocab_size=3))
    assert set(drawn) <= {0, 1, 2}
    assert list(generate(m, torch.tensor([1, 2]), max_new_tokens=3)) == list(generate(m, [1, 2], max_new_tokens=3))
    for bad, options in (([99], {}), ([-1], {}), ([1], {"seed": 2**70})):
        with pytest.raises(ConfigError, match="expected 0"):
            next(generate(m, bad, **options))


def test_a_tiny_temperature_is_greedy() -> None:
    p = next_token_probabilities(torch.tensor([1.0, 3.0, 2.0]), Sampling(temperature=1e-310))
    assert p.tolist() == [0, 1, 0]


def test_damaged_best_falls_back(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    best = tmp_path / "run/checkpoints/checkpoint_best"
    best.joinpath("model.safetensors").write_bytes(b"x")
    said: list[str] = []
    assert weights_of(tmp_path / "run", said.append).step == 6
    assert "taking the newest whole" in said[0]
    assert weights_of(tmp_path / "run/checkpoints/checkpoint_2.pt").step == 2
    with pytest.raises(MismatchError):
        weights_of(best)
