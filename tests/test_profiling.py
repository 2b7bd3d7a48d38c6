"""Where the time of a step goes: parts that add up, products that are found, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bytekiln import objective
from bytekiln.errors import ConfigError
from bytekiln.profiling import PARTS, _shares, part_of, profile_run, show
from lm_runs import tiny


@pytest.mark.parametrize(
    "values", [{}, {"optimizer": "muon", "loss_chunk": 5, "attention": "sdpa"}], ids=["plain", "muon"]
)
def test_a_profile_tells_every_part(tmp_path: Path, values: dict[str, object]) -> None:
    config = tiny(tmp_path, d_model=64, context_length=64, batch_size=8, max_time=5400, progress="seconds", **values)
    real = objective.chunked_cross_entropy
    made, folder = profile_run(config, 4, lambda _: None)
    assert objective.chunked_cross_entropy is real
    assert tuple(made.shares) == PARTS
    assert sum(made.shares.values()) == pytest.approx(1.0)
    for part in ("matmul", "attention", "loss", "optimizer", "other"):
        assert made.shares[part] > 0.002, (part, made.shares)
    assert made.step_s > 0 and made.tokens_per_s == pytest.approx(8 * 64 / made.step_s)
    assert made.mfu is None, "of a CPU nobody knows the peak"
    assert [share for _, share, _ in made.top] == sorted((share for _, share, _ in made.top), reverse=True)
    about = json.loads((folder / "profile.json").read_text("utf-8"))
    assert (about["format"], about["steps"], about["shares"]) == ("bytekiln-profile", 4, made.shares)
    assert json.loads((folder / "trace.json").read_text("utf-8"))["traceEvents"]
    text = (folder / "profile.txt").read_text("utf-8")
    assert text == show(made) + "\n" and "MFU unknown" in text
    assert made.taken_apart is about["taken_apart"] is ("are taken apart" in text)
    assert all(f"\n  {part} " in text for part in PARTS)
    assert not (tmp_path / "run/metrics.csv").exists() and not (tmp_path / "run/checkpoints").exists()
    with pytest.raises(ConfigError, match="--profile: found 0; expected at least 1 step"):
        profile_run(config, 0, lambda _: None)


def event(
    name: str, cpu_us: float, parent: object = None, kernels: tuple[tuple[str, float], ...] = (), thread: int = 1
):
    launched = [SimpleNamespace(name=n, duration=t) for n, t in kernels]
    return SimpleNamespace(name=name, cpu_parent=parent, self_cpu_time_total=cpu_us, kernels=launched, thread=thread)


def test_kernels_belong_to_the_range_that_launched_them() -> None:
    """A product in the optimizer is the optimizer's; one that a compiled graph launches is told by its own name."""
    update = event("bytekiln optimizer", 10.0)
    graph = event("CompiledFunction", 500.0)
    events = [
        update, graph,
        event("aten::bmm", 5.0, update, (("sm90_xmma_gemm_bf16", 200.0),)),
        event("aten::mm", 5.0, graph, (("nvjet_tst_128x256", 300.0),)),
        event("aten::_scaled_dot_product_flash_attention", 5.0, graph, (("flash_fwd_kernel", 100.0),)),
        event("triton_red_fused_nll_loss", 5.0, graph, (("triton_red_fused_nll_loss", 50.0),)),
        event("triton_poi_fused_add", 5.0, graph, (("triton_poi_fused_add", 150.0),)),
    ]  # fmt: skip
    shares, top = _shares(events, 1e-3, 2, on_gpu=True)
    expected = {
        "matmul": 0.3,
        "attention": 0.1,
        "loss": 0.05,
        "optimizer": 0.2,
        "data": 0.0,
        "other": 0.15,
        "idle": 0.2,
    }
    assert shares == pytest.approx(expected)
    assert top[0] == ("nvjet_tst_128x256", pytest.approx(0.3), 0)


def test_a_cpus_main_thread_counts_and_waiting_for_data_is_datas() -> None:
    waits, update = event("bytekiln data", 100.0), event("bytekiln optimizer", 70.0)
    events = [
        waits, update, event("aten::copy_", 30.0, waits), event("aten::mm", 400.0, event("aten::linear", 0.0)),
        event("aten::add", 40.0, update), event("aten::mm", 900.0, thread=2),
    ]  # fmt: skip
    shares, _ = _shares(events, 1e-3, 1, on_gpu=False)
    assert shares == pytest.approx(
        {"matmul": 0.4, "attention": 0, "loss": 0, "optimizer": 0.04, "data": 0.13, "other": 0, "idle": 0.43}
    )


@pytest.mark.parametrize(
    ("name", "above", "part"),
    [
        ("aten::bmm", ["aten::_scaled_dot_product_attention_math"], "attention"),
        ("aten::mm", ["MmBackward0", "autograd::engine::evaluate_function: MmBackward0"], "matmul"),
        ("aten::mul", ["_FusedCrossEntropyBackward"], "loss"),
        ("aten::_softmax", [], "other"),
        ("aten::addcmul_", [], "other"),
        ("aten::mm", ["aten::linear", "bytekiln loss"], "loss"),
    ],
)
def test_parts_by_name(name: str, above: list[str], part: str) -> None:
    assert part_of(name, above) == part


def test_the_command_prints_the_table(tmp_path: Path, command: Callable) -> None:
    tiny(tmp_path)
    flags = ["--train-data=train.npy", "--vocab-size=61", "--d-model=16", "--num-layers=1", "--num-heads=2",
             "--d-ff=16",
             "--context-length=8", "--batch-size=2", "--device=cpu", "--compile=false", "--out-dir=run"]  # fmt: skip
    result = command("lm-train", "debug", *flags, "--profile", "2")
    assert result.stdout.startswith("a step takes ") and "optimizer" in result.stdout
    assert "trace.json for https://ui.perfetto.dev" in result.stderr
    assert {p.name for p in (tmp_path / "run/profile").iterdir()} == {"profile.txt", "profile.json", "trace.json"}
    command("lm-train", "debug", *flags, "--profile", "2", "--eval-only", status=2)
