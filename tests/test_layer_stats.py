"""`layers.csv`: numbers held to numpy, the forward that disturbs nothing, warnings, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bytekiln.config import ModelConfig
from bytekiln.layer_stats import (
    AT_ONCE,
    BINS,
    LOWEST,
    LayerStats,
    _bins,
    bars,
    counted,
    counted_without_sync,
    gradient_norms,
    summary,
)
from bytekiln.layer_warnings import Judge, LayerRow
from bytekiln.metrics import read_rows
from bytekiln.model import TransformerLM

VOCAB, COLUMNS = 40, "step,layer,kind,norm,mean,std,min,max,zero_share,counts"
EDGES = np.array([4.0**k for k in range(LOWEST, LOWEST + BINS + 1)])
DOCS = Path(__file__).parent.parent / "docs" / "formats.md"
SIZES = (
    st.floats(-1e6, 1e6, width=32)
    | st.floats(-(2.0**-30), 2.0**-30, width=32)
    | st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, *EDGES.tolist()])
)


class Loss(NamedTuple):
    total: Tensor
    load_LxE: Tensor


class Batch(NamedTuple):
    inputs_BxT: Tensor
    targets_BxT: Tensor
    documents_BxT: Tensor | None
    count: int


def batch(seed: int = 0) -> Batch:
    ids = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:], None, 24)


def model(**values: object) -> TransformerLM:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 3, "num_heads": 2, "context_length": 8}
    return TransformerLM(ModelConfig(**{**shape, **values})).train()


def loss_of(m: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda inputs, targets, _: nn.functional.cross_entropy(m(inputs).flatten(0, 1), targets.flatten())


def backward(m: nn.Module) -> None:
    loss_of(m)(*batch()[:3]).backward()


def rows_of(path: Path) -> list[LayerRow]:
    return read_rows(path, LayerRow, "layers")


def specification(x: np.ndarray, near_zero: float) -> list[float]:
    """The same numbers in float64, the histogram by comparing each value with each edge."""
    x = x.astype(np.float64).ravel()
    zero = np.abs(x) < near_zero if near_zero else x == 0
    counts = [int((np.abs(x) < EDGES[0]).sum())]
    counts += [int(((np.abs(x) >= a) & (np.abs(x) < b)).sum()) for a, b in pairwise(EDGES)]
    counts += [int((~(np.abs(x) < EDGES[-1])).sum())]
    return [np.sqrt((x**2).sum()), x.mean(), x.std(), x.min(), x.max(), zero.mean(), *counts]


@given(values=st.lists(SIZES, min_size=1, max_size=50), near_zero=st.sampled_from([0.0, 1e-3]))
def test_numbers_are_those_of_the_specification(values: list[float], near_zero: float) -> None:
    x = torch.tensor(values)
    found, expected = summary(x, near_zero).tolist(), specification(x.numpy(), near_zero)
    assert found[6:] == expected[6:]
    size = max(map(abs, values))
    np.testing.assert_allclose(found[:6], expected[:6], rtol=2e-6, atol=1e-6 * size)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-25, 1e25, 3e38])
def test_squares_neither_vanish_nor_overflow(size: float) -> None:
    x = torch.tensor([size, -size, 0.0, size])
    norm, mean, std, *_ = summary(x, 0.0).tolist()
    size = float(x[0])
    np.testing.assert_allclose([norm / size, mean / size, std / size], [3**0.5, 0.25, 0.6875**0.5], rtol=1e-6)


def test_borders_zero_and_what_is_not_finite() -> None:
    below = np.nextafter(np.float32(1), np.float32(0))
    one = -LOWEST + 1  # the bin that begins at 4^0
    counts = summary(torch.tensor([0.0, 1.0, float(below), -1.0, 1e-40, math.inf, math.nan, 1e30]), 0.0)[6:]
    assert {i: int(n) for i, n in enumerate(counts.tolist()) if n} == {0: 2, one - 1: 1, one: 2, BINS + 1: 3}
    assert math.isnan(summary(torch.tensor([1.0, math.nan]), 0.0)[0])
    assert summary(torch.tensor([1.0, -math.inf]), 0.0)[[0, 1, 3, 4]].tolist() == [math.inf, -math.inf, -math.inf, 1.0]
    assert summary(torch.zeros(3), 0.0)[:6].tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_large_tensors_are_counted_in_parts_and_both_counters_agree() -> None:
    x = torch.randn(AT_ONCE + 17, generator=torch.Generator().manual_seed(1)).exp()
    assert summary(x.view(-1, 1), 0.0)[6:].tolist() == specification(x.numpy(), 0.0)[6:]
    assert counted_without_sync(_bins(x)).tolist() == counted(_bins(x)).tolist()
    transposed = x[:600].view(20, 30).t()
    assert summary(transposed, 0.0)[6:].tolist() == summary(x[:600], 0.0)[6:].tolist()
    assert summary(x[:600].bfloat16(), 0.0)[0] == pytest.approx(float(x[:600].norm()), rel=1e-2)


def test_the_path_of_cuda_asks_the_host_nothing() -> None:
    """Traced with tensors that have no values: whatever needs one would raise."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        found = summary(torch.empty(AT_ONCE + 5, 3, device="cuda", dtype=torch.bfloat16), 1e-3)
        assert (found.device.type, found.shape, found.dtype) == ("cuda", (6 + BINS + 2,), torch.float64)
        with pytest.raises(DataDependentOutputException):
            found[0].item()


