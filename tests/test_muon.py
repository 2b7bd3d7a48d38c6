"""Muon against a float64 loop over singular value decompositions and against torch's own."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from bytekiln.config import OptimizerConfig
from bytekiln.muon import Muon, has_fast_bf16, normalise_rows, orthogonalize, polynomials
from bytekiln.optim import make_optimizer
from named_model import KINDS, bits, fill_gradients, named_model

BASE = OptimizerConfig(optimizer="muon", lr=2e-2, weight_decay=0.1)


@pytest.fixture(autouse=True)
def products_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU with AMX, where Muon's own choice is bf16."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


MATRICES = [n for n, _ in named_model().named_parameters() if n not in KINDS]


def by_svd(g_RxC: Tensor, kind: str, steps: int) -> Tensor:
    """The polynomials on the singular values, in float64: what the products compute without ever knowing them."""
    u, s, vh = torch.linalg.svd(g_RxC.double(), full_matrices=False)
    s = s / (torch.linalg.vector_norm(s) * (1.0 if kind == "jordan" else 1.01))
    for a, b, c in polynomials(kind, steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def float64_muon(
    c: OptimizerConfig, w: Tensor, g: Tensor, memory: dict[str, Tensor], lr: float
) -> tuple[Tensor, Tensor]:
    """One step on one matrix, from the definitions.

    Returns the new weight, and where cautious decay hangs on a sign that fp32 may round the other way.
    """
    rows, columns = w.shape
    m = c.momentum * memory.get("m", torch.zeros_like(w)) + (1 - c.momentum) * g
    memory["m"] = m
    o = by_svd((1 - c.momentum) * g + c.momentum * m if c.nesterov else m, c.ns_coefficients, c.ns_steps)
    if c.normuon:
        v = c.normuon_beta2 * memory.get("v", torch.zeros(rows, 1, dtype=w.dtype)) + (1 - c.normuon_beta2) * (
            o * o
        ).mean(dim=1, keepdim=True)
        memory["v"] = v
        even = o / v.sqrt()
        o = even * (o.norm() / even.norm())
    scale = 0.2 * math.sqrt(max(rows, columns)) if c.muon_scale == "rms" else math.sqrt(max(1.0, rows / columns))
    mask = (o * w >= 0).double() if c.cautious_weight_decay else 1.0
    doubtful = ((o.abs() < 1e-4) | (w.abs() < 1e-4)) & c.cautious_weight_decay
    return w - lr * c.weight_decay * mask * w - lr * scale * o, doubtful


CHOICES = {
    "default": {},
    "jordan": {"ns_coefficients": "jordan", "nesterov": False},
    "rms": {"muon_scale": "rms", "ns_steps": 3},
    "normuon": {"normuon": True, "ns_steps": 8},
    "cautious": {"cautious_weight_decay": True, "normuon": True, "normuon_beta2": 0.9},
}


@pytest.mark.parametrize("values", CHOICES.values(), ids=CHOICES.keys())
def test_a_hundred_steps_by_hand(values: dict[str, object]) -> None:
    c = BASE.model_copy(update=values)
    m = named_model()
    optimizer = make_optimizer(m, c)
    plain = {
        n: p.detach().double().reshape(-1, *p.shape[-2:]).clone() for n, p in m.named_parameters() if n in MATRICES
    }
    memory: dict[tuple[str, int], dict[str, Tensor]] = {}
    for t in range(1, 101):
        fill_gradients(m, t)
        lr = 2e-2 / math.sqrt(t)
        doubtful = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in plain.items()}
        for n, w in plain.items():
            g = m.get_parameter(n).grad.double().reshape(w.shape)
            for i in range(len(w)):  # an expert is a matrix like any other
                w[i], doubtful[n][i] = float64_muon(c, w[i], g[i], memory.setdefault((n, i), {}), lr)
        optimizer.step(lr)
        for n, w in plain.items():
            p = m.get_parameter(n).detach().double().reshape(w.shape)
            w[doubtful[n]] = p[doubtful[n]]
            assert float(doubtful[n].double().mean()) < 0.05
    for n, w in plain.items():
        p = m.get_parameter(n).detach().double()
        torch.testing.assert_close(p, w.reshape(p.shape), rtol=1e-3, atol=2e-5, msg=lambda s, n=n: f"{n}: {s}")


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("scale", "theirs"), [("shape", "original"), ("rms", "match_rms_adamw")])
def test_a_hundred_steps_as_torchs(nesterov: bool, scale: str, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = BASE.model_copy(update={"ns_coefficients": "jordan", "muon_scale": scale, "nesterov": nesterov})
    ours, other = named_model(), named_model()
    optimizer = make_optimizer(ours, c)
    matrices = [other.get_parameter(n) for n in MATRICES if other.get_parameter(n).ndim == 2]
    reference = torch.optim.Muon(
        matrices, lr=c.lr, weight_decay=c.weight_decay, momentum=c.momentum, nesterov=nesterov, adjust_lr_fn=theirs
    )
    for t in range(1, 101):
        fill_gradients(ours, t)
        fill_gradients(other, t)
        optimizer.step(c.lr)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bfloat16", torch.float32)  # theirs is bf16 only, whose rounding hides mistakes
            reference.step()
    for n in MATRICES:
        if ours.get_parameter(n).ndim == 2:
            torch.testing.assert_close(ours.get_parameter(n), other.get_parameter(n), rtol=1e-4, atol=1e-5)


# (least singular value over the matrix's norm, iterations, least and greatest value then)
BOUNDS = {
    ("polar_express", 4): (1e-3, 0.4188, 1.5605),
    ("polar_express", 5): (1e-3, 0.8401, 1.1236),
    ("polar_express", 6): (1e-3, 0.9934, 1.0012),
    ("polar_express", 10): (1e-3, 0.9999, 1.0001),
    ("jordan", 5): (3e-3, 0.6818, 1.2024),
}


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-12, 8),
    case=st.sampled_from(sorted(BOUNDS)),
)
@settings(max_examples=150, deadline=None)
def test_singular_values_end_within_their_bounds(
    rows: int, columns: int, seed: int, exponent: float, case: tuple[str, int]
) -> None:
    kind, steps = case
    least, low, high = BOUNDS[case]
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))[0]
    s = torch.exp(torch.rand(size, generator=generator, dtype=torch.float64) * math.log(1 / (4.5 * least)))
    s = s / s.max()  # 4.5 exceeds √20, so the least over the norm stays above `least`
    g = u @ torch.diag(s) @ v.T
    o = orthogonalize((g * 10**exponent).float()[None], polynomials(kind, steps), torch.float32)[0].double()
    found = torch.linalg.svdvals(o)
    assert low - 2e-3 <= float(found.min()) <= float(found.max()) <= high + 2e-3
    torch.testing.assert_close(o, by_svd(g, kind, steps), rtol=0, atol=5e-3)


def test_bounds_are_those_of_the_polynomials() -> None:
    for (kind, steps), (least, low, high) in BOUNDS.items():
        s = torch.logspace(math.log10(least), 0, 200_001, dtype=torch.float64) / (1.0 if kind == "jordan" else 1.01)
        for a, b, c in polynomials(kind, steps):
            s = a * s + b * s**3 + c * s**5
        assert low <= float(s.min())
        assert float(s.max()) <= high


@pytest.mark.parametrize("kind", ["polar_express", "jordan"])
def test_a_stack_is_its_matrices_and_tall_ones_lie_down(kind: str) -> None:
    torch.manual_seed(0)
    steps = polynomials(kind, 5)
    g_NxRxC = torch.randn(3, 16, 6)
    g_NxRxC[1] = 0
    o = orthogonalize(g_NxRxC, steps, torch.float32)
    assert bool((o[1] == 0).all())
    for i in range(3):
        torch.testing.assert_close(o[i], orthogonalize(g_NxRxC[i : i + 1], steps, torch.float32)[0])
    torch.testing.assert_close(orthogonalize(g_NxRxC.mT.contiguous(), steps, torch.float32).mT, o)


def test_bf16_is_close() -> None:
    torch.manual_seed(0)
    g = torch.randn(2, 12, 24)
    o = orthogonalize(g, polynomials("polar_express", 5), torch.bfloat16)
    assert o.dtype == torch.float32
    found = torch.linalg.svdvals(o)
    assert float(found.min()) > 0.8
    assert float(found.max()) < 1.16


def test_polynomials_are_the_published_ones() -> None:
    first, *_, last = polynomials("polar_express", 8)
    assert first == (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5)
    assert last == polynomials("polar_express", 10)[-1] == (1.875, -1.25, 0.375)
    assert [len(polynomials(k, n)) for k in ("jordan", "polar_express") for n in (1, 10)] == [1, 10, 1, 10]


def test_normuon_evens_rows_and_keeps_the_norm() -> None:
    torch.manual_seed(0)
    o = torch.randn(2, 6, 10) * torch.tensor([1.0, 2.0, 4.0, 0.5, 1.0, 3.0]).view(1, 6, 1)
    square = torch.zeros(2, 6, 1)
    even = normalise_rows(o, square, 0.95, None)
    torch.testing.assert_close(torch.linalg.vector_norm(even, dim=(1, 2)), torch.linalg.vector_norm(o, dim=(1, 2)))
    rows = torch.linalg.vector_norm(even, dim=2)
    torch.testing.assert_close(rows, rows[:, :1].expand(2, 6))
    torch.testing.assert_close(square, 0.05 * o.square().mean(dim=2, keepdim=True))
    before = square.clone()
    assert bool(normalise_rows(torch.zeros(2, 6, 10), square, 0.95, torch.tensor(False)).eq(0).all())
    assert torch.equal(square, before)


def test_bf16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    named = [("layers.0.ffn.w1.weight", named_model().get_parameter("layers.0.ffn.w1.weight"))]
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda x=avx512: x)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda x=amx: x)
        assert has_fast_bf16(cpu) == amx
        assert Muon(named, BASE).dtype == (torch.bfloat16 if amx else torch.float32)
    assert not has_fast_bf16(torch.device("mps"))


def follow(compiled: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    m = named_model()
    optimizer = make_optimizer(m, BASE.model_copy(update={"normuon": True}), compiled=compiled)
    for t in range(20):
        fill_gradients(m, t)
        optimizer.step(2e-2 / (t + 1), torch.tensor(t != 7))
    return {n: p.detach() for n, p in m.named_parameters()}, optimizer.state_tensors()


def test_twenty_rates_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    weights, memory = follow(compiled=True)
    assert counter.frame_count == 1
    plain_weights, plain_memory = follow(compiled=False)
    assert bits(memory).keys() == bits(plain_memory).keys()
    for n, p in weights.items():
        torch.testing.assert_close(p, plain_weights[n], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_compiled_step_is_the_plain_one() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weights, memory = follow(compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    plain_weights, plain_memory = follow(compiled=False)
    for n, p in [*weights.items(), *memory.items()]:
        torch.testing.assert_close(p, {**plain_weights, **plain_memory}[n], rtol=1e-3, atol=1e-5)
