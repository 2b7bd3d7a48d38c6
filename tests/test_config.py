"""Presets, files, spellings and refusals."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from bytekiln import config as cfg
from bytekiln.accounting import parameter_count
from bytekiln.config import ALIASES, FIELDS, RunConfig, extra_of, from_flat, load_config, presets
from bytekiln.errors import ConfigError, FileError, FormatError


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_whole_and_survives_its_file(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert load_config(tmp_path / "config.toml") == config
    assert config.output.preset == name


PUBLISHED = {
    "default": "vocab_size=10000 d_model=768 num_layers=12 num_heads=12 max_seq_len=1024 rope_theta=10000.0 d_ff=3072 "
    "batch_size=32 context_length=512 lr=0.0003 weight_decay=0.01 beta1=0.9 beta2=0.999 grad_clip=1.0 "
    "max_steps=100000 log_interval=100 eval_interval=1000 checkpoint_interval=5000 num_eval_batches=100 device=auto "
    "decay_lr=False warmup_steps=0",
    "debug": "vocab_size=1000 d_model=256 num_layers=4 num_heads=4 d_ff=1024 batch_size=16 max_steps=10000",
    "medium": "vocab_size=10000 d_model=768 num_layers=12 num_heads=12 d_ff=3072 batch_size=32 max_steps=100000",
    "large": "vocab_size=50000 d_model=1024 num_layers=24 num_heads=16 d_ff=4096 batch_size=64 max_steps=500000",
    "tinystories": "num_layers=4 d_model=512 num_heads=16 d_ff=1344 context_length=256 vocab_size=10000 "
    "rope_theta=10000.0 batch_size=32 max_steps=40000 warmup_steps=2000 beta1=0.9 beta2=0.95 weight_decay=0.1 "
    "grad_clip=1.0 eval_interval=2000 num_eval_batches=100 checkpoint_interval=5000 seed=42 lr=0.0006",
    "owt": "vocab_size=32000 num_layers=4 d_model=512 d_ff=1344 context_length=256",
    "shakespeare-char": "num_layers=6 d_model=384 num_heads=6 context_length=256 batch_size=64 dropout=0.2 lr=0.001 "
    "min_lr=0.0001 max_steps=5000 decay_steps=5000 warmup_steps=100 beta1=0.9 beta2=0.99 weight_decay=0.1 "
    "grad_clip=1.0 eval_interval=250 num_eval_batches=200 position=learned norm=layer ffn=gelu tie_embeddings=True "
    "init=gpt2 warmup_rule=nanogpt d_ff=1536",
    "nanogpt-cpu": "num_layers=4 d_model=128 num_heads=4 context_length=64 batch_size=12 dropout=0.0 "
    "max_steps=2000 decay_steps=2000 num_eval_batches=20 lr=0.001 min_lr=0.0001 warmup_steps=100 warmup_rule=nanogpt "
    "beta1=0.9 beta2=0.99 weight_decay=0.1 grad_clip=1.0 eval_interval=250 position=learned norm=layer ffn=gelu "
    "tie_embeddings=True init=gpt2 optimizer=adamw schedule=cosine sampling=random",
    "leaderboard-h100": "num_layers=16 d_model=1024 num_heads=8 ffn=relu2 d_ff=4096 qk_norm=True logit_softcap=15.0 "
    "zero_init_projections=True value_embeddings=True residual_lambdas=True optimizer=muon normuon=True "
    "schedule=trapezoid progress=seconds max_time=5400.0 max_time_counts=all eval_context_length=512 final_eval=whole "
    "windows=packed sampling=shuffled precision=bf16 vocab_size=32000 context_length=512 batch_size=64 "
    "grad_accum_steps=4 batch_stages=0.33:2 record=True",
    "leaderboard-b200": "max_time=2700.0 batch_size=128 grad_accum_steps=2 batch_stages=0.33:2 eval_context_length=512",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    flat = {k: str(v) for k, v in load_config(name).flat().items()}
    expected = dict(pair.split("=") for pair in PUBLISHED[name].split())
    assert {k: flat[k] for k in expected} == expected


def test_published_parameter_counts() -> None:
    assert parameter_count(load_config("tinystories").model) == 22_696_448
    assert parameter_count(load_config("owt").model) == 45_224_448
    nanogpt = load_config("shakespeare-char", {"vocab_size": 65}).model
    assert parameter_count(nanogpt) == 10_745_088


RULINGS = {
    "lr": "max_lr learning_rate",
    "max_steps": "max_iters",
    "warmup_steps": "warmup_iters",
    "decay_steps": "cosine_iters lr_decay_iters",
    "num_eval_batches": "eval_iters",
    "train_data": "train_path",
    "val_data": "valid_path",
    "num_layers": "n_layers n_layer",
    "num_heads": "n_heads n_head",
    "d_model": "n_embd",
    "context_length": "block_size",
    "grad_clip": "max_grad_norm",
    "precision": "dtype",
    "grad_accum_steps": "gradient_accumulation_steps",
    "checkpoint_interval": "save_interval",
    "ffn": "ffn_type",
}


def test_aliases() -> None:
    for name, others in RULINGS.items():
        for other in others.split():
            assert ALIASES[other] == name
            assert cfg.canonical(other.replace("_", "-"), "x") == name


def test_every_field_has_a_sentence_and_a_kind() -> None:
    for name, field in FIELDS.items():
        assert field.description and field.description[0].isalnum(), name
        assert isinstance(extra_of(name, "math"), bool)
    assert not set(ALIASES) & set(FIELDS)


def test_values_as_people_write_them() -> None:
    c = load_config("demo", {"max-iters": "1e5", "lr": "3e-4", "decay_lr": "False", "n_embd": "64", "compile": "True"})
    assert (c.training.max_steps, c.optimizer.lr, c.optimizer.decay_lr) == (100_000, 3e-4, False)
    assert c.training.compile is True
    assert load_config("demo", {"compile": "auto"}).training.compile == "auto"
    for spelled, (field, value) in cfg.SWITCHES.items():
        assert load_config("demo", {spelled: True}).flat()[field] == value


def test_d_ff() -> None:
    assert load_config(None, {"d_model": 256, "n_heads": 4}).model.d_ff == 1024
    assert load_config("demo", {"d_model": 512, "num_heads": 8}).model.d_ff == 1344
    assert load_config("demo", {"d_model": 512, "num_heads": 8, "ffn": "silu"}).model.d_ff == 2048


def test_json_file_with_the_seeds_spellings(tmp_path: Path) -> None:
    path = tmp_path / "train_tinystories.json"
    path.write_text(json.dumps({"n_layers": 2, "max_lr": 6e-4, "optimizer": {"warmup_iters": 5}, "min_lr": 6e-5}))
    c = load_config(path, {"max_lr": "8e-4"})
    assert (c.model.num_layers, c.optimizer.lr, c.optimizer.warmup_steps) == (2, 8e-4, 5)
    assert c.optimizer.floor_lr == pytest.approx(8e-5), "a file's min_lr yields to the ratio once lr is given"
    assert load_config(path, {"max_lr": 8e-4, "min_lr": 1e-5}).optimizer.floor_lr == 1e-5


def test_python_files_are_names_of_presets_or_refused(tmp_path: Path) -> None:
    said: list[str] = []
    c = load_config("config/train_shakespeare_char.py", {"vocab_size": 65}, say=said.append)
    assert c.output.preset == "shakespeare-char"
    assert "never run" in said[0]
    (tmp_path / "mine.py").write_text("raise SystemExit")
    with pytest.raises(ConfigError, match="a Python file is never run"):
        load_config(tmp_path / "mine.py")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"warmup_step": 3}, "unknown key warmup_step; did you mean warmup_steps"),
        ({"lr": "fast"}, "lr: found 'fast'; expected a valid number"),
        ({"lr": 0}, "lr: found 0; expected greater than 0"),
        ({"lr": "nan"}, "lr: found 'nan'"),
        ({"min_lr": 1.0}, "min_lr: found 1; expected at most lr"),
        ({"norm": "batch"}, "norm: found 'batch'; expected 'rms', 'layer' or 'none'"),
        ({"dropout": 1}, "dropout"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 1.5}, "max_steps"),
        ({"d_model": 512, "n_head": 6}, "expected a divisor of 512: 2, 4, 8, 16 would do"),
        ({"lr": 1e-3, "max_lr": 2e-3}, "lr is given twice"),
    ],
)
def test_refusals(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as found:
        load_config("demo", values)
    assert words in str(found.value)


def test_refused_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean tinystories"):
        load_config("tinystorys")
    with pytest.raises(ConfigError, match=r"folder without config\.toml"):
        load_config(tmp_path)
    (tmp_path / "bad.toml").write_text("lr = = 3")
    with pytest.raises(FormatError, match=r"bad\.toml"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "bad.json").write_bytes(b"{\xff")
    with pytest.raises(FormatError, match="invalid UTF-8 at byte 1"):
        load_config(tmp_path / "bad.json")
    (tmp_path / "secret.toml").mkdir()
    with pytest.raises((ConfigError, FileError)):
        load_config(tmp_path / "secret.toml")


def test_toml_takes_any_text() -> None:
    odd = 'a "quoted" \\ name\twith\nlines\x7f é 🧱'
    text = from_flat({"run_name": odd, "lr": 1e-05, "min_lr": 1e-300}).to_toml()
    read = tomllib.loads(text)
    assert read["output"]["run_name"] == odd
    assert (read["optimizer"]["lr"], read["optimizer"]["min_lr"]) == (1e-05, 1e-300)


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().model.d_model = 5  # type: ignore[misc]


def test_two_ways_to_say_the_width_must_agree(tmp_path: Path) -> None:
    (tmp_path / "both.toml").write_text("d_model = 64\nnum_heads = 4\nd_ff = 200\nffn_multiple = 4.0\n")
    with pytest.raises(ConfigError, match="d_ff: found 200 beside ffn_multiple 4, which makes it 256"):
        load_config(tmp_path / "both.toml")
    (tmp_path / "both.toml").write_text("d_model = 64\nnum_heads = 4\nd_ff = 256\nffn_multiple = 4.0\n")
    assert load_config(tmp_path / "both.toml").model.d_ff == 256
    assert load_config(tmp_path / "both.toml", {"d_ff": 100}).model.d_ff == 100, "a flag frees the file's other way"
