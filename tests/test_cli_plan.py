"""`lm-plan` plans the run that `lm-train` trains, refuses what it refuses, and has its answer soon."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytekiln import cli_lm, cli_plan, footprint
from bytekiln.config import load_config
from bytekiln.errors import BytekilnError, ConfigError
from bytekiln.train import train
from lm_runs import tiny, tokens

NO_SEARCH = ("--json", "--memory=1")
"""In one byte of memory nothing fits, so that no largest batch is searched for."""


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli_plan.plan([*argv, *NO_SEARCH]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


# --- work ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many operations were traced; from 100,000 on the test fails there, and not minutes later."""
    count = 0
    run = footprint.Storages.__torch_dispatch__

    def counted(self: footprint.Storages, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        assert count < 100_000, "the trace has no end"
        return run(self, *args, **kwargs)

    monkeypatch.setattr(footprint.Storages, "__torch_dispatch__", counted)
    return lambda: count


@pytest.mark.parametrize(
    "argv",
    [
        ("demo", "--vocab-size=50257"),
        ("--vocab-size=50257", "--d-model=128", "--num-heads=4", "--num-layers=2", "--context-length=128",
         "--gpu=H100", "--memory=80G"),
        ("--batch-size=100000000", "--vocab-size=65", "--d-model=64", "--num-heads=2", "--memory=16G"),
        ("demo", "--vocab-size=50257", "--loss-chunk=1", "--memory=16G"),
        ("demo", "--vocab-size=50257", "--grad-accum-steps=8", "--objective=mlm", "--windows=packed", "--memory=16G"),
    ],
    ids=["demo", "gpu", "batch", "single", "mlm"],
)  # fmt: skip
def test_a_plan_is_a_bounded_number_of_operations(
    operations: Callable[[], int], capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    """A large vocabulary has a loss of a million chunks at the largest batch: they are alike, and some are traced."""
    assert cli_plan.plan([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_batch_size"] > 100
    assert 0 < operations() < 60_000


# --- the run that is trained ------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A trained run of a shape that no preset has."""
    monkeypatch.chdir(tmp_path)
    tokens(tmp_path / "train.npy", vocab=40)
    tokens(tmp_path / "val.npy", vocab=40, seed=1)
    train(tiny(tmp_path, vocab_size=40, d_model=24, num_layers=3, num_heads=3, ffn="gelu", norm="layer", max_steps=2))
    return "run"


@pytest.mark.parametrize("more", [(), ("--context-length=4",), ("--config=c.toml",)])
def test_init_from_plans_what_init_from_trains(
    weights: str, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    if more and more[0].startswith("--config"):  # a config has a shape of its own, and that is what runs
        Path("c.toml").write_text(load_config("run/config.toml", {"out_dir": ""}, say=print).to_toml(), "utf-8")
    same = [f"--init-from={weights}", "--train-data=train.npy", "--batch-size=3", "--max-steps=1", *more]
    said = planned(capsys, *same)
    assert cli_lm.train([*same, "--out-dir=again", "--val-data=val.npy", "--num-eval-batches=1"]) == 0
    trained = load_config("again/config.toml", {}, say=print)
    assert (trained.model.d_model, trained.model.num_layers, trained.model.vocab_size) == (24, 3, 40)
    assert said["parameters"] == json.loads(Path("again/result.json").read_text("utf-8"))["parameters"]
    assert said["tokens_per_step"] == 3 * trained.model.context_length


def test_weights_that_are_not_there_are_refused_as_in_training() -> None:
    messages = []
    for command in (cli_plan.plan, cli_lm.train):
        with pytest.raises(BytekilnError) as error:
            command(["--init-from=nowhere"])
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "nowhere" in messages[0]


# --- what training would refuse ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_id", [True, False])
@pytest.mark.parametrize("file", ["train", "val"])
def test_ids_beyond_the_vocabulary_are_refused_as_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, max_id: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens(tmp_path / "train.npy", vocab=61 if file == "train" else 8)
    tokens(tmp_path / "val.npy", 300, vocab=61 if file == "val" else 8)
    for name in ("train.npy.json", "val.npy.json"):
        about = json.loads(Path(name).read_text("utf-8"))
        if not max_id:
            del about["max_id"]
        Path(name).write_text(json.dumps(about), "utf-8")
    messages = []
    same = ["debug", "--vocab-size=10", "--train-data=train.npy", "--val-data=val.npy", "--context-length=8"]
    for command, more in ((cli_plan.plan, NO_SEARCH), (cli_lm.train, ("--out-dir=run", "--max-steps=1"))):
        with pytest.raises(BytekilnError) as error:
            command([*same, *more])
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert f"{file}.npy: token " in messages[0] and "expected ids below the vocabulary size 10" in messages[0]


def test_a_small_vocabulary_that_all_ids_fit_into_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest's vocabulary may be larger than what the file uses: training takes such a file."""
    monkeypatch.chdir(tmp_path)
    tokens(tmp_path / "train.npy", vocab=8)
    about = json.loads(Path("train.npy.json").read_text("utf-8"))
    Path("train.npy.json").write_text(json.dumps({**about, "vocab_size": 50}), "utf-8")
    same = ("debug", "--train-data=train.npy", "--vocab-size=10", "--context-length=8", "--d-model=16")
    assert planned(capsys, *same)["parameters_by_part"]["embedding"] == 10 * 16
    assert planned(capsys, *same[:1], *same[2:], "--train-data=train.npy,none.npy")["parameters"] > 0
    with pytest.raises(ConfigError, match="since a mask token comes behind"):
        planned(capsys, *same, "--token-corruption=0.1")


def test_a_mask_token_comes_behind_a_stated_vocabulary_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens(tmp_path / "train.npy", vocab=40)
    same = ("debug", "--train-data=train.npy", "--vocab-size=40", "--context-length=8", "--token-corruption=0.1")
    said = planned(capsys, *same)
    assert cli_lm.train([*same, "--out-dir=run", "--max-steps=1", "--num-eval-batches=1", "--eval-interval=0"]) == 0
    assert load_config("run/config.toml", {}, say=print).model.vocab_size == 41
    assert said["parameters"] == json.loads(Path("run/result.json").read_text("utf-8"))["parameters"]
