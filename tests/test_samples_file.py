"""`samples/step_N.json`: the fixed prompts, continued the same way by the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bytekiln import Tokenizer, train_bpe_from_iterator
from bytekiln.characters import CharTokenizer
from bytekiln.config import RunConfig, load_config
from bytekiln.errors import ConfigError, FileError
from bytekiln.model import TransformerLM
from bytekiln.sample import Sampling, generate
from bytekiln.samples_file import check_prompts, remove_samples, write_samples_file

TEXT = "the kiln is warm"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe_from_iterator([TEXT], vocab_size=260, special_tokens=["<|endoftext|>"])


def config(folder: Path, **values: object) -> RunConfig:
    tiny = {"vocab_size": 264, "d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 8, "dropout": 0.5}
    return load_config(None, {"out_dir": str(folder), "sample_tokens": 12, **tiny, **values})


def model(c: RunConfig, seed: int = 0) -> TransformerLM:
    torch.manual_seed(seed)
    return TransformerLM(c.model).train()


def read(path: Path | None) -> dict[str, object]:
    assert path is not None
    found: dict[str, object] = json.loads(path.read_text("utf-8"))
    return found


def test_prompts_are_continued(tmp_path: Path, tokenizer: Tokenizer) -> None:
    c = config(tmp_path, sample_prompts="the kiln\n\n<|endoftext|>warm\nthe kiln\n", seed=7)
    m = model(c)
    path = write_samples_file(tmp_path, m, tokenizer, c, 40)
    assert path == tmp_path / "samples/step_40.json"
    found = read(path)
    samples = found.pop("samples")
    assert found == {
        "format": "bytekiln-samples",
        "version": 1,
        "step": 40,
        "seed": 7,
        "temperature": 0.8,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 12,
        "tokenizer_hash": tokenizer.hash,
    }
    assert [s["prompt"] for s in samples] == ["the kiln", "<|endoftext|>warm", "the kiln"]
    assert [s["seed"] for s in samples] == [7, 8, 9]
    assert samples[1]["prompt_ids"][0] == tokenizer.eot_id
    assert samples[0]["ids"] != samples[2]["ids"], "every prompt has a draw of its own"
    m.eval()
    for s in samples:
        drawn = generate(
            m,
            s["prompt_ids"],
            max_new_tokens=12,
            sampling=Sampling(0.8),
            seed=s["seed"],
            eot_id=tokenizer.eot_id,
            vocab_size=tokenizer.n_vocab,
        )
        assert s["ids"] == list(drawn)
        assert s["text"] == tokenizer.decode(s["ids"])


def test_same_weights_same_file_and_nothing_disturbed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    c = config(tmp_path)
    m = model(c)
    state = torch.get_rng_state()
    first = read(write_samples_file(tmp_path, m, tokenizer, c, 1))
    assert m.training and torch.equal(state, torch.get_rng_state())
    path = tmp_path / "samples/step_1.json"
    written = path.read_bytes()
    torch.rand(5)
    write_samples_file(tmp_path, m.eval(), tokenizer, c, 1)
    assert path.read_bytes() == written, "dropout is off, and the global generator plays no part"
    assert not m.training
    assert read(write_samples_file(tmp_path, model(c, 1), tokenizer, c, 2))["samples"] != first["samples"]
    assert read(write_samples_file(tmp_path, m, tokenizer, c.with_(seed=8), 3))["samples"] != first["samples"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_1.json", "step_2.json", "step_3.json"]


@pytest.mark.parametrize(
    ("kind", "prompt", "ids"), [("bpe", "", None), ("lines", "\n", [0]), ("no lines", "a", [0])]
)  # fmt: skip
def test_without_prompts_a_text_begins(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, prompt: str, ids: object
) -> None:
    some = {"bpe": tokenizer, "lines": CharTokenizer("\nabc"), "no lines": CharTokenizer("abc")}[kind]
    c = config(tmp_path)
    (sample,) = read(write_samples_file(tmp_path, model(c), some, c, 1))["samples"]
    assert (sample["prompt"], sample["prompt_ids"]) == (prompt, ids or [tokenizer.eot_id])
    assert max(sample["ids"]) < some.n_vocab, "the model has more tokens than the tokenizer"
    assert len(sample["ids"]) == 12 or kind == "bpe"


def test_runs_without_samples_say_why_at_the_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = config(tmp_path)
    assert check_prompts(plain, tokenizer) is None
    none = config(tmp_path, sample_tokens=0)
    mlm = config(tmp_path, objective="mlm")
    assert check_prompts(none, tokenizer) is None
    for c, some, why in ((plain, None, "no tokenizer"), (mlm, tokenizer, "sees both sides"), (none, tokenizer, "")):
        assert why in (check_prompts(c, some) or "")
        assert write_samples_file(tmp_path, model(plain), some, c, 1) is None
    assert not (tmp_path / "samples").exists()


def test_a_prompt_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    c = config(tmp_path, sample_prompts="abc\nabz")
    with pytest.raises(ConfigError, match=r"sample_prompts: byte offset 2: character 'z'"):
        check_prompts(c, CharTokenizer("abc"))


@pytest.mark.parametrize("patience", [0, 5, 12, 16])
def test_it_can_be_stopped_between_two_tokens(tmp_path: Path, tokenizer: Tokenizer, patience: int) -> None:
    c = config(tmp_path, sample_prompts="the kiln\nwarm")
    m = model(c)
    path = write_samples_file(tmp_path, m, tokenizer, c, 1)
    assert path is not None
    written = path.read_bytes()
    asked, read = 0, []
    m.register_forward_hook(lambda *_: read.append(1))

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > patience

    assert write_samples_file(tmp_path, m, tokenizer, c, 2, stop) is None
    assert write_samples_file(tmp_path, m, tokenizer, c, 1, lambda: True) is None
    assert asked == patience + 1, "not once more"
    assert len(read) <= patience, "no token is made after it was told to stop"
    assert [p.name for p in path.parent.iterdir()] == ["step_1.json"] and path.read_bytes() == written
    assert m.training, "its mode is given back"
    patient = write_samples_file(tmp_path, m, tokenizer, c, 1, lambda: False)
    assert patient == path and path.read_bytes() == written


def test_only_samples_are_removed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    c = config(tmp_path)
    for step in (10, 20, 30):
        write_samples_file(tmp_path, model(c), tokenizer, c, step)
    (tmp_path / "samples/step_x.json").write_text("mine")
    (tmp_path / "samples/step_40.json.bak").write_text("mine")
    remove_samples(tmp_path, behind=20)
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {
        "step_10.json", "step_20.json", "step_x.json", "step_40.json.bak"
    }  # fmt: skip
    remove_samples(tmp_path)
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"step_x.json", "step_40.json.bak"}
    remove_samples(tmp_path / "none")


def test_a_place_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    c = config(tmp_path)
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(FileError, match=r"samples: cannot be made: file exists; expected a writable folder"):
        write_samples_file(tmp_path, model(c), tokenizer, c, 1)
