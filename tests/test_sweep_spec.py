"""Sweeps as data: axes, names, variants, templates, what the command line lays over them, and refusals."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytekiln.errors import BytekilnError, ConfigError, FormatError, MismatchError
from bytekiln.sweep.axes import LONGEST_NAME, Axis, exact_name, folder_names, read_axis, short
from bytekiln.sweep.folder import open_folder
from bytekiln.sweep.spec import SweepSpec, changed, load_spec, read_spec, sweep_presets, trials_of
from bytekiln.sweep.table import to_toml

BASE = {"vocab_size": 61, "d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 8}


def spec(**table: Any) -> SweepSpec:
    return read_spec({"base": BASE, **table}, "a.toml", "a", Path())


def names(**table: Any) -> list[str]:
    return [t.name for t in trials_of(spec(**table))]


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_short_is_exact_and_no_longer_than_python_writes_it(x: float) -> None:
    assert float(short(x)) == x
    assert len(short(x)) <= len(repr(x))


@given(st.lists(st.floats(min_value=1e-9, max_value=1.0), unique=True, min_size=2, max_size=20))
def test_names_never_collide(rates: list[float]) -> None:
    made = folder_names([exact_name({"lr": r}, None) for r in rates])
    assert len({n.casefold() for n in made}) == len(rates)


@pytest.mark.parametrize("pair", [(2.5e-4, 3e-4), (2.5e-4, 2.4e-4), (1e-3, 1.0000001e-3), (1e-5, 1e-4)])
def test_rates_that_the_document_confused(pair: tuple[float, float]) -> None:
    assert len({t.config.output.run_name for t in trials_of(spec(axes={"lr": list(pair)}))}) == 2


def test_long_odd_and_twin_names_become_safe() -> None:
    made = folder_names(["x" * 300, "x" * 299 + "y", "a=/b c", "a=_b_c", "V=a", "v=A", "../.."])
    assert len({n.casefold() for n in made}) == 7
    for name in made:
        assert len(name.encode()) <= LONGEST_NAME and "/" not in name and not name.startswith(".")
    assert made[3] == "a=_b_c"


def test_grid_list_random() -> None:
    axes = {"lr": [1e-3, 3e-3], "batch_size": [2, 4]}
    assert names(axes=axes) == [
        "lr=1e-3,batch_size=2", "lr=1e-3,batch_size=4", "lr=3e-3,batch_size=2", "lr=3e-3,batch_size=4",
    ]  # fmt: skip
    assert names(axes=axes, kind="list") == ["lr=1e-3,batch_size=2", "lr=3e-3,batch_size=4"]
    wide = {"lr": {"log": [1e-5, 1e-2]}, "batch_size": [2, 4]}
    drawn = trials_of(spec(axes=wide, kind="random", samples=20))
    assert len(drawn) == 20 and drawn == trials_of(spec(axes=wide, kind="random", samples=20))
    rates = sorted(t.config.optimizer.lr for t in drawn)
    assert 1e-5 <= rates[0] < 1e-4 and 1e-3 < rates[-1] <= 1e-2
    assert [t.name for t in drawn] != names(axes=wide, kind="random", samples=20, sampler_seed=1)


def test_seeds_cross_every_kind() -> None:
    assert names(axes={"lr": [1e-3, 3e-3]}, seeds=2, kind="list") == [
        "lr=1e-3,seed=1", "lr=1e-3,seed=2", "lr=3e-3,seed=1", "lr=3e-3,seed=2",
    ]  # fmt: skip
    assert names(axes={"seed": [7, 8]}) == ["seed=7", "seed=8"] == names(seeds=[7, 8])
    assert {t.seed for t in trials_of(spec(axes={"lr": [1e-3, 3e-3]}))} == {42}


def test_log_range_is_readable_and_ends_where_it_says() -> None:
    assert Axis(scale="log", low=1e-5, high=1e-2, points=7).listed("lr") == (
        1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2,
    )  # fmt: skip
    assert Axis(scale="linear", low=0, high=1, points=5).listed("dropout") == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert Axis(scale="log", low=8, high=128, points=5).listed("batch_size") == (8, 16, 32, 64, 128)
    assert len(set(Axis(scale="linear", low=1, high=1.0001, points=9).listed("lr"))) == 9


def test_variants_and_their_baseline() -> None:
    table = {
        "variant": {"no-rope": {"position": "none"}, "post-norm": {"norm_position": "post"}},
        "seeds": 2,
        "baseline": "base",
    }
    trials = trials_of(spec(**table))
    assert [t.name for t in trials][::2] == ["base,seed=1", "no-rope,seed=1", "post-norm,seed=1"]
    assert trials[2].changes == {"position": "none", "seed": 1} and trials[2].variant == "no-rope"
    assert trials[2].config.model.position == "none" and trials[0].config.model.position == "rope"
    assert len(trials_of(spec(**table | {"baseline": ""}, variants_only=True))) == 4
    assert names(variant={"x": {"no_rope": True}})[1] == "x"


def test_min_lr_follows_and_is_stated_exactly() -> None:
    trials = trials_of(spec(axes={"lr": [3e-4, 8e-4, 1.2e-3]}))
    assert [t.config.optimizer.min_lr for t in trials] == [3e-5, 8e-5, 1.2e-4]
    (pinned,) = trials_of(spec(base={**BASE, "min_lr": 1e-6}, axes={"lr": [3e-4]}))
    assert pinned.config.optimizer.min_lr == 1e-6
    (nanogpt,) = trials_of(spec(base={"preset": "shakespeare-char"}, axes={"lr": [3e-4]}))
    assert nanogpt.config.optimizer.min_lr == 3e-5, "a preset's pinned value yields"


def test_a_shape_axis_derives_anew() -> None:
    trials = trials_of(spec(axes={"d_model": [16, 32]}))
    assert trials[0].config.model.d_ff != trials[1].config.model.d_ff


def test_templates_get_what_they_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = {"checkpoint_dir": "c/x_lr{lr}", "tensorboard_dir": "tb/{name}"}
    table = {"axes": {"lr": [2.5e-4, 3e-4]}, "seeds": 2, "output": output, "variant": {"v": {"dropout": 0.1}}}
    trials = trials_of(spec(**table))
    shown = [Path(t.config.output.checkpoint_dir).relative_to(tmp_path).as_posix() for t in trials]
    assert shown[0] == "c/x_lr2.5e-4_base_seed1" and shown[-1] == "c/x_lr3e-4_v_seed2" and len(set(shown)) == 8
    assert Path(trials[0].config.output.tensorboard_dir) == tmp_path / "tb" / trials[0].name


def test_published_sweep_of_seed_000(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = load_spec("tinystories-lr")
    trials = trials_of(told)
    assert [short(t.config.optimizer.lr) for t in trials] == ["3e-4", "4e-4", "6e-4", "8e-4", "1e-3", "1.2e-3"]
    assert told.results_name == "lr_sweep_results.json" and told.folder == Path("tinystories-lr")
    for trial in trials:
        lr, output = short(trial.config.optimizer.lr), trial.config.output
        assert output.checkpoint_dir == str(tmp_path / f"checkpoints/tinystories_lr{lr}")
        assert output.tensorboard_dir == str(tmp_path / f"runs/tinystories/tinystories-4L-512d_lr{lr}")
        assert output.tensorboard and trial.config.training.max_steps == 40_000 and trial.seed == 42
        assert trial.config.data.train_data == str(tmp_path / "data/processed/tinystories_train.npy")
    small = changed(told, scale="cpu", given={"train_data": "x.npy"})
    assert small.folder == Path("tinystories-lr-cpu") and trials_of(small)[0].config.model.d_model == 128
    assert trials_of(small)[0].config.data.val_data == ""


@pytest.mark.parametrize("name", sweep_presets())
def test_every_preset_is_whole_and_survives_its_file(name: str) -> None:
    told = load_spec(name)
    assert told.question and trials_of(told)
    for scale in ("", *told.scale):
        laid = changed(told, scale=scale)
        again = read_spec(tomllib.loads(to_toml(laid.plain())), "x", "x", Path())
        assert again == laid and trials_of(again) == trials_of(laid)
        assert laid.count() == len(trials_of(laid))


def test_json_and_run_configs_are_taken(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"base": BASE, "axes": {"lr": [1e-3, 2e-3]}}))
    assert len(trials_of(load_spec(tmp_path / "s.json"))) == 2
    (tmp_path / "run.json").write_text(json.dumps({"model": BASE, "max_lr": 2e-3, "max_iters": 7}))
    run = changed(load_spec(tmp_path / "run.json"), lrs=[1e-3])
    (trial,) = trials_of(run)
    assert trial.config.training.max_steps == 7 and trial.config.optimizer.lr == 1e-3 and run.name == "run-sweep"
    (tmp_path / "s.toml").write_text('axes.seed = [1]\n[base]\nconfig = "run.json"')
    assert trials_of(load_spec(tmp_path / "s.toml"))[0].config.training.max_steps == 7
    assert trials_of(load_spec("debug"))[0].name == "base"


def test_the_command_line_wins() -> None:
    told = spec(axes={"lr": [1e-3]}, seeds=3, baseline="lr=1e-3")
    laid = changed(told, lrs=[3e-4, 4e-4], seeds=[5], axes={"batch_size": Axis(values=(2,))}, given={"n_layer": "2"})
    assert [t.name for t in trials_of(laid)] == ["lr=3e-4,batch_size=2,seed=5", "lr=4e-4,batch_size=2,seed=5"]
    assert laid.base["num_layers"] == 2 and laid.baseline == ""
    with pytest.raises(ConfigError, match=r"lr: found it as an axis of a and as one value; expected --lrs"):
        changed(told, given={"max_lr": "1e-3"})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"axes": {"learning_rat": [1]}}, "axes: unknown key learning_rat; did you mean learning_rate?"),
        ({"axis": {"lr": [1]}}, "unknown key axis; did you mean axes?"),
        ({"axes": {"lr": []}}, "axes.lr: found an empty list"),
        ({"axes": {"lr": {"log": [1e-2, 1e-5]}}}, "two rising numbers above 0"),
        ({"axes": {"lr": {"log": [1, 2], "steps": 3}}}, "found log, steps"),
        ({"axes": {"lr": {"log": [1e-5, 1e-2]}}}, "range without points"),
        ({"axes": {"lr": [1e-3, 0.001]}}, "axes.lr: found 1e-3 twice"),
        ({"axes": {"lr": [-1.0]}}, "run lr=-1: lr: found -1.0"),
        ({"axes": {"lr": [1, 2], "seed": [1]}, "kind": "list"}, "found 2 of lr, 1 of seed"),
        ({"axes": {"out_dir": ["a"]}}, "each run of a sweep has its own"),
        ({"kind": "random", "axes": {"lr": [1e-3]}, "samples": 2}, "expected at most 1"),
        ({"kind": "random"}, "axes: found none"),
        ({"kind": "grids"}, "kind: found 'grids'"),
        ({"seeds": [1, 1]}, "expected how many, or a list of different whole numbers"),
        ({"base": {"preset": "debug", "config": "x"}}, "found preset and config"),
        ({"base": {"d_modle": 3}}, "unknown key d_modle; did you mean d_model?"),
        ({"variant": {"a b": {}}}, "variant: found 'a b'"),
        ({"variant": {"a": {"position": "none"}}, "baseline": "aa"}, "baseline: found aa; did you mean a?"),
        ({"output": {"results": "a/b.json"}}, "expected a name that ends in .json"),
        ({"output": {"checkpoint_dir": "{lrr}"}}, "unknown key lrr; did you mean lr?"),
        ({"axes": {"train_data": ["a", "b"]}, "output": {"checkpoint_dir": "{lr}{name}"}}, ""),
        ({"format": "other"}, "found format other"),
        ({"base": 3}, "base: found 3; expected a table"),
    ],
)
def test_refusals(table: dict[str, Any], words: str) -> None:
    if not words:
        trials_of(spec(**table))
        return
    with pytest.raises((ConfigError, FormatError)) as e:
        trials_of(spec(**table))
    assert words in str(e.value)


def test_unknown_sweep_and_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="did you mean tinystories-lr"):
        load_spec("tinystorys-lr")
    with pytest.raises(ConfigError, match="expected one that tinystories-lr has: cpu"):
        changed(load_spec("tinystories-lr"), scale="gpu")
    with pytest.raises(BytekilnError, match=r"folder without sweep\.toml"):
        load_spec(tmp_path)
    with pytest.raises(ConfigError, match="expected log = "):
        read_axis({}, "axes.lr")


def test_counting_makes_no_runs() -> None:
    many = {f: list(range(1, 11)) for f in ("batch_size", "grad_accum_steps", "warmup_steps", "log_interval")}
    assert spec(axes=many, seeds=3, variant={"v": {"dropout": 0.1}}).count() == 60_000


def test_a_stored_sweep_means_the_same_places_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    monkeypatch.chdir(one)
    made = spec(
        base={**BASE, "train_data": "a.npy,b.npy", "tokenizer": "t.json"},
        axes={"lr": [1e-3]}, variant={"v": {"val_data": "v.npy"}}, output={"checkpoint_dir": "c/{lr}"},
    )  # fmt: skip
    open_folder(made, Path("s"))
    wanted = trials_of(made)
    assert trials_of(load_spec("s")) == wanted
    monkeypatch.chdir(other)
    assert trials_of(load_spec(one / "s")) == wanted and wanted[0].config.output.checkpoint_dir.startswith(str(one))
    open_folder(load_spec(one / "s"), one / "s")
    with pytest.raises(MismatchError, match=rf"directory: found {one}; expected {other}"):
        open_folder(made, one / "s")
    open_folder(spec(axes={"lr": [1e-3]}), other / "s")
    monkeypatch.chdir(one)
    open_folder(spec(axes={"lr": [1e-3]}), other / "s")  # nothing in it begins at a directory


def test_a_scaled_form_has_folders_of_its_own() -> None:
    full = trials_of(load_spec("tinystories-lr"))
    small = trials_of(changed(load_spec("tinystories-lr"), scale="cpu"))
    for a, b in zip(full, small, strict=True):
        assert b.config.output.checkpoint_dir == f"{a.config.output.checkpoint_dir}_cpu"
        assert b.config.output.tensorboard_dir == f"{a.config.output.tensorboard_dir}_cpu"


@pytest.mark.parametrize(
    "laid",
    [{"variant": 3}, {"variant": {"a": 3}}, {"axes": 3}, {"seeds": "x"}, {"samples": "x"}, {"samples": True},
     {"baseline": 3}],
)  # fmt: skip
def test_a_scale_of_the_wrong_kind_is_refused(laid: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"scale\.cpu.*{next(iter(laid))}.*found .*; expected"):
        changed(spec(scale={"cpu": laid}), scale="cpu")


def test_a_variant_that_is_no_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"variant\.a: found 3; expected a table"):
        spec(variant={"a": 3})


def test_more_seeds_than_can_be_meant_are_not_listed() -> None:
    with pytest.raises(ConfigError, match="seeds: found 1000000000; expected at most"):
        spec(seeds=1_000_000_000)
