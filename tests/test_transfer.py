"""From the rate of one model to that of another: the rules, and a record at toy widths."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bytekiln.config import RunConfig, load_config
from bytekiln.errors import ConfigError
from bytekiln.search.bare_run import BareRun
from bytekiln.search.transfer import off_by, predict
from lm_runs import tiny, tokens


def run(**values: Any) -> RunConfig:
    return load_config(None, {"d_model": 128, "num_layers": 4, "num_heads": 4, **values})


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        ({"optimizer": "adamw"}, 1 / 4),
        ({"optimizer": "lion"}, 1 / 4),
        ({"optimizer": "sgd"}, 1.0),
        ({"optimizer": "muon", "muon_scale": "shape"}, 1.0),
        ({"optimizer": "muon", "muon_scale": "rms"}, 1 / 4),
    ],
)
def test_the_width_rule_of_each_optimizer(optimizer: dict[str, Any], factor: float) -> None:
    said = predict(8e-3, run(**optimizer), run(**optimizer, d_model=512))
    assert said.lr == pytest.approx(8e-3 * factor) and said.width == factor and said.depth == 1.0
    assert optimizer["optimizer"] in said.rule and not said.warnings
    back = predict(said.lr, run(**optimizer, d_model=512), run(**optimizer))
    assert back.lr == pytest.approx(8e-3)


def test_depth_falls_as_the_root() -> None:
    said = predict(8e-3, run(), run(num_layers=16))
    assert said.lr == pytest.approx(4e-3) and "depth 4 to 16: 1/√4 = 0.5" in said.rule
    both = predict(8e-3, run(), run(num_layers=16, d_model=256))
    assert both.lr == pytest.approx(2e-3)


def test_what_is_not_corrected_for_is_said() -> None:
    said = predict(8e-3, run(), run(d_model=256, batch_size=64, max_steps=7))
    assert [w.split()[0] for w in said.warnings] == ["batch_size", "max_steps"]


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer: found lion in the target; expected adamw"):
        predict(1e-3, run(), run(optimizer="lion"))
    with pytest.raises(ConfigError, match="muon_scale: found rms in the target; expected shape"):
        predict(1e-3, run(optimizer="muon"), run(optimizer="muon", muon_scale="rms"))


def test_steps_of_a_grid() -> None:
    assert off_by(1e-3, 4e-3, 2.0) == pytest.approx(2.0) and off_by(1e-3, 5e-4, 2.0) == pytest.approx(-1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "centre"), [("adamw", 6.4e-2), ("muon", 6.4e-2)])
def test_from_width_16_to_64_within_one_step_of_a_grid_of_factor_two(
    tmp_path: Path, optimizer: str, centre: float
) -> None:
    tokens(tmp_path / "train.npy", 6000)
    tokens(tmp_path / "val.npy", 1000, seed=1)
    grid = [centre * 2.0**i for i in range(-5, 3)]

    def best(width: int) -> tuple[float, RunConfig]:
        losses = {}
        for lr in grid:
            config = tiny(tmp_path, d_model=width, lr=lr, max_steps=60, warmup_steps=4, schedule="cosine",
                          optimizer=optimizer, batch_size=8, num_eval_batches=8)  # fmt: skip
            with BareRun(config) as bare:
                for _ in range(60):
                    bare.take_step()
                loss = bare.val_loss()
            losses[lr] = loss if math.isfinite(loss) else math.inf
        return min(losses, key=lambda lr: losses[lr]), config

    small, source = best(16)
    large, target = best(64)
    assert abs(off_by(predict(small, source, target).lr, large, 2.0)) <= 1.01
