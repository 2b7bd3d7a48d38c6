"""The Rust core's kernels as torch operators: equal to plain float64 formulas, whatever the strides, threads, level."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bytekiln import _core, kernels
from bytekiln.attention import CAUSAL, Sight, native_attention, reference_attention
from bytekiln.config import ModelConfig
from bytekiln.model import TransformerLM

FORMULAS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}


@pytest.fixture(params=["torch", "own"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both kinds of threads; whatever a test sets, kind and number are the same behind it."""
    before, lent = torch.get_num_threads(), kernels._gomp_parallel()
    _core.borrow_threads(lent if request.param == "torch" else 0)
    yield
    _core.borrow_threads(lent)
    torch.set_num_threads(before)


def heads_of(B: int, T: int, H: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """B×H×T×K as the model makes it: a view of B×T×D."""
    return torch.randn(B, T, H * K, dtype=dtype).view(B, T, H, K).transpose(1, 2)


def outcome(f, tensors: list[Tensor], g: Tensor) -> list[Tensor]:
    """What f gives, and its gradients."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = f(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, g.to(out.dtype))]


@pytest.mark.parametrize("kind", kernels.KINDS)
def test_activations_err_no_more_than_torch(kind: str) -> None:
    x = torch.linspace(-9, 9, 1_000_003)
    g = torch.ones_like(x)
    ours = outcome(lambda x: kernels.activation(x, kind), [x], g)
    theirs, exact = outcome(FORMULAS[kind], [x], g), outcome(FORMULAS[kind], [x.double()], g)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert (mine - right).abs().max() <= 2 * (other - right).abs().max() + 1e-9
    assert torch.equal(kernels.activation(x, kind), ours[0])  # without a gradient


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_activations_keep_their_limits(kind: str) -> None:
    inf = float("inf")
    x = torch.tensor([0.0, -0.0, inf, -inf, float("nan"), 1e30, -1e30], requires_grad=True)
    y = kernels.activation(x, kind)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y[:2].tolist() == [0, 0] and y[:2].signbit().tolist() == [False, True]
    torch.testing.assert_close(y[2:], torch.tensor([inf, 0.0, float("nan"), 1e30, 0.0]), equal_nan=True)
    torch.testing.assert_close(slope, torch.tensor([0.5, 0.5, 1, 0, float("nan"), 1, 0]), equal_nan=True)


@given(st.integers(0, 70), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_activations_of_any_shape(rows: int, columns: int, turned: bool, seed: int) -> None:
    torch.manual_seed(seed)
    a, b, g = (torch.randn(columns, rows).T if turned else torch.randn(rows, columns) for _ in range(3))
    wide = [x.double() for x in (a, b)]
    for kind in kernels.KINDS:
        ours = outcome(lambda x, kind=kind: kernels.activation(x, kind), [a], g)
        exact = outcome(FORMULAS[kind], wide[:1], g)
        torch.testing.assert_close(ours, [x.float() for x in exact], rtol=2e-6, atol=2e-6)
    exact = outcome(lambda a, b: F.silu(a) * b, wide, g)
    torch.testing.assert_close(outcome(kernels.swiglu, [a, b], g), [x.float() for x in exact], rtol=2e-6, atol=2e-6)


@given(
    st.integers(0, 40),
    st.sampled_from([8, 24, 33, 96]),
    st.sampled_from(["plain", "heads", "turned"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_norms_are_torchs(rows: int, width: int, layout: str, has_weight: bool, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (2, 3, rows, width)
    x, g = torch.randn(shape), torch.randn(shape)
    if layout == "heads":
        x = heads_of(2, rows, 3, width)
    if layout == "turned":
        x, g = (y.transpose(0, 2).contiguous().transpose(0, 2) for y in (x, g))
    tensors = [x, torch.randn(width)] if has_weight else [x]
    ours = outcome(lambda x, *w: kernels.rms_norm(x, *(w or (None,)), 1e-5), tensors, g)
    exact = outcome(lambda x, *w: F.rms_norm(x, (width,), *(w or (None,)), 1e-5), [y.double() for y in tensors], g)
    torch.testing.assert_close(ours, [y.float() for y in exact], rtol=1e-5, atol=1e-5)
    assert torch.equal(kernels.rms_norm(x, *(tensors[1:] or (None,)), 1e-5), ours[0])  # without a gradient
    if layout != "turned":
        assert ours[0].stride() == ours[1].stride() == x.stride()


def test_a_norm_s_weight_alone_may_want_a_gradient() -> None:
    x, weight, g = torch.randn(7, 12), torch.randn(12, requires_grad=True), torch.randn(7, 12)
    (ours,) = torch.autograd.grad(kernels.rms_norm(x, weight, 1e-5), weight, g)
    torch.testing.assert_close(ours, torch.autograd.grad(F.rms_norm(x, (12,), weight, 1e-5), weight, g)[0])
    (ours,) = torch.autograd.grad(torch.ops.bytekiln.rms_norm(x, weight, 1e-5)[0], weight, g)
    torch.testing.assert_close(ours, torch.autograd.grad(F.rms_norm(x, (12,), weight, 1e-5), weight, g)[0])


@settings(max_examples=60)
@given(
    st.integers(0, 90),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([*kernels.KINDS, "swiglu"]),
    st.integers(0, 99),
)
def test_bf16_is_computed_in_float32_and_rounded_once(
    rows: int, columns: int, turned: bool, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    shape = (columns, rows) if turned else (rows, columns)
    x, other, g = ((t.t() if turned else t) for t in 4 * torch.randn(3, *shape, dtype=torch.bfloat16))

    def done(*tensors: Tensor) -> Tensor:
        return kernels.swiglu(*tensors) if kind == "swiglu" else kernels.activation(tensors[0], kind)

    given = [x, other] if kind == "swiglu" else [x]
    for found, exact in zip(outcome(done, given, g), outcome(done, [t.float() for t in given], g), strict=True):
        assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())


def test_bf16_keeps_what_is_no_number() -> None:
    x = torch.tensor([math.nan, -math.nan, math.inf, 3.3895e38] * 9, dtype=torch.bfloat16)
    for kind in kernels.KINDS:
        assert torch.equal(kernels.activation(x, kind).isnan(), x.isnan())
    assert torch.equal(kernels.activation(x, "relu2").isinf(), ~x.isnan())


@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 0.15, 0.5, 0.9]),
    st.integers(0, 2**63 - 1),
)
def test_dropout_is_its_definition(
    rows: int, columns: int, turned: bool, dtype: torch.dtype, rate: float, seed: int
) -> None:
    """Which numbers are dropped: a hash of seed and place; the others, and their gradients, are scaled."""
    x = torch.randn(rows, columns, dtype=dtype)
    x = (x.t() if turned else x).requires_grad_()
    y = kernels.dropout_of(x, rate, torch.tensor(seed))
    stays = torch.tensor([stays_of(seed, rate, place) for place in range(x.numel())], dtype=torch.bool).view(x.shape)
    exact = torch.where(stays, x.detach().float() / (1 - rate), 0.0)
    torch.testing.assert_close(y.detach().float(), exact, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=0)
    g = torch.randn(x.shape, dtype=dtype)
    exact = torch.where(stays, g.float() / (1 - rate), 0.0)
    (dx,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(dx.float(), exact, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=0)


def stays_of(seed: int, rate: float, place: int) -> bool:
    """The specification."""

    def mixed(x: int) -> int:
        x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0xD35A2D97 & 0xFFFFFFFF
        return x ^ x >> 15

    beyond = (place >> 32) * 0x9E3779B9 & 0xFFFFFFFF
    return mixed(mixed((place ^ seed) & 0xFFFFFFFF) ^ seed >> 32 ^ beyond) >= round(rate * 2**32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_and_follows_torchs_generator(dtype: torch.dtype, threads: None) -> None:
    x, before = torch.ones(300_000, dtype=dtype), torch.get_rng_state()
    y = kernels.dropout(x, 0.2)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert float(y.double().mean()) == pytest.approx(1, abs=5 * (0.25 / 300_000) ** 0.5)
    other = kernels.dropout(x, 0.2)
    assert float(((y == 0) & (other == 0)).double().mean()) == pytest.approx(0.04, abs=0.002), (
        "independent of the first"
    )
    torch.set_rng_state(before)
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        torch.set_rng_state(before)
        assert torch.equal(kernels.dropout(x, 0.2), y)
    lost = torch.full((1000,), math.nan, dtype=dtype)
    assert 0 < int(kernels.dropout(lost, 0.5).isnan().sum()) < 1000


def test_dropout_has_gradients_of_gradients_and_refuses_what_it_cannot_read() -> None:
    x, seed = torch.randn(50, requires_grad=True), torch.tensor(7)
    y = kernels.dropout_of(x, 0.3, seed)
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(ddx, torch.where(y.detach() == 0, 0.0, 2 / 0.7**2))
    torch.ops.bytekiln.dropout(x, 0.3, seed).sum().backward()
    torch.testing.assert_close(x.grad, torch.where(y.detach() == 0, 0.0, 1 / 0.7))
    for wrong, rate in ((x.double(), 0.3), (x.half(), 0.3), (x, 1.0), (x, -0.1), (x, math.nan)):
        with pytest.raises(ValueError, match="dropout: found rate"):
            kernels.dropout_of(wrong, rate, seed)
    for wrong in (torch.tensor(1.0), torch.tensor([1])):
        with pytest.raises(ValueError, match="dropout: found seed"):
            kernels.dropout_of(x, 0.3, wrong)


def test_which_activations_are_taken() -> None:
    assert kernels.activates(torch.zeros(3)) and kernels.normalises(torch.zeros(3))
    halves = torch.zeros(3, dtype=torch.bfloat16)
    assert kernels.activates(halves) and not kernels.normalises(halves)
    assert not kernels.activates(torch.zeros(3, dtype=torch.float16))
    assert not kernels.activates(torch.zeros(3, dtype=torch.float64))
    assert not kernels.activates(torch.zeros(3, device="meta"))


def held(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> None:
    """Output and gradients of the kernel against the specification in float64."""
    g = torch.randn_like(q)
    exact = outcome(lambda *x: reference_attention(*x, 0.0, sight), [x.double() for x in (q, k, v)], g)
    ours = outcome(lambda *x: kernels.attention(*x, sight.causal, sight.window), [q, k, v], g)
    torch.testing.assert_close(ours, [x.float() for x in exact], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("K", [8, 16, 24, 32, 64, 80, 128])
@pytest.mark.parametrize("T", [1, 7, 63, 65, 257])
def test_attention_is_its_formula(T: int, K: int) -> None:
    torch.manual_seed(0)
    held(heads_of(2, T, 4, K), heads_of(2, T, 2, K), heads_of(2, T, 2, K), CAUSAL)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6)),
    st.tuples(st.integers(1, 150), st.integers(0, 30)),
    st.booleans(),
    st.integers(0, 160),
    st.integers(0, 99),
)
def test_attention_of_any_shape(
    sizes: tuple[int, int, int, int], times: tuple[int, int], causal: bool, window: int, seed: int
) -> None:
    torch.manual_seed(seed)
    (B, G, shared, width), (T, before) = sizes, times
    S, K = T + before, 8 * width
    held(heads_of(B, T, G * shared, K), heads_of(B, S, G, K), heads_of(B, S, G, K), Sight(causal, window))


@pytest.mark.parametrize("layout", ["B×H×T×K", "K before T", "every second", "one head for all", "slices of one"])
def test_strides_change_nothing(layout: str) -> None:
    torch.manual_seed(0)
    B, H, T, K = 2, 4, 33, 16
    made = {
        "B×H×T×K": lambda: torch.randn(B, H, T, K),
        "K before T": lambda: torch.randn(B, H, K, T).transpose(2, 3),
        "every second": lambda: torch.randn(B, H, T, 2 * K)[..., ::2],
        "one head for all": lambda: torch.randn(B, 1, T, K).expand(B, H, T, K),
        "slices of one": lambda: torch.randn(B, T, 3, H, K)[:, :, 1].transpose(1, 2),
    }[layout]
    q, k, v, g = (made() for _ in range(4))
    strided = outcome(lambda *x: kernels.attention(*x, True, 0), [q, k, v], g)
    plain = outcome(lambda *x: kernels.attention(*x, True, 0), [x.contiguous() for x in (q, k, v)], g.contiguous())
    assert all(map(torch.equal, strided, plain))
    summed = torch.autograd.grad(kernels.attention(q.requires_grad_(), k, v, True, 0).sum(), q)  # strides of 0
    ones = outcome(lambda *x: kernels.attention(*x, True, 0), [q, k, v], torch.ones(B, H, T, K))
    assert torch.equal(summed[0], ones[1])


def test_output_and_gradients_need_no_copy() -> None:
    tensors = [heads_of(2, 9, 4, 16) for _ in range(3)]
    for x in outcome(lambda q, k, v: kernels.attention(q, k, v, True, 0), tensors, heads_of(2, 9, 4, 16)):
        assert x.transpose(1, 2).is_contiguous()


def test_threads_change_no_bit(threads: None) -> None:
    torch.manual_seed(0)
    q, k, v, g = heads_of(3, 70, 6, 32), heads_of(3, 70, 2, 32), heads_of(3, 70, 2, 32), heads_of(3, 70, 6, 32)
    a, b = torch.randn(100_001), torch.randn(100_001)
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(
            [
                *outcome(lambda *x: kernels.attention(*x, True, 0), [q, k, v], g),
                *outcome(lambda x: kernels.activation(x, "gelu"), [a], b),
                *outcome(kernels.swiglu, [a, b], b),
            ]
        )
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list threads")
@pytest.mark.parametrize("kind", ["torch", "own"])
def test_where_torch_has_threads_the_kernels_make_none(kind: str) -> None:
    if kind == "torch" and not kernels._gomp_parallel():
        pytest.skip("this torch has no GNU OpenMP")
    script = textwrap.dedent(f"""
        from pathlib import Path
        import torch
        from bytekiln import _core, kernels
        if {kind == "own"}:
            _core.borrow_threads(0)
        torch.set_num_threads(3)
        for _ in range(20):
            kernels.activation(torch.randn(200_000), "gelu")
        names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        print(names.count("bytekiln"))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == (0 if kind == "torch" else 2)


def test_other_threads_of_python_run_while_a_kernel_does(threads: None) -> None:
    """The interpreter's lock is released: a loop beside a call that takes a while goes on."""
    torch.set_num_threads(1)
    q = torch.randn(2, 8, 1024, 64)
    began, over, turns = threading.Event(), threading.Event(), 0

    def call() -> None:
        began.set()
        for _ in range(5):
            kernels.attention(q, q, q, True, 0)
        over.set()

    caller = threading.Thread(target=call)
    caller.start()
    began.wait()
    while not over.is_set():
        time.sleep(0.001)
        turns += 1
    caller.join()
    assert turns > 25  # with the lock held it could not have one but between two of the five calls


def test_forked_children_have_threads_of_their_own(threads: None) -> None:
    """As a DataLoader's workers: the parent's threads are not in the child."""
    torch.set_num_threads(2)
    a = torch.randn(100_000)
    expected = kernels.activation(a, "gelu").numpy().tobytes()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        # Compared as bytes: torch's own threads, if the parent had some, would be waited for in vain.
        answers.put([kernels.activation(a, "gelu").numpy().tobytes() == expected for _ in range(3)])

    process = context.Process(target=child)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        pytest.fail("the child waits for threads that it does not have")
    assert process.exitcode == 0 and answers.get() == [True] * 3


@pytest.mark.parametrize(
    ("shapes", "dtype", "found"),
    [
        (((1, 2, 3, 12), (1, 2, 3, 12)), torch.float32, "heads 12 wide"),
        (((1, 2, 3, 136), (1, 2, 3, 136)), torch.float32, "heads 136 wide"),
        (((1, 2, 3, 16), (1, 2, 3, 16)), torch.float64, "float64 on cpu"),
        (((1, 3, 3, 16), (1, 2, 3, 16)), torch.float32, r"q \(1, 3, 3, 16\)"),
        (((1, 2, 4, 16), (1, 2, 3, 16)), torch.float32, "T ≤ S"),
        (((2, 2, 3, 16), (1, 2, 3, 16)), torch.float32, "B×H×T×K"),
    ],
)
def test_what_the_kernel_refuses(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, found: str) -> None:
    q, k = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    with pytest.raises(ValueError, match=found):
        kernels.attention(q, k, k, True, 0)


def test_lengths_and_types_are_checked_before_addresses_are_given_away() -> None:
    ops, x = torch.ops.bytekiln, torch.randn(3000)
    calls = (
        lambda: kernels.activation(x.half(), "gelu"),
        lambda: ops.activation_backward(x.bfloat16(), x, "gelu"),
        lambda: ops.swiglu(x.bfloat16(), x),
        lambda: kernels.rms_norm(x.bfloat16(), None, 0.0),
        lambda: ops.activation(x.double(), "gelu"),
        lambda: ops.activation_backward(x[:4], x, "gelu"),
        lambda: kernels.swiglu(x, x[:4]),
        lambda: ops.swiglu_backward(x, x, x[:4]),
        lambda: ops.swiglu_backward(x, x, x.double()),
        lambda: kernels.rms_norm(x.double(), None, 0.0),
        lambda: kernels.rms_norm(x, x.double(), 0.0),
        lambda: ops.rms_norm_backward(x, x, torch.ones(2), None),
        lambda: ops.rms_norm_backward(x[:4], x, torch.ones(1), None),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"expected float32( or bf16)? on the CPU, all of one shape"):
            call()
    with pytest.raises(ValueError, match="rms_norm: found weight"):
        kernels.rms_norm(x, x[:4], 0.0)
    q = heads_of(1, 5, 2, 8)
    out, log_sums = ops.scaled_dot_product_attention(q, q, q, True, 0)
    for g, y, logs in ((q[:, :, :4], out, log_sums), (q, out.double(), log_sums), (q, out, log_sums[:, :4])):
        with pytest.raises(ValueError, match="expected float32 on the CPU, all of one shape"):
            ops.scaled_dot_product_attention_backward(g, q, q, q, y, logs, True, 0)
    with pytest.raises(ValueError, match="found window -1"):
        kernels.attention(q, q, q, True, -1)


def test_odd_addresses_are_copied() -> None:
    def odd(x: Tensor) -> Tensor:
        """The same numbers, a byte further on."""
        room = torch.zeros(x.numel() * 4 + 1, dtype=torch.uint8).numpy()
        room[1:] = x.contiguous().numpy().view("u1").reshape(-1)
        cut = torch.frombuffer(memoryview(room)[1:], dtype=torch.float32).view(x.shape)
        assert cut.data_ptr() % 4 == 1
        return cut

    x, q = torch.randn(50), torch.randn(1, 2, 5, 8)
    assert torch.equal(kernels.activation(odd(x), "gelu"), kernels.activation(x, "gelu"))
    dropped = (kernels.dropout_of(y, 0.5, torch.tensor(3)) for y in (odd(x), x))
    assert torch.equal(*dropped)
    assert torch.equal(kernels.rms_norm(odd(x), odd(x), 0.0), kernels.rms_norm(x, x, 0.0))
    assert torch.equal(kernels.attention(*[odd(q)] * 3, True, 0), kernels.attention(q, q, q, True, 0))


def test_forward_mode_goes_through_torchs_own_functions() -> None:
    """Its derivative of a whole model is the one that differences show, and never silently zero."""
    config = ModelConfig(vocab_size=11, d_model=16, num_layers=1, num_heads=2, context_length=6, ffn="gelu")
    torch.manual_seed(0)
    model = TransformerLM(config, attend=reference_attention)
    ids = torch.arange(6)[None]
    weights = {n: p.detach() for n, p in model.named_parameters()}
    ways = {n: torch.randn_like(p) for n, p in weights.items()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, ids).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch scripts its own decompositions at the first call
        _, slope = torch.func.jvp(loss, (weights,), (ways,))
    gradient = torch.func.grad(loss)(weights)
    assert slope == pytest.approx(sum((gradient[n] * ways[n]).sum().item() for n in ways), rel=1e-4)
    q = heads_of(1, 5, 2, 8)
    with pytest.raises(NotImplementedError):  # as torch's own kernel has it
        torch.func.jvp(lambda q: native_attention(q, q, q), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(1, 1, 1, 8), torch.ones(1, 1, 1, 8))
        assert not kernels.activates(dual) and not kernels.attends(dual)


def test_the_bare_operators_have_gradients() -> None:
    x = torch.randn(7, requires_grad=True)
    torch.ops.bytekiln.activation(x, "gelu").sum().backward()
    exact = torch.autograd.grad(F.gelu(x).sum(), x)[0]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, exact)