def test_rows_are_the_parameters_and_the_layers(tmp_path: Path) -> None:
    m = model(dropout=0.5)
    backward(m)
    stats = LayerStats(tmp_path / "layers.csv")
    assert stats.record(7, m, loss_of(m), batch()) == []
    stats.close()
    path = tmp_path / "layers.csv"
    assert path.read_text().splitlines()[0] == COLUMNS
    rows = rows_of(path)
    assert {r.step for r in rows} == {7}
    parameters = dict(m.named_parameters())
    by_kind = {kind: {r.layer: r for r in rows if r.kind == kind} for kind in ("gradient", "weight", "activation")}
    assert list(by_kind["gradient"]) == list(by_kind["weight"]) == list(parameters)
    for name, p in parameters.items():
        for kind, x in (("gradient", p.grad), ("weight", p.detach())):
            row, expected = by_kind[kind][name], specification(x.numpy(), 0.0)
            numbers = [row.norm, row.mean, row.std, row.min, row.max, row.zero_share]
            np.testing.assert_allclose(numbers, expected[:6], rtol=1e-5, atol=1e-7)
            assert [int(c) for c in row.counts.split()] == expected[6:]

    seen: dict[str, Tensor] = {}
    for name, module in m.named_modules():
        module.register_forward_hook(lambda _, i, o, name=name: seen.update({name: o, f"{name}.in": i[0]}))
    with torch.no_grad():
        m.eval()(batch().inputs_BxT)
    expected_of = {
        "token_embeddings": seen["token_embeddings"],
        **{
            f"layers.{i}{part}": seen[f"layers.{i}{of}"]
            for i in range(3)
            for part, of in (("", ""), (".attn", ".attn"), (".ffn", ".ffn"), (".ffn.hidden", ".ffn.w2.in"))
        },
        "ln_final": seen["ln_final"],
    }
    assert set(by_kind["activation"]) == set(expected_of)
    for name, x in expected_of.items():
        row, expected = by_kind["activation"][name], specification(x.numpy(), 1e-3)
        np.testing.assert_allclose([row.norm, row.zero_share], [expected[0], expected[5]], rtol=1e-5)
        assert sum(map(int, row.counts.split())) == x.numel()


def test_columns_are_those_of_the_documentation() -> None:
    section = DOCS.read_text("utf-8").split("\n## layers.csv\n")[1].split("\n## ")[0]
    assert [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")] == COLUMNS.split(",")


def test_a_record_changes_nothing(tmp_path: Path) -> None:
    """Neither generator, mode, hooks, gradients nor weights; and the next dropout is the one it would have been."""

    def run(watched: bool) -> tuple[Tensor, Tensor]:
        m = model(dropout=0.3)
        backward(m)
        if watched:
            stats = LayerStats(tmp_path / "layers.csv")
            stats.record(1, m, loss_of(m), batch())
            stats.close()
        assert all(x.training for x in m.modules())
        assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())
        backward(m)
        return torch.cat([p.grad.flatten() for p in m.parameters()]), torch.get_rng_state()

    for plain, watched in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, watched)


def test_hooks_and_mode_are_restored_after_an_interruption(tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def interrupted(*_: object) -> Tensor:
        raise Interrupted

    m = model()
    backward(m)
    stats = LayerStats(tmp_path / "layers.csv")
    with pytest.raises(Interrupted):
        stats.record(1, m, interrupted, batch())
    stats.close()
    assert m.training and not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())
    assert rows_of(tmp_path / "layers.csv") == []


