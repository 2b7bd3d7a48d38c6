"""Published command lines as printed: every value in a line is the run's value, nothing scaled down."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from bytekiln import cli_lm
from bytekiln.config import RunConfig
from lm_runs import tokens
from test_cli_lm import PUBLISHED

OURS = {
    "train_path": "train_data",
    "valid_path": "val_data",
    "n_layers": "num_layers",
    "n_layer": "num_layers",
    "n_heads": "num_heads",
    "n_head": "num_heads",
    "n_embd": "d_model",
    "learning_rate": "lr",
    "max_iters": "max_steps",
    "warmup_iters": "warmup_steps",
    "cosine_iters": "decay_steps",
    "lr_decay_iters": "decay_steps",
    "max_grad_norm": "grad_clip",
    "save_interval": "checkpoint_interval",
    "gradient_accumulation_steps": "grad_accum_steps",
    "ffn_type": "ffn",
    "dtype": "precision",
}
"""Spellings of the lines, by hand: the names in the code are not asked."""
SWITCHES = {"no_rmsnorm": ("norm", "none"), "post_norm": ("norm_position", "post"), "no_rope": ("position", "none")}


class Reached(Exception):  # noqa: N818 - no error
    """The command has everything and would train."""


@pytest.fixture
def config_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The config and the checkpoint with which a command line would begin to train."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/processed").mkdir(parents=True)
    for split in ("train", "valid"):
        tokens(tmp_path / f"data/processed/tinystories_{split}.npy")

    def stop(config: RunConfig, **options: object) -> None:
        raise Reached(config, options)

    monkeypatch.setattr("bytekiln.train.train", stop)

    def run(line: str) -> tuple[dict[str, object], dict[str, object]]:
        with pytest.raises(Reached) as reached:
            cli_lm.train(shlex.split(line))
        config, options = reached.value.args
        return config.flat(), options

    return run


def printed(line: str) -> dict[str, object]:
    """Field and value of every flag in a line."""
    words = [w for word in shlex.split(line) for w in (word.split("=", 1) if word.startswith("--") else [word])]
    out: dict[str, object] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name == "dataset":
            continue
        if name in SWITCHES:
            field, value = SWITCHES[name]
            out[field] = value
        else:
            try:
                out[OURS.get(name, name)] = float(following)
            except ValueError:
                out[OURS.get(name, name)] = {"True": True, "False": False}.get(following, following)
    return out


@pytest.mark.parametrize("line", PUBLISHED)
def test_every_value_as_printed(config_of, line: str) -> None:
    values = printed(line)
    assert values or "--dataset" in line
    config, _ = config_of(line)
    assert {k: config[k] for k in values} == values
    if "shakespeare" in line:
        assert config["preset"] == "shakespeare-char"
        assert config["position"] == "learned"
    if "--dataset" in line:
        assert config["preset"] == "tinystories"
        assert (config["train_data"], config["val_data"]) == tuple(
            f"data/processed/tinystories_{split}.npy" for split in ("train", "valid")
        )


def test_a_json_file_with_a_rate_and_a_checkpoint_by_path(config_of, tmp_path: Path) -> None:
    """A rate of a sweep over a JSON file's run, gone on with at the checkpoint that the guide names."""
    (tmp_path / "configs").mkdir()
    stored = {"n_layers": 4, "d_model": 512, "n_heads": 16, "max_lr": 6e-4, "min_lr": 6e-5, "warmup_iters": 2000}
    (tmp_path / "configs/train_tinystories.json").write_text(json.dumps(stored))
    line = "--config configs/train_tinystories.json --max-lr 8e-4"
    resume = "checkpoints/tinystories_lr8e-4/checkpoint_20000.pt"
    _, options = config_of(f"{line} --min-lr 8e-5 --resume {resume}")
    assert options["resume"] == resume
    assert [float(options["given"][name]) for name in ("lr", "min_lr")] == [8e-4, 8e-5]
    config, options = config_of(f"{line} --min-lr 8e-5")
    expected = {"num_layers": 4, "d_model": 512, "num_heads": 16, "lr": 8e-4, "min_lr": 8e-5, "warmup_steps": 2000}
    assert {k: config[k] for k in expected} == expected
    assert options["resume"] is None
    config, _ = config_of(line)
    assert (config["lr"], config.get("min_lr"), config["min_lr_ratio"]) == (8e-4, None, 0.1)
