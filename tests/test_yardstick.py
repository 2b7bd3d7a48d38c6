"""Published losses: the shipped table is whole, the law goes both ways, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bytekiln.config import load_config, presets
from bytekiln.errors import ConfigError, FormatError
from bytekiln.yardstick import load_yardstick, prospect, yardsticks


def test_every_preset_names_a_table_that_is_there() -> None:
    named = {y for p in presets() if (y := load_config(p).training.yardstick)}
    assert named <= set(yardsticks())
    assert "owt-32k" in named


@pytest.mark.parametrize("name", yardsticks())
def test_shipped_tables_agree_with_themselves(name: str) -> None:
    y = load_yardstick(name)
    middle = (y.low + y.high) / 2
    assert y.expected(y.flops).loss == pytest.approx(middle)
    assert y.expected(y.flops).plus_minus == pytest.approx((y.high - y.low) / 2)
    for entry in y.published:
        assert y.expected(y.break_even(entry.loss)).loss == pytest.approx(entry.loss)
    assert y.source and len({p.name for p in y.published}) == len(y.published) > 0


def test_more_operations_less_loss_and_far_away_less_certain() -> None:
    y = load_yardstick("owt-32k")
    near, twice, far = (y.expected(y.flops * k) for k in (1, 2, 16))
    assert near.loss - twice.loss == pytest.approx(0.11)
    assert near.plus_minus < twice.plus_minus < far.plus_minus
    told = prospect(y, y.flops, 0.4)
    assert all(b.mfu == pytest.approx(0.4 * b.flops / y.flops) for b in told.break_even)
    assert all(b.mfu is None for b in prospect(y, y.flops, None).break_even)


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="owt-23k, neither a shipped table nor a file; did you mean owt-32k"):
        load_yardstick("owt-23k")
    whole = 'title = "t"\nsource = "s"\nnats_per_doubling = [0.1, 0.2]\n[expected]\nloss = [2.0, 3.0]\nflops = 1e9\n'
    whole += '[[published]]\nname = "x"\nloss = 2.5\n'
    (tmp_path / "mine.toml").write_text(whole, "utf-8")
    assert load_yardstick(str(tmp_path / "mine.toml")).published[0].name == "x"
    for wrong in (
        whole.replace("flops = 1e9", ""),
        whole.replace("[2.0, 3.0]", "[3.0, 2.0]"),
        whole.replace("2.5", "'a'"),
    ):
        (tmp_path / "mine.toml").write_text(wrong, "utf-8")
        with pytest.raises(FormatError, match=r"mine.toml: found no usable .*; expected title, source"):
            load_yardstick(str(tmp_path / "mine.toml"))