def test_no_gradient_of_a_gradient() -> None:
    q = heads_of(1, 5, 2, 8).requires_grad_()
    x = torch.randn(5, requires_grad=True)
    for out, of in (
        (kernels.attention(q, q, q, True, 0), q),
        (kernels.activation(x, "gelu"), x),
        (kernels.swiglu(x, x), x),
        (kernels.rms_norm(x, None, 0.0), x),
    ):
        with pytest.raises(RuntimeError, match="kernels: found a backward with create_graph"):
            torch.autograd.grad(out.sum(), of, create_graph=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)])
def test_the_operators_keep_torchs_rules(wanted: tuple[bool, ...]) -> None:
    """Schema, shapes without contents, and a trace of forward and backward."""
    q, k, v = (torch.randn(2, h, 9, 8, requires_grad=w) for h, w in zip((4, 2, 2), wanted, strict=True))
    torch.library.opcheck(torch.ops.bytekiln.scaled_dot_product_attention.default, (q, k, v, True, 3))
    torch.library.opcheck(torch.ops.bytekiln.dropout.default, (q, 0.3, torch.tensor(5)))


def test_nothing_is_read_where_nothing_stands() -> None:
    """As in `footprint`: shapes, types and strides alone go through forward and backward."""
    with FakeTensorMode():
        q = torch.randn(2, 9, 4, 16).transpose(1, 2).requires_grad_()
        out = native_attention(q, q, q)
        x = kernels.swiglu(kernels.activation(out, "gelu"), kernels.rms_norm(out, None, 1e-5))
        x = kernels.dropout(x, 0.5)
        x.sum().backward()
        assert out.transpose(1, 2).is_contiguous() and q.grad is not None and q.grad.shape == q.shape