class NoSync(TorchDispatchMode):
    """Notes operations that make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_host_and_device_meet_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    backward(m)
    stats = LayerStats(tmp_path / "layers.csv")
    fetched: list[int] = []
    whole = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: fetched.append(x.numel()) or whole(x))
    with NoSync() as watch:
        stats.record(1, m, loss_of(m), batch())
        norms = gradient_norms(m)
    assert watch.found == []
    assert len(fetched) == 1
    bars(norms)
    assert len(fetched) == 2
    stats.close()


def test_gradient_norms_of_layers() -> None:
    m = model()
    assert gradient_norms(m) == {}
    backward(m)
    norms = gradient_norms(m)
    assert list(norms) == ["token_embeddings", "layers.0", "layers.1", "layers.2", "ln_final", "lm_head"]
    for name, norm in norms.items():
        grads = [p.grad.double().flatten() for n, p in m.named_parameters() if n.startswith(f"{name}.")]
        assert float(norm) == pytest.approx(float(torch.cat(grads).norm()), rel=1e-6)
    total = math.sqrt(sum(float(n) ** 2 for n in norms.values()))
    assert total == pytest.approx(float(nn.utils.clip_grad_norm_(m.parameters(), 1e9)), rel=1e-6)


def test_experts_loads(tmp_path: Path) -> None:
    m = model()
    backward(m)
    load_LxE = torch.tensor([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0]])
    stats = LayerStats(tmp_path / "layers.csv")
    stats.record(1, m, lambda *a: Loss(loss_of(m)(*a), load_LxE), batch())
    stats.record(2, m, lambda *a: Loss(loss_of(m)(*a), torch.zeros(0, 0)), batch())
    stats.close()
    loads = [r for r in rows_of(tmp_path / "layers.csv") if r.kind == "expert_load"]
    assert [(r.step, r.layer, r.counts) for r in loads] == [
        (1, "layers.0.ffn", "6 2 0 0"),
        (1, "layers.1.ffn", "2 2 2 2"),
        (1, "layers.2.ffn", "8 0 0 0"),
    ]
    first = loads[0]
    assert (first.mean, first.min, first.max, first.zero_share) == (2.0, 0.0, 6.0, 0.5)
    assert (first.norm, first.std) == pytest.approx((math.sqrt(40), math.sqrt(6)))


def test_a_real_mixture_of_experts(tmp_path: Path) -> None:
    from bytekiln.config import RunConfig
    from bytekiln.objective import Objective

    shape = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 8, "d_ff": 16}
    shape |= {"ffn": "moe", "num_experts": 4, "expert_top_k": 2, "num_shared_experts": 1, "router_noise": 0.5}
    config = RunConfig(model=ModelConfig(**shape), training={"precision": "fp32"})
    m = TransformerLM(config.model).train()
    objective = Objective(m, config)
    objective(*batch()[:3]).total.backward()
    state = torch.get_rng_state()
    stats = LayerStats(tmp_path / "layers.csv")
    stats.record(1, m, objective, batch())
    stats.close()
    assert torch.equal(state, torch.get_rng_state()), "router noise is for training"
    rows = rows_of(tmp_path / "layers.csv")
    loads = [[int(x) for x in r.counts.split()] for r in rows if r.kind == "expert_load"]
    assert [len(x) for x in loads] == [4, 4]
    assert [sum(x) for x in loads] == [48, 48], "24 tokens, two experts each"
    assert {r.layer for r in rows if r.kind == "gradient"} >= {"layers.1.ffn.experts_w3", "layers.1.ffn.router.weight"}
    assert "layers.0.ffn.shared.hidden" in {r.layer for r in rows if r.kind == "activation"}


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_resume_cuts_the_file_back_and_goes_on(tmp_path: Path) -> None:
    m = model()
    backward(m)
    path = tmp_path / "layers.csv"
    unbroken = LayerStats(path)
    for step in (2, 4, 6):
        unbroken.record(step, m, loss_of(m), batch(step))
    unbroken.sync()
    unbroken.close()
    expected = path.read_bytes()
    with path.open("ab") as f:
        f.write(b"8,token_embeddings.weight,gradient,0.1")  # torn by a kill
    resumed = LayerStats(path, keep_until=5)
    assert {r.step for r in rows_of(path)} == {2, 4}
    resumed.record(6, m, loss_of(m), batch(6))
    resumed.close()
    assert path.read_bytes() == expected
    copy = LayerStats(tmp_path / "copy.csv", 4, path)
    copy.close()
    assert {r.step for r in rows_of(tmp_path / "copy.csv")} == {2, 4}
    assert path.read_bytes() == expected


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_shards_are_gathered(tmp_path: Path, one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    plain, sharded = model(), model()
    backward(plain)
    mesh = init_device_mesh("cpu", (1,))
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        whole = nn.Parameter(distribute_tensor(q.data, mesh, [Shard(0)]))
        whole.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        for module in sharded.modules():
            for name, old in module._parameters.items():
                if old is q:
                    module._parameters[name] = whole
    for path, m in ((tmp_path / "a.csv", plain), (tmp_path / "b.csv", sharded)):
        stats = LayerStats(path)
        stats.record(1, m, loss_of(plain), batch())
        stats.close()
    kinds = ("gradient", "weight")
    a, b = ([r for r in rows_of(tmp_path / n) if r.kind in kinds] for n in ("a.csv", "b.csv"))
    assert a == b != []
    found, expected = gradient_norms(sharded), gradient_norms(plain)
    assert {k: float(v) for k, v in found.items()} == pytest.approx({k: float(v) for k, v in expected.items()})
    other = LayerStats(None)
    assert other.record(1, sharded, loss_of(plain), batch()) == []
    other.sync()
    other.close()


# --- warnings -------------------------------------------------------------------------------------------------------


def test_a_sound_model_is_not_warned_of(tmp_path: Path) -> None:
    """Also where everything but the head starts at zero, and the first step's learning rate is zero."""
    for choice in ({}, {"zero_init_projections": True, "head_init": "zero", "ffn": "relu2"}):
        m = model(**choice)
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.0)
        stats = LayerStats(tmp_path / "layers.csv")
        for step in range(1, 7):
            optimizer.zero_grad()
            backward(m)
            assert stats.record(step, m, loss_of(m), batch()) == []
            optimizer.param_groups[0]["lr"] = 1e-3
            optimizer.step()
        stats.close()


