"""The loss: chunked as the plain one, never whole logits, and at the start what theory says."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bytekiln.config import ModelConfig, load_config
from bytekiln.loss import (
    CHUNK_BYTES,
    IGNORED,
    chunked_cross_entropy,
    chunked_scores,
    expected_initial_loss,
    plain_cross_entropy,
    positions_at_once,
    summed_cross_entropy,
)
from bytekiln.model import TransformerLM

torch.set_num_threads(1)


class Watch(TorchDispatchMode):
    """Notes every operation that torch runs: its name, its types, and the largest tensor it touches."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.calls, self.types = 0, Counter[str](), dict[str, set[torch.dtype]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        touched = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        # The storage too: a view may be small where what it looks at is not.
        sizes = [max(t.numel(), t.untyped_storage().nbytes() // t.element_size()) for t in touched]
        self.largest = max([self.largest, *sizes])
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        self.types.setdefault(name, set()).update(t.dtype for t in touched if t.ndim == 2)
        return out


def problem(
    B: int, T: int, D: int, V: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, ignored: float = 0.25
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, head, targets; logits of deviation 2, so that caps and softmax have something to bend."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    head = (torch.randn(V, D, generator=draw, dtype=torch.float64) * 2 / math.sqrt(D)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (B, T), generator=draw)
    targets[torch.rand(B, T, generator=draw) < ignored] = IGNORED
    return x, head, targets


def with_gradients(total_and_nll: tuple[Tensor, Tensor], x: Tensor, head: Tensor, scale: float = 1.0) -> list[Tensor]:
    total, nll = total_and_nll
    assert not nll.requires_grad
    return [total.detach(), nll, *torch.autograd.grad(total * scale, (x, head))]


def assert_equal(found: list[Tensor], expected: list[Tensor], rel: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a.double() - b.double()).norm()) <= rel * float(b.double().norm()) + 1e-300


def test_sum_over_real_targets() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 7), torch.tensor([[1, IGNORED, 3], [IGNORED, IGNORED, 6]])
    by_hand = -sum(
        logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(3) if targets[b, t] != IGNORED
    )
    torch.testing.assert_close(summed_cross_entropy(logits, targets), by_hand)
    assert summed_cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_the_plain_path_is_the_formula(softcap: float) -> None:
    x, head, targets = problem(2, 4, 3, 5)
    nll = squares = 0.0
    for b in range(2):
        for t in range(4):
            z = (head @ x[b, t]).tolist()
            z = [softcap * math.tanh(v / softcap) for v in z] if softcap else z
            y, ln_sum = int(targets[b, t]), math.log(sum(map(math.exp, z)))
            if y != IGNORED:
                nll, squares = nll + ln_sum - z[y], squares + ln_sum**2
    total, reported = plain_cross_entropy(x, head, targets, softcap=softcap, z_loss=0.3)
    assert float(reported) == pytest.approx(nll, rel=1e-12)
    assert float(total.detach()) == pytest.approx(nll + 0.3 * squares, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 7),
    D=st.integers(1, 5),
    V=st.integers(1, 11),
    chunk=st.integers(1, 25),
    softcap=st.sampled_from([0.0, 0.7, 15.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.5]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    exact=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_chunked_is_plain(
    B: int,
    T: int,
    D: int,
    V: int,
    chunk: int,
    softcap: float,
    z_loss: float,
    ignored: float,
    exact: bool,
    seed: int,
) -> None:
    """float64 against torch's float64; float32 against torch's, to 1e-6."""
    x, head, targets = problem(B, T, D, V, seed=seed, ignored=ignored)
    truth = with_gradients(plain_cross_entropy(x, head, targets, softcap=softcap, z_loss=z_loss), x, head)
    if exact:
        found = with_gradients(
            chunked_cross_entropy(x, head, targets, softcap=softcap, z_loss=z_loss, chunk=chunk), x, head
        )
        assert [t.dtype for t in found] == [torch.float64] * 4
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        return
    x32, head32 = (t.detach().float().requires_grad_() for t in (x, head))
    found = with_gradients(
        chunked_cross_entropy(x32, head32, targets, softcap=softcap, z_loss=z_loss, chunk=chunk), x32, head32
    )
    plain = with_gradients(plain_cross_entropy(x32, head32, targets, softcap=softcap, z_loss=z_loss), x32, head32)
    # Where p(target) is nearly 1 the gradient is a small difference: relative to its terms then, |head| and |x|.
    for a, b, terms in zip(found, plain, (truth[0], truth[0], head, x), strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm()) <= 1e-6 * float(b.norm() + terms.detach().norm())


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize("chunk", [1, 50, 64, 200, 1000])
def test_fp32_agrees_to_a_millionth(softcap: float, z_loss: float, chunk: int) -> None:
    x, head, targets = problem(4, 64, 48, 300, dtype=torch.float32)
    kinds = {"softcap": softcap, "z_loss": z_loss}
    found = with_gradients(chunked_cross_entropy(x, head, targets, **kinds, chunk=chunk), x, head)
    assert_equal(found, with_gradients(plain_cross_entropy(x, head, targets, **kinds), x, head), 1e-6)


def test_gradient_of_the_value_itself() -> None:
    """Finite differences, which know nothing of either path's derivation."""
    x, head, targets = problem(2, 3, 4, 6)
    for softcap, z_loss in ((0.0, 0.0), (2.0, 0.3)):
        assert torch.autograd.gradcheck(
            lambda x, head, c=softcap, z=z_loss: chunked_cross_entropy(x, head, targets, softcap=c, z_loss=z, chunk=2)[
                0
            ],
            (x, head),
        )


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_the_logits_never_exist_whole(low: torch.dtype | None) -> None:
    """Nor any other tensor of their size, forward or backward; and the backward pass does no product at all."""
    B, T, D, V, chunk = 4, 32, 16, 500, 16
    x, head, targets = problem(B, T, D, V, dtype=torch.float32)
    with Watch() as forward, torch.autocast("cpu", low, enabled=low is not None):
        total, _ = chunked_cross_entropy(x, head, targets, softcap=15.0, z_loss=1e-4, chunk=chunk)
    with Watch() as backward:
        total.backward()
    assert forward.largest == max(chunk * V, V * D) < B * T * V
    assert backward.largest <= V * D
    products = {name: count for name, count in forward.calls.items() if "mm" in name}
    assert sum(products.values()) == 3 * B * T // chunk
    assert not [name for name in backward.calls if "mm" in name]
    with Watch() as plain:
        plain_cross_entropy(x, head, targets, softcap=15.0, z_loss=1e-4)[0].backward()
    assert plain.largest >= B * T * V, "the watch sees nothing"


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_autocast(low: torch.dtype, softcap: float) -> None:
    """Products in the low type, softmax in fp32, gradients as near to the truth as those of the plain path."""
    x, head, targets = problem(2, 32, 24, 200, dtype=torch.float32)
    x64, head64 = (t.detach().double().requires_grad_() for t in (x, head))
    kinds = {"softcap": softcap, "z_loss": 1e-4}
    truth = with_gradients(plain_cross_entropy(x64, head64, targets, **kinds), x64, head64)
    with Watch() as watch, torch.autocast("cpu", low):
        found = with_gradients(chunked_cross_entropy(x, head, targets, **kinds, chunk=10), x, head)
    with torch.autocast("cpu", low):
        plain = with_gradients(plain_cross_entropy(x, head, targets, **kinds), x, head)
    assert watch.types["mm"] == {low}
    assert watch.types["exp_"] == watch.types["sum"] == {torch.float32}
    assert [t.dtype for t in found] == [torch.float32] * 4
    for a, b, true in zip(found, plain, truth, strict=True):
        assert float((a - true).norm()) <= 1.2 * float((b - true).norm()) + 1e-4 * float(true.norm())


def test_low_features_get_low_gradients_and_the_head_its_own() -> None:
    x, head, targets = problem(2, 8, 6, 20, dtype=torch.float32)
    x16 = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = chunked_cross_entropy(x16, head, targets, softcap=0.0, z_loss=0.0, chunk=3)
    by_x, by_head = torch.autograd.grad(total, (x16, head))
    assert (by_x.dtype, by_head.dtype, total.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_the_heads_gradient_is_accumulated_in_fp32() -> None:
    """2,048 equal terms: a bfloat16 sum of them stops growing at 256 of them."""
    x, head, targets = problem(1, 1, 8, 30, dtype=torch.float32, ignored=0.0)

    def gradient(times: int, chunk: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = chunked_cross_entropy(
                x.expand(1, times, 8), head, targets.expand(1, times), softcap=0.0, z_loss=0.0, chunk=chunk
            )
        return torch.autograd.grad(total, head)[0]

    torch.testing.assert_close(gradient(2048, 1), 2048 * gradient(1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", [None, torch.float16])
def test_the_incoming_gradient_scales_both_and_twice(low: torch.dtype | None) -> None:
    """As a loss scale, an average over processes, or a graph that is kept and walked again."""
    x, head, targets = problem(2, 16, 8, 40, dtype=torch.float32)
    with torch.autocast("cpu", low, enabled=low is not None):
        total, _ = chunked_cross_entropy(x, head, targets, softcap=5.0, z_loss=0.01, chunk=7)
    once = torch.autograd.grad(total, (x, head), retain_graph=True)
    scaled = torch.autograd.grad(total * torch.tensor(65536.0 / 29), (x, head), retain_graph=True)
    again = torch.autograd.grad(total, (x, head))
    for a, b, c in zip(once, scaled, again, strict=True):
        torch.testing.assert_close(b, a * (65536 / 29), rtol=1e-6, atol=0)
        assert torch.equal(a, c)


def test_without_gradient_the_values_are_the_same() -> None:
    x, head, targets = problem(2, 16, 8, 40, dtype=torch.float32)
    kinds = {"softcap": 5.0, "z_loss": 0.01, "chunk": 7}
    total, nll = chunked_cross_entropy(x, head, targets, **kinds)
    with torch.no_grad(), Watch() as watch:
        quiet, quiet_nll = chunked_cross_entropy(x, head, targets, **kinds)
    assert not quiet.requires_grad and torch.equal(quiet, total) and torch.equal(quiet_nll, nll)
    assert watch.calls["mm"] == math.ceil(32 / 7), "a product for a gradient that nobody wants"


@pytest.mark.parametrize("frozen", ["x", "head"])
def test_what_is_frozen_costs_nothing(frozen: str) -> None:
    x, head, targets = problem(2, 8, 6, 20)
    both = with_gradients(chunked_cross_entropy(x, head, targets, softcap=0.0, z_loss=0.0, chunk=4), x, head)
    (x if frozen == "x" else head).requires_grad_(False)
    with Watch() as watch:
        total, _ = chunked_cross_entropy(x, head, targets, softcap=0.0, z_loss=0.0, chunk=4)
    total.backward()
    assert sum(n for name, n in watch.calls.items() if "mm" in name) == 2 * 16 // 4
    left, expected = (head, both[3]) if frozen == "x" else (x, both[2])
    assert left.grad is not None
    torch.testing.assert_close(left.grad, expected)


@pytest.mark.parametrize("chunk", [0, 3])
def test_no_real_target_at_all(chunk: int) -> None:
    x, head, targets = problem(1, 8, 4, 9, ignored=1.1)
    total, nll = chunked_cross_entropy(x, head, targets, softcap=2.0, z_loss=0.1, chunk=chunk)
    total.backward()
    assert x.grad is not None and head.grad is not None
    assert float(total.detach()) == float(nll) == float(x.grad.abs().sum()) == float(head.grad.abs().sum()) == 0


def test_a_simulation_leaves_chunks_out_and_keeps_their_place() -> None:
    x, head, targets = problem(2, 9, 4, 11)
    kinds: dict[str, Any] = {"softcap": 0.0, "z_loss": 0.0}
    whole = with_gradients(chunked_cross_entropy(x, head, targets, **kinds, chunk=2), x, head)

    def spans(positions: int, chunk: int) -> Any:
        assert (positions, chunk) == (18, 2)
        yield from ((0, 2), (2, 16), (16, 18))

    with Watch() as watch:
        found = with_gradients(chunked_cross_entropy(x, head, targets, **kinds, chunk=2, simulated=spans), x, head)
    assert watch.calls["exp_"] == 2
    places = [0, 1, 16, 17]
    by_x, expected = (found[2].flatten(0, 1), whole[2].flatten(0, 1))
    assert by_x.shape == expected.shape and torch.equal(by_x[places], expected[places])


def test_huge_logits_neither_overflow_nor_vanish() -> None:
    x, head, targets = problem(2, 8, 6, 20, dtype=torch.float32)
    with torch.no_grad():
        head.mul_(1e4)
    kinds = {"softcap": 0.0, "z_loss": 0.0}
    found = with_gradients(chunked_cross_entropy(x, head, targets, **kinds, chunk=5), x, head)
    assert_equal(found, with_gradients(plain_cross_entropy(x, head, targets, **kinds), x, head), 1e-6)
    with torch.no_grad():
        x[0, 0, 0], targets[0, 0] = math.nan, 1
    assert not chunked_cross_entropy(x, head, targets, **kinds, chunk=5)[0].isfinite()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_scores_count_what_the_greatest_logit_hits(softcap: float) -> None:
    x, head, targets = problem(3, 16, 8, 40)
    with torch.no_grad():
        greatest = (x @ head.T).argmax(-1)
        targets = torch.where((torch.arange(16) % 3 == 0) & (targets != IGNORED), greatest, targets)
    expected = int(((greatest == targets) & (targets != IGNORED)).sum())
    assert 0 < expected < int((targets != IGNORED).sum())
    with Watch() as watch:
        nll, correct = chunked_scores(x, head, targets, softcap=softcap, chunk=5)
    assert int(correct) == expected and correct.dtype == torch.int64 and not nll.requires_grad
    torch.testing.assert_close(nll, plain_cross_entropy(x, head, targets, softcap=softcap, z_loss=0.0)[1])
    assert watch.largest == max(3 * 16 * 8, 5 * 40) < 3 * 16 * 40


def test_chunks_by_size() -> None:
    def chosen(field: int | str, B: int, T: int, V: int, D: int = 64, device: str = "cpu") -> int:
        return positions_at_once(field, torch.empty(B, T, D, device="meta" if device != "cpu" else "cpu"), V)

    assert chosen(0, 8, 256, 50_304) == 0 and chosen(100, 1, 8, 65) == 100
    assert chosen("auto", 12, 64, 65) == 0, "nanoGPT's CPU recipe fits the plain path"
    for B, T, V in ((8, 256, 10_000), (2, 512, 50_304), (1, 3, 2**25)):
        n = chosen("auto", B, T, V)
        assert n >= 1 and (n == 1 or 4 * n * V <= CHUNK_BYTES)
        parts = -(-B * T // n)
        assert (parts - 1) * CHUNK_BYTES < 4 * B * T * V, "more parts than needed"
    assert chosen("auto", 8, 256, 10_000) == 683  # three even parts
    assert chosen("auto", 16, 1024, 50_304, 768, "gpu") == 2731  # six parts of at most 4 · 768


@pytest.mark.slow
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_compiled(low: torch.dtype | None) -> None:
    """One graph without a break, forward and backward, with the numbers of the eager one."""
    x, head, targets = problem(2, 16, 8, 40, dtype=torch.float32)

    def loss(x: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", low, enabled=low is not None):
            return chunked_cross_entropy(x * 1.5, head, targets, softcap=5.0, z_loss=0.01, chunk=7)

    compiled = torch.compile(loss, fullgraph=True)
    found = with_gradients(compiled(x, head, targets), x, head, scale=3.0)
    expected = with_gradients(loss(x, head, targets), x, head, scale=3.0)
    assert_equal(found, expected, 1e-6 if low is None else 4e-3)
    with torch.no_grad():
        assert_equal(list(compiled(x, head, targets)), list(loss(x, head, targets)), 1e-6 if low is None else 4e-3)


def measured(config: ModelConfig, windows: int = 32) -> float:
    torch.manual_seed(3)
    model = TransformerLM(config).eval()
    tokens = torch.randint(0, config.vocab_size, (windows, config.context_length + 1))
    with torch.no_grad():
        x, head = model.features(tokens[:, :-1]).x_BxTxD, model.head_weight
        nll, _ = chunked_scores(x, head, tokens[:, 1:], softcap=config.logit_softcap, chunk=512)
    return float(nll) / (windows * config.context_length)


def test_nanogpt_preset_starts_within_five_percent_of_ln_v() -> None:
    config = load_config("shakespeare-char", {"vocab_size": 65}).model
    assert measured(config, windows=4) == pytest.approx(math.log(65), rel=0.05)


SHAPE: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "context_length": 64}


@pytest.mark.parametrize(
    "choices",
    [
        {"vocab_size": 256, "d_model": 256},
        {"vocab_size": 1000, "d_model": 64},
        {"vocab_size": 128, "d_model": 512},
        {"vocab_size": 256, "d_model": 256, "tie_embeddings": True},
        {"vocab_size": 512, "d_model": 256, "tie_embeddings": True, "init": "gpt2"},
        {"vocab_size": 128, "d_model": 512, "logit_softcap": 1.0},
        {"vocab_size": 128, "d_model": 512, "logit_softcap": 15.0, "norm": "layer", "bias": True},
        {"vocab_size": 130, "d_model": 256, "pad_vocab": True},
        {"vocab_size": 128, "d_model": 512, "norm_position": "post", "zero_init_projections": True},
        {"vocab_size": 128, "d_model": 512, "head_init": "small", "embedding_norm": True},
        {"vocab_size": 256, "d_model": 256, "value_embeddings": True, "residual_lambdas": True, "qk_norm": True},
    ],
)
def test_start_meets_its_own_formula(choices: dict[str, Any]) -> None:
    config = ModelConfig(**SHAPE, **choices)
    # 2,048 targets whose loss has deviation s ≤ 1.25: the mean is good to 0.03.
    assert measured(config) == pytest.approx(expected_initial_loss(config), abs=0.06)


@pytest.mark.parametrize("norm", ["rms", "none"])
def test_a_head_of_zeros_starts_at_ln_v_exactly(norm: str) -> None:
    config = ModelConfig(vocab_size=100, d_model=64, head_init="zero", pad_vocab=True, norm=norm, **SHAPE)
    assert expected_initial_loss(config) == math.log(128)
    assert measured(config) == pytest.approx(math.log(128), rel=1e-6)


def test_the_formula_says_more_than_ln_v() -> None:
    wide = ModelConfig(vocab_size=128, d_model=512, num_heads=4)
    start = expected_initial_loss(wide)
    assert start is not None and start - math.log(128) > 0.7
    capped = [
        expected_initial_loss(ModelConfig(vocab_size=128, d_model=512, num_heads=4, logit_softcap=c))
        for c in (0.1, 1.0, 5.0, 1e6)
    ]
    assert capped == sorted(capped) and capped[0] == pytest.approx(math.log(128), abs=0.01)
    assert capped[-1] == pytest.approx(start, abs=1e-9)


@pytest.mark.parametrize(
    "choices", [{"norm": "none"}, *({"tie_embeddings": True, k: True} for k in ("embedding_norm", "residual_lambdas"))]
)
def test_no_formula_where_none_holds(choices: dict[str, Any]) -> None:
    assert expected_initial_loss(ModelConfig(vocab_size=128, d_model=512, num_heads=4, **choices)) is None