MODEL = ModelConfig(vocab_size=50, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, context_length=40)


@pytest.mark.parametrize("ffn", ["swiglu", "silu", "gelu", "gelu_tanh", "relu2"])
def test_a_model_equals_its_formula_in_float64(ffn: str) -> None:
    config = ModelConfig(**{**MODEL.model_dump(), "ffn": ffn})
    torch.manual_seed(0)
    fast = TransformerLM(config)
    exact = TransformerLM(config, attend=reference_attention).double()
    exact.load_state_dict(fast.state_dict())
    ids = torch.randint(50, (2, 40))
    for model in (fast, exact):
        model(ids).square().mean().backward()
    for (name, ours), right in zip(fast.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and right.grad is not None
        torch.testing.assert_close(
            ours.grad, right.grad.float(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


LEVEL = """
import torch
from bytekiln import _core, kernels
from bytekiln.errors import ConfigError
torch.manual_seed(0)
q, k, v = (torch.randn(2, 70, 4, 24).transpose(1, 2).requires_grad_() for _ in range(3))
try:
    out = kernels.attention(q, k, v, True, 0)
except ConfigError as error:
    print(error)
else:
    gradients = torch.autograd.grad(out.square().sum() + kernels.activation(out, "gelu").sum(), (q, k, v))
    print(_core.simd_level(), *(repr(float(x.double().square().sum())) for x in (out, *gradients)))
"""


def test_levels_agree() -> None:
    def said(level: str) -> list[str]:
        env = {**os.environ, "BYTEKILN_SIMD": level}
        done = subprocess.run([sys.executable, "-c", LEVEL], env=env, capture_output=True, text=True, check=True)
        return done.stdout.split()

    best, scalar = said(""), said("scalar")
    assert best[0] == _core.simd_level() and scalar[0] == "scalar"
    assert [float(x) for x in best[1:]] == pytest.approx([float(x) for x in scalar[1:]], rel=1e-5)
    assert "BYTEKILN_SIMD: found mmx; expected what this processor has" in " ".join(said("mmx"))


@pytest.mark.slow
def test_compiling_changes_nothing_but_rounding() -> None:
    torch.manual_seed(0)
    model = TransformerLM(MODEL)
    ids = torch.randint(50, (2, 40))
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_compiled_model_has_the_core_s_attention_in_its_graph() -> None:
    """Caught without a compiler: the backend looks at the graph and runs it as it is."""
    called: list[str] = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    torch.compile(TransformerLM(MODEL), backend=look, fullgraph=True)(torch.randint(50, (2, 40)))
    attentions = [name for name in called if "scaled_dot_product_attention" in name]
    assert attentions == ["bytekiln.scaled_dot_product_attention"] * MODEL.num_layers


@pytest.mark.parametrize("size", [1e3, 1e6, 1e12])
def test_attention_with_huge_scores_is_a_choice_of_one_key(size: float) -> None:
    """Rounding of scores of 1e12 is far beyond what 2^x can hold; torch stays finite, and so must this."""
    torch.manual_seed(0)
    q, k, v = ((torch.randn(2, 2, 9, 8) * s).requires_grad_() for s in (size, size, 1.0))
    out = kernels.attention(q, k, v, True, 0)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@given(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.lists(st.booleans(), min_size=4))
def test_products_of_one_input_are_the_single_ones(rows: int, widths: list[int], wanted: list[bool]) -> None:
    """Whatever wants a gradient; those of x add up."""
    tensors = [torch.randn(2, rows, 4, dtype=torch.float64), *(torch.randn(w, 4, dtype=torch.float64) for w in widths)]
    ours, theirs = ([x.clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=False)] for _ in range(2))
    mine, other = kernels.products(ours[0], ours[1:]), [F.linear(theirs[0], w) for w in theirs[1:]]
    torch.testing.assert_close(list(mine), other, rtol=0, atol=0)
    if any(x.requires_grad for x in ours):
        sum(y.sin().sum() for y in mine).backward()
        sum(y.sin().sum() for y in other).backward()
        torch.testing.assert_close(
            [x.grad for x in ours if x.requires_grad], [x.grad for x in theirs if x.requires_grad]
        )