def warnings_over(tmp_path: Path, m: nn.Module, steps: int = 5, spoil: Callable[[], object] = lambda: 0) -> list[str]:
    stats, said = LayerStats(tmp_path / "layers.csv"), []
    for step in range(1, steps + 1):
        m.zero_grad()
        backward(m)
        spoil()
        said += stats.record(step, m, loss_of(m), batch())
    stats.close()
    return said


def test_dead_relus_are_told_once(tmp_path: Path) -> None:
    m = model(ffn="relu2")
    with torch.no_grad():  # its input is made constant, and w1 answers with negative numbers only
        m.layers[1].ln2.weight.zero_()
        m.layers[1].ffn.w1.bias = nn.Parameter(torch.full((m.layers[1].ffn.w1.weight.shape[0],), -1.0))
    said = warnings_over(tmp_path, m)
    assert said == [
        "step 3: ⚠ layers.1.ffn: dead, every gradient is exactly zero",
        "step 3: ⚠ layers.1.ffn: dead, 100.0% of the activations are zero (below 0.001)",
    ]
    resumed = LayerStats(tmp_path / "layers.csv", keep_until=4)
    assert resumed.record(5, m, loss_of(m), batch()) == [], "told before the resume"
    resumed.close()
    early = LayerStats(tmp_path / "layers.csv", keep_until=2)
    assert len(early.record(3, m, loss_of(m), batch())) == 2, "two of three were before the resume"
    early.close()


def test_vanishing_and_exploding_gradients(tmp_path: Path) -> None:
    m = model()

    def scale(part: nn.Module, by: float) -> None:
        for p in part.parameters():
            p.grad *= by

    said = warnings_over(tmp_path, m, spoil=lambda: scale(m.layers[0], 1e-6))
    assert len(said) == 1
    assert said[0].startswith("step 3: ⚠ layers.0: vanishing gradient, norm ")
    said = warnings_over(tmp_path, m, spoil=lambda: scale(m.layers[2], 1e4))
    assert len(said) == 2
    assert said[0].startswith("step 1: ⚠ the gradient is large, norm ")
    assert said[0].endswith("consider a lower lr or clipping (grad_clip)")
    assert said[1].startswith("step 1: ⚠ layers.2: exploding gradient, norm ")
    said = warnings_over(tmp_path, m, spoil=lambda: scale(m.layers[1].attn.q_proj, math.nan))
    assert [s.split(", where")[0] for s in said] == ["step 1: ⚠ layers.1: exploding gradient, norm nan"]


def gradient(step: int, layer: str, norm: float) -> LayerRow:
    return LayerRow(step, layer, "gradient", norm, 0.0, 0.0, 0.0, 0.0, 0.0, "")


def test_the_rules_at_their_borders() -> None:
    def told(*norms: float, steps: int = 3) -> list[str]:
        judge, out = Judge(), []
        for step in range(1, steps + 1):
            names = [f"layers.{i}.ffn.w1.weight" for i in range(len(norms))]
            out += judge.warnings([gradient(step, n, x) for n, x in zip(names, norms, strict=True)])
        return out

    assert told(1, 1, 1.001e-3) == []
    assert "vanishing" in told(1, 1, 0.999e-3)[0]
    assert told(1, 1, 0.999e-3, steps=2) == []
    assert "dead" in told(1, 1, 0)[0] and len(told(1, 1, 0)) == 1
    assert told(9.9, 0.01, 0.01) == [], "hundred times the median, but small"
    assert len(told(10.1, 0.2, 0.2)) == 1, "large, though not hundred times the median"
    assert len(told(10.1, 0.1, 0.1)) == 2
    judge = Judge()
    rows = [
        gradient(1, "ln_final.weight", 1e-9),
        gradient(1, "residual_lambdas", 0.0),
        gradient(1, "lm_head.weight", 1),
    ]
    assert [w for _ in range(4) for w in judge.warnings(rows)] == [], "norms and scalars are no layers"
    scaled = Judge(overflows=True)
    overflow = [w for s in range(4) for w in scaled.warnings([gradient(s, "lm_head.weight", math.inf)])]
    assert overflow == [], "the scaler of fp16 tries how far it can go"
    assert len(scaled.warnings([gradient(5, "lm_head.weight", 11.0)])) == 1
    again = Judge()
    alternating = [again.warnings([gradient(s, "lm_head.weight", s % 3)]) for s in range(12)]
    assert not any(alternating), "zero now and then is not dead"


# --- bars -----------------------------------------------------------------------------------------------------------


def test_bars() -> None:
    text = bars({"token_embeddings": 1e-3, "layers.0": 1e-2, "layers.1": 1.0, "layers.2": 0.0, "lm_head": math.nan})
    assert text.splitlines()[0] == "gradient norm a layer, logarithmic from 1e-03 to 1e+00"
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    length = {name: line.count("█") for name, line in lines.items()}
    room = length["layers.1"]
    assert length["token_embeddings"] == 1
    assert length["layers.0"] in (room // 3, room // 3 + 1)
    assert (length["layers.2"], length["lm_head"]) == (0, room)
    assert lines["lm_head"].endswith("nan") and lines["layers.2"].endswith(" 0")
    assert bars({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}) == bars({"a": 2.0, "b": 3.0})
    assert bars({"a": 1.0}).splitlines()[1].count("█") == 1, "a single power of ten has a scale, too"
    assert bars({}) and bars({"a": 0.0})


@given(st.dictionaries(st.text("abc.ü", max_size=40), st.floats(0, width=32), max_size=6))
def test_bars_fit_eighty_columns_and_are_in_order(norms: dict[str, float]) -> None:
    lines = bars(norms).splitlines()
    assert len(lines) == len(norms) + 1
    assert max(map(len, lines)) <= 80
    eighths = dict.fromkeys(" ", 0) | {c: i for i, c in enumerate("▏▎▍▌▋▊▉█", start=1)}
    drawn = [sum(eighths.get(c, 0) for c in line) for line in lines[1:]]
    finite = sorted((v, d) for v, d in zip(norms.values(), drawn, strict=True) if math.isfinite(v))
    assert [d for _, d in finite] == sorted(d for _, d in finite)


def test_a_compiled_step_is_not_compiled_anew(tmp_path: Path) -> None:
    import torch._dynamo

    m = model(num_layers=1)
    backends: list[int] = []
    backward_of = torch.compile(loss_of(m), backend=lambda graph, _: backends.append(1) or graph.forward)
    stats = LayerStats(tmp_path / "layers.csv")
    for step in range(1, 5):
        m.zero_grad()
        backward_of(*batch()[:3]).backward()
        stats.record(step, m, loss_of(m), batch())
    stats.close()
    assert len(backends) == 1
